"""Differentiable torch functions over the kernels, one module per op."""

from pykern.ops.activation import gelu, relu, sigmoid, silu, swiglu
from pykern.ops.linear import linear

__all__ = ["gelu", "linear", "relu", "sigmoid", "silu", "swiglu"]
