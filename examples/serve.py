"""Requests that come while others run, served by one session: submit() queues, poll() makes a step of all that run.

    python examples/serve.py                           a model with random weights, which writes nonsense
    python examples/serve.py --model out/demo          a model that was trained (make demo)
    python examples/serve.py --requests 4 --tokens 8   fewer and shorter

Each request gets the tokens that it would get alone, whoever runs beside it: the end of this program checks that. A web
server would call submit() in its handlers and poll() in a loop of its own, and send the tokens on as they come.
"""

import argparse
import time
from pathlib import Path

import torch

from pykern.lm import Config, Session, Tokenizer, Transformer

PROMPTS = ("def main(", "import os\n", "class Node:\n", "for i in ", "def main(argv", "return ")
TOGETHER = 3  # requests that run at once; the others wait for a place
EVERY = 4  # polls from one request to the next


def load(folder: Path | None, seed: int) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a folder, or a small model of bytes with random weights."""
    if folder is not None:
        return Transformer.load(folder), Tokenizer.load(folder)
    torch.manual_seed(seed)
    config = Config(n_layer=2, n_head=4, n_embd=64, block_size=256, vocab_size=256, positions="rope", norm="rmsnorm")
    return Transformer(config), Tokenizer.train("byte")


def sampling(number: int, tokens: int) -> dict[str, float | int]:
    """Options of a request: every second one is greedy, the others draw, each with a seed of its own."""
    return dict(max_new_tokens=tokens, seed=number, temperature=0.8 * (number % 2))


def serve(session: Session, prompts: list[torch.Tensor], tokens: int) -> dict[int, list[int]]:
    """The tokens of each request, which comes EVERY polls after the one before."""
    written: dict[int, list[int]] = {}
    coming, polls = list(enumerate(prompts, 1)), 0
    while coming or session.pending:
        if coming and polls % EVERY == 0:
            number, prompt = coming.pop(0)
            name = session.submit(prompt, **sampling(number, tokens))
            written[name] = []
            print(f"poll {polls:3}: request {name} comes, {session.pending} not done", flush=True)
        for progress in session.poll():
            written[progress.request] += progress.tokens
            if progress.done:
                print(f"poll {polls:3}: request {progress.request} is done", flush=True)
        polls += 1
    return written


def main(argv: list[str] | None = None) -> dict[int, list[int]]:
    parser = argparse.ArgumentParser(description="Serve requests that join and leave a running batch.")
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: random weights)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, int8 or int4 (default float32)")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=40, help="that each request gets (default 40)")
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model, seed=0)
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(options.requests)]
    prompts = [torch.tensor(tokenizer.encode(text)) for text in texts]

    session = model.session(dtype=options.dtype, batch=TOGETHER)
    start = time.perf_counter()
    written = serve(session, prompts, options.tokens)
    seconds = time.perf_counter() - start
    total = sum(map(len, written.values()))
    print(f"{total} tokens of {len(written)} requests in {seconds:.2f} s, {TOGETHER} at once")

    alone = model.session(dtype=options.dtype)
    for number, prompt in enumerate(prompts, 1):
        alone.reset()
        ids = alone.generate(prompt[None], **sampling(number, options.tokens))[0, len(prompt) :]
        if ids.tolist() != written[number]:
            raise ArithmeticError(f"request {number} got other tokens than it gets alone")
        print(f"{number}: {texts[number - 1]!r} + {tokenizer.decode(written[number])!r}")
    print("each has the tokens that it gets alone")
    return written


if __name__ == "__main__":
    main()
