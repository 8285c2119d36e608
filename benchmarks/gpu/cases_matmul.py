"""Linear layers: products alone, with what can be fused behind them, and their gradients. 8192 tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import BACKWARD, FORWARD, OURS, TRAINING, Case, Maker, Source, Within
from benchmarks.gpu.makers import eager, ours, rivals

BF16 = torch.bfloat16
SHAPES = [  # M, K, N: layers of GPT-2 and its larger relatives, a square, the head
    *((8192, 768, 3072), (8192, 4096, 4096), (8192, 3072, 768), (8192, 768, 2304)),
    *((8192, 1600, 6400), (8192, 4096, 14336), (8192, 768, 50304)),
]
EPILOGUE_SHAPES = [(8192, 768, 3072), (8192, 1600, 6400), (8192, 4096, 16384)]
RESIDUAL_SHAPES = [(8192, 3072, 768), (8192, 6400, 1600), (8192, 16384, 4096)]
GRADIENT_SHAPES = [(8192, 768, 3072), (8192, 3072, 768), (8192, 1600, 6400), (8192, 4096, 4096)]
TF32_SHAPES = [(8192, 768, 3072), (8192, 4096, 4096)]
TINY = [(6, 16, 24)]
KERNELS = ("linear_forward", "linear_backward")


def inputs(
    M: int, K: int, N: int, bias: bool = False, residual: bool = False, dtype: torch.dtype = BF16
) -> Callable[[Source], tuple]:
    """x, weight, bias, residual"""

    def make(source: Source) -> tuple:
        found = [source.leaf(M, K, dtype=dtype), source.leaf(N, K, dtype=dtype, spread=K**-0.5)]
        return (*found, *([source.leaf(N)] if bias else []), *([source.leaf(M, N)] if residual else []))

    return make


def flops(M: int, K: int, N: int, mode: str) -> float:
    """One product forward, two backward."""
    return 2.0 * M * K * N * {FORWARD: 1, BACKWARD: 2, TRAINING: 3}[mode]


def moved(M: int, K: int, N: int, mode: str, extra: int = 0) -> float:
    """x, weight, out forward; those and two gradients backward; extra numbers besides."""
    once = M * K + N * K + M * N
    numbers = {FORWARD: once, BACKWARD: 2 * (M * K + N * K) + M * N, TRAINING: 3 * once}[mode]
    return float(BF16.itemsize * (numbers + extra))


def plain_cases(tiny: bool) -> Iterator[Case]:
    for i, (M, K, N) in enumerate(TINY if tiny else SHAPES):
        yield Case(
            *("linear", "G1", 1 + i // 3, BF16, f"M{M} K{K} N{N}", moved(M, K, N, FORWARD), flops(M, K, N, FORWARD)),
            inputs(M, K, N),
            {"torch": eager(F.linear), OURS: ours("linear")},
            KERNELS,
        )


@contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 may round their factors, in torch and in pykern, which asks torch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_tf32(maker: Maker) -> Maker:
    def make() -> Within:
        function = maker()

        def call(*inputs: Tensor) -> Any:
            with tf32():
                return function(*inputs)

        return Within(call, tf32)

    return make


def tf32_cases(tiny: bool) -> Iterator[Case]:
    """Backward pykern transposes copies of the factors of both gradients first, so that k is contiguous."""
    for i, (M, K, N) in enumerate(TINY if tiny else TF32_SHAPES):
        for mode in (FORWARD, BACKWARD):
            yield Case(
                *("linear, tf32", "G1", 4 + i, torch.float32, f"M{M} K{K} N{N}"),
                *(2.0 * moved(M, K, N, mode), flops(M, K, N, mode), inputs(M, K, N, dtype=torch.float32)),
                *({"torch": in_tf32(eager(F.linear)), OURS: in_tf32(ours("linear"))}, KERNELS, mode),
            )


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def cublaslt_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The epilogue of cuBLASLt: GELU of the tanh form on CUDA."""
    return torch._addmm_activation(bias, x, weight.T, use_gelu=True)


def add_linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + residual


def _ours_with_residual() -> Callable[..., Any]:
    import pykern

    return lambda x, weight, bias, residual: pykern.linear(x, weight, bias, residual=residual)


