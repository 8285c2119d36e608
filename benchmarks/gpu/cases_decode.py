"""Decoding: one query or a few against long caches, and chunks of a prompt with few heads."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import OURS, Case, Maker, Source
from benchmarks.gpu.cases_attention import flops, moved
from benchmarks.gpu.makers import library, sdpa

BF16 = torch.bfloat16
ONE = [  # B, H, G, T, S, D
    *((8, 64, 8, 1, 2048, 128), (1, 64, 8, 1, 4096, 128), (32, 64, 8, 1, 8192, 128), (8, 64, 8, 1, 32768, 128)),
    *((8, 12, 12, 1, 1024, 64), (32, 64, 8, 1, 512, 128)),
]
FEW = [
    *((8, 64, 8, 8, 8192, 128), (32, 64, 8, 4, 8192, 128), (1, 64, 8, 16, 32768, 128), (8, 32, 8, 2, 4096, 64)),
    (32, 64, 8, 16, 2048, 128),
]
CHUNKS = [(1, 8, 8, 256, 131072, 128), (1, 16, 2, 256, 131072, 128)]
TINY_CASES = [(2, 4, 2, 1, 40, 8), (2, 4, 2, 3, 40, 8)]


def lower_right(T: int, S: int, device: torch.device) -> Tensor:
    """Query t sees keys up to S - T + t."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA with a mask, none for one query, keys shared by a group of heads."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if q.shape[2] == 1 else mask, enable_gqa=gqa)


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same with the heads of a group as rows of one: [B, G, H/G T, D]. Backends without groups read a key once."""
    B, H, T, D = q.shape
    rows = q.reshape(B, k.shape[1], -1, D)
    seen = None if T == 1 else mask.repeat(H // k.shape[1], 1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=seen).reshape(B, H, T, D)


def causal_lower_right(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The mask by name: FLASH takes it so, and takes no tensor."""
    from torch.nn.attention.bias import causal_lower_right as bias

    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias(q.shape[2], k.shape[2]), enable_gqa=gqa)


def _flash_attn() -> Callable[..., Any]:
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)

    return attend


def _ours() -> Callable[..., Any]:
    import pykern

    lengths: dict[tuple, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        B, S = k.shape[0], k.shape[2]
        if (B, S) not in lengths:
            lengths[B, S] = torch.full((B,), S, dtype=torch.int32, device=k.device)
        return pykern.attention_with_kvcache(q, k, v, cache_seqlens=lengths[B, S])

    return attend


def attention_makers(T: int, grouped_heads: bool) -> dict[str, Maker]:
    if T == 1:
        makers = sdpa(grouped)
    else:
        makers = {**sdpa(causal_lower_right, ("sdpa flash",)), **sdpa(grouped, ("sdpa cudnn", "sdpa efficient"))}
    if grouped_heads:
        makers |= {f"{who} folded": make for who, make in sdpa(folded).items() if T == 1 or who != "sdpa flash"}
    return {**makers, **library("flash_attn", "flash_attn", _flash_attn), OURS: _ours}


def attention_cases(tiny: bool) -> Iterator[Case]:
    """Keys and values are read, next to nothing is written."""
    tables = (("G9", 1, ONE), ("G10", 1, FEW), ("G10", 1, CHUNKS))
    for goal, priority, shapes in (("G9", 1, TINY_CASES[:1]), ("G10", 1, TINY_CASES[1:])) if tiny else tables:
        for i, (B, H, G, T, S, D) in enumerate(shapes):
            yield Case(
                "attention to a cache" if T <= 16 else "chunk of a prompt",
                goal,
                priority + i // 3,
                BF16,
                f"B{B} H{H} G{G} T{T} S{S} D{D}",
                moved(B, H, G, T, S, D, "forward"),
                flops(B, H, D, T * (S - (T - 1) / 2), "forward"),
                lambda source, shape=(B, H, G, T, S, D): _caches(source, *shape),
                attention_makers(T, H != G),
                ("attention_with_kvcache",),
                traffic="read",
            )


def _caches(source: Source, B: int, H: int, G: int, T: int, S: int, D: int) -> tuple:
    caches = [source.constant(B, G, S, D) for _ in "kv"]
    return source.constant(B, H, T, D), *caches, lower_right(T, S, source.device)


def cases(tiny: bool) -> Iterator[Case]:
    yield from attention_cases(tiny)
