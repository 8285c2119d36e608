"""pykern tokenize train | encode | decode | inspect."""

import argparse
import sys
from typing import Any

from pykern.cli.parts import Parser


def add_tokenize(commands: Any) -> None:
    parser = commands.add_parser("tokenize", help="train and use tokenizers", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    new = actions.add_parser("train", help="write a tokenizer.json", allow_abbrev=False)
    new.add_argument("--data", required=True, metavar="SOURCE", help='a UTF-8 file, a folder of them, or "stdlib"')
    new.add_argument("--kind", default="bpe", help="byte, character or bpe (default)")
    new.add_argument("--vocab-size", type=int, default=None)
    new.add_argument("--out", required=True, metavar="FILE")
    new.set_defaults(run=tokenize_train)
    for name, run, text in (
        ("encode", tokenize_encode, "print the ids of a text"),
        ("decode", tokenize_decode, "print the text of ids"),
        ("inspect", tokenize_inspect, "print how a text splits"),
    ):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        action.add_argument(
            "--tokenizer", required=True, metavar="PATH", help="a tokenizer.json or a checkpoint folder"
        )
        action.add_argument("text", nargs="*", help="words or ids; none: stdin")
        action.set_defaults(run=run)


def given_text(arguments: argparse.Namespace) -> str:
    return " ".join(arguments.text) if arguments.text else sys.stdin.read()


def tokenize_train(arguments: argparse.Namespace) -> int:
    from pykern.lm import corpus
    from pykern.lm.tokenizer import Tokenizer

    texts = corpus.load(arguments.data).train_texts
    tokenizer = Tokenizer.train(arguments.kind, texts, arguments.vocab_size)
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    return 0


def tokenize_encode(arguments: argparse.Namespace) -> int:
    from pykern.lm.tokenizer import Tokenizer

    print(*Tokenizer.load(arguments.tokenizer).encode(given_text(arguments)))
    return 0


def tokenize_decode(arguments: argparse.Namespace) -> int:
    from pykern.lm.tokenizer import Tokenizer

    print(Tokenizer.load(arguments.tokenizer).decode([int(word) for word in given_text(arguments).split()]))
    return 0


def tokenize_inspect(arguments: argparse.Namespace) -> int:
    from pykern.lm.tokenizer import Tokenizer

    tokenizer, text = Tokenizer.load(arguments.tokenizer), given_text(arguments)
    ids = tokenizer.encode(text)
    print("|".join(tokenizer.decode([i]) for i in ids))
    print(f"{len(text)} characters, {len(text.encode())} bytes, {len(ids)} tokens of {tokenizer.kind}")
    return 0
