"""Softmax over the last dimension with a mask, differentiable."""

import torch
from torch import Tensor

from pykern.ops._library import _C, define, differentiable, require_tensors, unit_last


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _expanded(mask, x):
    """The mask in x's shape; its last stride is 1, or 0 where one value stands for a whole row."""
    mask = mask.expand(x.shape)
    return mask if mask.stride(-1) in (0, 1) else mask.contiguous()


def _forward(x, mask):
    x = unit_last(x)
    out = _like(x)
    _C.softmax_forward(x, None if mask is None else _expanded(mask, x), out)
    return out


def _backward(out, dout):
    out, dout = unit_last(out), unit_last(dout)
    dx = _like(out)
    _C.softmax_backward(out, dout, dx)
    return dx


_softmax = define("softmax(Tensor x, Tensor? mask) -> Tensor", _forward, _like)
_softmax_grad = define("softmax_backward(Tensor out, Tensor dout) -> Tensor", _backward, _like)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        out = _softmax.below_autograd(x, mask)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, dout):
        (out,) = ctx.saved_tensors
        return _softmax_grad(out, dout), None


differentiable(_softmax, _Softmax)


def _broadcasts(mask: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    return mask.dim() <= x.dim() and all(m in (1, n) for m, n in sizes)


def softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp(x - max) / sum exp(x - max) over the last dimension of x [..., D], over the places where mask is True.

    mask is bool and broadcasts to x's shape, None is all True. Where it is False the result and the gradient are
    exactly 0 whatever x and the incoming gradient hold there, NaN included; a row without any place, or of -inf
    only, is 0 too. float32, float64, bfloat16 or float16; sums are taken in float32 or wider.
    TypeError: not tensors, other dtypes. ValueError: a scalar x, a mask that does not broadcast to x's shape.
    """
    require_tensors("softmax", x=x, **({} if mask is None else {"mask": mask}))
    if mask is not None and not _broadcasts(mask, x):
        raise ValueError(f"softmax: mask of shape {list(mask.shape)} does not broadcast to x, {list(x.shape)}")
    return _softmax(x, mask)
