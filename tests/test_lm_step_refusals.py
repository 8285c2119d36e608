"""What _C.LmModel refuses, with words, before anything is written."""

from types import SimpleNamespace

import pytest
import torch
from lm_models import SHAPES, make, random_ids
from test_lm_step import ready

from pykern import _C
from pykern.lm import weights
from pykern.lm.packing import pack

# ---- refusals: a model


def parts(monkeypatch, dtype="float32", **changes):
    """The two arguments that compiled_model gives LmModel."""
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_C", SimpleNamespace(LmModel=lambda *both: both))
        session = make(**{"n_embd": 32, "vocab_size": 37, **changes}).session(dtype=dtype)
    return session._model


def packed(name, at, change, layer=True):
    """Changes item `at` of a packed weight."""

    def apply(whole, layers):
        owner = layers[1] if layer else whole
        items = list(owner[name])
        items[at] = change(items[at])
        owner[name] = tuple(items)

    return apply


def put(name, change, layer=False):
    def apply(whole, layers):
        owner = layers[1] if layer else whole
        owner[name] = change(owner.get(name))

    return apply


def frozen(cache):
    array = cache.numpy()
    array.flags.writeable = False
    return array


def scale_of(_):
    return torch.ones(2, 2, 64)


def without(_):
    return None


