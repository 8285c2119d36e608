"""One step of AdamW on torch tensors, in place, and the sums of squares from which gradient clipping takes a norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pykern.ops._library import (
    _C,
    _library,
    below_autograd_guard,
    define,
    is_plain,
    optional_tensors,
    refuse_tangents,
    require_tensors,
    unit_last,
    wants_grad,
)


def _smallest_stride_last(param, *others):
    """The same tensors with param's smallest stride last, so that a transposed parameter will do."""
    if param.dim() < 2 or param.stride(-1) == 1 or any(t is not None and t.dim() != param.dim() for t in others):
        return param, *others
    order = sorted(range(param.dim()), key=lambda i: -param.stride(i))
    return param.permute(order), *(t if t is None else t.permute(order) for t in others)


def _steps(states, *, scale=None, **options):
    written = [t for p, _, *stats in states for t in (p, *stats) if t is not None and not t.is_inference()]
    ordered = [_smallest_stride_last(*state) for state in states]
    _C.adamw([(p, unit_last(g), *stats) for p, g, *stats in ordered], scale=scale, **options)
    torch.autograd.graph.increment_version(written)


def _step(*state, **options):
    _steps([state], **options)


_adamw = define(
    "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, *, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale, Tensor? scale=None) -> ()",
    _step,
    lambda *tensors, **options: None,
)


def _not_differentiable(*tensors, **options):
    if wants_grad((*tensors, options.get("scale"))):
        raise RuntimeError("adamw: not differentiable; call it under torch.no_grad()")
    refuse_tangents("adamw_", (*tensors, options.get("scale")))
    with below_autograd_guard():
        _adamw.dispatched(*tensors, **options)


_library.impl("adamw_", _not_differentiable, "Autograd")


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    step: int,
    grad_scale: float = 1.0,
    scale: Tensor | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on tensors [...] of one shape, in place, in one pass.

    g = grad_scale grad;  exp_avg += (1 - beta1) (g - exp_avg);  exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    param = (1 - lr weight_decay) param - lr exp_avg / (1 - beta1^step) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    param float32, float64, bfloat16 or float16; grad in its dtype; the moments float32 (float64 for float64). With a
    float32 master, a bfloat16 or float16 param becomes the rounded copy of the master. step counts from 1. scale [1]
    float64, on param's device, multiplies grad_scale and is not read by the host: where it is not finite, nothing
    changes.
    RuntimeError: outside torch.no_grad() when an argument requires grad. TypeError: not tensors, other dtypes.
    ValueError: shapes, devices, overlap, options out of range, a grad_scale that is not finite.
    """
    require_tensors("adamw", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    optional_tensors("adamw", master=master, scale=scale)
    _adamw.dispatched(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        master,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        scale=scale,
    )


def adamw_all_(states: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]], **options) -> None:
    """adamw_ for each (param, grad, exp_avg, exp_avg_sq, master) of states, in one call where nobody records it.

    All on one device, and no two states share memory. On CUDA some eighty contiguous ones of a dtype are one launch.
    """
    tensors = [t for state in states for t in state] + [options.get("scale")]
    if is_plain(tensors) and not wants_grad(tensors):
        _steps(states, **options)
    else:
        for state in states:
            _adamw.dispatched(*state, **options)


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, float64 [n], in the same bits for any thread count and in any company.

    All on one device. On CUDA some hundred contiguous ones of a dtype are one launch.
    """
    sums = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device if tensors else None)
    _C.square_sum([unit_last(x) for x in tensors], sums)
    return sums
