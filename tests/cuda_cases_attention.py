"""Attention and decode in all their options, as ops of cuda_cases.py."""

import torch
from cuda_op import Op, out
from philox import kept
from tools import draw

import pykern
from pykern import _C
from pykern.testing import reference


def attention_inputs(dtype, B, H, G, T, S, D):
    return dict(
        q=draw(B, H, T, D, dtype=dtype),
        k=draw(B, G, S, D, dtype=dtype, seed=1),
        v=draw(B, G, S, D, dtype=dtype, seed=2),
    )


def attention_masked(dtype, *sizes):
    B, _, _, T, S, _ = sizes
    mask = torch.rand((B, 1, T, S), generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0, 0, 0] = False  # a query that sees nothing
    return attention_inputs(dtype, *sizes) | dict(mask=mask)


def attention_biased(dtype, *sizes):
    _, H, _, T, S, _ = sizes
    return attention_inputs(dtype, *sizes) | dict(bias=draw(1, H, T, S, dtype=dtype, seed=3))


def attention_biased_by_key(dtype, *sizes):
    _, H, _, _, S, _ = sizes
    return attention_inputs(dtype, *sizes) | dict(bias=draw(1, H, 1, S, dtype=dtype, seed=3))


def attention_biased_by_head(dtype, *sizes):
    return attention_inputs(dtype, *sizes) | dict(bias=draw(1, sizes[1], 1, 1, dtype=dtype, seed=3))


def attention_in_blocks(dtype, *sizes):
    """Of the first tiles of keys the first queries see nothing."""
    found = attention_masked(dtype, *sizes)
    found["mask"][..., :128, :128] = False
    return found


def attention_around_nan(dtype, *sizes):
    """A query that sees nothing and a key that nobody sees are NaN."""
    found = attention_masked(dtype, *sizes)
    found["mask"][:, :, 0], found["mask"][..., 1] = False, False
    found["q"][:, :, 0], found["k"][:, :, 1], found["v"][:, :, 1] = torch.nan, torch.nan, torch.nan
    return found


def attention_to_infinity(dtype, *sizes):
    """Half of the queries see an infinite value."""
    found = attention_masked(dtype, *sizes)
    found["v"][:, :, 1, 0] = torch.inf
    return found


