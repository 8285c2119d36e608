"""Short texts as training batches: one text a row with padding behind it, or several texts a row, packed end to end.

A text t of n tokens is cut to the first block_size + 1 and gives the inputs t[:-1] and the targets t[1:]. Packing is
done once: in an order drawn from the seed, each text joins the fullest row that has room for it. An epoch visits every
row once, in an order drawn from (seed, epoch), so the batch of a step is a function of (seed, step) alone.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pykern.lm.batches import load_tokens, save_tokens
from pykern.lm.files import map_npy, replace_file
from pykern.lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the target that no loss counts
CHUNK = 1 << 20  # numbers of a mapped file looked at in one go


def bounds_path(path: str | os.PathLike[str]) -> Path:
    """Where the bounds of the texts of a token file are: NAME.npy has them in NAME.documents.npy."""
    path = Path(path)
    return path.with_name(path.stem + ".documents.npy")


def _checked_bounds(bounds: np.ndarray, tokens: int) -> np.ndarray:
    if not isinstance(bounds, np.ndarray):
        raise TypeError(f"Documents: bounds must be a numpy array, got {type(bounds).__name__}")
    if bounds.dtype != np.int64:
        raise TypeError(f"Documents: bounds must be int64, got {bounds.dtype}")
    if bounds.ndim != 1 or len(bounds) < 1:
        raise ValueError(f"Documents: bounds must have shape [texts + 1], got {list(bounds.shape)}")
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"Documents: bounds go from {bounds[0]} to {bounds[-1]}, but the tokens from 0 to {tokens}")
    for start in range(0, len(bounds) - 1, CHUNK):
        falls = np.flatnonzero(np.diff(bounds[start : start + CHUNK + 1]) < 0)
        if len(falls):
            raise ValueError(f"Documents: text {start + int(falls[0])} ends before it begins")
    return bounds


class Documents:
    """Texts as tokens: tokens [N], uint16 or uint32, end to end; text i is tokens[bounds[i]:bounds[i + 1]].

    bounds int64 [texts + 1]. TypeError for other types, ValueError unless bounds rise from 0 to N (texts may be empty).
    """

    def __init__(self, tokens: np.ndarray, bounds: np.ndarray) -> None:
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise TypeError("Documents: tokens must be a numpy array [N] of integers")
        self.tokens, self.bounds = tokens, _checked_bounds(bounds, len(tokens))

    @classmethod
    def encode(cls, texts: Iterable[str], tokenizer: Tokenizer) -> "Documents":
        """The texts under a tokenizer, in their order. TypeError for what is no text, a single str included."""
        if isinstance(texts, str):
            raise TypeError("Documents: texts must be several texts, got one str")
        tokens, lengths = tokenizer.encode_each(texts)
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"Documents: text {i}, but there are {len(self)} texts")
        return self.tokens[self.bounds[i] : self.bounds[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [texts]."""
        return np.diff(self.bounds)

    def first(self, targets: int, block_size: int) -> "Documents":
        """The first texts, cut as batches cut them, that have so many targets together; all when they have fewer."""
        each = np.minimum(np.maximum(self.lengths - 1, 0), block_size)
        before = np.cumsum(each) - each
        count = int(np.searchsorted(before, targets))  # texts with fewer targets in front of them
        if not count or before[count - 1] + each[count - 1] <= targets:
            return Documents(self.tokens[: self.bounds[count]], self.bounds[: count + 1])
        bounds = self.bounds[: count + 1].copy()
        bounds[-1] = bounds[-2] + targets - before[count - 1] + 1
        return Documents(self.tokens[: bounds[-1]], bounds)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the token file `path` (NAME.npy) and its bounds beside it (NAME.documents.npy).

        Old bounds go first and new ones come last: a crash leaves a token file without bounds, never with others' ones.
        """
        path = Path(path)
        if path.suffix != ".npy":
            raise ValueError(f"Documents: a token file is named NAME.npy, not {path.name}")

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, self.bounds, allow_pickle=False)

        bounds_path(path).unlink(missing_ok=True)
        save_tokens(path, self.tokens)
        replace_file(bounds_path(path), write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Documents":
        """The texts that save wrote, both files mapped and not read. FileNotFoundError, or ValueError naming the file
        whose content is not tokens, or not the bounds of these tokens."""
        tokens = load_tokens(path)
        name = bounds_path(path)
        try:
            return cls(tokens, map_npy(name))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: not the bounds of {path} ({error})") from None


@dataclass(frozen=True)
class DocumentBatch:
    """ids, targets int64 [B, T] (targets -100 where there is none), lengths int64 [B], documents int64 [B, T] or None:
    what Transformer.forward takes."""

    ids: "torch.Tensor"
    targets: "torch.Tensor"
    lengths: "torch.Tensor"
    documents: "torch.Tensor | None" = None

    @property
    def tokens(self) -> int:
        """How many targets count."""
        return int(self.lengths.sum())

    @property
    def layout(self) -> "dict[str, torch.Tensor]":
        """How the rows are laid out, as arguments of Transformer.forward."""
        documents = {} if self.documents is None else {"documents": self.documents}
        return {"lengths": self.lengths, **documents}

    def part(self, number: int, count: int) -> "DocumentBatch":
        """The rows of one of `count` equal parts, as wide as its longest row."""
        rows = slice(*(len(self.ids) * i // count for i in (number, number + 1)))
        lengths = self.lengths[rows]
        T = max(1, int(lengths.max()))  # without any token some parameters would get no gradient
        documents = None if self.documents is None else self.documents[rows, :T]
        return DocumentBatch(self.ids[rows, :T], self.targets[rows, :T], lengths, documents)

    def to(self, device: "torch.device") -> "DocumentBatch":
        """The same batch on a device."""
        documents = None if self.documents is None else self.documents.to(device)
        return DocumentBatch(self.ids.to(device), self.targets.to(device), self.lengths.to(device), documents)

    def loss(self, model: "Callable[..., torch.Tensor]", reduction: str = "mean") -> "torch.Tensor":
        """The loss of the batch; padding and texts reach the model as lengths and documents."""
        return model(self.ids, self.targets, **self.layout, reduction=reduction)


def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of n that follows from (seed, epoch), int64 [n]."""
    # Raw generator output and a stable sort: numpy promises to keep the former across versions.
    return np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")


