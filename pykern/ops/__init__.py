"""Differentiable torch functions over the kernels, one module per op."""

from pykern.ops.activation import gelu, relu, sigmoid, silu, swiglu
from pykern.ops.adamw import adamw_
from pykern.ops.attention import attention
from pykern.ops.attention_weights import attention_weights
from pykern.ops.cross_entropy import cross_entropy
from pykern.ops.decode import attention_with_kvcache
from pykern.ops.embedding import embedding
from pykern.ops.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from pykern.ops.flash_attn_kvcache import flash_attn_with_kvcache
from pykern.ops.linear import linear
from pykern.ops.linear_cross_entropy import linear_cross_entropy
from pykern.ops.merge_attention import merge_attention
from pykern.ops.mlp import mlp
from pykern.ops.norm import layer_norm, rms_norm
from pykern.ops.rope import rope
from pykern.ops.sdpa import scaled_dot_product_attention
from pykern.ops.softmax import softmax

__all__ = [
    "adamw_",
    "attention",
    "attention_weights",
    "attention_with_kvcache",
    "cross_entropy",
    "embedding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "mlp",
    "relu",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "swiglu",
]
