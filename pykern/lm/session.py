"""A model being read: prefill its texts, then step token by token, or generate in one compiled call per few tokens."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pykern.lm.batching import Batcher, Progress
from pykern.lm.kvcache import KVCache
from pykern.lm.packing import GROUPS
from pykern.lm.sampling import BROKEN, Sampling, seeds_of
from pykern.lm.weights import compiled_model, step_dtype

if TYPE_CHECKING:
    from pykern.lm.model import Transformer

DTYPES = ("float32", "bfloat16", "int8", "int4")
CHUNK = 512  # rows of a prefill at a time
BURST_SECONDS = 0.05  # of one call of stream(): Ctrl-C and callbacks wait no longer


class Session:
    """The weights of a model, packed once for reading in order, and a paged cache for `batch` texts.

    dtype "float32" or "bfloat16": logits are those of the model's forward pass in that dtype, bit for bit, whatever
    the batch, the chunks of a prefill and the thread count. "int8" and "int4" hold quantised matrices
    (pykern.lm.packing says how) and compute in float32: logits are those of a model with the matrices that they stand
    for, to rounding, with the same bits in any batch and chunks. Embeddings, biases and norms are not quantised.
    cache_dtype "int8" stores keys and values in a quarter of float32's bytes, with an error (KVCache says which). A
    session is a copy: training the model does not change it. max_len tokens a text, block_size when None.

    On CUDA, where the model is: a generate() captures the step and the choice of its tokens as a graph, launches it
    once for each of up to 256 tokens and waits once. ids come and go on any device, logits are on the model's. A text's
    logits have the same bits alone and among others. dtype is "float32" or "bfloat16", and neither int8 caches nor
    positions "t5" are there yet.
    prefill(ids [batch, T]) and step(ids [batch]), int64, give logits [batch, V]. TypeError: other dtypes of ids.
    ValueError: options, shapes, a full cache. IndexError: ids out of range. RuntimeError: while requests run.
    Mathematics: pykern.lm.Transformer and pykern.lm.Sampling.
    """

    def __init__(
        self,
        model: "Transformer",
        dtype: str = "float32",
        max_len: int | None = None,
        batch: int = 1,
        *,
        cache_dtype: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"session: dtype is {dtype!r} but must be one of {', '.join(DTYPES)}")
        if cache_dtype not in (None, "int8"):
            raise ValueError(f"session: cache_dtype is {cache_dtype!r} but must be None, for what is computed, or int8")
        config = model.config
        max_len = config.block_size if max_len is None else max_len
        if not 1 <= max_len <= config.block_size:
            raise ValueError(f"session: max_len is {max_len} but must be from 1 to block_size {config.block_size}")
        if batch < 1:
            raise ValueError(f"session: batch is {batch} but must be at least 1")
        if model.device.type not in ("cpu", "cuda"):
            raise ValueError(f"session: the model is on {model.device}, but the compiled step runs on the CPU or CUDA")
        if model.device.type == "cuda":
            missing = {
                f"dtype {dtype}": dtype in GROUPS,
                "cache_dtype int8": cache_dtype is not None,
                "a model with positions t5": config.positions == "t5",
            }
            for what, wanted in missing.items():
                if wanted:
                    raise ValueError(f"session: {what} has no CUDA kernel yet; move the model to the CPU")
        self.config, self.dtype, self.max_len, self.batch = config, dtype, max_len, batch
        self.device = model.device
        self._logits_dtype = step_dtype(dtype)
        stored = self._logits_dtype if cache_dtype is None else torch.int8
        sizes = (config.n_layer, batch, config.kv_heads, max_len, config.head_size)
        self.cache = KVCache(*sizes, stored, self.device, tables_on="cpu")
        with torch.no_grad():
            self._model, self.weight_bytes = compiled_model(model, dtype, max_len, self.cache)
        self._batcher = Batcher(self)

    @property
    def length(self) -> int:
        """How many tokens of each text are in the cache."""
        return self.cache.length

    def check_ids(self, what: str, ids: Tensor) -> None:
        """TypeError unless ids are int64, IndexError unless they are tokens."""
        if ids.dtype != torch.int64:
            raise TypeError(f"{what} have dtype {ids.dtype} but must be int64")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise IndexError(f"{what} contain {wrong}, but the vocabulary has {self.config.vocab_size} tokens")

    def _checked(self, ids: Tensor) -> Tensor:
        if self._batcher.busy:
            raise RuntimeError("session: requests are running; poll() until they are done, or use another session")
        if self._batcher.held:  # of requests that are done
            self.reset()
        if ids.dim() != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise ValueError(
                f"session: ids have shape {tuple(ids.shape)} but must be [{self.batch}, T] with T at least 1"
            )
        ids = ids.to("cpu")
        self.check_ids("session: ids", ids)
        return ids

    def extend(self, rows: list[Tensor], texts: list[int], *, every: bool = False, wanted: bool = True) -> Tensor:
        """Appends rows[i], tokens int64 [n >= 1], to texts[i]: logits [len(texts), V] after the last of each.

        every: logits [sum of n, V] after all of them, text by text. Not wanted: [0, V]. In one compiled call.
        """
        for text, row in zip(texts, rows, strict=True):
            self.cache.reserve(len(row), [text])
        counts = [0, *(len(row) for row in rows)]
        outputs = 0 if not wanted else sum(counts) if every else len(texts)
        logits = torch.empty(outputs, self.config.vocab_size, dtype=self._logits_dtype, device=self.device)
        self._model.step(
            torch.cat(rows),
            torch.tensor(counts).cumsum(0).to(torch.int32),
            *(self.cache.lengths[texts], self.cache.table[texts], logits if wanted else None),
        )
        for text, row in zip(texts, rows, strict=True):
            self.cache.advance(len(row), [text])
        return logits

    def prefill(self, ids: Tensor) -> Tensor:
        """Appends ids [batch, T] int64 to the texts; logits [batch, V] after the last. A refusal changes nothing."""
        return self._read(self._checked(ids), wanted=True)

    def read(self, ids: Tensor) -> None:
        """prefill() without the logits, which saves the product with the head."""
        self._read(self._checked(ids), wanted=False)

    def _read(self, ids: Tensor, wanted: bool) -> Tensor:
        texts = list(range(self.batch))
        self.cache.require(ids.shape[1])
        before = self.cache.lengths.tolist()
        pieces = ids.split(max(1, CHUNK // self.batch), 1)
        try:
            for i, piece in enumerate(pieces):
                logits = self.extend(list(piece), texts, wanted=wanted and i + 1 == len(pieces))
        except BaseException:  # Ctrl-C between two pieces, no memory: the texts are what they were
            for text, length in enumerate(before):
                self.cache.truncate(length, text)
            raise
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Appends one token to each text, ids [batch] int64; logits [batch, V]."""
        if ids.dim() != 1:
            raise ValueError(f"session: ids have shape {tuple(ids.shape)} but must be [{self.batch}]")
        return self.prefill(ids[:, None])

    def reset(self) -> None:
        """Forgets the texts, and requests that are not done."""
        self.cache.reset()
        self._batcher = Batcher(self)

    def stream(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        stop_tokens: tuple[int, ...] = (),
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Yields the tokens [batch] that follow ids [batch, T], step by step. The texts so far are forgotten first.

        Options are those of Sampling: temperature, top_k, top_p, min_p, repetition_penalty. Row b draws from a stream
        seeded with seed + b. A text ends with the first of stop_tokens that it draws; that token is repeated while
        others go on. When the cache is full, the last max_len / 2 tokens are read again into an empty one: a text can
        be of any length, but a token sees no further back than that.
        """
        bursts = self._bursts(ids, max_new_tokens, seed, stop_tokens, sampling)
        return (token.clone() for burst in bursts for token in burst.unbind(1))

    def _bursts(
        self, ids: Tensor, max_new_tokens: int, seed: int | None, stop: tuple[int, ...], sampling: dict[str, Any]
    ) -> Iterator[Tensor]:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens} but must not be negative")
        options, seeds = Sampling(**sampling), seeds_of(seed, self.batch)
        return self._each_burst(self._checked(ids), max_new_tokens, options, seeds, set(stop))

    def _each_burst(
        self, ids: Tensor, max_new_tokens: int, options: Sampling, seeds: Tensor, stop: set[int]
    ) -> Iterator[Tensor]:
        self.reset()
        T = ids.shape[1]
        text = torch.cat([ids, ids.new_empty(self.batch, max_new_tokens)], 1)  # the last token is not in the cache yet
        draws, ended = torch.zeros(self.batch, dtype=torch.int64), torch.zeros(self.batch, dtype=torch.bool)
        end, seen, burst = T, max(0, T - self.max_len), 1
        while end < T + max_new_tokens and not ended.all():
            if self.length == self.max_len:
                self.reset()
                seen = end - max(1, self.max_len // 2)
            if self.length < end - seen - 1:
                self._read(text[:, seen + self.length : end - 1], wanted=False)
            count = min(burst, T + max_new_tokens - end, self.max_len - self.length)
            started = time.perf_counter()
            new = self._draw(text, end, count, options, seeds, draws, ended, stop)
            if time.perf_counter() - started < BURST_SECONDS / 2:
                burst = min(2 * burst, 256)
            yield new
            end += new.shape[1]

    def _draw(
        self,
        text: Tensor,
        end: int,
        count: int,
        options: Sampling,
        seeds: Tensor,
        draws: Tensor,
        ended: Tensor,
        stop: set[int],
    ) -> Tensor:
        """The next tokens [batch, 1 .. count], also written to text[:, end:]: fewer when some text ends."""
        live = (~ended).nonzero().flatten()
        texts = live.tolist()
        self.cache.reserve(count, texts)
        ids = text.new_empty(len(texts), count)
        own_draws = draws[live]
        history = counts = None
        if options.repetition_penalty != 1:
            history = torch.cat([text[live, :end], text.new_zeros(len(texts), count)], 1)
            counts = torch.full((len(texts),), end, dtype=torch.int64)
        steps = self._model.generate(
            text[live, end - 1].contiguous(),
            torch.arange(len(texts) + 1, dtype=torch.int32),
            *(self.cache.lengths[live], self.cache.table[live], ids),
            **dict(seeds=seeds[live], draws=own_draws, history=history, counts=counts),
            stop_tokens=torch.tensor(sorted(stop), dtype=torch.int64),
            **options.arguments(),
        )
        if (ids[:, :steps] < 0).any():
            raise ValueError(BROKEN)
        self.cache.advance(steps, texts)
        draws[live] = own_draws
        text[:, end : end + steps] = text[:, end - 1 : end]  # texts that have ended repeat their last token
        text[live, end : end + steps] = ids[:, :steps]
        ended[live] = torch.tensor([token in stop for token in ids[:, steps - 1].tolist()])
        return text[:, end : end + steps]

    def continue_greedily(self, token: int, count: int) -> list[int]:
        """Appends token to the one text, then all but the last of the `count` greedy tokens that follow: those."""
        text = torch.tensor([[token, *[0] * count]])
        none = torch.zeros(1, dtype=torch.int64)
        return self._draw(text, 1, count, Sampling(temperature=0.0), none, none, none > 0, set())[0].tolist()

    # ---- continuous batching

    def submit(
        self,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        stop_tokens: tuple[int, ...] = (),
        **sampling: Any,
    ) -> int:
        """Queues prompt [T] int64 as a request and returns its number. Options are those of stream().

        Requests join and leave the running batch as poll() is called: `batch` of them run at once. Their tokens are
        those that a session of their own would give, in float32 and bfloat16, quantised or not; T + max_new_tokens is
        at most max_len. Prompts that begin alike are read once as long as the beginning is in the cache.
        """
        return self._batcher.submit(prompt, max_new_tokens, seed, stop_tokens, sampling)

    def poll(self) -> list[Progress]:
        """One step of all running requests: their new tokens. Nothing is left to do when `pending` is 0.

        A request whose logits are NaN or infinite is done, with the reason in `error`; the others go on.
        """
        return self._batcher.poll()

    @property
    def pending(self) -> int:
        """Requests that are not done."""
        return len(self._batcher.waiting) + len(self._batcher.running)

    def generate(
        self, ids: Tensor, *, max_new_tokens: int, callback: Callable[[Tensor], None] | None = None, **options: Any
    ) -> Tensor:
        """ids [batch, T], then up to max_new_tokens new ones: [batch, T + n]. Options are those of stream().

        n is less than max_new_tokens when every text has ended with a stop token before. callback, if given, is called
        with each new token [batch] as it comes.
        """
        new = []
        stop, seed = options.pop("stop_tokens", ()), options.pop("seed", None)
        for burst in self._bursts(ids, max_new_tokens, seed, stop, options):
            if callback is not None:
                for token in burst.unbind(1):
                    callback(token.clone())
            new.append(burst.to(ids.device))
        return torch.cat([ids, *new], 1)


def generate(
    model: "Transformer",
    ids: Tensor,
    *,
    max_new_tokens: int,
    dtype: str = "float32",
    callback: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """ids [T] or [B, T] int64 followed by max_new_tokens new ones: Session.generate in a session of its own.

    Options: pykern.lm.Sampling. Errors: pykern.lm.Session.
    """
    texts = ids[None] if ids.dim() == 1 else ids
    if texts.dim() != 2:
        raise ValueError(f"generate: ids have shape {tuple(ids.shape)} but must be [T] or [B, T]")
    needed = max(1, texts.shape[1] + max_new_tokens)
    session = Session(model, dtype, min(needed, model.config.block_size), texts.shape[0])
    out = session.generate(texts, max_new_tokens=max_new_tokens, callback=callback, **options)
    return out[0] if ids.dim() == 1 else out
