"""Accuracy over the number of shots as a picture: in context, fine-tuned, the best possible, and chance."""

import os
from collections.abc import Sequence
from typing import Any

from pykern.lm.files import replace_file
from pykern.lm.icl import ShotsResult

COLORS = {"in context": "tab:blue", "fine-tuned": "tab:orange"}
SHIFT = 0.06  # between two methods, so that error bars do not hide each other


def _draw_accuracy(axes: Any, methods: dict[str, list[ShotsResult]], places: dict[int, int], chance: float) -> None:
    optimal = {row.shots: row.optimal for rows in methods.values() for row in rows}
    ordered = sorted(optimal)
    axes.plot(
        [places[k] for k in ordered], [optimal[k] for k in ordered], "k--", linewidth=1, label="best possible", zorder=1
    )
    axes.axhline(chance, color="tab:gray", linestyle=":", label=f"chance: {chance:.0%}")
    for number, (method, rows) in enumerate(methods.items()):
        axes.errorbar(
            [places[row.shots] + SHIFT * (2 * number - len(methods) + 1) for row in rows],
            [row.accuracy for row in rows],
            yerr=[[row.accuracy - row.low for row in rows], [row.high - row.accuracy for row in rows]],
            color=COLORS.get(method),
            marker="o",
            markersize=4,
            capsize=3,
            label=f"{method} ({rows[0].queries} tasks)",
        )
    axes.set(xlabel="examples of the task (shots)", ylabel="accuracy, 95 % interval", ylim=(0.0, 1.04))
    axes.set_xticks(list(places.values()), [str(k) for k in places])
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _draw_cost(axes: Any, methods: dict[str, list[ShotsResult]], places: dict[int, int]) -> None:
    for method, rows in methods.items():
        axes.plot(
            [places[row.shots] for row in rows],
            [row.flops_task + row.flops_query for row in rows],
            color=COLORS.get(method),
            marker="o",
            markersize=4,
            label=method,
        )
    axes.set(xlabel="examples of the task (shots)", ylabel="FLOPs for a task and one query", yscale="log")
    axes.set_xticks(list(places.values()), [str(k) for k in places])
    axes.grid(alpha=0.3)
    axes.legend()


def plot_shots(
    results: Sequence[ShotsResult], png_path: str | os.PathLike[str], *, chance: float, title: str = ""
) -> None:
    """Draws accuracy over shots, evenly spaced, and with two methods also what they cost. ValueError for no results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("plot_shots: there are no results to draw")
    methods: dict[str, list[ShotsResult]] = {}
    for row in sorted(results, key=lambda row: row.shots):
        methods.setdefault(row.method, []).append(row)
    places = {k: i for i, k in enumerate(sorted({row.shots for row in results}))}
    several = len(methods) > 1
    figure = Figure(figsize=(11 if several else 6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    _draw_accuracy(panels[0], methods, places, chance)
    if several:
        _draw_cost(panels[1], methods, places)
    figure.suptitle(title)
    replace_file(png_path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
