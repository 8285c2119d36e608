"""The dropout of attention's kernels (csrc/cpu/dropout.h) for any block of weights, in torch operations.

    weight (b, h, t, s) stays where word s / 16 % 4 of Philox4x32-10(counter, key = seed) is at least p 2^32,
    counter = (s / 64 * 16 + s % 16, t, h, b)

_C.attention_dropout starts at position 0 of all four; a block of rows costs the memory of the block here. Philox:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_TILE, _LANES = 64, 16  # 16 counters give the words of 64 keys


def _philox(c0, c1, c2, c3, k0: int, k1: int) -> tuple[Tensor, ...]:
    """Ten rounds on words of 32 bits, held in int64: its products wrap, so their 64 bits are right."""
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> 32 & _LOW) ^ c1 ^ k0, second & _LOW, (first >> 32 & _LOW) ^ c3 ^ k1, first & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def kept(seed: Tensor, dropout_p: float, b: Tensor, heads: int, t: Tensor, keys: slice) -> Tensor:
    """bool [B, H, n, keys]: the weights that stay, of sequences b [B] and queries t [n] (int64), for these keys."""
    first, last = keys.start // _TILE, -(-keys.stop // _TILE)
    key = int(seed.item())
    words = _philox(
        torch.arange(first * _LANES, last * _LANES, device=t.device),
        t[:, None],
        torch.arange(heads, device=t.device)[:, None, None],
        b[:, None, None, None],
        key & _LOW,
        key >> 32 & _LOW,
    )
    tiles = torch.stack([word.unflatten(3, (last - first, _LANES)) for word in words], 4).flatten(3)
    return tiles[..., keys.start - first * _TILE : keys.stop - first * _TILE] >= int(dropout_p * 2.0**32)


def factors(seed: Tensor, dropout_p: float, *position, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies these weights by: 1 / (1 - p) where kept(...), else 0."""
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return kept(seed, dropout_p, *position).to(dtype) * factor
