"""The steps of the GPU benchmarks: processes and their limits, a rehearsal from end to end, and the clock on a stub."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import steps, timer
from benchmarks.gpu.document import Document

pytestmark = pytest.mark.one_isa


# ---- steps


def test_a_command_and_its_limit(tmp_path):
    log = tmp_path / "log"
    found = steps.command([sys.executable, "-c", "import os; print(os.environ['MARK']); exit(3)"], 60, log, MARK="here")
    assert found["exit"] == 3 and found["tail"] == "here\n" and log.read_text() == "here\n"
    found = steps.command("echo begun; sleep 60; echo ended", 1, log)
    assert found["exit"] == "stopped after 1 s" and found["tail"] == "begun\n" and found["seconds"] < 30


def test_tests_are_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_skipped(): pytest.skip('why')\n"
    )
    report = tmp_path / "log.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    assert steps.command(command, 60, tmp_path / "log")["exit"] == 1
    found = steps.counts(report)
    assert found == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": found["failures"],
        "skip reasons": ["why"],
    }
    assert [name.split(".")[-1] for name in found["failures"]] == ["test_bad"]
    assert steps.counts(tmp_path / "none.xml") == {"tests": "no report"}
    assert "tests/test_cuda_gpu.py" in steps.gpu_test_files()


def test_a_sanitizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    assert steps.sanitizer(1.0, tmp_path / "log") == {"exit": "compute-sanitizer is not on the path"}


# A process that times: it notes each start, and dies, hangs or ends by the contestant that is next.
WORKER = """
import json, os, sys, time
from pathlib import Path
path = Path(sys.argv[sys.argv.index("--json") + 1])
document = json.loads(path.read_text())
dead = {f["contestant"] for f in document["failures"]}
for who in ("aborts", "hangs", "loses", "fine"):
    if who in dead:
        continue
    document["running"] = {"case": "a", "contestant": who, "since": 0}
    path.write_text(json.dumps(document))
    if who == "aborts":
        os.abort()
    if who == "hangs":
        time.sleep(600)
    if who == "loses":
        lost = {"case": "a", "contestant": who, "gpu": "", "text": "an illegal access", "fatal": True}
        path.write_text(json.dumps(document | {"failures": [*document["failures"], lost], "running": None}))
        sys.exit(3)
