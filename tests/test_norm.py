"""layer_norm, rms_norm: formula, gradients, residual, odd shapes and strides, same bits, torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pykern
import pykern.ops  # registers torch.ops.pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = ("layer_norm", "rms_norm")

# Vectors hold 2 to 16 numbers and sums use four of them at a time: a tail alone, some vectors and a tail, four exactly,
# the width of a small GPT, an odd width, a row that no first-level cache holds.
SHAPES = [(1,), (7,), (3, 33), (2, 3, 64), (5, 768), (2, 1023), (2, 20001), (300, 5)]


def draw(*shape, dtype=torch.float64, seed=0, spread=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (offset + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def inputs(op, *shape, dtype=torch.float64, residual=False):
    """The tensors of op by argument name."""
    D = shape[-1]
    tensors = dict(x=draw(*shape, dtype=dtype, spread=2.0, offset=0.5), weight=draw(D, dtype=dtype, seed=1, offset=1.0))
    if op == "layer_norm":
        tensors["bias"] = draw(D, dtype=dtype, seed=2)
    if residual:
        tensors["residual"] = draw(*shape, dtype=dtype, seed=3)
    return tensors


def call(op, x, residual=None, **tensors):
    return getattr(pykern, op)(x, *tensors.values(), residual=residual)


def formula(op, x, residual=None, **tensors):
    bias = () if op == "rms_norm" else (tensors.get("bias"),)
    return getattr(reference, op)(x, tensors.get("weight"), *bias, residual=residual)


def gradients(function, op, tensors, dout):
    """Output and gradients by name, for leaf copies of the tensors."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = function(op, **leaves)
    return out.detach(), dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype)), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_is_its_formula(op, dtype):
    for shape in SHAPES:
        tensors, dout = inputs(op, *shape, dtype=dtype), draw(*shape, dtype=dtype, seed=4)
        out, got = gradients(call, op, tensors, dout)
        expected, wanted = gradients(formula, op, {n: x.double() for n, x in tensors.items()}, dout)
        assert out.dtype == dtype
        assert_close(out, expected, name=f"{op} {shape}")
        # terms of dx of a narrow row cancel: the scale is that of a term, weight * dout / sqrt(variance)
        scale = max(wanted["x"].abs().max().item(), 1.0)
        for name in tensors:
            assert_close(
                got[name],
                wanted[name],
                name=f"{op} {shape} d{name}",
                gradient=True,
                scale=scale if name == "x" else None,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_residual_is_the_sum_normalised_and_returned(op, dtype):
    """To the bit: the kernel rounds x + residual as torch does and normalises what it rounded."""
    tensors = inputs(op, 6, 37, dtype=dtype, residual=True)
    out, h = call(op, **tensors)
    assert_bitwise(h, tensors["x"] + tensors["residual"], name="h")
    alone = dict(tensors, x=h)
    del alone["residual"]
    assert_bitwise(out, call(op, **alone), name="normed")


@pytest.mark.parametrize("used", ["both", "normed", "sum"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_reach_x_and_residual_through_both_results(op, used):
    def loss(function):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs(op, 4, 9, residual=True).items()}
        x, residual = leaves["x"], leaves["residual"]
        if function is call:
            out, h = call(op, **leaves)
        else:
            out, h = formula(op, **leaves), x + residual
        total = 0.0
        if used != "sum":
            total = total + (out * draw(4, 9, seed=5)).sum()
        if used != "normed":
            total = total + (h * h * draw(4, 9, seed=6)).sum()
        total.backward()
        return leaves

    got, wanted = loss(call), loss(formula)
    for name in got:
        if used == "sum" and name in ("weight", "bias"):
            assert got[name].grad is None or not got[name].grad.any()
        else:
            assert_close(got[name].grad, wanted[name].grad, name=f"d{name}", gradient=True)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    tensors = {n: t.requires_grad_() for n, t in inputs(op, 3, 11, residual=True).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(lambda *a: call(op, **dict(zip(names, a, strict=True))), tuple(tensors.values()))
    x = draw(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(getattr(pykern, op), (x,))  # no parameters


@pytest.mark.parametrize("dtype", ratios.DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_ratio_rule(op, dtype):
    ratios.assert_ratio(op, dtype)


def test_large_common_offset_costs_no_accuracy():
    """The second pass corrects the mean: as good as float64 arithmetic on the rounded numbers."""
    x = draw(20, 768, dtype=torch.float32, offset=3e4)
    out = pykern.layer_norm(x)
    exact = reference.layer_norm(x, None, None)
    torch_error = (torch.nn.functional.layer_norm(x, (768,)).double() - exact).abs().max()
    error = (out.double() - exact).abs().max()
    # one rounding of the mean, 2^-24 * 3e4 = 1.8e-3 in units of the spread, is all that float32 statistics can keep
    assert error <= 2**-24 * 3e4 + 1e-6 and error <= 1.1 * torch_error, (error, torch_error)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_parameters_stay_exact_over_many_rows(op):
    """float32 sums of 30000 rows: to a few roundings, where a running float32 sum loses two digits."""
    tensors, dout = inputs(op, 30000, 5, dtype=torch.float32), 1 + draw(30000, 5, dtype=torch.float32, seed=4)
    _, got = gradients(call, op, tensors, dout)
    _, wanted = gradients(formula, op, {n: x.double() for n, x in tensors.items()}, dout)
    for name in set(tensors) - {"x"}:
        error = ((got[name].double() - wanted[name]) / wanted[name].abs().max()).abs().max()
        assert error < 4 * 2**-24, (name, error)


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",)])
def test_without_parameters(parameters):
    tensors = {n: t for n, t in inputs("layer_norm", 4, 19).items() if n in ("x", *parameters)}

    def layer_norm(op, x, weight=None, bias=None):
        return pykern.layer_norm(x, weight, bias)

    out, got = gradients(layer_norm, "layer_norm", tensors, draw(4, 19, seed=4))
    expected, wanted = gradients(formula, "layer_norm", tensors, draw(4, 19, seed=4))
    assert_close(out, expected, name="out")
    for name in tensors:
        assert_close(got[name], wanted[name], name=f"d{name}", gradient=True)


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(OPS),
    view=st.sampled_from(["packed", "row gaps", "transposed", "column steps", "expanded", "offset"]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(rows, columns, dtype, op, view, seed):
    make = dict(
        packed=lambda: draw(rows, columns, dtype=dtype, seed=seed),
        transposed=lambda: draw(columns, rows, dtype=dtype, seed=seed).T,
        expanded=lambda: draw(1, columns, dtype=dtype, seed=seed).expand(rows, columns),
        offset=lambda: draw(rows, columns + 3, dtype=dtype, seed=seed)[:, 3:],
    )
    make["row gaps"] = lambda: draw(2 * rows, columns + 2, dtype=dtype, seed=seed)[::2, :columns]
    make["column steps"] = lambda: draw(rows, 2 * columns, dtype=dtype, seed=seed)[:, ::2]
    x, weight = make[view](), draw(2 * columns, dtype=dtype, seed=8)[::2]
    copy = x.clone(memory_format=torch.contiguous_format)
    out, got = gradients(call, op, dict(x=x, weight=weight), draw(rows, columns, seed=9))
    again, same = gradients(call, op, dict(x=copy, weight=weight.clone()), draw(rows, columns, seed=9))
    assert_bitwise(out, again, name=f"{op} of a {view} view")
    for name in got:
        assert_bitwise(got[name], same[name], name=f"d{name}")
    assert out.shape == x.shape and got["weight"].shape == weight.shape
    if rows == 0:
        assert not got["weight"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_thread_count_and_neighbours(op, dtype, with_threads):
    """5000 rows are more than a task per core of the parameter sums, and not a multiple of any block."""
    tensors, dout = inputs(op, 5000, 21, dtype=dtype), draw(5000, 21, dtype=dtype, seed=4)
    out, got = with_threads(1, lambda: gradients(call, op, tensors, dout))
    for n in (2, 3):
        again, same = with_threads(n, lambda: gradients(call, op, tensors, dout))
        assert_bitwise(out, again, name=f"{n} threads")
        for name in got:
            assert_bitwise(got[name], same[name], name=f"{n} threads, d{name}")
    row = slice(1234, 1235)
    alone, one = gradients(call, op, dict(tensors, x=tensors["x"][row]), dout[row])
    assert_bitwise(alone, out[row], name="a row alone")
    assert_bitwise(one["x"], got["x"][row], name="a row alone, dx")


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(op):
    x = draw(3, 40, dtype=torch.float32)
    clean = call(op, x)
    x[1, 17] = math.nan
    out = call(op, x)
    assert out[1].isnan().all()
    assert_bitwise(out[[0, 2]], clean[[0, 2]])


def test_strided_output_is_written_and_nothing_else():
    rng = np.random.default_rng(0)
    x, buffer, stats = rng.standard_normal((4, 9)), np.full((8, 12), 7.0), np.empty((2, 4))
    _C.layer_norm_forward(x, None, None, None, buffer[::2, 1:10], None, stats[0], stats[1], eps=1e-5)
    assert_close(buffer[::2, 1:10], reference.layer_norm(torch.from_numpy(x), None, None), name="out")
    assert_close(stats[0], torch.from_numpy(x).mean(-1), name="mean")
    assert_close(stats[1], (torch.from_numpy(x).var(-1, unbiased=False) + 1e-5).rsqrt(), name="rstd")
    buffer[::2, 1:10] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.one_isa
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, residual):
    tensors = inputs(op, 3, 5, dtype=torch.float32, residual=residual)
    arguments = [tensors[n] for n in ("x", "weight", "bias") if n in tensors] + [tensors.get("residual"), 1e-5, None]
    for grad in (False, True):
        arguments = [a.clone().requires_grad_(grad) if isinstance(a, torch.Tensor) else a for a in arguments]
        for half in (None, torch.bfloat16):
            torch.library.opcheck(getattr(torch.ops.pykern, op).default, (*arguments[:-1], half))


@pytest.mark.one_isa
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph(op):
    def f(op, **tensors):
        out, h = call(op, **tensors)
        return out * h

    tensors, dout = inputs(op, 4, 6, dtype=torch.float32, residual=True), draw(4, 6, seed=4)
    out, eager = gradients(f, op, tensors, dout)
    again, compiled = gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), op, tensors, dout)
    assert_bitwise(out, again)
    for name in eager:
        assert_bitwise(eager[name], compiled[name], name=f"d{name}")


@pytest.mark.one_isa
def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    def f(op, **tensors):
        return checkpoint(lambda t: call(op, **t), tensors, use_reentrant=False)

    tensors, dout = inputs("layer_norm", 4, 9, dtype=torch.float32), draw(4, 9, seed=4)
    _, plain = gradients(call, "layer_norm", tensors, dout)
    _, again = gradients(f, "layer_norm", tensors, dout)
    for name in plain:
        assert_bitwise(plain[name], again[name], name=f"d{name}")


@pytest.mark.one_isa
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_result_once(op, half):
    """A float32 x gives a half result, without a copy of x; sums, statistics and the sum with the residual stay."""
    tensors = inputs(op, 5, 37, dtype=torch.float32, residual=True)
    wide, wide_total = call(op, **tensors)
    with torch.autocast("cpu", dtype=half):
        out, total = call(op, **tensors)
    assert out.dtype == half and total.dtype == torch.float32
    assert_bitwise(out, wide.to(half), name="out")
    assert_bitwise(total, wide_total, name="sum")


def test_autocast_with_mixed_arguments():
    x, weight = draw(4, 9, dtype=torch.bfloat16), draw(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pykern.rms_norm(x, weight.bfloat16()).dtype == torch.bfloat16
        mixed = pykern.rms_norm(x, weight)
        wide_x = pykern.rms_norm(x.float(), weight.bfloat16())
        normed, h = pykern.rms_norm(x, residual=x.float())
    exact = pykern.rms_norm(x.float(), weight)
    assert_bitwise(mixed, exact.bfloat16(), name="half x, float32 weight")
    assert_bitwise(wide_x, pykern.rms_norm(x.float(), weight.bfloat16().float()).bfloat16(), name="half weight")
    assert h.dtype == torch.float32 and normed.dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_a_half_result_beside_float32(op):
    """dout is half; dh, dweight and dbias are those of the same dout in float32, bit for bit."""
    tensors = inputs(op, 20, 37, dtype=torch.float32)
    dout = draw(20, 37, dtype=torch.bfloat16, seed=7)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(op, **leaves)
    mixed = torch.autograd.grad(out, list(leaves.values()), dout)
    wide = torch.autograd.grad(call(op, **leaves), list(leaves.values()), dout.float())
    for name, a, b in zip(leaves, mixed, wide, strict=True):
        assert a.dtype == torch.float32
        assert_bitwise(a, b, name=f"d{name}")


@pytest.mark.one_isa
@pytest.mark.parametrize("op", OPS)
def test_second_derivative_is_refused(op):
    x = draw(2, 3).requires_grad_()
    (dx,) = torch.autograd.grad(call(op, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"pykern::{op} has no second derivative"):
        dx.sum().backward()
