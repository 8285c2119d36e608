"""One call of every op of pykern.ops, as a table: what the tests of torch's machinery and of other arrays run.

CASES[name].call(**tensors) calls the op with options; tensors(B) draws its inputs for a batch of B, `batched` names
those whose first dimension is that batch. A new op must be added here: the names, up to a comma, are those of
pykern.ops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tools import draw
from torch import Tensor

from pykern import ops

Tensors = dict[str, Tensor]


@dataclass
class Case:
    through: Callable[..., Any]  # (function, **tensors): the function called with its options
    tensors: Callable[..., Tensors]
    batched: tuple[str, ...]
    written: tuple[str, ...] = ()  # the inputs that the op changes
    gradient: bool = True
    twice: bool = False  # whether the gradient is differentiable
    casts: bool = True  # whether the first result is in autocast's dtype for float32 inputs
    op: str = ""  # the name in pykern.ops

    def call(self, **tensors: Tensor) -> Any:
        return self.through(getattr(ops, self.op), **tensors)


def _floats(**shapes: tuple[int, ...]) -> Callable[..., Tensors]:
    """Draws float tensors; a size of 0 stands for the batch."""

    def make(B: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        return {
            name: draw(*(B if n == 0 else n for n in shape), dtype=dtype, seed=seed + i)
            for i, (name, shape) in enumerate(shapes.items())
        }

    return make


def _with(floats: Callable[..., Tensors], **others: Callable[[int], Tensor]) -> Callable[..., Tensors]:
    """The float tensors and others, functions of the batch."""

    def make(B: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        return floats(B, dtype, seed) | {name: other(B) for name, other in others.items()}

    return make


def _labels(B: int) -> Tensor:
    return torch.arange(3 * B).view(B, 3) % 5


def _mask(B: int) -> Tensor:
    return torch.arange(B * 4 * 4).view(B, 1, 4, 4) % 3 != 1


def _ends(B: int) -> Tensor:
    """Two sequences in 3 B rows."""
    return torch.tensor([0, 2, 3 * B], dtype=torch.int32)


def _lengths(B: int) -> Tensor:
    return 1 + torch.arange(B, dtype=torch.int32) % 4


def _rope(function: Callable[..., Any], x: Any, positions: Any) -> Any:
    """Beside 16-bit numbers the tables are float32."""
    angles = torch.arange(
        24, dtype=torch.float64 if getattr(x, "dtype", None) == torch.float64 else torch.float32
    ).view(6, 4)
    tables = angles.cos(), angles.sin()
    return function(x, *(tables if isinstance(x, Tensor) else (t.numpy() for t in tables)), positions=positions)


def _merge(function: Callable[..., Any], a: Any, b: Any, lse_a: Any, lse_b: Any) -> Any:
    return function([a, b], [lse_a, lse_b])


def _adamw(function: Callable[..., Any], **tensors: Tensor) -> tuple[Tensor, ...]:
    function(**tensors, lr=0.1, step=1)
    return tensors["param"], tensors["exp_avg"], tensors["exp_avg_sq"]


def _adamw_state(B: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    state = _floats(param=(0, 3), grad=(0, 3), exp_avg=(0, 3), exp_avg_sq=(0, 3))(B, dtype, seed)
    return state | {"exp_avg_sq": state["exp_avg_sq"].square()}


def _varlen(ends: int) -> Callable[..., Any]:
    """A flash_attn_varlen function of tensors and cu_seqlens, `ends` of them, max_seqlen as many."""

    def call(function: Callable[..., Any], cu_seqlens: Any, **tensors: Any) -> Any:
        return function(*tensors.values(), *[cu_seqlens] * ends, *[8] * ends, causal=True)

    return call


def _options(**options: Any) -> Callable[..., Any]:
    return lambda function, **tensors: function(**tensors, **options)


_plain = _options()
_HEADS = dict(q=(0, 4, 4, 8), k=(0, 2, 4, 8), v=(0, 2, 4, 8))  # [B, H, T, D]
_FLASH = dict(q=(0, 4, 4, 8), k=(0, 4, 2, 8), v=(0, 4, 2, 8))  # [B, S, H, D]
_CACHES = dict(q=(0, 4, 1, 8), k_cache=(0, 2, 6, 8), v_cache=(0, 2, 6, 8), k=(0, 2, 1, 8), v=(0, 2, 1, 8))
_FLASH_CACHES = dict(q=(0, 1, 4, 8), k_cache=(0, 6, 2, 8), v_cache=(0, 6, 2, 8), k=(0, 1, 2, 8), v=(0, 1, 2, 8))
_NORM = dict(x=(0, 3, 8), weight=(8,), residual=(0, 3, 8))


def _rows(**shapes: tuple[int, ...]) -> Callable[..., Tensors]:
    """Ragged rows: 3 B of them, of two sequences."""

    def make(B: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        drawn = _floats(**{name: (0, *shape) for name, shape in shapes.items()})(3 * B, dtype, seed)
        return drawn | {"cu_seqlens": _ends(B)}

    return make


def _elementwise(*names: str) -> Case:
    names = names or ("x",)
    return Case(_plain, _floats(**dict.fromkeys(names, (0, 3, 8))), names, casts=False)


_HEADS_NAMES = ("q", "k", "v")
_CACHE_NAMES = (*_CACHES, "cache_seqlens")
CASES: dict[str, Case] = {
    "adamw_": Case(
        _adamw,
        _adamw_state,
        ("param", "grad", "exp_avg", "exp_avg_sq"),
        written=("param", "exp_avg", "exp_avg_sq"),
        gradient=False,
        casts=False,
    ),
    "attention": Case(
        _options(causal=True, softcap=9.0, return_lse=True),
        _with(_floats(**_HEADS, bias=(4, 4, 4), sinks=(4,)), mask=_mask),
        (*_HEADS_NAMES, "mask"),
        twice=True,
    ),
    "attention_weights": Case(
        _options(causal=True), _floats(q=(0, 2, 3, 8), k=(0, 2, 3, 8), lse=(0, 2, 3), bias=(3, 3)), ("q", "k", "lse")
    ),
    "attention_with_kvcache": Case(
        _plain,
        _with(_floats(**_CACHES), cache_seqlens=_lengths),
        _CACHE_NAMES,
        written=("k_cache", "v_cache"),
        gradient=False,
        casts=False,
    ),
    "cross_entropy": Case(
        _options(label_smoothing=0.1, z_loss=0.1),
        _with(_floats(logits=(0, 3, 5)), target=_labels),
        ("logits", "target"),
        casts=False,
    ),
    "embedding": Case(_plain, _with(_floats(weight=(5, 8)), ids=_labels), ("ids",), casts=False),
    "flash_attn_func": Case(_options(causal=True), _floats(**_FLASH), _HEADS_NAMES, twice=True),
    "flash_attn_kvpacked_func": Case(_plain, _floats(q=(0, 4, 4, 8), kv=(0, 4, 2, 2, 8)), ("q", "kv"), twice=True),
    "flash_attn_qkvpacked_func": Case(_plain, _floats(qkv=(0, 4, 3, 2, 8)), ("qkv",), twice=True),
    "flash_attn_varlen_func": Case(_varlen(2), _rows(q=(4, 8), k=(2, 8), v=(2, 8)), ("q", "k", "v"), twice=True),
    "flash_attn_varlen_kvpacked_func": Case(_varlen(2), _rows(q=(4, 8), kv=(2, 2, 8)), ("q", "kv"), twice=True),
    "flash_attn_varlen_qkvpacked_func": Case(_varlen(1), _rows(qkv=(3, 2, 8)), ("qkv",), twice=True),
    "flash_attn_with_kvcache": Case(
        _options(causal=True),
        _with(_floats(**_FLASH_CACHES), cache_seqlens=_lengths),
        _CACHE_NAMES,
        written=("k_cache", "v_cache"),
        gradient=False,
        casts=False,
    ),
    "gelu": _elementwise(),
    "layer_norm": Case(_plain, _floats(**_NORM, bias=(8,)), ("x", "residual")),
    "linear": Case(
        _options(activation="gelu"),
        _floats(x=(0, 3, 8), weight=(6, 8), bias=(6,)),
        ("x",),
    ),
    "linear_cross_entropy": Case(
        _plain,
        _with(_floats(x=(0, 3, 8), weight=(5, 8), bias=(5,)), target=_labels),
        ("x", "target"),
        casts=False,
    ),
    "linear_cross_entropy, a loss for each row": Case(
        _options(reduction="none"),
        _with(_floats(x=(0, 3, 8), weight=(5, 8)), target=_labels),
        ("x", "target"),
        casts=False,
    ),
    "merge_attention": Case(
        _merge,
        _floats(a=(0, 2, 3, 8), b=(0, 2, 3, 8), lse_a=(0, 2, 3), lse_b=(0, 2, 3)),
        ("a", "b", "lse_a", "lse_b"),
        twice=True,
        casts=False,
    ),
    "mlp": Case(
        _options(activation="silu"),
        _floats(x=(0, 3, 8), up_weight=(6, 8), down_weight=(8, 6), up_bias=(6,), down_bias=(8,), gate_weight=(6, 8)),
        ("x",),
    ),
    "relu": _elementwise(),
    "rms_norm": Case(_plain, _floats(**_NORM), ("x", "residual")),
    "rope": Case(
        _rope,
        _with(_floats(x=(0, 2, 3, 8)), positions=lambda B: torch.tensor([5, 0, 2])),
        ("x",),
        casts=False,
    ),
    "scaled_dot_product_attention": Case(
        _options(is_causal=True),
        _floats(query=(0, 2, 3, 8), key=(0, 2, 3, 8), value=(0, 2, 3, 8)),
        ("query", "key", "value"),
        twice=True,
    ),
    "sigmoid": _elementwise(),
    "silu": _elementwise(),
    "softmax": Case(_plain, _with(_floats(x=(0, 1, 4, 4)), mask=_mask), ("x", "mask"), casts=False),
    "swiglu": _elementwise("gate", "up"),
}

for _name, _case in CASES.items():
    _case.op = _name.split(",")[0]


def results(out: Any) -> list[Tensor]:
    """The tensors that a call returned."""
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def clones(tensors: Tensors) -> Tensors:
    return {name: x.clone() for name, x in tensors.items()}


def leaves(tensors: Tensors) -> Tensors:
    """Copies, of which the floating ones require a gradient."""
    return {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}


def floating(tensors: Tensors) -> list[Tensor]:
    return [x for x in tensors.values() if x.is_floating_point()]
