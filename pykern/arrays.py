"""The ops of pykern for arrays of any library: JAX in, JAX out; NumPy in, NumPy out; CuPy and others by DLPack.

    pykern.arrays.attention(q, k, v, causal=True)        the same names, arguments and refusals as pykern.attention

Inputs are borrowed, not copied, and handed to the op as torch tensors, without a gradient. Results go back through
from_dlpack of the library that the first array comes from.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pykern
from pykern import ops

__all__ = [name for name, module in pykern._NAMES.items() if module == "pykern.ops"]

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # device types of DLPack
_WIDENED = ("target", "positions", "rows")  # int64 in pykern, which JAX does not have unless told to
_WRITTEN = dict.fromkeys(("attention_with_kvcache", "flash_attn_with_kvcache"), ("k_cache", "v_cache"))  # if k is given


def _is_array(x: Any) -> bool:
    return isinstance(x, Tensor | np.ndarray) or hasattr(x, "__dlpack__")


def _jax_class(name: str) -> Any:
    """jax.Array or jax.core.Tracer where somebody has imported jax; else (), of which nothing is an instance."""
    jax = sys.modules.get("jax")
    return () if jax is None else jax.Array if name == "Array" else jax.core.Tracer


def _device_type(op: str, name: str, x: Any) -> int:
    """The DLPack device type of x, CPU or CUDA; errors say what no op can take."""
    kind = int(x.__dlpack_device__()[0]) if hasattr(x, "__dlpack_device__") else _CPU
    if kind not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise ValueError(f"{op}: {name} is on an unsupported device (DLPack type {kind}), expected CPU or CUDA")
    if kind in (_CUDA, _CUDA_MANAGED) and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: {name} is on a GPU, but torch.cuda.is_available() is False")
    return kind


def _check(op: str, name: str, x: Any) -> None:
    if isinstance(x, _jax_class("Tracer")):
        raise TypeError(
            f"{op}: {name} is traced by jax (jit, grad, vmap): pykern.arrays takes arrays with numbers in them and has "
            "no gradient; inside jax.jit use jax.pure_callback"
        )
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} is a masked array; pass its data, and the mask as mask where there is one")
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: {name} requires a gradient, which pykern.arrays has not; call pykern.{op}")


def _as_numpy(x: Any) -> np.ndarray | None:
    """x in CPU memory as NumPy sees it; None where NumPy does not know the dtype, bfloat16."""
    try:
        return x if isinstance(x, np.ndarray) else np.from_dlpack(x)
    except (BufferError, TypeError, RuntimeError):
        return None


def _borrowed(op: str, name: str, x: Any, written: bool) -> Tensor:
    """x as a tensor on the same memory; a copy of what has negative strides, which torch lacks."""
    _check(op, name, x)
    if isinstance(x, Tensor):
        return x
    on_cpu = _device_type(op, name, x) in (_CPU, _CUDA_HOST)
    seen = _as_numpy(x) if on_cpu else None
    if written:
        _check_writable(op, name, x, on_cpu, seen)
    strides = seen.strides if seen is not None else getattr(x, "strides", None) or ()
    if any(stride < 0 for stride in strides):
        if written or seen is None:
            raise ValueError(f"{op}: {name} has a negative stride; pass a copy")
        x = seen.copy()
    rounded = isinstance(x, np.ndarray) and x.dtype.name == "bfloat16"  # of ml_dtypes, which DLPack export lacks
    try:
        tensor = torch.from_dlpack(x.view(np.uint16)).view(torch.bfloat16) if rounded else torch.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"{op}: {name} cannot be borrowed: {type(error).__name__}: {reason}") from None
    integer = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.long() if name in _WIDENED and integer else tensor


def _check_writable(op: str, name: str, x: Any, on_cpu: bool, seen: np.ndarray | None) -> None:
    """ValueError for memory that must not change."""
    if isinstance(x, _jax_class("Array")):
        raise ValueError(f"{op}: {name} is a JAX array, which is immutable, but k and v are written into it")
    if on_cpu and (seen is None or not seen.flags.writeable):
        raise ValueError(f"{op}: {name} is read-only or may be, but k and v are written into it; pass a NumPy array")


def _library_of(op: str, name: str, x: Any) -> ModuleType:
    """What made x and can make more of the kind: the module with its from_dlpack."""
    if isinstance(x, Tensor | np.ndarray):
        return torch if isinstance(x, Tensor) else np
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    module = sys.modules.get(type(x).__module__.partition(".")[0])
    if not hasattr(module, "from_dlpack"):
        raise TypeError(
            f"{op}: {name} is a {type(x).__name__}, whose library has no from_dlpack to return a result with; pass "
            f"numpy.from_dlpack({name}) or torch.from_dlpack({name})"
        )
    return module  # type: ignore[return-value]


def _returned(result: Any, library: ModuleType) -> Any:
    """The tensors of a result as arrays of a library."""
    if isinstance(result, tuple):
        return tuple(_returned(part, library) for part in result)
    if not isinstance(result, Tensor) or library is torch:
        return result
    if library is not np:
        return library.from_dlpack(result.contiguous())
    if result.dtype != torch.bfloat16:
        return result.numpy()
    import ml_dtypes  # NumPy's bfloat16; who passed arrays of it has it

    return result.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _on_arrays(op: str) -> Callable[..., Any]:
    function = getattr(ops, op)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        library: ModuleType | None = None
        writes = given.arguments.get("k") is not None

        def borrow(name: str, x: Any) -> Any:
            nonlocal library
            if isinstance(x, list | tuple):
                return [borrow(f"{name}[{i}]", part) for i, part in enumerate(x)] if any(map(_is_array, x)) else x
            if not _is_array(x):
                return x
            tensor = _borrowed(op, name, x, writes and name in _WRITTEN.get(op, ()))
            library = library or _library_of(op, name, x)
            return tensor

        for name, x in given.arguments.items():
            given.arguments[name] = borrow(name, x)
        with torch.no_grad():
            result = function(*given.args, **given.kwargs)
        return _returned(result, library or torch)

    return call


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in __all__:
        raise AttributeError(f"module 'pykern.arrays' has no attribute '{name}'")
    globals()[name] = call = _on_arrays(name)
    return call
