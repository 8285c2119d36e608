"""pykern evaluate --compare: n-grams, Elman network, LSTM and Transformer trained and tested on the same text."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from pykern.cli.parts import add_flag, flag, given, plot_path, set_threads
from pykern.cli.train import SHAPE

OPTIONS = {  # argument of pykern.lm.compare.compare: (type, help)
    "steps": (int, "updates of each neural model (default 1500, unless --minutes is given)"),
    "minutes": (float, "minutes of training for each neural model"),
    "lr": (float, "highest learning rate of all neural models (default: each its own)"),
    "seed": (int, "of the initial weights and the order of the batches (default 0)"),
    "tokenizer": (str, "of the neural models: byte (default), character, bpe, …"),
    "vocab_size": (int, "tokens of a trained tokenizer, at most"),
    "rnn_layers": (int, "layers of the recurrent models (default 1)"),
}
SHAPE_OPTIONS = {name: option for name, option in SHAPE.items() if name != "dropout"}  # RNNLM has no dropout
NAMES = (*OPTIONS, *SHAPE_OPTIONS, "plot")


def add_compare_options(parser: Any) -> None:
    """What `evaluate --compare` takes; absent from the parsed arguments unless given."""
    group = parser.add_argument_group("--compare: training the models")
    for name, (kind, text) in OPTIONS.items():
        add_flag(group, name, kind, text)
    add_flag(group, "plot", str, "also draw bits per byte as bars into this PNG file")
    shape = parser.add_argument_group("--compare: shape of the Transformer, whose parameters the others match")
    for name, (choices, default, text) in SHAPE_OPTIONS.items():
        add_flag(shape, name, choices, text, default)


def refuse_without_compare(arguments: argparse.Namespace) -> None:
    """ValueError when an option of --compare was given without it."""
    for name in given(arguments, NAMES):
        raise ValueError(f"{flag(name)} goes with --compare only")


def compare(arguments: argparse.Namespace) -> int:
    for name in ("model", "baseline"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} does not go with --compare: it trains its own models, n-grams among them")
    set_threads(arguments.threads)
    options: dict[str, Any] = given(arguments, [*OPTIONS, *SHAPE_OPTIONS])
    path = plot_path(arguments.plot) if hasattr(arguments, "plot") else None
    import pykern.lm.compare as comparison
    from pykern.lm import corpus

    text = corpus.load(arguments.data)
    rows = comparison.compare(
        text,
        batch_size=arguments.batch_size,
        report=lambda line: print(line, file=sys.stderr, flush=True),
        **options,
    )
    if path is not None:
        comparison.plot(rows, path, title=text.description)
    if arguments.json:
        values = {"corpus": text.description, "sha256": text.sha256}
        print(
            json.dumps(values | {"rows": [asdict(row) | {"tokens_per_second": row.tokens_per_second} for row in rows]})
        )
    else:
        print(comparison.table(rows))
        print(f"\n{text.description}; {text.train_bytes:,} bytes to train on, {text.val_bytes:,} held out")
        if path is not None:
            print(f"bars: {path}")
    return 0
