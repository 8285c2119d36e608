"""Attention against a key/value cache with the append in place: the step of generation. No gradient."""

from typing import Literal, overload

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    _library,
    below_autograd_guard,
    define,
    is_plain,
    optional_tensors,
    refuse_tangents,
    require_tensors,
    unit_last,
    wants_grad,
)
from pykern.ops.attention import out_like, slopes_of, window_limits

_OPTIONS = (
    "Tensor? k, Tensor? v, Tensor cache_seqlens, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? block_table, Tensor? cache_leftpad, bool causal, float scale, bool rotary_interleaved, "
    "int window_left, int window_right, float softcap, bool want_lse"
)


def _results(q: Tensor, v_cache: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out_like(q, v_cache), q.new_empty(q.shape[:3], dtype=stat) if want_lse else None


def _attend(
    q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, slopes, sinks, block_table, leftpad, *rest
):
    causal, scale, rotary_interleaved, window_left, window_right, softcap, want_lse = rest
    out, lse = _results(q, v_cache, want_lse)
    _C.attention_with_kvcache(
        unit_last(q),
        k_cache,
        v_cache,
        None if k is None else unit_last(k),
        None if v is None else unit_last(v),
        cache_seqlens,
        rotary_cos,
        rotary_sin,
        out,
        lse,
        causal=causal,
        scale=scale,
        rotary_interleaved=rotary_interleaved,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=slopes,
        sinks=sinks,
        block_table=block_table,
        cache_leftpad=leftpad,
    )
    if k is not None:
        torch.autograd.graph.increment_version([k_cache, v_cache])
    return out, lse


def _fake(q, k_cache, v_cache, *options):
    out, lse = _results(q, v_cache, options[-1])
    return out, q.new_empty(0) if lse is None else lse


_decode = define(
    f"attention_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {_OPTIONS}) -> (Tensor, Tensor)",
    _attend,
    _fake,
)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if wants_grad(tensors):
        raise RuntimeError(
            "attention_with_kvcache: has no gradient; call it under torch.no_grad() or detach its inputs"
        )


def _not_differentiable(*args):
    _refuse_gradients(*args[:5])
    refuse_tangents("attention_with_kvcache", args)
    with below_autograd_guard():
        return _decode.dispatched(*args)


_library.impl("attention_with_kvcache", _not_differentiable, "Autograd")


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k, v [B, G, N, D|E] into the caches at cache_seqlens, then attends: q [B, H, T, D] -> [B, H, T, E].

    k_cache [B, G, capacity, D], v_cache [B, G, capacity, E]: any strides with a unit last one, changed in place.
    cache_seqlens int32 [B]: the lengths before the append; not changed. Sequence b then holds S = cache_seqlens[b] + N
    keys; causal: query t sees keys 0 .. S - T + t. Slots behind S are never read.
    rotary_cos, rotary_sin [positions, R/2], R <= D, in q's dtype or float32: q and k are rotated to their positions
    first. One dtype: float32, float64, bfloat16 or float16. scale: 1 / sqrt(D) by default.
    window, softcap, alibi_slopes and sinks: as in pykern.attention.
    cache_leftpad int32 [B], at most cache_seqlens: the slots in front of it are padding, never read; the first key is
    behind it, at position 0, and S = cache_seqlens[b] + N - cache_leftpad[b]. The bits are those without padding.
    block_table int32 [B, n]: the caches are [pages, G, page, D|E], any page size, and key s of sequence b is slot
    s % page of page block_table[b, s // page]; entries behind the last key are not looked at.
    On the CPU each row has the bits of the same row of pykern.attention(..., causal=True) over all keys.
    TypeError: not a tensor, mixed or other dtypes. ValueError: shapes, overlap, a cache that is full (nothing is
    written). IndexError: a length, position or page out of range. RuntimeError: an argument requires grad.
    On CUDA the host does not read lengths, padding and pages, nor wait for them: a sequence that is out of range or
    whose cache is full has rows of NaN, and nothing is appended to it. Head sizes are at most 256 there.
    Formula: pykern.attention.
    """
    require_tensors("attention_with_kvcache", q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens)
    optional_tensors("attention_with_kvcache", k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    optional_tensors("attention_with_kvcache", cache_leftpad=cache_leftpad, block_table=block_table, sinks=sinks)
    _refuse_gradients(q, k_cache, v_cache, k, v)
    for name, x, layout in (
        ("q", q, "[B, H, T, D]"),
        ("k_cache", k_cache, "[B, G, capacity, D]"),
        ("v_cache", v_cache, "[B, G, capacity, E]"),
    ):
        if x.dim() != 4:
            raise ValueError(f"attention_with_kvcache: {name} must be {layout}, got shape {list(x.shape)}")
    left, right = window_limits("attention_with_kvcache", window, causal)
    run = _attend if is_plain((q, k_cache)) else _decode.dispatched  # both: what is traced is traced whole
    out, lse = run(
        *(q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin),
        slopes_of("attention_with_kvcache", alibi_slopes, q.shape[0], q.shape[1]),
        *(sinks, block_table, cache_leftpad, causal),
        q.shape[3] ** -0.5 if scale is None else float(scale),
        rotary_interleaved,
        *(left, right),
        0.0 if softcap is None else float(softcap),
        return_lse,
    )
    return (out, lse) if return_lse else out
