"""Time on the GPU: CUDA events around replays of a CUDA graph, or around launches where no graph can be captured.

A graph holds one call for each set of inputs, all sets together larger than the L2 cache, and results of their own:
what is read comes from memory and what is written goes there. Contestants take turns, A B, B A, A B, because clocks
and power limits move a GPU's speed by a tenth within a run.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.gpu.case import Calls

SAMPLE_SECONDS = 2e-3  # what a sample repeats its calls for: events are good to half a microsecond
GRAPH_SECONDS, MOST_TIMES = 1e-3, 64
WARM_UP = 3  # calls: compilation, autotuning, handles of libraries
LEAST_ROUNDS, MOST_ROUNDS = 9, 200
CACHES = 3  # inputs of so many L2 caches together: the oldest set has left the cache when its turn comes


class DeviceLost(RuntimeError):
    """The process can use its GPU no longer."""


@dataclass
class Prepared:
    """Runs `count` calls when `run` is called, `repeats` times for a sample.

    A graph does not keep alive what its calls read: this does.
    """

    run: Callable[[], object]
    calls: Calls
    count: int
    mode: str
    note: str = ""
    repeats: int = 1


class Timer(Protocol):
    """What the benchmarks ask of a clock. cold_bytes: inputs of so many bytes do not stay in a cache."""

    cold_bytes: float

    def context(self) -> AbstractContextManager: ...
    def now(self) -> float: ...
    def prepare(self, who: str, calls: Calls) -> Prepared: ...
    def sample(self, who: str, prepared: Prepared) -> float: ...
    def peak(self, call: Callable[[], object]) -> int: ...
    def check(self) -> None: ...


class CudaTimer:
    """The real one, on a stream of its own: what runs backward in a graph must have run forward on its stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.cold_bytes = float(CACHES * torch.cuda.get_device_properties(device).L2_cache_size)

    def context(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def now(self) -> float:
        return time.perf_counter()

    def _captured(self, calls: Calls, times: int) -> Prepared:
        """All calls in their order, so many times over."""
        graph = torch.cuda.CUDAGraph()
        kept: deque = deque(maxlen=len(calls))  # a call does not write where one of those before it has written
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            for call in calls * times:
                kept.append(call())
        return Prepared(graph.replay, calls, len(calls) * times, "graph")

    def _graph(self, who: str, calls: Calls) -> Prepared:
        """A graph that runs for about GRAPH_SECONDS: between two replays the GPU stands still for microseconds."""
        once = self._captured(calls, 1)
        self.sample(who, once)
        seconds = self.sample(who, once) * len(calls)
        times = min(MOST_TIMES, math.ceil(GRAPH_SECONDS / seconds))
        return once if times <= 1 else self._captured(calls, times)

    def prepare(self, who: str, calls: Calls) -> Prepared:
        for i in range(max(WARM_UP, len(calls))):
            calls[i % len(calls)]()
        self.check()
        prepared = Prepared(lambda: [call() for call in calls], calls, len(calls), "launches")
        try:
            prepared = self._graph(who, calls)
        except Exception as refusal:  # noqa: BLE001 - the calls ran before: it is the capture that fails
            self.check()  # raises where it was the device that failed, not the capture
            prepared.note = f"no graph: {one_line(refusal)}"
        self.sample(who, prepared)
        seconds = self.sample(who, prepared) * prepared.count
        prepared.repeats = max(1, round(SAMPLE_SECONDS / seconds))
        return prepared

    def sample(self, who: str, prepared: Prepared) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self.stream)
        for _ in range(prepared.repeats):
            prepared.run()
        stop.record(self.stream)
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / (prepared.repeats * prepared.count)

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes of torch's allocator during a call, over those before it, the result included."""
        self.check()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.check()
        return max(0, torch.cuda.max_memory_allocated(self.device) - before)

    def check(self) -> None:
        """DeviceLost when an earlier kernel failed: the context stays broken, only a new process helps."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLost(one_line(error)) from error


class FakeTimer:
    """For tests: calls run once, times are given, and the clock goes by them alone."""

    def __init__(self, seconds: dict[str, float] | None = None, setup: float = 1.0) -> None:
        self.seconds, self.setup = seconds or {}, setup
        self.clock, self.cold_bytes = 0.0, 0.0
        self.samples: list[str] = []

    def context(self) -> AbstractContextManager:
        return nullcontext()

    def now(self) -> float:
        return self.clock

    def prepare(self, who: str, calls: Calls) -> Prepared:
        for call in calls:
            call()
        self.clock += self.setup
        return Prepared(lambda: None, calls, len(calls), "fake")

    def sample(self, who: str, prepared: Prepared) -> float:
        self.samples.append(who)
        seconds = self.seconds.get(who, 1e-3) * (1 + 0.01 * (len(self.samples) % 3))
        self.clock += 0.05
        return seconds

    def peak(self, call: Callable[[], object]) -> int:
        call()
        return 0

    def check(self) -> None:
        pass


def one_line(error: BaseException) -> str:
    """The kind of an error and the first words of it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def interleave(timer: Timer, prepared: dict[str, Prepared], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call by contestant and round, each sampled for about `seconds` in all, in alternating order."""
    samples: dict[str, list[float]] = {who: [] for who in prepared}
    order = list(prepared)
    stop, rounds = timer.now() + seconds * len(order), 0
    while rounds < LEAST_ROUNDS or (timer.now() < stop and rounds < MOST_ROUNDS):
        for who in order:
            samples[who].append(timer.sample(who, prepared[who]))
        order.reverse()
        rounds += 1
    return samples


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def speed_ratio(samples: list[float], base: list[float]) -> float:
    """How many times as fast as `base`: the median over the rounds of base / sample."""
    return statistics.median(b / s for s, b in zip(samples, base, strict=True))
