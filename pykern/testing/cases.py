"""The ops and inputs of the ratio rule: pykern, the plain formula, and torch's fused op where there is one."""

from typing import Any

import torch
import torch.nn.functional as F

import pykern
from pykern import _C
from pykern.testing import reference
from pykern.testing.ratios import Case
from pykern.testing.reference import in_own_dtype


def _draw(*shape, offset: float = 0.0, spread: float = 1.0):
    return lambda g: offset + spread * torch.randn(*shape, generator=g, dtype=torch.float64)


def _integers(high, *shape):
    return lambda g: torch.randint(high, shape, generator=g)


def _bools(*shape):
    """True in three of four."""
    return lambda g: torch.rand(*shape, generator=g) < 0.75


def _angles(table):
    """cos or sin [64,16] of the angles position / 10000^(i / 16)."""
    return lambda g: table(torch.arange(64.0, dtype=torch.float64)[:, None] * 10000.0 ** (torch.arange(16.0) / -16))


def _out(function):
    return None if function is None else lambda **inputs: {"out": function(**inputs)}


def _case(op, inputs, pykern, formula, fused=None, constant=()):
    """A case of one output; inputs are drawn in the order given."""

    def draw(generator):
        return {name: one(generator) for name, one in inputs.items()}

    return Case(op, draw, _out(pykern), _out(formula), _out(fused), constant)


def _elementwise(name, ours, fused):
    formula = in_own_dtype(getattr(reference, name))
    return _case(name, dict(x=_draw(64, 257, spread=3.0)), lambda x: ours(x), formula, lambda x: fused(x))


