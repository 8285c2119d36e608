"""Continuous batching: requests join and leave a running batch, each with the tokens that it would get alone."""

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pykern.lm.sampling import BROKEN, Sampler, choose_together

if TYPE_CHECKING:
    from pykern.lm.session import Session

PREFILL_ROWS = 256  # prompt tokens read per poll(), so that running texts do not wait for a long prompt


@dataclass(frozen=True)
class Progress:
    """What a poll() brought one request: its number, its new tokens, whether it is done, and why if it had to end."""

    request: int
    tokens: list[int]
    done: bool
    error: str | None = None


@dataclass
class Request:
    number: int
    tokens: list[int]  # the prompt, then what was drawn
    prompt: int  # its length
    max_new_tokens: int
    sampler: Sampler
    stop: frozenset[int]
    text: int = -1  # of the cache, once it runs
    broken: bool = False

    @property
    def finished(self) -> bool:
        new = len(self.tokens) - self.prompt
        return self.broken or new == self.max_new_tokens or (new > 0 and self.tokens[-1] in self.stop)


@dataclass
class Batcher:
    """The requests of one session. A text of the cache serves one request at a time, first come, first served.

    A request is admitted when a text is free and the pages are there for its prompt and all its new tokens, so that it
    never has to be interrupted. If the beginning of its prompt is in the cache, of a running text or one that has
    finished, it is not read again: the pages are shared (KVCache.fork).
    """

    session: "Session"
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    held: dict[int, list[int]] = field(default_factory=dict)  # text -> tokens in the cache, the oldest first
    count: int = 0
    reused: int = 0  # prompt tokens that were not read again

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        seed: int | None,
        stop_tokens: tuple[int, ...],
        sampling: dict[str, Any],
    ) -> int:
        session = self.session
        if prompt.dim() != 1 or prompt.shape[0] < 1:
            raise ValueError(f"submit: prompt has shape {tuple(prompt.shape)} but must be [T] with T at least 1")
        prompt = prompt.to("cpu")
        session.check_ids("submit: prompt", prompt)
        if max_new_tokens < 1:
            raise ValueError(f"submit: max_new_tokens is {max_new_tokens} but must be at least 1")
        if prompt.shape[0] + max_new_tokens > session.max_len:
            raise ValueError(
                f"submit: {prompt.shape[0]} tokens and {max_new_tokens} new ones exceed max_len {session.max_len}"
            )
        sampler = Sampler(seed=seed, **sampling)
        if not self.busy and not self.held:  # what prefill() or stream() left
            session.cache.reset()
        self.count += 1
        tokens = prompt.tolist()
        request = Request(self.count, tokens, len(tokens), max_new_tokens, sampler, frozenset(stop_tokens))
        self.waiting.append(request)
        return request.number

    def poll(self) -> list[Progress]:
        """One step of every running request; the first tokens of new ones as soon as their prompts are read."""
        self._admit()
        budget, rows, stepping = PREFILL_ROWS, [], []
        for request in self.running:
            done = int(self.session.cache.lengths[request.text])
            piece = request.tokens[done:]
            if len(piece) > 1:  # of a prompt
                piece = piece[: max(budget, 0)]
                budget -= len(piece)
            if not piece:
                continue  # next time
            rows.append(torch.tensor(piece))
            stepping.append(request)
        if not stepping:
            return []
        logits = self.session.extend(rows, [request.text for request in stepping])
        for request, row in zip(stepping, rows, strict=True):
            self.held[request.text] += row.tolist()
        read = [len(self.held[request.text]) == len(request.tokens) for request in stepping]  # else: a long prompt
        ready = list(itertools.compress(stepping, read))
        if not all(read):
            logits = logits[torch.tensor(read, device=logits.device)]
        tokens = choose_together([r.sampler for r in ready], logits, [r.tokens for r in ready])
        progress = []
        for request, token in zip(ready, tokens, strict=True):
            if token < 0:
                request.broken = True
                self._forget(request.text)  # no other prompt begins with it
                progress.append(Progress(request.number, [], True, BROKEN))
                continue
            request.tokens.append(token)
            progress.append(Progress(request.number, [token], request.finished))
        self.running = [request for request in self.running if not request.finished]
        return progress

    def _admit(self) -> None:
        cache = self.session.cache
        while self.waiting:
            taken = {request.text for request in self.running}
            free = [text for text in range(cache.batch) if text not in taken]
            if not free:
                return
            request = self.waiting[0]
            source, common = self._longest_prefix(request.tokens[:-1])
            # the source itself when nobody runs on it, else an empty text, else the one that was held longest
            age = {text: i for i, text in enumerate(self.held)}
            text = source if source in free else min(free, key=lambda t: age.get(t, -1))
            if text != source:
                self._forget(text)
                if common:
                    cache.fork(source, text)
            cache.truncate(common, text)
            self.held.pop(text, None)
            self.held[text] = request.tokens[:common]
            if not self._reserve(len(request.tokens) + request.max_new_tokens - 1 - common, text, taken):
                self._forget(text)
                return
            self.reused += common
            request.text = text
            self.running.append(self.waiting.popleft())

    def _reserve(self, n: int, text: int, taken: set[int]) -> bool:
        """Whether the text has got pages for n more tokens; texts that nobody runs on give theirs, the oldest first."""
        cache = self.session.cache
        for other in [None, *(t for t in list(self.held) if t != text and t not in taken)]:
            if other is not None:
                self._forget(other)
            try:
                cache.reserve(n, [text])
            except ValueError:
                continue
            return True
        return False

    def _forget(self, text: int) -> None:
        self.held.pop(text, None)
        self.session.cache.truncate(0, text)

    def _longest_prefix(self, tokens: list[int]) -> tuple[int, int]:
        """(text, n): the text that begins with the first n of the tokens, n as large as can be; (-1, 0)."""
        best, most = -1, 0
        for text, held in self.held.items():
            shorter = min(len(tokens), len(held))
            n = next((i for i in range(shorter) if tokens[i] != held[i]), shorter)
            if n > most:
                best, most = text, n
        return best, most
