"""AdamW over all parameters of a model, alone and with clipping of the gradients' norm.

torch's is AdamW(fused=True), after clip_grad_norm_. bfloat16 parameters with float32 masters are pykern's alone:
torch's AdamW keeps the moments of a bfloat16 parameter in bfloat16 and has no master weights.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.models import GPT2, TINY, Model, parameter_bytes
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import OURS, Case, numbers

LR, MAX_NORM = 1e-3, 1.0
GRADIENT_NORM = 10.0  # more than MAX_NORM: the first step is clipped


def parameters(model: Model, dtype: torch.dtype) -> list[nn.Parameter]:
    """The parameters of a model with gradients of norm GRADIENT_NORM, the same for each call."""
    with torch.device("meta"):
        shapes = [p.shape for p in PlainGPT(**model.sizes).parameters()]
    found = [nn.Parameter(numbers(*s, dtype=dtype, spread=0.02, seed=i)) for i, s in enumerate(shapes)]
    spread = GRADIENT_NORM / model.parameters**0.5
    for i, p in enumerate(found):
        p.grad = numbers(*p.shape, dtype=dtype, spread=spread, seed=1000 + i)
    return found


def update(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, clip: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """One step, clipped by a call of torch's where `clip` says so; returns the parameters and both moments."""

    def step():
        if clip:
            nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return *params, *(optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq"))

    return step


def build(model: Model, dtype: torch.dtype, clip: bool):
    from pykern.optim import AdamW

    ours = parameters(model, dtype)
    contestants = {OURS: update(ours, AdamW(ours, lr=LR, max_norm=MAX_NORM if clip else None), False)}
    if dtype == torch.float32:
        theirs = parameters(model, dtype)
        contestants["torch fused"] = update(theirs, torch.optim.AdamW(theirs, lr=LR, fused=True), clip)
    return contestants


def cases(quick: bool) -> Iterator[Case]:
    model = TINY if quick else GPT2
    for dtype in (torch.float32, torch.bfloat16):
        for clip in (False, True):
            yield Case(
                f"{model.name}{' masters' if dtype != torch.float32 else ''}{' clipped' if clip else ''}",
                dtype,
                0.0,
                float(parameter_bytes(dtype, clip) * model.parameters),
                lambda dtype=dtype, clip=clip: build(model, dtype, clip),
            )