ACTIVATION = [
    _elementwise("relu", lambda x: pykern.relu(x), F.relu),
    _elementwise("sigmoid", lambda x: pykern.sigmoid(x), torch.sigmoid),
    _elementwise("silu", lambda x: pykern.silu(x), F.silu),
    _elementwise("gelu", lambda x: pykern.gelu(x), F.gelu),
    _elementwise("gelu_tanh", lambda x: pykern.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    _case(
        "swiglu",
        dict(gate=_draw(64, 257), up=_draw(64, 257)),
        lambda gate, up: pykern.swiglu(gate, up),
        in_own_dtype(reference.swiglu),
    ),
]


LINEAR = [
    _case(
        "linear",
        dict(x=_draw(3, 37, 320), weight=_draw(129, 320, spread=0.05), bias=_draw(129)),
        lambda x, weight, bias: pykern.linear(x, weight, bias),
        in_own_dtype(reference.linear),
        lambda x, weight, bias: F.linear(x, weight, bias),
    ),
    _case(
        "linear gelu_tanh + residual",
        dict(x=_draw(70, 192), weight=_draw(200, 192, spread=0.07), bias=_draw(200), residual=_draw(70, 200)),
        lambda x, weight, bias, residual: pykern.linear(x, weight, bias, activation="gelu_tanh", residual=residual),
        lambda x, weight, bias, residual: in_own_dtype(reference.linear)(
            x, weight, bias, activation="gelu_tanh", residual=residual
        ),
        lambda x, weight, bias, residual: F.gelu(F.linear(x, weight, bias), approximate="tanh") + residual,
    ),
]


def _mlp_inputs(M, K, H, N, gated):
    inputs = dict(x=_draw(M, K), up_weight=_draw(H, K, spread=K**-0.5), down_weight=_draw(N, H, spread=H**-0.5))
    inputs |= dict(up_bias=_draw(H, spread=0.3), down_bias=_draw(N, spread=0.3))
    if gated:
        inputs |= dict(gate_weight=_draw(H, K, spread=K**-0.5), gate_bias=_draw(H, spread=0.3))
    return inputs | dict(residual=_draw(M, N))


def _mlp_of_torch(x, up_weight, down_weight, up_bias, down_bias, residual, gate_weight=None, gate_bias=None):
    """The products by F.linear, GPT-2's MLP without a gate, Llama's with one."""
    up = F.linear(x, up_weight, up_bias)
    gated = gate_weight is not None
    h = F.silu(F.linear(x, gate_weight, gate_bias)) * up if gated else F.gelu(up, approximate="tanh")
    return F.linear(h, down_weight, down_bias) + residual


MLP = [
    _case(
        name,
        _mlp_inputs(70, 192, 300, 130, gated),
        lambda activation=activation, **tensors: pykern.mlp(**tensors, activation=activation),
        lambda activation=activation, **tensors: in_own_dtype(reference.mlp)(**tensors, activation=activation),
        lambda **tensors: _mlp_of_torch(**tensors),
    )
    for name, activation, gated in (("mlp gelu_tanh", "gelu_tanh", False), ("mlp swiglu", "silu", True))
]

NORM = [
    _case(
        "layer_norm",
        dict(x=_draw(70, 384, offset=1.0, spread=2.0), weight=_draw(384, offset=1.0), bias=_draw(384)),
        lambda x, weight, bias: pykern.layer_norm(x, weight, bias),
        in_own_dtype(reference.layer_norm),
        lambda x, weight, bias: F.layer_norm(x, (384,), weight, bias),
    ),
    _case(
        "rms_norm",
        dict(x=_draw(70, 384, spread=2.0), weight=_draw(384, offset=1.0)),
        lambda x, weight: pykern.rms_norm(x, weight),
        in_own_dtype(reference.rms_norm),
        lambda x, weight: F.rms_norm(x, (384,), weight, 1e-6),
    ),
]

SOFTMAX = [
    _case(
        "softmax",
        dict(x=_draw(70, 300, spread=3.0)),
        lambda x: pykern.softmax(x),
        in_own_dtype(reference.softmax),
        lambda x: F.softmax(x, -1),
    ),
    _case(
        "softmax mask",
        dict(x=_draw(70, 300, spread=3.0), mask=_bools(70, 300)),
        lambda x, mask: pykern.softmax(x, mask),
        in_own_dtype(reference.softmax),
    ),
]

ROPE = [
    _case(
        f"rope{' interleaved' if interleaved else ''}",
        dict(x=_draw(2, 3, 50, 40), cos=_angles(torch.cos), sin=_angles(torch.sin)),
        lambda x, cos, sin, interleaved=interleaved: pykern.rope(x, cos, sin, interleaved=interleaved),
        lambda x, cos, sin, interleaved=interleaved: in_own_dtype(reference.rope)(x, cos, sin, interleaved=interleaved),
        constant=("cos", "sin"),
    )
    for interleaved in (False, True)
]


def _attention_with_lse(attention):
    return lambda **inputs: dict(zip(("out", "lse"), attention(**inputs, causal=True, return_lse=True), strict=True))


def _attention_inputs(**more):
    """q, k, v of 130 queries and keys, four heads on two."""
    return dict(q=_draw(2, 4, 130, 64), k=_draw(2, 2, 130, 64), v=_draw(2, 2, 130, 64)) | more


def _attention_case(name, options, inputs=None, fused=None, constant=()):
    """A case whose options are the same for pykern and the formula."""
    return _case(
        f"attention {name}",
        inputs or _attention_inputs(),
        lambda **tensors: pykern.attention(**tensors, **options),
        lambda **tensors: in_own_dtype(reference.attention)(**tensors, **options),
        fused,
        constant,
    )


# slopes 2^(-8 (h + 1) / H), exact in every dtype: pykern wants them in float32
_SLOPES = dict(alibi_slopes=lambda g: 2.0 ** (-2 * torch.arange(1.0, 5.0)))


def _behind():
    """s - d [130,130]: how far each key is behind the diagonal of each query."""
    return torch.arange(130) - torch.arange(130)[:, None]


def _sdpa_with_window(q, k, v):
    seen = (_behind() <= 0) & (_behind() >= -20)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def _sdpa_with_alibi(q, k, v, alibi_slopes):
    bias = (-alibi_slopes[:, None, None] * _behind().abs()).masked_fill(_behind() > 0, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).expand(2, 4, 130, 130), enable_gqa=True)


