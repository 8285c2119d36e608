"""What this machine can do at most: multiply-adds per second by dtype, bytes per second by size of the working set."""

import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

import pykern
from pykern import _C
from pykern.lm.roof import interpolated

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = tuple(1 << bits for bits in range(14, 30, 2))  # 16 KiB, 64 KiB ... 256 MiB in all threads together
QUICK_SIZES = SIZES[:6]
BATCH_SECONDS = 0.02  # of one sample; the best of all counts, since a machine is never faster than it is


def short(dtype: torch.dtype) -> str:
    """The name without torch in front: float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Roof:
    """Operations and bytes per second; bandwidth goes by the bytes of the working set, copies count twice."""

    threads: int
    flops: dict[str, float]
    read: dict[int, float]
    copy: dict[int, float]

    def bandwidth(self, working_set: float) -> float:
        """Bytes per second read from a working set of this many bytes."""
        return interpolated(self.read, working_set)

    def seconds(self, dtype: torch.dtype, flops: float, moved: float, working_set: float) -> float:
        """The least time for this work: that of its arithmetic or that of its memory traffic, whichever is longer."""
        return max(flops / self.flops[short(dtype)], moved / self.bandwidth(working_set))

    def facts(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def _best_rate(work, seconds: float) -> float:
    """The highest rate of work(repeats) -> amount, in repeated samples of BATCH_SECONDS."""
    repeats, elapsed = 1, 0.0
    while elapsed < BATCH_SECONDS / 4:
        start = time.perf_counter()
        work(repeats)
        elapsed = time.perf_counter() - start
        repeats *= 1 if elapsed >= BATCH_SECONDS / 4 else 4
    repeats = max(1, round(repeats * BATCH_SECONDS / elapsed))
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < stop:
        start = time.perf_counter()
        amount = work(repeats)
        best = max(best, amount / (time.perf_counter() - start))
    return best


def _flops(dtype: torch.dtype, threads: int, seconds: float) -> float:
    sink = torch.empty(threads, dtype=dtype)
    return _best_rate(lambda repeats: _C.roofline_fma(sink, repeats=1000 * repeats), seconds)


def _read(size: int, threads: int, seconds: float) -> float:
    source = np.random.default_rng(0).random(size // 4, dtype=np.float32)
    sink = np.empty(threads, np.float32)

    def work(repeats):
        _C.roofline_read(source, sink, repeats=repeats)
        return size * repeats

    return _best_rate(work, seconds)


def _copy(size: int, threads: int, seconds: float) -> float:
    source = np.random.default_rng(0).random(size // 8, dtype=np.float32)
    target = np.ones_like(source)

    def work(repeats):
        _C.roofline_copy(source, target, tasks=threads, repeats=repeats)
        return size * repeats

    return _best_rate(work, seconds)


def measure(threads: int, quick: bool = False) -> Roof:
    """Measures with this many threads for some seconds; quick takes one and leaves out the largest sizes."""
    seconds, sizes = (0.02, QUICK_SIZES) if quick else (0.3, SIZES)
    before = pykern.get_num_threads()
    pykern.set_num_threads(threads)
    try:
        return Roof(
            threads,
            {short(dtype): _flops(dtype, threads, seconds) for dtype in DTYPES},
            {size: _read(size, threads, seconds) for size in sizes},
            {size: _copy(size, threads, seconds) for size in sizes},
        )
    finally:
        pykern.set_num_threads(before)


def size_text(size: float) -> str:
    """Three digits and a unit: 64 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def tables(roofs: list[Roof]) -> str:
    """The roofs side by side, a column per thread count."""
    head = "".join(f"{f'{r.threads} threads':>12}" for r in roofs).replace("1 threads", " 1 thread")
    lines = [f"{'multiply-adds, GFLOP/s':<26}{head}"]
    for name in roofs[0].flops:
        lines.append(f"  {name:<24}" + "".join(f"{r.flops[name] / 1e9:>12.1f}" for r in roofs))
    for what in ("read", "copy"):
        lines.append(f"{what + ', GB/s':<26}{head}")
        for size in getattr(roofs[0], what):
            lines.append(f"  {size_text(size):<24}" + "".join(f"{getattr(r, what)[size] / 1e9:>12.1f}" for r in roofs))
    return "\n".join(lines)
