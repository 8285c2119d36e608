"""attention, forward and with backward, against F.scaled_dot_product_attention and, for few rows, products by hand."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pykern
from benchmarks.report import OURS, Case, numbers, with_gradients

SHAPES = [(1, 12, 1024, 64), (4, 12, 256, 64), (8, 6, 256, 64), (1, 8, 4096, 64), (1, 32, 1024, 128)]  # B, H, T, D
QUICK_SHAPES = [(1, 2, 128, 64)]
BY_HAND_UP_TO = 256  # rows: beyond them the products by hand only waste memory


def flops(B: int, H: int, T: int, S: int, D: int, causal: bool, backward: bool) -> float:
    """q k^T and p v: 2 T S D each, without the half that causal hides; backward has five such products, not two."""
    forward = 4.0 * B * H * T * S * D * (0.5 if causal else 1.0)
    return 3.5 * forward if backward else forward


def moved(B: int, H: int, G: int, T: int, S: int, D: int, item: int, backward: bool) -> float:
    """q, out and k, v once; backward reads them and dout, and writes dq, dk, dv."""
    queries, keys = B * H * T * D * item, B * G * S * D * item
    return 6.0 * queries + 6.0 * keys if backward else 2.0 * queries + 2.0 * keys


def by_hand(q, k, v):
    """softmax(q k^T / sqrt(D)) v, causal, a torch call for each sign of the formula."""
    T, S = q.shape[2], k.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    if T > 1:
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -math.inf)
    return torch.softmax(scores, -1) @ v


def build(B, H, G, T, D, dtype, backward, ours, rivals, layout="BHTD"):
    """The contestants on q [B,H,T,D], k and v [B,G,T,D]; with layout "BT3HD" all three are views of one buffer."""
    if layout == "BT3HD":
        q, k, v = numbers(B, T, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = numbers(B, H, T, D, dtype=dtype)
        k, v = (numbers(B, G, T, D, dtype=dtype, seed=seed) for seed in (1, 2))
    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    dout = numbers(B, H, T, D, dtype=dtype, seed=3)
    contestants = {OURS: ours, **rivals}
    if backward:
        return {who: with_gradients(f, inputs, dout) for who, f in contestants.items()}
    return {who: lambda f=f: f(*inputs) for who, f in contestants.items()}


def plain_cases(shapes, dtypes) -> Iterator[Case]:
    """Causal self-attention."""
    for B, H, T, D in shapes:
        for dtype in dtypes:
            for backward in (False, True):
                rivals = {"torch sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
                if dtype == torch.bfloat16 and T <= BY_HAND_UP_TO:
                    rivals["torch by hand"] = by_hand
                yield Case(
                    f"B{B} H{H} T{T} D{D} causal{' +backward' if backward else ''}",
                    dtype,
                    flops(B, H, T, T, D, True, backward),
                    moved(B, H, H, T, T, D, dtype.itemsize, backward),
                    lambda B=B, H=H, T=T, D=D, dtype=dtype, backward=backward, rivals=rivals: build(
                        *(B, H, H, T, D, dtype, backward),
                        lambda q, k, v: pykern.attention(q, k, v, causal=True),
                        rivals,
                    ),
                )


def masked_cases(B, H, T, D, dtypes) -> Iterator[Case]:
    """Masks, a bias, grouped heads and strided inputs, on one shape."""
    padding = torch.ones(B, 1, 1, T, dtype=torch.bool)
    padding[..., -T // 8 :] = False
    both = padding & torch.ones(T, T, dtype=torch.bool).tril()
    bias = numbers(1, H, T, T)
    sdpa = F.scaled_dot_product_attention

    def attend(**options):
        return lambda q, k, v: pykern.attention(q, k, v, **options)

    for dtype in dtypes:
        typed_bias = bias.to(dtype)
        causal_bias = typed_bias.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        kinds = [  # name, G, causal, bytes of the mask as given to pykern, layout, pykern, torch
            (
                *("bool mask", H, False, padding.numel(), "BHTD", attend(mask=padding)),
                lambda q, k, v: sdpa(q, k, v, attn_mask=padding),
            ),
            (
                *("causal + bool mask", H, True, padding.numel(), "BHTD", attend(mask=padding, causal=True)),
                lambda q, k, v: sdpa(q, k, v, attn_mask=both),
            ),
            (
                *("causal + bias", H, True, typed_bias.nbytes, "BHTD", attend(bias=typed_bias, causal=True)),
                lambda q, k, v, causal_bias=causal_bias: sdpa(q, k, v, attn_mask=causal_bias),
            ),
            (
                *("causal, 4 heads a key", H // 4, True, 0, "BHTD", attend(causal=True)),
                lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
            ),
            (
                *("causal, q k v interleaved", H, True, 0, "BT3HD", attend(causal=True)),
                lambda q, k, v: sdpa(q, k, v, is_causal=True),
            ),
        ]
        for name, G, causal, mask_bytes, layout, ours, theirs in kinds:
            for backward in (False, True):
                yield Case(
                    f"B{B} H{H} T{T} D{D} {name}{' +backward' if backward else ''}",
                    dtype,
                    flops(B, H, T, T, D, causal, backward),
                    moved(B, H, G, T, T, D, dtype.itemsize, backward) + (2 if backward else 1) * mask_bytes,
                    lambda G=G, dtype=dtype, backward=backward, ours=ours, theirs=theirs, layout=layout: build(
                        *(B, H, G, T, D, dtype, backward, ours), {"torch sdpa": theirs}, layout
                    ),
                )


def cases(quick: bool) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    yield from plain_cases(QUICK_SHAPES if quick else SHAPES, dtypes)
    yield from masked_cases(*((1, 4, 128, 64) if quick else (1, 12, 1024, 64)), dtypes)
