"""One token at a time: attention of a query against its cache, and a language model that reads and continues texts."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import pykern
from benchmarks.bench_attention import by_hand
from benchmarks.bench_train import pykern_name
from benchmarks.models import GPT2, MINI, SMALL, TINY, Model
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import OURS, Case, numbers
from benchmarks.rivals_decode import Rival, missing, rivals
from benchmarks.timing import in_turn
from pykern.lm import Config, Session, Transformer

SHAPES = [  # B, H, G, S, D
    *((1, 12, 12, 128, 64), (1, 12, 12, 1024, 64), (8, 12, 12, 1024, 64)),
    *((1, 32, 32, 4096, 128), (1, 32, 8, 4096, 128)),
]
QUICK_SHAPES = [(2, 4, 2, 64, 32)]
DTYPES = (torch.float32, torch.bfloat16)
COLD_BYTES = 200e6  # of caches in turn: in a model, other layers' keys and weights come between two reads
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.25, "int4": 5.0}  # of a matrix weight, scales included
PREFILLS = [(GPT2, 1, 512), (GPT2, 8, 128), (SMALL, 1, 512), (SMALL, 8, 128)]  # model, batch, tokens
GENERATIONS = [  # model, batch, new tokens
    *((GPT2, 1, 128), (GPT2, 8, 128), (SMALL, 1, 128), (SMALL, 8, 128), (MINI, 1, 400)),
]
STEPS = [(GPT2, 1, 1000), (GPT2, 8, 1000)]  # model, batch, context
REST = 0.02  # seconds in which the threads of OpenMP and onnxruntime, which spin for milliseconds, fall asleep
QUICK = [(TINY, 1, 20), (TINY, 8, 20)]


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


def twins(model: Model, B: int, dtype: str) -> tuple[Session, dict[str, Rival]]:
    """A session, and the rivals of its weights that compute in this dtype."""
    torch.manual_seed(0)
    plain = PlainGPT(**model.sizes).eval()
    twin = Transformer(Config(**model.sizes))
    twin.load_state_dict({pykern_name(name): value for name, value in plain.state_dict().items()})
    if dtype == "bfloat16":
        plain = plain.bfloat16()
    return twin.session(dtype, batch=B), rivals(plain, twin, B, dtype)


def texts(model: Model, B: int, T: int) -> Tensor:
    return torch.randint(model.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))


def build_prefill(model: Model, B: int, T: int, dtype: str):
    """Logits after the last of T tokens, in an empty cache."""
    session, others = twins(model, B, dtype)
    ids = texts(model, B, T)

    def ours():
        session.reset()
        return session.prefill(ids)

    return {OURS: ours} | {who: partial(rival.prefill, ids) for who, rival in others.items()}


def build_generation(model: Model, B: int, n: int, dtype: str):
    """n tokens after the first, each the most likely one."""
    session, others = twins(model, B, dtype)
    ids = texts(model, B, 1)

    def ours():
        return session.generate(ids, max_new_tokens=n, temperature=0)

    return {OURS: ours} | {who: partial(rival.generate, ids, n) for who, rival in others.items()}


def build_step(model: Model, B: int, context: int, dtype: str):
    """Each call is the step after `context` tokens: the token is forgotten again."""
    session, others = twins(model, B, dtype)
    others = {who: rival for who, rival in others.items() if rival.steps}
    ids = texts(model, B, context + 1)
    session.prefill(ids[:, :context])
    for rival in others.values():
        rival.prefill(ids[:, :context])

    def ours():
        logits = session.step(ids[:, context])
        session.cache.truncate(context)
        return logits

    return {OURS: ours} | {who: partial(rival.step, ids[:, context], context) for who, rival in others.items()}


def step_moved(model: Model, B: int, context: int, dtype: str) -> float:
    """Bytes of a step: those of its dtype; quantised matrices beside float32 vectors, keys and values."""
    item = 2 if dtype == "bfloat16" else 4
    return model.decode_bytes(B, context, item) - model.matrix_weights * (item - BITS[dtype] / 8)


def model_cases(prefills, generations, steps) -> Iterator[Case]:
    for kind, build, sizes in (
        ("prefill", build_prefill, prefills),
        ("generate", build_generation, generations),
        ("step after", build_step, steps),
    ):
        for model, B, n in sizes:
            for dtype in BITS:
                if kind == "prefill":  # the head sees the last token of each text
                    body = model.matrix_weights - model.vocab_size * model.n_embd
                    flops = 2.0 * B * (n * body + model.vocab_size * model.n_embd) + model.attention_flops(B, n)
                    moved = step_moved(model, B, n - 1, dtype)
                else:
                    at = range(n) if kind == "generate" else [n]
                    flops = sum(model.decode_flops(B, t) for t in at)
                    moved = sum(step_moved(model, B, t, dtype) for t in at)
                quantised = dtype.startswith("int")
                yield Case(
                    f"{model.name} B{B} {kind} {n}{f', {dtype} weights' if quantised else ''}",
                    torch.float32 if quantised else getattr(torch, dtype),
                    flops,
                    moved,
                    lambda build=build, model=model, B=B, n=n, dtype=dtype: build(model, B, n, dtype),
                    working_set=step_moved(model, B, n, dtype),
                    rest=REST,
                )


def cases(quick: bool) -> Iterator[Case]:
    yield from attention_cases(QUICK_SHAPES if quick else SHAPES)
    yield from model_cases(*((QUICK, QUICK, QUICK) if quick else (PREFILLS, GENERATIONS, STEPS)))


def notes() -> list[str]:
    """What a reader must know of the table: the rivals that are not in it."""
    lacks = missing()
    names = " ".join(dict.fromkeys(name for lacking in lacks.values() for name in lacking))
    return [f"not installed, so not in the table: {', '.join(lacks)} (pip install {names})"] if lacks else []
