"""The language model: what it computes, its names and initial weights, its files, its positions, what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lm_models import POSITIONS, SHAPES, full_logits, make, random_ids

from pykern import ops
from pykern.lm import Config, KVCache, Transformer
from pykern.lm.model import expected_tensors
from pykern.lm.positions import rotary, sinusoids

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64, sums in another order, a few layers deep


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


@pytest.mark.parametrize("cached", [False, True])
def test_alibi_makes_no_bias(cached, monkeypatch):
    """Slopes reach the kernel; with a cache too, whose steps have the bits of the full pass."""
    name = "attention_with_kvcache" if cached else "attention"
    model, seen, attention = make(positions="alibi"), [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a, **kw: seen.append(kw) or attention(*a, **kw))
    if cached:
        with torch.no_grad():
            model.hidden(random_ids(1, 5), KVCache(2, 1, 4, 24, 4))
    else:
        model(random_ids(2, 5))
    assert len(seen) == 2 and all(kw.get("bias") is None for kw in seen)
    assert all(kw["alibi_slopes"].tolist() == [2**-2, 2**-4, 2**-6, 2**-8] for kw in seen)


def test_dropout_falls_on_the_attention_weights(monkeypatch):
    model, seen, attention = make(dropout=0.25), [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **kw: seen.append(kw["dropout_p"]) or attention(*a, **kw))
    model.train()(random_ids(2, 5))
    model.eval()(random_ids(2, 5))
    assert seen == [0.25, 0.25, 0.0, 0.0]


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
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()
