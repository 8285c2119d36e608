"""Every op as its formula, in plain torch, differentiable by torch's autograd.

reference.<op>(...) computes in float64 whatever the dtype of its arguments: this is the oracle of the tests.
in_own_dtype(reference.<op>)(...) evaluates the same formula in the dtype of its arguments: this is "eager torch".
Dimensions as in _C.pyi: B batch, H query heads, G key/value heads, T queries, S keys, D head size, E value head size.
"""

import math

import torch
from torch import Tensor

from pykern.testing.oracle import in_float64
from pykern.testing.oracle import in_own_dtype as in_own_dtype
from pykern.testing.reference_attention import attention as attention
from pykern.testing.reference_attention import attention_weights as attention_weights
from pykern.testing.reference_attention import merge_attention as merge_attention

# ---- elementwise


@in_float64
def relu(x: Tensor) -> Tensor:
    """max(x, 0), and NaN for NaN."""
    return torch.relu(x)


@in_float64
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))"""
    return torch.sigmoid(x)


@in_float64
def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)"""
    return x * torch.sigmoid(x)


@in_float64
def gelu(x: Tensor) -> Tensor:
    """x Phi(x) = x erfc(-x / sqrt 2) / 2"""
    return x * torch.special.erfc(x * -math.sqrt(0.5)) * 0.5


@in_float64
def gelu_tanh(x: Tensor) -> Tensor:
    """x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) = x (1 + tanh(...)) / 2"""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS = {
    None: lambda x: x,
    "none": lambda x: x,
    "relu": relu.__wrapped__,
    "gelu": gelu.__wrapped__,
    "gelu_tanh": gelu_tanh.__wrapped__,
    "silu": silu.__wrapped__,
    "sigmoid": sigmoid.__wrapped__,
}


@in_float64
def activation(x: Tensor, kind: str | None) -> Tensor:
    """f(x), f one of "none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid"."""
    return ACTIVATIONS[kind](x)


@in_float64
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up"""
    return silu.__wrapped__(gate) * up


# ---- linear, norms, softmax


@in_float64
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias) + residual for x [...,K], weight [N,K]."""
    out = x @ weight.T
    out = out if bias is None else out + bias
    out = ACTIVATIONS[activation](out)
    return out if residual is None else out + residual


@in_float64
def mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """h down_weight^T + down_bias + residual, h = f(up) or f(gate) up, both linear in x [...,K]."""
    up = linear.__wrapped__(x, up_weight, up_bias)
    if gate_weight is None:
        h = ACTIVATIONS[activation](up)
    else:
        h = ACTIVATIONS[activation](linear.__wrapped__(x, gate_weight, gate_bias)) * up
    return linear.__wrapped__(h, down_weight, down_bias, residual=residual)


@in_float64
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor:
    """(h - mean h) / sqrt(var h + eps) weight + bias over the last dimension, h = x + residual, var with 1/D."""
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True)
    out = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@in_float64
def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Tensor | None = None) -> Tensor:
    """h / sqrt(mean h^2 + eps) weight over the last dimension, h = x + residual."""
    h = x if residual is None else x + residual
    out = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight


@in_float64
def softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp(x) / sum exp(x) over the last dimension where mask is True, 0 elsewhere; a row without True is 0."""
    if mask is None:
        return torch.softmax(x, -1)
    mask = mask.expand(x.shape)
    dead = ~mask.any(-1, keepdim=True)
    scores = torch.where(mask, x, -math.inf).masked_fill(dead, 0.0)
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0)


# ---- rope, and attention against a cache


@in_float64
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Rotates each pair (a, b) of x [B,H,T,D] to (a cos - b sin, a sin + b cos), by cos, sin [P,R/2] of its position.

    Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; dimensions from R on are left alone.
    positions [T] or [B,T], None = 0..T-1.
    """
    half = cos.shape[-1]
    at = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
    c, s = cos[at], sin[at]
    if at.dim() == 2:
        c, s = c[:, None], s[:, None]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    pair = (a * c - b * s, a * s + b * c)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated, rest), -1)


@in_float64
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, k_cache, v_cache): appends k, v [B,G,N,.] at cache_seqlens [B] to copies of the caches, then attends.

    With rotary_cos and rotary_sin, k is first rotated at positions cache_seqlens + n, q at the last T positions.
    With block_table [B,n], the caches are [pages,G,page,.] and position s is slot s % page of page block_table[b, s //
    page]. options: scale, window, softcap, sinks of attention.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    outs, lses = [], []
    for b, start in enumerate(cache_seqlens.tolist()):
        query, stop = q[b : b + 1], start + (0 if k is None else k.shape[2])
        positions = torch.arange(stop, device=q.device)
        if block_table is None:
            row, slot = torch.full_like(positions, b), positions
        else:
            page = k_cache.shape[2]
            row, slot = block_table[b, positions // page].long(), positions % page
        if rotary_cos is not None:
            at = dict(positions=positions[stop - q.shape[2] :], interleaved=rotary_interleaved)
            query = rope.__wrapped__(query, rotary_cos, rotary_sin, **at)
        if k is not None and v is not None:
            key = k[b : b + 1]
            if rotary_cos is not None:
                at = dict(positions=positions[start:], interleaved=rotary_interleaved)
                key = rope.__wrapped__(key, rotary_cos, rotary_sin, **at)
            k_cache[row[start:], :, slot[start:]] = key[0].transpose(0, 1)
            v_cache[row[start:], :, slot[start:]] = v[b].transpose(0, 1)
        keys, values = (cache[row, :, slot].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b : b + 1]
        out, lse = attention.__wrapped__(query, keys, values, causal=causal, return_lse=True, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), k_cache, v_cache


# ---- embedding, losses, optimiser


@in_float64
def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids] for weight [V,D], ids [...]."""
    return weight[ids]


@in_float64
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """lse - (1 - e) x[y] - e mean(x) + z lse^2 per row of logits [...,V], 0 where target == ignore_index.

    "mean" divides by the number of rows that are not ignored.
    """
    kept = target != ignore_index
    lse = torch.logsumexp(logits, -1)
    hit = logits.gather(-1, target.masked_fill(~kept, 0)[..., None])[..., 0]
    loss = lse - (1 - label_smoothing) * hit - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    loss = loss.masked_fill(~kept, 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


@in_float64
def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options) -> Tensor:
    """cross_entropy(x weight^T + bias, target, **options) for x [...,K], weight [V,K]."""
    return cross_entropy.__wrapped__(linear.__wrapped__(x, weight, bias), target, **options)


@in_float64
def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(param, exp_avg, exp_avg_sq) after step `step` = 1, 2, ... of AdamW (arXiv 1711.05101), not in place.

    scale [1] multiplies grad_scale; where it is not finite, nothing changes.
    """
    if scale is not None and not scale.isfinite():
        return param, exp_avg, exp_avg_sq
    grad = grad * (grad_scale if scale is None else grad_scale * scale.item())
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    mean, variance = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    return param * (1 - lr * weight_decay) - lr * mean / (variance.sqrt() + eps), exp_avg, exp_avg_sq
