"""Memory beside time: the peak of a call in a process of its own."""

import ctypes
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import pykern

ROOT = Path(__file__).parent.parent
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets VmHWM to what is resident now
CHILD_SECONDS = 600
Result = TypeVar("Result")


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"memory: {STATUS} has no {name}")
    return 1024 * int(found[1])


def peak_growth(function: Callable[[], Result]) -> tuple[int, Result]:
    """By how many bytes the resident set grew at most during a call, and what the call returned.

    What the allocator keeps of freed memory is handed back first: taken again, it would not count.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    result = function()
    return max(0, _resident("VmHWM") - before), result


def peaks(function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, int]:
    """The peaks of forward and of backward over what was resident before both, and the bytes of the gradients.

    "extra" is the larger peak without the gradients, which any contestant must return; without them in forward, too,
    as far as it leaves that much behind, since it may compute them. Where the peak comes before the gradients exist
    this is too little, never too much.
    """
    before = _resident("VmRSS")
    forward, value = peak_growth(lambda: function(*inputs))
    kept = max(0, _resident("VmRSS") - before)
    backward, gradients = peak_growth(lambda: torch.autograd.grad(value, inputs))
    results = sum(g.nbytes for g in gradients)
    return {
        "extra": max(forward - min(kept, results), kept + backward - results, 0),
        "forward": forward,
        "backward": kept + backward,
        "results": results,
    }


def _child(module: str, builder: str, who: str, threads: int, warm_up: list, arguments: list) -> dict[str, int]:
    torch.set_num_threads(threads)
    pykern.set_num_threads(threads)
    build = getattr(importlib.import_module(module), builder)
    small, inputs = build(*warm_up)  # starts threads and loads code: neither is memory of the call
    torch.autograd.grad(small[who](*inputs), inputs)
    functions, inputs = build(*arguments)
    return peaks(functions[who], inputs)


def peaks_in_child(builder: Callable, who: str, warm_up: list, arguments: list) -> dict[str, int]:
    """peaks() in a fresh process of contestant `who`, after a first call with the small arguments `warm_up`.

    builder(*arguments) returns the contestants and their inputs; it is imported by name, its arguments go as JSON.
    RuntimeError with the child's words when it fails, and where the system has no /proc/self/clear_refs.
    """
    if not CLEAR_REFS.exists():
        raise RuntimeError(f"memory: a peak is measured with {CLEAR_REFS}, which this system has not")
    task = [builder.__module__, builder.__name__, who, torch.get_num_threads(), warm_up, arguments]
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(task)]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=CHILD_SECONDS, check=False)
    if run.returncode:
        raise RuntimeError(f"memory: the process that measures {who} failed:\n{run.stderr}")
    return json.loads(run.stdout)


if __name__ == "__main__":
    print(json.dumps(_child(*json.loads(sys.argv[1]))))
