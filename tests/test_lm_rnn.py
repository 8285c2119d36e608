"""The recurrent language models against their formulas written out in float64, and what their files refuse."""

import json
import math

import pytest
import torch

from pykern.cli import main
from pykern.lm.rnn import KINDS, RNNLM, RNNConfig

pytestmark = pytest.mark.one_isa

SHAPE = {"n_embd": 6, "block_size": 8, "vocab_size": 11}


def make(kind, seed=0, dtype=None, **changes):
    torch.manual_seed(seed)
    return RNNLM(RNNConfig(kind=kind, **SHAPE | changes), dtype=dtype).eval()


def random_ids(*shape, seed=1):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def cell(kind, p, layer, x, h, c):
    """One step of one layer for vectors x, h, c [H]: the new h and c."""
    z = p[f"rnn.weight_ih_l{layer}"] @ x + p[f"rnn.bias_ih_l{layer}"]
    z = z + p[f"rnn.weight_hh_l{layer}"] @ h + p[f"rnn.bias_hh_l{layer}"]
    if kind == "elman":
        return torch.tanh(z), c
    i, f, g, o = z.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def logits_by_hand(model, ids):
    """Logits [T, V] of one text ids [T], in float64, one cell at a time."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    H, L = model.config.n_embd, model.config.n_layer
    h, c, out = [torch.zeros(H).double()] * L, [torch.zeros(H).double()] * L, []
    for token in ids.tolist():
        x = p["wte.weight"][token] * math.sqrt(H)
        for layer in range(L):
            h[layer], c[layer] = cell(model.config.kind, p, layer, x, h[layer], c[layer])
            x = h[layer]
        out.append(p["wte.weight"] @ x)
    return torch.stack(out)


@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_formula(kind, n_layer):
    model = make(kind, n_layer=n_layer, dtype=torch.float64)
    ids = random_ids(2, 9)  # longer than block_size: an RNN has no longest text
    expected = torch.stack([logits_by_hand(model, row) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_the_logits(kind):
    model = make(kind, dtype=torch.float64)
    ids, targets = random_ids(3, 5), random_ids(3, 5, seed=2)
    targets[1, 2] = -100
    logp = torch.stack([logits_by_hand(model, row) for row in ids]).log_softmax(-1)
    each = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    each[1, 2] = 0.0
    torch.testing.assert_close(model(ids, targets, reduction="none"), each)
    torch.testing.assert_close(model(ids, targets, reduction="sum"), each.sum())
    torch.testing.assert_close(model(ids, targets), each.sum() / 14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    model = make(kind, dtype=torch.float64)
    ids, targets = random_ids(2, 4), random_ids(2, 4, seed=2)
    model(ids, targets).backward()
    for name, p in model.named_parameters():
        place = (0,) * p.dim()
        kept, eps, losses = p.data[place].item(), 1e-6, []
        for moved in (kept + eps, kept - eps):
            p.data[place] = moved
            losses.append(model(ids, targets).item())
        p.data[place] = kept
        assert p.grad[place].item() == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
def test_steps_continue_the_text(kind):
    model, ids = make(kind, n_layer=2, dtype=torch.float64), random_ids(3, 7)
    state, logits = None, []
    for t in range(7):
        out, state = model.step(ids[:, t], state)
        logits.append(out)
    torch.testing.assert_close(torch.stack(logits, 1), model(ids).detach())
    assert isinstance(state, tuple) == (kind == "lstm")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_whole_forward_passes(kind):
    model, ids = make(kind, dtype=torch.float64), random_ids(2, 3)
    expected = ids
    for _ in range(12):  # beyond block_size
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=12, temperature=0.0), expected)
    assert torch.equal(model.generate(ids[0], max_new_tokens=12, temperature=0.0), expected[0])


def test_sampled_text_follows_the_seed():
    model, ids, seen = make("lstm"), random_ids(2, 3), []
    first = model.generate(ids, max_new_tokens=20, seed=4, callback=seen.append)
    assert torch.equal(first, model.generate(ids, max_new_tokens=20, seed=4))
    assert not torch.equal(first, model.generate(ids, max_new_tokens=20, seed=5))
    assert torch.equal(torch.stack(seen, 1), first[:, 3:])
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_penalty_sees_the_whole_text():
    model, text = make("elman", seed=3), random_ids(1, 4)
    expected, free = text, model.generate(text, max_new_tokens=10, temperature=0.0)
    for _ in range(10):
        logits = model(expected)[0, -1].detach()
        for token in set(expected[0].tolist()):
            logits[token] = logits[token] / 3 if logits[token] > 0 else logits[token] * 3
        expected = torch.cat([expected, logits.argmax()[None, None]], 1)
    result = model.generate(text, max_new_tokens=10, temperature=0.0, repetition_penalty=3.0)
    assert torch.equal(result, expected) and not torch.equal(result, free)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_torchs_stream(kind):
    a, b, other = (make(kind, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], other["wte.weight"])


def test_forget_bias_is_one():
    p = make("lstm", n_layer=2).state_dict()
    for layer in range(2):
        bias = p[f"rnn.bias_ih_l{layer}"] + p[f"rnn.bias_hh_l{layer}"]
        assert torch.equal(bias[6:12], torch.ones(6))
        assert (bias[:6] != 0).all() and (bias[12:].abs() < 0.9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count(kind):
    model = make(kind, n_layer=3, n_embd=7)
    assert model.config.parameter_count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("target", [1, 30, 1000, 117_056, 824_448])
@pytest.mark.parametrize("kind", KINDS)
def test_width_of_a_size(kind, target):
    """No other width comes closer to the number of parameters."""
    fields = {"kind": kind, "n_layer": 2, "block_size": 8, "vocab_size": 11}
    config = RNNConfig.of_size(target, **fields)
    widths = range(max(1, config.n_embd - 3), config.n_embd + 4)
    gaps = {n: abs(RNNConfig(n_embd=n, **fields).parameter_count - target) for n in widths}
    assert gaps[config.n_embd] == min(gaps.values())


@pytest.mark.parametrize("kind", KINDS)
def test_learns_what_a_bigram_cannot(kind):
    """In abcbabcb… what follows b depends on the letter before it."""
    torch.manual_seed(0)
    model = RNNLM(RNNConfig(kind=kind, **SHAPE | {"n_embd": 12}))
    text = torch.tensor([0, 1, 2, 1] * 9)
    x, y = text[:32][None], text[1:33][None]
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    assert model.generate(text[:4], max_new_tokens=40, temperature=0.0).tolist() == [0, 1, 2, 1] * 11


# ---- files


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, ids = make(kind, n_layer=2), random_ids(2, 5)
    model.save(tmp_path / "new")
    loaded = RNNLM.load(tmp_path / "new")
    assert loaded.config == model.config and sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert torch.equal(loaded(ids), model(ids))
    loaded(ids, ids).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(ValueError, match=r"already holds config\.json: choose another folder"):
        model.save(tmp_path / "new")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}


def test_a_save_that_was_cut_short_is_not_read(tmp_path, monkeypatch):
    from pykern.lm import rnn

    def fail_on_config(path, write, real=rnn.replace_file):
        if path.name == "config.json":
            raise OSError("no space left")
        real(path, write)

    monkeypatch.setattr(rnn, "replace_file", fail_on_config)
    with pytest.raises(OSError, match="no space left"):
        make("elman").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        RNNLM.load(tmp_path)


BAD_CONFIGS = {
    "not JSON": (b"{", "not valid JSON"),
    "unknown field": ({"gates": 3}, "unknown field 'gates'"),
    "missing field": ({"kind": None}, "field kind is missing"),
    "kind": ({"kind": "gru"}, "kind must be one of elman, lstm, got 'gru'"),
    "kind of another type": ({"kind": ["lstm"]}, "kind must be one of elman, lstm"),
    "not an integer": ({"n_embd": 6.0}, "n_embd must be an integer, got '6.0'"),
    "boolean": ({"n_layer": True}, "n_layer must be an integer, got 'True'"),
    "zero": ({"vocab_size": 0}, "vocab_size must lie between 1 and 16777216, got 0"),
    "huge": ({"n_embd": 10**30}, "n_embd must lie between 1 and 131072, got an integer of 100 bits"),
    "another width": ({"n_embd": 7}, r"model.safetensors: tensor 'wte.weight' has shape \[11, 6\], expected \[11, 7\]"),
    "another kind": ({"kind": "elman"}, "tensor 'rnn.weight_ih_l0' has shape"),
    "more layers": ({"n_layer": 64}, "tensor 'rnn.weight_ih_l1' is missing"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case, tmp_path):
    change, message = BAD_CONFIGS[case]
    make("lstm").save(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        values = json.loads(path.read_text()) | change
        change = json.dumps({name: value for name, value in values.items() if value is not None}).encode()
    path.write_bytes(change)
    with pytest.raises(ValueError, match=message):
        RNNLM.load(tmp_path)


def test_truncated_tensors(tmp_path):
    make("lstm").save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        RNNLM.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        RNNLM.load(tmp_path)


def test_commands_for_the_transformer_refuse_the_folder(tmp_path, capsys):
    make("lstm").save(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 1
    printed = capsys.readouterr()
    assert "Config: unknown field 'kind'" in printed.err and len(printed.err.splitlines()) == 1


# ---- refusals


def test_refusals():
    model, ids = make("elman"), random_ids(2, 3)
    with pytest.raises(ValueError, match=r"RNNLM: ids have shape \(3,\) but must be \[B, T\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"RNNLM: targets have shape \(2, 2\) but ids \(2, 3\)"):
        model(ids, ids[:, 1:])
    for bad in (11, -1):
        with pytest.raises(IndexError, match=str(bad)):
            model(torch.full((1, 2), bad))
    with pytest.raises(IndexError, match="12"):
        model(ids, torch.full((2, 3), 12))
    with pytest.raises(ValueError, match=r"generate: ids have shape \(1, 1, 1\)"):
        model.generate(torch.zeros(1, 1, 1, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match="generate: the prompt is empty"):
        model.generate(ids[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens is -1 but must not be negative"):
        model.generate(ids, max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"top_p is 2\.0"):
        model.generate(ids, max_new_tokens=1, top_p=2.0)
