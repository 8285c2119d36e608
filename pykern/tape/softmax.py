"""Softmax: positive numbers that add up to 1, over the last dimension."""

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module


class Softmax(Module):
    """b = exp(a) / sum(exp(a)) over the last dimension, a [..., n];  g_a = g_b^T (diag(b) - b b^T)

    That is g_a = b (g_b - g_b . b).
    """

    def check(self, a: np.ndarray) -> None:
        inputs.floats("Softmax", a=a)
        inputs.rank("Softmax", "a", a, 1)

    def forward(self, a: np.ndarray) -> np.ndarray:
        b = np.empty_like(a)
        _C.softmax_forward(a, None, b)
        return b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        g_a = np.empty_like(out_tensor)
        _C.softmax_backward(out_tensor, out_gradient, g_a)
        return g_a
