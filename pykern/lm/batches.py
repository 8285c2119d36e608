"""Token arrays and the blocks of T tokens that a model is trained and evaluated on: x [B, T] and y, one token later.

Training visits every block of the text once per epoch, in an order and from an offset drawn anew each epoch. The batch
of a step is a function of (seed, step) alone, so a run resumed at step n sees exactly what it would have seen.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pykern.lm.files import map_npy, replace_file

if TYPE_CHECKING:
    import torch


def save_tokens(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Write tokens, uint16 or uint32 [N], as a .npy file that load_tokens can map."""
    tokens = _checked_tokens(tokens)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)

    replace_file(path, write)


def load_tokens(path: str | os.PathLike[str]) -> np.ndarray:
    """The tokens of a .npy file, read-only uint16 or uint32 [N], mapped and not read. ValueError unless it is one."""
    try:
        return _checked_tokens(map_npy(Path(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a token file ({error})") from None


def _checked_tokens(tokens: np.ndarray) -> np.ndarray:
    if not isinstance(tokens, np.ndarray):
        raise TypeError(f"tokens: expected a numpy array, got {type(tokens).__name__}")
    if tokens.dtype not in (np.uint16, np.uint32, np.int32, np.int64):
        raise TypeError(f"tokens: dtype must be uint16, uint32, int32 or int64, got {tokens.dtype}")
    if tokens.ndim != 1:
        raise ValueError(f"tokens: expected shape [N], got {list(tokens.shape)}")
    return tokens


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"Batches: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"Batches: {name} must be at least {least}, got {value}")


def _pair(rows: np.ndarray) -> tuple["torch.Tensor", "torch.Tensor"]:
    """x and y, int64 [B, T], from rows [B, T + 1]."""
    import torch

    rows = rows.astype(np.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


class Batches:
    """Training batches of tokens [N]: at(step) gives x and y, int64 torch tensors [batch_size, block_size].

    ValueError when N is less than block_size + 1.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int = 0) -> None:
        self.tokens = _checked_tokens(tokens)
        for name, value, least in (("block_size", block_size, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            _check_count(name, value, least)
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"Batches: {len(tokens)} tokens of text, but block_size {block_size} needs at least {block_size + 1}"
            )
        self.block_size, self.batch_size, self.seed = int(block_size), int(batch_size), int(seed)
        # One block fewer than fits, when there is more than one: that leaves room to shift all of them.
        self.blocks_per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._epoch = -1
        self._starts = np.zeros(0, np.int64)

    def _starts_of(self, epoch: int) -> np.ndarray:
        """Where the blocks of an epoch start, in the order of their use, int64 [blocks_per_epoch]."""
        if epoch != self._epoch:
            # Raw generator output and a stable sort: numpy promises to keep the former across versions.
            draws = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.blocks_per_epoch + 1)
            slack = len(self.tokens) - 1 - self.blocks_per_epoch * self.block_size
            offset = int(draws[0]) % (slack + 1)  # every token is reached, the first and the last less often
            self._starts = offset + self.block_size * np.argsort(draws[1:], kind="stable")
            self._epoch = epoch
        return self._starts

    def at(self, step: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """x and y of a step counted from 0; the same for the same (seed, step), whatever was asked for before."""
        _check_count("step", step, 0)
        rows = np.empty((self.batch_size, self.block_size + 1), self.tokens.dtype)
        for row, drawn in enumerate(range(step * self.batch_size, (step + 1) * self.batch_size)):
            epoch, index = divmod(drawn, self.blocks_per_epoch)
            start = self._starts_of(epoch)[index]
            rows[row] = self.tokens[start : start + self.block_size + 1]
        return _pair(rows)


def validation_batches(
    tokens: np.ndarray, block_size: int, batch_size: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """x and y in the order of the text, every token but the first a target exactly once.

    Batches are int64 [batch_size, block_size], then one with fewer rows, then one row of the tokens that are left:
    any text of two tokens or more can be evaluated. ValueError for a shorter one.
    """
    tokens = _checked_tokens(tokens)
    _check_count("block_size", block_size, 1)
    _check_count("batch_size", batch_size, 1)
    if len(tokens) < 2:
        raise ValueError(f"validation_batches: the text has {len(tokens)} tokens, but at least 2 are needed")
    return _in_order(tokens, block_size, batch_size)


def _in_order(tokens: np.ndarray, block_size: int, batch_size: int) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    blocks, rest = divmod(len(tokens) - 1, block_size)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size] if blocks else tokens[:0]
    for first in range(0, blocks, batch_size):
        yield _pair(windows[first : min(first + batch_size, blocks)])
    if rest:
        yield _pair(tokens[None, len(tokens) - 1 - rest :])
