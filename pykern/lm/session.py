"""A running text: prefill it, then step token by token, reading the cache instead of computing the past again."""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pykern.lm.kvcache import KVCache
from pykern.lm.sampling import Sampler

if TYPE_CHECKING:
    from pykern.lm.model import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Session:
    """The model in evaluation mode with a cache for `batch` texts of the same length, at most max_len tokens.

    dtype "float32" or "bfloat16". When it is the model's own, the session reads the model's weights in place; otherwise
    it holds a converted copy. In float32 and bfloat16 alike the logits are those of the full forward pass, bit for bit.
    """

    def __init__(
        self, model: "Transformer", dtype: str = "float32", max_len: int | None = None, batch: int = 1
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"session: dtype is {dtype!r} but must be one of {', '.join(DTYPES)}")
        config = model.config
        max_len = config.block_size if max_len is None else max_len
        if not 1 <= max_len <= config.block_size:
            raise ValueError(f"session: max_len is {max_len} but must be from 1 to block_size {config.block_size}")
        if batch < 1:
            raise ValueError(f"session: batch is {batch} but must be at least 1")
        same = {id(p): p for p in model.parameters()} if model.dtype == DTYPES[dtype] else {}
        self.model = copy.deepcopy(model, same).to(DTYPES[dtype]).eval()
        self.cache = KVCache(
            config.n_layer, batch, config.kv_heads, max_len, config.head_size, DTYPES[dtype], model.device
        )

    @property
    def batch(self) -> int:
        return self.cache.batch

    @property
    def max_len(self) -> int:
        return self.cache.capacity

    @property
    def length(self) -> int:
        """How many tokens of each text are in the cache."""
        return self.cache.length

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Appends ids [batch, T] int64 to the texts; logits [batch, V] after the last. A refusal changes nothing."""
        if ids.dim() != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise ValueError(
                f"session: ids have shape {tuple(ids.shape)} but must be [{self.batch}, T] with T at least 1"
            )
        if ids.dtype != torch.int64:
            raise TypeError(f"session: ids have dtype {ids.dtype} but must be int64")
        return self.model.logits(self.model.hidden(ids, self.cache)[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Appends one token to each text, ids [batch] int64; logits [batch, V]."""
        if ids.dim() != 1:
            raise ValueError(f"session: ids have shape {tuple(ids.shape)} but must be [{self.batch}]")
        return self.prefill(ids[:, None])

    def reset(self) -> None:
        """Forgets the texts."""
        self.cache.reset()

    def stream(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Yields the tokens [batch] that follow ids [batch, T], step by step. The texts so far are forgotten first.

        When the cache is full, the last max_len / 2 tokens are read again into an empty one: a text can be of any
        length, but a token sees no further back than that.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens} but must not be negative")
        sampler = Sampler(temperature, top_k, top_p, seed, self.batch)
        return self._stream(ids, max_new_tokens, sampler)

    def _stream(self, ids: Tensor, max_new_tokens: int, sampler: Sampler) -> Iterator[Tensor]:
        self.reset()
        seen = ids[:, -self.max_len :]
        for _ in range(max_new_tokens):
            if self.length == self.max_len:
                self.reset()
                seen = seen[:, -max(1, self.max_len // 2) :]
            logits = self.prefill(seen[:, self.length :])
            token = sampler(logits)
            seen = torch.cat((seen, token[:, None]), 1)
            yield token

    def generate(
        self, ids: Tensor, *, max_new_tokens: int, callback: Callable[[Tensor], None] | None = None, **sampling
    ) -> Tensor:
        """ids [batch, T], then max_new_tokens new ones: [batch, T + max_new_tokens]. Options are those of stream().

        callback, if given, is called with each new token [batch] as it comes.
        """
        new = []
        for token in self.stream(ids, max_new_tokens=max_new_tokens, **sampling):
            if callback is not None:
                callback(token)
            new.append(token[:, None])
        return torch.cat([ids, *new], 1)


def generate(
    model: "Transformer",
    ids: Tensor,
    *,
    max_new_tokens: int,
    dtype: str = "float32",
    callback: Callable[[Tensor], None] | None = None,
    **sampling,
) -> Tensor:
    """ids [T] or [B, T] int64 followed by max_new_tokens new ones: Session.generate in a session of its own."""
    texts = ids[None] if ids.dim() == 1 else ids
    if texts.dim() != 2:
        raise ValueError(f"generate: ids have shape {tuple(ids.shape)} but must be [T] or [B, T]")
    needed = max(1, texts.shape[1] + max_new_tokens)
    session = Session(model, dtype, min(needed, model.config.block_size), texts.shape[0])
    out = session.generate(texts, max_new_tokens=max_new_tokens, callback=callback, **sampling)
    return out[0] if ids.dim() == 1 else out
