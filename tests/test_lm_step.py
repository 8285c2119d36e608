"""lm_step: the model's forward pass bit for bit, ragged texts, quantised weights, generation, refusals."""

import math

import pytest
import torch
from lm_models import SHAPES, full_logits, make, random_ids
from tools import EMULATED, constant, of_the_cpu

from pykern import _C, ops
from pykern.lm.packing import GROUPS, pack, quantise

# The vocabulary is no multiple of the panels' width (8, 16 or 32), head sizes are 6, 9 and 32.
WIDE = {"n_embd": 64, "n_head": 2, "vocab_size": 101, "block_size": 80}
MODELS = {name: {"n_embd": 24, "vocab_size": 37, "block_size": 80, **shape} for name, shape in SHAPES.items()}
MODELS |= {
    "odd head size": {"n_embd": 18, "n_head": 2, "positions": "none", "vocab_size": 5, "block_size": 80},
    "odd width": {"n_embd": 15, "n_head": 3, "positions": "alibi", "vocab_size": 1, "block_size": 80},
    "wide": WIDE,
    "odd hidden width, exact gelu, norm_eps": {
        "n_hidden": 37,
        "activation": "gelu_erf",
        "norm_eps": 0.01,
        "block_size": 80,
    },
    "silu without a gate": {"n_hidden": 23, "activation": "silu", "block_size": 80},
    "llama, rope_theta, narrow": {
        **SHAPES["llama"],
        **{"n_hidden": 13, "rope_theta": 5e5, "norm_eps": 0.05, "n_embd": 24, "vocab_size": 37, "block_size": 80},
    },
}
if EMULATED:  # lm_step on CUDA has no distance_bias
    MODELS = {name: shape for name, shape in MODELS.items() if shape.get("positions") != "t5"}
packed = pytest.mark.skipif(EMULATED, reason="on CUDA weights are not packed")
STORED = ("float32", "bfloat16", *([] if EMULATED else GROUPS))
# New tokens of each text in each call; text 0 goes over a page of 64 keys.
CALLS = ({0: 1, 1: 5, 2: 7}, {2: 13, 0: 20}, {1: 1}, {0: 7, 2: 1, 1: 20}, {1: 1, 2: 1, 0: 1}, {0: 41, 1: 2})
INTEGERS = {"dtype": torch.int64}


def grow(session, texts, calls=CALLS):
    """[length, V] of each text: the logits of all calls, put together."""
    parts = [[] for _ in texts]
    for call in calls:
        lengths = session.cache.lengths.tolist()
        rows = [texts[s][lengths[s] : lengths[s] + n] for s, n in call.items()]
        logits = session.extend(rows, list(call), every=True)
        for s, part in zip(call, logits.split(list(call.values())), strict=True):
            parts[s].append(part)
    return [torch.cat(part) for part in parts]


def texts_of(config, calls=CALLS):
    lengths = [sum(call.get(s, 0) for call in calls) for s in range(3)]
    return [random_ids(n, vocab=config.vocab_size, seed=s) for s, n in enumerate(lengths)]


def assert_same(got, expected):
    for s, (a, b) in enumerate(zip(got, expected, strict=True)):
        wrong = (a != b).nonzero()
        assert a.dtype == b.dtype and a.shape == b.shape and len(wrong) == 0, f"text {s}: {wrong[:1].tolist()}"


def assert_as_near(got, modules, wanted):
    """The error of got is at most twice that of the modules."""
    for a, b, c in zip(got, modules, wanted, strict=True):
        error, usual = ((x.double() - c).square().mean().sqrt() for x in (a, b))
        assert error <= 2 * usual + 1e-7, f"{float(error)}, of the modules {float(usual)}"


def alone(model, texts):
    return [full_logits(model, text[None])[0] for text in texts]


# ---- the forward pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", MODELS)
def test_ragged_texts_have_the_logits_of_the_forward_pass(shape, dtype):
    model = make(**MODELS[shape])
    texts = texts_of(model.config)
    session = model.session(dtype=dtype, batch=3)  # rounds the weights itself
    session.cache.k.fill_(math.nan)  # what is unused is never looked at
    session.cache.v.fill_(math.nan)
    got = grow(session, texts)
    assert session.cache.lengths.tolist() == [70, 29, 22]
    if EMULATED:  # attention to a cache is a kernel of its own there: the formula, and the bits of a text by itself
        itself = [model.session(dtype=dtype).extend([text], [0], every=True) for text in texts]
        assert_same(got, itself)
        assert_as_near(got, alone(model.to(getattr(torch, dtype)), texts), alone(model.double(), texts))
        return
    expected = alone(model.to(getattr(torch, dtype)), texts)
    assert all(x.isfinite().all() for x in expected)
    assert_same(got, expected)


