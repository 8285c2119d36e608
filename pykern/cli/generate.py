"""pykern generate: the text goes to stdout, one line on how fast it came to stderr."""

import argparse
import codecs
import json
import sys
import time
from typing import Any

from pykern.cli.parts import add_threads, flag, load_model, require_device, set_threads
from pykern.cli.tokens import token_lines, token_records

DRAWING = {"temperature": 0.8, "top_k": None, "top_p": None, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None}


def add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--prompt", default="\n", help='the text to continue; "-" reads it from stdin')
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, help="0: always the most likely token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set that reaches P")
    parser.add_argument("--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the first")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: tokens of the text less often")
    parser.add_argument("--seed", type=int, help="same seed, same text")
    parser.add_argument(
        "--beams", type=int, metavar="N", help="search for a likely text with N beams instead of drawing"
    )
    parser.add_argument(
        "--length-penalty", type=float, metavar="A", help="with --beams: rank texts by log P / tokens^A (default 0)"
    )
    parser.add_argument(
        "--logprobs", action="store_true", help="then a line per new token: its text, probability and rank"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help="of the weights: float32 (default), bfloat16, int8 or int4"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--quiet", action="store_true", help="only the text: measure nothing, no line on stderr")
    add_threads(parser)
    parser.set_defaults(run=generate)


def speed(session: Any, prompt: int, new: int, first: float, rest: float) -> str:
    """What a run took: `first` seconds for the prompt and the first new token, `rest` for the others.

    A new token reads every weight once; the bandwidth beside it is that of a plain read of as many bytes, right now;
    on a GPU there is none beside it.
    """
    from pykern.lm.roof import read_bandwidth

    line = f"prompt: {prompt} tokens"
    if new > 0:
        line += f", {prompt / first:,.0f} tok/s"
    line += f"; new: {new} tokens"
    if new > 1 and rest > 0:
        rate = (new - 1) / rest
        read = rate * session.weight_bytes
        line += f", {rate:,.0f} tok/s; weights read at {read / 1e9:.3g} GB/s"
        if session.device.type == "cpu":
            most = read_bandwidth(session.weight_bytes)
            line += f", {read / most:.0%} of {most / 1e9:.3g}"
    return line


def check(arguments: argparse.Namespace) -> None:
    """Options that exclude each other, before anything is read."""
    if arguments.beams is None:
        if arguments.length_penalty is not None:
            raise ValueError("--length-penalty ranks what --beams finds: give --beams, too")
        return
    if arguments.beams < 1:
        raise ValueError(f"--beams is {arguments.beams} but must be at least 1")
    for name in DRAWING:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--beams is a search without chance: leave {flag(name)} out")


def stream(
    arguments: argparse.Namespace, session: Any, tokenizer: Any, prompt: str, ids: list[int]
) -> tuple[list[int], str]:
    """(new tokens, what to say about the speed); prompt and text go to stdout as they come, unless JSON is wanted."""
    import torch

    options = {name: default for name, default in DRAWING.items() if getattr(arguments, name) is None}
    options |= {name: getattr(arguments, name) for name in DRAWING if name not in options}
    tokens = session.stream(torch.tensor([ids]), max_new_tokens=arguments.max_new_tokens, **options)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    if not arguments.json:
        sys.stdout.write(prompt)
    times, new = [time.perf_counter()], list[int]()
    for token in tokens:
        times.append(time.perf_counter())
        new += token.tolist()
        if not arguments.json:
            sys.stdout.write(text.decode(tokenizer.decode_bytes(token.tolist())))
            sys.stdout.flush()
    if not arguments.json:
        print(text.decode(b"", final=True), flush=True)
    if arguments.quiet:
        return new, ""
    first = times[min(1, len(times) - 1)]
    return new, speed(session, len(ids), len(new), first - times[0], times[-1] - first)


def search(
    arguments: argparse.Namespace, session: Any, tokenizer: Any, prompt: str, ids: list[int]
) -> tuple[list[Any], str]:
    """(all beams, the best first, what to say about them); prompt and best text go to stdout, unless JSON is wanted."""
    import torch

    from pykern.lm.beam import beam_search

    started = time.perf_counter()
    found = beam_search(
        session,
        torch.tensor(ids),
        beams=arguments.beams,
        max_new_tokens=arguments.max_new_tokens,
        length_penalty=arguments.length_penalty or 0.0,
        return_all=True,
    )
    seconds, best = time.perf_counter() - started, found[0]
    if not arguments.json:
        print(prompt + tokenizer.decode(best.tokens), flush=True)
    line = f"prompt: {len(ids)} tokens; new: {len(best.tokens)} tokens, beams: {arguments.beams}"
    return found, f"{line}, {seconds:.2f} s; log P {best.log_probability:.4f}"


def generate(arguments: argparse.Namespace) -> int:
    check(arguments)
    set_threads(arguments.threads)
    require_device(arguments.device)
    model, tokenizer = load_model(arguments.model)
    model.to(arguments.device)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    session = model.session(dtype=arguments.dtype, batch=arguments.beams or 1)
    if arguments.logprobs and len(ids) + arguments.max_new_tokens - 1 > session.max_len:
        raise ValueError(
            f"--logprobs: {len(ids)} tokens and {arguments.max_new_tokens} new ones do not fit into block_size "
            f"{session.max_len}, so later tokens would not be drawn with all tokens before them in sight"
        )
    found = list[Any]()
    if arguments.beams is None:
        new, line = stream(arguments, session, tokenizer, prompt, ids)
    else:
        found, line = search(arguments, session, tokenizer, prompt, ids)
        new = list(found[0].tokens)
    tokens = list[Any]()
    if arguments.logprobs:
        from pykern.lm.scoring import token_probabilities

        tokens = token_probabilities(session, ids, new)
    if arguments.json:
        result: dict[str, Any] = {"prompt": prompt, "text": tokenizer.decode(new)}
        if arguments.logprobs:
            result["tokens"] = token_records(tokenizer, tokens)
            result["log_probability"] = sum(token.log_probability for token in tokens)
        if found:
            result["beams"] = [
                {
                    "text": tokenizer.decode(beam.tokens),
                    "log_probability": beam.log_probability,
                    "score": beam.score,
                }
                for beam in found
            ]
        print(json.dumps(result))
    elif arguments.logprobs:
        print(*token_lines(tokenizer, tokens), sep="\n")
    if not arguments.quiet:
        print(line, file=sys.stderr)
    return 0
