"""The command line: pykern train | generate | evaluate | tokenize | bench | check | info.

Results go to stdout, progress and refusals to stderr. A refusal is one line, exit code 2 for the command line itself
and 1 for what it names; Ctrl-C is 130.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pykern.cli_generate import add_generate
from pykern.cli_parts import Parser, add_flag, add_threads, flag, given, load_model, set_threads

SHAPE = {  # field of Config: (type or choices, default, help)
    "n_layer": (int, 4, "blocks"),
    "n_head": (int, 4, "attention heads"),
    "n_kv_head": (int, None, "key and value heads, a divisor of --n-head (default: as many)"),
    "n_embd": (int, 128, "width"),
    "block_size": (int, 128, "tokens that the model sees at once"),
    "positions": (("learned", "sinusoidal", "rope", "alibi", "t5", "none"), "rope", "how the model knows the order"),
    "norm": (("layernorm", "rmsnorm"), "rmsnorm", "normalisation before each half of a block"),
    "activation": (("gelu", "relu", "swiglu"), "swiglu", "inside the MLP"),
    "dropout": (float, 0.0, "share of what each half of a block adds that is dropped in training"),
}
SWITCHES = {"untied_head": "own weights for the head", "qk_norm": "normalise every head's query and key"}
OPTIONS = {  # field of TrainOptions: (type or choices, help)
    "steps": (int, "updates of the weights (default 1500, unless --minutes is given)"),
    "minutes": (float, "stop after this much training"),
    "batch_size": (int, "texts per step"),
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
    "recompute": (bool, "keep less in memory for the backward pass and compute it again there"),
}
USER_ERRORS = (ValueError, IndexError, OSError, ImportError, FloatingPointError, MemoryError)


# ---- train


def add_train(commands: Any) -> None:
    from pykern.lm.options import TrainOptions

    parser = commands.add_parser("train", help="train a language model on text", allow_abbrev=False)
    parser.add_argument("--data", metavar="SOURCE", help='text: a UTF-8 file, a folder of them, or "stdlib"')
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint, loss.csv and loss.png go")
    parser.add_argument("--resume", action="store_true", help="go on where the checkpoint in --out was written")
    parser.add_argument(
        "--tokenizer", default=argparse.SUPPRESS, metavar="KIND", help="byte (default), character or bpe"
    )
    parser.add_argument("--vocab-size", type=int, default=argparse.SUPPRESS, help="tokens of a bpe tokenizer, at most")
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


def resumed(arguments: argparse.Namespace, changes: dict[str, Any]) -> Any:
    from pykern.lm.checkpoint import load_checkpoint
    from pykern.lm.data import Data
    from pykern.lm.model import expected_tensors
    from pykern.lm.trainer import Trainer, read_state

    fixed = given(arguments, [*SHAPE, *SWITCHES, "tokenizer", "vocab_size"])
    if fixed:
        raise ValueError(f"{flag(next(iter(fixed)))} is fixed by the checkpoint that --resume continues")
    loaded = load_checkpoint(arguments.out, expected=expected_tensors)
    state = read_state(loaded.state, Path(arguments.out))
    if loaded.tokenizer is None:
        raise ValueError(f"{arguments.out} has no tokenizer.json, so it cannot be resumed")
    data = Data.load(arguments.data or state.source, loaded.tokenizer)
    return Trainer.resume(arguments.out, data, replace(state.options, **changes))


def started(arguments: argparse.Namespace, changes: dict[str, Any]) -> Any:
    from pykern.lm.config import Config
    from pykern.lm.data import Data
    from pykern.lm.options import TrainOptions
    from pykern.lm.trainer import Trainer, make_model

    if arguments.data is None:
        raise ValueError("--data is missing")
    if "minutes" in changes and "steps" not in changes:
        changes["steps"] = None
    options = TrainOptions(**changes)
    shape = {name: default for name, (_, default, _) in SHAPE.items()} | given(arguments, list(SHAPE))
    shape |= {"tied_head": not hasattr(arguments, "untied_head"), "qk_norm": hasattr(arguments, "qk_norm")}
    Config(vocab_size=1, **shape)  # a bad shape is refused before any text is read
    data = Data.load(arguments.data, getattr(arguments, "tokenizer", "byte"), getattr(arguments, "vocab_size", None))
    config = Config(vocab_size=data.tokenizer.vocab_size, **shape)
    return Trainer(make_model(config, options), data, options, arguments.out)


def train(arguments: argparse.Namespace) -> int:
    from pykern.lm.progress import reporter

    set_threads(arguments.threads)
    changes = given(arguments, list(OPTIONS))
    trainer = (resumed if arguments.resume else started)(arguments, changes)
    trainer.report = reporter()
    try:
        result = trainer.run()
    finally:
        trainer.report.close()
    if result.interrupted:
        print(f"interrupted after step {result.step}: checkpoint in {result.out}, go on with --resume", file=sys.stderr)
        return 130
    print(f"held-out loss {result.evaluation.loss:.4f}, {result.evaluation.bits_per_byte:.4f} bits per byte")
    print(f"checkpoint: {result.out}    curves: {result.out / 'loss.png'}")
    return 0


# ---- evaluate


def add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="loss and bits per byte on held-out text", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--data", required=True, metavar="SOURCE", help='a UTF-8 file, a folder of them, or "stdlib"')
    parser.add_argument(
        "--baseline", action="store_true", help="also n-gram models of order 4 to 6 (stdlib: some 30 s)"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_threads(parser)
    parser.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> int:
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


# ---- tokenize


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


# ---- the rest


def check(rest: list[str]) -> int:
    from pykern.testing.ratios import main as ratios

    return ratios(rest) or 0


def bench(rest: list[str]) -> int:
    """`decode` is in the package; everything else is the benchmarks of the checkout."""
    if rest[:1] == ["decode"]:
        from pykern.cli_bench import bench_decode

        return bench_decode(rest[1:])
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise ValueError("the benchmarks are not installed with the package: run this in a checkout of the repository")
    paths = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *rest]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode


def info(arguments: argparse.Namespace) -> int:
    import pykern

    pykern.show_config()
    return 0


PASSED_ON: dict[str, tuple[Callable[[list[str]], int], str]] = {  # these have a command line of their own
    "check": (check, "error of every op beside torch's, for each dtype"),
    "bench": (bench, "time of every op beside torch's and the machine's limit; bench decode: of a model"),
}


def make_parser() -> Parser:
    parser = Parser(
        prog="pykern", description="Fused Transformer kernels and a language model on them.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser, dest="command")
    for add in (add_train, add_generate, add_evaluate, add_tokenize):
        add(commands)
    for name, (_, text) in PASSED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("info", help="what this installation can do").set_defaults(run=info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    try:
        if name in PASSED_ON:
            return PASSED_ON[name][0](argv[1:])
        arguments = make_parser().parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"pykern {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"pykern {name}: {message}", file=sys.stderr)
        return 1
