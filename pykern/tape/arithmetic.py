"""Sums, products and changes of shape: the wiring between the layers."""

import numpy as np

from . import inputs
from .engine import Module


class Add(Module):
    """c = a + b + more for a, b [...], with broadcasting;  g_a = g_c, summed where a was broadcast."""

    def check(self, a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> None:
        inputs.broadcastable("Add", a=a, b=b, **{f"more[{i}]": term for i, term in enumerate(more)})

    def forward(self, a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
        return sum(more, start=a + b)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> list:
        return [sum_to(out_gradient, term.shape) for term in in_tensors]


class Mul(Module):
    """c = a b for a, b [...], by elements, with broadcasting;  g_a = g_c b, g_b = g_c a, summed like those of Add."""

    def check(self, a: np.ndarray, b: np.ndarray) -> None:
        inputs.broadcastable("Mul", a=a, b=b)

    def forward(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> tuple:
        a, b = in_tensors
        return sum_to(out_gradient * b, a.shape), sum_to(out_gradient * a, b.shape)


class Scale(Module):
    """b = s a for a [...] and a fixed number s;  g_a = s g_b."""

    def __init__(self, factor: float):
        self.factor = inputs.number("Scale", "factor", factor)

    def check(self, a: np.ndarray) -> None:
        inputs.floats("Scale", a=a)

    def forward(self, a: np.ndarray) -> np.ndarray:
        return np.multiply(a, self.factor, dtype=a.dtype)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        return np.multiply(out_gradient, self.factor, dtype=out_gradient.dtype)


class Sum(Module):
    """b = the sum of all elements of a [...], a scalar [];  g_a = g_b everywhere."""

    def check(self, a: np.ndarray) -> None:
        inputs.floats("Sum", a=a)

    def forward(self, a: np.ndarray) -> np.ndarray:
        return a.sum()

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        return np.broadcast_to(out_gradient, in_tensors[0].shape)


class Reshape(Module):
    """b = a [...] in another shape, -1 for the size that follows from the others;  g_a = g_b in the shape of a."""

    def __init__(self, *shape: int):
        self.shape = shape

    def check(self, a: np.ndarray) -> None:
        inputs.reshapable("Reshape", "a", a, self.shape)

    def forward(self, a: np.ndarray) -> np.ndarray:
        return a.reshape(self.shape)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        return out_gradient.reshape(in_tensors[0].shape)


class Transpose(Module):
    """b = a [...] with its dimensions in the order of axes, or reversed;  g_a = g_b with the inverse order."""

    def __init__(self, *axes: int):
        self.axes = axes or None
        if axes and sorted(axes) != list(range(len(axes))):
            raise ValueError(f"Transpose: axes are {axes}, expected each of 0 .. {len(axes) - 1} once")

    def check(self, a: np.ndarray) -> None:
        if self.axes and len(self.axes) != a.ndim:
            raise ValueError(
                f"Transpose: a has shape {a.shape}, expected {len(self.axes)} dimensions for axes {self.axes}"
            )

    def forward(self, a: np.ndarray) -> np.ndarray:
        return a.transpose(self.axes)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        return out_gradient.transpose(self.axes and np.argsort(self.axes))


class SplitHeads(Module):
    """[B, T, H D] -> [B, H, T, D];  the gradient goes back the same way."""

    def __init__(self, n_head: int):
        inputs.positive("SplitHeads", n_head=n_head)
        self.n_head = n_head

    def check(self, a: np.ndarray) -> None:
        inputs.rank("SplitHeads", "a", a, 3, exactly=True)
        if a.shape[2] % self.n_head:
            raise ValueError(f"SplitHeads: a has {a.shape[2]} features, which {self.n_head} heads do not divide")

    def forward(self, a: np.ndarray) -> np.ndarray:
        return split_heads(a, self.n_head)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        return merge_heads(out_gradient)


class MergeHeads(Module):
    """[B, H, T, D] -> [B, T, H D];  the gradient goes back the same way."""

    def check(self, a: np.ndarray) -> None:
        inputs.rank("MergeHeads", "a", a, 4, exactly=True)

    def forward(self, a: np.ndarray) -> np.ndarray:
        return merge_heads(a)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        return split_heads(out_gradient, in_tensors[0].shape[1])


def split_heads(a: np.ndarray, n_head: int) -> np.ndarray:
    B, T, width = a.shape
    return a.reshape(B, T, n_head, width // n_head).transpose(0, 2, 1, 3)


def merge_heads(a: np.ndarray) -> np.ndarray:
    B, H, T, D = a.shape
    return a.transpose(0, 2, 1, 3).reshape(B, T, H * D)


def sum_to(gradient: np.ndarray, shape: tuple) -> np.ndarray:
    """Undo broadcasting: add up what one element was copied to."""
    gradient = gradient.sum(tuple(range(gradient.ndim - len(shape))))
    return gradient.sum(tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)
