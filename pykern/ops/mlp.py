"""The MLP of a Transformer on torch tensors: up, activation or gate, down and residual as one op, differentiable."""

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
from pykern.ops.linear import _matching_rows, _rows

_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid")


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else unit_last(tensor)


def _like_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """A contiguous tensor [..., N] as [M, N], where rows is [M, K]; [N] where it is [K]."""
    return None if tensor is None else tensor.view(*rows.shape[:-1], tensor.shape[-1])


def _forward(x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, residual, activation, keep):
    out = empty_packed(x if residual is None else residual, (*x.shape[:-1], down_weight.shape[0]))
    hidden = (*x.shape[:-1], up_weight.shape[0])
    up = empty_packed(x, hidden) if keep else None
    gate = empty_packed(x, hidden) if keep and gate_weight is not None else None
    rows = _rows(x)
    _C.mlp_forward(
        rows,
        *(_packed(t) for t in (up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)),
        None if residual is None else _matching_rows(residual, x),
        _like_rows(out, rows),
        _like_rows(up, rows),
        _like_rows(gate, rows),
        activation=activation,
        tf32=allows_tf32(x),
    )
    return out, up, gate


def _forward_fake(x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, residual, activation, keep):
    hidden = (*x.shape[:-1], up_weight.shape[0])
    return (
        (x if residual is None else residual).new_empty((*x.shape[:-1], down_weight.shape[0])),
        x.new_empty(hidden if keep else 0),
        x.new_empty(hidden if keep and gate_weight is not None else 0),
    )


def _backward(
    x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, up, gate, dout, activation, wanted
):
    inputs = (x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    gradients = tuple(empty_packed(t) if w else None for t, w in zip(inputs, wanted, strict=True))
    rows = _rows(x)
    dx, *rest = gradients
    _C.mlp_backward(
        rows,
        *(_packed(t) for t in (up_weight, gate_weight, down_weight)),
        _matching_rows(up, x),
        None if gate is None else _matching_rows(gate, x),
        _matching_rows(dout, x),
        _like_rows(dx, rows),
        *rest,
        activation=activation,
        tf32=allows_tf32(x),
    )
    return gradients


def _backward_fake(
    x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, up, gate, dout, activation, wanted
):
    inputs = (x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    return tuple(x.new_empty(t.shape if w else 0) for t, w in zip(inputs, wanted, strict=True))


_INPUTS = (
    "Tensor x, Tensor up_weight, Tensor? up_bias, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor down_weight, Tensor? down_bias"
)
_mlp = define(
    f"mlp({_INPUTS}, Tensor? residual, str activation, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_mlp_backward = define(
    f"mlp_backward({_INPUTS}, Tensor up, Tensor? gate, Tensor dout, str activation, bool[7] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *inputs, residual, activation, _ = args
        out, up, gate = _mlp.below_autograd(*inputs, residual, activation, True)
        ctx.save_for_backward(*inputs, up, None if inputs[3] is None else gate)
        ctx.activation = activation
        ctx.set_materialize_grads(False)  # of up, gate and pre: nobody asks for them
        ctx.mark_non_differentiable(*given(up, gate))
        return out, up, gate

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * 10
        wanted = list(ctx.needs_input_grad[:7])
        gradients = [None] * 7
        if any(wanted):
            made = _mlp_backward(*ctx.saved_tensors, dout, ctx.activation, wanted)
            gradients = [gradient if w else None for gradient, w in zip(made, wanted, strict=True)]
        return *gradients, dout if ctx.needs_input_grad[7] else None, None, None


differentiable(_mlp, _MLP)


def _check_shapes(x, up_weight, gate_weight, down_weight, **rest):
    if x.dim() == 0 or up_weight.dim() != 2 or up_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"mlp: up_weight must be [H, K] with K the last size of x, "
            f"got x {list(x.shape)}, up_weight {list(up_weight.shape)}"
        )
    H = up_weight.shape[0]
    if down_weight.dim() != 2 or down_weight.shape[1] != H:
        raise ValueError(
            f"mlp: down_weight must be [N, H] with H the rows of up_weight, "
            f"got up_weight {list(up_weight.shape)}, down_weight {list(down_weight.shape)}"
        )
    N = down_weight.shape[0]
    rest["gate_weight"] = gate_weight
    shapes = {"gate_weight": up_weight.shape, "up_bias": (H,), "gate_bias": (H,), "down_bias": (N,)}
    shapes["residual"] = (*x.shape[:-1], N)
    for name, tensor in rest.items():
        if tensor is not None and tensor.shape != shapes[name]:
            raise ValueError(f"mlp: {name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")


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
    """h down_weight^T + down_bias + residual, h = f(x up_weight^T + up_bias), for x [..., K] -> [..., N].

    With gate_weight, h = f(x gate_weight^T + gate_bias) (x up_weight^T + up_bias): SwiGLU for "silu" (Shazeer, arXiv
    2002.05202). up_weight, gate_weight [H, K], up_bias, gate_bias [H], down_weight [N, H], down_bias [N], residual
    [..., N]. f, the activation: "relu", "gelu", "gelu_tanh", "silu" or "sigmoid".
    x float32, float64, bfloat16 or float16 (sums in float32), the others in its dtype; beside a bfloat16 or float16 x
    each may be float32: weights are then rounded to x's dtype, their gradients are float32. The result has residual's
    dtype, without one x's. Under torch.autocast x is cast to the autocast dtype, float32 weights stay. The bits of a
    row do not depend on the number of rows or threads.
    TypeError: not a tensor, other or mixed dtypes. ValueError: shapes, devices, activation, gate_bias without
    gate_weight.
    """
    require_tensors("mlp", x=x, up_weight=up_weight, down_weight=down_weight)
    optional: dict[str, Tensor | None] = dict(
        up_bias=up_bias, down_bias=down_bias, gate_weight=gate_weight, gate_bias=gate_bias, residual=residual
    )
    optional_tensors("mlp", **optional)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"mlp: activation is {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
    if gate_bias is not None and gate_weight is None:
        raise ValueError("mlp: gate_bias is given without gate_weight")
    _check_shapes(x, up_weight, down_weight=down_weight, **optional)
    tensors = mixed_autocast(x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, residual)
    return _mlp(*tensors, activation, False)[0]
