"""LoRA: W + (alpha / r) B A, its gradients, what it leaves alone, merging, and the adapter files of strangers."""

import copy
import json

import pytest
import torch
from lm_models import SHAPES, make, random_ids

from pykern import ops
from pykern.lm.lora import (
    TARGETS,
    adapters,
    add_lora,
    fingerprint,
    load_adapter,
    lora_state,
    merge_lora,
    plain_state,
    save_adapter,
)
from pykern.lm.model import Transformer

pytestmark = pytest.mark.one_isa

IDS = random_ids(3, 10)
TARGET = random_ids(3, 10, seed=1)


def disturb(model, seed=0):
    """Values for every A and B, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in lora_state(model).values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_start_changes_no_bit(shape):
    model = make(**SHAPES[shape])
    before, loss = model(IDS), model(IDS, TARGET)
    add_lora(model, 3, 6.0)
    assert torch.equal(model(IDS), before) and torch.equal(model(IDS, TARGET), loss)
    assert all(not lora_state(model)[name].any() for name in lora_state(model) if name.endswith("lora_B"))
    assert all(lora_state(model)[name].any() for name in lora_state(model) if name.endswith("lora_A"))


def test_sum_is_the_formula():
    model = make(dtype=torch.float64)
    base = copy.deepcopy(dict(model.state_dict()))
    add_lora(model, 3, 6.0)
    disturb(model)
    state = lora_state(model)
    for name in adapters(model):
        expected = base[f"{name}.weight"] + 6.0 / 3 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_gradients_are_those_of_the_dense_formula(shape):
    """float64: dB = s dW A^T and dA = s B^T dW, with dW autograd's of a model whose matrices are the sums."""
    model = make(dtype=torch.float64, **SHAPES[shape])
    add_lora(model, 3, 6.0)
    disturb(model)
    model(IDS, TARGET).backward()
    dense = make(dtype=torch.float64, **SHAPES[shape])
    dense.load_state_dict(plain_state(model))
    dense(IDS, TARGET).backward()
    for name, adapter in adapters(model).items():
        dW = dense.get_submodule(name).weight.grad
        torch.testing.assert_close(adapter.B.grad, 2.0 * dW @ adapter.A.detach().T, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(adapter.A.grad, 2.0 * adapter.B.detach().T @ dW, rtol=1e-10, atol=1e-13)
        assert adapter.A.grad.abs().max() > 1e-6


def test_gradients_are_those_of_finite_differences():
    model = make(dtype=torch.float64, n_layer=1)
    add_lora(model, 2, 2.0)
    disturb(model)
    loss = model(IDS, TARGET)
    loss.backward()
    h = 1e-6
    for name, adapter in adapters(model).items():
        for p in (adapter.A, adapter.B):
            for i in (0, p.numel() // 2, p.numel() - 1):
                with torch.no_grad():
                    flat = p.view(-1)
                    middle = flat[i].item()
                    flat[i] = middle + h
                    above = model(IDS, TARGET).item()
                    flat[i] = middle - h
                    below = model(IDS, TARGET).item()
                    flat[i] = middle
                assert p.grad.view(-1)[i].item() == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize(
    "targets, count", [(TARGETS, 5), (("c_attn",), 1), (("c_proj",), 2), (("c_fc", "c_gate"), 2)], ids=str
)
def test_only_the_targets_train(targets, count):
    model = make(**SHAPES["llama"])
    add_lora(model, 2, targets=targets)
    found = adapters(model)
    assert len(found) == count * 2 and {name.split(".")[-1] for name in found} == set(targets)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.parametrizations.weight.0.{x}" for name in found for x in "AB"}
    before = {name: value.clone() for name, value in plain_state(model, merged=False).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # the first step moves B alone: A's gradient is B^T dW = 0
        optimizer.zero_grad()
        model(IDS, TARGET).backward()
        optimizer.step()
    after = plain_state(model, merged=False)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.any() for value in lora_state(model).values())


def test_fused_ops_see_one_weight(monkeypatch):
    """The MLP stays one op with LoRA in it, and gets the sum."""
    model = disturb_added(make(**SHAPES["llama"]))
    seen = []
    mlp = ops.mlp
    monkeypatch.setattr(ops, "mlp", lambda x, up, *rest, **kw: seen.append(up) or mlp(x, up, *rest, **kw))
    model(IDS)
    expected = plain_state(model)
    assert len(seen) == 2
    for i, up in enumerate(seen):
        assert torch.equal(up, expected[f"transformer.h.{i}.mlp.c_fc.weight"])


def disturb_added(model, rank=3, alpha=6.0):
    add_lora(model, rank, alpha)
    return disturb(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_is_the_same_model(shape, tmp_path):
    model = make(**SHAPES[shape])
    names = list(model.state_dict())
    before = model(IDS)
    disturb_added(model)
    adapted = model(IDS)
    assert (adapted - before).abs().max() > 0.01
    merge_lora(model)
    assert sorted(model.state_dict()) == sorted(names) and not adapters(model)
    assert torch.equal(model(IDS), adapted)
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in model.parameters())
    model.save(tmp_path)
    assert torch.equal(Transformer.load(tmp_path)(IDS), adapted)


def test_session_reads_the_sums():
    model = disturb_added(make())
    logits = model.session().prefill(IDS[:1])
    assert torch.equal(logits, model(IDS[:1])[:, -1])


def test_autocast_adds_before_it_rounds():
    model = disturb_added(make())
    with torch.autocast("cpu", torch.bfloat16):
        weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, model.transformer.h[0].mlp.c_fc.weight)


def test_seed_decides_the_start():
    first, same, other = make(), make(), make()
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        add_lora(model, 2, seed=seed)
    name = "transformer.h.0.attn.c_attn.lora_A"
    assert torch.equal(lora_state(first)[name], lora_state(same)[name])
    assert not torch.equal(lora_state(first)[name], lora_state(other)[name])
    model, state = make(), torch.random.get_rng_state()
    add_lora(model, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- adapter files


def test_adapter_comes_back(tmp_path):
    model = disturb_added(make(**SHAPES["llama"]))
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter.json").read_text())
    assert (values["rank"], values["alpha"], values["targets"]) == (3, 6.0, list(TARGETS))
    fresh = make(**SHAPES["llama"])
    assert values["base"] == fingerprint(fresh.state_dict())
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))
    assert adapters(fresh).keys() == adapters(model).keys()


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "another format": (lambda f: edit(f, format="peft"), "adapter.json: not a pykern-lora-1 file"),
    "another base": (lambda f: edit(f, base="0" * 64), "trained on other weights"),
    "rank of a stranger": (lambda f: edit(f, rank=10**9), "rank is 1000000000 but transformer.h.0.attn.c_attn"),
    "rank 0": (lambda f: edit(f, rank=0), "rank is 0 but must be at least 1"),
    "rank that is none": (lambda f: edit(f, rank="3"), "rank must be an integer, got str"),
    "alpha": (lambda f: edit(f, alpha=-1.0), "alpha is -1.0"),
    "target": (lambda f: edit(f, targets=["wte"]), "targets has 'wte'"),
    "targets that are none": (lambda f: edit(f, targets="c_fc"), "targets must be a list of names"),
    "fewer targets": (lambda f: edit(f, targets=["c_fc"]), "does not belong to this model"),
    "another rank": (lambda f: edit(f, rank=2), "has shape [3, 16], expected [2, 16]"),
    "no JSON": (lambda f: (f / "adapter.json").write_text("{"), "not valid JSON"),
    "huge": (lambda f: (f / "adapter.json").write_text(" " * 70000), "at most 65536 are accepted"),
    "truncated tensors": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-4]),
        "adapter.safetensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter(case, tmp_path):
    change, message = BROKEN[case]
    save_adapter(disturb_added(make()), tmp_path)
    change(tmp_path)
    model = make()
    before = dict(model.state_dict())
    with pytest.raises(ValueError) as error:
        load_adapter(model, tmp_path)
    assert message in str(error.value)
    assert not adapters(model) and before.keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_missing_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_adapter(make(), tmp_path)


