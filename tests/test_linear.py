"""linear: formula, gradients, shapes, strides, bits, NaN. torch's machinery and refusals: test_linear_torch.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import DTYPES, PAIRED, TILE_ROWS, VIEWS, constant, draw, with_gradients

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid")
PAIRED_CHUNK, CHUNK = constant("cpu/tile.h", "kChunk")  # units: pairs of bfloat16, or numbers
(LEAST_PART,), (LONG_PART,) = constant("cuda/gemm.cu", "kLeastPart"), constant("cuda/gemm.cu", "kLongPart")
LANES = {"base": 4, "v3": 8}.get(_C.isa(), 16)  # of float32 in a vector


def inputs(M, N, K, bias=True, residual=False, dtype=torch.float64, seed=0, rows=None):
    """x, weight, bias, residual and dout; rows = leading dimensions instead of [M]."""
    rows = (M,) if rows is None else rows
    tensors = dict(x=draw(*rows, K, dtype=dtype, seed=seed), weight=draw(N, K, dtype=dtype, seed=seed + 1))
    if bias:
        tensors["bias"] = draw(N, dtype=dtype, seed=seed + 2)
    if residual:
        tensors["residual"] = draw(*rows, N, dtype=dtype, seed=seed + 3)
    return tensors, draw(*rows, N, dtype=dtype, seed=seed + 4)


def named(linear, **options):
    return lambda **tensors: dict(out=linear(**tensors, **options))


def apply(tensors, dout, **options):
    return with_gradients(named(pykern.linear, **options), tensors, dict(out=dout))


def compare(tensors, dout, name="", **options):
    ours = apply(tensors, dout, **options)
    exact = {name: x.double() for name, x in tensors.items()}
    exact = with_gradients(named(reference.linear, **options), exact, dict(out=dout))
    for tensor, x in ours.items():
        assert x.dtype == dout.dtype
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=tensor != "out")


# ---- named cases, each with what it must reach


def facts(M, N, K):
    strips, panels = -(-M // TILE_ROWS), -(-N // (2 * LANES))
    return SimpleNamespace(
        strips=strips,
        strip_tail=M % TILE_ROWS,
        panels=panels,
        panel_tail=N % (2 * LANES),
        chunks=-(-K // CHUNK),
        chunks_of_pairs=-(-((K + 1) // 2) // PAIRED_CHUNK) if PAIRED else -(-K // CHUNK),
        row_chunks=-(-M // CHUNK),
    )


CASES = {
    "one of each": (dict(M=1, N=1, K=1), lambda f: f.strips == f.panels == f.chunks == 1),
    "no row": (dict(M=0, N=5, K=7), lambda f: f.strips == 0),
    "no output": (dict(M=5, N=0, K=7), lambda f: f.panels == 0),
    "no input": (dict(M=5, N=7, K=0), lambda f: f.chunks == 0),
    "whole strips and panels": (dict(M=24, N=64, K=32), lambda f: f.strip_tail == f.panel_tail == 0),
    "a strip and a row": (dict(M=13, N=33, K=17), lambda f: f.strip_tail == 1 and f.panel_tail == 1),
    "a vector and a lane": (dict(M=3, N=17, K=31), lambda f: f.panel_tail == 17 or LANES < 16),
    "two chunks of inputs": (dict(M=5, N=9, K=CHUNK + 1), lambda f: f.chunks == 2),
    "two chunks of pairs": (dict(M=5, N=9, K=2 * PAIRED_CHUNK + 1), lambda f: f.chunks_of_pairs >= 2),
    "two chunks of rows in dweight": (dict(M=CHUNK + 3, N=9, K=5), lambda f: f.row_chunks == 2),
    "many panels": (dict(M=14, N=700, K=40), lambda f: f.panels > 20),
    "many strips": (dict(M=400, N=40, K=40), lambda f: f.strips > 32),
}


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_named_case(name, threads):
    shape, reached = CASES[name]
    assert reached(facts(**shape)), "the case no longer reaches what it is named after"
    for dtype in DTYPES:
        tensors, dout = inputs(**shape, residual=True, dtype=dtype)
        compare(tensors, dout, name=f"{name} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for options in (dict(bias=False), dict(), dict(residual=True)):
        tensors, dout = inputs(None, 37, 20, rows=(3, 7), dtype=dtype, **options)
        tensors["weight"] /= 4
        compare(tensors, dout, activation=activation, name=f"{activation} {options}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_height_of_a_strip(dtype):
    for M in range(1, TILE_ROWS + 2):
        compare(*inputs(M, 7 + M, 5 + M, dtype=dtype, seed=M), name=f"M={M}")


def test_leading_dimensions():
    for rows in ((), (3,), (2, 3), (2, 1, 3), (1, 1), (2, 0, 3), (1, 2, 1, 3)):
        for sizes in ((4, 5), (0, 5), (4, 0)):
            tensors, dout = inputs(None, *sizes, rows=rows, residual=True)
            compare(tensors, dout, name=f"{rows} {sizes}", activation="silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    for rows in ((), (3,), (2, 2)):
        tensors, _ = inputs(None, 4, 5, rows=rows, residual=True)
        args = tuple(x.requires_grad_() for x in tensors.values())

        def f(x, weight, bias, residual):
            return pykern.linear(x, weight, bias, activation=activation, residual=residual)

        assert torch.autograd.gradcheck(f, args, atol=1e-7, rtol=1e-6)


def test_gradcheck_of_several_chunks():
    tensors, _ = inputs(2, 2, CHUNK + 2)
    assert torch.autograd.gradcheck(
        lambda *args: pykern.linear(*args, activation="gelu"),
        tuple(x.requires_grad_() for x in tensors.values()),
        atol=1e-7,
        rtol=1e-6,
    )


def test_only_the_gradients_wanted_are_made():
    tensors, dout = inputs(6, 5, 4)
    full = apply(tensors, dout, activation="gelu")
    for wanted in (["x"], ["weight"], ["bias"], ["x", "bias"]):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in tensors.items()}
        out = pykern.linear(**leaves, activation="gelu")
        for name, x in zip(wanted, torch.autograd.grad(out, [leaves[n] for n in wanted], dout), strict=True):
            assert_bitwise(x, full[f"d{name}"], name=name)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("linear", dtype)


# ---- shapes and strides


@given(
    M=st.integers(0, 40),
    N=st.integers(0, 70),
    K=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    views=st.tuples(*[st.sampled_from([*VIEWS])] * 4),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(M, N, K, dtype, activation, views, seed):
    packed, dout = inputs(M, N, K, residual=True, dtype=dtype, seed=seed)
    packed["weight"] /= math.sqrt(K + 1)
    compare(packed, dout, activation=activation)
    strided = {n: VIEWS[v](packed[n]) for n, v in zip(("x", "weight", "residual"), views, strict=False)}
    strided["bias"] = torch.stack([packed["bias"]] * 2, 1)[:, 0]
    first = apply(packed, dout, activation=activation)
    again = apply(strided, VIEWS[views[3]](dout), activation=activation)
    for name, x in first.items():
        assert_bitwise(x, again[name], name=f"{name} of {views}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_models_make(dtype):
    tensors, dout = inputs(None, 9, 12, rows=(4, 5), dtype=dtype)
    x, weight, bias = tensors.values()
    packed = apply(tensors, dout)
    heads = x.unflatten(2, (3, 4)).transpose(1, 2).contiguous().transpose(1, 2).flatten(2)
    views = {
        "the last step of a sequence": (x[:, -1], dout[:, -1], packed["out"][:, -1]),
        "transposed batch": (x.transpose(0, 1), dout.transpose(0, 1), packed["out"].transpose(0, 1)),
        "every second row": (x[:, ::2], dout[:, ::2], packed["out"][:, ::2]),
        "heads put together": (heads, dout, packed["out"]),
        "one row for all": (x[:1, :1].expand(4, 5, 12), dout, packed["out"][:1, :1].expand(4, 5, 9)),
    }
    for name, (view, gradient, out) in views.items():
        got = apply(dict(x=view, weight=weight, bias=bias), gradient)
        fresh = apply(dict(x=view.contiguous(), weight=weight, bias=bias), gradient.contiguous())
        assert_bitwise(got["out"], out, name=name)
        for tensor, value in fresh.items():
            assert_bitwise(value, got[tensor], name=f"{name}: {tensor}")
    tied = pykern.linear(x, weight.T.contiguous().T, bias)
    assert_bitwise(tied, packed["out"], name="a transposed weight")
    assert_bitwise(pykern.linear(x, weight, bias[:1].expand(9)), pykern.linear(x, weight, bias[:1].repeat(9)))


def test_strided_outputs_are_written_and_nothing_else():
    tensors, dout = inputs(6, 5, 4)
    x, weight, bias, dout = (t.numpy() for t in (*tensors.values(), dout))
    buffers = [np.full((2 * rows, columns + 3), 7.0) for rows, columns in ((6, 5), (6, 5), (6, 4), (5, 4))]
    out, pre, dx, dweight = (b[::2, 1:-2] for b in buffers)
    _C.linear_forward(x, weight, bias, None, out, pre, activation="relu")
    _C.linear_backward(x, weight, pre, dout, dx, dweight, None, activation="relu")
    exact = {name: t.requires_grad_() for name, t in tensors.items()}
    expected = reference.linear(**exact, activation="relu")
    gradients = torch.autograd.grad(expected, (exact["x"], exact["weight"]), torch.from_numpy(dout))
    wanted = dict(out=(out, expected), dx=(dx, gradients[0]), dweight=(dweight, gradients[1]))
    for name, (got, want) in wanted.items():
        assert_close(got, want, name=name)
    for buffer in buffers:
        buffer[::2, 1:-2] = 7.0
        assert (buffer == 7.0).all()


# ---- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [71, CHUNK + 5])
def test_a_row_is_the_same_alone_and_among_4096(K, dtype):
    tensors, _ = inputs(4096, 40, K, residual=True, dtype=dtype)
    x, weight, bias, residual = tensors.values()
    many = pykern.linear(x, weight, bias, activation="gelu_tanh", residual=residual)
    for rows in (slice(0, 1), slice(4095, 4096), slice(1234, 1235), slice(7, 7 + TILE_ROWS + 1), slice(100, 300)):
        few = pykern.linear(x[rows], weight, bias, activation="gelu_tanh", residual=residual[rows])
        assert_bitwise(few, many[rows], name=f"{rows}")
    columns = pykern.linear(x[:50], weight[3:5], bias[3:5], activation="gelu_tanh", residual=residual[:50, 3:5])
    assert_bitwise(columns, many[:50, 3:5], name="two outputs alone")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype, with_threads):
    tensors, dout = inputs(400, 150, 133, residual=True, dtype=dtype)
    first = with_threads(1, lambda: apply(tensors, dout, activation="gelu"))
    for n in (2, 3):
        again = with_threads(n, lambda: apply(tensors, dout, activation="gelu"))
        for name, x in first.items():
            assert_bitwise(x, again[name], name=f"{n} threads, {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs, inner, rows", [(400, 40, 300), (200, 200, 1200)])
def test_dweight_is_the_same_whoever_packs_its_strips(outputs, inner, rows, dtype, with_threads):
    """dout^T x: dout needs packing. The first x is one block: a task packs the strips that it uses, while rows are
    enough for all threads (not for 16), else all are packed before. The second is larger: they always are."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, inner, generator=generator), torch.randn(outputs, inner, generator=generator)
    dout = torch.randn(rows, outputs, generator=generator)
    tensors = {"x": x.to(dtype), "weight": weight.to(dtype)}
    first = with_threads(1, lambda: apply(tensors, dout.to(dtype)))["dweight"]
    assert_close(first, dout.to(dtype).double().t() @ tensors["x"].double(), name="dweight")
    for n in (2, 3, 16):
        again = with_threads(n, lambda: apply(tensors, dout.to(dtype)))["dweight"]
        assert_bitwise(first, again, name=f"{n} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [1, 150])
def test_rows_without_a_gradient_add_nothing(padding, dtype):
    """Padding behind the rows, with dout 0, leaves the gradients of weight and bias as they are."""
    tensors, dout = inputs(100, 20, 30, dtype=dtype)
    longer = tensors | dict(x=torch.cat([tensors["x"], draw(padding, 30, dtype=dtype, seed=9)]))
    short = apply(tensors, dout)
    long = apply(longer, torch.cat([dout, dout.new_zeros(padding, 20)]))
    for name in ("dweight", "dbias"):
        assert_bitwise(short[name], long[name], name=name)
    assert_bitwise(short["dx"], long["dx"][:100], name="dx")


PARTS = {  # sums over k that csrc/cuda/gemm.cu takes in parts: (M, N, K), k of the product
    "dweight of many rows": ((2 * LEAST_PART + 5, 9, 7), lambda M, N, K: M > 2 * LEAST_PART),
    "dx of many outputs": ((3, LONG_PART + 5, 9), lambda M, N, K: N > LONG_PART),
    "out of many inputs": ((3, 9, LONG_PART + 5), lambda M, N, K: K > LONG_PART),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
def test_long_sums(name, dtype):
    """Their formula; and the bits of a row, or of a weight's gradient, are those without the rows that add nothing."""
    (M, N, K), reached = PARTS[name]
    assert reached(M, N, K), "the case no longer reaches what it is named after"
    tensors, dout = inputs(M, N, K, residual=True, dtype=dtype)
    tensors["weight"] /= max(N, K) ** 0.5
    compare(tensors, dout, name=name, activation="silu")
    more = {n: torch.cat([x, draw(100, x.shape[1], dtype=dtype, seed=9)]) for n, x in tensors.items() if len(x) == M}
    short, long = apply(tensors, dout), apply(tensors | more, torch.cat([dout, dout.new_zeros(100, N)]))
    for result, x in short.items():
        assert_bitwise(x, long[result][:M] if result in ("out", "dx", "dresidual") else long[result], name=result)


# ---- NaN


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row_and_column(dtype):
    tensors, dout = inputs(30, 40, 37, residual=True, dtype=dtype)
    clean = apply(tensors, dout)
    everything = torch.ones(1, dtype=torch.bool)
    row, out, column = (torch.arange(n) == i for n, i in ((30, 13), (40, 39), (37, 36)))
    cases = {
        "x": ((13, 36), dict(out=row[:, None], dweight=column)),
        "weight": ((39, 36), dict(out=out, dx=column)),
        "bias": ((39,), dict(out=out)),
        "residual": ((13, 39), dict(out=row[:, None] & out)),
        "dout": ((13, 39), dict(dx=row[:, None], dweight=out[:, None], dbias=out, dresidual=row[:, None] & out)),
    }
    for name, (at, nan) in cases.items():
        bad = {n: x.clone() for n, x in (tensors | dict(dout=dout)).items()}
        bad[name][at] = math.nan
        bad_dout = bad.pop("dout")
        for tensor, x in apply(bad, bad_dout).items():
            where = nan.get(tensor, ~everything).expand(x.shape)
            assert x[where].isnan().all(), f"NaN in {name}: {tensor} hides it"
            assert_bitwise(x[~where], clean[tensor][~where], name=f"NaN in {name}: {tensor}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_not_multiplied_by_padding(dtype):
    """Odd sizes are packed with zeros: 0 times infinity would be NaN."""
    x, weight = torch.full((1, 5), math.inf, dtype=dtype), torch.ones(3, 5, dtype=dtype)
    assert (pykern.linear(x, weight) == math.inf).all()
    assert (pykern.linear(x, -weight, activation="relu") == 0).all()
