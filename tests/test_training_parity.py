"""20 optimiser steps of three small Transformers with pykern and with plain torch, from the same weights and data.

The model is written once over a set of ops, so nothing but the ops and the optimiser differs. A gradient that is wrong
in one op bends the curve within a few steps.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykern
from pykern import optim
from pykern.testing import reference

STEPS = 20
B, T, V, WIDTH, HEADS, GROUPS, HIDDEN, LAYERS = 4, 33, 61, 48, 4, 2, 100, 2
HEAD = WIDTH // HEADS


def _linear(x, weight, bias=None, *, activation=None, residual=None):
    out = F.linear(x, weight, bias)
    out = F.gelu(out, approximate="tanh") if activation == "gelu_tanh" else out
    return out if residual is None else out + residual


def _attention(q, k, v, *, mask=None, bias=None):
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    seen = causal if mask is None else causal & mask
    scores = torch.zeros(seen.shape, dtype=q.dtype) if bias is None else bias
    return F.scaled_dot_product_attention(q, k, v, scores.masked_fill(~seen, -torch.inf), enable_gqa=True)


TORCH = SimpleNamespace(
    embedding=lambda weight, ids: F.embedding(ids, weight),
    linear=_linear,
    layer_norm=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    rms_norm=lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
    rope=lambda x, cos, sin: reference.in_own_dtype(reference.rope)(x, cos, sin),
    swiglu=lambda gate, up: F.silu(gate) * up,
    attention=_attention,
    loss=lambda x, weight, target, **options: F.cross_entropy(F.linear(x, weight), target, **options),
    optimizer=torch.optim.AdamW,
)
PYKERN = SimpleNamespace(
    embedding=pykern.embedding,
    linear=pykern.linear,
    layer_norm=pykern.layer_norm,
    rms_norm=pykern.rms_norm,
    rope=pykern.rope,
    swiglu=pykern.swiglu,
    attention=lambda q, k, v, **options: pykern.attention(q, k, v, causal=True, **options),
    loss=pykern.linear_cross_entropy,
    optimizer=optim.AdamW,
)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, HEAD)).transpose(1, 2)


def gpt(ops, w, ids, target):
    """Learned positions, layer norm, biases, GELU, tied head."""
    x = ops.embedding(w["wte"], ids) + ops.embedding(w["wpe"], torch.arange(T))
    for i in range(LAYERS):
        y = ops.layer_norm(x, w[f"{i}.norm1"], w[f"{i}.norm1_bias"])
        qkv = ops.linear(y, w[f"{i}.qkv"], w[f"{i}.qkv_bias"])
        q, k, v = (heads(part, HEADS) for part in qkv.chunk(3, -1))
        x = ops.linear(ops.attention(q, k, v).transpose(1, 2).flatten(2), w[f"{i}.proj"], residual=x)
        y = ops.layer_norm(x, w[f"{i}.norm2"], w[f"{i}.norm2_bias"])
        y = ops.linear(y, w[f"{i}.up"], w[f"{i}.up_bias"], activation="gelu_tanh")
        x = ops.linear(y, w[f"{i}.down"], residual=x)
    return ops.loss(x.flatten(0, 1), w["wte"], target.flatten())


def llama(ops, w, ids, target):
    """Rotary positions, RMS norm, grouped heads, SwiGLU, a head of its own, smoothed labels, some ignored."""
    angles = torch.arange(T)[:, None] * 100.0 ** (torch.arange(HEAD // 2) / -(HEAD // 2))
    cos, sin = angles.cos().to(w["wte"].dtype), angles.sin().to(w["wte"].dtype)
    x = ops.embedding(w["wte"], ids)
    for i in range(LAYERS):
        y = ops.rms_norm(x, w[f"{i}.norm1"])
        q, k, v = heads(ops.linear(y, w[f"{i}.qkv"][: WIDTH + 2 * GROUPS * HEAD]), HEADS + 2 * GROUPS).split(
            (HEADS, GROUPS, GROUPS), 1
        )
        y = ops.attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v)
        x = ops.linear(y.transpose(1, 2).flatten(2), w[f"{i}.proj"], residual=x)
        y = ops.rms_norm(x, w[f"{i}.norm2"])
        y = ops.swiglu(ops.linear(y, w[f"{i}.up"]), ops.linear(y, w[f"{i}.gate"]))
        x = ops.linear(y, w[f"{i}.down"], residual=x)
    target = target.masked_fill(target % 7 == 0, -100)
    return ops.loss(x.flatten(0, 1), w["head"], target.flatten(), label_smoothing=0.1)


def padded(ops, w, ids, target):
    """Left padding as a mask, and a learned bias on the scores for each head and distance."""
    real = torch.arange(T) >= torch.tensor([0, 3, 11, 20])[:, None]
    mask = real[:, None, None, :] | torch.eye(T, dtype=torch.bool)  # a padded query still sees itself
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    x = ops.embedding(w["wte"], ids)
    for i in range(LAYERS):
        qkv = ops.linear(ops.rms_norm(x, w[f"{i}.norm1"]), w[f"{i}.qkv"])
        q, k, v = (heads(part, HEADS) for part in qkv.chunk(3, -1))
        y = ops.attention(q, k, v, mask=mask, bias=w[f"{i}.bias"][:, distance])
        x = ops.linear(y.transpose(1, 2).flatten(2), w[f"{i}.proj"], residual=x)
    target = target.masked_fill(~real, -100)
    return ops.loss(x.flatten(0, 1), w["head"], target.flatten())


def weights(dtype):
    """What all three models may ask for; each uses its own part."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, spread):
        return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    shapes = dict(
        qkv=(3 * WIDTH, WIDTH), proj=(WIDTH, WIDTH), up=(HIDDEN, WIDTH), gate=(HIDDEN, WIDTH), down=(WIDTH, HIDDEN)
    )
    w = dict(wte=draw(V, WIDTH, spread=0.3), wpe=draw(T, WIDTH, spread=0.1), head=draw(V, WIDTH, spread=0.1))
    for i in range(LAYERS):
        w |= {f"{i}.{name}": draw(*shape, spread=shape[1] ** -0.5) for name, shape in shapes.items()}
        w |= {f"{i}.{name}": 1 + draw(WIDTH, spread=0.1) for name in ("norm1", "norm2")}
        w |= {f"{i}.{name}": draw(WIDTH, spread=0.1) for name in ("norm1_bias", "norm2_bias")}
        w |= {f"{i}.qkv_bias": draw(3 * WIDTH, spread=0.1), f"{i}.up_bias": draw(HIDDEN, spread=0.1)}
        w |= {f"{i}.bias": draw(HEADS, T, spread=0.1)}
    return {name: torch.nn.Parameter(x) for name, x in w.items()}


