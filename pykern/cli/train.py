"""pykern train: a new run, or one that goes on."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pykern.cli.parts import add_flag, add_threads, flag, given, require_device, set_threads

SHAPE = {  # field of Config: (type or choices, default, help)
    "n_layer": (int, 4, "blocks"),
    "n_head": (int, 4, "attention heads"),
    "n_kv_head": (int, None, "key and value heads, a divisor of --n-head (default: as many)"),
    "n_embd": (int, 128, "width"),
    "n_hidden": (int, None, "width inside the MLP (default: 4 n_embd, swiglu 8/3 n_embd)"),
    "block_size": (int, 128, "tokens that the model sees at once"),
    "positions": (("learned", "sinusoidal", "rope", "alibi", "t5", "none"), "rope", "how the model knows the order"),
    "norm": (("layernorm", "rmsnorm"), "rmsnorm", "normalisation before each half of a block"),
    "activation": (("gelu", "gelu_erf", "relu", "silu", "swiglu"), "swiglu", "inside the MLP"),
    "dropout": (float, 0.0, "share of what each half of a block adds that is dropped in training"),
}
SWITCHES = {"untied_head": "own weights for the head", "qk_norm": "normalise every head's query and key"}
OPTIONS = {  # field of TrainOptions: (type or choices, help)
    "steps": (int, "updates of the weights (default 1500, unless --minutes is given)"),
    "minutes": (float, "stop after this much training"),
    "batch_size": (int, "rows per step"),
    "lr": (float, "highest learning rate"),
    "final_lr": (float, "learning rate at the end, as a share of --lr"),
    "warmup": (int, "steps over which the learning rate rises"),
    "schedule": (("cosine", "linear", "constant"), "how it falls then"),
    "weight_decay": (float, "AdamW's, for matrices"),
    "beta1": (float, "AdamW's first decay"),
    "beta2": (float, "AdamW's second decay"),
    "clip": (float, "largest norm of the gradient; 0: any"),
    "residual_init": (("scaled", "zero"), "initial weights of what feeds the residual stream"),
    "dtype": (("float32", "bfloat16"), "of weights and activations"),
    "autocast": (bool, "with --dtype bfloat16: float32 weights, matrix products in bfloat16"),
    "eval_every": (int, "steps between evaluations; 0: at the end only"),
    "eval_tokens": (int, "most held-out tokens of an evaluation on the way"),
    "checkpoint_every": (int, "steps between checkpoints; 0: at the end only"),
    "seed": (int, "of the initial weights and the order of the batches"),
    "batches": (("blocks", "padded", "packed"), "blocks of the whole text, or texts: one a row, or as many as fit"),
    "recompute": (bool, "keep less in memory for the backward pass and compute it again there"),
}


def add_train(commands: Any) -> None:
    from pykern.lm.options import TrainOptions

    parser = commands.add_parser("train", help="train a language model on text", allow_abbrev=False)
    parser.add_argument(
        "--data", metavar="SOURCE", help='text: a UTF-8 file, a folder of them, "stdlib", or tokens: a file NAME.npy'
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint, loss.csv and loss.png go")
    parser.add_argument("--resume", action="store_true", help="go on where the checkpoint in --out was written")
    parser.add_argument(
        "--tokenizer",
        default=argparse.SUPPRESS,
        metavar="KIND",
        help="byte (default), character, word, wordpiece, bpe or unigram; or the path of a trained one",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=argparse.SUPPRESS, help="tokens, at most (needed by wordpiece, bpe, unigram)"
    )
    parser.add_argument(
        "--split",
        choices=("files", "lines", "paragraphs"),
        default=argparse.SUPPRESS,
        help="with --batches padded or packed: what a text is (default files; of a token file: the texts it has)",
    )
    device = "where to train (default cpu); torchrun gives each process a GPU of its own"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=device)
    parser.add_argument("--shard", action="store_true", help="under torchrun: each process holds a part of the model")
    add_threads(parser)
    shape = parser.add_argument_group("shape of the model")
    for name, (kind, default, text) in SHAPE.items():
        add_flag(shape, name, kind, text, default)
    for name, text in SWITCHES.items():
        shape.add_argument(flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
    training = parser.add_argument_group("training")
    for name, (kind, text) in OPTIONS.items():
        add_flag(training, name, kind, text, None if name in ("steps", "minutes") else getattr(TrainOptions(), name))
    parser.set_defaults(run=train)


def kind_or_file(tokenizer: str, vocab_size: int | None) -> Any:
    """--tokenizer as what Data.load takes: a kind, or the tokenizer at a path."""
    from pykern.lm.tokenizer import KINDS, Tokenizer

    if tokenizer in KINDS or not Path(tokenizer).exists():
        return tokenizer
    if vocab_size is not None:
        raise ValueError(f"--vocab-size is fixed by the tokenizer in {tokenizer}")
    return Tokenizer.load(tokenizer)


def resumed(arguments: argparse.Namespace, changes: dict[str, Any], ranks: Any) -> Any:
    from pykern.lm.checkpoint import load_checkpoint
    from pykern.lm.data import Data
    from pykern.lm.model import expected_tensors
    from pykern.lm.run_state import read_state
    from pykern.lm.trainer import Trainer

    fixed = given(arguments, [*SHAPE, *SWITCHES, "tokenizer", "vocab_size", "split"])
    if fixed:
        raise ValueError(f"{flag(next(iter(fixed)))} is fixed by the checkpoint that --resume continues")
    loaded = load_checkpoint(arguments.out, expected=expected_tensors)
    state = read_state(loaded.state, Path(arguments.out))
    if loaded.tokenizer is None:
        raise ValueError(f"{arguments.out} has no tokenizer.json, so it cannot be resumed")
    data = Data.load(arguments.data or state.source, loaded.tokenizer, split=state.split)
    options = replace(state.options, **changes)
    return Trainer.resume(arguments.out, data, options, ranks=ranks, device=arguments.device)


def started(arguments: argparse.Namespace, changes: dict[str, Any], ranks: Any) -> Any:
    from pykern.lm.config import Config
    from pykern.lm.data import Data
    from pykern.lm.options import TrainOptions
    from pykern.lm.trainer import Trainer, make_model

    if arguments.data is None:
        raise ValueError("--data is missing")
    if "minutes" in changes and "steps" not in changes:
        changes["steps"] = None
    options = TrainOptions(**changes)
    split = options.split(getattr(arguments, "split", None))
    shape = {name: default for name, (_, default, _) in SHAPE.items()} | given(arguments, list(SHAPE))
    shape |= {"tied_head": not hasattr(arguments, "untied_head"), "qk_norm": hasattr(arguments, "qk_norm")}
    Config(vocab_size=1, **shape)  # a bad shape is refused before any text is read
    vocab_size = getattr(arguments, "vocab_size", None)
    tokenizer = kind_or_file(getattr(arguments, "tokenizer", "byte"), vocab_size)
    data = Data.load(arguments.data, tokenizer, vocab_size, split=split)
    config = Config(vocab_size=data.tokenizer.vocab_size, **shape)
    model = make_model(config, options).to(arguments.device)
    return Trainer(model, data, options, arguments.out, ranks=ranks)


def train(arguments: argparse.Namespace) -> int:
    from pykern.lm.ranks import Ranks

    set_threads(arguments.threads)
    require_device(arguments.device)
    ranks = Ranks.join(shard=arguments.shard, device=arguments.device)
    try:
        return run(arguments, ranks)
    finally:
        ranks.leave()


def run(arguments: argparse.Namespace, ranks: Any) -> int:
    from pykern.lm.progress import reporter

    changes = given(arguments, list(OPTIONS))
    trainer = (resumed if arguments.resume else started)(arguments, changes, ranks)
    if ranks.first:
        trainer.report = reporter()
    try:
        result = trainer.run()
    finally:
        trainer.report.close()
    if result.interrupted:
        if ranks.first:
            print(
                f"interrupted after step {result.step}: checkpoint in {result.out}, go on with --resume",
                file=sys.stderr,
            )
        return 130
    if ranks.first:
        print(f"held-out loss {result.evaluation.loss:.4f}, {result.evaluation.bits_per_byte:.4f} bits per byte")
        print(f"checkpoint: {result.out}    curves: {result.out / 'loss.png'}")
    return 0
