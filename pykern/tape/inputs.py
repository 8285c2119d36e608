"""Everything that can be wrong with what a module is given or gives back, in one place; no mathematics here."""

import functools
import inspect
from typing import Any

import numpy as np


def as_array(op: str, argument: str, value: Any, dtype: Any = None) -> np.ndarray:
    """A C-contiguous copy in float64 (or dtype), int64 or bool; anything else is refused."""
    dtype = None if dtype is None else real(op, dtype)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{op}: {argument} is not a rectangular array") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{op}: {argument} is {describe(value)}, expected an array of floats, integers or booleans")
    if dtype is None:
        dtype = {"f": np.float64, "b": np.bool_}.get(array.dtype.kind, np.int64)
    return np.array(array, dtype, order="C")


def real(op: str, dtype: Any) -> np.dtype:
    """float32 or float64, however it is written."""
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{op}: dtype is {dtype!r}, expected float32 or float64") from error
    if found not in (np.float32, np.float64):
        raise TypeError(f"{op}: dtype is {found}, expected float32 or float64")
    return found


def as_number(array: np.ndarray) -> np.ndarray:
    """Integers as float64, floats and booleans as they are."""
    return array.astype(np.float64) if array.dtype.kind == "i" else array


def as_output(op: str, value: Any) -> np.ndarray:
    """What forward() returned, as a C-contiguous array."""
    array = np.asarray(value, order="C")
    if array.dtype.kind not in "fib":
        raise TypeError(f"{op}: forward returned {describe(value)}, expected an array of numbers")
    return array


def as_gradients(op: str, value: Any, names: list[str], shapes: list[tuple]) -> tuple:
    """What backward() returned: one gradient (or None) per input, in the shape of that input."""
    gradients = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(gradients) != len(shapes):
        raise ValueError(f"{op}: backward returned {len(gradients)} gradients for {len(shapes)} inputs")
    for gradient, argument, shape in zip(gradients, names, shapes, strict=True):
        if gradient is not None and np.shape(gradient) != shape:
            raise ValueError(
                f"{op}: backward returned a gradient of shape {np.shape(gradient)} for {argument} of shape {shape}"
            )
    return gradients


def one_dtype(op: str, tensors: list[tuple[str, np.ndarray]]) -> None:
    """Refuse a mixture of float32 and float64."""
    floats = [(argument, tensor.dtype) for argument, tensor in tensors if tensor.dtype.kind == "f"]
    for argument, dtype in floats:
        if dtype != floats[0][1]:
            raise TypeError(f"{op}: {floats[0][0]} is {floats[0][1]} but {argument} is {dtype}; use one dtype")


def last_dimension(op: str, argument: str, tensor: np.ndarray, size: int) -> None:
    floats(op, **{argument: tensor})
    if tensor.ndim == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{op}: {argument} has shape {tensor.shape}, expected a last dimension of {size}")


def indices(op: str, argument: str, tensor: np.ndarray, size: int, ignore: int | None = None) -> None:
    """Refuse what is not an integer in 0 .. size-1 (or ignore)."""
    if tensor.dtype.kind != "i":
        raise TypeError(f"{op}: {argument} is {tensor.dtype}, expected integers")
    wrong = (tensor < 0) | (tensor >= size)
    if ignore is not None:
        wrong &= tensor != ignore
    if wrong.any():
        where = tuple(map(int, np.argwhere(wrong)[0]))
        raise IndexError(f"{op}: {argument}{list(where)} is {tensor[where]}, expected 0 .. {size - 1}")


def targets(op: str, argument: str, prediction: np.ndarray, target: np.ndarray, ignore: int | None = None) -> None:
    """Labels [...] or distributions [..., V] for a prediction [..., V]."""
    floats(op, **{argument: prediction})
    rank(op, argument, prediction, 1)
    if prediction.shape[-1] == 0:
        raise ValueError(f"{op}: {argument} has shape {prediction.shape}, expected at least one class")
    if target.shape == prediction.shape[:-1]:
        indices(op, "targets", target, prediction.shape[-1], ignore)
    elif target.shape != prediction.shape:
        labels, distributions = prediction.shape[:-1], prediction.shape
        raise ValueError(
            f"{op}: targets has shape {target.shape}, expected labels {labels} or distributions {distributions}"
        )


