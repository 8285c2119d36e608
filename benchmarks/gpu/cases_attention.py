"""Attention forward and backward: causal, full, grouped heads, masks and a learnt bias, against torch's backends."""

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import BACKWARD, FORWARD, OURS, Case, Maker, Source
from benchmarks.gpu.makers import compiled, eager, library, pinned, same_bits, sdpa

BF16 = torch.bfloat16
KERNELS = {FORWARD: ("attention_forward",), BACKWARD: ("attention_forward", "attention_backward")}
# B, H, G, T, D: 16k to 32k tokens each, and GPT-2's. The first two of a goal are timed before all others.
CAUSAL = {
    "G5": [
        *((2, 16, 16, 8192, 64), (32, 12, 12, 1024, 64), (8, 16, 16, 2048, 64), (4, 32, 8, 4096, 64)),
        (32, 16, 16, 512, 64),
    ],
    "G4": [
        *((2, 16, 16, 8192, 128), (8, 16, 16, 2048, 128), (1, 64, 8, 4096, 128), (1, 16, 16, 16384, 128)),
        (32, 16, 16, 512, 128),
    ],
}
FULL = {"G4": [(4, 16, 16, 4096, 128), (32, 16, 16, 512, 128)], "G5": [(4, 16, 16, 4096, 64), (32, 12, 12, 512, 64)]}
TINY = [(2, 4, 2, 16, 8)]
MASKED = [(2, 16, 4096, 64), (2, 16, 4096, 128)]  # B, H, T, D
TINY_MASKED = [(2, 2, 64, 8)]


def flops(B: int, H: int, D: int, pairs: float, mode: str) -> float:
    """Two products over the pairs of query and key that are seen, five backward."""
    return (4.0 if mode == FORWARD else 10.0) * B * H * D * pairs


def moved(B: int, H: int, G: int, T: int, S: int, D: int, mode: str) -> float:
    """q, k, v, out; backward reads those and dout, and writes dq, dk, dv."""
    queries, keys = B * H * T * D, B * G * S * D
    return float(BF16.itemsize * ((2 * queries + 2 * keys) if mode == FORWARD else (4 * queries + 4 * keys)))


def qkv(B: int, H: int, G: int, T: int, S: int, D: int) -> Callable[[Source], tuple]:
    return lambda source: (source.leaf(B, H, T, D), source.leaf(B, G, S, D), source.leaf(B, G, S, D))


def _ours(**options: Any) -> Maker:
    def make() -> Callable[..., Any]:
        import pykern

        return lambda q, k, v: pykern.attention(q, k, v, **options)

    return make


def _flash_attn(causal: bool) -> dict[str, Maker]:
    """flash_attn's function on [B, T, H, D]; the transpositions are views."""

    def make() -> Callable[..., Any]:
        function = importlib.import_module("flash_attn").flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)

        return attend

    return library("flash_attn", "flash_attn", make)


def plain_cases(tiny: bool) -> Iterator[Case]:
    for causal, table in ((True, CAUSAL), (False, FULL)):
        for goal, shapes in table.items():
            for i, (B, H, G, T, D) in enumerate(TINY if tiny else shapes):
                if tiny and goal == "G5":
                    continue
                attend = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=H != G)
                flash = {"sdpa flash deterministic": same_bits(pinned("sdpa flash", attend))}
                for mode in (FORWARD, BACKWARD):
                    others = {**sdpa(attend), **(flash if mode == BACKWARD else {}), **_flash_attn(causal)}
                    yield Case(
                        f"attention {'causal' if causal else 'full'}",
                        goal if mode == FORWARD else "G6",
                        (1 if i < 2 and causal else 2) + (i == 3),
                        BF16,
                        f"B{B} H{H} G{G} T{T} D{D}",
                        moved(B, H, G, T, T, D, mode),
                        flops(B, H, D, T * T * (0.5 if causal else 1.0), mode),
                        qkv(B, H, G, T, T, D),
                        {**others, OURS: _ours(causal=causal)},
                        KERNELS[mode],
                        mode,
                    )


