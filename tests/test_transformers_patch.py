"""patch(model): what is replaced, that results and gradients stay, and that undo() leaves no trace."""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'pykern[hf]'")

from transformers_models import FAMILIES, counted, make, tokens, weights_like  # noqa: E402

from pykern.integrations.transformers import patch, register  # noqa: E402

pytestmark = pytest.mark.one_isa

# float32, sums in another order, logits up to 5 and gradients relative to the largest of their tensor, as in
# test_transformers.py: measured 4e-6 and 5e-6.
CLOSE = {"rtol": 0.0, "atol": 2e-5}
CLOSE_GRADIENTS, SMALL = 2e-5, 0.1
CHECKPOINTING = next(  # the name changes within transformers 5
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(transformers.PreTrainedModel, name)
)
FORWARDS = ("linear_forward", "mlp_forward", "rms_norm_forward", "layer_norm_forward", "cross_entropy_forward")

# what one forward pass with labels runs: numbers of calls in the order of FORWARDS
RUNS = {
    "gpt2": (1, 0, 0, 5, 1),  # the head alone: Conv1D stays
    "llama": (9, 2, 5, 0, 1),
    "mistral": (9, 2, 5, 0, 1),
    "gemma2": (9, 2, 9, 0, 1),
    "gemma3": (9, 2, 13, 0, 1),
    "qwen2": (9, 2, 5, 0, 1),
    "opt": (13, 0, 0, 5, 1),
    "gpt_neox": (5, 2, 0, 5, 1),
    "gpt_oss": (9, 0, 5, 0, 1),
    "bert": (14, 0, 0, 6, 0),
    "t5": (25, 4, 12, 0, 0),
    "t5, gated": (25, 4, 12, 0, 0),
    "bloom": (9, 0, 0, 6, 1),
    "mpt": (9, 0, 0, 5, 1),
    "falcon": (1, 0, 0, 3, 1),
}


def step(model, **options):
    """(logits, loss, {name: gradient}) of texts of which some labels do not count."""
    labels = tokens(seed=5)
    labels[0, :3] = -100
    out = model(input_ids=tokens(), labels=labels, **options)
    ((out.logits * weights_like(out.logits)).mean() + out.loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return out.logits.detach(), out.loss.detach(), gradients


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[1], expected[1], rtol=0.0, atol=2e-6)  # of size 3
    assert found[2].keys() == expected[2].keys()
    for name, theirs in expected[2].items():
        assert (found[2][name] is None) == (theirs is None), name
        if theirs is not None:
            limit = CLOSE_GRADIENTS * max(float(theirs.abs().max()), SMALL)
            torch.testing.assert_close(found[2][name], theirs, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", RUNS)
def test_results_and_gradients_stay_and_undo_leaves_no_trace(family, monkeypatch):
    model = make(family)
    before, parameters = classes(model), dict(model.named_parameters())
    state, loss = model.state_dict(), model.loss_function
    expected = step(model)
    patched = patch(model)
    calls = counted(monkeypatch, *FORWARDS)
    assert_same(step(model), expected)
    assert tuple(calls.values()) == RUNS[family]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert [kind.__name__ for kind in classes(model)] == [kind.__name__ for kind in before]
    patched.undo()
    assert classes(model) == before and model.loss_function is loss and "_loss_function" not in vars(model)
    again = step(model)
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
    assert tuple(calls.values()) == RUNS[family]
    patched.undo()  # a second one does nothing


def test_every_family_is_in_the_table():
    assert set(FAMILIES) - set(RUNS) == {"gpt2, other scales", "gpt2, no scale"}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_with_attention_and_optimiser_a_training_run_is_the_same(family, monkeypatch):
    """Three steps of an optimiser that was made before patch(), in training mode, with gradient checkpointing."""
    register()
    runs = []
    for ours in (False, True):
        model = make(family, "pykern" if ours else "eager").train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if ours:
            patch(model)
            getattr(model, CHECKPOINTING)()
        losses = []
        for _ in range(3):
            loss = model(tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], abs=2e-5) and runs[0][2] < runs[0][0] - 0.01