def floats(op: str, **tensors: np.ndarray) -> None:
    for argument, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float64):
            raise TypeError(f"{op}: {argument} is {tensor.dtype}, expected float64 or float32")


def rank(op: str, argument: str, tensor: np.ndarray, ndim: int, *, exactly: bool = False) -> None:
    if tensor.ndim < ndim or (exactly and tensor.ndim > ndim):
        raise ValueError(
            f"{op}: {argument} has shape {tensor.shape}, expected {ndim} dimensions{'' if exactly else ' or more'}"
        )


def broadcastable(op: str, **tensors: np.ndarray) -> None:
    floats(op, **tensors)
    try:
        np.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))
    except ValueError as error:
        shapes = ", ".join(f"{argument} {tensor.shape}" for argument, tensor in tensors.items())
        raise ValueError(f"{op}: the shapes do not broadcast: {shapes}") from error


def broadcast_to(op: str, argument: str, tensor: np.ndarray, shape: tuple) -> None:
    try:
        np.broadcast_to(tensor, shape)
    except ValueError as error:
        raise ValueError(f"{op}: {argument} has shape {tensor.shape}, which does not broadcast to {shape}") from error


def reshapable(op: str, argument: str, tensor: np.ndarray, shape: tuple) -> None:
    try:
        tensor.reshape(shape)
    except ValueError as error:
        raise ValueError(f"{op}: {argument} has shape {tensor.shape}, which does not fit shape {shape}") from error


def number(op: str, argument: str, value: Any, **limits: float) -> float:
    """A finite number that keeps the limits least=, most= (both included) and below= (not included)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{op}: {argument} is {describe(value)}, expected a number")
    least, most, below = limits.get("least", -np.inf), limits.get("most", np.inf), limits.get("below", np.inf)
    if not (np.isfinite(value) and least <= value <= most and value < below):
        wanted = ", ".join(f"{key} {limit}" for key, limit in limits.items())
        raise ValueError(f"{op}: {argument} is {value}, expected a finite number" + f" ({wanted})" * bool(limits))
    return float(value)


def pair(op: str, argument: str, value: Any) -> tuple:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{op}: {argument} is {value!r}, expected two numbers")
    return tuple(value)


def unique(op: str, argument: str, value: Any) -> list:
    """The elements of an iterable, each object once."""
    try:
        return list({id(element): element for element in value}.values())
    except TypeError as error:
        raise TypeError(f"{op}: {argument} is {describe(value)}, expected a list") from error


def positive(op: str, **sizes: Any) -> None:
    """Refuse a size that is not a whole number above 0."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"{op}: {argument} is {size!r}, expected a whole number")
        if size < 1:
            raise ValueError(f"{op}: {argument} is {size}, expected 1 or more")


def choice(op: str, argument: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {argument} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def count(op: str, function: Any, given: int) -> list[str]:
    """The names that forward() or connect() has for its inputs, one for each given; refuse too few or too many."""
    names, required, rest = parameters(function)
    if given < required or (given > len(names) and rest is None):
        wanted = ", ".join(
            names[:required] + [f"{key}=None" for key in names[required:]] + ([f"*{rest}"] if rest else [])
        )
        raise TypeError(f"{op}: got {given} inputs, expected ({wanted})")
    return names[:given] + [f"{rest}[{i}]" for i in range(given - len(names))]


@functools.cache
def parameters(function: Any) -> tuple[list[str], int, str | None]:
    """(names, how many have no default, the name behind the star or None), without self."""
    kinds = inspect.Parameter
    listed = list(inspect.signature(function).parameters.values())[1:]
    named = [p for p in listed if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in listed if p.kind is kinds.VAR_POSITIONAL), None)
    return [p.name for p in named], sum(p.default is kinds.empty for p in named), rest


def describe(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
