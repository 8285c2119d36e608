"""Attention over disjoint sets of keys, merged: each part counts with its share of the softmax's denominator.

lse = log sum_i exp(lse_i)      out = sum_i exp(lse_i - lse) out_i
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pykern.ops._library import require_tensors

OP = "merge_attention"


def _check_parts(name: str, parts, dtypes: tuple[torch.dtype, ...]) -> None:
    if isinstance(parts, Tensor) or not isinstance(parts, Sequence):
        raise TypeError(f"{OP}: {name} must be a sequence of tensors, got {type(parts).__name__}")
    for i, x in enumerate(parts):
        require_tensors(OP, **{f"{name}[{i}]": x})
        dtype, first, *expected = (str(d).removeprefix("torch.") for d in (x.dtype, parts[0].dtype, *dtypes))
        if x.dtype not in dtypes:
            raise TypeError(f"{OP}: {name}[{i}] has dtype {dtype}, expected {', '.join(expected)}")
        if x.dtype != parts[0].dtype:
            raise TypeError(f"{OP}: {name}[{i}] has dtype {dtype} but {name}[0] has {first}")


def _check(outs, lses) -> None:
    _check_parts("outs", outs, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
    _check_parts("lses", lses, (torch.float32, torch.float64))
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"{OP}: outs has {len(outs)} parts and lses {len(lses)}, expected as many, at least one")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        shape = list(out.shape)
        if len(shape) not in (3, 4):
            raise ValueError(f"{OP}: outs[{i}] has shape {shape}, expected [B, H, T, E] or [total, H, E]")
        if out.shape != outs[0].shape:
            raise ValueError(f"{OP}: outs[{i}] has shape {shape} but outs[0] has {list(outs[0].shape)}")
        rows = shape[:3] if len(shape) == 4 else shape[1::-1]
        if list(lse.shape) != rows:
            raise ValueError(f"{OP}: lses[{i}] has shape {list(lse.shape)}, expected {rows} for outs of shape {shape}")
        for name, x in (("outs", out), ("lses", lse)):
            if x.device != outs[0].device:
                raise ValueError(f"{OP}: {name}[{i}] is on {x.device} but outs[0] on {outs[0].device}")


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over all keys, from outs [B, H, T, E] and lses [B, H, T] over disjoint sets of them.

    The parts are results of attention(..., return_lse=True), lse in natural logarithm; or, for ragged batches, outs
    [total, H, E] and lses [H, total]. Any number of parts in any order: the sum of more than two depends on the order
    by its rounding only. A row of a part with lse -inf saw no key: it counts nothing, its out may be NaN. Where all
    parts are so, out is 0 and lse -inf. A sink counts once for each part that had it: give it to one of them.
    outs: float32, float64, bfloat16 or float16, the sum is in float32 or wider; lses: float32 or float64. The results
    have the dtypes of the parts. Differentiable, any number of times. Formula: Dao et al., arXiv 2205.14135, 3.1.
    TypeError: not sequences of tensors, mixed or other dtypes. ValueError: numbers of parts, shapes, devices.
    """
    _check(outs, lses)
    largest = torch.stack([lse.detach() for lse in lses]).amax(0)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    seen = [lse != -torch.inf for lse in lses]
    shares = [torch.where(some, (lse - shift).exp(), 0.0) for some, lse in zip(seen, lses, strict=True)]
    total = torch.stack(shares).sum(0)
    dead = largest == -torch.inf
    denominator = torch.where(dead, 1.0, total)
    lse = torch.where(dead, -torch.inf, shift + denominator.log())

    def of_rows(x: Tensor) -> Tensor:
        return (x if outs[0].dim() == 4 else x.mT)[..., None]

    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    merged = torch.zeros_like(outs[0], dtype=dtype)
    for out, share, some in zip(outs, shares, seen, strict=True):
        merged = merged + of_rows(share / denominator).to(dtype) * torch.where(of_rows(some), out.to(dtype), 0.0)
    return merged.to(outs[0].dtype), lse
