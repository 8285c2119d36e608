"""pykern generate: the text goes to stdout, one line on how fast it came to stderr."""

import argparse
import codecs
import sys
import time
from typing import Any

from pykern.cli.parts import add_threads, load_model, set_threads


def add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--prompt", default="\n", help='the text to continue; "-" reads it from stdin')
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set that reaches P")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens at least P times as likely as the first"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens of the text less often"
    )
    parser.add_argument("--seed", type=int, help="same seed, same text")
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help="of the weights: float32 (default), bfloat16, int8 or int4"
    )
    parser.add_argument("--quiet", action="store_true", help="only the text: measure nothing, no line on stderr")
    add_threads(parser)
    parser.set_defaults(run=generate)


def speed(session: Any, prompt: int, new: int, first: float, rest: float) -> str:
    """What a run took: `first` seconds for the prompt and the first new token, `rest` for the others.

    A new token reads every weight once; the bandwidth beside it is that of a plain read of as many bytes, right now.
    """
    from pykern.lm.roof import read_bandwidth

    line = f"prompt: {prompt} tokens"
    if new > 0:
        line += f", {prompt / first:,.0f} tok/s"
    line += f"; new: {new} tokens"
    if new > 1 and rest > 0:
        rate = (new - 1) / rest
        read, most = rate * session.weight_bytes, read_bandwidth(session.weight_bytes)
        line += f", {rate:,.0f} tok/s; weights read at {read / 1e9:.3g} GB/s, {read / most:.0%} of {most / 1e9:.3g}"
    return line


def generate(arguments: argparse.Namespace) -> int:
    set_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    import torch

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    session = model.session(dtype=arguments.dtype)
    stream = session.stream(
        torch.tensor([ids]),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    sys.stdout.write(prompt)
    times = [time.perf_counter()]
    for token in stream:
        times.append(time.perf_counter())
        sys.stdout.write(text.decode(tokenizer.decode_bytes(token.tolist())))
        sys.stdout.flush()
    print(text.decode(b"", final=True), flush=True)
    if not arguments.quiet:
        first, new = times[min(1, len(times) - 1)], len(times) - 1
        print(speed(session, len(ids), new, first - times[0], times[-1] - first), file=sys.stderr)
    return 0
