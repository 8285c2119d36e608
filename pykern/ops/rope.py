"""Rotary position embedding on torch tensors, differentiable."""

import torch
from torch import Tensor

from pykern.ops._library import _C, define, differentiable, require_tensors, unit_last

_NO_GRADIENT = "rope: cos and sin get no gradient; call detach() on them"


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kernel(x, cos, sin, positions, interleaved, inverse):
    x, cos, sin = unit_last(x), unit_last(cos), unit_last(sin)
    out = _like(x)
    _C.rope(x, cos, sin, positions, out, interleaved=interleaved, inverse=inverse)
    return out


_rope = define(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor",
    _kernel,
    _like,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved, inverse):
        if cos.requires_grad or sin.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        ctx.save_for_backward(cos, sin, positions)
        ctx.turn = interleaved, inverse
        return _rope.below_autograd(x, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def backward(ctx, dout):
        if any(ctx.needs_input_grad[1:3]):  # torch.func tells forward nothing
            raise RuntimeError(_NO_GRADIENT)
        cos, sin, positions = ctx.saved_tensors
        interleaved, inverse = ctx.turn
        return _rope(dout, cos, sin, positions, interleaved, not inverse), None, None, None, None, None


differentiable(_rope, _Rope)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of x [B, H, T, D] becomes (a cos - b sin, a sin + b cos) at its position's angle.

    cos, sin [P, R/2] hold the angles of P positions; pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved, and
    numbers from R on stay as they are. positions, int64 [T] or [B, T], picks the rows of cos and sin; None is 0..T-1.
    x is float32, float64, bfloat16 or float16, cos and sin are of its dtype or float32 (float64 for float64).
    Source: Su et al., arXiv 2104.09864. TypeError: not tensors, other dtypes. ValueError: shapes, R > D.
    IndexError: a position without a row. RuntimeError: cos or sin requires grad.
    """
    require_tensors("rope", x=x, cos=cos, sin=sin, **({} if positions is None else {"positions": positions}))
    return _rope(x, cos, sin, positions, interleaved, False)
