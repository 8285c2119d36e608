"""Cross-entropy of logits and labels on torch tensors, differentiable."""

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    define,
    differentiable,
    empty_packed,
    require_tensors,
    unit_last,
)

_SERIAL = 32768  # numbers that torch adds on one thread, whatever the thread count


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a loss: float32, but float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_reduction(op: str, reduction: str) -> None:
    """ValueError unless reduction is "mean", "sum" or "none"."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses of all rows as they are, their sum, or their mean over the rows that are not ignored (NaN if none)."""
    if reduction == "none":
        return loss
    total = torch.stack([piece.sum(dtype=torch.float64) for piece in loss.flatten().split(_SERIAL)]).sum()
    return (total / (target != ignore_index).sum() if reduction == "mean" else total).to(loss.dtype)


def row_gradients(dout: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The gradient of each row's loss, given that of reduced(). Ignored rows may get anything."""
    if reduction == "mean":
        dout = dout / (target != ignore_index).sum()
    return dout.expand(target.shape)


def _forward(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    logits = unit_last(logits)
    loss = logits.new_empty(logits.shape[:-1], dtype=stat_dtype(logits))
    lse = torch.empty_like(loss, dtype=torch.float64)
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss)
    _C.cross_entropy_forward(logits, target, loss, lse, **options)
    return reduced(loss, target, ignore_index, reduction), lse


def _forward_fake(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    rows = logits.shape[:-1]
    loss = logits.new_empty(rows if reduction == "none" else (), dtype=stat_dtype(logits))
    return loss, logits.new_empty(rows, dtype=torch.float64)


def _backward(logits, target, lse, dout, ignore_index, label_smoothing, z_loss, reduction):
    logits = unit_last(logits)
    dlogits = empty_packed(logits)
    dloss = row_gradients(dout, target, ignore_index, reduction)
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss)
    _C.cross_entropy_backward(logits, target, lse, dloss, dlogits, **options)
    return dlogits


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, str reduction"
_cross_entropy = define(
    f"cross_entropy(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_cross_entropy_backward = define(
    f"cross_entropy_backward(Tensor logits, Tensor target, Tensor lse, Tensor dout, {_OPTIONS}) -> Tensor",
    _backward,
    lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, *options):
        loss, lse = _cross_entropy.below_autograd(logits, target, *options)
        ctx.save_for_backward(logits, target, lse)
        ctx.mark_non_differentiable(lse)
        ctx.options = options
        return loss, lse

    @staticmethod
    def backward(ctx, dout, _):
        return _cross_entropy_backward(*ctx.saved_tensors, dout, *ctx.options), *[None] * 5


differentiable(_cross_entropy, _CrossEntropy)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """lse - (1 - e) x[y] - e mean(x) + z_loss lse^2 per row x of logits [..., V] with label y of target [...] int64.

    lse = log sum exp(x), e = label_smoothing. A row whose label is ignore_index is not read and counts for nothing.
    reduction "mean" (over the rows that count; NaN if none, as in torch) or "sum" gives a scalar, "none" a loss per row
    [...]. logits float32, float64, bfloat16 or float16; the loss is float32 (float64 for float64). -inf in logits
    excludes a class; a row of nothing else has loss inf and gradient 0.

    TypeError: not tensors, other dtypes. ValueError: shapes, options out of range. IndexError: a label outside 0..V-1.
    """
    require_tensors("cross_entropy", logits=logits, target=target)
    check_reduction("cross_entropy", reduction)
    return _cross_entropy(logits, target, ignore_index, label_smoothing, z_loss, reduction)[0]