def test_report():
    register()
    model = make("gpt2", "pykern")
    patched = patch(model)
    assert patched.report.split("\n") == [
        "replaced: 8",
        "  5 x LayerNorm, transformer.h.0.ln_1 ...: pykern.layer_norm",
        "  1 x Linear, lm_head: pykern.linear",
        "  1 x ForCausalLMLoss, loss: pykern.cross_entropy",
        "  1 x pykern, attention: pykern.attention, by its attn_implementation",
        "left: 10",
        "  8 x Conv1D, transformer.h.0.attn.c_attn ...: keeps its weight as [K, N]; pykern.linear reads [N, K] and "
        "would copy it in each call",
        "  2 x GPT2MLP, transformer.h.0.mlp ...: its c_fc is a Conv1D, not a plain torch.nn.Linear",
    ]
    assert patched.replaced["lm_head"] == "pykern.linear" and patched.left["transformer.h.0.mlp"].startswith("its c_fc")
    left = patch(make("t5")).left
    assert left["loss"] == "forward() computes its loss, if any, by itself"
    assert left["attention"] == "is chosen by register() and attn_implementation"
    left = patch(make("falcon")).left
    assert left["transformer.h.0.self_attention.dense"].startswith("has a class of its own")
    left = patch(make("bloom")).left
    assert left["transformer.h.0.mlp"] == "computes something else than an MLP of relu, gelu, gelu_tanh, silu, sigmoid"


