"""The weights of attention for all or some query rows, from q, k and lse: for plots, need_weights and probes.

    weights = exp(score - lse)      dS = weights dweights      dlse = -sum(dS)

With the lse of attention(..., return_lse=True), the two gradients add up to that of a softmax.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    autocast,
    define,
    differentiable,
    optional_tensors,
    require_tensors,
    unit_last,
)
from pykern.ops.attention import check_layout, expanded, kernel_options, rank4, slopes_of, window_limits
from pykern.ops.attention_formula import BIAS, LEFT, MASK, OPTIONS, blocks, compute_dtype, scores

OP = "attention_weights"


def _empty(q, k, lse, rows, *options):
    return q.new_empty(*q.shape[:2], q.shape[2] if rows is None else rows.shape[0], k.shape[2])


def _weights(q, k, lse, rows, *options):
    weights = _empty(q, k, lse, rows)
    q, k = unit_last(q), unit_last(k)
    mask, bias = expanded(options[MASK], q, k), expanded(options[BIAS], q, k)
    rows = None if rows is None else rows.contiguous()
    try:  # k stands for v, of which only the shape counts
        _C.attention_weights(q, k, k, mask, bias, lse, rows, weights, **kernel_options(options))
    except (TypeError, ValueError, IndexError) as error:
        raise type(error)(str(error).replace("attention:", f"{OP}:", 1)) from None
    return weights


def _gradients(q, k, lse, rows, weights, dweights, want_bias, *options):
    dbias = options[BIAS] if want_bias else q.new_empty(0)
    return tuple(x.new_empty(x.shape) for x in (q, k, dbias, lse))


def _backward(q, k, lse, rows, weights, dweights, want_bias, *options):
    dtype = compute_dtype(q)
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    dq, dk, dlse = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, lse))
    dbias = q.new_zeros(options[BIAS].shape if want_bias else 0, dtype=dtype)
    end = 0
    for block in blocks(q, k, options, rows):
        begin, end = end, end + len(block.rows)
        block_q, block_k = block.of_rows(wide_q), wide_k[:, :, block.keys]
        s = scores(block, block_q, block_k, options)
        p, dp = (x[:, :, begin:end, block.keys].to(dtype) for x in (weights, dweights))
        dscore = s.hide(p * dp)
        dy = s.slope * dscore
        dq.index_add_(2, block.rows, s.over_keys(dy, block_k))
        dk[:, :, block.keys] += s.over_rows(dy, block_q)
        dlse.index_add_(2, block.rows, -dscore.sum(-1))
        if want_bias:
            block.add_scores(dbias, dscore)
    return dq.to(q.dtype), dk.to(k.dtype), dbias.to(q.dtype), dlse.to(lse.dtype)


_attention_weights = define(
    f"attention_weights(Tensor q, Tensor k, Tensor lse, Tensor? rows, {OPTIONS}) -> Tensor", _weights, _empty
)
_attention_weights_backward = define(
    "attention_weights_backward(Tensor q, Tensor k, Tensor lse, Tensor? rows, Tensor weights, Tensor dweights, "
    f"bool want_bias, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _gradients,
)


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, lse, rows, *options):
        weights = _attention_weights.below_autograd(q, k, lse, rows, *options)
        ctx.save_for_backward(q, k, lse, rows, weights, *options[:LEFT])
        ctx.numbers = options[LEFT:]
        return weights

    @staticmethod
    def backward(ctx, dweights):
        q, k, lse, rows, weights, *tensors = ctx.saved_tensors
        want_bias = ctx.needs_input_grad[5]
        dq, dk, dbias, dlse = _attention_weights_backward(
            q, k, lse, rows, weights, dweights, want_bias, *tensors, *ctx.numbers
        )
        return (dq, dk, dlse, None, None, dbias if want_bias else None, *([None] * 10))


differentiable(_attention_weights, _AttentionWeights)


def _row_indices(rows: Tensor | Sequence[int] | None, q: Tensor) -> Tensor | None:
    """rows as an int64 tensor; the numbers in a tensor are left to the kernel."""
    if rows is None:
        return None
    if isinstance(rows, Tensor):
        if rows.dim() != 1:
            raise ValueError(f"{OP}: rows has shape {list(rows.shape)}, expected [n]")
        return rows
    if not isinstance(rows, Sequence) or not all(isinstance(row, int) and not isinstance(row, bool) for row in rows):
        raise TypeError(f"{OP}: rows must be an int64 tensor or a sequence of ints, got {rows!r}")
    for row in rows:
        if not 0 <= row < q.shape[2]:
            raise IndexError(f"{OP}: rows contains {row}, but q has {q.shape[2]} rows")
    return torch.tensor(list(rows), dtype=torch.int64, device=q.device)


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """exp(score - lse), 0 where masked, for q [B, H, T, D], k [B, G, S, D], lse [B, H, T] -> [B, H, n, S], q's dtype.

    lse is that of attention(q, k, v, ..., return_lse=True) with the same options, float32 or float64 (float64 for
    float64). rows: the n query rows wanted, an int64 tensor or a sequence of ints of 0 .. T - 1; None is all T. A row
    sums to 1, to less beside a sink, to 0 where it sees no key. Dropout does not show in the weights. sinks changes
    nothing, as lse holds them already: it is there to take the options of attention as they are.
    Differentiable in q, k, bias and lse; the other options are those of attention, without cu_seqlens.
    TypeError: not a tensor, mixed or other dtypes. ValueError: shapes, options. IndexError: a row that q lacks.
    """
    require_tensors(OP, q=q, k=k, lse=lse)
    optional_tensors(OP, sinks=sinks)
    for name, x, layout in (("q", q, "[B, H, T, D]"), ("k", k, "[B, G, S, D]"), ("lse", lse, "[B, H, T]")):
        check_layout(OP, name, x, layout)
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"{OP}: sinks has shape {list(sinks.shape)}, expected [{q.shape[1]}]")
    slopes = slopes_of(OP, alibi_slopes, q.shape[0], q.shape[1])
    mask, bias = rank4(OP, "mask", mask, q, k), rank4(OP, "bias", bias, q, k)
    q, k, bias = autocast(OP, q, k, bias)
    return _attention_weights(
        *(q, k, lse, _row_indices(rows, q), mask, bias, slopes, None, None, None, None),
        *window_limits(OP, window, causal),
        q.shape[3] ** -0.5 if scale is None else float(scale),
        0.0 if softcap is None else float(softcap),
        0.0,
    )
