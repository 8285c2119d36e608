"""Every module of pykern.nn with inputs, as a table: CASES[name]() is (module, inputs, torch.nn twin or None).

Parameters are random, in float32 unless dtype is given. A test compares the names with pykern.nn.
"""

from collections.abc import Callable
from typing import Any

import torch
from nn_twins import randn, randomise

from pykern import nn

Made = tuple[torch.nn.Module, tuple[Any, ...], torch.nn.Module | None]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(*shape, seed=7).to(dtype)


LABELS = torch.tensor([[0, 3, -100], [2, 1, 3]])
CASES: dict[str, Callable[..., Made]] = {
    "ALiBi": lambda **kw: (nn.ALiBi(2, learnable=True, **kw), (3, 4), None),
    "CrossEntropyLoss": lambda **kw: (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        (floats(6, 4, **kw), LABELS.flatten()),
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "Embedding": lambda **kw: (
        nn.Embedding(5, 4, 1, **kw),
        (torch.tensor([[0, 1, 4], [3, 3, 2]]),),
        torch.nn.Embedding(5, 4, 1, **kw),
    ),
    "LayerNorm": lambda **kw: (nn.LayerNorm(4, **kw), (floats(2, 3, 4, **kw),), torch.nn.LayerNorm(4, **kw)),
    "Linear": lambda **kw: (nn.Linear(4, 6, **kw), (floats(2, 3, 4, **kw),), torch.nn.Linear(4, 6, **kw)),
    "LinearCrossEntropyLoss": lambda **kw: (
        nn.LinearCrossEntropyLoss(4, 5, bias=True, **kw),
        (floats(2, 3, 4, **kw), LABELS),
        None,
    ),
    "MLP": lambda **kw: (nn.MLP(4, 6, "swiglu", **kw), (floats(2, 3, 4, **kw),), None),
    "MultiheadAttention": lambda **kw: (
        nn.MultiheadAttention(4, 2, batch_first=True, **kw),
        (floats(2, 3, 4, **kw),) * 3,
        torch.nn.MultiheadAttention(4, 2, batch_first=True, **kw),
    ),
    "RMSNorm": lambda **kw: (nn.RMSNorm(4, **kw), (floats(2, 3, 4, **kw),), torch.nn.RMSNorm(4, **kw)),
    "RelativePositionBias": lambda **kw: (nn.RelativePositionBias(2, 4, 8, **kw), (3, 4), None),
    "SelfAttention": lambda **kw: (nn.SelfAttention(4, 2, 1, **kw), (floats(2, 3, 4, **kw),), None),
    "Sigmoid": lambda **kw: (nn.Sigmoid(), (floats(2, 3, 4, **kw),), torch.nn.Sigmoid()),
    "Softmax": lambda **kw: (nn.Softmax(1), (floats(2, 3, 4, **kw),), torch.nn.Softmax(1)),
    "TransformerBlock": lambda **kw: (
        nn.TransformerBlock(4, 2, 1, norm="rmsnorm", qk_norm=True, recompute=True, **kw),
        (floats(2, 3, 4, **kw),),
        None,
    ),
}


def make(name: str, **kw: Any) -> Made:
    module, inputs, twin = CASES[name](**kw)
    return randomise(module), inputs, twin


def outputs(module: torch.nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    out = module(*inputs)
    return list(out) if isinstance(out, tuple) else [out]
