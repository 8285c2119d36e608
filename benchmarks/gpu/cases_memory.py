"""Norms, softmax, rope, activations and embedding: bytes in, bytes out; the arithmetic is not counted."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import BACKWARD, FORWARD, OURS, Case, Maker, Source
from benchmarks.gpu.makers import library, ours, rivals

BF16 = torch.bfloat16
NORM_SHAPES = [(8192, 768), (8192, 4096), (16384, 1600), (4096, 8192), (32768, 1024)]  # rows, D; the first decide
FEW_NORM_SHAPES = NORM_SHAPES[:3]
WIDE_SHAPES = [(8192, 3072), (8192, 16384)]  # between the two layers of an MLP
TINY = [(6, 40)]


def _liger(name: str) -> dict[str, Maker]:
    """Liger's function of this name, with its arguments in the order of ours."""

    def make() -> Callable[..., Any]:
        from liger_kernel.ops import layer_norm, rms_norm

        if name == "layer_norm":
            return lambda x, w, b: layer_norm.LigerLayerNormFunction.apply(x, w, b, 1e-5)
        return lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, 1e-6)

    return library("liger_kernel", "liger", make)


def _ours_without_sum(name: str) -> Maker:
    """pykern.<name> of (x, weights, residual): the norm, and the sum that a pre-norm block goes on with."""

    def make() -> Callable[..., Any]:
        import pykern

        function = getattr(pykern, name)
        return lambda x, *rest: function(x, *rest[:-1], residual=rest[-1])

    return make


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.layer_norm(h, h.shape[-1:], weight, bias), h


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6), h


# name: vectors, with a residual, passes over [M, D] forward and backward, pykern, torch, others
# Forward reads x and writes out, with a residual reads and writes one more; backward reads h and dout (and dsum) and
# writes dx.
NORMS: dict[str, tuple] = {
    "layer_norm": (2, False, 2, 3, ours("layer_norm"), layer_norm, _liger("layer_norm")),
    "rms_norm": (1, False, 2, 3, ours("rms_norm"), rms_norm, _liger("rms_norm")),
    "layer_norm + residual": (2, True, 4, 4, _ours_without_sum("layer_norm"), add_layer_norm, {}),
    "rms_norm + residual": (1, True, 4, 4, _ours_without_sum("rms_norm"), add_rms_norm, {}),
}


def norm_inputs(M: int, D: int, vectors: int, residual: bool) -> Callable[[Source], tuple]:
    def make(source: Source) -> tuple:
        return (
            source.leaf(M, D),
            *(source.leaf(D) for _ in range(vectors)),
            *([source.leaf(M, D)] if residual else []),
        )

    return make


def norm_cases(tiny: bool) -> Iterator[Case]:
    for name, (vectors, residual, forward, backward, mine, theirs, more) in NORMS.items():
        shapes = FEW_NORM_SHAPES if residual or name == "rms_norm" else NORM_SHAPES
        for i, (M, D) in enumerate(TINY if tiny else shapes):
            for mode, passes in ((BACKWARD, backward), (FORWARD, forward)):
                yield Case(
                    name,
                    "G11",
                    min(3, 1 + i) + (name == "rms_norm + residual"),
                    BF16,
                    f"M{M} D{D}",
                    float(BF16.itemsize * (passes * M * D + (2 if mode == BACKWARD else 1) * vectors * D)),
                    0.0,
                    norm_inputs(M, D, vectors, residual),
                    {**rivals(theirs), **more, OURS: mine},
                    (f"{name.split()[0]}_forward", f"{name.split()[0]}_backward"),
                    mode,
                )


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """As pykern's: a row without any place is 0."""
    return torch.softmax(x.masked_fill(~mask, -torch.inf), -1).masked_fill(~mask.any(-1, keepdim=True), 0.0)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D], cos and sin [T, D/2] float32: pairs (i, i + D/2), rotated in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def _angles(source: Source, T: int, half: int) -> tuple[Tensor, Tensor]:
    rate = 10000.0 ** (torch.arange(half, device=source.device) / -half)
    angle = torch.arange(T, device=source.device)[:, None] * rate
    return angle.cos(), angle.sin()


