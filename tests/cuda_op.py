"""What is known of an op for the tests on a GPU (cuda_cases.py)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from tools import draw


@dataclass(frozen=True)
class Op:
    """inputs(dtype, *shape) -> named tensors, the smallest shape first; function and formula: of those, to outputs by
    name. constant: inputs without a gradient. rows: those that may be strided. scale: of the errors of a result.
    context: in which both passes run. only_cuda: the CPU's kernels compute something else."""

    kernels: tuple[str, ...]
    shapes: dict[str, tuple]
    inputs: Callable[..., dict[str, torch.Tensor]]
    function: Callable[..., dict[str, torch.Tensor]]
    formula: Callable[..., dict[str, torch.Tensor]]
    constant: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("x",)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    scale: dict[str, float] = field(default_factory=dict)
    context: Callable[[], AbstractContextManager] = nullcontext
    only_cuda: bool = False


def out(function):
    return lambda *args, **inputs: {"out": function(*args, **inputs)}


def leaves(op, inputs):
    wanted = {name for name, x in inputs.items() if x.is_floating_point() and name not in op.constant}
    return {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}


def results(op, function, inputs, douts=None):
    """Outputs and gradients "d<name>", and the gradients that reached the outputs: given, or drawn."""
    with op.context():
        return _results(op, function, inputs, douts)


def _results(op, function, inputs, douts):
    given = leaves(op, inputs)
    outputs = function(**given)
    found = {name: x.detach() for name, x in outputs.items()}
    wanted = {name: x for name, x in given.items() if x.requires_grad}
    if not wanted:
        return found, {}
    if douts is None:
        douts = {
            name: draw(*x.shape, dtype=x.dtype, seed=100 + i).to(x.device)
            for i, (name, x) in enumerate(outputs.items())
        }
    gradients = torch.autograd.grad([outputs[name] for name in douts], list(wanted.values()), list(douts.values()))
    return found | {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}, douts
