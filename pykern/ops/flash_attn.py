"""The functions of FlashAttention-2 (Dao, arXiv 2307.08691) over pykern.attention: [B, S, H, D], on CPU as well.

Names, argument order, defaults and layouts are those of the package flash_attn 2.8. Of its arguments, `deterministic`
and `max_seqlen_*` have nothing to decide here: results are always deterministic, lengths come from cu_seqlens_*. The
cached form is in flash_attn_kvcache.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pykern.ops._library import optional_tensors, require_tensors
from pykern.ops.attention import attention
from pykern.ops.sdpa import called_as


def limits(op: str, window_size) -> tuple[int | None, int | None] | None:
    """window_size=(left, right) as pykern's window: what is negative is unlimited."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"{op}: window_size is {window_size!r}, expected (left, right), -1 for no limit")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in window_size):
        raise TypeError(f"{op}: window_size is {window_size!r}, expected integers, -1 for no limit")
    left, right = (None if n < 0 else n for n in window_size)
    return None if left is None and right is None else (left, right)


def finite_scale(op: str, softmax_scale: float | None) -> float | None:
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"{op}: softmax_scale is {softmax_scale}, expected a finite number")
    return softmax_scale


def check_heads(op: str, names: tuple[str, str, str], q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """Ranks and shapes in FlashAttention's layout, the heads in the last but one dimension."""
    for name, x in zip(names, (q, k, v), strict=True):
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{op}: {name} must be {layout}, got shape {list(x.shape)}")
    query, key, value = names
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: {key} has head size {k.shape[-1]} but {query} has {q.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{op}: {value} has shape {list(v.shape)} but {key} has {list(k.shape)}")
    H, G = q.shape[-2], k.shape[-2]
    if H and (G == 0 or H % G):
        raise ValueError(f"{op}: {query} has {H} heads, which is not a multiple of the {G} heads of {key}")


def _options(op: str, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes) -> dict[str, Any]:
    optional_tensors(op, alibi_slopes=alibi_slopes)
    return dict(
        dropout_p=dropout_p,
        scale=finite_scale(op, softmax_scale),
        causal=causal,
        window=limits(op, window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )


def _padded(op: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_attn_probs: bool):
    check_heads(op, ("q", "k", "v"), q, k, v, "[B, S, H, D]")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k has a batch of {k.shape[0]} but q of {q.shape[0]}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    results = called_as(op, attention, q, k, v, return_lse=return_attn_probs, **options)
    return (results[0].transpose(1, 2), results[1], None) if return_attn_probs else results.transpose(1, 2)


def _gathered(op: str, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values [total, G, D] of the sequences whose pages [pages, page, G, D] block_table lists."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be [pages, page, G, D] with block_table, got shape {list(x.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v has pages of shape {list(v.shape[:2])} but k of {list(k.shape[:2])}")
    if cu_seqlens_k.dtype != torch.int32 or block_table.dtype != torch.int32:
        raise TypeError(
            f"{op}: cu_seqlens_k and block_table have dtypes {cu_seqlens_k.dtype} and {block_table.dtype}, expected "
            "int32"
        )
    if cu_seqlens_k.dim() != 1 or block_table.dim() != 2 or block_table.shape[0] != cu_seqlens_k.shape[0] - 1:
        raise ValueError(
            f"{op}: block_table must be [N, n] and cu_seqlens_k [N + 1], got shapes {list(block_table.shape)} and "
            f"{list(cu_seqlens_k.shape)}"
        )
    pages, page = k.shape[:2]
    lengths = cu_seqlens_k.diff().long()
    if lengths.numel() and (lengths.min() < 0 or lengths.max() > block_table.shape[1] * page):
        raise ValueError(
            f"{op}: cu_seqlens_k has lengths {lengths.tolist()}, but block_table has room for 0.."
            f"{block_table.shape[1] * page} keys a sequence"
        )
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=k.device), lengths)
    position = torch.arange(len(sequence), device=k.device) - cu_seqlens_k.long()[sequence]
    page = max(page, 1)  # pages without a slot hold no key, and none is asked for
    at = block_table.long()[sequence, position // page]
    if at.numel() and (at.min() < 0 or at.max() >= pages):
        raise IndexError(f"{op}: block_table lists pages {at.min()}..{at.max()}, but k has {pages}")
    slot = position % page
    return k[at, slot], v[at, slot]


def _ragged(op: str, q, k, v, cu_seqlens_q, cu_seqlens_k, options: dict[str, Any], return_attn_probs: bool):
    check_heads(op, ("q", "k", "v"), q, k, v, "[total, H, D]")
    ends = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    results = called_as(op, attention, q, k, v, return_lse=return_attn_probs, **ends, **options)
    return (*results, None) if return_attn_probs else results


def _unpacked(op: str, name: str, x: Tensor, layout: str) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, views along its third dimension from the end."""
    require_tensors(op, **{name: x})
    parts = int(layout.split(", ")[-3])
    if x.dim() != layout.count(",") + 1 or x.shape[-3] != parts:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(x.shape)}")
    return x.unbind(-3)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """softmax(softmax_scale q k^T) v for q [B, T, H, D], k [B, S, G, D], v [B, S, G, E] -> [B, T, H, E].

    bfloat16, float16, float32 or float64, D and E up to 1024; head h reads key head h // (H // G); differentiable.
    causal: query t sees keys 0 .. S - T + t, the lower right triangle. window_size=(left, right): the keys from
    S - T + t - left to S - T + t + right, -1 for no limit. softcap: scores x become softcap tanh(x / softcap), 0 for
    none. alibi_slopes, float32 [H] or [B, H]: slope |S - T + t - s| is subtracted. dropout_p: drawn from torch's
    generator. return_attn_probs: (out, softmax_lse [B, H, T], None); softmax_lse is float32 (float64 for float64) and
    differentiable, and the third, FlashAttention's S_dmask, is never there.
    A row that sees no key is 0, its softmax_lse -inf. TypeError, ValueError: as pykern.attention.
    Formula: pykern.attention, which names the papers.
    """
    op = "flash_attn_func"
    require_tensors(op, q=q, k=k, v=v)
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _padded(op, q, k, v, options, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """pykern.flash_attn_func for keys and values in one tensor, kv [B, S, 2, G, D], read in place."""
    op = "flash_attn_kvpacked_func"
    require_tensors(op, q=q)
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = _unpacked(op, "kv", kv, "[B, S, 2, G, D]")
    return _padded(op, q, k, v, options, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """pykern.flash_attn_func for queries, keys and values in one tensor, qkv [B, S, 3, H, D], read in place."""
    op = "flash_attn_qkvpacked_func"
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = _unpacked(op, "qkv", qkv, "[B, S, 3, H, D]")
    return _padded(op, q, k, v, options, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """flash_attn_func for N sequences end to end: q [total_q, H, D], k [total_k, G, D], v [total_k, G, E].

    cu_seqlens_q, cu_seqlens_k int32 [N + 1]: sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 of q, and
    likewise of k and v; max_seqlen_q and max_seqlen_k are not looked at. softmax_lse is [H, total_q].
    block_table int32 [N, n]: k [pages, page, G, D] and v [pages, page, G, E] hold pages of any size, those of sequence
    b are listed in row b; its keys are copied out of them, differentiably.
    IndexError: block_table lists a page that is not there.
    Dtypes, formula and the other errors: pykern.flash_attn_func.
    """
    op = "flash_attn_varlen_func"
    require_tensors(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        require_tensors(op, block_table=block_table)
        k, v = _gathered(op, k, v, cu_seqlens_k, block_table)
    return _ragged(op, q, k, v, cu_seqlens_q, cu_seqlens_k, options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """pykern.flash_attn_varlen_func for keys and values in one tensor, kv [total_k, 2, G, D], read in place.

    Formula: pykern.flash_attn_func.
    """
    op = "flash_attn_varlen_kvpacked_func"
    require_tensors(op, q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = _unpacked(op, "kv", kv, "[total, 2, G, D]")
    return _ragged(op, q, k, v, cu_seqlens_q, cu_seqlens_k, options, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """pykern.flash_attn_varlen_func for queries, keys and values in one tensor, qkv [total, 3, H, D], read in place.

    Formula: pykern.flash_attn_func.
    """
    op = "flash_attn_varlen_qkvpacked_func"
    require_tensors(op, cu_seqlens=cu_seqlens)
    options = _options(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = _unpacked(op, "qkv", qkv, "[total, 3, H, D]")
    return _ragged(op, q, k, v, cu_seqlens, cu_seqlens, options, return_attn_probs)