def test_logits_of_last_rows_are_some_of_all_rows():
    model = make(**WIDE)
    texts = texts_of(model.config)
    every, last, none = (model.session(batch=3) for _ in range(3))
    rows = [text[:n] for text, n in zip(texts, (3, 1, 9), strict=True)]
    logits = every.extend(rows, [0, 1, 2], every=True)
    assert torch.equal(last.extend(rows, [0, 1, 2]), logits[[2, 3, 12]])
    assert none.extend(rows, [0, 1, 2], wanted=False).shape == (0, 101)
    assert torch.equal(none.cache.k, every.cache.k) and torch.equal(none.cache.v, every.cache.v)


@pytest.mark.parametrize("dtype", STORED)
def test_threads_and_repetition_change_no_bit(dtype, threads, with_threads):
    model = make(**WIDE, n_kv_head=1)
    texts = texts_of(model.config)
    first = with_threads(1, lambda: grow(model.session(dtype=dtype, batch=3), texts))
    for _ in range(2):
        assert_same(with_threads(threads, lambda: grow(model.session(dtype=dtype, batch=3), texts)), first)


@of_the_cpu
@pytest.mark.parametrize("dtype", STORED)
def test_large_weights_are_dealt_in_rounds(dtype, with_threads):
    """A head that three threads do not share at once, with an odd number of panels: the bits of one thread."""
    V, E, bits = 8209, 256, {"bfloat16": 16, "int8": 8, "int4": 4}.get(dtype, 32)
    (small,) = constant("cpu/panels.h", "kSmall")
    assert V * E * bits // 8 > 3 * small
    model = make(n_embd=E, n_head=4, vocab_size=V, block_size=16, **({"dtype": torch.bfloat16} if bits == 16 else {}))
    ids = random_ids(2, 5, vocab=V)
    first = with_threads(1, lambda: model.session(dtype=dtype, batch=2).prefill(ids))
    for threads in (2, 3):
        assert torch.equal(with_threads(threads, lambda: model.session(dtype=dtype, batch=2).prefill(ids)), first)
    if dtype not in GROUPS:
        assert torch.equal(first, full_logits(model, ids)[:, -1])


@of_the_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_share_the_keys_of_a_long_text(dtype, with_threads):
    """One key head and 1400 keys: two threads sum a part each; generation crosses from one part into two."""
    model = make(n_kv_head=1, n_embd=32, block_size=1500, positions="rope", dtype=getattr(torch, dtype))
    ids = random_ids(1, 1400)
    expected = full_logits(model, ids)

    def last(threads):
        session = model.session(dtype=dtype)
        session.read(ids[:, :1399])
        return with_threads(threads, lambda: session.step(ids[:, 1399]))

    for threads in (1, 2, 3):
        assert torch.equal(last(threads), expected[:, -1])

    def text(threads):
        return with_threads(
            threads, lambda: model.session(dtype=dtype).generate(ids[:, :1015], max_new_tokens=20, temperature=0.0)
        )

    assert torch.equal(text(1), text(2)) and torch.equal(text(1), text(3))


# ---- quantised weights

QUANTISED = {
    "gpt2": {"n_embd": 24, "vocab_size": 37},
    "llama, whole groups and a part of one": {**SHAPES["llama"], "n_embd": 72, "vocab_size": 45},
    "wide": WIDE,
}


@torch.no_grad()
def dequantised(model, kind):
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_gate, block.mlp.c_proj):
            if linear is not None:
                linear.weight.copy_(quantise(linear.weight, kind).weight())
    if model.lm_head is not None:
        model.lm_head.weight.copy_(quantise(model.lm_head.weight, kind).weight())
    return model


