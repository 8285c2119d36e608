"""Embedding: row ids[i] of a table."""

from typing import Any

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module, Parameter


class Embedding(Module):
    """b_i = w[ids_i] for integers ids [...] and a table w [n, d];  g_w[ids_i] += g_b_i;  ids have no gradient.

    The table starts normal with deviation 0.02. rng: a seed or a numpy Generator.
    """

    integer_inputs = ("ids",)

    def __init__(self, n: int, d: int, *, rng: Any = None, dtype: Any = np.float64):
        inputs.positive("Embedding", n=n, d=d)
        inputs.real("Embedding", dtype)
        self.weight = Parameter(np.random.default_rng(rng).normal(0.0, 0.02, (n, d)), dtype=dtype)

    def check(self, ids: np.ndarray) -> None:
        inputs.indices("Embedding", "ids", ids, len(self.weight.value))

    def forward(self, ids: np.ndarray) -> np.ndarray:
        b = np.empty((*ids.shape, self.weight.value.shape[1]), self.weight.value.dtype)
        _C.embedding_forward(self.weight.value, ids, b)
        return b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> None:
        (ids,) = in_tensors
        g_w = np.empty_like(self.weight.value)
        _C.embedding_backward(ids, out_gradient, g_w)
        self.weight.grad += g_w