def _keep(q, k, seed, dropout_p):
    """What dropout leaves, from the kernel: the generator itself is tests/test_attention_dropout.py's to check."""
    keep = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.bool)
    _C.attention_dropout(torch.tensor([seed]), keep, dropout_p=dropout_p)
    return keep


def _with_keep(q, k, v, dropout_p=0.2):
    keep = _keep(q, k, seed=1, dropout_p=dropout_p)
    return in_own_dtype(reference.attention)(q, k, v, causal=True, dropout_p=dropout_p, keep=keep)


ATTENTION_OPTIONS = [
    _attention_case("window", dict(window=(20, 0)), fused=_sdpa_with_window),
    _attention_case("softcap", dict(softcap=2.0, causal=True)),
    _case(
        "attention alibi",
        _attention_inputs(**_SLOPES),
        lambda q, k, v, alibi_slopes: pykern.attention(q, k, v, alibi_slopes=alibi_slopes.float(), causal=True),
        lambda **tensors: in_own_dtype(reference.attention)(**tensors, causal=True),
        _sdpa_with_alibi,
        constant=("alibi_slopes",),
    ),
    _attention_case("sinks", dict(causal=True), _attention_inputs(sinks=_draw(4))),
    _attention_case("bias + sinks", {}, _attention_inputs(bias=_draw(4, 130, 130), sinks=_draw(4))),
    _attention_case(
        "softcap + bias + window + sinks",
        dict(softcap=2.0, window=(40, 40)),
        _attention_inputs(bias=_draw(4, 1, 130), sinks=_draw(4)),
    ),
    _attention_case(
        "ragged",
        dict(causal=True),
        dict(
            q=_draw(150, 4, 64),
            k=_draw(170, 2, 64),
            v=_draw(170, 2, 64),
            cu_seqlens_q=lambda g: torch.tensor([0, 33, 33, 150], dtype=torch.int32),
            cu_seqlens_k=lambda g: torch.tensor([0, 40, 45, 170], dtype=torch.int32),
        ),
    ),
    _case(
        "attention dropout",
        _attention_inputs(),
        lambda q, k, v: pykern.attention(q, k, v, causal=True, dropout_p=0.2, seed=1),
        _with_keep,
    ),
]


def masked_sdpa(q, k, v, bias, mask):
    """Fused as long as bias takes no gradient and v is as wide as k; else torch computes the formula in steps."""
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~mask, -torch.inf).expand(2, 4, 40, 90))


