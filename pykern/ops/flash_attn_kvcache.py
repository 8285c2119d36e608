"""flash_attn_with_kvcache of FlashAttention-2 over pykern.attention_with_kvcache: caches of [B, capacity, H, D]."""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._library import optional_tensors, require_tensors
from pykern.ops.decode import attention_with_kvcache
from pykern.ops.flash_attn import check_heads, finite_scale, limits
from pykern.ops.rope import rope
from pykern.ops.sdpa import called_as

OP = "flash_attn_with_kvcache"


def _lengths(cache_seqlens: int | Tensor | None, full: int | None, B: int, device: torch.device) -> Tensor:
    """int32 [B]: keys in the cache before the append; None: `full`, which is None when it cannot be meant."""
    if cache_seqlens is None:
        if full is None:
            raise ValueError(f"{OP}: cache_seqlens must be given with k and v, to say where they go")
        cache_seqlens = full
    if isinstance(cache_seqlens, int):
        if not 0 <= cache_seqlens < 2**31:
            raise IndexError(f"{OP}: cache_seqlens is {cache_seqlens}, expected a number of keys")
        return torch.full((B,), cache_seqlens, dtype=torch.int32, device=device)
    require_tensors(OP, cache_seqlens=cache_seqlens)
    _per_sequence("cache_seqlens", cache_seqlens, B)
    return cache_seqlens


def _per_sequence(name: str, x: Tensor, B: int) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{OP}: {name} has dtype {x.dtype}, expected int32")
    if tuple(x.shape) != (B,):
        raise ValueError(f"{OP}: {name} has shape {list(x.shape)}, expected [{B}], one for each sequence of q")


def _new_keys(k: Tensor | None, v: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"{OP}: k and v must be given together")
    if k is None or v is None:
        return
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.dim() != 4:
            raise ValueError(f"{OP}: {name} must be [B, N, G, D], got shape {list(x.shape)}")
        expected = [q.shape[0], k.shape[1], *cache.shape[2:]]
        if list(x.shape) != expected:
            raise ValueError(f"{OP}: {name} has shape {list(x.shape)}, expected {expected}")


def _rotated(q, k, lengths: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool, one_position: bool):
    """q and k [B, T, H, D] at positions lengths, lengths + 1, ...; all of q at lengths when `one_position`.

    And the lengths: on a GPU, where nobody waits to read them, -1 for a sequence that leaves the tables.
    """

    def turn(x, steps):
        at = dict(positions=start.long()[:, None] + steps, interleaved=interleaved)
        return called_as(OP, rope, x.transpose(1, 2), *tables, **at).transpose(1, 2)

    count, rows = max(1 if one_position else q.shape[1], k.shape[1]), tables[0].shape[0]
    on_host = lengths.device.type == "cpu"
    last = count - 1 + (int(lengths.max()) if on_host else 0) if lengths.numel() else -1
    if last >= rows:
        raise IndexError(f"{OP}: positions up to {last} are rotated, but rotary_cos has {rows} rows")
    if not on_host:
        lengths = torch.where((lengths >= 0) & (lengths <= rows - count), lengths, -1)
    start = lengths if on_host else lengths.clamp(min=0)
    steps = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
    # contiguous: the result is laid out like q
    turned = turn(q, (0 if one_position else 1) * steps[: q.shape[1]]).contiguous(), turn(k, steps[: k.shape[1]])
    return *turned, lengths


def _check_parts(rows: list[int], first: list[int], last: list[int], N: int | None, slots: int, capacity: int) -> None:
    """Every refusal that depends on the sequence, before the first of them is written."""
    for b, (row, begin, end) in enumerate(zip(rows, first, last, strict=True)):
        if not 0 <= row < slots:
            raise IndexError(f"{OP}: cache_batch_idx[{b}] is {row}, but k_cache has {slots} sequences")
        if not 0 <= end <= capacity:
            raise IndexError(f"{OP}: cache_seqlens[{b}] is {end}, expected 0..{capacity}")
        if not 0 <= begin <= end:
            raise IndexError(f"{OP}: cache_leftpad[{b}] is {begin}, expected 0..cache_seqlens[{b}] = {end}")
        if end + (N or 0) > capacity:
            raise ValueError(
                f"{OP}: the cache is full: sequence {b} ends at {end} and {N} keys are appended, but k_cache has room "
                f"for {capacity}"
            )
    if N is not None and len(set(rows)) < len(rows):
        raise ValueError(f"{OP}: cache_batch_idx is {rows}: two sequences of k would be written to one of the cache")


