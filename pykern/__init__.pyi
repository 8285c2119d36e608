"""What pykern/__init__.py gives on first use, for type checkers."""
# ruff: noqa: I001

from pykern import (
    arrays as arrays,
    integrations as integrations,
    lm as lm,
    nn as nn,
    ops as ops,
    optim as optim,
    tape as tape,
    testing as testing,
)
from pykern.config import (
    explain as explain,
    get_num_threads as get_num_threads,
    set_num_threads as set_num_threads,
    show_config as show_config,
)
from pykern.ops import (
    attention as attention,
    attention_weights as attention_weights,
    attention_with_kvcache as attention_with_kvcache,
    cross_entropy as cross_entropy,
    embedding as embedding,
    flash_attn_func as flash_attn_func,
    flash_attn_kvpacked_func as flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func as flash_attn_qkvpacked_func,
    flash_attn_varlen_func as flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache as flash_attn_with_kvcache,
    gelu as gelu,
    layer_norm as layer_norm,
    linear as linear,
    linear_cross_entropy as linear_cross_entropy,
    merge_attention as merge_attention,
    mlp as mlp,
    relu as relu,
    rms_norm as rms_norm,
    rope as rope,
    scaled_dot_product_attention as scaled_dot_product_attention,
    sigmoid as sigmoid,
    silu as silu,
    softmax as softmax,
    swiglu as swiglu,
)

__version__: str

_NAMES: dict[str, str]
_MODULES: tuple[str, ...]
