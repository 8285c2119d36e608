"""How a model knows the order of its tokens: tables for positions start .. start + length - 1, rounded from float64."""

import torch
from torch import Tensor

from pykern.lm.config import ROPE_THETA

SINUSOID_BASE = 10000.0


def angles(start: int, length: int, pairs: int, base: float, device: torch.device) -> Tensor:
    """position * base^(-i / pairs), [length, pairs] float64."""
    position = torch.arange(start, start + length, dtype=torch.float64, device=device)
    frequency = base ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    return position[:, None] * frequency


def rotary(start: int, length: int, head_size: int, like: Tensor, base: float = ROPE_THETA) -> tuple[Tensor, Tensor]:
    """The (cos, sin) of pykern.rope, each [length, head_size / 2] float32 (float64 when like is).

    Pair i turns by position * base^(-2i / head_size).
    """
    angle = angles(start, length, head_size // 2, base, like.device)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angle.cos().to(dtype), angle.sin().to(dtype)


def sinusoids(start: int, length: int, width: int, like: Tensor) -> Tensor:
    """[length, width] in like's dtype: sin of each angle in the even columns, cos in the odd ones."""
    angle = angles(start, length, (width + 1) // 2, SINUSOID_BASE, like.device)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :width].to(like.dtype)
