"""Layer and root-mean-square normalisation over the last dimension, residual addition included, differentiable."""

from typing import overload

import torch
from torch import Tensor

from pykern.ops._library import _C, define, differentiable, given, require_tensors, unit_last


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _normed(x, half):
    """The result: of x's dtype or, for a float32 x, of the half dtype."""
    return x.new_empty(x.shape, dtype=half if half is not None and x.dtype == torch.float32 else x.dtype)


def _stat(x):
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _unit_last(*tensors):
    return [None if t is None else unit_last(t) for t in tensors]


# ---- layer_norm


def _empty_layer_norm(x, weight, bias, residual, eps, half):
    mean = _stat(x)
    return _normed(x, half), x.new_empty(0) if residual is None else _like(x), mean, torch.empty_like(mean)


def _layer_norm_forward(x, weight, bias, residual, eps, half):
    x, weight, bias, residual = _unit_last(x, weight, bias, residual)
    out, mean, rstd = _normed(x, half), _stat(x), _stat(x)
    total = None if residual is None else _like(x)
    _C.layer_norm_forward(x, weight, bias, residual, out, total, mean, rstd, eps=eps)
    return out, total, mean, rstd


def _empty_layer_norm_grads(h, weight, mean, rstd, dout, dsum, wants_weight, wants_bias):
    columns = h if weight is None else weight.new_empty(0)  # without a weight there is no bias
    D = h.shape[-1]
    return _like(h), columns.new_empty(D if wants_weight else 0), columns.new_empty(D if wants_bias else 0)


def _layer_norm_backward(h, weight, mean, rstd, dout, dsum, wants_weight, wants_bias):
    h, weight, dout, dsum = _unit_last(h, weight, dout, dsum)
    grads = _empty_layer_norm_grads(h, weight, mean, rstd, dout, dsum, wants_weight, wants_bias)
    dh, dweight, dbias = grads
    _C.layer_norm_backward(
        h, weight, mean, rstd, dout, dsum, dh, dweight if wants_weight else None, dbias if wants_bias else None
    )
    return grads


_layer_norm = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, ScalarType? half) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_forward,
    _empty_layer_norm,
)
_layer_norm_grads = define(
    "layer_norm_backward(Tensor h, Tensor? weight, Tensor mean, Tensor rstd, Tensor dout, Tensor? dsum, "
    "bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    _empty_layer_norm_grads,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, half):
        out, total, mean, rstd = _layer_norm.below_autograd(x, weight, bias, residual, eps, half)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.mark_non_differentiable(*given(mean, rstd, total if residual is None else None))
        ctx.set_materialize_grads(False)
        return out, total, mean, rstd

    @staticmethod
    def backward(ctx, dout, dsum, _dmean, _drstd):
        h, weight, mean, rstd = ctx.saved_tensors
        _, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
        dout = torch.zeros_like(h) if dout is None else dout
        dh, dweight, dbias = _layer_norm_grads(h, weight, mean, rstd, dout, dsum, wants_weight, wants_bias)
        return (
            dh,
            dweight if wants_weight else None,
            dbias if wants_bias else None,
            dh if wants_residual else None,
            None,
            None,
        )


differentiable(_layer_norm, _LayerNorm)

# ---- rms_norm


def _empty_rms_norm(x, weight, residual, eps, half):
    return _normed(x, half), x.new_empty(0) if residual is None else _like(x), _stat(x)


def _rms_norm_forward(x, weight, residual, eps, half):
    x, weight, residual = _unit_last(x, weight, residual)
    out, rstd = _normed(x, half), _stat(x)
    total = None if residual is None else _like(x)
    _C.rms_norm_forward(x, weight, residual, out, total, rstd, eps=eps)
    return out, total, rstd


def _empty_rms_norm_grads(h, weight, rstd, dout, dsum, wants_weight):
    return _like(h), (h if weight is None else weight).new_empty(h.shape[-1] if wants_weight else 0)


def _rms_norm_backward(h, weight, rstd, dout, dsum, wants_weight):
    h, weight, dout, dsum = _unit_last(h, weight, dout, dsum)
    dh, dweight = _empty_rms_norm_grads(h, weight, rstd, dout, dsum, wants_weight)
    _C.rms_norm_backward(h, weight, rstd, dout, dsum, dh, dweight if wants_weight else None)
    return dh, dweight


_rms_norm = define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps, ScalarType? half) -> (Tensor, Tensor, Tensor)",
    _rms_norm_forward,
    _empty_rms_norm,
)
_rms_norm_grads = define(
    "rms_norm_backward(Tensor h, Tensor? weight, Tensor rstd, Tensor dout, Tensor? dsum, bool wants_weight) "
    "-> (Tensor, Tensor)",
    _rms_norm_backward,
    _empty_rms_norm_grads,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, half):
        out, total, rstd = _rms_norm.below_autograd(x, weight, residual, eps, half)
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.mark_non_differentiable(*given(rstd, total if residual is None else None))
        ctx.set_materialize_grads(False)
        return out, total, rstd

    @staticmethod
    def backward(ctx, dout, dsum, _drstd):
        h, weight, rstd = ctx.saved_tensors
        _, wants_weight, wants_residual, *_ = ctx.needs_input_grad
        dout = torch.zeros_like(h) if dout is None else dout
        dh, dweight = _rms_norm_grads(h, weight, rstd, dout, dsum, wants_weight)
        return dh, dweight if wants_weight else None, dh if wants_residual else None, None, None


differentiable(_rms_norm, _RMSNorm)

# ---- public


def _autocast(x: Tensor, residual: Tensor | None, *columns: Tensor | None) -> tuple:
    """Under torch.autocast x and residual in the wider of their dtypes, the dtype of the result of a float32 x, and
    weight and bias in a dtype that goes with x."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, residual, None, *columns
    if residual is not None and residual.dtype != x.dtype:
        widest = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(widest), residual.to(widest)
    fits = (x.dtype, torch.float32)
    columns = tuple(t if t is None or t.dtype in fits else t.to(x.dtype) for t in columns)
    return x, residual, torch.get_autocast_dtype(x.device.type), *columns


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(h - mean(h)) / sqrt(var(h) + eps) * weight + bias for x [..., D], weight and bias [D]; h = x + residual.

    The mean and the variance (divided by D) are those of the last dimension. With residual [..., D] the result is
    (normed, h). float32, float64, bfloat16 or float16, one dtype for all, but a half x may have float32 weight and
    bias; sums are taken in float32 or wider. Under torch.autocast a float32 x gives a normed in the autocast dtype,
    what the next matrix product wants; h keeps x's. Source: Ba, Kiros and Hinton, arXiv 1607.06450.
    TypeError: not tensors, other or mixed dtypes. ValueError: shapes that differ, eps negative or not finite.
    """
    optional = {"weight": weight, "bias": bias, "residual": residual}
    require_tensors("layer_norm", x=x, **{name: t for name, t in optional.items() if t is not None})
    x, residual, half, weight, bias = _autocast(x, residual, weight, bias)
    out, h, _, _ = _layer_norm(x, weight, bias, residual, eps, half)
    return out if residual is None else (out, h)


@overload
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: None = None) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * weight for x [..., D], weight [D]; h = x + residual.

    With residual [..., D] the result is (normed, h). Dtypes, autocast and errors as in pykern.layer_norm.
    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    optional = {"weight": weight, "residual": residual}
    require_tensors("rms_norm", x=x, **{name: t for name, t in optional.items() if t is not None})
    x, residual, half, weight = _autocast(x, residual, weight)
    out, h, _ = _rms_norm(x, weight, residual, eps, half)
    return out if residual is None else (out, h)
