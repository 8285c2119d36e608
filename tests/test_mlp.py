"""mlp: formula, gradients, shapes, strides, bits, NaN. torch's machinery and refusals: test_mlp_torch.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linear import CHUNK, LANES, PAIRED_CHUNK
from tools import DTYPES, PAIRED, TILE_ROWS, VIEWS, draw, with_gradients

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid")
OPTIONAL = ("up_bias", "down_bias", "gate_bias", "residual")


def inputs(M, K, H, N, *, gated=False, without=(), dtype=torch.float64, seed=0, rows=None):
    """Every tensor but those in `without`, and dout; rows = leading dimensions instead of [M]."""
    rows = (M,) if rows is None else rows
    shapes = dict(x=(*rows, K), up_weight=(H, K), down_weight=(N, H), up_bias=(H,), down_bias=(N,))
    shapes |= dict(gate_weight=(H, K), gate_bias=(H,)) if gated else {}
    shapes |= dict(residual=(*rows, N))
    spread = dict(up_weight=1 / math.sqrt(K + 1), gate_weight=1 / math.sqrt(K + 1), down_weight=1 / math.sqrt(H + 1))
    tensors = {
        name: draw(*shape, dtype=dtype, seed=seed + i, spread=spread.get(name, 1.0))
        for i, (name, shape) in enumerate(shapes.items())
        if name not in without
    }
    return tensors, draw(*rows, N, dtype=dtype, seed=seed + 9)


def named(mlp, **options):
    return lambda **tensors: dict(out=mlp(**tensors, **options))


def apply(tensors, dout, **options):
    return with_gradients(named(pykern.mlp, **options), tensors, dict(out=dout))


def compare(tensors, dout, name="", **options):
    ours = apply(tensors, dout, **options)
    exact = {name: x.double() for name, x in tensors.items()}
    exact = with_gradients(named(reference.mlp, **options), exact, dict(out=dout))
    for tensor, x in ours.items():
        assert x.dtype == dout.dtype
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=tensor != "out")


# ---- named cases, each with what it must reach


def facts(M, K, H, N):
    def chunks(n):
        return -(-((n + 1) // 2) // PAIRED_CHUNK) if PAIRED else -(-n // CHUNK)

    return SimpleNamespace(
        strips=-(-M // TILE_ROWS),
        strip_tail=M % TILE_ROWS,
        hidden_panels=-(-H // (2 * LANES)),
        hidden_tail=H % (2 * LANES),
        panels=-(-N // (2 * LANES)),
        panel_tail=N % (2 * LANES),
        chunks=-(-K // CHUNK),
        hidden_chunks=-(-H // CHUNK),
        hidden_chunks_of_pairs=chunks(H),
        row_chunks=-(-M // CHUNK),
    )


CASES = {
    "one of each": (dict(M=1, K=1, H=1, N=1), lambda f: f.strips == f.hidden_panels == f.panels == f.chunks == 1),
    "no row": (dict(M=0, K=5, H=6, N=7), lambda f: f.strips == 0),
    "no input: h is f(up_bias)": (dict(M=5, K=0, H=6, N=7), lambda f: f.chunks == 0),
    "nothing hidden: out is down_bias": (dict(M=5, K=6, H=0, N=7), lambda f: f.hidden_chunks == 0),
    "no output": (dict(M=5, K=6, H=7, N=0), lambda f: f.panels == 0),
    "whole strips and panels": (
        dict(M=24, K=32, H=64, N=64),
        lambda f: f.strip_tail == f.hidden_tail == f.panel_tail == 0,
    ),
    "a strip and a row": (
        dict(M=13, K=17, H=33, N=65),
        lambda f: f.strip_tail == f.hidden_tail == f.panel_tail == 1,
    ),
    "odd numbers in pairs": (dict(M=3, K=31, H=17, N=9), lambda f: f.hidden_tail == 17 or LANES < 16),
    "two chunks of inputs": (dict(M=5, K=CHUNK + 1, H=9, N=3), lambda f: f.chunks == 2),
    "two chunks of hidden": (dict(M=5, K=3, H=CHUNK + 1, N=9), lambda f: f.hidden_chunks == 2),
    "two chunks of hidden pairs": (
        dict(M=5, K=3, H=2 * PAIRED_CHUNK + 1, N=9),
        lambda f: f.hidden_chunks_of_pairs >= 2,
    ),
    "two chunks of rows in the weight gradients": (dict(M=CHUNK + 3, K=5, H=7, N=9), lambda f: f.row_chunks == 2),
    "many panels": (dict(M=14, K=40, H=700, N=100), lambda f: f.hidden_panels > 20),
    "many strips": (dict(M=400, K=40, H=50, N=40), lambda f: f.strips > 32),
}


@pytest.mark.parametrize("gated, threads", [(False, 1), (True, 3)], indirect=["threads"], ids=["", "gated, 3 threads"])
@pytest.mark.parametrize("name", CASES)
def test_named_case(name, threads, gated):
    shape, reached = CASES[name]
    assert reached(facts(**shape)), "the case no longer reaches what it is named after"
    for dtype in DTYPES:
        compare(*inputs(**shape, gated=gated, dtype=dtype), name=f"{name} {dtype}", activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated, dtype):
    compare(*inputs(None, 20, 37, 11, rows=(3, 7), gated=gated, dtype=dtype), activation=activation, name=activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_of_optional_arguments(dtype):
    for gated in (False, True):
        for choice in range(1 << len(OPTIONAL)):
            without = [name for i, name in enumerate(OPTIONAL) if choice >> i & 1]
            if gated or "gate_bias" in without:
                compare(*inputs(5, 6, 9, 4, gated=gated, without=without, dtype=dtype), name=f"without {without}")


def test_the_default_activation_is_gelu_tanh():
    tensors, _ = inputs(3, 4, 5, 6)
    assert_bitwise(pykern.mlp(**tensors), pykern.mlp(**tensors, activation="gelu_tanh"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_every_height_of_a_strip(gated, dtype):
    """m rows are, to the bit, the first of more rows whose other gradients are 0."""
    M = TILE_ROWS + 1
    tensors, dout = inputs(M, 17, 19, 15, gated=gated, dtype=dtype)
    compare(tensors, dout)
    for m in range(1, M):
        few = apply(tensors | {name: tensors[name][:m] for name in ("x", "residual")}, dout[:m])
        all_rows = apply(tensors, torch.cat([dout[:m], torch.zeros_like(dout[m:])]))
        for name, x in few.items():
            assert_bitwise(x, all_rows[name][:m] if name in ("out", "dx", "dresidual") else all_rows[name], name=name)


def test_leading_dimensions():
    for rows in ((), (3,), (2, 3), (2, 1, 3), (1, 1), (2, 0, 3), (1, 2, 1, 3)):
        for sizes in ((4, 5, 6), (0, 5, 6), (4, 0, 6), (4, 5, 0)):
            compare(*inputs(None, *sizes, rows=rows, gated=True), name=f"{rows} {sizes}", activation="silu")


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, gated):
    for rows in ((), (2, 2)):
        tensors, _ = inputs(None, 3, 4, 2, rows=rows, gated=gated)
        names = list(tensors)

        def f(*args, names=names):
            return pykern.mlp(**dict(zip(names, args, strict=True)), activation=activation)

        args = tuple(x.requires_grad_() for x in tensors.values())
        assert torch.autograd.gradcheck(f, args, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_only_the_gradients_wanted_are_made(gated):
    tensors, dout = inputs(6, 5, 7, 4, gated=gated)
    full = apply(tensors, dout)
    for wanted in (*([name] for name in tensors), ["x", "down_bias"], ["up_weight", "residual"]):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in tensors.items()}
        out = pykern.mlp(**leaves)
        assert_bitwise(out.detach(), full["out"], name=f"out, gradients of {wanted}")
        for name, x in zip(wanted, torch.autograd.grad(out, [leaves[n] for n in wanted], dout), strict=True):
            assert_bitwise(x, full[f"d{name}"], name=name)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("mlp", dtype)


# ---- shapes and strides


@given(
    M=st.integers(0, 40),
    K=st.integers(0, 140),
    H=st.integers(0, 140),
    N=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    views=st.tuples(*[st.sampled_from([*VIEWS])] * 6),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(M, K, H, N, dtype, gated, activation, views, seed):
    packed, dout = inputs(M, K, H, N, gated=gated, dtype=dtype, seed=seed)
    compare(packed, dout, activation=activation)
    matrices = [name for name, x in packed.items() if x.dim() == 2]
    strided = {name: VIEWS[view](packed[name]) for name, view in zip(matrices, views, strict=False)}
    vectors = {name: torch.stack([x] * 2, 1)[:, 0] for name, x in packed.items() if x.dim() == 1}
    first = apply(packed, dout, activation=activation)
    again = apply(strided | vectors, VIEWS[views[5]](dout), activation=activation)
    for name, x in first.items():
        assert_bitwise(x, again[name], name=f"{name} of {views}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_models_make(dtype):
    tensors, dout = inputs(None, 12, 20, 9, rows=(4, 5), dtype=dtype)
    x, residual = tensors.pop("x"), tensors.pop("residual")
    packed = pykern.mlp(x, residual=residual, **tensors)
    views = {
        "the last step of a sequence": lambda t: t[:, -1],
        "transposed batch": lambda t: t.transpose(0, 1),
        "every second row": lambda t: t[:, ::2],
        "one row for all": lambda t: t[:1, :1].expand(4, 5, -1),
    }
    for name, view in views.items():
        got = apply(tensors | dict(x=view(x), residual=view(residual)), view(dout))
        fresh = apply(tensors | dict(x=view(x).contiguous(), residual=view(residual).contiguous()), view(dout))
        assert_bitwise(got["out"], view(packed), name=name)
        for tensor, value in fresh.items():
            assert_bitwise(value, got[tensor], name=f"{name}: {tensor}")


def test_strided_outputs_are_written_and_nothing_else():
    M, K, H, N = 6, 4, 7, 5
    tensors, dout = inputs(M, K, H, N, gated=True)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    wanted = dict(
        out=reference.mlp(**leaves, activation="silu"),
        up=reference.linear(leaves["x"], leaves["up_weight"], leaves["up_bias"]),
        gate=reference.linear(leaves["x"], leaves["gate_weight"], leaves["gate_bias"]),
    )
    matrices = ("x", "up_weight", "gate_weight", "down_weight")
    gradients = torch.autograd.grad(wanted["out"], [leaves[name] for name in matrices], dout)
    wanted |= {f"d{name}": g for name, g in zip(matrices, gradients, strict=True)}
    buffers = {name: np.full((2 * len(w), w.shape[1] + 3), 7.0) for name, w in wanted.items()}
    views = {name: b[::2, 1:-2] for name, b in buffers.items()}
    arrays = {name: t.detach().numpy() for name, t in tensors.items()}
    order = ("x", "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias", "residual")
    outputs = [views[name] for name in ("out", "up", "gate")]
    _C.mlp_forward(*(arrays[name] for name in order), *outputs, activation="silu")
    given = [arrays[name] for name in matrices] + [views["up"], views["gate"], dout.numpy()]
    made = (views["dx"], views["dup_weight"], None, views["dgate_weight"], None, views["ddown_weight"], None)
    _C.mlp_backward(*given, *made, activation="silu")
    for name, want in wanted.items():
        assert_close(views[name].copy(), want, name=name, gradient=name.startswith("d"))
        views[name][...] = 7.0
        assert (buffers[name] == 7.0).all(), name


# ---- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bits_of_two_linear_layers(activation, dtype):
    for M, K, H, N in ((1, 33, 20, 7), (9, 20, CHUNK + 5, 40), (70, 100, 65, 33)):
        t, _ = inputs(M, K, H, N, dtype=dtype)
        h = pykern.linear(t["x"], t["up_weight"], t["up_bias"], activation=activation)
        composed = pykern.linear(h, t["down_weight"], t["down_bias"], residual=t["residual"])
        assert_bitwise(pykern.mlp(**t, activation=activation), composed, name=f"M={M}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_sees_the_activation_of_the_forward_pass(activation, dtype):
    """Backward makes h again, together with the derivative, in the bits of forward down to 1e-37 (math.h).

    In half precision from what is kept of the first product, which is rounded.
    """
    t, dout = inputs(70, 20, 65, 33, dtype=dtype)
    t["up_bias"] = torch.linspace(-8, 8, 65, dtype=torch.float64).to(dtype)
    h = pykern.linear(t["x"], t["up_weight"], t["up_bias"], activation=activation)
    composed = with_gradients(named(pykern.linear), dict(x=h, weight=t["down_weight"]), dict(out=dout))
    assert_bitwise(apply(t, dout, activation=activation)["ddown_weight"], composed["dweight"], name=activation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bits_of_a_gate_and_three_linear_layers(dtype):
    """In half precision up is multiplied before it is rounded, and silu(gate) too, so there the composition differs."""
    for M, K, H, N in ((1, 33, 20, 7), (9, 20, CHUNK + 5, 40), (70, 100, 65, 33)):
        t, _ = inputs(M, K, H, N, gated=True, dtype=dtype)
        gate, up = (pykern.linear(t["x"], t[f"{name}_weight"], t[f"{name}_bias"]) for name in ("gate", "up"))
        composed = pykern.linear(pykern.swiglu(gate, up), t["down_weight"], t["down_bias"], residual=t["residual"])
        assert_bitwise(pykern.mlp(**t, activation="silu"), composed, name=f"M={M}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_what_is_kept_for_a_gradient_changes_no_bit(gated, dtype):
    for M in (1, 30):
        tensors, dout = inputs(M, 20, CHUNK + 5, 40, gated=gated, dtype=dtype)
        assert_bitwise(pykern.mlp(**tensors), apply(tensors, dout)["out"], name=f"M={M}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_a_row_is_the_same_alone_and_among_many(gated, dtype):
    tensors, dout = inputs(500, 71, CHUNK + 5, 40, gated=gated, dtype=dtype)
    x, residual = tensors.pop("x"), tensors.pop("residual")
    many = apply(tensors | dict(x=x, residual=residual), dout)
    for rows in (slice(0, 1), slice(499, 500), slice(234, 235), slice(7, 7 + TILE_ROWS + 1), slice(100, 300)):
        few = apply(tensors | dict(x=x[rows], residual=residual[rows]), dout[rows])
        for name in ("out", "dx"):
            assert_bitwise(few[name], many[name][rows], name=f"{name} of {rows}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_is_the_same_alone_and_among_many(dtype):
    tensors, _ = inputs(50, 30, 40, 70, dtype=dtype)
    part = {name: tensors[name][3:5] for name in ("down_weight", "down_bias")} | dict(
        residual=tensors["residual"][:, 3:5]
    )
    assert_bitwise(pykern.mlp(**tensors | part), pykern.mlp(**tensors)[:, 3:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_same_bits_for_any_thread_count(gated, dtype, with_threads):
    tensors, dout = inputs(300, 133, 200, 150, gated=gated, dtype=dtype)
    first = with_threads(1, lambda: apply(tensors, dout))
    for n in (2, 3):
        again = with_threads(n, lambda: apply(tensors, dout))
        for name, x in first.items():
            assert_bitwise(x, again[name], name=f"{n} threads, {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [1, 150])
def test_rows_without_a_gradient_add_nothing(padding, dtype):
    """Padding behind the rows, with dout 0, leaves the gradients of weights and biases as they are."""
    tensors, dout = inputs(100, 30, 40, 20, gated=True, without=["residual"], dtype=dtype)
    longer = tensors | dict(x=torch.cat([tensors["x"], draw(padding, 30, dtype=dtype, seed=9)]))
    short = apply(tensors, dout)
    long = apply(longer, torch.cat([dout, dout.new_zeros(padding, 20)]))
    for name in short:
        assert_bitwise(short[name], long[name][:100] if name in ("out", "dx") else long[name], name=name)


# ---- NaN


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_a_nan_stays_in_its_row_or_column(gated, dtype):
    tensors, dout = inputs(30, 37, 21, 40, gated=gated, dtype=dtype)
    clean = apply(tensors, dout, activation="silu")
    row, unit, out = (torch.arange(n) == i for n, i in ((30, 13), (21, 20), (40, 39)))
    everything, nothing = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    of_the_row = dict(dup_weight=everything, dup_bias=everything, dgate_weight=everything, dgate_bias=everything)
    cases = {
        "x": ((13, 36), dict(out=row[:, None], dx=row[:, None], ddown_weight=everything, **of_the_row)),
        "residual": ((13, 39), dict(out=row[:, None] & out)),
        "down_bias": ((39,), dict(out=out)),
        "down_weight": ((39, 20), dict(out=out, dx=everything)),
        "dout": ((13, 39), dict(dx=row[:, None], ddown_weight=out[:, None], ddown_bias=out, **of_the_row)),
    }
    cases["down_weight"][1].update(dup_weight=unit[:, None], dup_bias=unit, dgate_weight=unit[:, None], dgate_bias=unit)
    cases["dout"][1]["dresidual"] = row[:, None] & out
    for name, (at, nan) in cases.items():
        bad = {n: x.clone() for n, x in (tensors | dict(dout=dout)).items()}
        bad[name][at] = math.nan
        bad_dout = bad.pop("dout")
        for tensor, x in apply(bad, bad_dout, activation="silu").items():
            where = nan.get(tensor, nothing).expand(x.shape)
            assert x[where].isnan().all(), f"NaN in {name}: {tensor} hides it"
            assert_bitwise(x[~where], clean[tensor][~where], name=f"NaN in {name}: {tensor}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_not_multiplied_by_padding(dtype):
    """Odd sizes are packed with zeros: 0 times infinity would be NaN."""
    x, up, down = (
        torch.full((1, 5), math.inf, dtype=dtype),
        torch.ones(3, 5, dtype=dtype),
        torch.ones(7, 3, dtype=dtype),
    )
    assert (pykern.mlp(x, up, down, activation="relu") == math.inf).all()
    assert (pykern.mlp(x, -up, down, activation="relu") == 0).all()
    assert (pykern.mlp(x, up, down, gate_weight=up, activation="sigmoid") == math.inf).all()
