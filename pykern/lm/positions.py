"""How a model knows the order of its tokens: tables for positions start .. start + length - 1, rounded from float64."""

import math

import torch
from torch import Tensor

ROTARY_BASE = 10000.0
SINUSOID_BASE = 10000.0


def angles(start: int, length: int, pairs: int, base: float, device: torch.device) -> Tensor:
    """position * base^(-i / pairs), [length, pairs] float64."""
    position = torch.arange(start, start + length, dtype=torch.float64, device=device)
    frequency = base ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    return position[:, None] * frequency


def rotary(start: int, length: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The (cos, sin) of pykern.rope, each [length, head_size / 2] float32 (float64 when like is)."""
    angle = angles(start, length, head_size // 2, ROTARY_BASE, like.device)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angle.cos().to(dtype), angle.sin().to(dtype)


def sinusoids(start: int, length: int, width: int, like: Tensor) -> Tensor:
    """[length, width] in like's dtype: sin of each angle in the even columns, cos in the odd ones."""
    angle = angles(start, length, (width + 1) // 2, SINUSOID_BASE, like.device)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :width].to(like.dtype)


def alibi_slopes(n_head: int) -> Tensor:
    """[n_head] float64: 2^(-8 i / n) for n a power of two; otherwise every other slope of the next power fills up."""
    power = 1 << (n_head.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (n_head - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64)


def alibi(start: int, length: int, n_head: int, like: Tensor) -> Tensor:
    """-slope * |query position - key position|, [n_head, length, start + length] in like's dtype: a bias."""
    query = torch.arange(start, start + length, dtype=torch.float64, device=like.device)
    key = torch.arange(start + length, dtype=torch.float64, device=like.device)
    slopes = alibi_slopes(n_head).to(like.device)
    return (-slopes[:, None, None] * (query[:, None] - key).abs()).to(like.dtype)


def t5_buckets(start: int, length: int, buckets: int, device: torch.device) -> Tensor:
    """[length, start + length] int64: the bucket of each (query, key) distance, 0 for keys ahead of the query.

    The first half of the buckets are the distances 0, 1, 2, ... themselves; the others widen, evenly in log(distance),
    up to distance 128 and beyond.
    """
    exact, furthest = buckets // 2, 128
    query = torch.arange(start, start + length, device=device)
    distance = (query[:, None] - torch.arange(start + length, device=device)).clamp_min(0)
    scale = (buckets - exact) / math.log(furthest / exact)
    wide = exact + ((distance.clamp_min(1).double() / exact).log() * scale).long()
    return torch.where(distance < exact, distance, wide.clamp_max(buckets - 1))
