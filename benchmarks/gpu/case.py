"""A case of the GPU benchmarks: what is computed, what it costs at least, and who computes it.

A maker returns a contestant's function of the inputs; it runs only when its turn comes, so that what is not installed
or does not compile fails alone. `calls` turns the function and some sets of inputs into calls without arguments: of
the function, of its backward pass alone, or of both.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

OURS = "pykern"
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward + backward"
NOT_FINITE = 1e9
SUSPICIOUS = 0.05  # a difference, as a part of the largest number, that half precision does not explain
Maker = Callable[[], Callable[..., Any]]
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Within:
    """A contestant's function whose backward pass runs in a context."""

    function: Callable[..., Any]
    context: Callable[[], AbstractContextManager]

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Source:
    """Random inputs on a device, never zeros: a GPU multiplies zeros with less power and so faster than numbers."""

    def __init__(self, device: torch.device, seed: int, grad: bool) -> None:
        self.device, self.grad = device, grad
        self.generator = torch.Generator(device).manual_seed(seed)

    def constant(self, *shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> Tensor:
        """Normally distributed."""
        x = torch.randn(shape, generator=self.generator, device=self.device) * spread
        return x.to(dtype)

    def leaf(self, *shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> Tensor:
        """The same, with a gradient where the case has a backward pass."""
        return self.constant(*shape, dtype=dtype, spread=spread).requires_grad_(self.grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """moved (bytes) and flops are counted from the shapes: inputs read once, outputs written once.

    goal: which of the project's goals this is a denominator of. priority: 1 is timed first. kernels: those of pykern
    without which it does not take part. traffic: the ceiling of the bytes, "copy" or, where next to nothing is written,
    "read". The results of `makers` are compared to those of the first rival.
    """

    name: str
    goal: str
    priority: int
    dtype: torch.dtype
    shape: str
    moved: float
    flops: float
    inputs: Callable[[Source], tuple[Any, ...]]
    makers: dict[str, Maker]
    kernels: tuple[str, ...] = ()
    mode: str = FORWARD
    traffic: str = "copy"
    one_set: bool = False  # the inputs are changed in place, or larger than any cache by far
    extra_seconds: float = 0.0  # beyond the estimate: whole models compile for long

    @property
    def key(self) -> str:
        return f"{self.name} | {self.shape} | {short(self.dtype)} | {self.mode}"

    def rivals(self) -> list[str]:
        return [who for who in self.makers if who != OURS]


def short(dtype: torch.dtype) -> str:
    """The name without torch in front: bfloat16."""
    return str(dtype).removeprefix("torch.")


def douts(outs: list[Tensor]) -> list[Tensor]:
    """The gradients that reach the outputs: the same for every contestant; 1 for a loss."""
    found = []
    for seed, out in enumerate(outs):
        generator = torch.Generator(out.device).manual_seed(1000 + seed)
        x = torch.randn(out.shape, generator=generator, device=out.device) if out.dim() else torch.ones_like(out)
        found.append(x.to(out.dtype))
    return found


def _outs(result: object) -> list[Tensor]:
    outs = [result] if isinstance(result, Tensor) else list(result)
    return [out for out in outs if out.requires_grad]


def _leaves(inputs: tuple) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def calls(mode: str, function: Callable[..., Any], sets: list[tuple]) -> Calls:
    """A call for each set of inputs. For BACKWARD, forward runs now, on the stream that is current."""
    if mode == FORWARD:
        return [partial(function, *inputs) for inputs in sets]
    if mode == BACKWARD:
        return [_backward(function, inputs) for inputs in sets]
    if mode == TRAINING:
        return [_training(function, inputs) for inputs in sets]
    raise ValueError(f"benchmarks.gpu: no mode {mode!r}")


def _backward(function: Callable[..., Any], inputs: tuple) -> Callable[[], object]:
    outs = _outs(function(*inputs))
    given = douts(outs)
    context = function.context if isinstance(function, Within) else nullcontext

    def backward() -> object:
        with context():
            return torch.autograd.grad(outs, _leaves(inputs), given, retain_graph=True)

    return backward


def _training(function: Callable[..., Any], inputs: tuple) -> Callable[[], object]:
    given: list[Tensor] = []

    def both() -> object:
        outs = _outs(function(*inputs))
        if not given:  # made by the first call: not of the work that is timed
            given.extend(douts(outs))
        return torch.autograd.grad(outs, _leaves(inputs), given)

    return both


def difference(result: object, expected: object) -> float | None:
    """The largest |result - expected| over max |expected|, over all tensors; None: nothing to compare.

    NOT_FINITE where one of the two holds NaN or infinity: JSON has no word for them.
    """
    pairs = [
        (a, b) for a, b in zip(_tensors(result), _tensors(expected), strict=True) if a.is_floating_point() and a.numel()
    ]
    return max((_relative(a, b) for a, b in pairs), default=None)


def _tensors(result: object) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else list(result)
    return [x for x in found if isinstance(x, Tensor)]


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"a result has shape {list(a.shape)}, that of the first rival {list(b.shape)}")
    a, b = a.detach().float(), b.detach().float()
    found = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return found if math.isfinite(found) else NOT_FINITE