@packed
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("shape", QUANTISED)
def test_quantised_step_is_a_model_of_what_the_weights_stand_for(shape, kind):
    """As near to it as float32 modules are; and the bits of a text do not depend on chunks or on what is beside it."""
    changes = {"block_size": 80, **QUANTISED[shape], "tied_head": False}
    texts = texts_of(make(**changes).config)
    got = grow(make(**changes).session(dtype=kind, batch=3), texts)
    session = make(**changes).session(dtype=kind)
    for text, logits in zip(texts, got, strict=True):
        session.reset()
        assert torch.equal(session.extend([text], [0], every=True), logits)
        session.reset()
        assert torch.equal(torch.cat([session.extend([token[None]], [0]) for token in text]), logits)
    model = dequantised(make(**changes), kind)
    assert_as_near(got, alone(model, texts), alone(model.double(), texts))
    assert (got[0] - full_logits(make(**changes), texts[0][None])[0]).abs().max() > 1e-4


@packed
@pytest.mark.parametrize("kind", GROUPS)
def test_tied_head_is_quantised_and_the_embedding_is_not(kind):
    texts = texts_of(make(**WIDE).config)
    got = grow(make(**WIDE).session(dtype=kind, batch=3), texts)
    model = dequantised(make(**WIDE), kind)
    head = quantise(model.head_weight.detach(), kind).weight()

    def logits(model, head):
        with torch.no_grad():
            return [ops.linear(model.hidden(text[None]), head)[0] for text in texts]

    assert_as_near(got, logits(model, head), logits(model.double(), head.double()))


