"""Times several functions against each other in one run: A B, B A, A B, ...

A machine's speed drifts by a quarter within minutes; functions that are timed in turns drift together. The median of
the samples is a function's time; the median over the rounds of time / time is the ratio of two.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

SAMPLE_SECONDS = 2e-3  # a sample repeats its function for at least this long: the clock and the call count for nothing
LEAST_ROUNDS, MOST_ROUNDS = 5, 500
WARM_UP_CALLS = 2  # caches, page faults, and whatever a library prepares on its first calls


@dataclass(frozen=True)
class Timings:
    """seconds[name][round]: time of one call."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """How many times as long as `base` a call takes: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def spread(self, name: str) -> float:
        """The distance between the quartiles over the median: how far to trust it."""
        samples = self.seconds[name]
        if len(samples) < 4:
            return (max(samples) - min(samples)) / self.median(name)
        low, _, high = statistics.quantiles(samples, n=4)
        return (high - low) / self.median(name)


def in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One function that calls the next of these each time. Inputs larger than a cache together do not stay in it."""
    following = cycle(functions)
    return lambda: next(following)()


def _elapsed(function, calls: int, clock) -> float:
    start = clock()
    for _ in range(calls):
        function()
    seconds = clock() - start
    if seconds <= 0.0:
        raise RuntimeError(f"timing: {calls} calls took {seconds} s; the clock is too coarse, or the function is empty")
    return seconds


def interleave(
    functions: dict[str, Callable[[], object]],
    seconds: float,
    clock=time.perf_counter,
    rest: float = 0.0,
    sleep=time.sleep,
) -> Timings:
    """Times each function for about `seconds` in all, at least LEAST_ROUNDS rounds, in alternating order.

    rest: seconds slept before every sample, in which threads that wait for more work of the last one stop spinning.
    RuntimeError when a sample takes no time at all.
    """
    calls = {}
    for name, function in functions.items():
        for _ in range(WARM_UP_CALLS):
            function()
        calls[name] = max(1, round(SAMPLE_SECONDS / _elapsed(function, 1, clock)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    budget = clock() + seconds * len(functions)  # rests included
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        rounds = 0
        while rounds < LEAST_ROUNDS or (clock() < budget and rounds < MOST_ROUNDS):
            for name in order:
                if rest > 0.0:
                    sleep(rest)
                samples[name].append(_elapsed(functions[name], calls[name], clock) / calls[name])
            order.reverse()
            rounds += 1
    finally:
        if was_enabled:
            gc.enable()
    return Timings(samples)
