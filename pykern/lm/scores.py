"""How well a classifier does when classes are of different sizes: recall of each, balanced accuracy, macro F1.

    recall_c = hits of c / texts of c      balanced accuracy = mean of recall_c over the classes that have texts
    F1_c = 2 hits / (texts of c + answers c)     macro F1 = mean of F1_c over the classes with texts or answers

Whoever always answers the most frequent of C classes has a balanced accuracy of 1 / C.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SHOWN = 20  # classes of a printed table


def confusion(truth: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """How often class i was answered with class j, int64 [C, C]. IndexError for a class out of range."""
    truth, answers = np.asarray(truth), np.asarray(answers)
    if truth.shape != answers.shape or truth.ndim != 1:
        raise ValueError(f"confusion: truth has shape {list(truth.shape)}, answers {list(answers.shape)}, expected [N]")
    for name, values in (("truth", truth), ("answers", answers)):
        if values.size and not (values.min() >= 0 and values.max() < classes):
            raise IndexError(f"confusion: {name} runs from {values.min()} to {values.max()} but classes is {classes}")
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (truth.astype(np.int64), answers.astype(np.int64)), 1)
    return table


def balanced_mean(values: np.ndarray, truth: np.ndarray) -> float:
    """The mean over the classes that occur in truth [N] of the mean of values [N] of each."""
    return float(np.mean([values[truth == c].mean() for c in np.unique(truth)]))


@dataclass(frozen=True)
class Scores:
    """confusion int64 [C, C], rows the truth, columns the answers.

    loss: mean cross entropy of the texts in nats; balanced_loss: the mean over the classes of each one's mean.
    """

    confusion: np.ndarray
    loss: float
    balanced_loss: float

    @property
    def texts(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.texts)

    @property
    def recall(self) -> np.ndarray:
        """Of each class, float64 [C]; NaN where there is no text."""
        texts = self.confusion.sum(1)
        return np.divide(np.diag(self.confusion), texts, out=np.full(len(texts), np.nan), where=texts > 0)

    @property
    def balanced_accuracy(self) -> float:
        return float(np.nanmean(self.recall))

    @property
    def macro_f1(self) -> float:
        hits = np.diag(self.confusion)
        both = self.confusion.sum(0) + self.confusion.sum(1)
        return float(np.mean(2 * hits[both > 0] / both[both > 0]))

    def __str__(self) -> str:
        return (
            f"balanced accuracy {self.balanced_accuracy:.1%}, macro F1 {self.macro_f1:.3f}, "
            f"accuracy {self.accuracy:.1%}, balanced loss {self.balanced_loss:.4f} on {self.texts:,} texts"
        )

    def table(self, classes: Sequence[str]) -> str:
        """The confusion table: a row for each true class, its answers and its recall."""
        if len(classes) > MAX_SHOWN:
            return f"(the table of {len(classes)} classes is not shown, it would have {len(classes) ** 2} cells)"
        head = ["truth \\ answer", *classes, "recall"]
        rows = [
            [name, *map(str, row), "-" if np.isnan(recall) else f"{recall:.1%}"]
            for name, row, recall in zip(classes, self.confusion.tolist(), self.recall.tolist(), strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in (head, *rows)
        ]
        return "\n".join(lines)
