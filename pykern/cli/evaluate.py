"""pykern evaluate: how well a model predicts held-out text, or models that are trained for it (--compare).

With --task icl: how well it learns from examples in the prompt (icl.py).
"""

import argparse
import json
from typing import Any

from pykern.cli.compare import add_compare_options, compare, refuse_without_compare
from pykern.cli.icl import add_icl_options, icl, refuse_without_task
from pykern.cli.parts import add_threads, load_model, set_threads


def add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="loss and bits per byte on held-out text", allow_abbrev=False)
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--data", metavar="SOURCE", help='a UTF-8 file, a folder of them, or "stdlib"')
    parser.add_argument(
        "--baseline", action="store_true", help="also n-gram models of order 4 to 6 (stdlib: some 30 s)"
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        const="models",
        metavar="WHAT",
        help="models (default): train n-grams, Elman network, LSTM and Transformer on the same text, and compare them; "
        "finetune: with --task icl",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts at once (default 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_threads(parser)
    add_compare_options(parser)
    add_icl_options(parser)
    parser.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> int:
    if hasattr(arguments, "task"):
        return icl(arguments)
    refuse_without_task(arguments)
    if arguments.data is None:
        raise ValueError("--data is missing")
    if arguments.compare == "models":
        return compare(arguments)
    if arguments.compare is not None:
        raise ValueError(f"--compare is {arguments.compare!r} but must be models, or finetune with --task icl")
    refuse_without_compare(arguments)
    if arguments.model is None:
        raise ValueError("--model is missing: it may be left out with --compare only")
    set_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    from pykern.lm import corpus, ngram
    from pykern.lm import evaluate as evaluate_model

    text = corpus.load(arguments.data)
    tokens = tokenizer.encode_texts(text.val_texts)
    result = evaluate_model(model, tokens, tokenizer, batch_size=arguments.batch_size)
    values = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "corpus": text.description,
        "sha256": text.sha256,
    }
    if arguments.baseline:
        for order, bits in ngram.baseline(text.train_texts, text.val_texts).items():
            values[f"ngram_{order}_bits_per_byte"] = bits
    if arguments.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    return 0