# ---- refusals

REFUSALS = {
    "rank as text": ({"rank": "2"}, TypeError, "rank must be an integer, got str"),
    "rank True": ({"rank": True}, TypeError, "rank must be an integer, got bool"),
    "rank 0": ({"rank": 0}, ValueError, "rank is 0 but must be at least 1"),
    "rank above a side": ({"rank": 17}, ValueError, "rank is 17 but transformer.h.0.attn.c_attn has shape [48, 16]"),
    "alpha NaN": ({"rank": 2, "alpha": float("nan")}, ValueError, "alpha is nan"),
    "alpha 0": ({"rank": 2, "alpha": 0}, ValueError, "alpha is 0"),
    "alpha as text": ({"rank": 2, "alpha": "1"}, TypeError, "alpha must be a number, got str"),
    "unknown target": ({"rank": 2, "targets": ("q_proj",)}, ValueError, "targets has 'q_proj'"),
    "one name": ({"rank": 2, "targets": "c_fc"}, TypeError, "targets must be a sequence of names, got str"),
    "no target": ({"rank": 2, "targets": ()}, ValueError, "empty targets"),
    "a layer that is not there": ({"rank": 2, "targets": ("c_gate",)}, ValueError, "no layer named c_gate"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    arguments, kind, message = REFUSALS[case]
    model = make()
    with pytest.raises(kind) as error:
        add_lora(model, **arguments)
    assert message in str(error.value)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_twice_and_never(tmp_path):
    model = make()
    for function in (merge_lora, lambda m: save_adapter(m, tmp_path / "out")):
        with pytest.raises(ValueError, match="the model has no LoRA"):
            function(model)
    assert not (tmp_path / "out").exists()
    add_lora(model, 2)
    with pytest.raises(ValueError, match="has a parametrization already: merge_lora first"):
        add_lora(model, 2)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has LoRA already"):
        load_adapter(model, tmp_path)
