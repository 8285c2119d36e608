"""nn.MLP against the torch modules: Linear, GELU (tanh), Linear; and with a gate, Linear, SiLU, product, Linear."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import pykern
from benchmarks.report import OURS, Case, numbers, with_gradients

SHAPES = [(1024, 768, 3072)]  # M, K, H: rows, width, hidden
QUICK_SHAPES = [(64, 64, 256)]
DTYPES = (torch.float32, torch.bfloat16)
PRODUCTS = {"gelu_tanh": 2, "swiglu": 3}


def flops(M: int, K: int, H: int, activation: str, backward: bool) -> float:
    """Two products, three with a gate; as many again for the gradients of inputs and of weights."""
    return (6.0 if backward else 2.0) * PRODUCTS[activation] * M * K * H


def moved(M: int, K: int, H: int, activation: str, item: int, backward: bool) -> float:
    """x, weights, biases and out, thrice with backward; what is between the layers stays inside."""
    products = PRODUCTS[activation]
    once = 2 * M * K + products * K * H + (products - 1) * H + K
    return float(item * (3 * once if backward else once))


class GatedMLP(nn.Module):
    """c_proj(silu(c_gate(x)) * c_fc(x)) in plain torch."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_gate, self.c_fc, self.c_proj = (
            nn.Linear(width, hidden),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


def build(M: int, K: int, H: int, activation: str, dtype: torch.dtype, backward: bool):
    """Both with the same weights, in the order gate, up, down."""
    torch.manual_seed(0)
    if activation == "swiglu":
        theirs = GatedMLP(K, H).to(dtype)
    else:
        theirs = nn.Sequential(nn.Linear(K, H), nn.GELU("tanh"), nn.Linear(H, K)).to(dtype)
    ours = pykern.nn.MLP(K, H, activation, dtype=dtype)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x, dout = (numbers(M, K, dtype=dtype, seed=seed) for seed in (0, 1))
    modules = {OURS: ours, "torch modules": theirs}
    if backward:
        return {
            who: with_gradients(lambda x, *_, m=m: m(x), [x.requires_grad_(), *m.parameters()], dout)
            for who, m in modules.items()
        }
    for module in modules.values():
        module.requires_grad_(False)
    return {who: lambda m=m: m(x) for who, m in modules.items()}


def cases(quick: bool) -> Iterator[Case]:
    for M, K, H in QUICK_SHAPES if quick else SHAPES:
        for activation in PRODUCTS:
            for dtype in DTYPES:
                for backward in (False, True):
                    shape = (M, K, H, activation)
                    yield Case(
                        f"M{M} {K}-{H}-{K} {activation}{' +backward' if backward else ''}",
                        dtype,
                        flops(*shape, backward),
                        moved(*shape, dtype.itemsize, backward),
                        lambda shape=shape, dtype=dtype, backward=backward: build(*shape, dtype, backward),
                    )