def attention_under_nan(dtype, *sizes):
    """The gradient of a query, which sees all keys, is NaN in its first number, by way of a factor."""
    B, H, _, T, _, D = sizes
    factor = torch.ones(B, H, T, D, dtype=dtype)
    factor[:, :, T // 2, 0] = torch.nan
    found = attention_masked(dtype, *sizes) | dict(factor=factor)
    found["mask"][:, :, T // 2] = True
    return found


def attention_with_slopes(dtype, *sizes):
    H = sizes[1]
    return attention_inputs(dtype, *sizes) | dict(alibi_slopes=0.5 ** torch.arange(1.0, H + 1))


def attention_with_sinks(dtype, *sizes):
    return attention_masked(dtype, *sizes) | dict(sinks=draw(sizes[1], dtype=dtype, seed=4))


ATTENTION = {
    "attention, full": (attention_inputs, {}),
    "attention, causal": (attention_inputs, dict(causal=True)),
    "attention, window": (attention_inputs, dict(window=(9, 0))),
    "attention, mask": (attention_masked, {}),
    "attention, bias": (attention_biased, dict(causal=True)),
    "attention, bias of keys": (attention_biased_by_key, {}),
    "attention, blocks": (attention_in_blocks, {}),
    "attention, around NaN": (attention_around_nan, {}),
    "attention, softcap and slopes": (attention_with_slopes, dict(softcap=2.0, causal=True)),
    "attention, sinks": (attention_with_sinks, {}),
}
SEED, DROPPED = 7, 0.25
LENGTHS = ((5, 0, 130, 1), (70, 3, 200, 64))  # of queries and keys of a ragged batch


def ragged(dtype, H, G, D):
    rows = [sum(lengths) for lengths in LENGTHS]
    shapes = dict(q=(rows[0], H, D), k=(rows[1], G, D), v=(rows[1], G, D))
    found = {name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    offsets = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in LENGTHS]
    return found | dict(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])


def weights_inputs(dtype, *sizes):
    """q, k and the lse that attention gives them."""
    found = {name: x for name, x in attention_inputs(dtype, *sizes).items() if name != "v"}
    _, lse = reference.attention(found["q"], found["k"], found["k"], return_lse=True)
    return found | dict(lse=lse.to(torch.float64 if dtype == torch.float64 else torch.float32))


def dropout_inputs(dtype, B, H, G, T, S, D):
    return dict(x=draw(B, H, T, S, dtype=dtype))


def keep_of_ours(x):
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    _C.attention_dropout(torch.tensor([SEED], device=x.device), keep, dropout_p=DROPPED)
    return keep.to(x.dtype)


def attentions():
    kernels = ("attention_forward", "attention_backward")
    shapes = {
        "odd": (1, 2, 1, 5, 13, 24),
        "tiles": (2, 4, 4, 128, 128, 64),
        "groups, odd tiles": (1, 8, 2, 133, 261, 128),
        "one query": (2, 4, 2, 1, 129, 64),
        "wide heads": (1, 2, 1, 70, 130, 200),
    }
    for name, (inputs, options) in ATTENTION.items():
        ours = out(lambda options=options, **inputs: pykern.attention(**inputs, **options))
        formula = out(lambda options=options, **inputs: reference.attention(**inputs, **options))
        yield name, Op(kernels, shapes, inputs, ours, formula, ("alibi_slopes",), rows=("q", "k", "v"))
    drop = dict(dropout_p=DROPPED)
    keep = lambda q, k: kept(SEED, *q.shape[:3], k.shape[2], DROPPED)  # noqa: E731
    dropped = out(lambda **inputs: pykern.attention(**inputs, seed=SEED, **drop))
    formula = out(lambda q, k, v: reference.attention(q, k, v, keep=keep(q, k), **drop))
    yield "attention, dropout", Op(kernels, shapes, attention_inputs, dropped, formula, rows=("q", "k", "v"))
    ours, formula = (
        out(lambda f=f, **inputs: f(**inputs, causal=True)) for f in (pykern.attention, reference.attention)
    )
    offsets = ("cu_seqlens_q", "cu_seqlens_k")
    heads = {"odd": (2, 1, 24), "a head of 64": (4, 4, 64), "groups of 128": (8, 2, 128)}
    yield "attention, ragged", Op(kernels, heads, ragged, ours, formula, offsets, rows=("q", "k", "v"))
    formula = out(lambda q, k, lse: reference.attention_weights(q, k))
    constant = ("q", "k", "lse")
    yield (
        "attention_weights",
        Op(
            ("attention_weights",), shapes, weights_inputs, out(pykern.attention_weights), formula, constant, ("q", "k")
        ),
    )
    formula = out(lambda x: kept(SEED, *x.shape, DROPPED).to(x.dtype))
    yield (
        "attention_dropout",
        Op(("attention_dropout",), shapes, dropout_inputs, out(keep_of_ours), formula, ("x",), ()),
    )

    def cached(dtype, B, H, G, T, S, D):
        found = attention_inputs(dtype, B, H, G, T, S, D)
        caches = {f"{name}_cache": found.pop(name) for name in "kv"}
        new = {name: draw(B, G, T, D, dtype=dtype, seed=4 + i) for i, name in enumerate("kv")}
        return found | caches | new | dict(cache_seqlens=torch.arange(S - T, S - T - B, -1, dtype=torch.int32))

    def append(k_cache, v_cache, **rest):
        caches = k_cache.clone(), v_cache.clone()
        result = pykern.attention_with_kvcache(rest.pop("q"), *caches, **rest)
        return dict(out=result, k_cache=caches[0], v_cache=caches[1])

    def append_by_formula(**inputs):
        result, _, k_cache, v_cache = reference.attention_with_kvcache(**inputs)
        return dict(out=result, k_cache=k_cache, v_cache=v_cache)

    shapes = {"odd": (2, 2, 1, 1, 13, 24), "one query": (3, 8, 2, 1, 300, 64), "few queries": (2, 8, 2, 5, 261, 128)}
    constant = ("q", "k", "v", "k_cache", "v_cache")
    yield (
        "attention_with_kvcache",
        Op(("attention_with_kvcache",), shapes, cached, append, append_by_formula, constant, ("q", "k", "v")),
    )


def rare_attentions():
    """What reaches the last branches, for cuda_faults.py: a sum over all keys, infinity and NaN that are seen."""
    kernels, shapes = ("attention_forward", "attention_backward"), {"odd": (1, 2, 1, 5, 13, 24)}

    def case(inputs, constant=(), function=pykern.attention):
        return Op(kernels, shapes, inputs, out(function), out(function), constant)

    yield "attention, bias of heads", case(attention_biased_by_head)
    yield "attention, infinity", case(attention_to_infinity, ("q", "k", "v"))
    under = lambda factor, **inputs: pykern.attention(**inputs) * factor  # noqa: E731
    yield "attention, NaN from behind", case(attention_under_nan, ("factor",), under)
