"""pykern.attention inside the models of transformers: logits and gradients are those of their own eager attention."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'pykern[hf]'")

from transformers_models import (  # noqa: E402
    CACHE,
    DECODERS,
    OTHERS,
    V5,
    counted,
    make,
    tokens,
    weights_like,
)

from pykern.integrations.transformers import attention as adapter  # noqa: E402
from pykern.integrations.transformers import register  # noqa: E402

pytestmark = pytest.mark.one_isa
needs_v5 = pytest.mark.skipif(not V5, reason="in transformers 4 the family takes no other attention function")

# float32, sums in another order. Logits are up to 5: measured 3e-6. A gradient is compared with the largest number of
# its tensor, measured 4e-6 of it, but at least with SMALL: those of key biases are 0 but for rounding, 3e-7 measured.
CLOSE = {"rtol": 0.0, "atol": 2e-5}
CLOSE_GRADIENTS, SMALL = 1e-5, 0.1


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.fixture
def calls(monkeypatch):
    return counted(monkeypatch, "attention_forward", "attention_backward")


@pytest.fixture
def seen(monkeypatch):
    """The keyword arguments of each call of pykern.attention, with q, k and v."""
    kept = []

    def recorded(q, k, v, **options):
        kept.append({"q": q, "k": k, "v": v, **options})
        return adapter_attention(q, k, v, **options)

    adapter_attention = adapter.attention
    monkeypatch.setattr(adapter, "attention", recorded)
    return kept


def inputs_of(family, ids):
    return {"input_ids": ids, "labels": ids} if family.startswith("t5") else {"input_ids": ids}


def layers_of(model):
    """Calls of attention in one forward pass."""
    if model.config.model_type == "t5":
        return model.config.num_layers + 2 * model.config.num_decoder_layers
    return model.config.num_hidden_layers


def logits_and_gradients(model, keep=None, **inputs):
    logits = model(**inputs).logits
    factor = weights_like(logits)
    (logits * (factor if keep is None else factor * keep[..., None])).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), gradients


def assert_same(found, expected, keep=None):
    (logits, gradients), (their_logits, their_gradients) = found, expected
    rows = slice(None) if keep is None else keep.bool()
    torch.testing.assert_close(logits[rows], their_logits[rows], **CLOSE)
    for name, theirs in their_gradients.items():
        assert (gradients[name] is None) == (theirs is None), name
        if theirs is not None:
            limit = CLOSE_GRADIENTS * max(float(theirs.abs().max()), SMALL)
            torch.testing.assert_close(gradients[name], theirs, rtol=0.0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


ATTENTIVE = [*DECODERS, *(pytest.param(name, marks=needs_v5) for name in OTHERS)]


@pytest.mark.parametrize("family", ATTENTIVE)
def test_logits_and_gradients_are_eager_s(family, calls):
    inputs = inputs_of(family, tokens())
    expected = logits_and_gradients(make(family), **inputs)
    model = make(family, "pykern")
    found = logits_and_gradients(model, **inputs)
    assert calls == {"attention_forward": layers_of(model), "attention_backward": layers_of(model)}
    assert_same(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ATTENTIVE)
def test_padding(family, side, calls):
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4], mask[1, :1] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    inputs = inputs_of(family, tokens(3)) | {"attention_mask": mask}
    keep = torch.ones_like(mask) if family.startswith("t5") else mask  # its labels have no padding
    expected = logits_and_gradients(make(family), keep, **inputs)
    model = make(family, "pykern")
    found = logits_and_gradients(model, keep, **inputs)
    assert calls["attention_forward"] == layers_of(model)
    assert_same(found, expected, keep)


@pytest.mark.parametrize("family", DECODERS)
def test_static_cache(family, seen):
    """Prefill into a cache of more slots than tokens, then a token at a time."""
    ids = tokens(length=11)
    with torch.no_grad():
        expected = make(family)(ids).logits
        model = make(family, "pykern")
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        parts = []
        for start, stop in ((0, 7), *((t, t + 1) for t in range(7, 11))):
            position = {"cache_position": torch.arange(start, stop)} if not V5 else {}
            parts.append(model(ids[:, start:stop], use_cache=True, **{CACHE: cache}, **position).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
    assert [call["q"].shape[2] for call in seen] == [7, 7] + [1] * 8
    if V5 and family in ("gpt2", "llama", "qwen2", "gpt_neox"):  # no mask: the unwritten slots are cut off
        assert all(call["mask"] is None and call["causal"] and call["k"].shape[2] == 7 for call in seen[:2])


PACKING = [name for name in DECODERS if name not in ("opt", "gpt_oss")]  # whose masks ignore restarting positions


@pytest.mark.parametrize("family", PACKING)
def test_packed_batches_are_separate_texts(family):
    a, b = tokens(2, 5), tokens(2, 6, seed=3)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).expand(2, 11)
    inputs = {"input_ids": torch.cat([a, b], 1), "position_ids": positions, "use_cache": False}
    expected = logits_and_gradients(make(family), **inputs)
    found = logits_and_gradients(make(family, "pykern"), **inputs)
    assert_same(found, expected)
    with torch.no_grad():
        alone = torch.cat([make(family)(part).logits for part in (a, b)], 1)
    torch.testing.assert_close(found[0], alone, **CLOSE)


@pytest.mark.parametrize(
    ("family", "masked"),
    [*((name, masked) for name in ("llama", "mistral", "gemma2") for masked in (True, False)), ("gpt_oss", False)],
)
def test_cu_seq_lens(family, masked, seen):
    """Sequences end to end in one row: with the mask that restarting positions make, and without any."""
    a, b = tokens(1, 3), tokens(1, 6, seed=3)
    lengths = torch.tensor([0, 3, 9], dtype=torch.int32)
    positions = torch.cat([torch.arange(3), torch.arange(6)])[None]
    ids = torch.cat([a, b], 1)
    options = {"position_ids": positions, "use_cache": False}
    if not masked:  # a mask of ones is given: transformers then does not look at the positions
        options["attention_mask"] = torch.ones_like(ids)
    lens = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 6, "max_length_k": 6}
    model = make(family, "pykern", sliding_window=None if family == "mistral" else 16)
    with torch.no_grad():
        found = model(ids, **options, **lens).logits
        theirs = make(family, sliding_window=None if family == "mistral" else 16)
        alone = torch.cat([theirs(part).logits for part in (a, b)], 1)
    torch.testing.assert_close(found, alone, **CLOSE)
    assert [("cu_seqlens_q" in call, call.get("mask") is None) for call in seen] == [(not masked, not masked)] * 2


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_writes_the_same_tokens(family, cache, calls):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected = make(family).generate(ids, **options, disable_compile=True)
    model = make(family, "pykern")
    found = model.generate(ids, **options, disable_compile=True)
    assert found.tolist() == expected.tolist() and found.shape == (2, 15)
    assert calls["attention_forward"] == 6 * layers_of(model)


@needs_v5
def test_t5_generates_the_same_tokens(calls):
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    expected = make("t5").generate(tokens(), **options)
    assert make("t5", "pykern").generate(tokens(), **options).tolist() == expected.tolist()
    assert calls["attention_forward"] == 2 + 5 * 4


def test_strided_tensors_are_read_in_place_and_heads_are_not_repeated(seen):
    make("gpt2", "pykern")(tokens(), use_cache=False)
    make("llama", "pykern")(tokens(), use_cache=False)
    assert seen[0]["q"].stride() == seen[0]["v"].stride() == (9 * 96, 8, 96, 1)  # views of the fused product
    assert seen[2]["q"].shape[1] == 4 and seen[2]["k"].shape[1] == seen[2]["v"].shape[1] == 2
    assert seen[2]["q"].stride() == (9 * 32, 8, 32, 1)


def test_what_the_families_add_arrives(seen):
    sinks, gemma, gpt2 = make("gpt_oss", "pykern"), make("gemma2", "pykern"), make("gpt2, other scales", "pykern")
    for model in (sinks, gemma, gpt2):
        model(tokens())
    assert torch.equal(seen[0]["sinks"], sinks.model.layers[0].self_attn.sinks)
    assert seen[2]["softcap"] == 2.0
    assert [call["scale"] for call in seen[4:]] == pytest.approx([8**-0.5, 8**-0.5 / 2])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_dropout_falls_in_training_only(family, seen):
    """With probability 1 nothing is left to chance: what attention adds is zero, in eager as here."""
    name = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    others = {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    models = make(family, **{name: 1.0}, **others), make(family, "pykern", **{name: 1.0}, **others)
    evaluated = [model(tokens()).logits for model in models]
    trained = [model.train()(tokens()).logits for model in models]
    for theirs, ours in (evaluated, trained):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (trained[1] - evaluated[1]).abs().max() > 0.1
    assert [call["dropout_p"] for call in seen] == [0.0, 0.0, 1.0, 1.0]


def test_dropout_is_repeated_by_the_seed():
    model = make("llama", "pykern", attention_dropout=0.4).train()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model(tokens()).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_eager_is(dtype):
    exact = make("llama")(tokens()).logits
    errors = [(make("llama", name).to(dtype)(tokens()).logits - exact).abs().max() for name in ("pykern", "eager")]
    assert errors[0] <= 2.0 * errors[1]  # both are the rounding of two layers; measured 0.7 to 1.1


def test_set_attn_implementation(calls):
    model = make("llama")
    expected = model(tokens()).logits
    model.set_attn_implementation("pykern")
    torch.testing.assert_close(model(tokens()).logits, expected, **CLOSE)
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens()).logits, expected)
    assert calls["attention_forward"] == 2


def test_a_row_that_sees_no_key_is_zero(seen):
    """Eager gives it the mean of all values. Real tokens do not see such rows."""
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, :4] = 0
    kept = []
    model = make("llama", "pykern")
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(tokens(1), attention_mask=mask)
    assert not kept[0][0, :4].any() and kept[0][0, 4:].all()


def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    model = make("llama", "pykern")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, model(tokens()).logits, **CLOSE)


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, pykern\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "import pykern.integrations.transformers as t\nassert 'transformers' not in sys.modules\n"
        "t.register()\nassert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
