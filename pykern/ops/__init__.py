"""Differentiable torch functions over the kernels, one module per op."""

from pykern.ops.activation import gelu, relu, sigmoid, silu, swiglu
from pykern.ops.adamw import adamw_
from pykern.ops.attention import attention
from pykern.ops.linear import linear
from pykern.ops.norm import layer_norm, rms_norm
from pykern.ops.rope import rope

__all__ = ["adamw_", "attention", "gelu", "layer_norm", "linear", "relu", "rms_norm", "rope", "sigmoid", "silu", "swiglu"]