ATTENTION = [
    _case(
        "attention causal",
        dict(q=_draw(2, 4, 130, 64), k=_draw(2, 2, 130, 64), v=_draw(2, 2, 130, 64)),
        lambda q, k, v: pykern.attention(q, k, v, causal=True),
        lambda q, k, v: in_own_dtype(reference.attention)(q, k, v, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ),
    _case(
        "attention mask + bias",
        dict(
            q=_draw(2, 4, 40, 80),
            k=_draw(2, 4, 90, 80),
            v=_draw(2, 4, 90, 48),
            bias=_draw(4, 40, 90),
            mask=_bools(40, 90),
        ),
        lambda **inputs: pykern.attention(**inputs),
        in_own_dtype(reference.attention),
    ),
    _case(
        "attention mask + constant bias",
        dict(
            q=_draw(2, 4, 40, 80),
            k=_draw(2, 4, 90, 80),
            v=_draw(2, 4, 90, 80),
            bias=_draw(4, 40, 90),
            mask=_bools(40, 90),
        ),
        lambda **inputs: pykern.attention(**inputs),
        in_own_dtype(reference.attention),
        masked_sdpa,
        constant=("bias",),
    ),
    Case(
        "attention lse",
        lambda g: {n: _draw(2, 3, t, 32)(g) for n, t in (("q", 33), ("k", 70), ("v", 70))},
        _attention_with_lse(lambda **inputs: pykern.attention(**inputs)),
        _attention_with_lse(in_own_dtype(reference.attention)),
    ),
]


def _decode_inputs(g):
    shapes = dict(q=(2, 4, 3, 64), k_cache=(2, 2, 80, 64), v_cache=(2, 2, 80, 48), k=(2, 2, 3, 64), v=(2, 2, 3, 48))
    inputs = {name: _draw(*shape)(g) for name, shape in shapes.items()}
    angles = dict(rotary_cos=_angles(torch.cos)(g), rotary_sin=_angles(torch.sin)(g))
    return inputs | angles | dict(cache_seqlens=torch.tensor([61, 17], dtype=torch.int32))


def _decode(**inputs):
    inputs |= {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    out = pykern.attention_with_kvcache(**inputs)
    return dict(out=out, k_cache=inputs["k_cache"], v_cache=inputs["v_cache"])


def _decode_formula(**inputs):
    out, _, k_cache, v_cache = in_own_dtype(reference.attention_with_kvcache)(**inputs)
    return dict(out=out, k_cache=k_cache, v_cache=v_cache)


DECODE = [
    Case(
        "attention_with_kvcache",
        _decode_inputs,
        _decode,
        _decode_formula,
        constant=("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"),
    )
]

EMBEDDING = [
    _case(
        "embedding",
        dict(weight=_draw(50, 96), ids=_integers(50, 4, 60)),
        lambda weight, ids: pykern.embedding(weight, ids),
        in_own_dtype(reference.embedding),
        lambda weight, ids: F.embedding(ids, weight),
    )
]

CROSS_ENTROPY = [
    _case(
        "cross_entropy",
        dict(logits=_draw(70, 500, spread=3.0), target=_integers(500, 70)),
        lambda logits, target: pykern.cross_entropy(logits, target),
        in_own_dtype(reference.cross_entropy),
        lambda logits, target: F.cross_entropy(logits, target),
    ),
    _case(
        "cross_entropy label_smoothing + z_loss",
        dict(logits=_draw(70, 500, spread=3.0), target=_integers(500, 70)),
        lambda logits, target: pykern.cross_entropy(logits, target, label_smoothing=0.1, z_loss=1e-2),
        lambda logits, target: in_own_dtype(reference.cross_entropy)(logits, target, label_smoothing=0.1, z_loss=1e-2),
    ),
    _case(
        "linear_cross_entropy",
        dict(x=_draw(70, 128), weight=_draw(500, 128, spread=0.3), target=_integers(500, 70), bias=_draw(500)),
        lambda x, weight, target, bias: pykern.linear_cross_entropy(x, weight, target, bias=bias),
        in_own_dtype(reference.linear_cross_entropy),
        lambda x, weight, target, bias: F.cross_entropy(F.linear(x, weight, bias), target),
    ),
]

_OPTIONS: dict[str, Any] = dict(lr=0.05, eps=1e-8, weight_decay=0.1)


def _adamw_formula(param, *grads):
    mean = variance = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        param, mean, variance = in_own_dtype(reference.adamw)(
            param, grad, mean, variance, beta1=0.9, beta2=0.99, step=step, **_OPTIONS
        )
    return param


def _adamw_steps(optimizer):
    def steps(param, *grads):
        param = torch.nn.Parameter(param.clone())
        adamw = optimizer([param])
        for grad in grads:
            param.grad = grad.clone()
            adamw.step()
        return param.detach()

    return lambda param, grad1, grad2, grad3: steps(param, grad1, grad2, grad3)


ADAMW = [
    _case(
        "adamw",
        {name: _draw(40, 70) for name in ("param", "grad1", "grad2", "grad3")},
        _adamw_steps(lambda params: pykern.optim.AdamW(params, betas=(0.9, 0.99), **_OPTIONS)),
        lambda param, grad1, grad2, grad3: _adamw_formula(param, grad1, grad2, grad3),
        _adamw_steps(lambda params: torch.optim.AdamW(params, betas=(0.9, 0.99), fused=True, **_OPTIONS)),
        constant=("param", "grad1", "grad2", "grad3"),
    )
]

CASES = [
    *ACTIVATION,
    *LINEAR,
    *MLP,
    *NORM,
    *SOFTMAX,
    *ROPE,
    *ATTENTION,
    *ATTENTION_OPTIONS,
    *DECODE,
    *EMBEDDING,
    *CROSS_ENTROPY,
    *ADAMW,
]
