"""One token at a time: attention of a query against its cache, and a whole step of a language model."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pykern
from benchmarks.bench_attention import by_hand
from benchmarks.models import GPT2, SMALL, TINY, Model
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import OURS, Case, numbers
from benchmarks.timing import in_turn

SHAPES = [  # B, H, G, S, D
    *((1, 12, 12, 128, 64), (1, 12, 12, 1024, 64), (8, 12, 12, 1024, 64)),
    *((1, 32, 32, 4096, 128), (1, 32, 8, 4096, 128)),
]
QUICK_SHAPES = [(2, 4, 2, 64, 32)]
DTYPES = (torch.float32, torch.bfloat16)
COLD_BYTES = 200e6  # of caches in turn: in a model, other layers' keys and weights come between two reads
STEPS = [
    (GPT2, 1, 128),
    (GPT2, 1, 1000),
    (GPT2, 8, 128),
    (GPT2, 8, 1000),
    (SMALL, 1, 128),
    (SMALL, 8, 128),
]  # batch, context
QUICK_STEPS = [(TINY, 2, 20)]


def build_attention(B, H, G, S, D, dtype, count):
    """The new key and value go to the last of S places, the query sees all."""
    q, k, v = (numbers(B, heads, 1, D, dtype=dtype, seed=i) for i, heads in enumerate((H, G, G)))
    caches = [[numbers(B, G, S, D, dtype=dtype, seed=2 * i + j) for j in (3, 4)] for i in range(count)]
    seqlens = torch.full((B,), S - 1, dtype=torch.int32)

    def ours(K, V):
        return lambda: pykern.attention_with_kvcache(q, K, V, k, v, cache_seqlens=seqlens)

    def theirs(attend, K, V):
        def step():
            K[:, :, S - 1 :], V[:, :, S - 1 :] = k, v
            return attend(q, K, V)

        return step

    def sdpa(q, K, V):
        return F.scaled_dot_product_attention(q, K, V, enable_gqa=G < H)

    contestants = {
        OURS: in_turn([ours(K, V) for K, V in caches]),
        "torch sdpa": in_turn([theirs(sdpa, K, V) for K, V in caches]),
    }
    if G == H:
        contestants["torch by hand"] = in_turn([theirs(by_hand, K, V) for K, V in caches])
    return contestants


def attention_cases(shapes) -> Iterator[Case]:
    for B, H, G, S, D in shapes:
        for dtype in DTYPES:
            cache = 2 * B * G * S * D * dtype.itemsize
            for count in (1, max(2, round(COLD_BYTES / cache))):
                yield Case(
                    f"B{B} H{H} G{G} S{S} D{D}{' cold' if count > 1 else ''}",
                    dtype,
                    4.0 * B * H * S * D,
                    float(cache + (2 * B * H * D + 4 * B * G * D) * dtype.itemsize),
                    lambda B=B, H=H, G=G, S=S, D=D, dtype=dtype, count=count: build_attention(
                        B, H, G, S, D, dtype, count
                    ),
                    working_set=float(cache * count),
                )


def build_step(model: Model, B: int, context: int, dtype: torch.dtype):
    """Each call is the step after `context` tokens: the token is forgotten again."""
    from pykern.lm import Config, Transformer

    ids = torch.randint(model.vocab_size, (B, context + 1), generator=torch.Generator().manual_seed(0))
    session = Transformer(Config(**model.sizes)).session(str(dtype).removeprefix("torch."), batch=B)
    session.prefill(ids[:, :context])
    plain = PlainGPT(**model.sizes).to(dtype).eval()
    caches = plain.caches(B, dtype)

    def ours():
        session.step(ids[:, context])
        session.cache.truncate(context)

    return {OURS: ours, "torch": lambda: plain.step(ids[:, context], caches, context)}


def step_cases(steps) -> Iterator[Case]:
    for model, B, context in steps:
        for dtype in DTYPES:
            yield Case(
                f"{model.name} B{B} context {context}",
                dtype,
                model.decode_flops(B, context),
                model.decode_bytes(B, context, dtype.itemsize),
                lambda model=model, B=B, context=context, dtype=dtype: build_step(model, B, context, dtype),
            )


def cases(quick: bool) -> Iterator[Case]:
    yield from attention_cases(QUICK_SHAPES if quick else SHAPES)
    yield from step_cases(QUICK_STEPS if quick else STEPS)