def epilogue_cases(tiny: bool) -> Iterator[Case]:
    gelu = {**rivals(gelu_linear, tuned=True), "cublaslt epilogue": eager(cublaslt_gelu)}
    kinds: list[tuple[str, list, dict[str, Maker], Maker, bool]] = [
        ("linear + bias + gelu_tanh", EPILOGUE_SHAPES, gelu, ours("linear", activation="gelu_tanh"), False),
        ("linear + bias + residual", RESIDUAL_SHAPES, rivals(add_linear, tuned=True), _ours_with_residual, True),
    ]
    for name, shapes, makers, mine, residual in kinds:
        for i, (M, K, N) in enumerate(TINY if tiny else shapes):
            extra = M * N if residual else 0
            yield Case(
                *(name, "G2", 1 + i, BF16, f"M{M} K{K} N{N}"),
                *(moved(M, K, N, FORWARD, extra + N), flops(M, K, N, FORWARD), inputs(M, K, N, True, residual)),
                *({**makers, OURS: mine}, KERNELS),
            )


def gradient_cases(tiny: bool) -> Iterator[Case]:
    for i, (M, K, N) in enumerate(TINY if tiny else GRADIENT_SHAPES):
        yield Case(
            *("linear + bias", "G3", 1 + i, BF16, f"M{M} K{K} N{N}"),
            *(moved(M, K, N, BACKWARD, N), flops(M, K, N, BACKWARD), inputs(M, K, N, True)),
            *({**rivals(F.linear), OURS: ours("linear")}, KERNELS, BACKWARD),
        )
    for i, (M, K, N) in enumerate(TINY if tiny else EPILOGUE_SHAPES):
        yield Case(  # reads what the activation read, too
            *("linear + bias + gelu_tanh", "G3", 2 + i, BF16, f"M{M} K{K} N{N}"),
            *(moved(M, K, N, BACKWARD, N + M * N), flops(M, K, N, BACKWARD), inputs(M, K, N, True)),
            *({**rivals(gelu_linear), OURS: ours("linear", activation="gelu_tanh")}, KERNELS, BACKWARD),
        )


def add_weight_gradient(dout: Tensor, x: Tensor, main: Tensor) -> Tensor:
    """main float32 [N, K] += dout^T x, as a training loop adds up the gradients of several batches."""
    return main.add_(dout.T @ x)


def add_in_float32(dout: Tensor, x: Tensor, main: Tensor) -> Tensor:
    """The same with a product that cuBLAS writes in float32."""
    return main.add_(torch.mm(dout.T, x, out_dtype=torch.float32))


def on_a_copy(maker: Maker) -> Maker:
    """A function that changes its last argument, on a copy of its own of each."""

    def make() -> Callable[..., Any]:
        function, own = maker(), {}

        def call(*inputs: Tensor) -> Any:
            key = inputs[-1].data_ptr()
            if key not in own:
                own[key] = inputs[-1].clone()
            return function(*inputs[:-1], own[key])

        return call

    return make


def accumulation_cases(tiny: bool) -> Iterator[Case]:
    """Denominators only: pykern writes a float32 gradient, but does not add to one yet."""
    for i, (M, K, N) in enumerate(TINY if tiny else GRADIENT_SHAPES[:2]):
        yield Case(
            *("dweight added in float32", "G3", 3 + i, BF16, f"M{M} K{K} N{N}"),
            float(BF16.itemsize * (M * N + M * K) + 8 * N * K),
            2.0 * M * K * N,
            lambda source, M=M, K=K, N=N: (
                source.constant(M, N),
                source.constant(M, K),
                source.constant(N, K, dtype=torch.float32),
            ),
            {
                who: on_a_copy(maker)
                for who, maker in (rivals(add_weight_gradient) | {"cublas float32 out": eager(add_in_float32)}).items()
            },
        )


def cases(tiny: bool) -> Iterator[Case]:
    yield from plain_cases(tiny)
    yield from tf32_cases(tiny)
    yield from epilogue_cases(tiny)
    yield from gradient_cases(tiny)
    yield from accumulation_cases(tiny)
