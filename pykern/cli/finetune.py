"""pykern finetune: a checkpoint goes on learning, from new text or, with a new head, from labelled texts."""

import argparse
import sys
from typing import Any

from pykern.cli.parts import add_flag, add_threads, given, load_model, set_threads

OPTIONS = {  # field of FineTuneOptions: (type or choices, help)
    "steps": (int, "updates of the weights"),
    "epochs": (float, "passes over the data, instead of --steps (default 3)"),
    "batch_size": (int, "texts per step"),
    "lr": (float, "highest learning rate (default 1e-3; 1e-2 with --freeze-body, 2e-3 with --lora)"),
    "weight_decay": (float, "AdamW's, for matrices"),
    "clip": (float, "largest norm of the gradient; 0: any"),
    "dtype": (("float32", "bfloat16"), "of the matrix products; weights are float32"),
    "eval_every": (int, "steps between evaluations (default: a tenth of the run)"),
    "eval_tokens": (int, "lm: most held-out tokens of an evaluation on the way"),
    "patience": (int, "end after so many evaluations in a row that are no better; 0: never"),
    "lora_alpha": (float, "adapters count --lora-alpha / RANK times (default RANK)"),
    "class_weights": (("none", "balanced"), "classify: balanced gives every class the same share of the loss"),
    "held_out": (float, "classify: share of the texts of every class that is held out"),
    "seed": (int, "of the order of the texts, the split, the new head and the adapters"),
}


def add_finetune(commands: Any) -> None:
    from pykern.lm.finetune_options import FineTuneOptions

    parser = commands.add_parser(
        "finetune", help="go on training a checkpoint, as a language model or as a classifier", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the checkpoint to start from")
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help='lm: text as for train; classify: a .jsonl of {"text": …, "label": …} or a .tsv of text, tab, label',
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the result goes; must hold no checkpoint")
    parser.add_argument("--task", required=True, choices=("lm", "classify"))
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--freeze-body", action="store_true", default=argparse.SUPPRESS, help="train the head and nothing else"
    )
    parts.add_argument(
        "--lora",
        type=int,
        default=argparse.SUPPRESS,
        metavar="RANK",
        help="train adapters of the blocks' matrices; classify: and the head",
    )
    add_threads(parser)
    training = parser.add_argument_group("training")
    for name, (kind, text) in OPTIONS.items():
        add_flag(training, name, kind, text, getattr(FineTuneOptions(), name))
    parser.set_defaults(run=finetune)


def finetune(arguments: argparse.Namespace) -> int:
    from pykern.lm.finetune_options import FineTuneOptions

    set_threads(arguments.threads)
    options = FineTuneOptions(**given(arguments, [*OPTIONS, "freeze_body", "lora"]))
    body, tokenizer = load_model(arguments.model)
    result, lines = (tuned_lm if arguments.task == "lm" else tuned_classifier)(arguments, options, body, tokenizer)
    where = f"weights of step {result.best_step}"
    if result.ended == "interrupted":
        print(f"interrupted after step {result.step}: {where}, the best so far, in {arguments.out}", file=sys.stderr)
        return 130
    early = ", ended early" if result.ended == "patience" else ""
    steps = f"{result.step} of {result.steps} steps{early}"
    print(f"{result.trained:,} parameters trained for {steps}, {result.seconds:.1f} s")
    print("\n".join(lines))
    print(f"checkpoint: {arguments.out}, {where}")
    return 0


def tuned_lm(arguments: argparse.Namespace, options: Any, body: Any, tokenizer: Any) -> tuple[Any, list[str]]:
    from pykern.lm.data import Data
    from pykern.lm.evaluation import evaluate
    from pykern.lm.finetune import finetune_lm
    from pykern.lm.progress import Lines

    data = Data.load(arguments.data, tokenizer)
    model, result = finetune_lm(body, data, arguments.out, options, report=Lines(sys.stderr))
    if result.ended == "interrupted":
        return result, []
    before, of = result.first, f"of {result.first.tokens:,} held-out tokens"
    lines = [
        f"before: loss {before.loss:.4f}, {before.bits_per_byte:.4f} bits per byte {of}",
        f"after:  loss {result.best.loss:.4f}, {result.best.bits_per_byte:.4f} bits per byte {of}",
    ]
    if result.best.tokens < len(data.val) - 1:
        whole = evaluate(model, data.val, tokenizer)
        lines.append(f"of all {whole.tokens:,}: loss {whole.loss:.4f}, {whole.bits_per_byte:.4f} bits per byte")
    return result, lines


def tuned_classifier(arguments: argparse.Namespace, options: Any, body: Any, tokenizer: Any) -> tuple[Any, list[str]]:
    from pykern.lm.finetune import finetune_classifier
    from pykern.lm.labelled import read_labelled
    from pykern.lm.progress import Lines

    data = read_labelled(arguments.data)
    model, result = finetune_classifier(body, tokenizer, data, arguments.out, options, report=Lines(sys.stderr))
    return result, [f"held out, of which the best weights were chosen: {result.best}", result.best.table(model.classes)]
