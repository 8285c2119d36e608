"""attention: window, softcap, ALiBi, sinks and bias, alone and together, against the formula; NaN where nobody looks.

Bits: test_attention_options_bits.py. Dropout and ragged batches have files of their own.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from attention_tools import attend, both, compare, inputs, too_wide
from hypothesis import given
from hypothesis import strategies as st
from test_attention import BLOCK_ROWS, KEYS
from tools import DTYPES, VIEWS, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close, reference


def slopes(*shape, seed=11):
    """Between 0 and 0.1: at 130 keys from the diagonal a score is still about as exact as one without slope."""
    return 0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def bools(*shape, seed=0, share=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def optional(tensors, bias=None, sinks=False):
    """tensors, with a bias of this shape and with sinks when wanted."""
    q = tensors["q"]
    more = {} if bias is None else dict(bias=draw(*bias, dtype=q.dtype, seed=21))
    return tensors | more | (dict(sinks=draw(q.shape[1], dtype=q.dtype, seed=22)) if sinks else {})


# ---- each option, and all of them, in every dtype

B, H, G, T, S = 2, 4, 2, 27, 150
OPTIONS = {
    "window on the left": dict(window=(70, None)),
    "window on the right": dict(window=(None, 3)),
    "window on both sides": dict(window=(20, 20)),
    "the diagonal alone": dict(window=(0, 0)),
    "a window wider than all": dict(window=(10**9, 10**9)),
    "no limit": dict(window=(None, None)),
    "causal window": dict(window=(30, 50), causal=True),
    "softcap": dict(softcap=1.5),
    "a small softcap": dict(softcap=0.01),
    "softcap, negative scale": dict(softcap=2.0, scale=-0.5, causal=True),
    "slopes of the heads": dict(alibi_slopes=slopes(H)),
    "slopes of sequences and heads": dict(alibi_slopes=slopes(B, H), causal=True),
    "negative slopes": dict(alibi_slopes=-slopes(H)),
    "sinks": dict(sinks=True),
    "sinks, causal": dict(sinks=True, causal=True),
    "sinks and mask": dict(sinks=True, mask=bools(B, H, T, S)),
    "sinks and bias": dict(sinks=True, bias=(H, T, S)),
    "window and mask": dict(window=(60, 0), mask=bools(T, S, share=0.3)),
    "slopes and bias": dict(alibi_slopes=slopes(H), bias=(S,)),
    "softcap and bias": dict(softcap=1.5, bias=(B, 1, 1, S)),
    "softcap and slopes": dict(softcap=1.5, alibi_slopes=slopes(H)),
    "everything": dict(
        mask=bools(B, H, T, S),
        bias=(H, 1, S),
        window=(90, 0),
        softcap=1.5,
        scale=0.7,
        alibi_slopes=slopes(B, H),
        sinks=True,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, dtype):
    options = dict(OPTIONS[name])
    tensors, dout = inputs(T, S, D=20, E=13, B=B, H=H, G=G, dtype=dtype)
    tensors = optional(tensors, options.pop("bias", None), options.pop("sinks", False))
    compare(tensors, dout, draw(B, H, T, seed=5), name=name, **options)


# Every way to broadcast to [B, H, T, S] = [2, 4, 5, 70], each size whole or 1, by rank.
BROADCASTS = [
    tuple(size if whole else 1 for size, whole in zip((2, 4, 5, 70)[4 - rank :], flags, strict=True))
    for rank in (1, 2, 3, 4)
    for flags in itertools.product((True, False), repeat=rank)
]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_bias_of_every_shape_beside_other_options(shape):
    tensors, dout = inputs(5, 70, D=6, B=2, H=4, G=2)
    tensors = optional(tensors, shape, sinks=True)
    options = dict(window=(40, 1), softcap=1.5, alibi_slopes=slopes(4))
    compare(tensors, dout, draw(2, 4, 5, seed=5), name=f"bias {shape}", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D, E", [(1, 7), (7, 1), (80, 96), (96, 80), (112, 128), (128, 112), (256, 3), (512, 512)])
def test_head_sizes(D, E, dtype):
    tensors, dout = inputs(14, 70, D=D, E=E, H=2, G=1, dtype=dtype, seed=D)
    tensors = optional(tensors, (2, 1, 70), sinks=True)
    if too_wide(tensors):
        return
    compare(tensors, dout, name=f"D={D}, E={E}", window=(50, 5), softcap=2.0, alibi_slopes=slopes(2))


SIZES = [0, 1, 7, 63, 64, 65, 130]
WINDOWS = [None, (0, 0), (3, None), (None, 2), (10, 5), (64, 0), (0, 64), (200, 200)]


@pytest.mark.parametrize("T", SIZES)
def test_every_pair_of_sizes(T):
    for S, window in zip(SIZES, WINDOWS[SIZES.index(T) :] + WINDOWS, strict=False):
        tensors, dout = inputs(T, S, D=7, H=2, G=1, dtype=torch.float32, seed=T)
        tensors = optional(tensors, (2, T, 1), sinks=S % 2 == 0)
        compare(tensors, dout, draw(1, 2, T, seed=5), name=f"T={T}, S={S}", window=window, alibi_slopes=slopes(2))


@given(
    T=st.integers(1, 130),
    S=st.integers(0, 130),
    D=st.sampled_from([1, 7, 16, 80]),
    E=st.sampled_from([1, 5, 65]),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    dtype=st.sampled_from(DTYPES),
    views=st.tuples(*[st.sampled_from([*VIEWS])] * 4),
    window=st.sampled_from(WINDOWS),
    softcap=st.sampled_from([None, 0.5, 3.0]),
    alibi=st.sampled_from([None, 1, 2]),
    bias=st.sampled_from([None, (1,), (-1, 1, 1), (1, -1, -1), (1, 1, 1, -1), (-1, 1, -1, 1), (-1, -1, -1, -1)]),
    sinks=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_options(T, S, D, E, groups, dtype, views, window, softcap, alibi, bias, sinks, causal, seed):
    H, G = groups
    tensors, dout = inputs(T, S, D, E, 2, H, G, dtype, seed)
    if bias is not None:  # -1 stands for the whole size
        bias = [size if n == -1 else 1 for size, n in zip((2, H, T, S)[4 - len(bias) :], bias, strict=True)]
    tensors = optional(tensors, bias, sinks)
    options = dict(window=window, softcap=softcap, causal=causal)
    if alibi is not None:
        options["alibi_slopes"] = slopes(2, H) if alibi == 2 else slopes(H)
    compare(tensors, dout, **options)
    packed = attend(tensors, dout, **options)
    strided = {name: VIEWS[view](tensors[name]) for name, view in zip("qkv", views, strict=False)}
    for name, x in attend(tensors | strided, VIEWS[views[3]](dout), **options).items():
        assert_bitwise(x, packed[name], name=f"{name} of {views}")


# ---- windows: the blocks they reach


def facts(T, S, left=None, right=None):
    """The tiles of keys that rows t see, and how many of each block of rows are skipped in front and behind."""
    tiles, blocks = -(-S // KEYS), []
    for first in range(0, T, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, T) - 1
        low = 0 if left is None else max(S - T + first - left, 0)
        high = S - 1 if right is None else min(S - T + last + right, S - 1)
        blocks.append(SimpleNamespace(front=low // KEYS, behind=tiles - 1 - high // KEYS, dead=high < low))
    return SimpleNamespace(tiles=tiles, blocks=blocks, first=blocks[0], last=blocks[-1])


WINDOW_CASES = {
    "tiles in front are skipped": (dict(T=200, S=400, left=60), lambda f: f.first.front == 2 and f.last.front == 5),
    "tiles behind are skipped": (dict(T=300, S=300, right=10), lambda f: f.first.behind > 1 and f.last.behind == 0),
    "on both sides": (dict(T=300, S=600, left=9, right=9), lambda f: f.blocks[1].front > 1 and f.blocks[1].behind > 0),
    "within one tile": (dict(T=1, S=192, left=10, right=0), lambda f: f.first.front == 2 and f.tiles == 3),
    "a window starts with a tile": (dict(T=1, S=129, left=64, right=0), lambda f: f.first.front == 1),
    "a window ends a key before a tile": (dict(T=1, S=129, left=65, right=0), lambda f: f.first.front == 0),
    "first rows see nothing": (dict(T=130, S=70, left=5, right=5), lambda f: not f.first.dead),
    "a block sees nothing": (dict(T=400, S=70, left=5, right=5), lambda f: f.first.dead and not f.last.dead),
    "one row, all keys": (dict(T=1, S=300, left=299, right=0), lambda f: f.first.front == 0 and f.tiles == 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WINDOW_CASES)
def test_window_case(name, dtype):
    shape, reached = WINDOW_CASES[name]
    assert reached(facts(**shape)), "the case no longer reaches what it is named after"
    T, S, window = shape["T"], shape["S"], (shape.get("left"), shape.get("right"))
    tensors, dout = inputs(T, S, D=9, dtype=dtype)
    compare(tensors, dout, draw(1, 1, T, seed=5), name=name, window=window)


# ---- gradients in float64, element by element

GRADCHECKS = {
    "window": (dict(T=4, S=6, D=3), dict(window=(1, 1))),
    "window, T > S": (dict(T=7, S=4, D=2), dict(window=(1, 0))),
    "window, two tiles": (dict(T=2, S=KEYS + 3, D=2), dict(window=(4, 0))),
    "softcap": (dict(T=4, S=5, D=3), dict(softcap=1.2, causal=True)),
    "slopes": (dict(T=3, S=5, D=2, B=2, H=2, G=1), dict(alibi_slopes=slopes(2, 2) * 10)),
    "sinks": (dict(T=3, S=5, D=2, B=2, H=2), dict(sinks=True)),
    "sinks, rows without keys": (dict(T=5, S=3, D=2, H=2), dict(sinks=True, causal=True)),
    "sinks, no keys": (dict(T=2, S=0, D=2, H=2), dict(sinks=True)),
    "bias and sinks": (dict(T=3, S=5, D=2, H=2), dict(sinks=True, bias=(2, 1, 5))),
    "everything": (
        dict(T=4, S=6, D=2, E=3, B=2, H=4, G=2),
        dict(sinks=True, bias=(1, 4, 6), window=(3, 1), softcap=1.2, alibi_slopes=slopes(2, 4) * 10, scale=0.9),
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    shape, options = GRADCHECKS[name]
    tensors, _ = inputs(**shape)
    options = dict(options)
    tensors = optional(tensors, options.pop("bias", None), options.pop("sinks", False))

    def f(*leaves):
        out, lse = pykern.attention(**dict(zip(tensors, leaves, strict=True)), return_lse=True, **options)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks"])
def test_one_gradient_alone(wanted):
    tensors, dout = inputs(20, 90, D=8, B=2, H=4, G=2, dtype=torch.float32)
    tensors = optional(tensors, (4, 1, 90), sinks=True)
    options = dict(window=(70, 0), softcap=2.0)
    leaf = tensors[wanted].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pykern.attention(**(tensors | {wanted: leaf}), **options), leaf, dout)
    assert_bitwise(gradient, attend(tensors, dout, **options)[f"d{wanted}"])


def test_gradient_of_lse_alone():
    tensors, _ = inputs(5, 70, D=4, H=2, G=1)
    tensors = optional(tensors, (5, 70), sinks=True)
    options, dlse = dict(window=(66, 0), softcap=2.0, alibi_slopes=slopes(2)), dict(lse=draw(1, 2, 5))

    def lse(attention):
        return lambda **leaves: dict(lse=attention(**leaves, return_lse=True, **options)[1] + 0 * leaves["v"].sum())

    ours, exact = (with_gradients(lse(f), tensors, dlse) for f in (pykern.attention, reference.attention))
    for name, x in exact.items():
        assert_close(ours[name], x, name=name, gradient=name[0] == "d")


# ---- what each option means at its edges


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saturated_softcap(dtype):
    """Scores of +-2e5 end at +-2, and their slope is 0."""
    tensors, dout = inputs(9, 70, D=1, E=8, dtype=dtype)
    tensors["q"], tensors["k"] = (256 * tensors[name].sign() for name in "qk")
    ours, exact = both(tensors, dout, softcap=2.0, scale=3.0)
    for name in ("out", "lse", "dv"):
        assert_close(ours[name], exact[name], name=name, gradient=name == "dv")
    for results in (ours, exact):
        assert (results["dq"] == 0).all() and (results["dk"] == 0).all()


def test_a_softcap_far_above_the_scores_changes_nothing():
    tensors, _ = inputs(9, 70, D=8)
    plain = pykern.attention(**tensors)
    assert_close(pykern.attention(**tensors, softcap=1e9), plain, name="out")
    assert_bitwise(pykern.attention(**tensors, softcap=None), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steep_slopes(dtype):
    """Scores of -1e5 beside 0: the diagonal alone remains, exactly."""
    tensors, dout = inputs(70, 90, D=8, H=2, dtype=dtype)
    steep = torch.full((2,), 1e5)
    results, diagonal = (attend(tensors, dout, **o) for o in (dict(alibi_slopes=steep), dict(window=(0, 0))))
    for name, x in diagonal.items():
        assert torch.equal(results[name], x), name
    assert_bitwise(results["out"], tensors["v"][:, :, 20:], name="values of the diagonal")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_far_above_and_far_below_the_scores(dtype):
    """A sink of -1e4 has no weight; of 1e4 it leaves none; of -inf it is no sink, also where a row sees nothing."""
    tensors, dout = inputs(90, 70, D=8, H=2, dtype=dtype)
    mask = bools(2, 90, 70)
    mask[:, ::7] = False
    plain = attend(tensors, dout, mask=mask)
    sinks = torch.full((2,), -math.inf, dtype=dtype)
    results = attend(tensors | dict(sinks=sinks), dout, mask=mask)
    assert (results.pop("dsinks") == 0).all()
    for name, x in plain.items():
        assert_bitwise(results[name], x, name=f"sinks of -inf: {name}")
    low = attend(tensors | dict(sinks=torch.full((2,), -1e4, dtype=dtype)), dout, mask=mask)
    alive = mask.any(-1)[None]
    assert_bitwise(low["out"], plain["out"], name="out below low sinks")
    assert_bitwise(low["lse"][alive], plain["lse"][alive], name="lse above low sinks")
    assert (low["lse"][~alive] == sinks.new_tensor(-1e4).double()).all()
    high = attend(tensors | dict(sinks=torch.full((2,), 1e4, dtype=dtype)), dout, mask=mask)
    assert (high["out"] == 0).all() and (high["lse"] == sinks.new_tensor(1e4).double()).all()
    assert all((high[f"d{name}"] == 0).all() for name in ("q", "k", "v", "sinks"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_with_a_sink_and_no_key(dtype):
    """out 0, lse the sink: whether by mask, by window, by a bias of -inf or without keys."""
    tensors, dout = inputs(20, 12, D=8, H=2, dtype=dtype)
    tensors["sinks"] = draw(2, dtype=dtype, seed=22)
    dead = torch.arange(20) < 8 - 3  # with three keys behind the diagonal
    dlse = draw(1, 2, 20, seed=5)
    ways = {
        "window": (tensors, dict(window=(None, 3))),
        "mask": (tensors, dict(mask=(~dead)[:, None])),
        "bias": (tensors | dict(bias=torch.zeros(20, 1, dtype=dtype).masked_fill(dead[:, None], -math.inf)), {}),
        "no keys": (tensors | {n: tensors[n][:, :, :0] for n in "kv"}, {}),
    }
    for name, (arguments, options) in ways.items():
        results = attend(arguments, dout, dlse, **options)
        rows = slice(None) if name == "no keys" else dead
        assert (results["out"][:, :, rows] == 0).all() and (results["dq"][:, :, rows] == 0).all(), name
        assert (results["lse"][0, :, rows] == tensors["sinks"][:, None].double()).all(), name
        if name == "no keys":  # the softmax is the sink alone: its gradient is the sum of dlse
            total, terms = dlse[0].sum(-1), dlse[0].abs().sum(-1)
            assert_close(results["dsinks"], total, name="dsinks", gradient=True, scale=terms.max().item())


# ---- users of bias


def test_learnable_slopes_are_a_bias():
    """-slopes * distance as bias is alibi_slopes, and has the gradient that they lack."""
    tensors, dout = inputs(30, 90, D=8, B=2, H=4, G=2)
    distance = (torch.arange(90) - torch.arange(60, 90)[:, None]).abs().double()
    slope = slopes(4)
    as_bias = attend(tensors | dict(bias=-slope.double()[:, None, None] * distance), dout, causal=True)
    for name, x in attend(tensors, dout, causal=True, alibi_slopes=slope).items():
        assert_close(x, as_bias[name], name=name, gradient=name[0] == "d")

    tensors, _ = inputs(3, 90, D=2, H=4, G=2)

    def f(slope):
        return pykern.attention(**tensors, bias=-slope[:, None, None] * distance[-3:], causal=True)

    assert torch.autograd.gradcheck(f, (slope.double().requires_grad_(),), atol=1e-6)


def test_relative_position_bias():
    """T5's: one learnt number for each head and bucket of distances."""
    T, S, H, buckets = 30, 90, 4, 8
    tensors, dout = inputs(T, S, D=8, H=H)
    distance = torch.arange(S) - torch.arange(S - T, S)[:, None]
    bucket = (distance.clamp(-40, 40) + 40) * (buckets - 1) // 80
    table = draw(buckets, H, seed=3)
    ours, exact = (
        with_gradients(
            lambda table, f=f: dict(out=f(**tensors, bias=table[bucket].permute(2, 0, 1))), x, dict(out=dout)
        )
        for f, x in ((pykern.attention, dict(table=table)), (reference.attention, dict(table=table)))
    )
    for name, x in exact.items():
        assert_close(ours[name], x, name=name, gradient=name[0] == "d")
