"""The unigram model of a word (Kudo 2018): P(word) = sum over its segmentations of the product of p(piece).

Training is EM over the distinct words: the expected number of times that a piece is used comes from the forward and
the backward sums over the lattice of all segmentations. It starts with the substrings that cover most of the text;
rounds of EM alternate with dropping the quarter of the pieces whose loss is least,

    loss(piece) = expected count * (log p(piece) - log of the sum over the piece's other segmentations).

Sums are taken in a fixed order, so the same words give the same pieces whatever the number of threads.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby

import numpy as np

MAX_PIECE = 16  # characters
MAX_WORD = 32  # longer words are cut: the product of 32 of the smallest probabilities is still a float64
MAX_TEXT = 1 << 20  # characters of distinct words, the most frequent ones: they bound time and memory
SEEDS = 8  # times the wanted number of pieces
KEPT = 0.75  # of the pieces, in each round
DECIMALS = 6  # of a score: the last bits of a logarithm differ between machines


def _runs(word: str, known: Collection[str]) -> list[str]:
    return ["".join(run) for inside, run in groupby(word, known.__contains__) if inside]


def _parts(words: Mapping[str, int], characters: Collection[str]) -> dict[str, int]:
    """Words of at most MAX_WORD of the given characters, and how often each occurs, longest first."""
    known = frozenset(characters)
    parts: Counter[str] = Counter()
    for word, count in words.items():
        runs = [word] if known.issuperset(word) else _runs(word, known)
        for run in runs:
            for start in range(0, len(run), MAX_WORD):
                parts[run[start : start + MAX_WORD]] += count
    chosen, left = [], MAX_TEXT
    for part, count in sorted(parts.items(), key=lambda item: (-item[1], item[0])):
        left -= len(part)
        if left < 0:
            break
        chosen.append((part, count))
    return dict(sorted(chosen, key=lambda item: (-len(item[0]), item[0])))


def _seeds(words: Mapping[str, int], characters: Collection[str], size: int) -> dict[str, int]:
    """The characters, and the substrings seen at least twice that cover most of the text, with their counts."""
    singles: Counter[str] = Counter(dict.fromkeys(sorted(characters), 0))
    longer: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            singles[word[start]] += count
            for stop in range(start + 2, min(len(word), start + MAX_PIECE) + 1):
                longer[word[start:stop]] += count
    frequent = (item for item in longer.items() if item[1] > 1)
    best = heapq.nsmallest(SEEDS * size, frequent, key=lambda item: (-item[1] * len(item[0]), item[0]))
    return {**singles, **dict(best)}


class _Lattice:
    """The pieces inside each of some words, which are sorted by falling length.

    edges() gives (j, k, ids): the pieces of k characters that end at character j, ids int32 [words of at least j
    characters]; the id after the last piece means that there is none.
    """

    def __init__(self, words: list[str], ids: Mapping[str, int], whole: bool = True) -> None:
        self.lengths = np.array([len(word) for word in words])
        self._ids: dict[tuple[int, int], np.ndarray] = {}
        absent = len(ids)
        for j in range(1, int(self.lengths[0]) + 1):
            rows = int((self.lengths >= j).sum())
            for k in range(1, min(j, MAX_PIECE) + 1):
                found = np.fromiter((ids.get(word[j - k : j], absent) for word in words[:rows]), np.int32, rows)
                if k == j and not whole:
                    found[self.lengths[:rows] == j] = absent
                if (found != absent).any():
                    self._ids[j, k] = found

    def edges(self, backward: bool = False) -> Iterator[tuple[int, int, np.ndarray]]:
        items = reversed(self._ids.items()) if backward else self._ids.items()
        for (j, k), ids in items:
            yield j, k, ids

    def forward(self, p: np.ndarray) -> np.ndarray:
        """Probability of the first j characters of each word, float64 [longest + 1, words]."""
        alpha = np.zeros((int(self.lengths[0]) + 1, len(self.lengths)))
        alpha[0] = 1
        for j, k, ids in self.edges():
            alpha[j, : len(ids)] += alpha[j - k, : len(ids)] * p[ids]
        return alpha

    def total(self, p: np.ndarray) -> np.ndarray:
        """Probability of each word, float64 [words]."""
        return self.forward(p)[self.lengths, np.arange(len(self.lengths))]

    def expected(self, p: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How often each piece is used in words that occur counts times, float64 [len(p)]."""
        alpha, words = self.forward(p), np.arange(len(self.lengths))
        beta = np.zeros_like(alpha)
        beta[self.lengths, words] = counts / alpha[self.lengths, words]
        used = np.zeros(len(p))
        for j, k, ids in self.edges(backward=True):
            after = p[ids] * beta[j, : len(ids)]
            used += np.bincount(ids, alpha[j - k, : len(ids)] * after, minlength=len(p))
            beta[j - k, : len(ids)] += after
        used[-1] = 0
        return used


def train_unigram(words: Mapping[str, int], characters: Collection[str], size: int) -> list[tuple[str, float]]:
    """At most size pieces and their log p, most probable first; each of the characters is one of them.

    words: how often each word occurs; at least one of its characters must be among the given ones. ValueError when
    there is no such word, or more characters than size.
    """
    if len(characters) > size:
        raise ValueError(f"train_unigram: {len(characters)} characters, but size is {size}")
    parts = _parts(words, characters)
    if not parts:
        raise ValueError("train_unigram: words hold none of the characters")
    seeds = _seeds(parts, characters, size)
    pieces = list(seeds)
    ids = {piece: index for index, piece in enumerate(pieces)}
    lattice, counts = _Lattice(list(parts), ids), np.array(list(parts.values()), np.float64)
    longer = sorted((piece for piece in pieces if len(piece) > 1), key=len, reverse=True)
    others, longer_ids = _Lattice(longer, ids, whole=False) if longer else None, [ids[piece] for piece in longer]
    fixed = np.array([len(piece) == 1 for piece in pieces] + [False])
    p = np.array([*seeds.values(), 0], np.float64)
    p /= p.sum()
    while True:
        for _ in range(2):
            used = lattice.expected(p, counts)
            used[fixed] = np.maximum(used[fixed], 0.5)  # a character stays possible
            p = used / used.sum()
        alive = int((p > 0).sum())
        if alive <= size or others is None:
            break
        loss = np.full(len(p), -np.inf)
        loss[fixed] = np.inf
        rare = np.maximum(p[longer_ids], np.finfo(np.float64).tiny)
        loss[longer_ids] = used[longer_ids] * (np.log(rare) - np.log(others.total(p)))
        loss[p == 0] = -np.inf
        order = np.argsort(-loss, kind="stable")
        p[order[max(size, int(alive * KEPT)) :]] = 0
    scores = [(piece, round(float(np.log(p[index])), DECIMALS)) for piece, index in ids.items() if p[index] > 0]
    return sorted(scores, key=lambda item: (-item[1], item[0]))
