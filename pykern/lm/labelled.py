"""Labelled texts: files of them, a stratified split, and the batches of a step.

    .jsonl   one {"text": …, "label": …} a line; other keys are ignored
    .tsv     text, one tab, label: one pair a line

Files come from strangers: size, encoding and every line are checked, and a refusal names the line.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pykern.lm.files import checked_size, parse_json

MAX_FILE_BYTES = 256 << 20
MAX_TEXT = 1 << 20  # characters; a model sees block_size tokens of them
MAX_LABEL = 100
MAX_CLASSES = 10_000


@dataclass(frozen=True)
class Labelled:
    """texts[i] has the class classes[labels[i]]; labels int64 [N]; classes are sorted and all different."""

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> np.ndarray:
        """Texts of each class, int64 [C]."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def take(self, rows: Sequence[int] | np.ndarray) -> "Labelled":
        """These rows, with the same classes."""
        rows = np.asarray(rows, np.int64)
        return Labelled(tuple(self.texts[i] for i in rows), self.labels[rows], self.classes)

    @classmethod
    def of(
        cls, texts: Sequence[str], labels: Sequence[str], classes: Sequence[str] | None = None, where: str = "labelled"
    ) -> "Labelled":
        """From texts and the name of each one's class. classes None: the names that occur, at least two.

        ValueError for a name that classes lacks, for one class only and for more than 10 000.
        """
        if len(texts) != len(labels):
            raise ValueError(f"{where}: {len(texts)} texts but {len(labels)} labels")
        names = tuple(sorted(set(labels)) if classes is None else classes)
        if classes is None and not 2 <= len(names) <= MAX_CLASSES:
            raise ValueError(f"{where}: {len(names)} classes, expected 2 to {MAX_CLASSES}")
        index = {name: i for i, name in enumerate(names)}
        for i, name in enumerate(labels):
            if name not in index:
                raise ValueError(f"{where}: text {i + 1} has label {name!r} but the classes are {shown(names)}")
        return cls(tuple(texts), np.array([index[name] for name in labels], np.int64), names)


def shown(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_label(label: object, where: str) -> str:
    """label when it can be a class: a printable string of 1 to 100 characters, without spaces around it."""
    if not isinstance(label, str):
        raise ValueError(f"{where}: label must be a string, got {type(label).__name__}")
    if not label or len(label) > MAX_LABEL or not label.isprintable() or label != label.strip():
        raise ValueError(
            f"{where}: label {label[:40]!r} must be 1 to {MAX_LABEL} printable characters, without spaces around them"
        )
    return label


def check_text(text: object, where: str) -> str:
    """text when a model can read it: a string of 1 to 2^20 characters without lone surrogates."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: text must be a string, got {type(text).__name__}")
    if not text:
        raise ValueError(f"{where}: the text is empty")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{where}: the text has {len(text)} characters, but at most {MAX_TEXT} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text has a lone surrogate at character {error.start}") from None
    return text


def _json_pair(line: str, where: str) -> tuple[object, object]:
    entry = parse_json(line.encode(), where)
    for key in ("text", "label"):
        if key not in entry:
            raise ValueError(f"{where}: {key} is missing")
    return entry["text"], entry["label"]


def _tab_pair(line: str, where: str) -> tuple[object, object]:
    parts = line.split("\t")
    if len(parts) != 2:
        raise ValueError(f"{where}: {len(parts) - 1} tabs, expected one between text and label")
    return parts[0], parts[1]


def read_labelled(path: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Labelled:
    """The labelled texts of a .jsonl or .tsv file of at most 256 MiB, UTF-8, a line each; a last empty line is none.

    classes: those that labels may be; None: those that occur. FileNotFoundError, or ValueError naming file and line.
    """
    path = Path(path)
    pairs = {".jsonl": _json_pair, ".tsv": _tab_pair}
    if path.suffix not in pairs:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(pairs)}")
    checked_size(path, MAX_FILE_BYTES)
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    texts, labels = [], []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
        where = f"{path}: line {number}"
        try:
            text, label = pairs[path.suffix](line.removesuffix(b"\r").decode(), where)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text (byte {error.start})") from None
        texts.append(check_text(text, where))
        labels.append(check_label(label, where))
    if not texts:
        raise ValueError(f"{path}: no labelled texts")
    return Labelled.of(texts, labels, classes, str(path))


def _drawn(seed: int, stream: int, n: int) -> np.ndarray:
    """A permutation of 0 .. n - 1, from raw generator output, which numpy promises to keep across versions."""
    draws = np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(n)
    return np.argsort(draws, kind="stable")


def split(data: Labelled, share: float = 0.1, seed: int = 0) -> tuple[Labelled, Labelled]:
    """(training, held-out): of every class about `share` of its different texts, at least one, held out.

    Equal texts stay together, so no held-out text is also trained on. The same data and seed, the same split.
    ValueError when share is not between 0 and 1, or a class has fewer than two different texts.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"split: share is {share} but must be between 0 and 1")
    held: set[str] = set()
    for c, name in enumerate(data.classes):
        different = list(dict.fromkeys(data.texts[i] for i in np.flatnonzero(data.labels == c)))
        if len(different) < 2:
            raise ValueError(f"split: class {name!r} has {len(different)} different texts, but at least 2 are needed")
        wanted = min(len(different) - 1, max(1, round(share * len(different))))
        held.update(different[i] for i in _drawn(seed, c, len(different))[:wanted])
    rows = np.array([text in held for text in data.texts])
    train, val = data.take(np.flatnonzero(~rows)), data.take(np.flatnonzero(rows))
    if not train.counts.all():  # its texts occur under another label too, and were held out there
        name = data.classes[int(np.argmin(train.counts))]
        raise ValueError(f"split: class {name!r} has no text left to train on: its texts occur under other labels too")
    return train, val


class LabelledBatches:
    """rows(step): which texts of N a step uses, int64 [batch_size]: every text once per epoch, in an order drawn anew.

    A function of (seed, step) alone. The last batch of an epoch is filled from the next one.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def rows(self, step: int) -> np.ndarray:
        result = np.empty(self.batch_size, np.int64)
        for row, drawn in enumerate(range(step * self.batch_size, (step + 1) * self.batch_size)):
            epoch, index = divmod(drawn, self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, _drawn(self.seed, epoch, self.n)
            result[row] = self._order[index]
        return result


def balanced_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """N / (C n_c) for each class c with n_c of the N texts: every class has the same weight in sum; float64 [C]."""
    counts = Counter(labels.tolist())
    if len(counts) < classes:
        raise ValueError(f"balanced_weights: {classes - len(counts)} of {classes} classes have no text")
    return np.array([len(labels) / (classes * counts[c]) for c in range(classes)])
