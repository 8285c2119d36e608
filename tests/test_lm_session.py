"""Sessions: the cache changes no bit, sampling draws what it says, streams and refusals."""

import math

import pytest
import torch
from lm_models import POSITIONS, SHAPES, full_logits, make, random_ids

from pykern.lm import Config, KVCache, Sampler, Transformer, generate
from pykern.lm.session import DTYPES

# ---- cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_logits_are_the_full_forward_bit_for_bit(positions, batch, dtype):
    model = make(positions=positions, n_kv_head=2).to(getattr(torch, dtype))
    ids = random_ids(batch, 24)
    expected = full_logits(model, ids)
    session = model.session(dtype=dtype, batch=batch)
    got = [session.prefill(ids[:, :9]), session.prefill(ids[:, 9:10]), session.prefill(ids[:, 10:17])]
    got += [session.step(ids[:, t]) for t in range(17, 24)]
    for t, logits in zip((8, 9, 16, *range(17, 24)), got, strict=True):
        assert logits.dtype == expected.dtype
        assert torch.equal(logits, expected[:, t]), f"position {t}"
    assert session.length == 24
    alone = model.session(dtype=dtype)
    assert torch.equal(alone.prefill(ids[-1:]), expected[-1:, -1])


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_of_every_shape(shape):
    model = make(**SHAPES[shape])
    ids = random_ids(2, 12)
    session = model.session(batch=2)
    steps = torch.stack([session.step(ids[:, t]) for t in range(12)], 1)
    assert torch.equal(steps, full_logits(model, ids))


def test_later_tokens_change_nothing_before_them():
    model = make()
    ids = random_ids(1, 20)
    assert torch.equal(full_logits(model, ids)[:, :13], full_logits(model, ids[:, :13]))


def test_session_reset_and_nan_in_unused_slots():
    model = make()
    ids = random_ids(1, 10)
    session = model.session()
    first = session.prefill(ids)
    session.reset()
    session.cache.k.fill_(math.nan)
    session.cache.v.fill_(math.nan)
    assert session.length == 0 and torch.equal(session.prefill(ids), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_session_is_a_copy(dtype):
    """Training the model, its embedding included, changes nothing; a new session sees it."""
    model, ids = make(), random_ids(1, 10)
    session = model.session(dtype=dtype)
    before = session.prefill(ids)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    session.reset()
    assert torch.equal(session.prefill(ids), before)
    assert not torch.equal(model.session(dtype=dtype).prefill(ids), before)


def test_session_is_in_evaluation_mode_and_leaves_the_model_in_its_own():
    model = make(dropout=0.5).train()
    ids = random_ids(1, 6)
    logits = model.session().prefill(ids)
    assert model.training
    assert torch.equal(logits, full_logits(model.eval(), ids)[:, -1])


def test_full_cache_is_refused_and_untouched():
    model = make()
    ids = random_ids(2, 6)
    session = model.session(max_len=5, batch=2)
    session.prefill(ids[:, :4])
    before = session.cache.k.clone(), session.cache.v.clone()
    with pytest.raises(ValueError, match="2 more tokens after 4 exceed its capacity of 5"):
        session.prefill(ids[:, 4:])
    assert session.length == 4
    assert torch.equal(session.cache.k, before[0]) and torch.equal(session.cache.v, before[1])
    assert torch.equal(session.step(ids[:, 4]), full_logits(model, ids[:, :5])[:, -1])
    with pytest.raises(ValueError, match="1 more tokens after 5"):
        session.step(ids[:, 5])


@pytest.mark.parametrize("bad", [11, -1])
def test_token_out_of_range_is_refused_and_the_cache_untouched(bad):
    session = make().session()
    session.prefill(random_ids(1, 3))
    before = session.cache.k.clone()
    with pytest.raises(IndexError):
        session.step(torch.tensor([bad]))
    assert session.length == 3 and torch.equal(session.cache.k, before)


def test_an_interrupted_pass_does_not_count():
    """An exception between two layers leaves the text as long as it was."""
    model, ids = make(), random_ids(1, 6)
    cache = KVCache(2, 1, 4, 24, 4)
    with torch.no_grad():
        model.hidden(ids[:, :4], cache)
        hook = model.transformer.h[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.hidden(ids[:, 4:5], cache)
        hook.remove()
        assert cache.length == 4
        assert torch.equal(model.logits(model.hidden(ids[:, 4:5], cache))[:, -1], full_logits(model, ids[:, :5])[:, -1])


def test_a_prefill_interrupted_between_two_pieces_does_not_count(monkeypatch):
    model = make(block_size=40)
    ids, session = random_ids(1, 30), model.session()
    expected = session.prefill(ids)
    session.reset()
    monkeypatch.setattr("pykern.lm.session.CHUNK", 8)
    session.prefill(ids[:, :3])
    extend, calls = session.extend, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extend(*args, **kwargs)

    monkeypatch.setattr(session, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(ids[:, 3:])
    assert session.length == 3
    assert torch.equal(session.prefill(ids[:, 3:]), expected) and len(calls) == 7


def test_kvcache_truncate():
    model = make()
    ids, other = random_ids(1, 8), random_ids(1, 8, seed=5)
    session = model.session()
    session.prefill(other)
    session.reset()
    session.prefill(torch.cat((ids[:, :5], other[:, :3]), 1))
    session.cache.truncate(5)
    assert torch.equal(session.prefill(ids[:, 5:]), full_logits(model, ids)[:, -1])


# ---- sampling and generation


def test_greedy_takes_the_first_of_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 2.0, 2.0, 1.0]])
    assert Sampler(0.0, batch=2)(logits).tolist() == [1, 0]


