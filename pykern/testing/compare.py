"""Comparison element by element. A distance over the whole tensor would pass eight wrong elements of a million."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """An element may differ by relative * |expected| + absolute * scale, scale being max |expected| unless given.

    The second term is there because a sum that cancels keeps the rounding errors of its terms.
    """

    relative: float
    absolute: float
    reason: str


# The one table of tolerances. A gradient sums products of rounded factors, so it gets twice an output's.
OUTPUT = {
    torch.float64: Tolerance(1e-12, 1e-13, "unit roundoff 1.1e-16; exp, erfc and sums of some thousand terms"),
    torch.float32: Tolerance(2e-6, 2e-6, "unit roundoff 6.0e-8; sums of up to some thousand terms, in any order"),
    torch.bfloat16: Tolerance(8e-3, 4e-3, "unit roundoff 3.9e-3: the result's rounding, and one of an intermediate"),
    torch.float16: Tolerance(1e-3, 5e-4, "unit roundoff 4.9e-4: the result's rounding, and one of an intermediate"),
}
GRADIENT = {dtype: Tolerance(2 * t.relative, 2 * t.absolute, t.reason) for dtype, t in OUTPUT.items()}


def _tensor(x) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))


def _at(index: int, shape: torch.Size) -> str:
    return str([int(i) for i in np.unravel_index(index, shape)])


def assert_close(actual, expected, *, name: str, gradient: bool = False, tolerance=None, scale: float | None = None):
    """Every element of actual within its dtype's tolerance of expected; torch tensors or numpy arrays of one shape.

    NaN and infinities must stand at the same places. `scale` replaces max |expected| when the terms of the sums are
    larger than their results. AssertionError names the worst element and how many are out.
    """
    actual, expected = _tensor(actual), _tensor(expected)
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.numel() == 0:
        return
    tolerance = tolerance or (GRADIENT if gradient else OUTPUT)[actual.dtype]
    got, want = actual.double().flatten(), expected.double().flatten()
    finite = want.isfinite()
    odd = torch.where(finite, ~got.isfinite(), (got != want) & ~(got.isnan() & want.isnan()))
    if odd.any():
        i = int(odd.nonzero()[0])
        raise AssertionError(
            f"{name}: at {_at(i, actual.shape)} got {got[i].item()!r}, expected {want[i].item()!r} "
            f"({int(odd.sum())} of {odd.numel()} elements differ in being finite)"
        )
    if scale is None:
        scale = want[finite].abs().max().item() if finite.any() else 0.0
    error = torch.where(finite, (got - want).abs(), 0.0)
    allowed = torch.where(finite, tolerance.relative * want.abs() + tolerance.absolute * scale, 0.0)
    out = error > allowed
    if out.any():
        i = int((error - allowed).argmax())
        raise AssertionError(
            f"{name}: worst at {_at(i, actual.shape)}: got {got[i].item()!r}, expected {want[i].item()!r}, "
            f"error {error[i].item():.3g}, allowed {allowed[i].item():.3g} for {actual.dtype}; "
            f"{int(out.sum())} of {out.numel()} elements are out"
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bitwise(a, b, *, name: str = "result"):
    """Same shape, same dtype, same bits: -0 differs from 0, and a NaN equals itself. Torch tensors or numpy arrays."""
    a, b = _tensor(a), _tensor(b)
    assert a.shape == b.shape, f"{name}: shapes {list(a.shape)} and {list(b.shape)}"
    assert a.dtype == b.dtype, f"{name}: dtypes {a.dtype} and {b.dtype}"
    bits = _BITS[a.element_size()]
    differ = (a.contiguous().view(bits) != b.contiguous().view(bits)).flatten()
    if differ.any():
        i = int(differ.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ in their bits, first at "
            f"{_at(i, a.shape)}: {a.flatten()[i].item()!r} and {b.flatten()[i].item()!r}"
        )
