"""Fused masked-softmax attention on torch tensors, differentiable in q, k, v, bias, sinks and through lse."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    autocast,
    define,
    differentiable,
    is_plain,
    optional_tensors,
    require_tensors,
    unit_last,
    wants_grad,
)
from pykern.ops.attention_formula import BIAS, LEFT, MASK, OPTIONS, SINKS
from pykern.ops.attention_second import AttentionBackward


def expanded(x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if x is None else x.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def kernel_options(options) -> dict[str, Any]:
    """The keyword arguments of the kernels in _C from the options behind mask and bias."""
    _, _, slopes, sinks, cu_q, cu_k, seed, left, right, scale, softcap, dropout_p = options
    return dict(
        causal=False,
        scale=scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        alibi_slopes=slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
    )


def out_like(q: Tensor, v: Tensor) -> Tensor:
    """out [B, H, T, E], laid out like q: when q is a view of [B, T, H, D], so is out."""
    B, H, T, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)
    return q.new_empty(B, H, T, v.shape[3])


def results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T] float64."""
    return out_like(q, v), q.new_empty(q.shape[:3], dtype=torch.float64)


def _run(q, k, v, out, lse, *options):
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    mask, bias = expanded(options[MASK], q, k), expanded(options[BIAS], q, k)
    _C.attention_forward(q, k, v, mask, bias, out, lse, **kernel_options(options))


def _forward(q, k, v, *options):
    out, lse = results(q, v)
    _run(q, k, v, out, lse, *options)
    return out, lse


def _without_lse(q, k, v, *options):
    out = out_like(q, v)
    _run(q, k, v, out, None, *options)
    return out, None


def _gradients(q, k, v, bias, sinks, want_bias, want_sinks):
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if want_bias else None,
        torch.empty_like(sinks, memory_format=torch.contiguous_format) if want_sinks else None,
    )


def _backward(q, k, v, out, lse, dout, dlse, want_bias, want_sinks, *options):
    q, k, v, dout = unit_last(q), unit_last(k), unit_last(v), unit_last(dout)
    dq, dk, dv, dbias, dsinks = _gradients(q, k, v, options[BIAS], options[SINKS], want_bias, want_sinks)
    _C.attention_backward(
        *(q, k, v, expanded(options[MASK], q, k), expanded(options[BIAS], q, k)),
        *(out, lse, dout, dlse, dq, dk, dv, dbias, dsinks),
        **kernel_options(options),
    )
    return dq, dk, dv, dbias, dsinks


def _backward_fake(q, k, v, out, lse, dout, dlse, want_bias, want_sinks, *options):
    tensors = unit_last(q), unit_last(k), unit_last(v), options[BIAS], options[SINKS]
    return tuple(q.new_empty(0) if g is None else g for g in _gradients(*tensors, want_bias, want_sinks))


_attention = define(
    f"attention(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, *options: results(q, v),
)
_attention_backward = define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    f"bool want_bias, bool want_sinks, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *options):
        out, lse = _attention.below_autograd(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse, *options[:LEFT])
        ctx.numbers = options[LEFT:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        _, _, _, _, want_bias, _, want_sinks, *_ = ctx.needs_input_grad
        nothing: tuple = (None,) * 10
        if dout is None:
            if dlse is None:
                return (None, None, None, None, None, None, None, *nothing[2:])
            dout = torch.zeros_like(out)
        arguments = (q, k, v, out, lse, dout, dlse, want_bias, want_sinks, *tensors, *ctx.numbers)
        if torch.is_grad_enabled():  # create_graph=True: the results are differentiable in turn
            dq, dk, dv, dbias, dsinks = _attention_backward(*arguments)
        else:
            dq, dk, dv, dbias, dsinks = _attention_backward.below_autograd(*arguments)
        return (
            *(dq, dk, dv, None, dbias if want_bias else None),
            *(None, dsinks if want_sinks else None, *nothing[2:]),
        )


differentiable(_attention, _Attention, twice=True)
differentiable(_attention_backward, AttentionBackward, refusal="pykern::attention has no third derivative")


def rank4(op: str, name: str, x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """x of rank 1-4, broadcast from the right, as a rank-4 view."""
    if x is None:
        return None
    require_tensors(op, **{name: x})
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    x4 = x.reshape((1,) * (4 - x.dim()) + x.shape) if 1 <= x.dim() < 4 else x
    if x4.dim() != 4 or any(n not in (1, size) for n, size in zip(x4.shape, sizes, strict=True)):
        raise ValueError(f"{op}: {name} of shape {list(x.shape)} does not broadcast to [B, H, T, S] = {list(sizes)}")
    return x4


_NO_LIMIT = 2**63 - 1  # what the kernels' integers hold: more keys than there are


def window_limits(op: str, window, causal: bool) -> tuple[int, int]:
    """(left, right) of the kernels, -1 for unlimited, from window=(left, right) with None for unlimited, and causal."""
    if window is None:
        return -1, 0 if causal else -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"{op}: window is {window!r}, expected (left, right), numbers of keys or None")
    for limit in window:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"{op}: window is {window!r}, expected int or None for left and right")
        if limit is not None and limit < 0:
            raise ValueError(f"{op}: window is {window!r}, expected numbers of keys that are not negative")
    left, right = (-1 if limit is None else min(limit, _NO_LIMIT) for limit in window)
    return left, 0 if causal else right


