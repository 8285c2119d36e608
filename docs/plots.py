"""The roofline plot of results that `python -m benchmarks --json` wrote: what a case reached over what bounds it.

    python docs/plots.py benchmarks/results/zen4_2threads*.json --out docs/roofline.png

x: operations per byte, y: operations per second. The roof is the lower of the rate of multiply-adds and x times the
rate at which memory is read, both measured in the same runs; the rate of reads is a band where the runs differ.
A case that does not count operations (norms, losses, AdamW) has no place in it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16")
OURS = "pykern"
COLOURS = {"linear": "tab:blue", "mlp": "tab:cyan", "attention": "tab:orange", "decode": "tab:green"}
COLOURS |= {"cross_entropy": "tab:purple", "train": "tab:red"}
WORDS = {"cross_entropy": "linear_cross_entropy", "train": "training step"}


@dataclass(frozen=True)
class Point:
    """A contestant of a case: operations per byte, operations per second."""

    bench: str
    dtype: str
    ours: bool
    intensity: float
    rate: float


@dataclass(frozen=True)
class Roofs:
    """Operations per second by dtype, and the least and the highest rate of reads from memory, bytes per second."""

    flops: dict[str, float]
    read: tuple[float, float]


def read_results(paths: Sequence[Path]) -> list[dict]:
    """The documents that hold results and roofs of one thread count. ValueError when none does, or they differ."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found = [one for one in found if {"machine", "roofline", "results"} <= one.keys()]
    threads = {row["threads"] for one in found for row in one["results"]}
    if len(threads) != 1:
        raise ValueError(f"roofline: the files have results of {sorted(threads)} threads, expected one thread count")
    return found


def points(documents: Sequence[dict]) -> list[Point]:
    """pykern's, and of the other contestants of a case the fastest."""
    fastest: dict[tuple, dict] = {}
    for number, document in enumerate(documents):
        for row in document["results"]:
            key = (number, row["bench"], row["case"], row["dtype"], row["who"].startswith(OURS))
            if row["flops"] > 0 and (key not in fastest or row["seconds"] < fastest[key]["seconds"]):
                fastest[key] = row
    return [
        Point(bench, dtype, ours, row["flops"] / row["moved"], row["flops"] / row["seconds"])
        for (_, bench, _, dtype, ours), row in fastest.items()
    ]


def roofs(documents: Sequence[dict], threads: int) -> Roofs:
    """The best multiply-adds of all files; of the reads of the largest working set the least and the highest."""
    measured = [one for document in documents for one in document["roofline"] if one["threads"] == threads]
    reads = [one["read"][max(one["read"], key=int)] for one in measured]
    return Roofs({d: max(one["flops"][d] for one in measured) for d in DTYPES}, (min(reads), max(reads)))


def plot(documents: Sequence[dict], path: Path) -> None:
    """A PNG with a panel per dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    threads = documents[0]["results"][0]["threads"]
    roof, found = roofs(documents, threads), points(documents)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = min(p.intensity for p in found) / 2, max(p.intensity for p in found) * 2
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), DTYPES, strict=True):
        peak = roof.flops[dtype]
        least, most = ([min(peak, x * rate) / 1e9 for x in (low, peak / rate, high)] for rate in roof.read)
        knees = [[low, peak / rate, high] for rate in roof.read]
        axes.plot(knees[0], least, color="black", linewidth=1)
        axes.plot(knees[1], most, color="black", linewidth=1, linestyle=":")
        for point in found:
            if point.dtype == dtype:
                colour = COLOURS[point.bench]
                face = colour if point.ours else "none"
                axes.plot(point.intensity, point.rate / 1e9, "o", color=colour, markerfacecolor=face, markersize=4)
        axes.text(high, peak / 1e9 * 1.08, f"{peak / 1e9:.0f} GFLOP/s", ha="right")
        axes.set(xscale="log", yscale="log", title=dtype, xlabel="operations per byte")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="GFLOP/s", ylim=(1, 10 ** math.ceil(math.log10(max(roof.flops.values()) / 1e9))))
    benches = [bench for bench in COLOURS if any(point.bench == bench for point in found)]
    legend = [Line2D([], [], marker="o", linestyle="", color=COLOURS[b], label=WORDS.get(b, b)) for b in benches]
    legend.append(Line2D([], [], marker="o", linestyle="", color="gray", markerfacecolor="none", label="fastest rival"))
    slow, fast = (rate / 1e9 for rate in roof.read)
    legend.append(Line2D([], [], color="black", label=f"{slow:.0f} GB/s read; dotted: {fast:.0f}"))
    figure.legend(handles=legend, loc="outside right upper", fontsize="small")
    machine = documents[0]["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['isa']}, {threads} threads, torch {machine['torch']}")
    figure.savefig(path, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="the roofline plot of benchmark results")
    parser.add_argument("results", nargs="+", type=Path, help="files that python -m benchmarks --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    arguments = parser.parse_args()
    plot(read_results(arguments.results), arguments.out)


if __name__ == "__main__":
    main()
