"""Attention as its formula, with every option, in plain torch: pykern.testing.reference shows these functions, too.

score(t, s) = cap(scale q_t k_s) - slope |d - s| + bias(t, s),  d = S - T + t the diagonal, cap(x) = c tanh(x / c).
Where a query does not see a key, no number of it has an effect, NaN included: not on a result, not on a gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pykern.testing.oracle import in_float64


def _distance(q: Tensor, k: Tensor) -> Tensor:
    """s - d [T,S]: how far behind its diagonal each query has each key."""
    T, S = q.shape[2], k.shape[2]
    return torch.arange(S, device=q.device) - (torch.arange(T, device=q.device)[:, None] + S - T)


def _visible(q, k, mask, causal, window):
    """bool [B,H,T,S]: which key each query sees. The last query is on the last key: causal is bottom-right aligned."""
    distance = _distance(q, k)
    visible = torch.ones_like(distance, dtype=torch.bool)
    left, right = (None, None) if window is None else window
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if causal:
        visible = visible & (distance <= 0)
    if mask is not None:
        visible = visible & mask
    return visible.expand(*q.shape[:3], k.shape[2])


def _products(q, k, visible):
    if q.isfinite().all() and k.isfinite().all():
        return q @ k.transpose(-1, -2)
    q = torch.where(visible[..., None], q[..., :, None, :], 0.0)  # 0 * NaN is NaN: what is not seen must not be there
    k = torch.where(visible[..., None], k[..., None, :, :], 0.0)
    return (q * k).sum(-1)


def _weighted_sum(p, v, visible):
    if v.isfinite().all():
        return p @ v
    return (p[..., None] * torch.where(visible[..., None], v[..., None, :, :], 0.0)).sum(-2)


def _scores(q, k, visible, *, bias, scale, softcap, alibi_slopes):
    """[B,H,T,S], -inf where not visible; k has the heads of q."""
    scores = _products(q, k, visible) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.where(visible, scores, 0.0)  # the slope of tanh at a NaN is NaN, also times 0
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes[..., None, None].to(scores.dtype)  # [H,1,1] or [B,H,1,1]
        scores = scores - slopes * _distance(q, k).abs()
    if bias is not None:
        scores = scores + bias
    return torch.where(visible, scores, -math.inf)


def _softmax(scores, sinks):
    """(P [B,H,T,S], lse [B,H,T]); a sink [H] is one more column, which P leaves out."""
    S = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    dead = scores.isneginf().all(-1)
    scores = scores.masked_fill(dead[..., None], 0.0)
    p = torch.softmax(scores, -1)[..., :S].masked_fill(dead[..., None], 0.0)
    return p, torch.logsumexp(scores, -1).masked_fill(dead, -math.inf)


def _weights(q, k, mask, causal, window, sinks, **options):
    """(P [B,H,T,S], lse [B,H,T], visible [B,H,T,S]) for k with the heads of q."""
    visible = _visible(q, k, mask, causal, window)
    p, lse = _softmax(_scores(q, k, visible, **options), sinks)
    return p.masked_fill(~visible, 0.0), lse, visible


def _dropped(p, keep, dropout_p):
    if keep is None:
        return p
    return torch.where(keep, p * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0.0)


def _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, keep, return_lse, **options):
    """One sequence after the other: q [total,H,D], k [total,G,D], v [total,G,E]; keep [N,H,T,S] of the longest."""
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[2])], [q.new_empty(q.shape[1], 0)]
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(*cu[b : b + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        T, S = one[0].shape[2], one[1].shape[2]
        out, lse = attention.__wrapped__(
            *one,
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b : b + 1],
            keep=None if keep is None else keep[b : b + 1, :, :T, :S],
            return_lse=True,
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_lse else out


@in_float64
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
):
    """softmax(score) v for q [B,H,T,D], k [B,G,S,D], v [B,G,S,E]; lse [B,H,T], natural logarithm.

    mask bool, True = attend, and bias broadcast to [B,H,T,S]. window=(left, right): the keys d - left .. d + right,
    None = all. alibi_slopes [H] or [B,H]; sinks [H]: one more logit a row, without a value. A row without sink that
    sees nothing is 0, its lse -inf. keep bool [B,H,T,S]: weights become keep / (1 - dropout_p) times as large, lse
    stays. cu_seqlens_q, cu_seqlens_k [N+1]: N sequences end to end, q [total,H,D], lse [H,total].
    """
    options: dict[str, Any] = dict(bias=bias, scale=scale, softcap=softcap)
    if cu_seqlens_q is not None:
        options |= dict(mask=mask, causal=causal, window=window, sinks=sinks, dropout_p=dropout_p)
        return _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, keep, return_lse, **options)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    p, lse, visible = _weights(q, k, mask, causal, window, sinks, alibi_slopes=alibi_slopes, **options)
    out = _weighted_sum(_dropped(p, keep, dropout_p), v, visible)
    return (out, lse) if return_lse else out


@in_float64
def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """P = exp(score - lse) [B,H,n,S] of the queries in rows (int64 [n], default all); 0 where a key is not seen.

    Without lse it is that of these keys and sinks: P is the softmax.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    options = dict(bias=bias, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
    if lse is None:
        p, _, _ = _weights(q, k, mask, causal, window, sinks, **options)
    else:
        visible = _visible(q, k, mask, causal, window)
        scores = _scores(q, k, visible, **options)
        p = torch.where(visible & ~scores.isneginf(), (scores - lse[..., None]).exp(), 0.0)
    return p if rows is None else p[:, :, rows]


@in_float64
def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to all keys, from those of parts of the keys.

    lse = log sum exp(lse_i), out = sum exp(lse_i - lse) out_i
    outs [B,H,T,E], lses [B,H,T]. A part whose lse is -inf takes no part; where all are, out is 0 and lse -inf.
    """
    p, lse = _softmax(torch.stack(lses, -1), None)
    parts = torch.where(torch.stack(lses, -1).isneginf()[..., None], 0.0, torch.stack(outs, -2))
    return (p[..., None] * parts).sum(-2), lse