def _seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor:
    """The seed as an int64 tensor, drawn from torch's generator when none is given."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p is {dropout_p}, expected 0..1")
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"attention: seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"attention: seed is {seed}, expected 64 bits")
    return torch.tensor([seed], device=device)


def check_layout(op: str, name: str, x: Tensor, layout: str) -> None:
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(x.shape)}")


def slopes_of(op: str, alibi_slopes: Tensor | None, sequences: int, heads: int) -> Tensor | None:
    """alibi_slopes [H] or [B, H] as [B, H]."""
    if alibi_slopes is None:
        return None
    require_tensors(op, alibi_slopes=alibi_slopes)
    if tuple(alibi_slopes.shape) not in ((heads,), (sequences, heads)):
        raise ValueError(
            f"{op}: alibi_slopes has shape {list(alibi_slopes.shape)}, expected [{heads}] or [{sequences}, {heads}]"
        )
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: alibi_slopes takes no gradient; pass -slopes * distance as bias to learn them")
    return alibi_slopes.expand(sequences, heads)


@overload
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
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
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
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
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
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(mask(scale * q k^T + bias)) v for q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] -> [B, H, T, E].

    float32, float64, bfloat16 or float16 (sums in float32), any strides; head h reads key head h // (H // G).
    mask: bool, True = attend; bias: q's dtype, added to the scores, differentiable; both of rank 1-4, broadcast from
    the right to [B, H, T, S]. causal: query t sees keys 0 .. S - T + t, its diagonal. window=(left, right): only that
    many keys before and behind the diagonal, None = all. scale: 1 / sqrt(D) by default.
    softcap: scores x become softcap * tanh(x / softcap). alibi_slopes, float32 [H] or [B, H]: slope * |distance from
    the diagonal| is subtracted. sinks [H], q's dtype, differentiable: one more logit a row, with no value.
    dropout_p: probability with which a weight becomes 0 (the others grow by 1 / (1 - p)), decided by seed (an int, or
    an int64 tensor of one element) and position alone; without a seed torch's generator draws one.
    cu_seqlens_q, cu_seqlens_k, int32 [N + 1]: N sequences end to end, q [total, H, D], k [total, G, D], v [total, G, E]
    -> [total, H, E]; without mask and bias.
    return_lse adds the natural logarithm of the softmax's denominator, [B, H, T] ([H, total] with cu_seqlens), float32
    (float64 for float64). A row that sees no key is 0, its lse -inf, its gradients 0; numbers in masked slots have no
    effect, NaN included.
    Formula: Vaswani et al., arXiv 1706.03762; tiles and recomputation: Dao et al., arXiv 2205.14135; ALiBi: Press et
    al., arXiv 2108.12409; softcap: Gemma 2, arXiv 2408.00118; sinks: Xiao et al., arXiv 2309.17453.
    TypeError: not a tensor, mixed or other dtypes. ValueError: shapes, devices, options out of range.
    """
    require_tensors("attention", q=q, k=k, v=v)
    ragged = cu_seqlens_q is not None or cu_seqlens_k is not None
    if ragged:
        optional_tensors("attention", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        for name, x, layout in (("q", q, "[total, H, D]"), ("k", k, "[total, G, D]"), ("v", v, "[total, G, E]")):
            check_layout("attention", name, x, layout)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if not q.dim() == k.dim() == v.dim() == 4:
        for name, x, layout in (("q", q, "[B, H, T, D]"), ("k", k, "[B, G, S, D]"), ("v", v, "[B, G, S, E]")):
            check_layout("attention", name, x, layout)
    if sinks is not None:
        require_tensors("attention", sinks=sinks)
    slopes = None
    if alibi_slopes is not None:
        sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        slopes = slopes_of("attention", alibi_slopes, sequences, q.shape[1])
    mask, bias = rank4("attention", "mask", mask, q, k), rank4("attention", "bias", bias, q, k)
    q, k, v, bias, sinks = autocast("attention", q, k, v, bias, sinks)
    seed = None if dropout_p == 0.0 else _seed(seed, dropout_p, q.device)
    run: Callable = _attention
    tensors = (q, k, v, mask, bias, slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    if not return_lse and not wants_grad(tensors) and is_plain(tensors):
        run = _without_lse
    out, lse = run(
        *(q, k, v, mask, bias, slopes, sinks, cu_seqlens_q, cu_seqlens_k, seed),
        *window_limits("attention", window, causal),
        q.shape[3] ** -0.5 if scale is None else float(scale),
        0.0 if softcap is None else float(softcap),
        float(dropout_p),
    )
    if ragged:
        out = out[0].transpose(0, 1)
    if not return_lse:
        return out
    lse = lse[0] if ragged else lse
    return out, lse if q.dtype == torch.float64 else lse.float()
