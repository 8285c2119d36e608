"""Elementwise activations on torch tensors, differentiable."""

import torch
from torch import Tensor

from pykern.ops._library import _C, define, differentiable, empty_packed, require_tensors, unit_last


def _forward(x, kind):
    x = unit_last(x)
    out = empty_packed(x)
    _C.activation_forward(x, out, kind=kind)
    return out


def _backward(x, dout, kind):
    x, dout = unit_last(x), unit_last(dout)
    dx = empty_packed(x)
    _C.activation_backward(x, dout, dx, kind=kind)
    return dx


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_activation = define("activation(Tensor x, str kind) -> Tensor", _forward, _like)
_activation_backward = define("activation_backward(Tensor x, Tensor dout, str kind) -> Tensor", _backward, _like)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _activation.below_autograd(x, kind)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return _activation_backward(x, dout, ctx.kind), None


differentiable(_activation, _Activation)


def _swiglu_forward(gate, up):
    gate, up = unit_last(gate), unit_last(up)
    out = empty_packed(gate)
    _C.swiglu_forward(gate, up, out)
    return out


def _swiglu_backward(gate, up, dout):
    gate, up, dout = unit_last(gate), unit_last(up), unit_last(dout)
    dgate, dup = empty_packed(gate), empty_packed(up)
    _C.swiglu_backward(gate, up, dout, dgate, dup)
    return dgate, dup


_swiglu = define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu_forward, _like)
_swiglu_grad = define(
    "swiglu_backward(Tensor gate, Tensor up, Tensor dout) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda gate, up, dout: (_like(gate), _like(up)),
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu.below_autograd(gate, up)

    @staticmethod
    def backward(ctx, dout):
        return _swiglu_grad(*ctx.saved_tensors, dout)


differentiable(_swiglu, _Swiglu)


def activation(x: Tensor, kind: str) -> Tensor:
    """f(x) elementwise for x [...], f one of "none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid".

    float32, float64, bfloat16 or float16. TypeError: not a tensor, other dtypes. ValueError: unknown kind.
    """
    require_tensors(kind, x=x)
    return _activation(x, kind)


def relu(x: Tensor) -> Tensor:
    """max(x, 0) for x [...]. float32, float64, bfloat16 or float16. TypeError: not a floating tensor."""
    return activation(x, "relu")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x) for x [...], Phi the normal distribution function; approximate="tanh" is GPT-2's form.

    float32, float64, bfloat16 or float16. Source: Hendrycks and Gimpel, arXiv 1606.08415.
    TypeError: not a floating tensor. ValueError: approximate.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return activation(x, "gelu" if approximate == "none" else "gelu_tanh")


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x) for x [...]. float32, float64, bfloat16 or float16. TypeError: not a floating tensor.

    Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    return activation(x, "silu")


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) for x [...]. float32, float64, bfloat16 or float16. TypeError: not a floating tensor."""
    return activation(x, "sigmoid")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate, up [...] of one shape and dtype (Shazeer, arXiv 2002.05202).

    float32, float64, bfloat16 or float16. TypeError: not floating tensors, mixed dtypes. ValueError: shapes differ.
    """
    require_tensors("swiglu", gate=gate, up=up)
    return _swiglu(gate, up)
