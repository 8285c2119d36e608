"""The document as Markdown: what was measured, by goal; what failed; what is left."""

import math
from typing import Any

from benchmarks.gpu.case import NOT_FINITE, OURS, SUSPICIOUS
from benchmarks.gpu.document import Document

HEAD = [
    "case",
    "shape",
    "dtype",
    "contestant",
    "median us",
    "quartiles",
    "GB/s",
    "TFLOP/s",
    "of ceiling",
    "ratio",
    "MB",
]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cells(row: dict[str, Any]) -> list[str]:
    seconds = row["median_us"] * 1e-6
    flags = [row["mode"]] if row["mode"] not in ("graph", "fake") else []
    if row["difference"] is not None and row["difference"] > SUSPICIOUS:
        text = f"differs by {row['difference']:.2g}" if row["difference"] < NOT_FINITE else "is not finite"
        flags.append(f"result {text}")
    return [
        row["what"],
        row["shape"],
        row["dtype"],
        row["contestant"] + (f" ({', '.join(flags)})" if flags else ""),
        f"{row['median_us']:.1f}",
        f"{row['low_us']:.1f}..{row['high_us']:.1f}",
        f"{row['bytes'] / seconds / 1e9:.0f}",
        f"{row['flops'] / seconds / 1e12:.1f}" if row["flops"] else "-",
        f"{_text(row['ceiling'], '.0%')} {row['bound']}",
        _text(row["ratio"], ".2f"),
        f"{row['peak_bytes'] / 1e6:.0f}",
    ]


def _table(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "/") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _goal_order(goal: str) -> tuple[int, str]:
    return (int(goal[1:]), "") if goal[1:].isdigit() else (99, goal)


def _geomean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for goal in sorted({row["goal"] for row in rows}, key=_goal_order):
        ratios = [r["ratio"] for r in rows if r["goal"] == goal and r["contestant"] == OURS and r["ratio"]]
        cases = {r["case"] for r in rows if r["goal"] == goal}
        middle = [f"{_geomean(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"] if ratios else ["-"] * 3
        lines.append([goal, str(len(cases)), str(len(ratios)), *middle])
    return _table(["goal", "cases", "with pykern", "geomean", "least", "most"], lines)


def _facts(document: Document) -> list[str]:
    run = document.run
    lines = [", ".join(f"{name} {value}" for name, value in run["machine"].items())]
    for name, step in run["steps"].items():
        lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in step.items() if k != "tail"))
    return lines


def markdown(document: Document) -> str:
    """Rows of every GPU in the file, the machine of the last run."""
    parts = ["# pykern on a GPU", *_facts(document)]
    for gpu in sorted({*document.ceilings, *(row["gpu"] for row in document.rows)}):
        parts.append(f"## {gpu}")
        if gpu in document.ceilings:
            ceilings = [
                [name, f"{c['rate'] / 1e12:.2f}", f"{c['best'] / 1e12:.2f}", f"T{c['unit']}"]
                for name, c in document.ceilings[gpu].items()
            ]
            parts.append(_table(["ceiling", "median", "best", "unit"], ceilings))
        rows = [row for row in document.rows if row["gpu"] == gpu]
        if rows:
            parts.append("Ratio: how many times as fast as the fastest contestant other than pykern.")
            parts.append(_summary(rows))
        for goal in sorted({row["goal"] for row in rows}, key=_goal_order):
            parts.append(f"### {goal}")
            parts.append(_table(HEAD, [_cells(row) for row in rows if row["goal"] == goal]))
    if document.failures:
        failed = [[f["gpu"], f["case"], f["contestant"], f["text"]] for f in document.failures]
        parts += ["## Without a time", _table(["GPU", "case", "contestant", "reason"], failed)]
    left = document.run.get("left", [])
    if left:
        parts += [f"## Left for the next call with this file: {len(left)}", "\n".join(f"- {name}" for name in left)]
    return "\n\n".join(parts) + "\n"
