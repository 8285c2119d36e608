"""What this installation can do and what it chose: ISA, threads, OpenMP, CUDA, torch."""

import operator
import os
import sys
from pathlib import Path
from typing import Any

import pykern

try:
    from pykern import _C
except ImportError as error:
    raise ImportError(
        "pykern's compiled extension is missing or does not load. In a source checkout, install with "
        "'pip install -e .' (a plain 'pip install .' followed by running from the repository root imports "
        f"the folder ./pykern, which has no extension). Reason: {error}"
    ) from error


def set_num_threads(n: int) -> None:
    """Thread count of the CPU kernels, 1..1024; 0 follows OpenMP, that is torch.set_num_threads.

    TypeError: not an integer. ValueError: any other number.
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"set_num_threads: n must be an integer, got {type(n).__name__}") from None
    if not 0 <= count <= 1024:
        raise ValueError(f"set_num_threads: n is {count}, expected 1..1024, or 0 to follow OpenMP")
    _C.set_num_threads(count)


def get_num_threads() -> int:
    """Thread count of the next CPU kernel on the calling thread."""
    return _C.num_threads()


def _openmp_runtimes() -> list[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted({Path(f).name for f in files if any(name in f for name in ("libgomp", "libomp", "libiomp"))})


def config() -> dict[str, object]:
    """The facts of show_config() as a dictionary."""
    torch = sys.modules.get("torch")
    exchange = "torch not imported"
    if torch is not None:
        exchange = "yes" if _C.borrow_path(torch.empty(1)) == "exchange" else "no, tensors cross through __dlpack__"
    return {
        "isa": _C.isa(),
        "isa built": [name for name, _ in _C.isas()],
        "isa available": [name for name, here in _C.isas() if here],
        "PYKERN_ISA": os.environ.get("PYKERN_ISA", ""),
        "threads": _C.num_threads(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "openmp runtimes": _openmp_runtimes(),
        "cuda": _C.cuda_status(),
        "torch": getattr(torch, "__version__", "not imported"),
        "dlpack exchange api": exchange,
        "extension": _C.__file__,
    }


def show_config() -> None:
    """Prints the ISA built, available and chosen, threads, OpenMP runtimes, CUDA state, torch and its exchange API."""
    for name, value in config().items():
        print(f"{name:>20}: {', '.join(value) if isinstance(value, list) else value}")


# op -> the kernel that its forward pass is; None: torch functions put together
_KERNELS = {
    **dict.fromkeys(("gelu", "relu", "sigmoid", "silu"), "activation_forward"),
    **dict.fromkeys(("embedding", "layer_norm", "linear", "mlp", "rms_norm", "softmax", "swiglu"), "{op}_forward"),
    **dict.fromkeys(("attention_weights", "linear_cross_entropy", "rope"), "{op}"),
    "cross_entropy": "cross_entropy_forward",
    "merge_attention": None,
    "attention_with_kvcache": "attention_with_kvcache",
    "flash_attn_with_kvcache": "attention_with_kvcache",
}
# CUDA kernels whose tests, backward too, have passed on an H200 in all dtypes (benchmarks/results/h200_gpu.json). Who
# changes one takes it out.
_VERIFIED = {
    f"{op}_forward"
    for op in ("activation", "cross_entropy", "embedding", "layer_norm", "rms_norm", "softmax", "swiglu")
}


def allows_tf32(x: Any) -> bool:
    """Whether torch lets products of x round their factors to tf32, if it is float32 on CUDA: torch.backends says."""
    torch = sys.modules.get("torch")
    if torch is None or not getattr(x, "is_cuda", False) or x.dtype != torch.float32:
        return False
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _explain_cuda(op: str, first: Any, dtype: str) -> str:
    kernel = _KERNELS.get(op, "attention_forward")
    if kernel is None:
        return f"{op}: torch functions put together, on CUDA as on the CPU"
    kernel = kernel.format(op=op)
    if kernel not in _C.cuda_kernels():
        why = "has no CUDA kernel for it yet" if _C.cuda_kernels() else "has no CUDA kernels in this build"
        return f"{op}: raises, because pykern {why}"
    tested = "tested on an emulator, not yet on a GPU"
    if kernel in _VERIFIED:
        tested = "verified on an H200"
    if op in ("linear", "mlp", "linear_cross_entropy") and allows_tf32(first):
        dtype = "float32 in tf32, which torch allows"
    return f"{op}: CUDA kernel {kernel}, {dtype}, {tested}; the CUDA kernels are {_C.cuda_status()}"


def explain(op: str, *args, **kwargs) -> str:
    """One sentence: which kernel `op` runs for these arguments, and why; "raises, because ..." when none does.

    ValueError: no such op, no array among the arguments.
    """
    known = [name for name, module in pykern._NAMES.items() if module == "pykern.ops"]
    if op not in known:
        raise ValueError(f"explain: {op!r} is not one of {', '.join(sorted(known))}")
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype") and hasattr(a, "shape")]
    if not arrays:
        raise ValueError(f"explain: {op} needs at least one array argument")
    first = next((a for a in arrays if "int" not in str(a.dtype) and "bool" not in str(a.dtype)), arrays[0])
    dtype = str(first.dtype).removeprefix("torch.")
    if str(getattr(first, "device", "cpu")).startswith("cuda"):
        return _explain_cuda(op, first, dtype)
    try:
        path = _C.borrow_path(first)
    except (TypeError, ValueError) as refusal:
        return f"{op}: raises, because {str(refusal).removeprefix('borrow_path: ')}"
    return f"{op}: CPU kernel for ISA {_C.isa()}, {dtype}, {_C.num_threads()} threads, arrays borrowed by {path}"
