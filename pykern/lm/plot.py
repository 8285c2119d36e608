"""loss.csv, a row per step, and its curves as a picture."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path

from pykern.lm.files import replace_file

COLUMNS = ("step", "tokens", "seconds", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte")
WINDOW = 50  # steps that the smoothed training loss averages over


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a loss.csv. ValueError when its columns are not COLUMNS."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: not a loss.csv of pykern: its columns must be {', '.join(COLUMNS)}")
        return list(reader)


class LossLog:
    """loss.csv, grown row by row. Opened at step n it keeps the rows up to n, those of the run that goes on."""

    def __init__(self, path: str | os.PathLike[str], step: int) -> None:
        path = Path(path)
        kept = [row for row in read_rows(path) if int(row["step"]) <= step] if step and path.exists() else []

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)

        replace_file(path, write)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def add(self, row: Mapping[str, int | float]) -> None:
        """One row; columns that it lacks stay empty."""
        self._writer.writerow({name: f"{v:.9g}" if isinstance(v, float) else v for name, v in row.items()})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class NoLog:
    """The log of a rank that writes none."""

    def add(self, row: Mapping[str, int | float]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """The steps and the values of the rows that have one."""
    pairs = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: list[float]) -> list[float]:
    """At each place the mean of the last WINDOW values."""
    return [math.fsum(values[max(0, i + 1 - WINDOW) : i + 1]) / min(i + 1, WINDOW) for i in range(len(values))]


def plot(
    csv_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Draws loss (left) and held-out bits per byte (right) over the steps; baselines: name to bits per byte."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(csv_path)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    steps, losses = column(rows, "loss")
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    left.plot(steps, smoothed(losses), color="tab:blue", label=f"training, mean of {WINDOW}")
    left.plot(*column(rows, "val_loss"), color="tab:orange", marker="o", markersize=3, label="held out")
    left.set(xlabel="step", ylabel="loss, nats per token")

    right.plot(*column(rows, "val_bits_per_byte"), color="tab:orange", marker="o", markersize=3, label="held out")
    for name, level in (baselines or {}).items():
        right.axhline(level, color="tab:gray", linestyle="--", label=f"{name}: {level:.3f}")
    right.set(xlabel="step", ylabel="bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    replace_file(png_path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
