"""A case of a benchmark, its run, and the table and JSON that come of it."""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import pykern
from benchmarks.roofline import Roof, short, size_text
from benchmarks.timing import interleave
from pykern import _C

OURS = "pykern"


@dataclass(frozen=True)
class Case:
    """One line of a table: what is computed, what it costs at least, and who computes it.

    flops and moved (bytes) are counted from the shapes: every input read once, every output written once, neither what
    causal hides nor what is computed twice. flops 0: not worth counting beside the bytes. build() makes the inputs and
    returns a function per contestant, "pykern" first. working_set is what a run cycles through, if more than moved.
    memory(functions) measures bytes per contestant, by name; the table shows the first of them. rest: seconds of sleep
    before every sample, for contestants that bring threads of their own.
    """

    name: str
    dtype: torch.dtype
    flops: float
    moved: float
    build: Callable[[], dict[str, Callable[[], object]]]
    working_set: float = 0.0
    memory: Callable[[dict[str, Callable[[], object]]], dict[str, dict[str, int]]] | None = None
    rest: float = 0.0


@dataclass(frozen=True)
class Row:
    """What a contestant reached. roof: the least possible time over its time. ratio: its time over pykern's.

    memory: bytes by what they are, empty where they are not measured.
    """

    bench: str
    case: str
    dtype: str
    threads: int
    flops: float
    moved: float
    who: str
    seconds: float
    spread: float
    samples: int
    roof: float
    ratio: float
    memory: dict[str, int] = field(default_factory=dict)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normally distributed, never zeros: some processors add zeros faster than numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def with_gradients(function, inputs, out_gradient):
    """A call of function(*inputs) and the gradients of all inputs that require one."""
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), wanted, out_gradient)


def run(bench: str, case: Case, roof: Roof, seconds: float) -> list[Row]:
    """Times the contestants of a case for about `seconds` each."""
    functions = case.build()
    timings = interleave(functions, seconds, rest=case.rest)
    memory = case.memory(functions) if case.memory else {}
    least = roof.seconds(case.dtype, case.flops, case.moved, case.working_set or case.moved)
    return [
        Row(
            bench,
            case.name,
            short(case.dtype),
            roof.threads,
            case.flops,
            case.moved,
            who,
            timings.median(who),
            timings.spread(who),
            len(timings.seconds[who]),
            least / timings.median(who),
            timings.ratio(who, OURS),
            memory.get(who, {}),
        )
        for who in functions
    ]


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


COLUMNS = {
    "case": -46,
    "dtype": -9,
    "who": -20,
    "time": 9,
    "GFLOP/s": 9,
    "GB/s": 8,
    "roof": 6,
    "x pykern": 10,
    "spread": 8,
    "memory": 10,
}


def _aligned(cells: list[str]) -> str:
    """Cells in their columns: to the left where the width is negative, to the right elsewhere."""
    widths = COLUMNS.values()
    return " ".join(f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


HEAD = _aligned(list(COLUMNS))


def line(row: Row, first: bool) -> str:
    """A line of the table; the case is named on its first line."""
    flops = f"{row.flops / row.seconds / 1e9:.1f}" if row.flops else "-"
    rates = [flops, f"{row.moved / row.seconds / 1e9:.1f}", f"{100 * row.roof:.0f}%"]
    who = [row.case, row.dtype, row.who] if first else ["", "", row.who]
    memory = size_text(next(iter(row.memory.values()))) if row.memory else "-"
    return _aligned([*who, time_text(row.seconds), *rates, f"{row.ratio:.2f}", f"{100 * row.spread:.0f}%", memory])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "processors available": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": _C.isa(),
        "pykern": pykern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load before": round(os.getloadavg()[0], 2),
    }


def write_json(path: Path, facts: dict[str, object], roofs: list[Roof], rows: list[Row]) -> None:
    """Replaces the file as a whole, so that an interrupted run leaves the results so far."""
    content = {"machine": facts, "roofline": [r.facts() for r in roofs], "results": [asdict(r) for r in rows]}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
