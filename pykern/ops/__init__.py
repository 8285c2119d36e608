"""Differentiable torch functions over the kernels, one module per op."""

from pykern.ops.activation import gelu, relu, sigmoid, silu, swiglu
from pykern.ops.adamw import adamw_
from pykern.ops.linear import linear

__all__ = ["adamw_", "gelu", "linear", "relu", "sigmoid", "silu", "swiglu"]
