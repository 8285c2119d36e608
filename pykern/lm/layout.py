"""Which tokens of a batch [B, T] see each other when rows are padded or hold several texts.

lengths [B]: token t of row b is real where t < lengths[b]; the rest is padding, which no real token sees.
documents [B, T]: tokens of a row with the same number are one text; texts do not see each other, and positions count
from 0 in each. Where attention takes offsets, all rows are laid end to end and each text is one of its sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """real: bool [B, T], False in padding, None where there is none. mask: bool [B, 1, 1 or T, T] of attention.

    positions: int64 [B, T], None for 0 .. T - 1 in every row. cu_seqlens: int32 [N + 1], the offsets of the N texts in
    the B T tokens end to end.
    """

    real: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None


def real_tokens(lengths: Tensor, T: int) -> Tensor:
    """bool [B, T]: t < lengths[b]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def _check(name: str, x: object, ids: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Transformer: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"Transformer: {name} must be int64, got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(
            f"Transformer: {name} has shape {tuple(x.shape)} but must be {shape} for ids {tuple(ids.shape)}"
        )
    if x.device != ids.device:
        raise ValueError(f"Transformer: {name} is on {x.device} but ids are on {ids.device}")


def make_layout(ids: Tensor, lengths: Tensor | None, documents: Tensor | None, *, offsets: bool) -> Layout:
    """The Layout of ids [B, T]; offsets: cu_seqlens for documents, otherwise a mask.

    TypeError: not int64 tensors. ValueError: shapes, a length outside 0 .. T, documents that decrease along a row (what
    they are in the padding does not matter).
    """
    B, T = ids.shape
    real = None
    if lengths is not None:
        _check("lengths", lengths, ids, (B,))
        if bool(((lengths < 0) | (lengths > T)).any()):
            raise ValueError(
                f"Transformer: lengths reach from {int(lengths.min())} to {int(lengths.max())}, not 0..{T}"
            )
        real = real_tokens(lengths, T)
    if documents is not None:
        _check("documents", documents, ids, (B, T))
    if ids.numel() == 0:
        return Layout()
    if documents is None:
        return Layout() if real is None else Layout(real, real[:, None, None, :])

    ahead = documents[:, 1:] > documents[:, :-1]
    back = documents[:, 1:] < documents[:, :-1]
    if real is not None:
        back = back & real[:, 1:]
    if bool(back.any()):
        b, t = back.nonzero()[0].tolist()
        raise ValueError(
            f"Transformer: documents must not decrease along a row, but row {b} has {int(documents[b, t])} and then "
            f"{int(documents[b, t + 1])} at position {t + 1}"
        )
    starts = torch.nn.functional.pad(ahead if real is None else ahead & real[:, 1:], (1, 0), value=True)
    if real is not None:  # padding is a text of its own
        starts = starts | (torch.arange(T, device=ids.device) == lengths[:, None])  # type: ignore[index]
    place = torch.arange(T, device=ids.device).expand(B, T)
    positions = place - (place * starts).cummax(1).values
    if real is not None:
        positions = positions * real
    if offsets:
        first = starts.flatten().nonzero().flatten()
        cu_seqlens = torch.nn.functional.pad(first, (0, 1), value=B * T).to(torch.int32)
        return Layout(real, None, positions, cu_seqlens)
    text = starts.cumsum(1)
    return Layout(real, (text[:, None, :, None] == text[:, None, None, :]), positions)
