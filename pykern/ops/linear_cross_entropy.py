"""The language-model head and its loss in one op: logits exist for a block of classes at a time. Differentiable."""

import math

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    autocast,
    below_autograd,
    define,
    differentiable,
    optional_tensors,
    require_tensors,
    unit_last,
)
from pykern.ops.cross_entropy import check_reduction, reduced, row_gradients, stat_dtype


def _rows(x: Tensor) -> Tensor:
    return unit_last(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _forward(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction):
    loss = x.new_empty(target.shape, dtype=stat_dtype(x))
    lse = x.new_empty(target.shape, dtype=torch.float64)
    _C.linear_cross_entropy_forward(
        _rows(x),
        unit_last(weight),
        None if bias is None else unit_last(bias),
        target.reshape(-1),
        loss.view(-1),
        lse.view(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return reduced(loss, target, ignore_index, reduction), lse


def _forward_fake(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction):
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=stat_dtype(x))
    return loss, x.new_empty(target.shape, dtype=torch.float64)


def _backward(x, weight, bias, target, lse, dout, ignore_index, label_smoothing, z_loss, reduction, wanted):
    dx, dweight, dbias = _backward_fake(x, weight, bias, target, lse, dout, 0, 0.0, 0.0, "", wanted)
    rows = _rows(x)
    _C.linear_cross_entropy_backward(
        rows,
        unit_last(weight),
        None if bias is None else unit_last(bias),
        target.reshape(-1),
        lse.view(-1),
        row_gradients(dout, target, ignore_index, reduction).reshape(-1),
        dx.view(rows.shape) if wanted[0] else None,
        dweight if wanted[1] else None,
        dbias if wanted[2] else None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return dx, dweight, dbias


def _backward_fake(x, weight, bias, target, lse, dout, ignore_index, label_smoothing, z_loss, reduction, wanted):
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, str reduction"
_head = define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_head_backward = define(
    "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse, Tensor dout, "
    f"{_OPTIONS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, *options):
        loss, lse = below_autograd(_head, x, weight, bias, target, *options)
        ctx.save_for_backward(x, weight, bias, target, lse)
        ctx.mark_non_differentiable(lse)
        ctx.options = options
        return loss, lse

    @staticmethod
    def backward(ctx, dout, _):
        wanted = list(ctx.needs_input_grad[:3])
        grads = _head_backward(*ctx.saved_tensors, dout, *ctx.options, wanted)
        return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * 5


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

    The logits are never in memory as a whole: 1024 classes at a time, computed again in the backward pass. x, weight
    and bias share one dtype: float32, float64, bfloat16 or float16 (under torch.autocast they are cast); logits are
    float32 (float64 for float64) whatever that is. Options and reductions are those of pykern.cross_entropy.
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
    x, weight, bias = autocast("linear_cross_entropy", x, weight, bias)
    return _head(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction)[0]
