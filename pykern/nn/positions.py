"""What attention adds to its scores to know how far a key is: the constant slopes of ALiBi, the learnt numbers of T5.

Both depend on the distance of key s from the diagonal of query t alone, s - (S - T + t): the T queries are the last of
the S positions, as in pykern.attention.
"""

import functools
import math

import torch
from torch import Tensor

from pykern import ops


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads] float64: 2^(-8 i / n) for n a power of two; otherwise every other slope of the next power fills up.

    Press et al., arXiv 2108.12409.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def bucket_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance in each bucket: 0, 1, 2, … for the first half, then evenly spaced in log(distance).

    Bucket exact + i of the other half starts where (d / exact)^n reaches (max_distance / exact)^i, exact = buckets / 2
    and n the number of buckets in that half. Whole numbers decide, so that no rounding moves a distance.
    """
    exact = buckets // 2
    n = buckets - exact
    starts = list(range(exact))
    for i in range(n):
        d = max(1, math.floor(exact * (max_distance / exact) ** (i / n)) - 1)  # not above, and within 2 or so
        while d**n * exact**i < max_distance**i * exact**n:
            d += 1
        starts.append(d)
    return tuple(starts)


def relative_buckets(relative: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket (int64) of each relative position, key - query (int64): `_relative_position_bucket` of T5.

    bidirectional: the second half of the buckets is for keys ahead of the query; otherwise those share bucket 0 with
    the query's own position. Raffel et al., arXiv 1910.10683.
    """
    own = buckets // 2 if bidirectional else buckets
    starts = torch.tensor(bucket_starts(own, max_distance), device=relative.device)
    distance = relative.abs() if bidirectional else (-relative).clamp_min(0)
    bucket = torch.bucketize(distance, starts, right=True) - 1
    return bucket + own * (relative > 0) if bidirectional else bucket


def check_lengths(op: str, T: int, S: int | None) -> tuple[int, int]:
    """(T, S), S being T when None; ValueError unless both are lengths."""
    S = T if S is None else S
    if T < 0 or S < 0:
        raise ValueError(f"{op}: T is {T} and S {S}, expected lengths that are not negative")
    return T, S


class RelativePositionBias(torch.nn.Module):
    """T5's bias: forward(T, S) gives [1, num_heads, T, S] in weight's dtype, the `bias` of pykern.attention.

    bias[0, h, t, s] = weight[bucket(s - (S - T + t)), h], weight [num_buckets, num_heads]; S is T unless given. Half of
    the buckets are the distances 0, 1, 2, … themselves, the others widen evenly in log(distance); the last holds all
    distances from about max_distance on. bidirectional: keys ahead of the query have their own half of the buckets, for
    encoders; otherwise they are all in bucket 0, for causal attention.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own = num_buckets // 2 if bidirectional else num_buckets
        if num_heads < 1:
            raise ValueError(f"RelativePositionBias: num_heads is {num_heads}, expected 1 or more")
        if own < 2 or (bidirectional and num_buckets % 2):
            expected = "an even number from 4 on" if bidirectional else "2 or more"
            raise ValueError(f"RelativePositionBias: num_buckets is {num_buckets}, expected {expected}")
        if max_distance <= own // 2:
            raise ValueError(
                f"RelativePositionBias: max_distance is {max_distance}, expected more than the {own // 2} distances "
                "that have a bucket each"
            )
        super().__init__()
        self.num_heads, self.num_buckets = num_heads, num_buckets
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = torch.nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal numbers of deviation 0.02."""
        if not self.weight.is_meta:
            torch.nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, T: int, S: int | None = None) -> Tensor:
        T, S = check_lengths("RelativePositionBias", T, S)
        if T == 0 or S == 0:
            return self.weight.new_zeros(1, self.num_heads, T, S)
        # The T + S - 1 distances there are; each row of the bias is a stretch of them. Rounded last, so that the
        # gradient of a bucket is a sum in float32 at least.
        relative = torch.arange(1 - S, T, device=self.weight.device)
        buckets = relative_buckets(relative, self.num_buckets, self.max_distance, self.bidirectional)
        table = ops.embedding(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), buckets)
        return table.T.contiguous().unfold(1, S, 1).flip(1).contiguous().to(self.weight.dtype)[None]

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


class ALiBi(torch.nn.Module):
    """Linear biases: the score of a key loses slope * distance, a slope per head, float32 [num_heads].

    Constant (no state): pass `slopes` as the `alibi_slopes` of pykern.attention, which makes no T x S bias. learnable:
    `slopes` is a parameter, starts as the constant ones, and forward(T, S) gives the bias [1, num_heads, T, S],
    -slopes[h] |s - (S - T + t)|, to pass as `bias`; S is T unless given.
    """

    slopes: Tensor

    def __init__(
        self,
        num_heads: int,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1:
            raise ValueError(f"ALiBi: num_heads is {num_heads}, expected 1 or more")
        super().__init__()
        self.num_heads, self.learnable = num_heads, learnable
        if learnable:
            self.slopes = torch.nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        else:
            self.register_buffer("slopes", torch.empty(num_heads, device=device), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The constant slopes."""
        if not self.slopes.is_meta:
            self.slopes.copy_(alibi_slopes(self.num_heads))

    def _apply(self, fn, recurse: bool = True):
        """Constant slopes stay float32, and right, when the model changes its dtype or leaves the meta device."""
        super()._apply(fn, recurse)
        if not self.learnable:
            self.slopes = torch.empty_like(self.slopes, dtype=torch.float32)
            self.reset_parameters()
        return self

    def forward(self, T: int, S: int | None = None) -> Tensor:
        T, S = check_lengths("ALiBi", T, S)
        query = torch.arange(S - T, S, device=self.slopes.device)
        key = torch.arange(S, device=self.slopes.device)
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))  # distances exceed 8 bits
        distance = (query[:, None] - key).abs().to(slopes.dtype)
        return (-slopes[:, None, None] * distance).to(self.slopes.dtype)[None]

    def extra_repr(self) -> str:
        return f"{self.num_heads}, learnable={self.learnable}"