def _one_by_one(q, k_cache, v_cache, k, v, lengths, cache_batch_idx, cache_leftpad, slopes, options: dict[str, Any]):
    """A call per sequence, on a view of its keys alone: row cache_batch_idx of the cache, from cache_leftpad on."""
    B = q.shape[0]
    first = [0] * B if cache_leftpad is None else cache_leftpad.tolist()
    rows = list(range(B)) if cache_batch_idx is None else cache_batch_idx.tolist()
    _check_parts(rows, first, lengths.tolist(), None if k is None else k.shape[1], *k_cache.shape[:2])
    if k is not None:  # the new keys may lie in another sequence's part of the cache
        q, k, v = q.clone(), k.clone(), v.clone()
    # one call even for no sequence: it checks and shapes the result
    parts = [(slice(b, b + 1), slice(rows[b], rows[b] + 1), first[b]) for b in range(B)] or [(slice(0), slice(0), 0)]
    results = []
    for b, row, begin in parts:
        if slopes is not None:
            options["alibi_slopes"] = slopes[b] if slopes.dim() == 2 else slopes
        call = dict(cache_seqlens=lengths[b] - begin, return_lse=True, **options)
        keys, values = (None if x is None else x[b] for x in (k, v))
        results.append(_call(q[b], k_cache[row, begin:], v_cache[row, begin:], keys, values, call))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _call(q, k_cache, v_cache, k, v, options: dict[str, Any]):
    """attention_with_kvcache with heads before rows: views of everything, the caches are written in place."""
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    k, v = (None if x is None else x.transpose(1, 2) for x in (k, v))
    out, lse = called_as(OP, attention_with_kvcache, q, k_cache, v_cache, k, v, **options)
    return out.transpose(1, 2), lse


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Writes k, v [B, N, G, D|E] into the caches at cache_seqlens, then attends: q [B, T, H, D] -> [B, T, H, E].

    k_cache [rows, capacity, G, D], v_cache [rows, capacity, G, E]: strided views too, changed in place; with
    block_table int32 [B, n] pages [pages, page, G, D|E] of any size. cache_seqlens, an int or int32 [B]: the lengths
    before the append, not changed; None without k: the whole cache. cache_batch_idx int32 [B]: the row of the cache
    that belongs to each sequence, distinct when k is given. cache_leftpad int32 [B]: the slot of its first key. These
    two are read on the host and run a call per sequence.
    rotary_cos, rotary_sin [positions, R/2], only with k: k is rotated at positions cache_seqlens, cache_seqlens + 1,
    ...; so is q when causal or when window_size limits anything, else all of q at cache_seqlens. rotary_interleaved:
    pairs (2i, 2i + 1) instead of (i, i + R/2). causal, window_size, softcap, alibi_slopes: as flash_attn_func, S being
    the length after the append. num_splits has nothing to decide. return_softmax_lse: (out, softmax_lse [B, H, T]).
    No gradient. TypeError, ValueError, IndexError, RuntimeError: as pykern.attention_with_kvcache; nothing is written.
    On CUDA, too, lengths and pages are not checked but looked at by the kernel: see there.
    Dtypes, and formula: pykern.attention.
    """
    require_tensors(OP, q=q, k_cache=k_cache, v_cache=v_cache)
    optional_tensors(OP, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, alibi_slopes=alibi_slopes)
    optional_tensors(OP, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, block_table=block_table)
    check_heads(OP, ("q", "k_cache", "v_cache"), q, k_cache, v_cache, "[B, S, H, D]")
    _new_keys(k, v, q, k_cache, v_cache)
    B, T = q.shape[:2]
    window, scale = limits(OP, window_size), finite_scale(OP, softmax_scale)
    full = k_cache.shape[1] * (1 if block_table is None or block_table.dim() != 2 else block_table.shape[1])
    lengths = _lengths(cache_seqlens, full if k is None else None, B, q.device)

    options: dict[str, Any] = dict(causal=causal, scale=scale)
    if window is not None:
        options["window"] = window
    if softcap:
        options["softcap"] = softcap
    for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if x is not None:
            _per_sequence(name, x, B)
            if block_table is not None:
                raise ValueError(f"{OP}: {name} cannot be combined with block_table")
    one_by_one = cache_batch_idx is not None or cache_leftpad is not None

    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{OP}: rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and rotary_sin is not None:
        if rotary_cos.dim() != 2:
            raise ValueError(f"{OP}: rotary_cos must be [positions, R/2], got shape {list(rotary_cos.shape)}")
        if k is None:
            raise ValueError(f"{OP}: rotary_cos is given without k, the new keys that it rotates")
        in_order = causal or window is not None
        if in_order and k.shape[1] == T and not one_by_one:  # the kernel's positions are these
            options |= dict(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved)
        else:
            tables = rotary_cos, rotary_sin
            q, k, lengths = _rotated(q, k, lengths, tables, rotary_interleaved, not in_order)

    if one_by_one:
        slopes = alibi_slopes
        if slopes is not None and tuple(slopes.shape) not in ((q.shape[2],), (B, q.shape[2])):
            raise ValueError(f"{OP}: alibi_slopes has shape {list(slopes.shape)}, expected [H] or [B, H]")
        out, lse = _one_by_one(q, k_cache, v_cache, k, v, lengths, cache_batch_idx, cache_leftpad, slopes, options)
    else:
        if k_cache.shape[0] != B and block_table is None:
            raise ValueError(f"{OP}: k_cache has {k_cache.shape[0]} sequences but q has {B}; give cache_batch_idx")
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes
        if block_table is not None:
            options["block_table"] = block_table
        out, lse = _call(q, k_cache, v_cache, k, v, dict(cache_seqlens=lengths, return_lse=True, **options))
    return (out, lse) if return_softmax_lse else out
