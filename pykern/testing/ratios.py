"""The ratio rule: pykern's error against float64, beside that of eager torch and of torch's fused op in the same dtype.

Inputs are drawn in float64 and rounded to the dtype, so that all three and the float64 reference see the same numbers.
The error of a tensor is the largest |x - reference| over all elements divided by the largest |reference|; of SEEDS
draws the largest error counts.
A row passes when pykern's error is
  at most 2x (outputs) or 3x (gradients) that of eager torch, whose error counts as one rounding of the result's dtype
  where it is less: a result that is exact before it is stored has that error; and
  not above that of torch's fused op by more than a quarter and one rounding: the maximum over rounding errors of
  equally good methods, which add in different orders, scatters that much.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SEEDS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUT_LIMIT, GRADIENT_LIMIT = 2.0, 3.0
FUSED_SLACK = 1.25


@dataclass(frozen=True)
class Case:
    """One op on one kind of input.

    inputs(generator) draws float64 (or integer, bool) tensors by argument name. The functions take them as keywords
    and return a dictionary of result tensors. Gradients are compared for every floating input not named in `constant`.
    """

    op: str
    inputs: Callable[[torch.Generator], dict[str, Tensor]]
    pykern: Callable[..., dict[str, Tensor]]
    reference: Callable[..., dict[str, Tensor]]  # the formula, in the dtype of its arguments
    fused: Callable[..., dict[str, Tensor]] | None = None
    constant: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Errors of one tensor; fused is None where torch has no fused op."""

    op: str
    dtype: torch.dtype
    tensor: str
    gradient: bool
    pykern: float
    eager: float
    fused: float | None
    rounding: float  # half a unit in the last place of the result's dtype

    @property
    def ratio(self) -> float:
        """pykern's error over eager torch's, the latter not below one rounding."""
        return self.pykern / max(self.eager, self.rounding)

    @property
    def limit(self) -> float:
        return GRADIENT_LIMIT if self.gradient else OUTPUT_LIMIT

    @property
    def passes(self) -> bool:
        """Written so that a NaN anywhere fails."""
        beside_fused = self.fused is None or self.pykern <= FUSED_SLACK * self.fused + self.rounding
        return self.ratio <= self.limit and beside_fused

    def cells(self) -> list[str]:
        fused = "-" if self.fused is None else f"{self.fused:.2e}"
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = [f"{self.pykern:.2e}", f"{self.eager:.2e}", fused, f"{self.ratio:.2f}", f"{self.limit:.0f}"]
        return [self.op, dtype, self.tensor, *numbers, "ok" if self.passes else "FAIL"]


def _results(function, inputs, constant, gradients_in):
    """Outputs and gradients by name, for leaf copies of the inputs."""
    leaves = {
        name: x.clone().requires_grad_(x.is_floating_point() and name not in constant) for name, x in inputs.items()
    }
    outputs = function(**leaves)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    roots = {name: x for name, x in outputs.items() if x.requires_grad}
    if not roots:
        return dict(outputs), {}
    seeds = [gradients_in(name, x) for name, x in roots.items()]
    gradients = torch.autograd.grad(list(roots.values()), list(wanted.values()), seeds)
    return (
        {name: x.detach() for name, x in outputs.items()},
        {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)},
    )


def _error(x: Tensor, reference: Tensor) -> float:
    if x.shape != reference.shape:
        raise ValueError(f"shape {list(x.shape)}, the reference has {list(reference.shape)}")
    return ((x.double() - reference).abs().max() / reference.abs().max()).item()


def _worse(a: float, b: float) -> float:
    return a if a != a or a > b else b  # a NaN wins


def measure(case: Case, dtype: torch.dtype) -> list[Row]:
    """One row for each output and each gradient of the case in this dtype."""
    methods = {"pykern": case.pykern, "eager": case.reference, "fused": case.fused}
    methods = {name: function for name, function in methods.items() if function is not None}
    errors: dict[str, dict[str, float]] = {}
    roundings: dict[str, float] = {}
    gradient_names: set[str] = set()
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        rounded = {n: x.to(dtype) if x.is_floating_point() else x for n, x in case.inputs(generator).items()}
        douts: dict[str, Tensor] = {}

        def gradient_in(name, x, douts=douts, generator=generator):
            if name not in douts:
                douts[name] = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
            return douts[name].to(x.dtype)

        exact = {n: x.double() if x.is_floating_point() else x for n, x in rounded.items()}
        wanted: dict[str, Tensor] = {}
        for part in _results(case.reference, exact, case.constant, gradient_in):
            wanted |= part
        for method, function in methods.items():
            outputs, gradients = _results(function, rounded, case.constant, gradient_in)
            gradient_names |= set(gradients)
            for name, x in (outputs | gradients).items():
                if method == "pykern":
                    roundings[name] = torch.finfo(x.dtype).eps / 2
                of_tensor = errors.setdefault(name, {})
                of_tensor[method] = _worse(_error(x, wanted[name]), of_tensor.get(method, 0.0))
    return [
        Row(case.op, dtype, name, name in gradient_names, e["pykern"], e["eager"], e.get("fused"), roundings[name])
        for name, e in errors.items()
    ]


def table(rows: list[Row]) -> str:
    """The rows as text in columns."""
    head = ["op", "dtype", "tensor", "pykern error", "eager torch", "fused torch", "ratio", "limit", ""]
    lines = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def assert_ratio(op: str, dtype: torch.dtype):
    """Every tensor of every case of this op passes; AssertionError shows the table. ValueError: no such op."""
    from pykern.testing.cases import CASES

    rows = [row for case in CASES if case.op.split()[0] == op for row in measure(case, dtype)]
    if not rows:
        raise ValueError(f"assert_ratio: no case of op {op!r}; pykern/testing/cases.py has {[c.op for c in CASES]}")
    print(table(rows))
    failed = [row for row in rows if not row.passes]
    assert not failed, f"{op} in {dtype} breaks the ratio rule:\n{table(failed)}"


def main(argv: list[str] | None = None) -> int:
    """`pykern check [op ...]`: prints the table; 1 when a row fails, 2 for an unknown op."""
    import argparse

    from pykern.testing.cases import CASES

    known = sorted({case.op.split()[0] for case in CASES})
    parser = argparse.ArgumentParser(prog="pykern check", description="Errors of every op beside those of torch.")
    parser.add_argument("op", nargs="*", help=f"of {', '.join(known)}; default all")
    wanted = parser.parse_args(argv).op or known
    unknown = [op for op in wanted if op not in known]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}, expected one of {', '.join(known)}")
    rows = [row for case in CASES if case.op.split()[0] in wanted for dtype in DTYPES for row in measure(case, dtype)]
    print(table(rows))
    failed = sum(not row.passes for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} rows pass")
    return 1 if failed else 0