def pack(lengths: np.ndarray, room: int, order: np.ndarray) -> list[list[int]]:
    """Texts of lengths 1 .. room as rows that hold at most room tokens each: lists of indices, every text in one.

    Best fit: the texts come in the given order, and each joins the fullest row that has room for it, or opens one.
    """
    with_space: list[list[list[int]]] = [[] for _ in range(room + 1)]  # rows by the space they have left
    spaces = 0  # bit s: with_space[s] is not empty
    rows = []
    for i, n in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = spaces >> n
        if enough:
            space = n + (enough & -enough).bit_length() - 1  # the lowest bit from n on
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = room, []
            rows.append(row)
        row.append(i)
        with_space[space - n].append(row)
        spaces |= 1 << (space - n)
    return rows


class _Rows(ABC):
    """Batches of rows of texts; what a row holds is decided by the subclasses."""

    name = "Batches"

    def __init__(self, texts: Documents, block_size: int, batch_size: int, seed: int, pad_id: int) -> None:
        if not isinstance(texts, Documents):
            raise TypeError(f"{self.name}: texts must be Documents, got {type(texts).__name__}")
        numbers: dict[str, tuple[Any, int]] = {
            "block_size": (block_size, 1),
            "batch_size": (batch_size, 1),
            "seed": (seed, 0),
            "pad_id": (pad_id, 0),
        }
        for argument, (value, least) in numbers.items():
            self._check_count(argument, value, least)
        self.block_size, self.batch_size = int(block_size), int(batch_size)
        self.seed, self.pad_id = int(seed), int(pad_id)
        self.texts = texts
        lengths = texts.lengths
        self.used = np.flatnonzero(lengths >= 2)  # a text of one token has nothing to predict
        if not len(self.used):
            raise ValueError(f"{self.name}: none of the {len(texts)} texts has 2 tokens or more")
        self.lengths = np.minimum(lengths[self.used] - 1, block_size)  # inputs of each text
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def _check_count(self, argument: str, value: Any, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{self.name}: {argument} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{self.name}: {argument} must be at least {least}, got {value}")

    @property
    @abstractmethod
    def rows_per_epoch(self) -> int:
        """How many rows hold every text once."""

    def _drawn(self, step: int) -> list[int]:
        """The rows of a step."""
        self._check_count("step", step, 0)
        rows = []
        for drawn in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, index = divmod(drawn, self.rows_per_epoch)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, shuffled(self.seed, epoch, self.rows_per_epoch)
            rows.append(int(self._order[index]))
        return rows

    def _batch(self, rows: list[list[int]], T: int) -> tuple["torch.Tensor", ...]:
        """ids, targets, lengths and documents of rows of texts (indices into used), padded to T."""
        import torch

        ids = np.full((len(rows), T), self.pad_id, np.int64)
        targets = np.full((len(rows), T), IGNORED, np.int64)
        documents = np.zeros((len(rows), T), np.int64)
        lengths = np.zeros(len(rows), np.int64)
        for b, row in enumerate(rows):
            start = 0
            for number, i in enumerate(row):
                stop = start + int(self.lengths[i])
                text = self.texts[int(self.used[i])][: stop - start + 1]
                ids[b, start:stop], targets[b, start:stop] = text[:-1], text[1:]
                documents[b, start:stop] = number
                start = stop
            documents[b, start:] = len(row)
            lengths[b] = start
        return tuple(torch.from_numpy(x) for x in (ids, targets, lengths, documents))

    @abstractmethod
    def _of(self, rows: list[int]) -> DocumentBatch:
        """The batch of rows 0 .. rows_per_epoch - 1."""

    def at(self, step: int) -> DocumentBatch:
        """The batch of a step counted from 0; the same for the same (seed, step), whatever was asked for before."""
        return self._of(self._drawn(step))

    def once(self) -> Iterator[DocumentBatch]:
        """Every row once and not shuffled; the last batch may be smaller."""
        for first in range(0, self.rows_per_epoch, self.batch_size):
            yield self._of(list(range(first, min(first + self.batch_size, self.rows_per_epoch))))


class PaddedBatches(_Rows):
    """One text a row, padded with pad_id to the longest of the batch: at(step) gives a DocumentBatch.

    Texts of fewer than 2 tokens have nothing to predict and are left out; longer ones than block_size + 1 are cut.
    ValueError when no text is left.
    ids and targets are int64 [batch_size, T]. TypeError: not Documents, no integers.
    """

    name = "PaddedBatches"

    def __init__(self, texts: Documents, block_size: int, batch_size: int, seed: int = 0, pad_id: int = 0) -> None:
        super().__init__(texts, block_size, batch_size, seed, pad_id)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.used)

    def _of(self, rows: list[int]) -> DocumentBatch:
        ids, targets, lengths, _ = self._batch([[i] for i in rows], max(int(self.lengths[i]) for i in rows))
        return DocumentBatch(ids, targets, lengths)


class PackedBatches(_Rows):
    """As many texts a row as fit into block_size inputs: at(step) gives a DocumentBatch with documents.

    Texts are left out and cut as in PaddedBatches. Which texts share a row does not change between epochs, only the
    order of the rows; no text sees another, so this matters to nothing but the composition of batches.
    ids, targets and documents are int64 [batch_size, block_size]. Errors: pykern.lm.PaddedBatches.
    """

    name = "PackedBatches"

    def __init__(self, texts: Documents, block_size: int, batch_size: int, seed: int = 0, pad_id: int = 0) -> None:
        super().__init__(texts, block_size, batch_size, seed, pad_id)
        self.rows = pack(self.lengths, self.block_size, shuffled(self.seed, 0, len(self.used)))

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    def _of(self, rows: list[int]) -> DocumentBatch:
        return DocumentBatch(*self._batch([self.rows[row] for row in rows], self.block_size))
