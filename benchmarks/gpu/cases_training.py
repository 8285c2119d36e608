"""Cross-entropy, the head with its loss, AdamW: what follows the last layer of a training step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.case import FORWARD, OURS, TRAINING, Case, Maker, Source
from benchmarks.gpu.makers import eager, library, ours, rivals
from benchmarks.models import GPT2, TINY, Model, parameter_bytes
from benchmarks.plain_gpt import PlainGPT

BF16 = torch.bfloat16
LR, MAX_NORM = 1e-3, 1.0
LOGITS = [(8192, 50304), (4096, 128256), (16384, 32000)]  # M, V
HEADS = [(8192, 768, 50304), (4096, 4096, 128256), (16384, 2048, 32000)]  # M, K, V
CHUNK_BYTES = 40e6  # of logits: they stay in the L2 cache until their gradient takes their place


def _liger_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda logits, target: LigerCrossEntropyFunction.apply(logits, target, None, -100)[0]


def _liger_head() -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda x, weight, target: LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


def loss_cases(tiny: bool) -> Iterator[Case]:
    """The loss alone reads the logits; with its gradient they are read once more and written."""
    for i, (M, V) in enumerate([(6, 40)] if tiny else LOGITS):
        for mode, passes in ((TRAINING, 3), (FORWARD, 1)):
            yield Case(
                "cross_entropy",
                "G12",
                1 + min(i, 1) + (mode == FORWARD),
                BF16,
                f"M{M} V{V}",
                float(passes * M * V * BF16.itemsize),
                0.0,
                lambda source, M=M, V=V: (source.leaf(M, V, spread=3.0), source.integers(V, M)),
                {
                    **rivals(F.cross_entropy),
                    **library("liger_kernel", "liger", _liger_cross_entropy),
                    OURS: ours("cross_entropy"),
                },
                ("cross_entropy_forward", "cross_entropy_backward"),
                mode,
                "copy" if mode == TRAINING else "read",
            )


def head(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


class _ChunkedHead(torch.autograd.Function):
    """The head in chunks of rows whose logits stay in the L2 cache; gradients are made in forward, as Liger does."""

    @staticmethod
    def forward(ctx, x, weight, target):
        rows = max(1, int(CHUNK_BYTES / (weight.shape[0] * x.element_size())))
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        for i in range(0, x.shape[0], rows):
            part, labels = x[i : i + rows], target[i : i + rows]
            logits = part @ weight.T
            lse = torch.logsumexp(logits.float(), -1)
            total += (lse - logits.gather(-1, labels[:, None])[:, 0].float()).sum()
            dlogits = torch.exp(logits.float() - lse[:, None])
            dlogits.scatter_add_(-1, labels[:, None], -torch.ones_like(lse)[:, None])
            dlogits = (dlogits / x.shape[0]).to(x.dtype)
            dx[i : i + rows] = dlogits @ weight
            dweight += (dlogits.T @ part).float()
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return total / x.shape[0]

    @staticmethod
    def backward(ctx, dout):
        dx, dweight = ctx.saved_tensors
        return dx * dout, dweight * dout, None


def head_cases(tiny: bool) -> Iterator[Case]:
    """Three products forward and backward together; logits are not counted as traffic: they need not exist."""
    for i, (M, K, V) in enumerate([(6, 16, 40)] if tiny else HEADS):
        yield Case(
            "linear_cross_entropy",
            "G12",
            1 + i,
            BF16,
            f"M{M} K{K} V{V}",
            float(3 * BF16.itemsize * (M * K + V * K)),
            6.0 * M * K * V,
            lambda source, M=M, K=K, V=V: (
                source.leaf(M, K),
                source.leaf(V, K, spread=K**-0.5),
                source.integers(V, M),
            ),
            {
                **rivals(head),
                "torch chunked": eager(_ChunkedHead.apply),
                **library("liger_kernel", "liger", _liger_head),
                OURS: ours("linear_cross_entropy"),
            },
            ("linear_cross_entropy",),
            TRAINING,
        )


def parameters(source: Source, model: Model, dtype: torch.dtype) -> tuple[nn.Parameter, ...]:
    """Those of a model with gradients of a norm that is clipped."""
    with torch.device("meta"):
        shapes = [p.shape for p in PlainGPT(**model.sizes).parameters()]
    found = tuple(nn.Parameter(source.constant(*shape, dtype=dtype, spread=0.02)) for shape in shapes)
    for p in found:
        p.grad = source.constant(*p.shape, dtype=dtype, spread=10 / model.parameters**0.5)
    return found


def optimiser(update: Callable[[list[nn.Parameter]], Callable[[], object]]) -> Maker:
    """update(parameters) -> step(); each contestant steps a copy of its own, and returns the parameters."""

    def make() -> Callable[..., Any]:
        own: list[nn.Parameter] = []
        steps: list[Callable[[], object]] = []

        def step(*given: nn.Parameter) -> list[Tensor]:
            if not own:
                for p in given:
                    own.append(nn.Parameter(p.detach().clone()))
                    own[-1].grad = p.grad.clone()  # which clipping changes
                steps.append(update(own))
            steps[0]()
            return [p.detach() for p in own]

        return step

    return make


def _ours_step(max_norm: float | None) -> Maker:
    def update(own: list[nn.Parameter]) -> Callable[[], object]:
        from pykern.optim import AdamW

        return AdamW(own, lr=LR, max_norm=max_norm).step

    return optimiser(update)


def _fused(own: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(own, lr=LR, fused=True, capturable=own[0].is_cuda)


def _torch_step(own: list[nn.Parameter], clip: bool) -> Callable[[], object]:
    optimizer = _fused(own)

    def step() -> None:
        if clip:
            nn.utils.clip_grad_norm_(own, MAX_NORM)
        optimizer.step()

    return step


def _torch_masters(own: list[nn.Parameter]) -> Callable[[], object]:
    """16-bit weights as torch users keep them: float32 masters, stepped by the fused AdamW, and copies around it."""
    masters = [nn.Parameter(p.detach().float()) for p in own]
    for m in masters:
        m.grad = torch.empty_like(m)
    optimizer = _fused(masters)

    def step() -> None:
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in own])
        optimizer.step()
        torch._foreach_copy_([p.detach() for p in own], [m.detach() for m in masters])

    return step


def adamw_cases(tiny: bool) -> Iterator[Case]:
    model = TINY if tiny else GPT2
    for dtype, clip in ((torch.float32, False), (torch.float32, True), (BF16, False)):
        makers: dict[str, Maker] = {}
        if dtype == BF16:
            makers["torch fused + copies"] = optimiser(_torch_masters)
        else:
            makers["torch fused"] = optimiser(lambda own, clip=clip: _torch_step(own, clip))
        makers[OURS] = _ours_step(MAX_NORM if clip else None)
        yield Case(
            f"AdamW{' clipped' if clip else ''}{' masters' if dtype == BF16 else ''}",
            "G13",
            2 if clip else 1,
            dtype,
            model.name,
            float(parameter_bytes(dtype, clip) * model.parameters),
            0.0,
            lambda source, dtype=dtype: parameters(source, model, dtype),
            makers,
            ("adamw", "square_sum") if clip else ("adamw",),
            one_set=True,
        )


def cases(tiny: bool) -> Iterator[Case]:
    yield from loss_cases(tiny)
    yield from head_cases(tiny)
    yield from adamw_cases(tiny)