KINDS = {
    "linear": (15, (15, 0, 0, 0, 0)),
    "mlp": (2, (0, 2, 0, 0, 0)),
    "norm": (5, (0, 0, 5, 0, 0)),
    "loss": (1, (0, 0, 0, 0, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_can_be_chosen(kind, monkeypatch):
    model = make("llama")
    patched = patch(model, **{name: name == kind for name in KINDS})
    calls = counted(monkeypatch, *FORWARDS)
    model(tokens(), labels=tokens())
    assert (len(patched.replaced), tuple(calls.values())) == KINDS[kind]


def test_a_context_manager_undoes_itself_and_twice_is_once():
    model = make("llama")
    before = classes(model)
    with patch(model) as first:
        with patch(model) as second:
            assert len(first.replaced) == 23 and not second.replaced
            assert second.left["lm_head"] == second.left["loss"] == "is pykern's already"
            assert second.left["model.norm"] == second.left["model.layers.0.mlp"] == "is pykern's already"
        assert classes(model) != before
    assert classes(model) == before


def test_a_copy_stays_patched_when_the_original_is_not(monkeypatch):
    model = make("llama")
    patched = patch(model)
    other = copy.deepcopy(model)
    patched.undo()
    calls = counted(monkeypatch, *FORWARDS)
    torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits, **CLOSE)
    assert calls["mlp_forward"] == 2


def test_undo_refuses_what_somebody_else_changed():
    model = make("llama")
    before = classes(model)
    patched = patch(model)
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match=r"Patch.undo: lm_head is a ParametrizedLinear that somebody else made"):
        patched.undo()
    nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    patched.undo()
    assert classes(model) == before


def test_a_forward_on_the_instance_is_left():
    model = make("llama")
    model.lm_head.forward = model.lm_head.forward
    patched = patch(model)
    assert patched.left["lm_head"] == "has a forward of its own, set on the instance"


def test_hooks_run_and_replaced_layers_are_called(monkeypatch):
    """An MLP whose layers are hooked or exchanged after patch() calls them one by one."""
    model = make("llama")
    patch(model)
    seen = []
    mlp = model.model.layers[0].mlp
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    calls = counted(monkeypatch, *FORWARDS)
    expected = model(tokens()).logits
    assert seen == ["up"] and calls["mlp_forward"] == 1
    handle.remove()
    torch.testing.assert_close(model(tokens()).logits, expected, **CLOSE)
    assert seen == ["up"] and calls["mlp_forward"] == 3

    class Doubled(nn.Module):
        """An adapter around a layer, as those of low rank are."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2.0 * self.layer(x)

    mlp.down_proj = Doubled(mlp.down_proj)
    plain = make("llama")
    plain.model.layers[0].mlp.down_proj = Doubled(plain.model.layers[0].mlp.down_proj)
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, **CLOSE)


def test_dropout_inside_an_mlp_is_kept_in_training(monkeypatch):
    """T5 drops hidden numbers between its two layers; with probability 1 only the rest of the layer is left."""
    models = make("t5", dropout_rate=1.0), make("t5", dropout_rate=1.0)
    patch(models[1])
    calls = counted(monkeypatch, *FORWARDS)
    inputs = {"input_ids": tokens(), "labels": tokens()}
    for training in (True, False):
        theirs, ours = (model.train(training)(**inputs).logits for model in models)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert calls["mlp_forward"] == (0 if training else 4)


def test_a_wide_dtype_inside_an_mlp_is_kept(monkeypatch):
    """Some keep the last layer in float32 when the others are half: then the layers are called one by one."""
    theirs, ours = (make("t5").encoder.block[0].layer[1].DenseReluDense.bfloat16() for _ in range(2))
    holder = nn.ModuleList([ours])
    for mlp in (theirs, ours):
        mlp.wo.float()
    patch(holder)
    calls = counted(monkeypatch, *FORWARDS)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert ours(x).dtype == theirs(x).dtype == torch.float32 and calls["mlp_forward"] == 0
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.0, atol=0.02)  # hidden numbers up to 2 round to 2^-8 of them


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_bfloat16_is_as_close_to_float32_as_before(family):
    exact = make(family)(tokens()).logits
    model = make(family).bfloat16()
    before = (model(tokens()).logits - exact).abs().max()
    patch(model)
    after = model(tokens()).logits
    assert after.dtype == torch.bfloat16
    assert (after - exact).abs().max() <= 2.0 * before  # both round in each layer; measured 0.9 to 1.2


def test_autocast(monkeypatch):
    exact = make("llama")(tokens(), labels=tokens())
    model = make("llama")
    errors = []
    for ours in (False, True):
        if ours:
            patch(model)
        calls = counted(monkeypatch, *FORWARDS)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((model(tokens(), labels=tokens()).logits - exact.logits).abs().max())
    assert errors[1] <= 2.0 * errors[0] and calls["mlp_forward"] == 2


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_the_loss_divides_by_what_the_trainer_says(items):
    labels = tokens(seed=5)
    labels[1, 4:] = -100  # 11 are left
    model = make("llama")
    options = {} if items is None else {"num_items_in_batch": items}
    expected = model(tokens(), labels=labels, **options).loss.detach()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    patch(model)
    for moved in ({}, {"shift_labels": shifted}):
        found = model(tokens(), labels=labels, **moved, **options).loss
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-6)  # float32 of size 3


def test_the_masked_loss_and_losses_that_are_somebody_else_s():
    model = make("llama")
    model.loss_type = "ForMaskedLM"
    expected = model(tokens(), labels=tokens(seed=2)).loss
    assert patch(model).replaced["loss"] == "pykern.cross_entropy"
    torch.testing.assert_close(model(tokens(), labels=tokens(seed=2)).loss, expected, rtol=0.0, atol=2e-6)
    model = make("llama")
    model.loss_function = own = lambda logits, labels, vocab_size, **_: logits.sum()
    patched = patch(model)
    assert patched.left["loss"] == "<lambda> is none of ForCausalLMLoss, ForMaskedLMLoss"
    patched.undo()
    assert model.loss_function is own


BLOCKS = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def test_the_page_s_code_prints_what_it_says():
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks, names = BLOCKS.findall(page), {}
    assert len(blocks) == page.count("```python") == page.count("```text") == 2
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/transformers.md", "exec"), names)
        assert printed.getvalue() == expected
