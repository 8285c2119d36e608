"""attention, forward and with backward, against F.scaled_dot_product_attention or products by hand."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pykern
from benchmarks.report import OURS, Case, numbers, with_gradients

SHAPES = [(1, 12, 1024, 64), (4, 12, 256, 64), (8, 6, 256, 64), (1, 8, 4096, 64), (1, 32, 1024, 128)]  # B, H, T, D
QUICK_SHAPES = [(1, 2, 128, 64)]
TINY = (1, 4, 32, 16)  # the cost of a call
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


def build(B, H, G, T, D, dtype, backward, ours, rivals, layout="BHTD", bias=None):
    """The contestants on q [B,H,T,D], k and v [B,G,T,D]; with layout "BT3HD" all three are views of one buffer.

    With a bias every function takes it as a fourth argument, and backward gives its gradient, too.
    """
    if layout == "BT3HD":
        q, k, v = numbers(B, T, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = numbers(B, H, T, D, dtype=dtype)
        k, v = (numbers(B, G, T, D, dtype=dtype, seed=seed) for seed in (1, 2))
    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v, bias) if x is not None]
    dout = numbers(B, H, T, D, dtype=dtype, seed=3)
    contestants = {OURS: ours, **rivals}
    if backward:
        return {who: with_gradients(f, inputs, dout) for who, f in contestants.items()}
    return {who: lambda f=f: f(*inputs) for who, f in contestants.items()}


def plain_cases(shapes, dtypes, causal=True) -> Iterator[Case]:
    """Self-attention, causal or, to see what the diagonal costs, over the full square."""
    for B, H, T, D in shapes:
        for dtype in dtypes:
            for backward in (False, True):
                rivals = {"torch sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)}
                if causal and dtype == torch.bfloat16 and T <= BY_HAND_UP_TO:
                    rivals["torch by hand"] = by_hand
                yield Case(
                    f"B{B} H{H} T{T} D{D} {'causal' if causal else 'full square'}{' +backward' if backward else ''}",
                    dtype,
                    flops(B, H, T, T, D, causal, backward),
                    moved(B, H, H, T, T, D, dtype.itemsize, backward),
                    lambda B=B, H=H, T=T, D=D, dtype=dtype, backward=backward, rivals=rivals: build(
                        *(B, H, H, T, D, dtype, backward),
                        lambda q, k, v: pykern.attention(q, k, v, causal=causal),
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


def formula(mask=None, bias=None, softcap=None, slopes=None, sinks=None):
    """Attention by its formula, causal, a torch call for each sign: what torch offers for these options."""

    def attend(q, k, v):
        T, S = q.shape[2], k.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            distance = (torch.arange(T)[:, None] + (S - T) - torch.arange(S)).abs()
            scores = scores - (slopes[:, None, None] * distance).to(scores.dtype)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -math.inf)
        if sinks is None:
            return torch.softmax(scores, -1) @ v
        sink = sinks[:, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1] @ v

    return attend


def sparse_masks(T: int, window: int) -> dict[str, torch.Tensor]:
    """Bool masks [T, T] of low density: a window behind the diagonal, documents in a row, keys of padding."""
    rows, keys = torch.arange(T)[:, None], torch.arange(T)
    document = torch.bucketize(torch.arange(T), torch.tensor([1, 3, 4, 6]) * (T // 8), right=True)
    return {
        f"window {window}": (keys <= rows) & (keys > rows - window),
        "documents": document[:, None] == document,
        "padding": (keys < T * 3 // 10).expand(T, T),
    }


def sparse_cases(B, H, T, D, window, dtypes) -> Iterator[Case]:
    """Where most pairs are hidden: their pairs alone are counted as work."""
    sdpa = F.scaled_dot_product_attention
    for name, mask in sparse_masks(T, window).items():
        pairs = mask.sum().item()
        options = dict(causal=True, window=(window - 1, 0)) if name.startswith("window") else dict(mask=mask)
        for dtype in dtypes:
            for backward in (False, True):
                yield Case(
                    f"B{B} H{H} T{T} D{D} {name}, {pairs / T / T:.0%} of the pairs{' +backward' if backward else ''}",
                    dtype,
                    4.0 * B * H * pairs * D * (3.5 if backward else 1.0),
                    moved(B, H, H, T, T, D, dtype.itemsize, backward),
                    lambda dtype=dtype, backward=backward, mask=mask, options=options: build(
                        *(B, H, H, T, D, dtype, backward, lambda q, k, v: pykern.attention(q, k, v, **options)),
                        {"torch sdpa": lambda q, k, v: sdpa(q, k, v, attn_mask=mask)},
                    ),
                )


def option_cases(B, H, T, D, dtypes) -> Iterator[Case]:
    """Causal attention with an option that torch has no fused kernel for."""
    slopes, sinks = 2.0 ** -torch.arange(1.0, H + 1), numbers(H, seed=5)
    bias = numbers(1, H, T, T, seed=6)
    lengths = [T // 8, T // 4, T // 8, T // 2]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    for dtype in dtypes:
        typed_bias, sink = bias.to(dtype), sinks.to(dtype)
        kinds = {
            "dropout 0.1": (
                dict(dropout_p=0.1),
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1),
            ),
            "softcap": (dict(softcap=30.0), formula(softcap=30.0)),
            "alibi slopes": (dict(alibi_slopes=slopes), formula(slopes=slopes)),
            "sinks": (dict(sinks=sink), formula(sinks=sink)),
        }
        for name, (options, theirs) in kinds.items():
            for backward in (False, True):
                who = "torch sdpa" if name.startswith("dropout") else "torch by hand"
                yield Case(
                    f"B{B} H{H} T{T} D{D} causal, {name}{' +backward' if backward else ''}",
                    dtype,
                    flops(B, H, T, T, D, True, backward),
                    moved(B, H, H, T, T, D, dtype.itemsize, backward),
                    lambda dtype=dtype, backward=backward, options=options, theirs=theirs, who=who: build(
                        *(B, H, H, T, D, dtype, backward),
                        lambda q, k, v: pykern.attention(q, k, v, causal=True, **options),
                        {who: theirs},
                    ),
                )
        for backward in (False, True):
            yield Case(
                f"B{B} H{H} T{T} D{D} causal, learnt bias{' +backward' if backward else ''}",
                dtype,
                flops(B, H, T, T, D, True, backward),
                moved(B, H, H, T, T, D, dtype.itemsize, backward) + (2 if backward else 1) * typed_bias.nbytes,
                lambda dtype=dtype, backward=backward, typed_bias=typed_bias: build(
                    *(B, H, H, T, D, dtype, backward),
                    lambda q, k, v, bias: pykern.attention(q, k, v, bias=bias, causal=True),
                    {"torch by hand": lambda q, k, v, bias: formula(bias=bias)(q, k, v)},
                    bias=typed_bias,
                ),
            )
            pairs = sum(n * (n + 1) // 2 for n in lengths)
            yield Case(
                f"H{H} D{D} causal, 4 sequences of {T} rows{' +backward' if backward else ''}",
                dtype,
                4.0 * H * pairs * D * (3.5 if backward else 1.0),
                moved(1, H, H, T, T, D, dtype.itemsize, backward),
                lambda dtype=dtype, backward=backward: build(
                    *(1, H, H, T, D, dtype, backward),
                    lambda q, k, v: ragged(q, k, v, offsets),
                    {"torch sdpa, a call each": lambda q, k, v: one_by_one(q, k, v, lengths)},
                ),
            )


def ragged(q, k, v, offsets):
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = pykern.attention(q, k, v, causal=True, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    return out.transpose(0, 1)[None]


def one_by_one(q, k, v, lengths):
    parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 2)


def cases(quick: bool) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    yield from plain_cases(QUICK_SHAPES if quick else SHAPES, dtypes)
    yield from plain_cases(QUICK_SHAPES if quick else [SHAPES[0], SHAPES[1]], dtypes, causal=False)
    yield from plain_cases([TINY], dtypes)
    yield from masked_cases(*((1, 4, 128, 64) if quick else (1, 12, 1024, 64)), dtypes)
    yield from option_cases(*((1, 4, 128, 64) if quick else (1, 12, 1024, 64)), dtypes)
    yield from sparse_cases(*((1, 2, 256, 64, 32) if quick else (1, 8, 4096, 64, 256)), dtypes)
