"""Choosing the next token from logits: greedy, or a draw from the softmax after temperature, top-k and top-p."""

import math

import torch
from torch import Tensor


class Sampler:
    """Chooses ids [B] from logits [B, V].

    temperature 0 takes the most likely token (the lowest id among equals). Otherwise the candidates are the top_k most
    likely tokens, of those the smallest set, most likely first, whose renormalised probability reaches top_p, and one
    is drawn. Row b draws from its own stream, seeded with seed + b: same seed, same choice, whatever the other rows
    are.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        batch: int = 1,
    ) -> None:
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature} but must be 0 (greedy) or a positive number")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k} but must be at least 1")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p is {top_p} but must be above 0 and at most 1")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed} but must be from 0 to 2^63 - 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        first = torch.Generator().seed() % 2**63 if seed is None else seed
        self.streams = [torch.Generator().manual_seed((first + row) % 2**63) for row in range(batch)]

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(p, ids), each [B, candidates]: the distribution that is drawn from, float64; p is 0 for what is left out."""
        logits = logits.double()
        if self.top_k is None and self.top_p is None:
            ids = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
        else:
            logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            logits, ids = logits[:, : self.top_k], ids[:, : self.top_k]
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_p is not None:
            before = p.cumsum(-1) - p  # the probability of the tokens ahead of this one
            p = p.where(before < self.top_p, 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p, ids

    def __call__(self, logits: Tensor) -> Tensor:
        """ids [B] int64 for logits [B, V]."""
        if not torch.isfinite(logits.amax(-1)).all():
            raise ValueError("sampling: logits have no finite maximum (NaN or infinity)")
        if self.temperature == 0.0:
            return logits.argmax(-1)
        p, ids = self.probabilities(logits)
        cumulative = p.cumsum(-1)
        total = cumulative[:, -1:].contiguous()
        draw = torch.stack([torch.rand(1, generator=s, dtype=torch.float64) for s in self.streams]).to(p.device) * total
        chosen = torch.searchsorted(
            cumulative, draw, right=True
        )  # the first whose cumulative probability exceeds the draw
        last = torch.searchsorted(cumulative, total)  # where a draw that was rounded up to the total belongs
        return ids.gather(-1, chosen.minimum(last)).squeeze(-1)
