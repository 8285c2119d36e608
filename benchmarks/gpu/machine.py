"""What the numbers are measured on, and which CUDA kernels pykern has there."""

import platform
import shutil
import subprocess
import time
from typing import Any

import torch

import pykern
from benchmarks.gpu.makers import versions
from benchmarks.gpu.timer import one_line

QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw", "temperature.gpu")


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi reads, or why it does not."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not on the path"}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, text=True, capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired as error:
        return {"nvidia-smi": one_line(error)}
    if run.returncode:
        return {"nvidia-smi": f"exit {run.returncode}: {(run.stdout + run.stderr).strip()[:200]}"}
    values = run.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY, values, strict=True))


def facts(device: torch.device) -> dict[str, Any]:
    """Machine and versions, for JSON."""
    found: dict[str, Any] = {"gpu": gpu_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": properties.L2_cache_size,
            "cuda runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **nvidia_smi(),
        }
    found |= {"pykern": pykern.__version__, "torch": torch.__version__, "python": platform.python_version()}
    found |= {name: value or "not installed" for name, value in versions().items()}
    return found | {"started": time.strftime("%Y-%m-%d %H:%M:%S")}


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


def cuda_kernels() -> tuple[list[str], str]:
    """Names of pykern's CUDA kernels, and a note where they are taken to be none."""
    try:
        from pykern import _C
    except ImportError as error:
        return [], f"pykern takes no part: {one_line(error)}"
    listed = getattr(_C, "cuda_kernels", None)
    if listed is None:
        return [], "pykern takes no part: its extension has no cuda_kernels(), taken as no kernels"
    found = list(listed())
    return found, "" if found else f"pykern takes no part: its extension has no CUDA kernels ({_C.cuda_status()})"
