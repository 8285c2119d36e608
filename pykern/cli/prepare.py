"""pykern prepare: a text as a file of tokens, which pykern train maps instead of reading and encoding the text."""

import argparse
from typing import Any


def add_prepare(commands: Any) -> None:
    parser = commands.add_parser("prepare", help="write a text as a file of tokens", allow_abbrev=False)
    parser.add_argument("--data", required=True, metavar="SOURCE", help='a UTF-8 file, a folder of them, or "stdlib"')
    parser.add_argument(
        "--tokenizer", default="byte", metavar="PATH", help="a tokenizer.json, a checkpoint folder, or byte (default)"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="NAME.npy; NAME.documents.npy and NAME.json go beside it"
    )
    parser.set_defaults(run=prepare)


def prepare(arguments: argparse.Namespace) -> int:
    from pykern.lm import tokenfile
    from pykern.lm.tokenizer import Tokenizer

    byte = arguments.tokenizer == "byte"
    tokenizer = Tokenizer.train("byte") if byte else Tokenizer.load(arguments.tokenizer)
    file = tokenfile.prepare(arguments.data, tokenizer, arguments.out)
    print(
        f"{arguments.out}: {len(file.train) + len(file.val):,} tokens of {tokenizer.kind}, "
        f"{len(file.val):,} of them held out; {file.description}"
    )
    return 0
