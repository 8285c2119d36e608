"""pykern tokenize train | encode | decode | inspect."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykern.cli.parts import Parser

if TYPE_CHECKING:
    from pykern.lm.tokenizer import Tokenizer
    from pykern.lm.tokenizer_compare import Comparison

MAX_STDIN = 1 << 30  # bytes, as for a file to train on
EACH = 1000  # tokens of each kind that inspect trains


def add_tokenize(commands: Any) -> None:
    parser = commands.add_parser("tokenize", help="train and use tokenizers", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    source = 'a UTF-8 file, a folder of them, or "stdlib"'
    new = actions.add_parser("train", help="write a tokenizer.json", allow_abbrev=False)
    new.add_argument("--data", required=True, metavar="SOURCE", help=source)
    new.add_argument("--kind", default="bpe", help="byte, character, word, wordpiece, bpe (default) or unigram")
    new.add_argument("--vocab-size", type=int, default=None, help="tokens, at most (byte: 256; character, word: all)")
    new.add_argument("--out", required=True, metavar="FILE")
    new.add_argument("--time", action="store_true", help="print seconds of training and characters/s of encoding")
    new.set_defaults(run=tokenize_train)
    for name, run, text in (
        ("encode", tokenize_encode, "print the ids of a text"),
        ("decode", tokenize_decode, "print the text of ids"),
        ("inspect", tokenize_inspect, "print how a text splits, under one tokenizer or several"),
    ):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        several = name == "inspect"
        action.add_argument(
            "--tokenizer",
            required=not several,
            action="append" if several else "store",
            metavar="PATH",
            help="a tokenizer.json or a checkpoint folder" + ("; may be repeated" if several else ""),
        )
        if several:
            action.add_argument("--data", metavar="SOURCE", help=f"train one of each kind on it first: {source}")
            action.add_argument(
                "--vocab-size", type=int, default=None, help=f"tokens of each kind, with --data (default {EACH})"
            )
            action.add_argument("--plot", metavar="FILE", help="draw the splits and the counts as a PNG")
        action.add_argument("text", nargs="*", help="words or ids; none: stdin")
        action.set_defaults(run=run)


def given_text(words: Sequence[str]) -> str:
    """The words of the command line, or else stdin. ValueError when that is not UTF-8, whatever the locale says."""
    if words:
        return " ".join(words)
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # a text stream that a caller put there
        return sys.stdin.read()
    data = buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise ValueError(f"stdin has more than {MAX_STDIN} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text (byte {error.start})") from None


def ids_of(text: str) -> list[int]:
    ids = []
    for word in text.split():
        try:
            ids.append(int(word))
        except ValueError:
            raise ValueError(f"invalid literal for an id: {word[:20]!r}") from None
    return ids


def timed(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What call returns, and the seconds that passed and that the processor worked."""
    start, worked = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - start, time.process_time() - worked)


def tokenize_train(arguments: argparse.Namespace) -> int:
    from pykern.lm import corpus
    from pykern.lm.tokenizer import Tokenizer

    texts = corpus.load(arguments.data).train_texts
    tokenizer, training = timed(lambda: Tokenizer.train(arguments.kind, texts, arguments.vocab_size))
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    if arguments.time:
        ids, encoding = timed(lambda: tokenizer.encode_texts(texts))
        characters = sum(map(len, texts))
        print(f"{characters} characters, {len(ids)} tokens")
        print(f"training: {training[0]:.2f} s, {training[1]:.2f} s of processor time")
        print(f"encoding: {encoding[0]:.2f} s, {encoding[1]:.2f} s of processor time", end="")
        print(f", {characters / encoding[0] / 1e6:.2f} M characters/s")
    return 0


def tokenize_encode(arguments: argparse.Namespace) -> int:
    from pykern.lm.tokenizer import Tokenizer

    print(" ".join(map(str, Tokenizer.load(arguments.tokenizer).encode(given_text(arguments.text)))))
    return 0


def tokenize_decode(arguments: argparse.Namespace) -> int:
    from pykern.lm.tokenizer import Tokenizer

    print(Tokenizer.load(arguments.tokenizer).decode(ids_of(given_text(arguments.text))))
    return 0


def named(paths: Sequence[str]) -> "dict[str, Tokenizer]":
    """Tokenizers by their kinds, or by their paths where two have the same kind."""
    from pykern.lm.tokenizer import Tokenizer

    loaded = [(path, Tokenizer.load(path)) for path in dict.fromkeys(paths)]
    kinds = [tokenizer.kind for _, tokenizer in loaded]
    return {
        tokenizer.kind if kinds.count(tokenizer.kind) == 1 else f"{tokenizer.kind} {path}": tokenizer
        for path, tokenizer in loaded
    }


def split_line(item: "Comparison") -> str:
    """The pieces between bars; an unknown one in brackets, with the text that it stands for."""
    from pykern.lm.tokenizer_compare import visible

    shown = ((piece.known, piece.mark + visible(piece.data)) for piece in item.pieces)
    return "|".join(text if known else f"[{text}]" for known, text in shown)


def table(comparisons: "list[Comparison]") -> list[str]:
    width = max(len("tokenizer"), *(len(item.name) for item in comparisons))
    lines = [f"{'tokenizer':{width}}  vocabulary  tokens  bytes/token  unknown"]
    for item in comparisons:
        per_token = f"{item.bytes_per_token:.2f}" if item.tokens else "-"
        lines.append(
            f"{item.name:{width}}  {item.vocab_size:>10}  {item.tokens:>6}  {per_token:>11}  {item.unknown:>7}"
        )
    return [*lines, "", *(f"{item.name:{width}}  {split_line(item)}" for item in comparisons)]


def tokenize_inspect(arguments: argparse.Namespace) -> int:
    from pykern.lm import corpus
    from pykern.lm.tokenizer_compare import compare_tokenizers, plot_comparison, train_kinds

    if bool(arguments.tokenizer) == bool(arguments.data):
        raise ValueError("give either --tokenizer or --data")
    if arguments.vocab_size is not None and not arguments.data:
        raise ValueError("--vocab-size needs --data")
    if arguments.plot and not Path(arguments.plot).absolute().parent.is_dir():
        raise ValueError(f"--plot: there is no folder {Path(arguments.plot).absolute().parent}")
    text = given_text(arguments.text)
    if arguments.data:
        size = EACH if arguments.vocab_size is None else arguments.vocab_size
        tokenizers = train_kinds(corpus.load(arguments.data).train_texts, size)
    else:
        tokenizers = named(arguments.tokenizer)
    comparisons = compare_tokenizers(text, tokenizers)
    first = comparisons[0]
    if arguments.plot:
        plot_comparison(comparisons, arguments.plot)
    if len(comparisons) == 1:
        print(split_line(first))
        counts = f"{first.characters} characters, {first.bytes} bytes, {first.tokens} tokens of {first.kind}"
        print(f"{counts}, {first.unknown} unknown")
        return 0
    print(f"{first.characters} characters, {first.bytes} bytes\n")
    print("\n".join(table(comparisons)))
    return 0
