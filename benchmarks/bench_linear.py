"""linear: training shapes, the epilogue, and few rows against weights that stream from memory."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pykern
from benchmarks.report import OURS, Case, numbers, with_gradients
from benchmarks.timing import in_turn

SHAPES = [  # M, K, N
    *((M, 768, N) for M in (256, 512, 1024, 2048, 4096) for N in (768, 3072)),
    *((1024, 3072, 768), (1024, 768, 50257)),
    *((64, 768, 3072), (16384, 384, 1536), (2048, 512, 2048)),
]
QUICK_SHAPES = [(64, 128, 256)]
ROWS = (1, 4, 8, 16, 32)  # a decode step of so many texts
COLD_BYTES = 400e6  # of different weights, more than any cache holds
DTYPES = (torch.float32, torch.bfloat16)


def flops(M: int, K: int, N: int, backward: bool) -> float:
    """One product forward, two more (dx, dweight) backward."""
    return (6.0 if backward else 2.0) * M * K * N


def moved(M: int, K: int, N: int, item: int, backward: bool) -> float:
    """x, weight, bias, out; backward reads x, weight, dout and writes dx, dweight, dbias."""
    once = M * K + N * K + N + M * N
    return float(item * (3 * once if backward else once))


def build(M, K, N, dtype, backward, activation=None):
    x, weight = numbers(M, K, dtype=dtype), numbers(N, K, dtype=dtype, spread=K**-0.5, seed=1)
    inputs = [t.requires_grad_(backward) for t in (x, weight, numbers(N, dtype=dtype, seed=2))]
    contestants = {OURS: lambda x, w, b: pykern.linear(x, w, b, activation=activation)}
    if activation is None:
        contestants["torch linear"] = F.linear
    else:
        contestants["torch linear, gelu"] = lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh")
    if backward:
        dout = numbers(M, N, dtype=dtype, seed=3)
        return {who: with_gradients(f, inputs, dout) for who, f in contestants.items()}
    return {who: lambda f=f: f(*inputs) for who, f in contestants.items()}


def build_cold(M, K, N, dtype, count):
    x = numbers(M, K, dtype=dtype)
    weights = [numbers(N, K, dtype=dtype, spread=K**-0.5, seed=i) for i in range(count)]
    bias = numbers(N, dtype=dtype)
    return {
        OURS: in_turn([lambda w=w: pykern.linear(x, w, bias) for w in weights]),
        "torch linear": in_turn([lambda w=w: F.linear(x, w, bias) for w in weights]),
    }


def cases(quick: bool) -> Iterator[Case]:
    for M, K, N in QUICK_SHAPES if quick else SHAPES:
        for dtype in DTYPES:
            for backward in (False, True):
                yield Case(
                    f"M{M} K{K} N{N}{' +backward' if backward else ''}",
                    dtype,
                    flops(M, K, N, backward),
                    moved(M, K, N, dtype.itemsize, backward),
                    lambda M=M, K=K, N=N, dtype=dtype, backward=backward: build(M, K, N, dtype, backward),
                )
    M, K, N = (64, 128, 256) if quick else (1024, 768, 3072)
    for dtype in DTYPES:
        for backward in (False, True):
            extra = 2 * M * N * dtype.itemsize if backward else 0  # what the activation read, written and read again
            yield Case(
                f"M{M} K{K} N{N} gelu_tanh{' +backward' if backward else ''}",
                dtype,
                flops(M, K, N, backward),
                moved(M, K, N, dtype.itemsize, backward) + extra,
                lambda dtype=dtype, backward=backward: build(M, K, N, dtype, backward, "gelu_tanh"),
            )
    for K, N in [(128, 256)] if quick else [(768, 3072), (3072, 768), (768, 768)]:
        for M in ROWS[:2] if quick else ROWS:
            for dtype in DTYPES:
                one = K * N * dtype.itemsize
                count = max(2, round((4e6 if quick else COLD_BYTES) / one))
                yield Case(
                    f"M{M} K{K} N{N} cold weights",
                    dtype,
                    flops(M, K, N, False),
                    moved(M, K, N, dtype.itemsize, False),
                    lambda M=M, K=K, N=N, dtype=dtype, count=count: build_cold(M, K, N, dtype, count),
                    working_set=count * one,
                )
