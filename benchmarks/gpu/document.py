"""The JSON of the GPU benchmarks: machine, steps, ceilings, rows; written after each change, read to go on."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import OURS, Case

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """A contestant of a case. ceiling: the least possible time over its time, None where no ceiling was measured.

    ratio: how many times as fast as the best rival whose result is right. difference: from the first rival's result,
    as a part of its largest number. mode: how it was launched. peak_bytes: of memory during a call.
    """

    case: str
    goal: str
    priority: int
    contestant: str
    dtype: str
    shape: str
    what: str
    gpu: str
    run: int
    mode: str
    note: str
    median_us: float
    low_us: float
    high_us: float
    samples: int
    bytes: float
    flops: float
    bound: str
    ceiling: float | None
    ratio: float | None
    difference: float | None
    peak_bytes: int


@dataclass
class Document:
    """All that was measured into one file, by one run or by several."""

    path: Path
    gpu: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by GPU
    finished: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: Path) -> "Document":
        """What the file holds, or an empty document. ValueError: not a file of this schema."""
        if not path.exists():
            return cls(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"benchmarks.gpu: {path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError(f"benchmarks.gpu: {path} is not a file of schema {SCHEMA}")
        return cls(path, **content)

    def save(self) -> None:
        """Replaces the file as a whole, so that an interrupted run leaves the results so far."""
        names = ("gpu", "runs", "ceilings", "finished", "rows", "failures", "running")
        content = {"schema": SCHEMA} | {name: getattr(self, name) for name in names}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    @property
    def run(self) -> dict[str, Any]:
        return self.runs[-1]

    def is_finished(self, case: Case, with_ours: bool) -> bool:
        """Measured on this GPU, and with pykern if it takes part now."""
        return any(f["case"] == case.key and f["gpu"] == self.gpu and (f[OURS] or not with_ours) for f in self.finished)

    def start(self, case: Case, who: str) -> None:
        """Names what runs, for whoever finds that the process ended."""
        self.running = {"case": case.key, "contestant": who, "since": time.time()}
        self.save()

    def fail(self, case: str, who: str, text: str, *, fatal: bool = False) -> None:
        """Records why a contestant has no time; fatal: it took the process with it, and does not run again."""
        self.failures = [f for f in self.failures if (f["case"], f["contestant"], f["gpu"]) != (case, who, self.gpu)]
        self.failures.append({"case": case, "contestant": who, "gpu": self.gpu, "text": text, "fatal": fatal})
        self.running = None
        self.save()

    def fatal(self, case: Case) -> set[str]:
        """Contestants of a case that ended the process before."""
        return {f["contestant"] for f in self.failures if f["fatal"] and (f["case"], f["gpu"]) == (case.key, self.gpu)}

    def finish(self, case: Case, rows: list[Row], with_ours: bool, missing: list[str]) -> None:
        """Replaces what was known of the case on this GPU."""
        same: Callable[[dict[str, Any]], bool] = lambda x: (x["case"], x["gpu"]) == (case.key, self.gpu)  # noqa: E731
        self.rows = [r for r in self.rows if not same(r)] + [asdict(row) for row in rows]
        self.finished = [f for f in self.finished if not same(f)]
        self.finished.append({"case": case.key, "gpu": self.gpu, OURS: with_ours, "missing": missing})
        self.running = None
        self.save()

    def forget(self, cases: list[Case]) -> None:
        """These cases are to be timed again on this GPU, by contestants that ended the process before, too."""
        keys = {case.key for case in cases}
        here: Callable[[dict[str, Any]], bool] = lambda x: x["case"] in keys and x["gpu"] == self.gpu  # noqa: E731
        self.finished = [f for f in self.finished if not here(f)]
        self.failures = [f for f in self.failures if not here(f)]

    def blame_running(self, text: str) -> bool:
        """Puts the end of a process down to what was running; False: nothing was."""
        if self.running is None:
            return False
        self.fail(self.running["case"], self.running["contestant"], text, fatal=True)
        return True
