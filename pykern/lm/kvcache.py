"""The keys and values of the tokens seen so far, so that a new token attends to them without computing them again."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pykern import ops


class KVCache:
    """k, v [n_layer, B, n_kv_head, capacity, head size]; the first `length` slots of every sequence are filled.

    attend() writes new keys and values behind the filled slots; they count once advance() says so, which is the last
    thing a forward pass does: a pass that fails half-way leaves the cache as it was.
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if min(n_layer, batch, n_kv_head, capacity, head_size) < 1:
            raise ValueError(
                f"KVCache: sizes must be positive, not n_layer {n_layer}, batch {batch}, n_kv_head {n_kv_head},"
                f" capacity {capacity}, head_size {head_size}"
            )
        self.k = torch.zeros(n_layer, batch, n_kv_head, capacity, head_size, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    def require(self, n: int) -> None:
        """ValueError unless n more tokens fit."""
        if self.length + n > self.capacity:
            raise ValueError(
                f"KVCache: full: {n} more tokens after {self.length} exceed its capacity of {self.capacity}"
            )

    def layer(self, i: int):
        """attend() of layer i, the `cache` argument of a block."""
        return partial(self.attend, i)

    def attend(
        self,
        i: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Any:
        """Stores k, v [B, n_kv_head, T, head size]; causal attention of q [B, n_head, T, head size] over all keys.

        bias, broadcastable to [B, n_head, T, length + T], is added to the scores; alibi_slopes are those of attention.
        """
        self.require(k.shape[2])
        if bias is None:
            return ops.attention_with_kvcache(
                q, self.k[i], self.v[i], k, v, cache_seqlens=self.seqlens, alibi_slopes=alibi_slopes, causal=True
            )
        end = self.length + k.shape[2]
        self.k[i, :, :, self.length : end] = k
        self.v[i, :, :, self.length : end] = v
        keys, values = self.k[i, :, :, :end], self.v[i, :, :, :end]
        return ops.attention(q, keys, values, bias=bias, alibi_slopes=alibi_slopes, causal=True)

    def advance(self, n: int) -> None:
        """The n tokens that every layer has stored now count."""
        self.require(n)
        self.truncate(self.length + n)

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        if not 0 <= length <= self.capacity:
            raise ValueError(f"KVCache: length {length} is outside 0 .. {self.capacity}")
        self.length = length
        self.seqlens.fill_(length)

    def reset(self) -> None:
        self.truncate(0)
