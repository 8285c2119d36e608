"""The steps of a run, each a process with a time limit: build, tests, compute-sanitizer, ceilings and timing."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu.document import Document

ROOT = Path(__file__).parent.parent.parent
TAIL = 3000  # characters of what a step printed, kept in the JSON
STALL_SECONDS = 150.0  # without a word from the process that times: one contestant does not take so long
MOST_RESTARTS = 12
MOST_TESTERS = 12
LOST = 3  # exit code of a process whose GPU context is broken, and which has written that down
TIME_IS_UP = "the time was up"
GRACE_SECONDS = 15.0  # for the case in progress


def environment(**changes: str) -> dict[str, str]:
    """Of the children: the folder of this Python first on the path (cmake and ninja may be there), and our sources."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    sources = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PATH": path, "PYTHONPATH": sources} | changes


def stop(process: subprocess.Popen) -> None:
    """Ends a child with all of its own children."""
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command(arguments: list[str] | str, limit: float, log: Path, **changes: str) -> dict[str, Any]:
    """Runs to the end or the limit, writes what it prints to `log`; returns its exit code, seconds and last words."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            arguments,
            shell=isinstance(arguments, str),
            cwd=ROOT,
            env=environment(**changes),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            stop(process)
            code = f"stopped after {limit:.0f} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    return {"exit": code, "seconds": round(time.monotonic() - start, 1), "tail": text[-TAIL:]}


def build(limit: float, log: Path, words: str) -> dict[str, Any]:
    """words: a shell command that leaves the extension in pykern/."""
    return {"command": words} | command(words, limit, log)


def gpu_test_files() -> list[str]:
    """Test files with tests marked gpu: the others need not be imported."""
    found = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    return [str(path.relative_to(ROOT)) for path in found]


def counts(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests and the names of failures, from pytest's XML."""
    if not report.exists():
        return {"tests": "no report"}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [f"{c.get('classname')}.{c.get('name')}" for c in cases if c.find("failure") is not None or _error(c)]
    skipped = {c.find("skipped").get("message") for c in cases if c.find("skipped") is not None}
    skips = sum(c.find("skipped") is not None for c in cases)
    found: dict[str, Any] = {"passed": len(cases) - len(bad) - skips, "failed": len(bad), "skipped": skips}
    return found | ({"failures": bad} if bad else {}) | ({"skip reasons": sorted(map(str, skipped))} if skipped else {})


def _error(case: ElementTree.Element) -> bool:
    return case.find("error") is not None


def in_parallel() -> list[str]:
    """pytest's words for several processes, where pytest-xdist is installed: the references take most of the time."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(MOST_TESTERS, max(1, (os.cpu_count() or 1) * 3 // 4)))]


def correctness(limit: float, log: Path) -> dict[str, Any]:
    """All tests marked gpu."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", f"--junitxml={report}", *in_parallel()]
    found = command([*words, *gpu_test_files()], limit, log, OMP_NUM_THREADS="1")
    return counts(report) | found


def sanitizer(limit: float, log: Path) -> dict[str, Any]:
    """compute-sanitizer on the smallest case of each op; without torch's caching allocator, which hides overruns."""
    if shutil.which("compute-sanitizer") is None:
        return {"exit": "compute-sanitizer is not on the path"}
    words = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", "--target-processes", "all"]
    words += [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "sanitizer", "--tb=short", *gpu_test_files()]
    return command(words, limit, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def watch(process: subprocess.Popen, path: Path, limit: float, stall: float) -> str | None:
    """Waits for the process that times. Why it was stopped: None when it ended by itself."""
    start = time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        quiet = time.time() - path.stat().st_mtime
        if time.monotonic() - start > limit:
            stop(process)
            return TIME_IS_UP
        if quiet > stall and time.monotonic() - start > stall:
            stop(process)
            return f"nothing happened for {stall:.0f} s"
    return None


def timing(path: Path, worker: list[str], minutes: float, stall: float = STALL_SECONDS) -> dict[str, Any]:
    """Ceilings and cases in a process of their own, `worker`, started again when a contestant took it along.

    What ran then is recorded as a failure, and not run again.
    """
    start, ends, code = time.monotonic(), [], 1
    while len(ends) <= MOST_RESTARTS:
        left = 60 * minutes - (time.monotonic() - start)
        words = [*worker, "--worker", str(max(0.0, left) / 60), "--json", str(path)]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), start_new_session=True)
        stopped = watch(process, path, left + GRACE_SECONDS, stall)
        if process.returncode == 0:
            code = 0
            break
        ends.append(stopped or f"the process ended with {process.returncode}")
        document = Document.load(path)
        if stopped == TIME_IS_UP:
            document.running, code = None, 0
            document.save()
            break
        if process.returncode != LOST and not document.blame_running(ends[-1]):
            break  # it did not reach a contestant: a second try would end the same way
    return {"exit": code, "seconds": round(time.monotonic() - start, 1), "processes that ended early": ends}
