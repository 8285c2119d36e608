"""Interpolated Witten-Bell n-gram model over bytes: the baseline that a language model has to beat.

    P_n(w | h) = (c(hw) + t(h) P_{n-1}(w | h')) / (c(h) + t(h))        P_0(w) = 1 / 256

h is the last n - 1 bytes, h' is h without its first byte, c counts occurrences and t(h) counts the different bytes seen
after h; a history that was never seen leaves P_{n-1} as it is. An n-gram is a number of up to 64 bits, so counting is
sorting and looking up is a binary search.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MAX_ORDER = 8  # bytes in a uint64


@dataclass(frozen=True)
class _Counts:
    """What one order has seen, sorted by n-gram and by history."""

    ngrams: np.ndarray  # uint64 [U]
    ngram_counts: np.ndarray  # int64 [U], c(hw)
    histories: np.ndarray  # uint64 [W]
    history_counts: np.ndarray  # int64 [W], c(h)
    history_types: np.ndarray  # int64 [W], t(h)


def _pack(data: np.ndarray, n: int) -> np.ndarray:
    """All n-grams of data, uint64 [max(N - n + 1, 0)], the last byte of each in the lowest bits."""
    keys = np.zeros(max(len(data) - n + 1, 0), np.uint64)
    for first in range(n):
        keys <<= np.uint64(8)
        keys |= data[first : first + len(keys)]
    return keys


def _count(keys: np.ndarray) -> _Counts:
    ngrams, ngram_counts = np.unique(keys, return_counts=True)
    histories, first, history_types = np.unique(ngrams >> np.uint64(8), return_index=True, return_counts=True)
    history_counts = np.add.reduceat(ngram_counts, first) if len(first) else first
    return _Counts(ngrams, ngram_counts, histories, history_counts, history_types)


def _look_up(sorted_keys: np.ndarray, keys: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """values at the place of each key, 0 where a key is absent."""
    if not len(sorted_keys):
        return tuple(np.zeros(len(keys), value.dtype) for value in values)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    found = sorted_keys[place] == keys
    return tuple(np.where(found, value[place], 0) for value in values)


class NGram:
    """Counts of all orders up to `order`, from bytes (or several texts, one after the other).

    Formula: P_n(w | h) = (c(hw) + t(h) P_{n-1}(w | h')) / (c(h) + t(h)), P_0 = 1 / 256; t(h) is the number of different
    bytes seen after h, h' is h without its first byte (Witten and Bell, IEEE Trans. Inf. Theory 37, 1991).
    ValueError: order out of range, no text.
    """

    def __init__(self, texts: bytes | Iterable[str], order: int = 6) -> None:
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
            raise ValueError(f"NGram: order must be an integer from 1 to {MAX_ORDER}, got {order!r}")
        data = _bytes(texts)
        if not len(data):
            raise ValueError("NGram: there is no text to count")
        self.order = order
        self._counts = [_count(_pack(data, n)) for n in range(1, order + 1)]

    def _refine(self, lower: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
        """P_n of the n-grams in keys from their P_{n-1}; both float64 [len(keys)]."""
        counts = self._counts[n - 1]
        (seen,) = _look_up(counts.ngrams, keys, counts.ngram_counts)
        total, types = _look_up(counts.histories, keys >> np.uint64(8), counts.history_counts, counts.history_types)
        return np.where(total > 0, (seen + types * lower) / np.maximum(total + types, 1), lower)

    def probabilities(self, history: bytes, order: int | None = None) -> np.ndarray:
        """P(w | history) of every byte w, float64 [256]; a history shorter than order - 1 uses the order it allows."""
        order = self.order if order is None else order
        if not 1 <= order <= self.order:
            raise ValueError(f"NGram: order must lie between 1 and {self.order}, got {order}")
        result = np.full(256, 1 / 256)
        for n in range(1, min(order, len(history) + 1) + 1):
            prefix = int.from_bytes(history[len(history) - n + 1 :], "big") << 8
            result = self._refine(result, np.uint64(prefix) | np.arange(256, dtype=np.uint64), n)
        return result

    @property
    def parameter_count(self) -> int:
        """Different n-grams counted, those of all orders together. c(h) and t(h) follow from their counts."""
        return sum(len(counts.ngrams) for counts in self._counts)

    def bits_per_byte(self, texts: bytes | Iterable[str]) -> np.ndarray:
        """-log2 P averaged over the bytes of texts, float64 [order]: entry n - 1 belongs to order n."""
        data = _bytes(texts)
        if not len(data):
            raise ValueError("NGram: there is no text to evaluate")
        probability = np.full(len(data), 1 / 256)
        bits = np.empty(self.order)
        for n in range(1, self.order + 1):
            # The first n - 1 bytes have no history of that length and keep the probability of the order below.
            probability[n - 1 :] = self._refine(probability[n - 1 :], _pack(data, n), n)
            bits[n - 1] = -np.log2(probability).mean()
        return bits


def _bytes(texts: bytes | Iterable[str]) -> np.ndarray:
    if isinstance(texts, str):
        texts = [texts]
    data = texts if isinstance(texts, bytes) else "".join(texts).encode("utf-8")
    return np.frombuffer(data, np.uint8)


def baseline(
    train_texts: Iterable[str], val_texts: Iterable[str], orders: Iterable[int] = (4, 5, 6)
) -> dict[int, float]:
    """Held-out bits per byte by order; the best of them is the figure to beat."""
    orders = list(orders)
    bits = NGram(train_texts, max(orders)).bits_per_byte(val_texts)
    return {order: float(bits[order - 1]) for order in orders}
