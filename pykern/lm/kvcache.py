"""The keys and values of the tokens seen so far, in pages that texts may share."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pykern import ops
from pykern.ops._library import empty_packed

PAGE = 64  # keys; a tile of the attention kernel is read where it lies when it is within one page


def quantise_row(row: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of row [n_kv_head, head size]: the bits of int8 as uint8, and float32 [n_kv_head]; NaN where a number
    is not finite."""
    row = row.float()
    finite = row.isfinite().all(-1)
    scale = torch.where(finite, row.abs().amax(-1) / 127, torch.nan)
    q = (row / torch.where(scale > 0, scale, torch.inf)[:, None]).round().nan_to_num(0.0)
    return q.to(torch.int8).view(torch.uint8), scale


class KVCache:
    """k, v [n_layer, pages, n_kv_head, page, head size]: key s of text b is slot s % page of page table[b, s // page].

    A text holds at most `capacity` tokens, and all of them together as many as there are pages, by default enough for
    every text to be full. Pages are taken as texts grow. fork() lets two texts share pages; the one that writes first
    into a shared page gets a copy of it. Written keys count once advance() says so, which is the last thing a forward
    pass does: a pass that fails half-way leaves the cache as it was.

    tables_on: the device of table and lengths, that of k and v when None.
    dtype torch.int8 stores a key as k_scale times its numbers (uint8 here, the bits of int8), which are those of
    k / k_scale to the nearest integer, k_scale = max |k| / 127; values likewise.
    ValueError: a cache or pool that is full, shapes. TypeError: k or v of another dtype. IndexError: no such text.
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
        *,
        page: int = PAGE,
        pages: int | None = None,
        tables_on: torch.device | str | None = None,
    ) -> None:
        if min(n_layer, batch, n_kv_head, capacity, head_size, page) < 1:
            raise ValueError(
                f"KVCache: sizes must be positive, not n_layer {n_layer}, batch {batch}, n_kv_head {n_kv_head},"
                f" capacity {capacity}, head_size {head_size}, page {page}"
            )
        self.capacity, self.page = capacity, page
        per_text = -(-capacity // page)
        pages = batch * per_text if pages is None else pages
        if pages < 1:
            raise ValueError(f"KVCache: pages is {pages} but must be at least 1")
        stored = torch.uint8 if dtype == torch.int8 else dtype
        like = torch.empty(0, dtype=stored, device=device)
        self.k = empty_packed(like, (n_layer, pages, n_kv_head, page, head_size)).zero_()
        self.v = empty_packed(self.k).zero_()
        self.k_scale = self.v_scale = None
        if dtype == torch.int8:
            self.k_scale = torch.zeros(n_layer, pages, n_kv_head, page, device=device)
            self.v_scale = torch.zeros_like(self.k_scale)
        tables_on = device if tables_on is None else tables_on
        self.table = torch.zeros(batch, per_text, dtype=torch.int32, device=tables_on)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=tables_on)
        self._pages: list[list[int]] = [[] for _ in range(batch)]  # of each text, in order
        self._users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def batch(self) -> int:
        return self.table.shape[0]

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def _chosen(self, texts: list[int] | None) -> tuple[list[int], list[int]]:
        """The texts, all when None, and their lengths."""
        if texts is None:
            return list(range(self.batch)), self.lengths.tolist()
        return texts, self.lengths[texts].tolist()

    def _needed(self, text: int, length: int, n: int) -> int:
        """Pages that a text of this length lacks for n more tokens, a copy of a shared last page included."""
        if length + n > self.capacity:
            raise ValueError(f"KVCache: full: {n} more tokens after {length} exceed its capacity of {self.capacity}")
        pages = self._pages[text]
        lacking = max(0, -(-(length + n) // self.page) - len(pages))
        shared = n > 0 and length // self.page < len(pages) and self._users[pages[length // self.page]] > 1
        return lacking + shared

    def require(self, n: int, texts: list[int] | None = None) -> None:
        """ValueError unless n more tokens fit into each of the texts (all, when None); takes nothing."""
        chosen, lengths = self._chosen(texts)
        needed = sum(self._needed(text, length, n) for text, length in zip(chosen, lengths, strict=True))
        if needed > len(self._free):
            raise ValueError(
                f"KVCache: full: {n} more tokens in {len(chosen)} texts need {needed} pages of {self.page}, "
                f"{len(self._free)} are free"
            )

    def reserve(self, n: int, texts: list[int] | None = None) -> None:
        """Gives each of the texts the pages that n more tokens need, its own ones; or ValueError, and takes nothing."""
        self.require(n, texts)
        for text, length in zip(*self._chosen(texts), strict=True):
            pages, at = self._pages[text], length // self.page
            if n > 0 and at < len(pages) and self._users[pages[at]] > 1:
                old, new = pages[at], self._take()
                self._users[old] -= 1
                for pool in (self.k, self.v, self.k_scale, self.v_scale):
                    if pool is not None:
                        pool[:, new] = pool[:, old]
                pages[at] = new
                self.table[text, at] = new
            while len(pages) * self.page < length + n:
                pages.append(self._take())
                self.table[text, len(pages) - 1] = pages[-1]

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _release(self, text: int, keep: int) -> None:
        """Gives back the text's pages but the first `keep`."""
        pages = self._pages[text]
        while len(pages) > keep:
            page = pages.pop()
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def advance(self, n: int, texts: list[int] | None = None) -> None:
        """The n tokens that every layer has stored now count."""
        chosen, lengths = self._chosen(texts)
        for text, length in zip(chosen, lengths, strict=True):
            if length + n > len(self._pages[text]) * self.page:
                raise ValueError(f"KVCache: text {text} has no pages for {n} more tokens: reserve() them first")
        self.lengths[chosen] += n

    def truncate(self, length: int, text: int | None = None) -> None:
        """Forgets all tokens of the text (of all texts, when None) from position `length` on."""
        texts, lengths = self._chosen(None if text is None else [text])
        if not 0 <= length <= min(lengths):
            raise ValueError(f"KVCache: length {length} is outside 0 .. {min(lengths)}")
        self.lengths[texts] = length
        for t in texts:
            self._release(t, -(-length // self.page))

    def reset(self) -> None:
        """Forgets all texts."""
        self.truncate(0)

    def fork(self, source: int, target: int) -> None:
        """Makes text `target` what `source` is, on the same pages; what either writes afterwards is its own."""
        for name, text in (("source", source), ("target", target)):
            if not 0 <= text < self.batch:
                raise IndexError(f"KVCache: {name} is {text} but there are {self.batch} texts")
        if source == target:
            return
        self._release(target, 0)
        for at, page in enumerate(self._pages[source]):
            self._users[page] += 1
            self._pages[target].append(page)
            self.table[target, at] = page
        self.lengths[target] = self.lengths[source]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds n tokens to every text: k, v [n_layer, batch, n_kv_head, n, head size] in the cache's dtype, floating
        where that is int8."""
        expected = (self.k.shape[0], self.batch, self.k.shape[2], k.shape[3] if k.dim() == 5 else -1, self.k.shape[4])
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != expected:
                raise ValueError(f"KVCache: {name} has shape {tuple(x.shape)} but must be {expected}")
            if x.dtype != self.k.dtype if self.k_scale is None else not x.is_floating_point():
                raise TypeError(f"KVCache: {name} is {x.dtype} but the cache {self.k.dtype}")
        self.reserve(k.shape[3])
        for layer in range(len(k)):
            self._store(layer, k[layer], v[layer])
        self.advance(k.shape[3])

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [batch, n_kv_head, n, head size] behind the texts, in one layer; they do not count yet."""
        for text in range(self.batch):
            for i in range(k.shape[2]):
                at = int(self.lengths[text]) + i
                page, slot = self._pages[text][at // self.page], at % self.page
                for x, pool, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
                    row = x[text, :, i]
                    if scales is not None:
                        row, scales[layer, page, :, slot] = quantise_row(row)
                    pool[layer, page, :, slot] = row

    def _read(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """k, v [..., page, head size] in dtype, for pages of any shape [...]."""
        read = []
        for pool, scales in ((self.k, self.k_scale), (self.v, self.v_scale)):
            numbers = pool[layer, pages]
            if scales is not None:
                numbers = numbers.view(torch.int8).float() * scales[layer, pages][..., None]
            read.append(numbers.to(dtype))
        return read[0], read[1]

    def keys_and_values(self, layer: int, text: int) -> tuple[Tensor, Tensor]:
        """k, v [n_kv_head, length, head size] of one text in one layer: copies, float32 where the cache is int8."""
        pages = self.table[text, : len(self._pages[text])].long()
        length, dtype = int(self.lengths[text]), self.k.dtype if self.k_scale is None else torch.float32
        k, v = (x.transpose(0, 1).flatten(1, 2)[:, :length] for x in self._read(layer, pages, dtype))
        return k, v

    # ---- the `cache` argument of pykern.nn's blocks

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

        bias, broadcastable to [B, n_head, T, length + T], is added to the scores: all texts then have one length.
        alibi_slopes are those of attention. The pages must have been reserved. An int8 cache: texts of one length, too.
        """
        if bias is None and self.k_scale is None:
            return ops.attention_with_kvcache(
                *(q, self.k[i], self.v[i], k, v),
                cache_seqlens=self.lengths,
                block_table=self.table,
                alibi_slopes=alibi_slopes,
                causal=True,
            )
        self._store(i, k, v)
        S = self.length + k.shape[2]
        pages = self.table[:, : -(-S // self.page)].long()
        keys, values = (x.transpose(1, 2).flatten(2, 3)[:, :, :S] for x in self._read(i, pages, q.dtype))
        return ops.attention(q, keys, values, bias=bias, alibi_slopes=alibi_slopes, causal=True)
