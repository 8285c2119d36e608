"""pykern classify: the class of texts, with probabilities, or the scores of a classifier on labelled texts."""

import argparse
import json
import sys
from typing import Any

from pykern.cli.parts import add_threads, set_threads


def add_classify(commands: Any) -> None:
    parser = commands.add_parser("classify", help="the class of a text, by a fine-tuned classifier", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="made by finetune --task classify")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts; without any, the lines of stdin")
    parser.add_argument("--test", metavar="FILE", help="score on labelled texts, .jsonl or .tsv, instead")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON: an object per text, or one of the scores")
    add_threads(parser)
    parser.set_defaults(run=classify)


def classify(arguments: argparse.Namespace) -> int:
    set_threads(arguments.threads)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size} but must be at least 1")
    if arguments.test is not None and arguments.text:
        raise ValueError("--test scores the texts of a file: leave TEXT out")
    from pykern.lm.classifier import Classifier

    model, tokenizer = Classifier.load(arguments.model)
    if arguments.test is not None:
        return scores(arguments, model, tokenizer)
    return answers(arguments, model, tokenizer)


def scores(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from pykern.lm.classifier import score_texts
    from pykern.lm.labelled import read_labelled

    data = read_labelled(arguments.test, model.classes)
    result = score_texts(model, tokenizer, data, batch_size=arguments.batch_size)
    if arguments.json:
        names = ("balanced_accuracy", "macro_f1", "accuracy", "balanced_loss", "loss", "texts")
        values = {name: getattr(result, name) for name in names}
        print(json.dumps(values | {"classes": list(model.classes), "confusion": result.confusion.tolist()}))
    else:
        print(f"{result}\n{result.table(model.classes)}")
    return 0


def answers(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from pykern.lm.classifier import probabilities

    texts = arguments.text or [line.removesuffix("\n") for line in sys.stdin]
    if not texts:
        raise ValueError("there is no text to classify")
    for row in probabilities(model, tokenizer, texts, batch_size=arguments.batch_size).tolist():
        ranked = sorted(zip(row, model.classes, strict=True), key=lambda pair: -pair[0])
        if arguments.json:
            print(json.dumps({"label": ranked[0][1], "probabilities": {name: p for p, name in ranked}}))
        else:
            print(ranked[0][1], *(f"{name}={p:.3f}" for p, name in ranked), sep="\t")
    return 0
