"""layer_norm, rms_norm, softmax and activations: bytes in, bytes out; the arithmetic is not counted."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pykern
from benchmarks.report import OURS, Case, numbers, with_gradients

SHAPES = [(1024, 768), (16384, 512)]  # rows, D: in cache, and out of it
QUICK_SHAPES = [(64, 128)]
WIDE = {"gelu_tanh": [(1024, 3072)]}  # what is between the two layers of an MLP
DTYPES = (torch.float32, torch.bfloat16)


def build(M, D, dtype, backward, make_inputs, contestants):
    inputs = [x.requires_grad_(backward) for x in make_inputs(M, D, dtype)]
    dout = numbers(M, D, dtype=dtype, seed=9)
    if backward:
        return {who: with_gradients(f, inputs, dout) for who, f in contestants.items()}
    return {who: lambda f=f: f(*inputs) for who, f in contestants.items()}


def x_only(M, D, dtype):
    return [numbers(M, D, dtype=dtype)]


def two(M, D, dtype):
    return [numbers(M, D, dtype=dtype, seed=seed) for seed in (0, 1)]


def with_weight(M, D, dtype):
    return [numbers(M, D, dtype=dtype), numbers(D, dtype=dtype, seed=1)]


def with_weight_and_bias(M, D, dtype):
    return [*with_weight(M, D, dtype), numbers(D, dtype=dtype, seed=2)]


def with_residual(M, D, dtype):
    return [*with_weight_and_bias(M, D, dtype), numbers(M, D, dtype=dtype, seed=3)]


# name: inputs, passes over [M, D] forward, with backward, pykern, torch
# Forward reads x and writes out; backward reads x (or out) and dout and writes dx.
OPS = {
    "layer_norm": (
        *(with_weight_and_bias, 2, 5),
        lambda x, w, b: pykern.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    ),
    "layer_norm + residual": (  # also reads the residual and writes the sum that a pre-norm block goes on with
        *(with_residual, 4, 7),
        lambda x, w, b, r: pykern.layer_norm(x, w, b, residual=r)[0],
        lambda x, w, b, r: F.layer_norm(x + r, x.shape[-1:], w, b),
    ),
    "rms_norm": (
        *(with_weight, 2, 5),
        lambda x, w: pykern.rms_norm(x, w),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
    ),
    "softmax": (*(x_only, 2, 5), lambda x: pykern.softmax(x), lambda x: torch.softmax(x, -1)),
    "gelu": (*(x_only, 2, 5), lambda x: pykern.gelu(x), F.gelu),
    "gelu_tanh": (*(x_only, 2, 5), lambda x: pykern.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "swiglu": (*(two, 3, 8), lambda g, u: pykern.swiglu(g, u), lambda g, u: F.silu(g) * u),
}


def cases(quick: bool) -> Iterator[Case]:
    for name, (make_inputs, forward, both, ours, theirs) in OPS.items():
        for M, D in QUICK_SHAPES if quick else [*SHAPES, *WIDE.get(name, [])]:
            for dtype in DTYPES:
                for backward in (False, True):
                    yield Case(
                        f"{name} {M} x {D}{' +backward' if backward else ''}",
                        dtype,
                        0.0,
                        float((both if backward else forward) * M * D * dtype.itemsize),
                        lambda M=M, D=D, dtype=dtype, backward=backward, make_inputs=make_inputs, fs=(ours, theirs): (
                            build(*(M, D, dtype, backward, make_inputs), dict(zip((OURS, "torch"), fs, strict=True)))
                        ),
                    )