def _random_blocks(block: int, part: float, causal: bool) -> Callable[..., Any]:
    """Blocks of pairs, seen or not by a hash of where they are; the diagonal always is."""

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        row, column = i // block, j // block
        number = (row * 7919 + column * 104729) % 1000
        chosen = (number < 1000 * part) | (row == column)
        return chosen & (j <= i) if causal else chosen

    return seen


def mask_rules(T: int) -> dict[str, Callable[..., Any]]:
    """seen(b, h, i, j) for key j and query i: what FlexAttention takes, and what makes the bool mask of the others."""
    document, prefix, window, sink, block = T // 8, T // 4, T // 16, max(1, T // 512), max(1, T // 16)
    return {
        "documents": lambda b, h, i, j: (i // document == j // document) & (j <= i),
        "prefix": lambda b, h, i, j: (j <= i) | (j < prefix),
        "window + sink": lambda b, h, i, j: (j <= i) & ((j > i - window) | (j < sink)),
        "random blocks": _random_blocks(block, 0.15, True),
    }


def bool_mask(rule: Callable[..., Any], T: int, device: torch.device) -> Tensor:
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    return rule(0, 0, i, j).expand(T, T)


def flex(rule: Callable[..., Any], T: int) -> Maker:
    """FlexAttention with a block mask, compiled; the mask is made once, as a training loop would."""

    def make() -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        function = compiled(flex_attention)()
        masks: list[Any] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            if not masks:
                masks.append(create_block_mask(rule, None, None, T, T, device=q.device))
            return function(q, k, v, block_mask=masks[0])

        return attend

    return make


def masked_cases(tiny: bool) -> Iterator[Case]:
    """Pairs that are hidden do not count as work; a bool mask counts as bytes for nobody."""

    def mine() -> Callable[..., Any]:
        import pykern

        return lambda q, k, v, mask: pykern.attention(q, k, v, mask=mask)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    for n, (B, H, T, D) in enumerate(TINY_MASKED if tiny else MASKED):
        for name, rule in mask_rules(T).items():
            pairs = int(bool_mask(rule, T, torch.device("cpu")).sum())
            for mode in (FORWARD, BACKWARD):
                yield Case(
                    f"attention, {name}, {pairs / T / T:.0%} of the pairs",
                    "G7",
                    2 + 2 * n + (name == "window + sink"),  # compiling FlexAttention takes long
                    BF16,
                    f"B{B} H{H} T{T} D{D}",
                    moved(B, H, H, T, T, D, mode),
                    flops(B, H, D, pairs, mode),
                    lambda source, shape=(B, H, H, T, T, D), rule=rule, T=T: (
                        *qkv(*shape)(source),
                        bool_mask(rule, T, source.device),
                    ),
                    {
                        **sdpa(attend, ("sdpa efficient", "sdpa cudnn")),
                        "flex attention": flex(rule, T),
                        OURS: mine,
                    },
                    KERNELS[mode],
                    mode,
                )


def bias_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * (1 / math.sqrt(q.shape[-1])) + bias, -1) @ v


def bias_cases(tiny: bool) -> Iterator[Case]:
    """A bias [1, H, T, T] that is learnt: its gradient is summed over the batch."""

    def mine() -> Callable[..., Any]:
        import pykern

        return lambda q, k, v, bias: pykern.attention(q, k, v, bias=bias)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1))

    for B, H, T, D in TINY_MASKED if tiny else [(4, 16, 2048, 64)]:
        for mode in (FORWARD, BACKWARD):
            yield Case(
                *("attention, learnt bias", "G8", 2, BF16, f"B{B} H{H} T{T} D{D}"),
                moved(B, H, H, T, T, D, mode) + (1 if mode == FORWARD else 2) * H * T * T * BF16.itemsize,
                flops(B, H, D, T * T, mode),
                lambda source, shape=(B, H, H, T, T, D), H=H, T=T: (*qkv(*shape)(source), source.leaf(1, H, T, T)),
                {"torch": eager(bias_attention), **sdpa(attend, ("sdpa efficient", "sdpa cudnn")), OURS: mine},
                *(KERNELS[mode], mode),
            )


def cases(tiny: bool) -> Iterator[Case]:
    yield from plain_cases(tiny)
    yield from masked_cases(tiny)
    yield from bias_cases(tiny)
