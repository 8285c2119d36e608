"""What is known of an op for the tests on a GPU (cuda_cases.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Op:
    """inputs(dtype, *shape) -> named tensors, the smallest shape first; function and formula: of those, to outputs by
    name. constant: inputs without a gradient. rows: those that may be strided. scale: of the errors of a result."""

    kernels: tuple[str, ...]
    shapes: dict[str, tuple]
    inputs: Callable[..., dict[str, torch.Tensor]]
    function: Callable[..., dict[str, torch.Tensor]]
    formula: Callable[..., dict[str, torch.Tensor]]
    constant: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("x",)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    scale: dict[str, float] = field(default_factory=dict)


def out(function):
    return lambda *args, **inputs: {"out": function(*args, **inputs)}
