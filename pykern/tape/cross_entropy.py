"""Cross entropy between targets and predictions [..., V], one loss per row.

Targets are labels, integers [...], or distributions [..., V].
"""

from typing import Any

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module


class Loss(Module):
    """Row losses put together: reduction is "mean" or "sum" over the rows, or "none"."""

    integer_inputs: tuple[str, ...] = ("targets",)

    def __init__(self, *, reduction: str = "mean"):
        inputs.choice(type(self).__name__, "reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction

    def reduce(self, losses: np.ndarray, n: int) -> np.ndarray:
        """The loss from those of the rows, n of which count; a mean over none is 0."""
        self.share = losses.dtype.type(1 / max(n, 1) if self.reduction == "mean" else 1)
        return losses if self.reduction == "none" else losses.sum() * self.share

    def row_gradients(self, out_gradient: np.ndarray, shape: tuple) -> np.ndarray:
        return np.full(shape, out_gradient * self.share)


class CrossEntropy(Loss):
    """loss = -sum(a log p) for probabilities p and targets a [..., V];  g_p = -g a / p,  g_a = -g log p.

    A probability of 0 where the target is not 0 costs infinity: SoftmaxCrossEntropy, on logits, has no such limit.
    """

    def check(self, probabilities: np.ndarray, targets: np.ndarray) -> None:
        inputs.targets("CrossEntropy", "probabilities", probabilities, targets)
        if (probabilities < 0).any():
            raise ValueError(f"CrossEntropy: probabilities holds {probabilities.min()}, expected 0 or more")

    def forward(self, probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
        self.a = targets if targets.ndim == probabilities.ndim else one_hot(targets, probabilities)
        losses = -product(self.a, log(probabilities)).sum(-1)
        return self.reduce(losses, losses.size)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> tuple:
        p, targets = in_tensors
        g = self.row_gradients(out_gradient, p.shape[:-1])[..., None]
        g_p = -g * np.divide(self.a, p, out=np.zeros_like(p), where=self.a != 0)
        return g_p, (-g * log(p) if targets.ndim == p.ndim else None)


class SoftmaxCrossEntropy(Loss):
    """loss = -sum(a log softmax(x)) = lse sum(a) - a . x for logits x and targets a [..., V], lse = log(sum(exp(x))).

    g_x = g (softmax(x) sum(a) - a),  g_a = g (lse - x).  Labels equal to ignore_index cost nothing and do not count;
    label_smoothing e takes (1 - e) of the label and e / V of every class.
    """

    def __init__(self, *, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        smoothing = inputs.number("SoftmaxCrossEntropy", "label_smoothing", label_smoothing, least=0, most=1)
        self.options: dict[str, Any] = dict(ignore_index=int(ignore_index), label_smoothing=smoothing, z_loss=0.0)

    def check(self, logits: np.ndarray, targets: np.ndarray) -> None:
        inputs.targets("SoftmaxCrossEntropy", "logits", logits, targets, ignore=self.options["ignore_index"])
        if targets.ndim == logits.ndim and self.options["label_smoothing"]:
            raise ValueError("SoftmaxCrossEntropy: targets are distributions, label_smoothing needs labels")

    def forward(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        x, a = logits, targets
        if a.ndim == x.ndim:
            self.lse = logsumexp(x)
            losses = (self.lse * a - product(a, x)).sum(-1)
            return self.reduce(losses, losses.size)
        x, a = rows(x), a.reshape(-1)
        losses, self.lse = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
        _C.cross_entropy_forward(x, a, losses, self.lse, **self.options)
        return self.reduce(losses.reshape(targets.shape), int((a != self.options["ignore_index"]).sum()))

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> tuple:
        x, a = in_tensors
        g = self.row_gradients(out_gradient, x.shape[:-1])
        if a.ndim == x.ndim:
            softmax = np.exp(x - self.lse)
            return g[..., None] * (softmax * a.sum(-1, keepdims=True) - a), g[..., None] * (self.lse - x)
        g_x = np.empty_like(x)
        _C.cross_entropy_backward(rows(x), a.reshape(-1), self.lse, g.reshape(-1), rows(g_x), **self.options)
        return g_x, None


def one_hot(labels: np.ndarray, like: np.ndarray) -> np.ndarray:
    a = np.zeros_like(like)
    np.put_along_axis(a, labels[..., None], 1, axis=-1)
    return a


def rows(x: np.ndarray) -> np.ndarray:
    """[..., V] as [M, V], a view."""
    return x.reshape(-1, x.shape[-1])


def logsumexp(x: np.ndarray) -> np.ndarray:
    """log(sum(exp(x))) over the last dimension, which stays as 1."""
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def log(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # log(0) = -inf is meant
        return np.log(p)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b, and 0 where a is 0 even if b is infinite."""
    return np.multiply(a, b, out=np.zeros_like(b), where=a != 0)
