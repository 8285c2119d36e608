"""What this GPU does at most, as measured in this run: bytes copied and read, square products of random numbers.

Medians of what it keeps up for some tenths of a second: a GPU under its power limit is faster for a moment.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Source
from benchmarks.gpu.timer import Timer, interleave, quartiles

BYTES = 1 << 30
N = 8192
TINY_BYTES, TINY_N = 1 << 12, 16
SECONDS = 0.5


def _product(a: Tensor, b: Tensor, out: Tensor, tf32: bool) -> Callable[[], object]:
    def multiply() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            torch.mm(a, b, out=out)
        finally:
            torch.set_float32_matmul_precision(before)

    return multiply


def _work(name: str, source: Source, size: int, n: int) -> tuple[float, Callable[[], object]]:
    """The amount of work, bytes or operations, and what does it."""
    if name in ("copy", "read"):
        x = source.constant(size // 4, dtype=torch.float32)
        if name == "read":
            return float(size), x.amax
        return 2.0 * size, partial(torch.neg, x, out=torch.empty_like(x))  # faster than copy_
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}[name]
    a, b, out = (source.constant(n, n, dtype=dtype) for _ in range(3))
    return 2.0 * n**3, _product(a, b, out, name == "tf32")


NAMES = {"copy": "B/s", "read": "B/s", "bf16": "FLOP/s", "fp16": "FLOP/s", "tf32": "FLOP/s", "fp32": "FLOP/s"}


def measure(timer: Timer, device: torch.device, tiny: bool = False, seconds: float = SECONDS) -> dict[str, Any]:
    """{name: {"rate", "best", "unit"}}: the median over the samples and the fastest of them."""
    size, n = (TINY_BYTES, TINY_N) if tiny else (BYTES, N)
    found: dict[str, Any] = {}
    with timer.context():
        for name, unit in NAMES.items():
            amount, work = _work(name, Source(device, 0, False), size, n)
            samples = interleave(timer, {name: timer.prepare(name, [work])}, seconds)[name]
            found[name] = {"rate": amount / quartiles(samples)[1], "best": amount / min(samples), "unit": unit}
            del work
    return found
