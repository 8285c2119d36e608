"""What this machine can do at most: bytes read per second by size of the working set, multiply-adds by dtype."""

import math
import time
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch

from pykern import _C
from pykern.lm.progress import peak_gflops

SIZES = tuple(1 << bits for bits in range(16, 30, 2))  # 64 KiB, 256 KiB ... 256 MiB in all threads together
QUICK_SIZES = SIZES[:4]
LARGEST = 1 << 26  # bytes of a single measurement: filling more takes longer than a command may keep its user waiting
SAMPLE_SECONDS = 0.01
SAMPLE_BYTES = 1 << 24  # at least: a few milliseconds, beside which waking the threads counts for little
TILE = 1 << 14  # numbers, random: some processors read zeros faster


def interpolated(rates: dict[int, float], size: float) -> float:
    """The rate at this size, from the rates measured at others: straight lines between them, both axes logarithmic."""
    sizes = sorted(rates)
    after = bisect_left(sizes, size)
    if after == 0 or after == len(sizes):
        return rates[sizes[min(after, len(sizes) - 1)]]
    low, high = sizes[after - 1], sizes[after]
    share = math.log(size / low) / math.log(high / low)
    return rates[low] ** (1 - share) * rates[high] ** share


@dataclass(frozen=True)
class Roof:
    """read: bytes per second by bytes of the working set. flops: per second, by dtype."""

    threads: int
    read: dict[int, float]
    flops: dict[str, float]

    def bandwidth(self, working_set: float) -> float:
        """Bytes per second read from a working set of this many bytes."""
        return interpolated(self.read, working_set)


def _numbers(size: int) -> np.ndarray:
    tile = np.random.default_rng(0).random(min(TILE, size // 4), dtype=np.float32)
    return np.resize(tile, size // 4)


def _read_rate(source: np.ndarray, seconds: float) -> float:
    """The best sample counts: a machine is never faster than it is."""
    sink = np.empty(_C.num_threads(), np.float32)
    stop = time.perf_counter() + seconds
    best, repeats = 0.0, -(-SAMPLE_BYTES // source.nbytes)
    while True:
        start = time.perf_counter()
        _C.roofline_read(source, sink, repeats=repeats)
        now = time.perf_counter()
        best = max(best, source.nbytes * repeats / max(now - start, 1e-9))
        if now - start < SAMPLE_SECONDS / 2:
            repeats *= 2
        if now >= stop:
            return best


def read_bandwidth(working_set: float, seconds: float = 0.1) -> float:
    """Bytes per second that the kernels' threads read right now from so many bytes, at most LARGEST."""
    size = max(1 << 16, min(int(working_set), LARGEST))
    return _read_rate(_numbers(size), seconds)


def measure(quick: bool = False) -> Roof:
    """The roof of as many threads as the kernels have now, in about a second."""
    sizes, seconds = (QUICK_SIZES, 0.02) if quick else (SIZES, 0.1)
    source = _numbers(sizes[-1])
    read = {size: _read_rate(source[: size // 4], seconds) for size in sizes}
    flops = {str(dtype).removeprefix("torch."): 1e9 * peak_gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Roof(_C.num_threads(), read, flops)
