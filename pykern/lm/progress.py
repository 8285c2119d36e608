"""What a training run tells the person who waits: a bar on a terminal, elsewhere a line now and then."""

import math
import sys
import time
from dataclasses import dataclass
from typing import Protocol, TextIO

import torch

from pykern import _C

LINE_SECONDS = 10.0  # between two plain lines
PEAK_REPEATS = 1_000_000  # some 3 ms


@dataclass(frozen=True)
class Status:
    """The state of a run after a step. fraction runs from 0 to 1; steps is None when only the clock ends the run.

    peak_gflops is NaN where it is not known, as on a GPU.
    """

    step: int
    steps: int | None
    fraction: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    gflops: float
    peak_gflops: float
    eta_seconds: float

    def __str__(self) -> str:
        of = "" if self.steps is None else f"/{self.steps}"
        return (
            f"step {self.step}{of} ({self.fraction:.1%}) | loss {self.loss:.4f} | lr {self.lr:.2e} | "
            f"gnorm {self.grad_norm:.2f} | {self.speed()} | eta {duration(self.eta_seconds)}"
        )

    def brief(self) -> str:
        """What fits beside a bar; a narrow terminal cuts off the end."""
        of = "" if self.steps is None else f"/{self.steps}"
        return (
            f"eta {duration(self.eta_seconds)} | step {self.step}{of} | loss {self.loss:.3f} | "
            f"{self.speed()} | lr {self.lr:.1e}"
        )

    def speed(self) -> str:
        part = "" if math.isnan(self.peak_gflops) else f" ({self.gflops / self.peak_gflops:.0%} of peak)"
        return f"{self.tokens_per_second:,.0f} tok/s | {self.gflops:.0f} GFLOP/s{part}"


class Reporter(Protocol):
    def status(self, status: Status) -> None: ...

    def note(self, line: str) -> None: ...

    def close(self) -> None: ...


def duration(seconds: float) -> str:
    """2h03m, 1m41s or 9s."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{s:02}s" if minutes else f"{s}s"


def peak_gflops(dtype: torch.dtype) -> float:
    """What the kernels' threads reach together when they only multiply and add in dtype: the best of ten tries."""
    sink, best = torch.empty(_C.num_threads(), dtype=dtype), 0.0
    for _ in range(10):
        start = time.perf_counter()
        operations = _C.roofline_fma(sink, repeats=PEAK_REPEATS)
        best = max(best, operations / (time.perf_counter() - start))
    return best / 1e9


class Silent:
    """Says nothing: the default of the Python interface."""

    def status(self, status: Status) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Plain lines, the first status and then one every LINE_SECONDS: for files, pipes and CI."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.shown_at = -LINE_SECONDS
        self.pending: Status | None = None

    def status(self, status: Status) -> None:
        self.pending = status
        if time.monotonic() - self.shown_at >= LINE_SECONDS:
            self._show()

    def _show(self) -> None:
        if self.pending is not None:
            print(self.pending, file=self.stream, flush=True)
            self.pending, self.shown_at = None, time.monotonic()

    def note(self, line: str) -> None:
        self._show()
        print(line, file=self.stream, flush=True)

    def close(self) -> None:
        self._show()


class Bar:
    """A bar that stays in place, drawn by rich; notes scroll by above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            BarColumn(bar_width=12), TextColumn("{task.description}", markup=False), console=Console(file=stream)
        )
        self.task = self.progress.add_task("starting", total=1.0)
        self.progress.start()

    def status(self, status: Status) -> None:
        self.progress.update(self.task, completed=status.fraction, description=status.brief())

    def note(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self.progress.stop()


def reporter(stream: TextIO | None = None) -> Reporter:
    """Bar when the stream (stderr unless given) is a terminal, Lines otherwise."""
    stream = sys.stderr if stream is None else stream
    return Bar(stream) if stream.isatty() else Lines(stream)
