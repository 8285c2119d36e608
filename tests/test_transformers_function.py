"""The attention function alone: each form of mask, bias and option against the formula in float64, and the refusals."""

import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'pykern[hf]'")

from transformers_models import CACHE, OWN_ATTENTION, V5, counted, make, tokens  # noqa: E402

from pykern.integrations.transformers import register  # noqa: E402
from pykern.integrations.transformers.attention import calls_interface, default_scale, forward  # noqa: E402

pytestmark = pytest.mark.one_isa

LOW = torch.finfo(torch.float64).min
EXACT = {"rtol": 0.0, "atol": 1e-12}  # float64 numbers of size 1, a few additions


class Layer(torch.nn.Module):
    """What the function sees of a layer."""

    def __init__(self, causal=True, training=False, **attributes):
        super().__init__()
        self.is_causal, self.training = causal, training
        for name, value in attributes.items():
            setattr(self, name, value)


def qkv(T=5, S=5, H=4, G=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, H, T, 8), (2, G, S, 8), (2, G, S, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def formula(q, k, v, add, sinks=None):
    """[B, T, H, E] of scores q k^T / sqrt(8) + add; -inf in add masks, a row without keys is 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / 8**0.5 + add
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    terms = (scores - scores.detach().amax(-1, keepdim=True).clamp(min=LOW)).exp()
    total = terms.sum(-1, keepdim=True)
    weights = terms / torch.where(total == 0.0, 1.0, total)
    return (weights[..., : k.shape[2]] @ v).transpose(1, 2)


def triangle(T, S, diagonal=0):
    return torch.ones(T, S, dtype=torch.bool).tril(diagonal)


def hidden(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def assert_formula(tensors, add, options, mask=None, layer=None, others=(), sinks=None):
    out, weights = forward(layer or Layer(), *tensors, mask, **options)
    expected = formula(*tensors, add, sinks)
    torch.testing.assert_close(out, expected, **EXACT)
    assert weights is None and out.is_contiguous()
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [*tensors, *others]
    for ours, theirs in zip(*(torch.autograd.grad((x * factor).sum(), wanted) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_causality_without_a_mask():
    assert_formula(qkv(), hidden(triangle(5, 5)), {})
    assert_formula(qkv(), torch.zeros(5, 5), {}, layer=Layer(causal=False))
    assert_formula(qkv(), torch.zeros(5, 5), {"is_causal": False})
    assert_formula(qkv(), hidden(triangle(5, 5)), {"is_causal": True}, layer=Layer(causal=False))
    assert_formula(qkv(T=1, S=7), torch.zeros(1, 7), {})  # one query sees all keys
    assert_formula(qkv(T=3, S=7), hidden(triangle(3, 7)), {})  # an empty static cache: upper left


def test_scaling():
    q, k, v = qkv()
    out, _ = forward(Layer(), q, k, v, None, scaling=0.7)
    torch.testing.assert_close(out, formula(q * 0.7 * 8**0.5, k, v, hidden(triangle(5, 5))), **EXACT)
    for flags, expected in (
        ({}, 8**-0.5),
        ({"scale_attn_weights": False}, 1.0),
        ({"scale_attn_by_inverse_layer_idx": True, "layer_idx": 2}, 8**-0.5 / 3),
        ({"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "layer_idx": 1}, 0.5),
    ):
        assert default_scale(Layer(**flags), 8) == pytest.approx(expected)


def test_bool_masks():
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1, 0, 2] = False  # a row that sees nothing: eager gives it a mean, pykern zeros
    assert_formula(qkv(), hidden(mask), {}, mask)
    longer = torch.cat([mask, torch.ones(2, 1, 5, 3, dtype=torch.bool)], -1)  # of a cache with more slots
    assert_formula(qkv(), hidden(mask), {}, longer)


@pytest.mark.parametrize("low", [LOW, -torch.inf])
def test_masks_of_numbers(low):
    add = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    open_ = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(4)) > 0.4
    open_[0, 0, 1] = False
    mask = add.masked_fill(~open_, low).requires_grad_()
    assert_formula(qkv(), add + hidden(open_), {}, mask)
    out, _ = forward(Layer(), *qkv(), mask)
    out.sum().backward()
    assert mask.grad.abs().max() > 0.01 and not mask.grad.masked_select(~open_).any()


@pytest.mark.parametrize("form", ["none", "bool", "numbers"])
@pytest.mark.parametrize("S", [5, 7])
def test_position_bias_has_a_gradient(form, S):
    bias = torch.randn(1, 4, 5, S, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    open_ = triangle(5, S).expand(2, 1, 5, S).clone()
    open_[0, 0, :, 0] = False
    open_[0, 0, 0] = True
    if form == "none":
        tensors = qkv(S=S)
        assert_formula(tensors, bias + hidden(triangle(5, S)), {"position_bias": bias}, others=[bias])
        return
    more = torch.zeros(open_.shape, dtype=torch.float64)
    if form == "numbers":
        more = torch.randn(open_.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = open_ if form == "bool" else more.masked_fill(~open_, LOW)
    assert_formula(qkv(S=S), bias + more + hidden(open_), {"position_bias": bias}, mask, others=[bias])


def test_a_float32_bias_beside_half_queries_keeps_its_precision():
    tensors = qkv(dtype=torch.bfloat16)
    bias = torch.full((1, 1, 5, 5), 1000.0) + torch.arange(5) * 0.25  # bfloat16 would round all of them to 1000
    out, _ = forward(Layer(causal=False), *tensors, None, position_bias=bias)
    expected = formula(*(x.double() for x in tensors), bias.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-9)  # the rounding of the result


def test_window_without_a_mask():
    band = triangle(5, 5) & ~triangle(5, 5, -3)
    assert_formula(qkv(), hidden(band), {"sliding_window": 3})
    assert_formula(qkv(T=1, S=7), hidden(~triangle(1, 7, 3)), {"sliding_window": 3})
    assert_formula(qkv(), hidden(triangle(5, 5)), {"sliding_window": 5})
    assert_formula(qkv(), hidden(triangle(5, 5)), {"sliding_window": 2}, triangle(5, 5)[None, None])  # the mask decides


def test_sinks_and_softcap():
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    assert_formula(qkv(), hidden(triangle(5, 5)), {"s_aux": sinks}, others=[sinks], sinks=sinks)
    q, k, v = qkv(G=4)
    out, _ = forward(Layer(), q, k, v, None, softcap=0.5, scaling=1.0)
    scores = 0.5 * torch.tanh(q @ k.mT / 0.5) + hidden(triangle(5, 5))
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), **EXACT)


def test_dropout_in_training_only():
    """Some layers pass their probability always; eager looks at module.training too."""
    expected = formula(*qkv(), hidden(triangle(5, 5)))
    torch.testing.assert_close(forward(Layer(), *qkv(), None, dropout=1.0)[0], expected, **EXACT)
    assert not forward(Layer(training=True), *qkv(), None, dropout=1.0)[0].any()


def test_sequences_end_to_end():
    q, k, v = (x[:1].detach().requires_grad_() for x in qkv(T=7, S=7))
    lengths = torch.tensor([0, 2, 2, 7])  # int64, and an empty one
    options = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    same = torch.block_diag(torch.ones(2, 2), torch.ones(5, 5)).bool()
    assert_formula((q, k, v), hidden(triangle(7, 7) & same), options)
    assert_formula((q, k, v), hidden(same), options, layer=Layer(causal=False))
    assert_formula((q, k, v), hidden(triangle(7, 7) & same), options, triangle(7, 7)[None, None])
    band = triangle(7, 7) & ~triangle(7, 7, -3) & same
    assert_formula((q, k, v), hidden(band), options | {"sliding_window": 3})


# ---- refusals


class Paged:
    """Any object: a cache that reaches the function is one that the layer did not read."""


LENGTHS = torch.tensor([0, 5], dtype=torch.int32)
BOTH = {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS}
REFUSED = {
    "output_attentions needs the attention weights": {"output_attentions": True},
    "head_mask scales the attention weights": {"head_mask": torch.ones(4)},
    "cache is the paged cache of continuous batching": {"cache": Paged()},
    "block_table is the paged cache of continuous batching": {"block_table": torch.zeros(1, 1)},
    "sinks are sinks for each token": {"sinks": torch.zeros(2, 4, 5, 1)},
    "indices is not known to pykern; register\\(ignore=...\\)": {"indices": torch.zeros(1)},
    "attention_mask has shape \\[2, 5\\], expected": {"attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    "attention_mask has type SimpleNamespace": {"attention_mask": types.SimpleNamespace()},
    "attention_mask has dtype torch.int64": {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.int64)},
    "sliding_window 3 without a mask is defined for causal layers only": {"sliding_window": 3, "is_causal": False},
    "cu_seq_lens_q needs a batch of 1 when there is no mask, got 2": BOTH,
    "cu_seq_lens_q and cu_seq_lens_k come together": {"cu_seq_lens_q": LENGTHS},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_options(words):
    options = {"attention_mask": None} | REFUSED[words]
    with pytest.raises(ValueError, match=f"^pykern: Layer: {words}"):
        forward(Layer(), *qkv(), **options)


def test_refused_combinations():
    row = [x[:1] for x in qkv()]
    with pytest.raises(ValueError, match="Layer: position_bias and cu_seq_lens_q do not go together without a mask"):
        forward(Layer(), *row, None, position_bias=torch.zeros(1, 1, 5, 5, dtype=torch.float64), **BOTH)
    with pytest.raises(ValueError, match="cu_seq_lens_q with a mask needs as many keys as queries, got 5 and 1"):
        forward(Layer(), row[0][:, :, :1], *row[1:], torch.ones(1, 1, 1, 5, dtype=torch.bool), **BOTH)


def test_refused_layers():
    with pytest.raises(ValueError, match="Layer: has attention sinks that it does not pass as s_aux"):
        forward(Layer(sinks=torch.zeros(4)), *qkv(), None)
    with pytest.raises(ValueError, match="Layer: position_embedding_type 'relative_key' is computed by 'eager' alone"):
        forward(Layer(position_embedding_type="relative_key"), *qkv(), None)


def test_harmless_and_ignored_options_change_nothing():
    expected, _ = forward(Layer(), *qkv(), None)
    options = {"position_ids": torch.arange(5)[None], "use_cache": True, "output_attentions": False, "cache": None}
    assert torch.equal(forward(Layer(), *qkv(), None, **options)[0], expected)
    found, _ = forward(Layer(), *qkv(), None, indices=torch.zeros(1), ignore=frozenset(["indices"]))
    assert torch.equal(found, expected)


def test_register_refuses_names_and_ignores_what_it_is_told():
    for name in ("eager", "sdpa", "flash_attention_2", "my_flash", "a/b", "paged|pykern", "flex_attention"):
        with pytest.raises(ValueError, match=f"register: name is {name!r}".replace("|", "\\|")):
            register(name)
    transformers.AttentionInterface.register("somebody", lambda *_: None)
    with pytest.raises(ValueError, match="expected one that no other attention has"):
        register("somebody")
    assert register() == register() == "pykern"
    model = make("llama", register("pykern_lenient", ignore=["flavour"]))
    strict = make("llama", "pykern")
    if V5:  # whose models hand what they do not know to attention
        assert torch.equal(model(tokens(), flavour=1).logits, strict(tokens()).logits)
        with pytest.raises(ValueError, match="LlamaAttention: flavour is not known to pykern"):
            strict(tokens(), flavour=1)


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pykern: transformers 4.57 or later is missing: pip install 'pykern\[hf\]'"):
        register()


def test_attention_weights_are_refused_by_whole_models():
    register()
    for family in ("llama", "gpt2", "gemma2", "opt"):
        if family in ("gpt2", "opt") and not V5:
            continue  # transformers 4 does not tell the layer, and the model's attentions are None
        with pytest.raises(ValueError, match="Attention: output_attentions needs the attention weights"):
            make(family, "pykern")(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own
        make("llama", "pykern").config.output_attentions = True


@pytest.mark.skipif(not V5, reason="transformers 4 starts continuous batching with its own attention functions only")
def test_continuous_batching_is_refused_by_transformers():
    register()
    model = make("llama", "pykern")
    with pytest.raises(ValueError, match="pykern is not supported for continuous batching"):
        model.init_continuous_batching().switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_families_with_attention_of_their_own(family, monkeypatch):
    """They add a mask to their scores themselves: a bool one would be added as 0 and 1."""
    register()
    calls = counted(monkeypatch, "attention_forward")
    if family == "falcon":
        with pytest.raises(KeyError, match="pykern"):
            make(family, "pykern")
    elif V5:
        with pytest.raises(ValueError, match="Config compute attention by themselves, or some of it, and take no"):
            make(family, "pykern")(tokens(), attention_mask=torch.ones(2, 9, dtype=torch.int64))
    else:  # transformers 4 makes their masks itself: what comes out is eager's
        assert torch.equal(make(family, "pykern")(tokens()).logits, make(family)(tokens()).logits)
    model = make(family)
    model.set_attn_implementation("pykern")  # only warns
    assert model.config._attn_implementation == "eager"
    assert calls["attention_forward"] == 0


@pytest.mark.skipif(V5, reason="transformers 5 gives the family an attention function")
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_families_that_transformers_4_leaves_out(family, monkeypatch):
    register()
    calls = counted(monkeypatch, "attention_forward")
    if family == "bert":
        with pytest.raises(KeyError, match="pykern"):
            make(family, "pykern")
    else:
        inputs = {"input_ids": tokens(), "labels": tokens()}
        assert torch.equal(make(family, "pykern")(**inputs).logits, make(family)(**inputs).logits)
    assert calls["attention_forward"] == 0


@pytest.mark.parametrize(
    ("config", "model", "calls"),
    [
        ("LlamaConfig", "LlamaModel", True),
        ("Gemma2Config", "Gemma2Model", True),  # not made for sdpa, but all layers call the interface
        ("GPT2Config", "GPT2Model", True),  # a layer with a softmax of its own beside the interface
        ("BloomConfig", "BloomModel", False),
        ("GitConfig", "GitModel", False),  # the layers for pictures call the interface, those for text do not
        ("BlipTextConfig", "BlipForConditionalGeneration", False),  # likewise, in two files
        ("CLIPConfig", "CLIPModel", True),
    ],
)
def test_which_configs_call_the_interface(config, model, calls):
    assert hasattr(transformers, model)  # imported on first use
    kind = getattr(transformers, config, None) or getattr(transformers.models.blip, config)
    assert calls_interface(kind) is calls
    assert calls_interface(Layer)  # of nobody we know


def test_a_mask_of_the_user_s_own():
    """Four dimensions pass through transformers as they are: bool, and numbers."""
    register()
    open_ = (torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(2)) > 0.3) | torch.eye(9).bool()
    numbers = torch.zeros(2, 1, 9, 9).masked_fill(~open_, torch.finfo(torch.float32).min)
    expected = make("llama")(tokens(), attention_mask=numbers).logits
    for mask in (open_, numbers):
        found = make("llama", "pykern")(tokens(), attention_mask=mask, **{CACHE: None}).logits
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)  # as in test_transformers.py