def train(model, ops, dtype):
    """The losses of STEPS steps on text that can be learned: each token is a function of the one before, mostly."""
    w = weights(dtype)
    optimizer = ops.optimizer(list(w.values()), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(V, (B, T + 1), generator=generator)
        ids[:, 1::2] = (ids[:, :-1:2] * 5 + 3) % V
        loss = model(ops, w, ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# float32: rounding differs, and AdamW divides small gradients by their own size. float64: the same model to 10 digits.
AGREE = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", AGREE)
@pytest.mark.parametrize("model", [gpt, llama, padded])
def test_losses_agree(model, dtype):
    ours, theirs = train(model, PYKERN, dtype), train(model, TORCH, dtype)
    assert ours[-1] < ours[0] - 0.2, ours  # it learns, or the curves would say nothing
    worst = max(range(STEPS), key=lambda i: abs(ours[i] - theirs[i]) / theirs[i])
    relative = abs(ours[worst] - theirs[worst]) / theirs[worst]
    assert relative <= AGREE[dtype], f"step {worst}: {ours[worst]} with pykern, {theirs[worst]} with torch"


def test_a_wrong_gradient_shows():
    """The comparison can fail: one gradient of the block that is off by 1 % bends the curve beyond the tolerance."""
    wrong = SimpleNamespace(**vars(PYKERN))
    wrong.rms_norm = lambda x, weight: pykern.rms_norm(x + 0.01 * (x - x.detach()), weight)
    ours, theirs = train(llama, wrong, torch.float32), train(llama, TORCH, torch.float32)
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) > AGREE[torch.float32]
