"""One small pre-trained model of the standard library, fine-tuned as a classifier in each way, and a table of it.

    python examples/finetune.py                      pre-trains the model, then prints the table
    python examples/finetune.py --task package       the other task
    python examples/finetune.py --steps 20 --epochs 0.1 --seeds 1      a short run, to see that everything works

--task next     which kind of character follows these 48? Letters are common, digits rare.
--task package  which of six packages is this snippet from, three lines or more? Lines that name a package are left out.

A third of the files of each package is the test: neither pre-training nor fine-tuning sees any of it.
"""

import argparse
import hashlib
import random
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import mean

from pykern.lm import Config, Data, Tokenizer, Trainer, TrainOptions, Transformer, corpus
from pykern.lm.classifier import score_texts
from pykern.lm.finetune import finetune_classifier
from pykern.lm.finetune_options import FineTuneOptions
from pykern.lm.labelled import Labelled
from pykern.lm.progress import reporter
from pykern.lm.scores import Scores, confusion
from pykern.lm.trainer import make_model

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
KINDS = ("digit", "letter", "line end", "sign", "space")
CONTEXT = 48  # characters that --task next shows
SNIPPET = 100  # characters that --task package shows, at least; the model sees 128
MOST = {"next": 400, "package": 150}  # texts of a package for training: few, as labelled data are
TEST = 500  # and for the test, at most
HELD_OUT = 20_000  # characters on which pre-training is evaluated
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128, "positions": "rope", "norm": "rmsnorm"}
WAYS = {
    "whole model, random start": {},
    "whole model": {},
    "frozen body": {"freeze_body": True},
    "LoRA, rank 8": {"lora": 8},
}


def files() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The texts of each package for training, and for the test: every third file, in the order of its name's hash."""
    root = Path(sysconfig.get_path("stdlib"))
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for package in PACKAGES:
        found = [path for path in sorted((root / package).rglob("*.py")) if "test" not in path.parts]
        found.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
        for i, path in enumerate(found):
            (test if i % 3 == 0 else train).setdefault(package, []).append(path.read_text(encoding="utf-8"))
    return train, test


def snippets(texts: dict[str, list[str]], most: int) -> Labelled:
    """At most so many snippets of each package, evenly from all its files."""
    found, labels = [], []
    for package, contents in texts.items():
        mine, lines, size = [], [], 0
        for text in contents:
            for line in text.splitlines():
                if not line.strip() or any(name in line.lower() for name in PACKAGES):
                    continue
                lines.append(line)
                size += len(line) + 1
                if size >= SNIPPET and len(lines) >= 3:
                    mine.append("\n".join(lines))
                    lines, size = [], 0
            lines, size = [], 0  # no snippet crosses from one file to the next
        chosen = [mine[i * len(mine) // min(most, len(mine))] for i in range(min(most, len(mine)))]
        found += chosen
        labels += [package] * len(chosen)
    return Labelled.of(found, labels, PACKAGES)


def kind(character: str) -> str:
    """Which of KINDS a character is."""
    if character.isalpha() or character == "_":
        return "letter"
    return "digit" if character.isdigit() else {"\n": "line end", " ": "space"}.get(character, "sign")


def continuations(texts: dict[str, list[str]], most: int) -> Labelled:
    """So many places of each package, drawn at random: the text before, and the kind of the character there."""
    generator, found, labels = random.Random(0), [], []
    for contents in texts.values():
        whole = "\n".join(contents)
        for place in generator.sample(range(CONTEXT, len(whole)), most):
            found.append(whole[place - CONTEXT : place])
            labels.append(kind(whole[place]))
    return Labelled.of(found, labels, KINDS)


TASKS = {"next": continuations, "package": snippets}


def pretrain(out: Path, test: dict[str, list[str]], steps: int) -> None:
    """A language model of the library without the files of the test."""
    hidden = {text for texts in test.values() for text in texts}
    whole = corpus.load("stdlib")
    parts = [tuple(text for text in texts if text not in hidden) for texts in (whole.train_texts, whole.val_texts)]
    left = len(whole.train_texts) + len(whole.val_texts) - sum(map(len, parts))
    description = f"{whole.description}, without {left} files of the test"
    digest = hashlib.sha256("".join(parts[0] + parts[1]).encode()).hexdigest()
    parts[1] = ("".join(parts[1])[:HELD_OUT],)
    data = Data.encode(corpus.Corpus(*parts, digest, description), Tokenizer.train("byte"))
    options = TrainOptions(steps=steps, lr=3e-3, batch_size=16, eval_every=0)
    model = make_model(Config(vocab_size=256, activation="swiglu", **SHAPE), options)
    Trainer(model, data, options, out, report=reporter()).run()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="next")
    parser.add_argument("--model", type=Path, help="a folder of an earlier run of this script: no pre-training")
    parser.add_argument("--out", type=Path, help="where to leave the pre-trained model")
    parser.add_argument("--steps", type=int, default=800, help="of pre-training")
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args(argv)
    train_texts, test_texts = files()
    data, test = TASKS[arguments.task](train_texts, MOST[arguments.task]), TASKS[arguments.task](test_texts, TEST)
    print(f"{len(data):,} texts to learn from, {len(test):,} of other files to test on")
    print(", ".join(f"{name} {a} + {b}" for name, a, b in zip(data.classes, data.counts, test.counts, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.model or arguments.out or Path(folder, "base")
        if arguments.model is None:
            pretrain(base, test_texts, arguments.steps)
        rows = [table_row("nothing: always the most frequent class", 0, [majority(test)], [0.0])]
        for n, (way, changes) in enumerate(WAYS.items()):
            scores, seconds, trained = [], [], 0
            for seed in range(arguments.seeds):
                body = Transformer.load(base)
                if "random" in way:
                    body = make_model(body.config, TrainOptions(seed=seed))
                options = FineTuneOptions(
                    epochs=arguments.epochs, class_weights="balanced", patience=4, seed=seed, **changes
                )
                out = Path(folder, f"{n}-{seed}")
                model, result = finetune_classifier(body, Tokenizer.load(base), data, out, options)
                trained = result.trained
                scores.append(score_texts(model, Tokenizer.load(base), test))
                seconds.append(result.seconds)
                print(f"{way}, seed {seed}: {scores[-1]}", file=sys.stderr, flush=True)
            rows.append(table_row(way, trained, scores, seconds))
    print("| trained | parameters | balanced accuracy, mean (lowest to highest) | macro F1 | accuracy | seconds |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


def majority(test: Labelled) -> Scores:
    answers = test.labels * 0 + int(test.counts.argmax())
    return Scores(confusion(test.labels, answers, len(test.classes)), float("nan"), float("nan"))


def table_row(way: str, trained: int, scores: list[Scores], seconds: list[float]) -> str:
    balanced = [score.balanced_accuracy for score in scores]
    spread = f"{mean(balanced):.1%} ({min(balanced):.1%} to {max(balanced):.1%})"
    f1, accuracy = mean(score.macro_f1 for score in scores), mean(score.accuracy for score in scores)
    return f"| {way} | {trained:,} | {spread} | {f1:.3f} | {accuracy:.1%} | {mean(seconds):.0f} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
