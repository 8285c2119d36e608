"""Linear layers on torch tensors with bias, activation and residual in one pass, differentiable."""

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    allows_tf32,
    define,
    differentiable,
    empty_packed,
    given,
    mixed_autocast,
    optional_tensors,
    require_tensors,
    unit_last,
)

_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid")


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with unit last stride: a view where the strides allow one."""
    return unit_last(x if x.dim() <= 2 else x.flatten(0, -2))


def _matching_rows(x: Tensor, like: Tensor) -> Tensor:
    """x [..., N] as [M, N] when its leading dimensions are those of like; else as it is, for the kernel to refuse."""
    return _rows(x) if x.shape[:-1] == like.shape[:-1] else x


def _forward(x, weight, bias, residual, activation, keep_pre):
    shape = (*x.shape[:-1], weight.shape[0])
    out = empty_packed(x, shape, None if residual is None else residual.dtype)
    pre = empty_packed(x, shape) if keep_pre else None
    rows = _rows(x)
    _C.linear_forward(
        rows,
        unit_last(weight),
        None if bias is None else unit_last(bias),
        None if residual is None else _matching_rows(residual, x),
        out.view(*rows.shape[:-1], out.shape[-1]),
        None if pre is None else pre.view(*rows.shape[:-1], out.shape[-1]),
        activation=activation,
        tf32=allows_tf32(x),
    )
    return out, pre


def _forward_fake(x, weight, bias, residual, activation, keep_pre):
    shape = (*x.shape[:-1], weight.shape[0])
    out = x.new_empty(shape, dtype=x.dtype if residual is None else residual.dtype)
    return out, x.new_empty(shape if keep_pre else 0)


def _backward(x, weight, bias, pre, dout, activation, wanted):
    rows = _rows(x)
    dx = empty_packed(rows) if wanted[0] else None
    dweight = empty_packed(weight) if wanted[1] else None
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted[2] else None
    _C.linear_backward(
        rows,
        unit_last(weight),
        None if activation == "none" else _matching_rows(pre, x),
        _matching_rows(dout, x),
        dx,
        dweight,
        dbias,
        activation=activation,
        tf32=allows_tf32(x),
    )
    return None if dx is None else dx.view(x.shape), dweight, dbias


def _backward_fake(x, weight, bias, pre, dout, activation, wanted):
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted[2] else weight.new_empty(0),
    )


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool keep_pre) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_linear_backward = define(
    "linear_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? pre, Tensor dout, str activation, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, activation, keep_pre):
        keep_pre = activation != "none"
        out, pre = _linear.below_autograd(x, weight, bias, residual, activation, keep_pre)
        ctx.save_for_backward(x, weight, bias, pre if keep_pre else None)
        ctx.activation = activation
        ctx.set_materialize_grads(False)  # of up, gate and pre: nobody asks for them
        ctx.mark_non_differentiable(*given(pre))
        return out, pre

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 6
        x, weight, bias, pre = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        grads = _linear_backward(x, weight, bias, pre, dout, ctx.activation, wanted)
        dx, dweight, dbias = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return dx, dweight, dbias, dout if ctx.needs_input_grad[3] else None, None, None


differentiable(_linear, _Linear)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias) + residual for x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N].

    x float32, float64, bfloat16 or float16 (sums in float32), the others in its dtype; a half x may have float32 weight
    and bias, and a float32 residual makes out float32. Under torch.autocast x is cast, float32 weights and residuals
    are not: the kernel rounds the weight while it reads it. Sums are float32 or wider; on
    CUDA, where torch.backends.cuda.matmul allows tf32, the factors of float32 products are rounded to it.
    activation: None, "relu", "gelu", "gelu_tanh", "silu" or "sigmoid". The bits of a row do not
    depend on the number of rows or threads. Rows whose strides do not nest are copied first.
    TypeError: not a tensor, mixed or other dtypes. ValueError: shapes, devices, activation.
    """
    require_tensors("linear", x=x, weight=weight)
    optional_tensors("linear", bias=bias, residual=residual)
    kind = "none" if activation is None else activation
    if kind not in _ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}, expected None or one of {', '.join(_ACTIVATIONS[1:])}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight must be [N, K] with K the last size of x, "
            f"got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(
            f"linear: residual has shape {list(residual.shape)}, expected {[*x.shape[:-1], weight.shape[0]]}"
        )
    x, weight, bias, residual = mixed_autocast(x, weight, bias, residual)
    return _linear(x, weight, bias, residual, kind, False)[0]
