"""What several test files share: random tensors, outputs and gradients by name, odd views, constants of the kernels."""

import re
from pathlib import Path

import pytest
import torch

from pykern import _C

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMULATED = _C.isa() == "emulated"  # the kernels are those of csrc/cuda
# What the host checks on the CPU and does not look at on a GPU.
unchecked = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "emulator", marks=pytest.mark.skipif(not EMULATED, reason="for the emulator: here the host checks")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
of_the_cpu = pytest.mark.skipif(EMULATED, reason="a promise of the CPU's kernels, which share code")


def draw(*shape, dtype=torch.float64, seed=0, spread=1.0):
    """Normal numbers, drawn in float64 and rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def with_gradients(function, inputs, douts):
    """function(**inputs) is a dictionary of tensors; returns it with the gradients "d<name>" of all floating inputs.

    douts maps the names of some outputs to the gradients that reach them.
    """
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    outputs = function(**leaves)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(
        [outputs[name] for name in douts],
        list(wanted.values()),
        [dout.to(outputs[name].dtype) for name, dout in douts.items()],
    )
    results = {name: x.detach() for name, x in outputs.items()}
    return results | {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}


def constant(file, name):
    """The number that csrc/<file> gives to a constant: cases that must reach a branch are checked against it."""
    found = re.search(rf"constexpr \w+ {name} = (?:kPaired<T> \? (\d+) : )?(\d+)", (ROOT / "csrc" / file).read_text())
    assert found, f"no constant {name} in csrc/{file}"
    return [int(number) for number in found.groups() if number]


# Rows of a tile, csrc/cpu/tile.h: twelve where vectors have 64 bytes, else six.
TILE_ROWS = 12 if _C.isa().startswith("v4") else 6
PAIRED = _C.isa() == "v4_bf16"  # bfloat16 is multiplied in pairs


# Views with the numbers of x [..., rows, columns] in memory laid out otherwise. All but the last are read in place.
VIEWS = {
    "packed": lambda x: x.clone(memory_format=torch.contiguous_format),
    "padded rows": lambda x: _inside(x, (*x.shape[:-1], x.shape[-1] + 3))[..., : x.shape[-1]],
    "every second row": lambda x: _inside(x, (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), rows=2)[..., ::2, :],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "rows before matrices": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
    "transposed": lambda x: x.mT.contiguous().mT,
}


def _inside(x, shape, rows=1):
    """A tensor full of NaN that holds x in every `rows`-th row, first columns."""
    outer = x.new_full(shape, torch.nan)
    outer[..., ::rows, : x.shape[-1]] = x
    return outer
