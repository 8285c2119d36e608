"""Fused Transformer kernels for CPU and CUDA, forward and backward, and a language model built from them.

The names below are imported on first use: ``import pykern`` loads neither torch nor the extension.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# public name -> module that defines it
_NAMES = {
    "show_config": "pykern.config",
    "set_num_threads": "pykern.config",
    "get_num_threads": "pykern.config",
    "explain": "pykern.config",
}
_NAMES |= dict.fromkeys(
    [
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
    ],
    "pykern.ops",
)
_MODULES = ("ops", "nn", "optim", "arrays", "tape", "lm", "integrations", "testing")

__all__ = [*_NAMES, *_MODULES]


def _load(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        words = f"{module} needs torch, which is not installed: pip install 'pykern[torch]'"
        raise ModuleNotFoundError(words, name="torch") from error


def __getattr__(name):
    if name in _NAMES:
        value = getattr(_load(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return _load(f"pykern.{name}")
    raise AttributeError(f"module 'pykern' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *__all__])
