"""cross_entropy, and linear_cross_entropy: the loss of a language model's head."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pykern
from benchmarks.bench_linear import flops
from benchmarks.memory import peaks_in_child
from benchmarks.report import OURS, Case, numbers, with_gradients
from benchmarks.roofline import short

SHAPES = [(1024, 50257), (2048, 8192)]  # M, V
QUICK_SHAPES = [(32, 1000)]
HEADS = [(1024, 768, 50257), (2048, 512, 8192)]  # M, K, V
QUICK_HEADS = [(64, 128, 1000)]
WARM_UP = (4, 16, 32)  # in the process that measures memory
DTYPES = (torch.float32, torch.bfloat16)


def labels(M: int, V: int) -> torch.Tensor:
    return torch.randint(V, (M,), generator=torch.Generator().manual_seed(0))


def build(M, V, dtype, backward):
    logits, target = numbers(M, V, dtype=dtype, spread=3.0).requires_grad_(backward), labels(M, V)
    contestants = {OURS: pykern.cross_entropy, "torch": F.cross_entropy}
    if backward:
        return {who: with_gradients(lambda x, f=f: f(x, target), [logits], None) for who, f in contestants.items()}
    return {who: lambda f=f: f(logits, target) for who, f in contestants.items()}


def heads(M, K, V, dtype_name, backward=True):
    """The contestants as functions of x [M, K] and weight [V, K], and these two."""
    dtype = getattr(torch, dtype_name)
    x, weight = numbers(M, K, dtype=dtype), numbers(V, K, dtype=dtype, spread=K**-0.5, seed=1)
    inputs, target = [t.requires_grad_(backward) for t in (x, weight)], labels(M, V)
    contestants = {
        OURS: lambda x, w: pykern.linear_cross_entropy(x, w, target),
        "torch": lambda x, w: F.cross_entropy(F.linear(x, w), target),
    }
    return contestants, inputs


def build_head(M, K, V, dtype_name, backward):
    contestants, inputs = heads(M, K, V, dtype_name, backward)
    if backward:
        return {who: with_gradients(f, inputs, None) for who, f in contestants.items()}
    return {who: lambda f=f: f(*inputs) for who, f in contestants.items()}


def head_memory(M, K, V, dtype_name):
    """Measures each contestant of a Case in a process of its own."""
    small, large = [[*shape, dtype_name] for shape in (WARM_UP, (M, K, V))]
    return lambda functions: {who: peaks_in_child(heads, who, small, large) for who in functions}


def cases(quick: bool) -> Iterator[Case]:
    for M, V in QUICK_SHAPES if quick else SHAPES:
        for dtype in DTYPES:
            for backward in (False, True):
                yield Case(
                    f"M{M} V{V}{' +backward' if backward else ''}",
                    dtype,
                    0.0,
                    float((3 if backward else 1) * M * V * dtype.itemsize),  # read; backward reads again and writes
                    lambda M=M, V=V, dtype=dtype, backward=backward: build(M, V, dtype, backward),
                )
    for M, K, V in QUICK_HEADS if quick else HEADS:
        for dtype in DTYPES:
            for backward in (False, True):
                inputs, shape = (M * K + V * K) * dtype.itemsize, (M, K, V, short(dtype))
                measured = backward and not (quick and dtype != torch.float32)  # a process each takes seconds
                yield Case(
                    f"head M{M} K{K} V{V}{' +backward' if backward else ''}",
                    dtype,
                    flops(M, K, V, backward),  # three products: the logits made anew in backward are not counted
                    float(3 * inputs if backward else inputs),
                    lambda shape=shape, backward=backward: build_head(*shape, backward),
                    memory=head_memory(*shape) if measured else None,
                )