def test_probabilities_after_top_k_and_top_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()

    def kept(**options):
        p, ids = Sampler(**options).probabilities(logits)
        return {i: round(q, 4) for i, q in zip(ids[0].tolist(), p[0].tolist(), strict=True) if q > 0}

    assert kept() == {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}
    assert kept(temperature=0.5) == {1: 0.7246, 3: 0.1812, 2: 0.0652, 0: 0.029}
    assert kept(top_k=2) == {1: 0.6667, 3: 0.3333}
    assert kept(top_k=9) == kept()
    # the smallest set that reaches p: 0.5 + 0.25 reaches 0.7 and not 0.8
    assert kept(top_p=0.4) == {1: 1.0}
    assert kept(top_p=0.7) == {1: 0.6667, 3: 0.3333}
    assert kept(top_p=0.8) == {1: 0.5556, 3: 0.2778, 2: 0.1667}
    assert kept(top_p=1.0) == kept()
    # exact quarters: reaching p exactly is enough
    p, _ = Sampler(top_p=0.5).probabilities(torch.zeros(1, 4))
    assert p[0].tolist() == [0.5, 0.5, 0.0, 0.0]
    # of the two most likely, 0.6667 alone reaches 0.6
    assert kept(top_k=2, top_p=0.6) == {1: 1.0}