REQUIRED = (
    *("n_head", "n_kv_head", "head_size", "hidden", "vocabulary", "max_len", "layer_norm", "qk_norm", "norm_eps"),
    *("qk_norm_eps", "scale", "embedding_scale", "activation"),
)
VECTORS_OF_A_LAYER = {
    "ln_1_weight": ("ln_1 weight", 32),
    "ln_1_bias": ("ln_1 bias", 32),
    "ln_2_weight": ("ln_2 weight", 32),
    "ln_2_bias": ("ln_2 bias", 32),
    "attn_bias": ("c_attn bias", 96),
    "proj_bias": ("attn.c_proj bias", 32),
    "up_bias": ("c_fc bias", 128),
    "down_bias": ("mlp.c_proj bias", 32),
}
MATRICES = {"attn": "c_attn", "proj": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj"}
ROPE, ALIBI, T5, INT8, INT4 = {"positions": "rope"}, {"positions": "alibi"}, {"positions": "t5"}, "int8", "int4"

BYTES = pack(torch.ones(128, 32), INT8)

# name: change, what the model is, error, words
MODEL_REFUSALS = {
    **{n: (lambda w, _, n=n: w.pop(n), {}, ValueError, f"{n} is missing") for n in REQUIRED},
    "activation": (put("activation", lambda _: "tanh"), {}, ValueError, "activation 'tanh' is not one of none, relu"),
    "float64": (put("embedding", torch.Tensor.double), {}, TypeError, "embedding has dtype float64, expected"),
    "embedding rank": (put("embedding", torch.flatten), {}, ValueError, r"embedding must be \[V, E\]"),
    "embedding across": (put("embedding", lambda x: x.T.contiguous().T), {}, ValueError, "embedding of .* contiguous"),
    "vocabulary": (put("embedding", lambda x: x[:-1]), {}, ValueError, "embedding .* vocabulary = 37"),
    "no embedding": (put("embedding", without), {}, ValueError, ".* do not make a width of 0"),
    "heads": (put("n_kv_head", lambda _: 3), {}, ValueError, "4 heads of 8 and 3 key heads do not make a width of 32"),
    "no key heads": (put("n_kv_head", lambda _: 0), {}, ValueError, ".* 0 key heads do not make"),
    "head size": (put("head_size", lambda _: 7), {}, ValueError, "4 heads of 7 and 4 key heads do not make"),
    "positions dtype": (put("positions", torch.Tensor.double), {}, TypeError, "positions has dtype float64"),
    "positions rank": (put("positions", torch.flatten), {}, ValueError, r"positions must be \[max_len, E\]"),
    "positions rows": (put("positions", lambda x: x[1:]), {}, ValueError, "positions .* max_len = 24"),
    "positions width": (put("positions", lambda x: x[:, 1:]), {}, ValueError, "positions .* width = 32"),
    "positions apart": (put("positions", lambda x: x.T.contiguous().T), {}, ValueError, "positions of .* contiguous"),
    "cos alone": (put("rotary_sin", without), ROPE, ValueError, "rotary_cos and rotary_sin must be given together"),
    "cos dtype": (put("rotary_cos", torch.Tensor.double), ROPE, TypeError, "rotary_cos has dtype float64, expected"),
    "sin rank": (put("rotary_sin", torch.flatten), ROPE, ValueError, r"rotary_sin must be \[max_len, D / 2\]"),
    "sin rows": (put("rotary_sin", lambda x: x[1:]), ROPE, ValueError, "rotary_sin .* max_len = 24"),
    "cos width": (put("rotary_cos", lambda x: x[:, 1:]), ROPE, ValueError, "rotary_cos has .* half of the head size 8"),
    "slopes dtype": (put("alibi_slopes", torch.Tensor.double), ALIBI, TypeError, "alibi_slopes has dtype float64"),
    "slopes rank": (put("alibi_slopes", lambda x: x[None]), ALIBI, ValueError, r"alibi_slopes must be \[H\]"),
    "slopes": (put("alibi_slopes", lambda x: x[1:]), ALIBI, ValueError, "alibi_slopes .* heads = 4"),
    "bias dtype": (put("distance_bias", torch.Tensor.double), T5, TypeError, "distance_bias has dtype float64"),
    "bias rank": (put("distance_bias", torch.flatten), T5, ValueError, r"distance_bias must be \[H, 2 max_len - 1\]"),
    "bias heads": (put("distance_bias", lambda x: x[1:]), T5, ValueError, "distance_bias .* heads = 4"),
    "bias width": (put("distance_bias", lambda x: x[:, 1:]), T5, ValueError, "distance_bias .* 2 max_len - 1 = 47"),
    "ln_f weight": (put("ln_f_weight", lambda x: x[1:]), {}, ValueError, "ln_f weight .* its width = 32"),
    "ln_f bias": (put("ln_f_bias", torch.Tensor.double), {}, TypeError, "ln_f bias has dtype float64 but embedding"),
    "vector rank": (put("ln_f_bias", lambda x: x[None]), {}, ValueError, r"ln_f bias must be \[n\]"),
    "vector steps": (put("ln_f_bias", lambda x: torch.ones(64)[::2]), {}, ValueError, "ln_f bias .* contiguous"),
    "no head": (put("head", without), {}, ValueError, r"head is \[0, 0\], expected \[37, 32\]"),
    "half a head": (put("head", lambda x: x[:5]), {}, ValueError, "head is not a packed weight"),
    **{
        n: (put(n, lambda x: torch.ones(x.numel() + 1), True), {}, ValueError, f"{said} .* its width = {size}")
        for n, (said, size) in VECTORS_OF_A_LAYER.items()
    },
    **{f"no {n}": (put(n, without, True), {}, ValueError, rf"{said} is \[0, 0\]") for n, said in MATRICES.items()},
    "gate": (packed("gate", 2, lambda n: n + 1), SHAPES["llama"], ValueError, r"c_gate is \[89, 32\]"),
    "gate bias": (put("gate_bias", lambda _: torch.ones(3), True), {}, ValueError, "c_gate bias .* its width = 128"),
    "gate in one layer": (lambda _, layers: layers[1].update(gate=layers[1]["up"]), {}, ValueError, "gate"),
    "inputs": (packed("up", 3, lambda k: k + 1), {}, ValueError, r"c_fc is \[128, 33\], expected \[128, 32\]"),
    "panels apart": (packed("up", 0, lambda p: p.repeat(1, 2, 1)[:, ::2]), {}, ValueError, "c_fc .* contiguous"),
    "few panels": (packed("up", 0, lambda p: p[1:]), {}, ValueError, "c_fc has .* panels of .* for 128 rows"),
    "many panels": (packed("up", 0, lambda p: torch.cat([p, p])), {}, ValueError, "c_fc has .* for 128 rows"),
    "short panels": (packed("up", 0, lambda p: p[:, 1:].contiguous()), {}, ValueError, "c_fc has panels of 31 numbers"),
    "other ISA": (packed("up", 0, lambda p: torch.cat([p, p], 2)), {}, ValueError, "up is not packed for the ISA"),
    "unpacked": (packed("up", 0, torch.flatten), {}, ValueError, "up is not packed for the ISA"),
    "panels dtype": (packed("up", 0, torch.Tensor.double), {}, TypeError, "c_fc has dtype float64 but embedding"),
    "int8 of numbers": (packed("up", 4, lambda _: INT8), {}, TypeError, "c_fc has dtype float32, expected uint8"),
    "int8 in bfloat16": (put("up", lambda _: BYTES, True), "bfloat16", TypeError, "c_fc is quantised"),
    "no scales": (packed("up", 1, without), INT8, ValueError, "c_fc has no scales"),
    "scales dtype": (packed("up", 1, torch.Tensor.float), INT8, TypeError, "c_fc has dtype float32, expected bfloat16"),
    "scales rank": (packed("up", 1, lambda s: s[..., 0].contiguous()), INT8, ValueError, "c_fc has no scales"),
    "scales apart": (packed("up", 1, lambda s: s.repeat(1, 1, 1, 2)[..., ::2]), INT8, ValueError, "c_fc .* contiguous"),
    "low missing": (packed("up", 1, lambda s: s[:, :, :1].contiguous()), INT4, ValueError, "c_fc .* panels = 2 in dim"),
    "group": (packed("up", 5, lambda _: 48), INT8, ValueError, "c_fc has groups of 48, expected 16, 32, 64 or 128"),
    "small group": (packed("up", 5, lambda _: 8), INT8, ValueError, "c_fc has groups of 8, expected 16"),
    "other group": (packed("up", 5, lambda _: 16), INT4, ValueError, "c_fc .* that of the panels = 2 in dimension 1"),
    "no layers": (lambda _, layers: layers.clear(), {}, ValueError, "the model has no layers"),
    "scale of one": (put("k_scale", scale_of, True), {}, TypeError, "k_cache has dtype float32, expected uint8"),
    "scale of v only": (put("v_scale", scale_of, True), {}, ValueError, "k_scale and v_scale must be given together"),
    "no cache": (put("k_cache", without, True), {}, ValueError, "k_cache is missing"),
    "cache dtype": (put("v_cache", torch.Tensor.bfloat16, True), {}, TypeError, "v_cache has dtype bfloat16"),
    "cache rank": (put("v_cache", lambda x: x[0], True), {}, ValueError, r"v_cache must be \[pages, G, page, D\]"),
    "cache heads": (put("v_cache", lambda x: x[:, 1:], True), {}, ValueError, "v_cache .* n_kv_head = 4"),
    "cache head size": (put("k_cache", lambda x: x[..., 1:], True), {}, ValueError, "k_cache .* head size = 8"),
    "cache pages": (put("k_cache", lambda x: x[:, :, 1:], True), {}, ValueError, "k_cache has .* but k_cache has"),
    "cache across": (put("k_cache", lambda x: x.mT.contiguous().mT, True), {}, ValueError, "k_cache must have stride"),
    "cache frozen": (put("v_cache", frozen, True), {}, ValueError, "v_cache is read-only"),
    "cache expanded": (put("v_cache", lambda x: x[:, :1].expand(x.shape), True), {}, ValueError, "elements of v_cache"),
    "empty pages": (
        lambda _, layers: [layer.update({n: layer[n][:, :, :0] for n in ("k_cache", "v_cache")}) for layer in layers],
        *({}, ValueError, "k_cache has pages of 0 keys"),
    ),
}


@pytest.mark.parametrize("name", MODEL_REFUSALS)
def test_model_refusal(name, monkeypatch):
    change, said, error, words = MODEL_REFUSALS[name]
    whole, layers = parts(monkeypatch, **({"dtype": said} if isinstance(said, str) else said))
    _C.LmModel(whole, layers)
    change(whole, layers)
    with pytest.raises(error, match=f"^lm_step: {words}"):
        _C.LmModel(whole, layers)


# ---- refusals: a step


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def item(name, at, value):
    def change(x):
        x[name] = x[name].clone()
        x[name][at] = value

    return change


def becomes(name, change):
    return lambda x: x.update({name: change(x[name])})


def write(name, value):
    return lambda x: x.update({name: value})


BOTH_REFUSALS = {
    "tokens dtype": (becomes("tokens", torch.Tensor.int), TypeError, "tokens has dtype int32, expected int64"),
    "tokens rank": (becomes("tokens", lambda t: t[None]), ValueError, r"tokens must be \[R\]"),
    "tokens apart": (becomes("tokens", lambda t: t.repeat(2)[::2]), ValueError, "tokens of .* contiguous"),
    "no tokens": (write("tokens", None), TypeError, "tokens"),
    "token beyond": (item("tokens", 1, 101), IndexError, "tokens contains 101, but the embedding has 101 rows"),
    "token before": (item("tokens", 2, -1), IndexError, "tokens contains -1"),
    "lengths dtype": (becomes("lengths", torch.Tensor.long), TypeError, "lengths has dtype int64, expected int32"),
    "lengths rank": (becomes("lengths", lambda t: t[None]), ValueError, r"lengths must be \[S\]"),
    "no texts": (write("lengths", int32()), ValueError, "there are no texts"),
    "length before": (item("lengths", 0, -1), IndexError, r"lengths\[0\] is -1, expected 0\.\.80"),
    "length beyond": (item("lengths", 2, 81), IndexError, r"lengths\[2\] is 81, expected 0\.\.80"),
    "full": (item("lengths", 1, 80), ValueError, "the cache is full: text 1 holds 80 tokens and"),
    "few pages": (becomes("block_table", lambda t: t[:, :0]), ValueError, "the cache is full: .* room for 0"),
    "first_rows dtype": (becomes("first_rows", torch.Tensor.long), TypeError, "first_rows has dtype int64"),
    "first_rows rank": (becomes("first_rows", lambda t: t[None]), ValueError, r"first_rows must be \[S \+ 1\]"),
    "first_rows size": (becomes("first_rows", lambda t: t[1:]), ValueError, "first_rows .* texts and one = 4"),
    "first_rows begins": (item("first_rows", 0, 1), ValueError, "first_rows must go from 0 to the .* rows of tokens"),
    "first_rows ends": (item("first_rows", 3, 2), ValueError, "first_rows must go from 0 to the .* rows of tokens"),
    "empty text": (item("first_rows", 1, 0), ValueError, "text 0 has 0 new tokens"),
    "rows backwards": (item("first_rows", 1, -2), ValueError, "text 0 has -2 new tokens"),
    "rows beyond": (item("first_rows", 1, 99), ValueError, "text 0 has 99 new tokens"),
    "table dtype": (becomes("block_table", torch.Tensor.long), TypeError, "block_table has dtype int64"),
    "table rank": (becomes("block_table", lambda t: t[0]), ValueError, r"block_table must be \[S, pages of a text\]"),
    "table rows": (becomes("block_table", lambda t: t[1:]), ValueError, "block_table .* texts = 3"),
    "page before": (item("block_table", (1, 0), -1), IndexError, r"block_table\[1, 0\] is -1, expected 0\.\.5"),
    "page beyond": (item("block_table", (2, 0), 6), IndexError, r"block_table\[2, 0\] is 6, expected 0\.\.5"),
}
STEP_REFUSALS = BOTH_REFUSALS | {
    "logits dtype": (write("logits", torch.zeros(3, 101).double()), TypeError, "logits has dtype float64"),
    "logits rank": (write("logits", torch.zeros(101)), ValueError, r"logits must be \[R, V\] or \[S, V\]"),
    "logits rows": (write("logits", torch.zeros(4, 101)), ValueError, "logits have 4 rows, expected 15 or 3"),
    "logits columns": (write("logits", torch.zeros(3, 100)), ValueError, "logits .* vocabulary = 101 in dimension 1"),
    "logits across": (write("logits", torch.zeros(101, 3).T), ValueError, "logits must have stride 1"),
    "logits expanded": (write("logits", torch.zeros(1, 101).expand(3, 101)), ValueError, "elements of logits share"),
    "logits frozen": (becomes("logits", frozen), ValueError, "logits is read-only"),
}
OUTPUTS = ("ids", "draws", "history", "counts")
VECTORS = ("seeds", "draws", "counts")
GENERATE_REFUSALS = BOTH_REFUSALS | {
    "no room": (item("lengths", 0, 69), ValueError, "the cache is full: text 0 holds 69 tokens and 12"),
    "two tokens of a text": (
        lambda x: x.update(tokens=random_ids(4, vocab=101), first_rows=int32(0, 2, 3, 4)),
        ValueError,
        "every text must have one new token",
    ),
    "ids rank": (becomes("ids", lambda t: t[0]), ValueError, r"ids must be \[S, K\]"),
    "ids rows": (becomes("ids", lambda t: t[1:]), ValueError, "ids .* texts = 3"),
    "no columns": (becomes("ids", lambda t: t[:, :0]), ValueError, "ids have no columns"),
    **{n: (becomes(n, torch.Tensor.int), TypeError, f"{n} has dtype int32") for n in (*OUTPUTS, "seeds")},
    **{f"{n} rank": (becomes(n, lambda t: t[None]), ValueError, rf"{n} must be \[S\]") for n in VECTORS},
    **{f"{n} size": (becomes(n, lambda t: t[1:]), ValueError, f"{n} .* texts = 3") for n in VECTORS},
    **{f"{n} apart": (becomes(n, lambda t: t.repeat(2)[::2]), ValueError, f"{n} .* contiguous") for n in VECTORS},
    "ids apart": (becomes("ids", lambda t: t.T.contiguous().T), ValueError, "ids of .* contiguous"),
    "stop dtype": (write("stop_tokens", int32(3)), TypeError, "stop_tokens has dtype int32"),
    "stop rank": (write("stop_tokens", torch.ones(1, 1).long()), ValueError, r"stop_tokens must be \[n\]"),
    "history alone": (write("counts", None), ValueError, "history and counts must be given together"),
    "history rank": (becomes("history", lambda t: t[0]), ValueError, r"history must be \[S, n\]"),
    "history rows": (becomes("history", lambda t: t[1:]), ValueError, "history .* texts = 3"),
    "history short": (
        becomes("history", lambda t: t[:, :-1].clone()),
        IndexError,
        r"counts\[0\] is 7, but history has 18 columns, 12 of them for new",
    ),
    "count": (item("counts", 1, -1), IndexError, r"counts\[1\] is -1, but history"),
    "history token": (item("history", (1, 1), 101), IndexError, "history contains 101, but the vocabulary has 101"),
    **{f"{n} frozen": (becomes(n, frozen), ValueError, f"{n} is read-only") for n in OUTPUTS},
    "draws are seeds": (lambda x: x.update(draws=x["seeds"]), ValueError, "draws shares memory with seeds"),
    "ids are tokens": (lambda x: x.update(ids=x["tokens"][:, None]), ValueError, "ids shares memory with tokens"),
    "draws are counts": (lambda x: x.update(draws=x["counts"]), ValueError, "counts shares memory with draws"),
    "temperature": (write("temperature", -1.0), ValueError, "temperature is -1 but"),
    "top_k": (write("top_k", -1), ValueError, "top_k is -1 but"),
    "top_p": (write("top_p", 0.0), ValueError, "top_p is 0 but"),
    "min_p": (write("min_p", 2.0), ValueError, "min_p is 2 but"),
    "penalty": (write("repetition_penalty", 0.0), ValueError, "repetition_penalty is 0 but"),
}


def assert_refused(call, session, x, change, error, words):
    outputs = [x[name] for name in (*OUTPUTS, "logits") if x.get(name) is not None]
    outputs += [session.cache.k, session.cache.v]
    before = [t.clone() for t in outputs]
    change(x)
    with pytest.raises(error, match=f"^lm_step: {words}"):
        call(**x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, before, strict=True))


@pytest.mark.parametrize("name", STEP_REFUSALS)
def test_step_refusal(name):
    session, x = ready()
    x = {n: x[n] for n in ("lengths", "block_table")} | {"logits": torch.full((3, 101), 7.0)}
    x |= {"tokens": random_ids(15, vocab=101), "first_rows": int32(0, 11, 12, 15)}
    assert_refused(session._model.step, session, x, *STEP_REFUSALS[name])


@pytest.mark.parametrize("name", GENERATE_REFUSALS)
def test_generate_refusal(name):
    session, x = ready()
    assert_refused(session._model.generate, session, x, *GENERATE_REFUSALS[name])
