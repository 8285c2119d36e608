"""Normalisation over the last dimension: x^ = (a - mean) / sqrt(var + eps), or a / sqrt(mean(a^2) + eps)."""

from typing import Any

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module, Parameter


class LayerNorm(Module):
    """b = x^ w + c with x^ = (a - mean) r, r = 1 / sqrt(var + eps);  g_w = g_b x^, g_c = g_b, summed over the rows.

    For a [..., d]: g_a = r (g - mean(g) - x^ mean(g x^)) with g = g_b w.
    """

    def __init__(self, d: int, *, eps: float = 1e-5, dtype: Any = np.float64):
        inputs.positive("LayerNorm", d=d)
        inputs.real("LayerNorm", dtype)
        self.weight = Parameter(np.ones(d), dtype=dtype)
        self.bias = Parameter(np.zeros(d), dtype=dtype)
        self.eps = inputs.number("LayerNorm", "eps", eps, least=0)

    def check(self, a: np.ndarray) -> None:
        inputs.last_dimension("LayerNorm", "a", a, self.weight.value.size)

    def forward(self, a: np.ndarray) -> np.ndarray:
        b, self.mean, self.r = np.empty_like(a), np.empty(a.shape[:-1], a.dtype), np.empty(a.shape[:-1], a.dtype)
        _C.layer_norm_forward(a, self.weight.value, self.bias.value, None, b, None, self.mean, self.r, eps=self.eps)
        return b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        (a,) = in_tensors
        g_a, g_w, g_c = np.empty_like(a), np.empty_like(self.weight.value), np.empty_like(self.bias.value)
        _C.layer_norm_backward(a, self.weight.value, self.mean, self.r, out_gradient, None, g_a, g_w, g_c)
        self.weight.grad += g_w
        self.bias.grad += g_c
        return g_a


class RMSNorm(Module):
    """b = x^ w with x^ = a r, r = 1 / sqrt(mean(a^2) + eps);  g_w = g_b x^, summed over the rows.

    For a [..., d]: g_a = r (g - x^ mean(g x^)) with g = g_b w.
    """

    def __init__(self, d: int, *, eps: float = 1e-6, dtype: Any = np.float64):
        inputs.positive("RMSNorm", d=d)
        inputs.real("RMSNorm", dtype)
        self.weight = Parameter(np.ones(d), dtype=dtype)
        self.eps = inputs.number("RMSNorm", "eps", eps, least=0)

    def check(self, a: np.ndarray) -> None:
        inputs.last_dimension("RMSNorm", "a", a, self.weight.value.size)

    def forward(self, a: np.ndarray) -> np.ndarray:
        b, self.r = np.empty_like(a), np.empty(a.shape[:-1], a.dtype)
        _C.rms_norm_forward(a, self.weight.value, None, b, None, self.r, eps=self.eps)
        return b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        (a,) = in_tensors
        g_a, g_w = np.empty_like(a), np.empty_like(self.weight.value)
        _C.rms_norm_backward(a, self.weight.value, self.r, out_gradient, None, g_a, g_w)
        self.weight.grad += g_w
        return g_a