path.write_text(json.dumps(document | {"running": None}))
"""


def test_a_process_that_dies_or_hangs_is_started_again_without_what_ran(tmp_path):
    path = tmp_path / "x.json"
    Document(path).save()
    found = steps.timing(path, [sys.executable, "-c", WORKER], 5.0, stall=3.0)
    assert found["exit"] == 0
    assert found["processes that ended early"] == [
        "the process ended with -6",
        "nothing happened for 3 s",
        "the process ended with 3",
    ]
    texts = {f["contestant"]: (f["text"], f["fatal"]) for f in Document.load(path).failures}
    assert texts == {
        "aborts": ("the process ended with -6", True),
        "hangs": ("nothing happened for 3 s", True),
        "loses": ("an illegal access", True),
    }


def test_a_process_that_cannot_begin_is_not_started_again(tmp_path):
    path = tmp_path / "x.json"
    Document(path).save()
    found = steps.timing(path, [sys.executable, "-c", "raise SystemExit(1)"], 5.0)
    assert found["exit"] == 1 and found["processes that ended early"] == ["the process ended with 1"]


def test_when_time_is_up_nobody_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE_SECONDS", 3.0)
    path = tmp_path / "x.json"
    Document(path).save()
    worker = WORKER.replace('("aborts", "hangs"', '("hangs", "aborts"')
    found = steps.timing(path, [sys.executable, "-c", worker], 0.0)
    assert found["exit"] == 0 and found["processes that ended early"] == [steps.TIME_IS_UP]
    document = Document.load(path)
    assert document.running is None and document.failures == []


# ---- the program


def test_a_rehearsal_from_end_to_end(tmp_path, capfd):
    """Build, tests, ceilings and some cases, in processes of their own; a second call has nothing left to time."""
    path = tmp_path / "out.json"
    arguments = ["--rehearse", "--json", str(path), "--only", "G13", "--only", "softmax"]
    assert program.main([*arguments, "--steps", "build,ceilings,timing", "--build-command", "echo {python}"]) == 0
    found = json.loads(path.read_text())
    (run,) = found["runs"]
    assert run["steps"]["build"]["tail"] == f"{sys.executable}\n" and run["steps"]["timing"]["exit"] == 0
    assert list(found["ceilings"]) == ["no GPU"] and run["left"] == [] and run["kernels note"].startswith("a rehearsal")
    assert {row["goal"] for row in found["rows"]} == {"G13", "memory"}
    assert {row["contestant"] for row in found["rows"]} >= {"torch", "torch.compile", "torch fused", "pykern"}
    assert found["failures"] == [] and found["running"] is None
    assert (tmp_path / "out.md").read_text() in capfd.readouterr().out
    assert program.main([*arguments, "--steps", "timing"]) == 0
    again = json.loads(path.read_text())
    assert again["rows"] == found["rows"] and len(again["runs"]) == 2
    assert program.main([*arguments, "--steps", "timing", "--again"]) == 0
    again = json.loads(path.read_text())
    assert {row["run"] for row in again["rows"]} == {2} and len(again["rows"]) == len(found["rows"])


def test_a_build_that_fails_is_said_and_the_rest_goes_on(tmp_path, capfd):
    path = tmp_path / "out.json"
    arguments = ["--rehearse", "--json", str(path), "--only", "G1", "--steps", "build,timing"]
    assert program.main([*arguments, "--build-command", "echo no compiler; exit 2"]) == 1
    found = json.loads(path.read_text())
    assert found["runs"][0]["steps"]["build"]["exit"] == 2 and found["rows"]
    assert "build: " in capfd.readouterr().out and all(row["ceiling"] is None for row in found["rows"])


def test_the_list(capsys):
    assert program.main(["--list", "--only", "G9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(" G9 " in line for line in lines[:-1]) and lines[-1].startswith(f"{len(lines) - 1} cases, about")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--json FILE is needed"),
        (["--rehearse", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["--list", "--steps", "timing,everything"], "--steps: everything is not one of build, tests"),
        (["--list", "--minutes", "0"], "--minutes is 0, expected a number above 0"),
        (["--list", "--limit", "timing=3"], "'timing=3' is not STEP=SECONDS with a step of build, tests, sanitizer"),
        (["--list", "--only", "G99"], "no case is of a goal or has a name with G99"),
        pytest.param(
            ["--json", "x.json"],
            "torch sees no NVIDIA GPU here; --rehearse runs without one",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_refused(arguments, words, capsys):
    try:
        code = program.main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2 and words in printed.err and printed.out == ""


def test_limits_of_steps():
    options = program.parse(["--list", "--limit", "build=30", "--limit", "tests=1.5"])
    assert dict(options.limit) == {"build": 30.0, "tests": 1.5} and options.steps == list(program.STEPS)


def test_help_needs_no_gpu():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--help"], cwd=steps.ROOT, text=True, capture_output=True, timeout=120
    )
    assert run.returncode == 0 and "pip install --no-index" in run.stdout


# ---- the real clock, on a torch.cuda that only counts


class Stub:
    """torch.cuda with a clock of its own: a call of spend() takes so many seconds on it."""

    def __init__(self, monkeypatch):
        self.clock, self.capturing, self.refuses, self.broken, self.allocated = 0.0, None, False, False, 0
        stub = self

        class Event:
            def __init__(self, enable_timing):
                self.at = 0.0

            def record(self, stream):
                self.at = stub.clock

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class Graph:
            def __init__(self):
                self.seconds = []

            def replay(self):
                stub.clock += sum(self.seconds)

        class capture:
            def __init__(self, graph, stream, capture_error_mode):
                self.graph = graph

            def __enter__(self):
                stub.capturing = self.graph

            def __exit__(self, *error):
                stub.capturing = None
                if stub.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing")

        cuda = torch.cuda
        for name, value in {
            "Stream": lambda device: SimpleNamespace(device=device),
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "stream": lambda stream: nullcontext(),
            "synchronize": self.synchronize,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50 << 20),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 100 + self.allocated,
        }.items():
            monkeypatch.setattr(cuda, name, value)

    def synchronize(self, device):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def spend(self, seconds):
        def call():
            if self.capturing is None:
                self.clock += seconds
            else:
                self.capturing.seconds.append(seconds)
            return seconds

        return call


@pytest.fixture
def stub(monkeypatch):
    return Stub(monkeypatch)


def test_a_graph_is_timed(stub):
    clock = timer.CudaTimer(torch.device("cuda"))
    assert clock.cold_bytes == 150 << 20
    ready = clock.prepare("a", [stub.spend(1e-5), stub.spend(3e-5)])
    assert ready.mode == "graph" and ready.note == ""
    assert (ready.count, ready.repeats) == (50, 2)  # 25 times 0.04 ms, and a sample is 2 ms
    assert clock.sample("a", ready) == pytest.approx(2e-5)
    ready = clock.prepare("a", [stub.spend(5e-3)])
    assert (ready.count, ready.repeats) == (1, 1)


def test_launches_are_timed_where_no_graph_can_be(stub):
    clock = timer.CudaTimer(torch.device("cuda"))
    stub.refuses = True
    ready = clock.prepare("a", [stub.spend(1e-3)])
    assert (ready.mode, ready.repeats) == ("launches", 2) and "not permitted when stream is capturing" in ready.note
    assert clock.sample("a", ready) == pytest.approx(1e-3)


def test_a_lost_device_is_told_from_a_refusal(stub):
    clock = timer.CudaTimer(torch.device("cuda"))
    stub.broken = True
    with pytest.raises(timer.DeviceLost, match="illegal memory access"):
        clock.prepare("a", [stub.spend(1e-3)])


def test_peak_is_what_a_call_adds(stub):
    stub.allocated = 12
    assert timer.CudaTimer(torch.device("cuda")).peak(stub.spend(0.0)) == 12
