"""Differentiable torch functions over the kernels, one module per op."""

from pykern.ops.activation import gelu, relu, sigmoid, silu, swiglu

__all__ = ["gelu", "relu", "sigmoid", "silu", "swiglu"]
