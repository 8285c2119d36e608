"""The language model: what it computes, that its cache changes nothing, how it samples, what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pykern.lm import Config, KVCache, Sampler, Session, Transformer, generate
from pykern.lm.model import expected_tensors
from pykern.lm.positions import alibi, alibi_slopes, rotary, sinusoids, t5_buckets

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "t5", "none")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64, sums in another order, a few layers deep

# name: what differs from the GPT-2-like default
SHAPES = {
    "gpt2": {},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "tied_head": False},
    "relu": {"activation": "relu", "positions": "none"},
    "sinusoidal": {"positions": "sinusoidal", "n_kv_head": 1},
    "alibi": {"positions": "alibi", "norm": "rmsnorm"},
    "t5": {"positions": "t5"},
    "qk_norm": {"positions": "rope", "qk_norm": True, "n_kv_head": 2},
}


def make(seed=0, dtype=None, **changes):
    torch.manual_seed(seed)
    fields = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 24, "vocab_size": 11} | changes
    model = Transformer(Config(**fields), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():  # larger than the initial weights, so that every part matters
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def random_ids(*shape, vocab=11, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def reference(model, ids):
    """The logits [B, T, V], written out with torch in float64."""
    c = model.config
    p = {name: value.double() for name, value in model.state_dict().items()}
    B, T = ids.shape
    D = c.head_size

    def norm(x, name):
        if c.norm == "layernorm":
            return F.layer_norm(x, (c.n_embd,), p[name + ".weight"], p[name + ".bias"], 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[name + ".weight"]

    def linear(x, name):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    x = p["transformer.wte.weight"][ids]
    bias = torch.zeros(c.n_head, T, T, dtype=torch.float64)
    if c.positions == "learned":
        x = x + p["transformer.wpe.weight"][:T]
    if c.positions == "sinusoidal":
        table = [
            [(math.sin, math.cos)[i % 2](t / 10000 ** ((i - i % 2) / c.n_embd)) for i in range(c.n_embd)]
            for t in range(T)
        ]
        x = x * c.n_embd**0.5 + torch.tensor(table, dtype=torch.float64)
    if c.positions == "alibi":
        for h, i, j in itertools.product(range(c.n_head), range(T), range(T)):
            bias[h, i, j] = -(2.0 ** (-8 * (h + 1) / c.n_head)) * abs(i - j)
    if c.positions == "t5":
        for i, j in itertools.product(range(T), range(T)):
            d = max(i - j, 0)
            bucket = d if d < 16 else min(31, 16 + int(16 * math.log(d / 16) / math.log(8)))
            bias[:, i, j] = p["transformer.relative_bias.weight"][bucket]
    for layer in range(c.n_layer):
        h = f"transformer.h.{layer}."
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").split((c.n_embd, c.kv_heads * D, c.kv_heads * D), -1)
        q, k, v = (t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm:
            q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        if c.positions == "rope":
            angle = torch.tensor(
                [[t / 10000 ** (2 * i / D) for i in range(D // 2)] for t in range(T)], dtype=torch.float64
            )

            def rotate(t, angle=angle):
                a, b = t.chunk(2, -1)
                return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

            q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(c.n_head // c.kv_heads, 1) for t in (k, v))
        scores = q @ k.mT / D**0.5 + bias
        weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), h + "attn.c_proj")
        n = norm(x, h + "ln_2")
        if c.activation == "swiglu":
            y = F.silu(linear(n, h + "mlp.c_gate")) * linear(n, h + "mlp.c_fc")
        else:
            y = linear(n, h + "mlp.c_fc")
            y = F.gelu(y, approximate="tanh") if c.activation == "gelu" else F.relu(y)
        x = x + linear(y, h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight" if c.tied_head else "lm_head.weight"].T


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_formula(shape):
    model = make(dtype=torch.float64, **SHAPES[shape])
    ids = random_ids(3, 24)
    torch.testing.assert_close(model(ids), reference(model, ids), **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_the_logits(shape):
    model = make(dtype=torch.float64, **SHAPES[shape])
    ids, targets = random_ids(2, 7), random_ids(2, 7, seed=1)
    targets[0, 3] = -100
    loss = model(ids, targets)
    assert loss.shape == ()
    loss.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(fused[name], p.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    each = model(ids, targets, reduction="none")
    torch.testing.assert_close(each.sum() / 13, expected, **CLOSE)
    assert each[0, 3] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_as_many_as_the_config_says(shape):
    model = make(**SHAPES[shape])
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count


def test_parameter_names_are_gpt2s():
    names = set(make().state_dict())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} <= names
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        assert {f"transformer.h.1.{part}.weight", f"transformer.h.1.{part}.bias"} <= names
    assert len(names) == 4 + 2 * 12


def test_initial_weights():
    torch.manual_seed(0)
    config = Config(n_layer=8, n_head=4, n_embd=64, block_size=64, vocab_size=200)
    model = Transformer(config)
    attention = model.transformer.h[0].attn
    assert attention.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert attention.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert attention.c_attn.bias.eq(0).all() and model.transformer.ln_f.weight.eq(1).all()
    ids = random_ids(2, 64, vocab=200)
    assert model(ids, random_ids(2, 64, vocab=200, seed=1)).item() == pytest.approx(math.log(200), rel=0.01)
    model.init_weights("zero", torch.Generator().manual_seed(1))
    assert attention.c_proj.weight.eq(0).all()
    x = model.embed(ids, 0)
    assert torch.equal(model.hidden(ids), model.transformer.ln_f(x))
    with pytest.raises(ValueError, match="residual is 'ones'"):
        model.init_weights("ones")


def test_order_matters_only_with_positions():
    """The last token's logits when two earlier tokens change places: the same without positions, different with any."""
    ids = torch.tensor([[3, 1, 2, 5]])
    swapped = torch.tensor([[3, 2, 1, 5]])
    for positions in POSITIONS:
        model = make(positions=positions, dtype=torch.float64, n_layer=1)
        difference = (model(ids) - model(swapped))[:, -1].abs().max()
        assert (difference < 1e-12) == (positions == "none"), positions


