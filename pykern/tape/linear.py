"""Linear layer: b = a w^T + c for rows a [..., n_in], weight w [n_out, n_in], bias c [n_out]."""

from typing import Any

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module, Parameter


class Linear(Module):
    """b = w a + c for a [..., n_in], w [n_out, n_in];  g_w = g_b a^T, g_c = g_b, summed over the rows;  g_a = w^T g_b.

    The weight starts uniform in +-1/sqrt(n_in), the bias at 0. rng: a seed or a numpy Generator.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, rng: Any = None, dtype: Any = np.float64):
        inputs.positive("Linear", n_in=n_in, n_out=n_out)
        inputs.real("Linear", dtype)
        bound = n_in**-0.5
        self.weight = Parameter(np.random.default_rng(rng).uniform(-bound, bound, (n_out, n_in)), dtype=dtype)
        self.bias = Parameter(np.zeros(n_out), dtype=dtype) if bias else None

    def check(self, a: np.ndarray) -> None:
        inputs.last_dimension("Linear", "a", a, self.weight.value.shape[1])

    def forward(self, a: np.ndarray) -> np.ndarray:
        b = np.empty((*a.shape[:-1], len(self.weight.value)), a.dtype)
        c = None if self.bias is None else self.bias.value
        _C.linear_forward(a, self.weight.value, c, None, b, None, activation="none")
        return b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        (a,) = in_tensors
        g_a, g_w, g_c = np.empty_like(a), np.empty_like(self.weight.value), np.empty(out_tensor.shape[-1], a.dtype)
        _C.linear_backward(a, self.weight.value, None, out_gradient, g_a, g_w, g_c, activation="none")
        self.weight.grad += g_w
        if self.bias is not None:
            self.bias.grad += g_c
        return g_a