def elementwise_cases(tiny: bool) -> Iterator[Case]:
    """Softmax with and without a mask, GELU, SwiGLU, rope."""
    for M, D in TINY if tiny else [(16384, 4096), (8192, 50304)]:
        mask = lambda source, M=M, D=D: (source.leaf(M, D), source.integers(4, M, D) > 0)  # noqa: E731
        kinds = {
            "softmax": ((lambda source, M=M, D=D: (source.leaf(M, D),)), lambda x: torch.softmax(x, -1), 0),
            "softmax, mask": (mask, masked_softmax, M * D),
        }
        for name, (inputs, theirs, extra) in kinds.items():
            for mode, passes in ((FORWARD, 2), (BACKWARD, 3)):
                yield Case(
                    *(name, "memory", 3, BF16, f"M{M} D{D}"),
                    float(BF16.itemsize * passes * M * D + (extra if mode == FORWARD else 0)),
                    *(0.0, inputs, {**rivals(theirs), OURS: ours("softmax")}),
                    *(("softmax_forward", "softmax_backward"), mode),
                )
    for M, D in TINY if tiny else WIDE_SHAPES:
        one = lambda source, M=M, D=D: (source.leaf(M, D),)  # noqa: E731
        two = lambda source, M=M, D=D: (source.leaf(M, D), source.leaf(M, D))  # noqa: E731
        pointwise: dict[str, tuple] = {
            "gelu_tanh": (one, 2, 3, lambda x: F.gelu(x, approximate="tanh"), ours("gelu", approximate="tanh")),
            "swiglu": (two, 3, 5, lambda gate, up: F.silu(gate) * up, ours("swiglu")),
        }
        for name, (inputs, forward, backward, theirs, mine) in pointwise.items():
            kernel = "swiglu" if name == "swiglu" else "activation"
            for mode, passes in ((FORWARD, forward), (BACKWARD, backward)):
                yield Case(
                    *(name, "memory", 3, BF16, f"M{M} D{D}", float(BF16.itemsize * passes * M * D), 0.0),
                    *(inputs, {**rivals(theirs), OURS: mine}, (f"{kernel}_forward", f"{kernel}_backward"), mode),
                )
    for B, H, T, D in [(2, 2, 5, 8)] if tiny else [(8, 12, 1024, 64), (2, 32, 4096, 128)]:
        yield Case(
            *("rope", "memory", 3, BF16, f"B{B} H{H} T{T} D{D}"),
            float(2 * B * H * T * D * BF16.itemsize + T * D * 4),
            0.0,
            lambda source, B=B, H=H, T=T, D=D: (source.leaf(B, H, T, D), *_angles(source, T, D // 2)),
            {**rivals(rope), OURS: ours("rope")},
            ("rope",),
        )


def embedding_cases(tiny: bool) -> Iterator[Case]:
    """Backward writes every row of the table's gradient, and reads those of dout."""
    for rows, V, D in [(7, 11, 8)] if tiny else [(8192, 50304, 768), (16384, 128256, 4096)]:
        for mode in (BACKWARD, FORWARD):
            moved = 2 * rows * D if mode == FORWARD else rows * D + V * D
            yield Case(
                *("embedding", "memory", 3, BF16, f"rows{rows} V{V} D{D}"),
                float(BF16.itemsize * moved + 8 * rows),
                0.0,
                lambda source, rows=rows, V=V, D=D: (source.leaf(V, D), source.integers(V, rows)),
                {**rivals(lambda weight, ids: F.embedding(ids, weight)), OURS: ours("embedding")},
                ("embedding_forward", "embedding_backward"),
                mode,
            )


def cases(tiny: bool) -> Iterator[Case]:
    yield from norm_cases(tiny)
    yield from elementwise_cases(tiny)
    yield from embedding_cases(tiny)
