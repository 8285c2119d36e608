"""The attention formula in torch operations, a block of query rows at a time, for derivatives that have no kernel.

    y = q k^T    score = cap(scale y) - slope |d - s| + bias, -inf where hidden    d: the key that a row sits on

Memory is that of a block: at most BLOCK_SCORES scores, or MIN_ROWS rows. What is hidden has no effect: where() keeps
its scores out, `Scores._times` the keys and rows that are not finite. Computes in float32, in float64 for float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# What follows the tensors in every attention op.
OPTIONS = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seed, int left, int right, float scale, float softcap, float dropout_p"
)
MASK, BIAS, SLOPES, SINKS, CU_Q, CU_K, SEED, LEFT, RIGHT, SCALE, SOFTCAP, DROPOUT = range(12)

BLOCK_SCORES = 1 << 18  # 1 MiB of float32, for each of some twenty arrays of a block: about what stays in cache
MIN_ROWS = 8  # fewer would leave the products with k mere matrix-vector ones


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Block(NamedTuple):
    """Rows of one sequence (of every batch element, where batches are not ragged) and the keys they may see."""

    sequence: int
    rows: Tensor  # int64 [n], places in q
    keys: slice  # places in k
    first_row: int  # of the sequence, in q
    first_key: int
    diagonal: int  # row t sits on key t + diagonal

    def of_rows(self, x: Tensor) -> Tensor:
        """The rows of x [B, H, T, ...]."""
        return x.index_select(2, self.rows)

    def of_scores(self, x: Tensor) -> Tensor:
        """The part of x that broadcasts to the scores; x broadcasts to [B, H, T, S]."""
        x = x if x.shape[2] == 1 else self.of_rows(x)
        return x if x.shape[3] == 1 else x[..., self.keys]

    def add_scores(self, total: Tensor, x: Tensor) -> None:
        """Adds x [B, H, n, keys] to the part of total, summed over what total broadcasts."""
        total = total if total.shape[3] == 1 else total[..., self.keys]
        if total.shape[2] == 1:
            total += x.sum_to_size(total.shape)
        else:
            total.index_add_(2, self.rows, x.sum_to_size(*total.shape[:2], len(self.rows), total.shape[3]))


def _key_range(rows: Tensor, begin: int, end: int, diagonal: int, left: int, right: int) -> slice:
    """The keys of begin .. end - 1 inside the windows of the rows."""
    if len(rows) == 0:
        return slice(begin, begin)
    if left >= 0:
        begin = min(max(begin, int(rows.min()) + diagonal - left), end)
    if right >= 0:
        end = max(min(end, int(rows.max()) + diagonal + right + 1), begin)
    return slice(begin, end)


def blocks(q: Tensor, k: Tensor, options, rows: Tensor | None = None) -> Iterator[Block]:
    """Every row of q [B, H, T, D], or those given, in blocks; k [B, G, S, D]."""
    B, H, T, _ = q.shape
    sequences = [(0, T, 0, k.shape[2])]
    if options[CU_Q] is not None:
        at_q, at_k = options[CU_Q].tolist(), options[CU_K].tolist()
        sequences = list(zip(at_q, at_q[1:], at_k, at_k[1:], strict=False))
    for i, (t0, t1, s0, s1) in enumerate(sequences):
        size = max(MIN_ROWS, BLOCK_SCORES // max(1, B * H * (s1 - s0)))
        for part in (torch.arange(t0, t1, device=q.device) if rows is None else rows).split(size):
            diagonal = s1 - t1
            yield Block(i, part, _key_range(part, s0, s1, diagonal, *options[LEFT:SCALE]), t0, s0, diagonal)


def by_key_head(x: Tensor, G: int) -> Tensor:
    """x [B, H, n, X] as [B, G, H/G n, X]: the rows of all heads that share a key head."""
    B, H, n, X = x.shape
    return x.reshape(B, G, (H // G if G else 0) * n, X)


class Scores(NamedTuple):
    """The scores of a block and the two derivatives of the cap, by y = q k^T; seen is bool, all are [B, H, n, keys]."""

    score: Tensor  # -inf where hidden
    seen: Tensor
    slope: Tensor | float
    bend: Tensor | float
    key_heads: int

    def hide(self, x: Tensor) -> Tensor:
        """x, 0 where a score is hidden."""
        return torch.where(self.seen, x, 0.0)

    def pairs(self, rows: Tensor, keys: Tensor) -> Tensor:
        """rows [B, H, n, X] times keys [B, G, keys, X], 0 where hidden."""
        return self.hide((by_key_head(rows, self.key_heads) @ keys.mT).view(self.seen.shape))

    def over_keys(self, weights: Tensor, keys: Tensor) -> Tensor:
        """weights @ keys, [B, H, n, X]; weights are 0 where hidden."""
        return self._times(weights, keys, transposed=False).view(*self.seen.shape[:3], keys.shape[3])

    def over_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """weights^T @ rows, [B, G, keys, X]: summed over the heads of a key head, too."""
        return self._times(weights, by_key_head(rows, self.key_heads), transposed=True)

    def _times(self, weights: Tensor, x: Tensor, transposed: bool) -> Tensor:
        """weights @ x. An x that is not finite makes NaN what sees it, no more: 0 NaN is NaN."""
        weights, seen = by_key_head(weights, self.key_heads), self.seen
        weights = weights.mT if transposed else weights
        odd = ~x.isfinite()
        if not odd.any():
            return weights @ x
        seen = by_key_head(seen, self.key_heads).to(x.dtype)
        reached = (seen.mT if transposed else seen) @ odd.to(x.dtype) > 0
        return (weights @ x.masked_fill(odd, 0.0)).masked_fill(reached, torch.nan)


def _seen(block: Block, options, shape) -> tuple[Tensor, Tensor]:
    """Which scores count, bool [B, H, n, keys], and the distances from the diagonal, [n, keys]."""
    keys = torch.arange(block.keys.start, block.keys.stop, device=block.rows.device)
    distance = keys - (block.rows + block.diagonal)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if options[LEFT] >= 0:
        seen = seen & (distance >= -options[LEFT])
    if options[RIGHT] >= 0:
        seen = seen & (distance <= options[RIGHT])
    if options[MASK] is not None:
        seen = seen & block.of_scores(options[MASK])
    if options[BIAS] is not None:
        seen = seen & (block.of_scores(options[BIAS]) != -torch.inf)
    return seen.expand(shape), distance


def scores(block: Block, q: Tensor, k: Tensor, options) -> Scores:
    """The block's scores, from its rows q [B, H, n, D] and its keys k [B, G, keys, D], in the dtype to compute in."""
    B, H, n, _ = q.shape
    G, S = k.shape[1:3]
    seen, distance = _seen(block, options, (B, H, n, S))
    scale, softcap = options[SCALE], options[SOFTCAP]
    y = torch.where(seen, (by_key_head(q, G) @ k.mT).view(B, H, n, S), 0.0)
    score: Tensor = scale * y
    slope: Tensor | float = scale
    bend: Tensor | float = 0.0
    if softcap > 0:
        tanh = torch.tanh(score / softcap)
        score, slope = softcap * tanh, scale * (1 - tanh * tanh)
        bend = -2 * scale / softcap * tanh * slope
    if options[SLOPES] is not None:
        slopes = options[SLOPES].to(q.dtype)[:, :, None, None]
        ragged = options[CU_Q] is not None
        score = score - (slopes[block.sequence][None] if ragged else slopes) * distance.abs()
    if options[BIAS] is not None:
        score = score + block.of_scores(options[BIAS]).to(q.dtype)
    return Scores(torch.where(seen, score, -torch.inf), seen, slope, bend, G)


def softmax(s: Scores, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights of the keys, [B, H, n, keys], and of the sinks [H], [B, H, n, 1] ([B, H, n, 0] without)."""
    B, H, n, S = s.seen.shape
    logits = s.score
    if sinks is not None:
        logits = torch.cat((logits, sinks.to(logits.dtype).view(1, H, 1, 1).expand(B, H, n, 1)), -1)
    weights = torch.where(logits == -torch.inf, 0.0, torch.softmax(logits, -1))  # a row of -inf alone is 0, not NaN
    return weights[..., :S], weights[..., S:]
