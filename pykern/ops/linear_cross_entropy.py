"""The language-model head and its loss in one op: logits exist for a block of classes at a time. Differentiable."""

import math

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    allows_tf32,
    define,
    differentiable,
    empty_packed,
    is_plain,
    mixed_autocast,
    optional_tensors,
    require_tensors,
    unit_last,
    wants_grad,
)
from pykern.ops.cross_entropy import check_reduction, reduced, row_gradients, stat_dtype


def _rows(x: Tensor) -> Tensor:
    return unit_last(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _run(x, weight, bias, target, loss, dloss, grads, ignore_index, label_smoothing, z_loss):
    rows = _rows(x)
    dx, dweight, dbias = grads
    _C.linear_cross_entropy(
        rows,
        unit_last(weight),
        None if bias is None else unit_last(bias),
        target.reshape(-1),
        loss,
        None if dloss is None else dloss.reshape(-1),
        None if dx is None else dx.view(rows.shape),
        dweight,
        dbias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        tf32=allows_tf32(x),
    )


def _new_gradients(x, weight, bias, wanted):
    """Uninitialised gradients of x, weight and bias, None for those not wanted."""
    return (
        empty_packed(x) if wanted[0] else None,
        empty_packed(weight) if wanted[1] else None,
        empty_packed(bias) if wanted[2] else None,
    )


def _forward(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, wanted):
    loss = x.new_empty(target.shape, dtype=stat_dtype(x))
    grads, dloss = _new_gradients(x, weight, bias, wanted), None
    if any(wanted):
        dloss = row_gradients(loss.new_ones(()), target, ignore_index, reduction)
    _run(x, weight, bias, target, loss.view(-1), dloss, grads, ignore_index, label_smoothing, z_loss)
    return reduced(loss, target, ignore_index, reduction), *grads


def _forward_fake(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, wanted):
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=stat_dtype(x))
    return loss, *_backward_fake(x, weight, bias, target, loss, 0, 0.0, 0.0, "", wanted)


def _backward(x, weight, bias, target, dout, ignore_index, label_smoothing, z_loss, reduction, wanted):
    grads = _new_gradients(x, weight, bias, wanted)
    dloss = row_gradients(dout, target, ignore_index, reduction)
    _run(x, weight, bias, target, None, dloss, grads, ignore_index, label_smoothing, z_loss)
    return grads


def _backward_fake(x, weight, bias, target, dout, ignore_index, label_smoothing, z_loss, reduction, wanted):
    tensors = zip((x, weight, bias), wanted, strict=True)
    return tuple(torch.empty_like(t) if w else x.new_empty(0) for t, w in tensors)


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, str reduction, bool[3] wanted"
_head = define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_head_backward = define(
    "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor dout, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _times(grads, dout):
    """grads dout; as they are for the usual dout of 1."""
    eager = type(dout) is Tensor and dout.is_cpu and not wants_grad((dout,)) and is_plain((dout,))
    if eager and dout.item() == 1.0:
        return grads
    return [None if g is None else g * dout for g in grads]


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too where the loss is one number, for a loss of gradient 1: the logits are there.

    float16 does without: gradients so small would vanish in it before a loss scale reaches them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, _):
        wanted = list(ctx.needs_input_grad[:3])
        options = (ignore_index, label_smoothing, z_loss, reduction)
        early = any(wanted) and reduction != "none" and x.dtype != torch.float16  # torch.func knows only later
        loss, *grads = _head.below_autograd(
            x, weight, bias, target, *options, wanted if early else [False, False, False]
        )
        ctx.save_for_backward(x, weight, bias, target)
        ctx.grads = [g if w else None for g, w in zip(grads, wanted, strict=True)] if early else None
        ctx.options = options
        return loss, None, None, None

    @staticmethod
    def backward(ctx, dout, *_):
        grads, ctx.grads = ctx.grads, None  # given away: a second backward pass makes them again
        if grads is not None:
            return *_times(grads, dout), *[None] * 6
        wanted = list(ctx.needs_input_grad[:3])
        grads = _head_backward(*ctx.saved_tensors, dout, *ctx.options, wanted)
        return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * 6


differentiable(_head, _LinearCrossEntropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """pykern.cross_entropy(x weight^T + bias, target) for x [..., K], weight [V, K], bias [V], target [...] int64.

    The logits are never in memory as a whole: some rows at a time, 40 MB, whose gradients are made at once unless
    reduction is "none" or x is float16; those make the logits again in the backward pass. x float32, float64, bfloat16
    or float16; weight and bias in x's dtype, or float32 beside a half x (under torch.autocast x is cast, float32
    weights are not). Logits are float32 (float64 for float64). Options and reductions: pykern.cross_entropy.
    TypeError: not tensors, mixed or other dtypes. ValueError: shapes, options. IndexError: a label outside 0..V-1.
    """
    require_tensors("linear_cross_entropy", x=x, weight=weight, target=target)
    optional_tensors("linear_cross_entropy", bias=bias)
    check_reduction("linear_cross_entropy", reduction)
    if x.dim() == 0 or target.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: target must have the shape of x without its last dimension, "
            f"got x {list(x.shape)}, target {list(target.shape)}"
        )
    x, weight, bias = mixed_autocast(x, weight, bias)
    return _head(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, [False, False, False])[0]