def some_weight(N, K):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K))
    weight[0] = weight[0] * 1e-4 + 3.0  # far from 0, and narrow
    weight[1] = 0.0
    weight[2] = 1.0
    weight[3] = weight[3].abs() * 1e-20
    return weight


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("K", [1, 31, 64, 150])
def test_quantised_weight_is_within_half_a_scale(kind, K):
    weight, group = some_weight(40, K), GROUPS[kind]
    q = quantise(weight, kind)
    error = (weight.double() - q.weight().double()).abs()
    assert q.scale.shape == (40, -(-K // group)) and q.scale.dtype == torch.bfloat16
    assert error[1].max() == 0 and (kind == "int8" or error[2].max() == 0)
    for first in range(0, K, group):
        part, wrong = weight[:, first : first + group].double(), error[:, first : first + group]
        scale = q.scale[:, first // group, None].double()
        low = -127 * scale if q.low is None else q.low[:, first // group, None].double()
        top = low + (254 if q.low is None else 15) * scale
        outside = torch.maximum(low - part, part - top).clamp_min(0)
        rounding = part.abs().amax(1, keepdim=True) * 2**-24 * 4  # of the products in float32
        assert (wrong <= torch.maximum(scale / 2, outside) + rounding).all()
        assert (outside <= part.abs().amax(1, keepdim=True) * 2**-8 + scale * 15 * 2**-9).all()


@pytest.mark.parametrize("kind", GROUPS)
def test_quantise_refuses_what_is_not_finite(kind):
    for bad in (math.nan, math.inf):
        weight = torch.ones(2, 3)
        weight[1, 2] = bad
        with pytest.raises(ValueError, match=r"quantise: weight of shape \(2, 3\) is not finite"):
            quantise(weight, kind)


@packed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *GROUPS])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (40, 33), (16, 64), (37, 150)])
def test_packed_weight_lies_as_the_header_says(dtype, N, K):
    W = _C.panel_width()
    weight = some_weight(N + 4, K)[4:]
    packed, scales, *said, group = pack(weight, dtype)
    assert said == [N, K, dtype if dtype in GROUPS else "numbers"] and group == GROUPS.get(dtype, 0)
    assert packed.shape[0] == -(-N // W) and packed.is_contiguous()
    n, k = torch.meshgrid(torch.arange(packed.shape[0] * W), torch.arange(K), indexing="ij")
    if dtype == "int4":
        byte = packed[n // W, k, n % W % (W // 2)]
        found = torch.where(n % W < W // 2, byte & 15, byte >> 4) ^ 8
    elif dtype == "bfloat16" and _C.pairs_bf16():
        found = packed[n // W, k // 2, n % W, k % 2]
    else:
        found = packed[n // W, k, n % W]
    assert found[N:].eq(0).all()
    if dtype not in GROUPS:
        assert scales is None and torch.equal(found[:N], weight.to(getattr(torch, dtype)))
        return
    q = quantise(weight, dtype)
    g = k // group
    assert scales.is_contiguous() and scales.shape[1:] == (-(-K // group), 1 if dtype == "int8" else 2, W)
    stands_for = (found.view(torch.int8) if dtype == "int8" else found).float() * scales[n // W, g, 0, n % W].float()
    if dtype == "int4":
        stands_for = stands_for + scales[n // W, g, 1, n % W].float()
    assert torch.equal(found[:N], q.q) and torch.equal(stands_for[:N], q.weight())


# ---- generation

OPTIONS = {"temperature": 1.3, "top_k": 20, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.4}


def ready(dtype="float32", K=12, model=None):
    """A session with texts of 6, 1 and 4 tokens in the cache, and what generate() takes for K more."""
    model = make(**WIDE) if model is None else model
    session = model.session(dtype=dtype, batch=3)
    texts = texts_of(model.config)
    session.extend([text[:n] for text, n in zip(texts, (6, 1, 4), strict=True)], [0, 1, 2], wanted=False)
    session.cache.reserve(K)
    history, counts = torch.zeros(3, 7 + K, **INTEGERS), torch.tensor([7, 2, 5])
    for s, n in enumerate(counts.tolist()):
        history[s, :n] = texts[s][:n]
    return session, dict(
        tokens=torch.stack([text[n] for text, n in zip(texts, (6, 1, 4), strict=True)]),
        first_rows=torch.arange(4, dtype=torch.int32),
        lengths=session.cache.lengths,
        block_table=session.cache.table,
        ids=torch.full((3, K), -7),
        seeds=torch.tensor([5, 2**62, 7]),
        draws=torch.tensor([0, 3, 2**33]),
        history=history,
        counts=counts,
        **OPTIONS,
    )


def one_by_one(session, x, stop=()):
    """The same by step() and sample(); returns ids [3, steps]."""
    tokens, lengths, columns = x["tokens"], x["lengths"].clone(), []
    logits = torch.empty(3, 101, dtype=session.cache.k.dtype)
    for _ in range(x["ids"].shape[1]):
        session._model.step(tokens, x["first_rows"], lengths, x["block_table"], logits)
        tokens = torch.empty(3, **INTEGERS)
        _C.sample(logits, x["seeds"], x["draws"], x["history"], x["counts"], tokens, **OPTIONS)
        x["draws"] += 1
        x["history"][range(3), x["counts"]] = tokens
        x["counts"] += 1
        lengths += 1
        columns.append(tokens)
        if set(tokens.tolist()) & set(stop):
            break
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dtype", STORED)
def test_generate_is_step_and_sample_one_by_one(dtype, threads):
    (session, x), (other, y) = ready(dtype), ready(dtype)
    expected = one_by_one(other, y)
    assert session._model.generate(**x) == 12
    assert len(set(expected.flatten().tolist())) > 12
    for name in ("draws", "history", "counts"):
        assert torch.equal(x[name], y[name]), name
    assert torch.equal(x["ids"], expected)
    assert x["counts"].tolist() == [19, 14, 17]
    assert torch.equal(session.cache.k, other.cache.k) and torch.equal(session.cache.v, other.cache.v)


def test_generate_ends_with_the_first_stop_token():
    session, x = ready()
    text = one_by_one(session, x)
    stop = next(int(t) for t in text[1, 3:] if t not in text[:, :3])
    first = int((text == stop).any(0).nonzero()[0])
    (session, x), (other, y) = ready(), ready()
    assert torch.equal(one_by_one(other, y, (stop,)), text[:, : first + 1])
    steps = session._model.generate(**x, stop_tokens=torch.tensor([1000, stop]))
    assert 3 < steps == first + 1 < 12
    assert torch.equal(x["ids"][:, :steps], text[:, :steps]) and x["ids"][:, steps:].eq(-7).all()
    for name in ("draws", "history", "counts"):
        assert torch.equal(x[name], y[name]), name
    assert torch.equal(session.cache.k, other.cache.k)


def test_generate_ends_where_logits_are_broken():
    model = make(**WIDE)
    with torch.no_grad():
        model.transformer.wte.weight[7] = math.nan
    session, x = ready(model=model)
    history = x["history"].clone()
    assert session._model.generate(**x) == 1
    assert x["ids"][:, 0].tolist() == [-1, -1, -1] and x["ids"][:, 1:].eq(-7).all()
    assert x["counts"].tolist() == [7, 2, 5] and torch.equal(x["history"], history)


def test_generate_without_history_is_without_penalty():
    (session, x), (other, y) = ready(), ready()
    session._model.generate(**x | {"history": None, "counts": None})
    other._model.generate(**y | {"repetition_penalty": 1.0})
    assert torch.equal(x["ids"], y["ids"])
