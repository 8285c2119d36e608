"""A training step: forward, backward, AdamW. bfloat16 is autocast with float32 weights."""

from collections.abc import Iterator

import torch

from benchmarks.models import GPT2, SMALL, TINY, Model
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import OURS, Case

STEPS = [(GPT2, 4, 64), (GPT2, 1, 1024), (SMALL, 8, 256)]  # model, B, T
QUICK_STEPS = [(TINY, 2, 32)]
DTYPES = (torch.float32, torch.bfloat16)
ADAMW_BYTES = 28  # per float32 parameter: reads it, its gradient and two moments, writes all but the gradient
LR = 1e-4


def moved(model: Model, B: int, T: int, item: int) -> float:
    """Weights read forward and backward, their gradients written, the optimiser's pass. Activations are not counted."""
    return float(2 * item * model.matrix_weights + 4 * model.parameters + ADAMW_BYTES * model.parameters)


def build(model: Model, B: int, T: int, dtype: torch.dtype):
    from pykern.lm import Config, Transformer
    from pykern.optim import AdamW

    text = torch.randint(model.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    ids, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step(loss, optimizer):
        def one():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                value = loss(ids, targets)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return one

    ours, plain = Transformer(Config(**model.sizes)), PlainGPT(**model.sizes)
    return {
        OURS: step(ours, AdamW(ours.parameters(), lr=LR)),
        "torch": step(plain.loss, torch.optim.AdamW(plain.parameters(), lr=LR, fused=True)),
    }


def cases(quick: bool) -> Iterator[Case]:
    for model, B, T in QUICK_STEPS if quick else STEPS:
        for dtype in DTYPES:
            yield Case(
                f"{model.name} B{B} T{T}",
                dtype,
                model.training_flops(B, T),
                moved(model, B, T, dtype.itemsize),
                lambda model=model, B=B, T=T, dtype=dtype: build(model, B, T, dtype),
            )