# ---- cache


def full_logits(model, ids):
    with torch.no_grad():
        return model(ids)


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


def test_session_weights_are_shared_in_place_or_copied():
    model = make()
    shared, copied = model.session(), model.session(dtype="bfloat16")
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), shared.model.parameters(), strict=True))
    assert {p.dtype for p in copied.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


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


def test_interrupted_step_does_not_count():
    """An exception between two layers leaves the text as long as it was."""
    model = make()
    ids = random_ids(1, 6)
    session = model.session()
    session.prefill(ids[:, :4])
    hook = session.model.transformer.h[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.step(ids[:, 4])
    hook.remove()
    assert session.length == 4
    assert torch.equal(session.step(ids[:, 4]), full_logits(model, ids[:, :5])[:, -1])


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


# ---- files


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load(shape, tmp_path):
    model = make(**SHAPES[shape])
    model.save(tmp_path / "model")
    loaded = Transformer.load(tmp_path / "model")
    assert loaded.config == model.config
    ids = random_ids(2, 9)
    assert torch.equal(full_logits(loaded, ids), full_logits(model, ids))
    assert all(p.requires_grad for p in loaded.parameters())


def test_bfloat16_survives_saving(tmp_path):
    model = make().to(torch.bfloat16)
    model.save(tmp_path)
    for a, b in zip(model.parameters(), Transformer.load(tmp_path).to(torch.bfloat16).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_tensors_are_the_parameters(shape):
    model = make(**SHAPES[shape] | {"n_layer": 3})
    expected = expected_tensors(model.config)
    assert {name: value.shape for name, value in expected.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert all(value.device.type == "meta" for value in expected.values())


def test_loading_what_does_not_fit(tmp_path):
    make().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 16', '"n_embd": 32'))
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight.*shape"):
        Transformer.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Transformer.load(tmp_path / "nowhere")


# ---- positions


def test_rotary_tables_start_anywhere():
    like = torch.zeros(())
    for whole, part in zip(rotary(0, 9, 6, like), rotary(4, 5, 6, like), strict=True):
        assert whole.shape == (9, 3) and torch.equal(whole[4:], part)
    assert torch.equal(sinusoids(0, 9, 5, like)[4:], sinusoids(4, 5, 5, like))
    assert torch.equal(alibi(0, 9, 3, like)[:, 4:], alibi(4, 5, 3, like))
    assert torch.equal(t5_buckets(0, 200, 32, like.device)[150:], t5_buckets(150, 50, 32, like.device))


def test_alibi_slopes():
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(3).tolist() == [2**-4, 2**-8, 2**-2]


def test_t5_buckets():
    buckets = t5_buckets(0, 300, 32, torch.device("cpu"))
    assert buckets[299].flip(0)[:17].tolist() == list(range(17))
    assert buckets[299, 299 - 127] == 31 and buckets[299, 0] == 31 and buckets[0, 5] == 0
    assert buckets[299].flip(0).diff().ge(0).all()


# ---- refusals

REFUSALS = {
    "too many tokens": (lambda: make()(random_ids(1, 25)), ValueError, "25 tokens exceed block_size 24"),
    "ids without a batch": (lambda: make()(random_ids(4)), ValueError, r"ids have shape \(4,\)"),
    "targets of another shape": (lambda: make()(random_ids(1, 4), random_ids(1, 3)), ValueError, "targets have shape"),
    "label out of range": (
        lambda: make()(random_ids(1, 4), torch.full((1, 4), 11)),
        IndexError,
        "linear_cross_entropy",
    ),
    "quantised session": (
        lambda: make().session(dtype="int8"),
        ValueError,
        "'int8' but must be one of float32, bfloat16",
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
    "truncated beyond": (lambda: KVCache(1, 1, 1, 4, 4).truncate(5), ValueError, "length 5 is outside 0 .. 4"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


def test_session_is_exported():
    assert isinstance(make().session(), Session)
