"""Choosing the next token from logits: greedy, or a draw from the softmax after temperature and what cuts its tail."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pykern.config import _C

BROKEN = "sampling: logits have no finite maximum (NaN or infinity)"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 takes the most likely token (the lowest id among equals): greedy, a heuristic search that need not
    find the most likely text. Otherwise one token is drawn from the candidates in proportion to
    exp(logit / temperature); with no cut and temperature 1 that is exact (ancestral) sampling from the model.
    Candidates are the top_k most likely tokens, of those the smallest set, most likely first, whose share reaches
    top_p, and of those the ones at least min_p times as likely as the first. repetition_penalty divides the positive
    and multiplies the negative logits of tokens that the text already holds (Keskar et al., arXiv 1909.05858).
    ValueError names the option that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature} but must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k} but must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p} but must be above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p} but must be from 0 to 1")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty} but must be a positive number")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the compiled kernels, where 0 is no top_k and 1 no top_p."""
        return {**asdict(self), "top_k": self.top_k or 0, "top_p": 1.0 if self.top_p is None else self.top_p}


def first_seed(seed: int | None) -> int:
    """seed, or one from the system's entropy; ValueError unless it is from 0 to 2^63 - 1."""
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed} but must be from 0 to 2^63 - 1")
    return torch.Generator().seed() % 2**63 if seed is None else seed


def seeds_of(seed: int | None, batch: int) -> Tensor:
    """int64 [batch]: seed + row, modulo 2^63."""
    first = first_seed(seed)
    return torch.tensor([(first + row) % 2**63 for row in range(batch)], dtype=torch.int64)


class Sampler:
    """Chooses ids [B] from logits [B, V]; options are those of pykern.lm.Sampling.

    Row b draws from its own stream, seeded with seed + b: same seed, same choices, whatever the other rows are. The
    n-th draw of a stream is a function of its seed and n (Philox4x32-10).
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        batch: int = 1,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.options = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        self.seeds = seeds_of(seed, batch)
        self.draws = torch.zeros(batch, dtype=torch.int64)

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(p, ids), each [B, candidates]: the distribution that is drawn from, float64; p is 0 for what is left out.

        Without repetition_penalty, which depends on the text.
        """
        options, logits = self.options, logits.double()
        p = ((logits - logits.amax(-1, keepdim=True)) / options.temperature).softmax(-1)
        p, ids = p.sort(dim=-1, descending=True, stable=True)
        if options.top_k is not None:
            p, ids = p[:, : options.top_k], ids[:, : options.top_k]
            p = p / p.sum(-1, keepdim=True)
        kept = p >= options.min_p * p[:, :1]
        if options.top_p is not None:
            kept &= p.cumsum(-1) - p < options.top_p  # the probability of the tokens ahead of this one
        p = p.where(kept, 0.0)
        return p / p.sum(-1, keepdim=True), ids

    def __call__(self, logits: Tensor, history: Tensor | None = None) -> Tensor:
        """ids [B] int64 for logits [B, V]; history [B, n] int64 is the text, which only repetition_penalty looks at.

        All on the device of the logits. ValueError for logits without a finite maximum.
        """
        B = logits.shape[0]
        if len(self.seeds) != B:
            raise ValueError(f"sampling: logits have {B} rows but the sampler {len(self.seeds)} streams")
        counts = None if history is None else torch.full((B,), history.shape[1], dtype=torch.int64)
        ids = _choose(self.options, logits, self.seeds, self.draws, history, counts)
        if (ids < 0).any():
            raise ValueError(BROKEN)
        self.draws += 1
        return ids


def _choose(
    options: Sampling, logits: Tensor, seeds: Tensor, draws: Tensor, history: Tensor | None, counts: Tensor | None
) -> Tensor:
    """ids [B], -1 where a row is BROKEN."""
    device = logits.device
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=device)
    there = [None if x is None else x.to(device).contiguous() for x in (seeds, draws, history, counts)]
    _C.sample(logits if logits.stride(-1) == 1 else logits.contiguous(), *(*there, ids), **options.arguments())
    return ids


def choose_together(samplers: list[Sampler], logits: Tensor, texts: list[list[int]]) -> list[int]:
    """A token for each row of logits [B, V], as its sampler, of one stream, would choose with that text alone.

    Rows whose options are equal are one call. -1 for logits without a finite maximum.
    """
    alike: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        alike.setdefault(sampler.options, []).append(row)
    tokens = [0] * len(samplers)
    for options, rows in alike.items():
        history = counts = None
        if options.repetition_penalty != 1:
            held = [torch.tensor(texts[row]) for row in rows]
            history = torch.nn.utils.rnn.pad_sequence(held, batch_first=True)
            counts = torch.tensor([len(text) for text in held])
        seeds, draws = (torch.cat([getattr(samplers[row], name) for row in rows]) for name in ("seeds", "draws"))
        of_rows = logits if len(rows) == len(samplers) else logits[rows]
        for row, token in zip(rows, _choose(options, of_rows, seeds, draws, history, counts).tolist(), strict=True):
            tokens[row] = token
            samplers[row].draws += 1
    return tokens
