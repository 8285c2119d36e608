"""Philox4x32-10 in numpy, and what dropout keeps by it: the oracle of the kernels' generator.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the Random123 library's constants.
"""

import numpy as np
import torch

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # the golden ratio, and sqrt 3 - 1
LOW, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter, key):
    """Four arrays of 32-bit words, from four (broadcastable) arrays of counter words and two numbers of key."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    for turn in range(10):
        k0, k1 = (np.uint64((k + turn * w) & 0xFFFFFFFF) for k, w in zip(key, WEYL, strict=True))
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> WORD) ^ c1 ^ k0, second & LOW, (first >> WORD) ^ c3 ^ k1, first & LOW
    return c0, c1, c2, c3


def kept(seed, B, H, T, S, dropout_p):
    """bool [B,H,T,S]: True where the weight of key s for query t of head h in sequence b stays."""
    b, h, t, s = np.ogrid[:B, :H, :T, :S]
    words = philox((s // 64 * 16 + s % 16, t, h, b), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    word = np.choose(np.broadcast_to(s // 16 % 4, words[0].shape), words)
    return torch.from_numpy(word >= np.uint64(int(dropout_p * 2.0**32)))