def test_sampling_follows_the_probabilities():
    """Chi-square over 20000 draws: 26.1 is the 0.999 quantile for 8 degrees of freedom; the seed is fixed."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)
    sampler, draws = Sampler(seed=1, batch=200), 100
    ids = torch.stack([sampler(logits.expand(200, 9)) for _ in range(draws)])
    counts = torch.bincount(ids.flatten(), minlength=9)
    expected = p * 200 * draws
    assert ((counts - expected).square() / expected).sum() < 26.1


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.full((64, 5), -math.inf)
    logits[:, 2] = 0.0
    assert Sampler(seed=0, batch=64)(logits).eq(2).all()
    assert Sampler(seed=0, batch=64, top_p=0.9)(logits).eq(2).all()


def test_same_seed_same_text_whatever_the_other_rows_are():
    model = make()
    ids = random_ids(3, 4)
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 7}
    together = generate(model, ids, **options)
    assert torch.equal(together, generate(model, ids, **options))
    assert not torch.equal(together, generate(model, ids, **options | {"seed": 8}))
    assert torch.equal(generate(model, ids[:1], **options)[0], together[0])
    assert torch.equal(generate(model, ids[0], **options), together[0])
    assert torch.equal(generate(model, ids[1:2], **options | {"seed": 8})[0], together[1])


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    model = make(positions="rope")
    ids = random_ids(2, 5)
    out = generate(model, ids, max_new_tokens=10, temperature=0.0)
    text = ids
    for _ in range(10):
        text = torch.cat((text, full_logits(model, text)[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, text)


def test_generation_goes_on_behind_the_block():
    """24 tokens fill the block; then the last 12 are read again."""
    model = make()
    ids = random_ids(1, 20)
    out = generate(model, ids, max_new_tokens=20, temperature=0.0)
    assert out.shape == (1, 40)
    text, context = ids, ids
    for _ in range(20):
        if context.shape[1] > 24:
            context = context[:, -12:]
        token = full_logits(model, context)[:, -1:].argmax(-1)
        text, context = torch.cat((text, token), 1), torch.cat((context, token), 1)
    assert torch.equal(out, text)
    long = random_ids(1, 50)
    assert torch.equal(
        generate(model, long, max_new_tokens=1, temperature=0.0)[:, -1],
        full_logits(model, long[:, -24:])[:, -1].argmax(-1),
    )


def test_streaming_gives_the_tokens_of_generate_one_by_one():
    model = make()
    ids = random_ids(2, 4)
    options = {"max_new_tokens": 6, "top_k": 5, "seed": 3}
    expected = generate(model, ids, **options)[:, 4:]
    session, seen = model.session(batch=2), []
    stream = session.stream(ids, **options)
    assert torch.equal(next(stream), expected[:, 0]) and session.length == 4
    assert torch.equal(torch.stack(list(stream), 1), expected[:, 1:])
    generate(model, ids, callback=seen.append, **options)
    assert torch.equal(torch.stack(seen, 1), expected)


# ---- refusals

REFUSALS = {
    "quantised session": (
        lambda: make().session(dtype="int3"),
        ValueError,
        "'int3' but must be one of float32, bfloat16, int8, int4",
    ),
    "session beyond the block": (lambda: make().session(max_len=25), ValueError, "from 1 to block_size 24"),
    "session of nobody": (lambda: make().session(batch=0), ValueError, "batch is 0"),
    "prefill of another batch": (lambda: make().session().prefill(random_ids(2, 3)), ValueError, r"must be \[1, T\]"),
    "empty prefill": (lambda: make().session().prefill(random_ids(1, 0)), ValueError, "T at least 1"),
    "step with a matrix": (lambda: make().session().step(random_ids(1, 1)), ValueError, "must be \\[1\\]"),
    "float tokens": (lambda: make().session().step(torch.ones(1)), TypeError, "must be int64"),
    "temperature": (lambda: Sampler(-1.0), ValueError, "temperature is -1.0"),
    "temperature nan": (lambda: Sampler(math.nan), ValueError, "temperature is nan"),
    "top_k": (lambda: Sampler(top_k=0), ValueError, "top_k is 0"),
    "top_p": (lambda: Sampler(top_p=0.0), ValueError, "top_p is 0.0"),
    "seed": (lambda: Sampler(seed=-1), ValueError, "seed is -1"),
    "logits of a broken model": (lambda: Sampler()(torch.full((1, 3), math.nan)), ValueError, "no finite maximum"),
    "negative length": (
        lambda: generate(make(), random_ids(1, 3), max_new_tokens=-1),
        ValueError,
        "max_new_tokens is -1",
    ),
    "generation from a cube": (
        lambda: generate(make(), random_ids(1, 3, 2), max_new_tokens=1),
        ValueError,
        r"must be \[T\] or \[B, T\]",
    ),
    "empty cache": (lambda: KVCache(1, 1, 1, 0, 4), ValueError, "capacity 0"),
    "truncated beyond": (lambda: KVCache(1, 1, 1, 4, 4).truncate(5), ValueError, "length 5 is outside 0 .. 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.one_isa
def test_a_model_that_is_not_on_the_cpu_is_refused():
    model = Transformer(Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5, block_size=4), device="meta")
    with pytest.raises(ValueError, match="session: the model is on meta, but the compiled step runs on the CPU"):
        model.session()
