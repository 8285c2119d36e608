"""Fused masked-softmax attention on torch tensors, differentiable in q, k, v, bias and through lse."""

import torch
from torch import Tensor

from pykern.ops._library import _C, autocast, below_autograd, define, differentiable, require_tensors, unit_last


def _expanded(x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if x is None else x.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E], laid out like q: when q is a view of [B, T, H, D], so is out; and lse [B, H, T] float64."""
    B, H, T, _ = q.shape
    if q.stride(1) < q.stride(2):
        out = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)
    else:
        out = q.new_empty(B, H, T, v.shape[3])
    return out, q.new_empty(B, H, T, dtype=torch.float64)


def _forward(q, k, v, mask, bias, causal, scale):
    out, lse = _results(q, v)
    _C.attention_forward(
        unit_last(q),
        unit_last(k),
        unit_last(v),
        _expanded(mask, q, k),
        _expanded(bias, q, k),
        out,
        lse,
        causal=causal,
        scale=scale,
    )
    return out, lse


def _gradients(q, k, v, bias, want_bias):
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if want_bias else q.new_empty(0),
    )


def _backward(q, k, v, mask, bias, out, lse, dout, dlse, causal, scale, want_bias):
    q, k, v, dout = unit_last(q), unit_last(k), unit_last(v), unit_last(dout)
    dq, dk, dv, dbias = _gradients(q, k, v, bias, want_bias)
    _C.attention_backward(
        q,
        k,
        v,
        _expanded(mask, q, k),
        _expanded(bias, q, k),
        out,
        lse,
        dout,
        dlse,
        dq,
        dk,
        dv,
        dbias if want_bias else None,
        causal=causal,
        scale=scale,
    )
    return dq, dk, dv, dbias


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, bool causal, float scale) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, mask, bias, causal, scale: _results(q, v),
)
_attention_backward = define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor out, Tensor lse, Tensor dout, "
    "Tensor? dlse, bool causal, float scale, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda q, k, v, mask, bias, out, lse, dout, dlse, causal, scale, want_bias: _gradients(
        unit_last(q), unit_last(k), unit_last(v), bias, want_bias
    ),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, bias, causal, scale):
        out, lse = below_autograd(_attention, q, k, v, mask, bias, causal, scale)
        ctx.save_for_backward(q, k, v, mask, bias, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, mask, bias, out, lse = ctx.saved_tensors
        if dout is None:
            if dlse is None:
                return (None,) * 7
            dout = torch.zeros_like(out)
        want_bias = bias is not None and ctx.needs_input_grad[4]
        dq, dk, dv, dbias = _attention_backward(
            q, k, v, mask, bias, out, lse, dout, dlse, ctx.causal, ctx.scale, want_bias
        )
        return dq, dk, dv, None, dbias if want_bias else None, None, None


differentiable(_attention, _Attention)


def _rank4(name: str, x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """x of rank 1-4, broadcast from the right, as a rank-4 view."""
    if x is None:
        return None
    require_tensors("attention", **{name: x})
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    x4 = x.reshape((1,) * (4 - x.dim()) + x.shape) if 1 <= x.dim() < 4 else x
    if x4.dim() != 4 or any(n not in (1, size) for n, size in zip(x4.shape, sizes, strict=True)):
        raise ValueError(
            f"attention: {name} of shape {list(x.shape)} does not broadcast to [B, H, T, S] = {list(sizes)}"
        )
    return x4


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(mask(scale * q k^T + bias)) v for q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] -> [B, H, T, E].

    float32, float64, bfloat16 or float16 (sums in float32), any strides; head h reads key head h // (H // G).
    mask: bool, True = attend; bias: q's dtype, added to the scores, differentiable; both of rank 1-4, broadcast from
    the right to [B, H, T, S]. causal: query t sees keys 0 .. S - T + t. scale: 1 / sqrt(D) by default.
    return_lse adds the natural logarithm of the softmax's denominator, [B, H, T], float32 (float64 for float64).
    A row that sees no key is 0, its lse -inf, its gradients 0; numbers in masked slots have no effect, NaN included.
    Formula: Vaswani et al., arXiv 1706.03762; tiles and recomputation: Dao et al., arXiv 2205.14135.
    TypeError: not a tensor, mixed or other dtypes. ValueError: shapes, devices, scale not finite.
    """
    require_tensors("attention", q=q, k=k, v=v)
    for name, x, layout in (("q", q, "[B, H, T, D]"), ("k", k, "[B, G, S, D]"), ("v", v, "[B, G, S, E]")):
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be {layout}, got shape {list(x.shape)}")
    mask, bias = _rank4("mask", mask, q, k), _rank4("bias", bias, q, k)
    q, k, v, bias = autocast("attention", q, k, v, bias)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = _attention(q, k, v, mask, bias, causal, scale)
    return (out, lse if q.dtype == torch.float64 else lse.float()) if return_lse else out
