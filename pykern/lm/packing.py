"""Weights as a decode step reads them: rows side by side in panels, streamed once per step, in place or quantised.

int8: weight = q scale, q from -127 to 127, a scale per 64 numbers of a row: 8.25 bits a weight.
int4: weight = q scale + low, q from 0 to 15, scale and low per 32 numbers of a row: 5 bits a weight.
scale and low are bfloat16, and q is the nearest for them as they are rounded, so |weight - quantised| is at most half a
scale inside the range of the group (plus what rounding moved its ends).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pykern.config import _C
from pykern.ops._library import empty_packed

GROUPS = {"int8": 64, "int4": 32}


@dataclass(frozen=True)
class Quantised:
    """q uint8 [N, K] (int8: its bits), scale and low bfloat16 [N, ceil(K / group)]; low only for int4."""

    kind: str
    q: Tensor
    scale: Tensor
    low: Tensor | None

    def weight(self) -> Tensor:
        """The float32 weight [N, K] that it stands for."""
        group, K = GROUPS[self.kind], self.q.shape[1]

        def spread(x: Tensor) -> Tensor:
            return x.float().repeat_interleave(group, 1)[:, :K]

        if self.low is None:
            return self.q.view(torch.int8).float() * spread(self.scale)
        return self.q.float() * spread(self.scale) + spread(self.low)


def divisor(scale: Tensor) -> Tensor:
    """scale [N, groups] as float32 [N, groups, 1], 1 where it is 0: all numbers of the group are, then."""
    return torch.where(scale == 0, 1.0, scale.float())[..., None]


def quantise(weight: Tensor, kind: str) -> Quantised:
    """weight [N, K] in groups along K; ValueError where it is not finite, or not in bfloat16."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"quantise: weight of shape {tuple(weight.shape)} is not finite")
    N, K = weight.shape
    group = GROUPS[kind]
    groups = -(-K // group)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group - K), value=0.0).view(N, groups, group)
    inside = torch.arange(groups * group, device=weight.device).view(groups, group) < K
    if kind == "int8":
        scale = (padded.abs().amax(-1) / 127).to(torch.bfloat16)
        q = (padded / divisor(scale)).round().clamp(-127, 127).to(torch.int8)
        return Quantised(kind, q.view(N, -1)[:, :K].contiguous().view(torch.uint8), scale, None)
    low = padded.masked_fill(~inside, torch.inf).amin(-1).to(torch.bfloat16)
    top = padded.masked_fill(~inside, -torch.inf).amax(-1)
    scale = ((top / 15 - low.float() / 15).clamp_min(0)).to(torch.bfloat16)
    if not torch.isfinite(low).all():
        raise ValueError(f"quantise: weight of shape {tuple(weight.shape)} is too large for bfloat16")
    q = ((padded - low.float()[..., None]) / divisor(scale)).round().clamp(0, 15)
    return Quantised(kind, q.to(torch.uint8).view(N, -1)[:, :K].contiguous(), scale, low)


def panels(rows: Tensor) -> Tensor:
    """rows [N, K] as [P, K, W]: W rows side by side, zeros behind the last one."""
    width = _C.panel_width()
    N, K = rows.shape
    count = -(-N // width)
    padded = rows if count * width == N else torch.cat([rows, rows.new_zeros(count * width - N, K)])
    return empty_packed(padded, (count, K, width)).copy_(padded.view(count, width, K).transpose(1, 2))


PackedTuple = tuple[Tensor, Tensor | None, int, int, str, int]


def pack(weight: Tensor, dtype: str) -> PackedTuple:
    """(panels, scales, N, K, kind, group) of weight [N, K]: what _C.LmModel takes. csrc/ops/packed_weight.h says how
    they lie; dtype "float32", "bfloat16", "int8" or "int4", on CUDA one of the first two."""
    N, K = weight.shape
    if weight.is_cuda or _C.panel_width() == 0:
        if dtype in GROUPS:
            raise ValueError(f"pack: {dtype} weights have no CUDA kernel yet")
        return weight.to(getattr(torch, dtype), copy=True).contiguous(), None, N, K, "numbers", 0
    if dtype not in GROUPS:
        numbers = weight.to(getattr(torch, dtype))
        if dtype == "bfloat16" and _C.pairs_bf16():
            even = torch.nn.functional.pad(numbers, (0, K % 2))
            pairs = panels(even.view(torch.int32))
            return pairs.view(torch.bfloat16).view(*pairs.shape, 2), None, N, K, "numbers", 0
        return panels(numbers), None, N, K, "numbers", 0
    quantised = quantise(weight, dtype)
    scales = panels(quantised.scale)[:, :, None]
    q = panels(quantised.q)
    if quantised.low is not None:
        scales = torch.cat([scales, panels(quantised.low)[:, :, None]], 2)
        low, high = q.chunk(2, -1)
        q = (low | high << 4) ^ 0x88  # q - 8 in two's complement
    return q.contiguous(), scales.contiguous(), N, K, dtype, GROUPS[dtype]
