"""softmax: formula, gradients, masks and what hides behind them, odd shapes and strides, same bits, torch, refusals."""

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
POISON = (math.nan, math.inf, -math.inf, 6e4)

# Vectors hold 2 to 16 numbers and sums use four of them at a time: a tail alone, some vectors and a tail, four exactly,
# an odd width, a vocabulary, many short rows.
SHAPES = [(1,), (7,), (3, 33), (2, 3, 64), (2, 1023), (2, 50257), (300, 5)]


def draw(*shape, dtype=torch.float64, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def some_mask(*shape, seed=5, part=0.7):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < part


def gradient(function, x, dout, *mask):
    x = x.clone().requires_grad_()
    out = function(x, *mask)
    return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_formula(dtype, masked):
    for shape in SHAPES:
        x, dout = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1, spread=1.0)
        mask = (some_mask(*shape),) if masked else ()
        out, dx = gradient(pykern.softmax, x, dout, *mask)
        expected, wanted = gradient(reference.softmax, x.double(), dout, *mask)
        assert out.dtype == dtype
        assert_close(out, expected, name=f"softmax {shape}")
        assert_close(dx, wanted, name=f"softmax {shape} dx", gradient=True, scale=expected.max().item())


def test_gradcheck():
    x = draw(3, 11).requires_grad_()
    assert torch.autograd.gradcheck(pykern.softmax, (x,))
    mask = some_mask(3, 11)
    mask[1] = False
    assert torch.autograd.gradcheck(lambda x: pykern.softmax(x, mask), (x,))


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("softmax", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_masked_has_no_effect(dtype):
    """Neither in x nor in dout; result and gradient are exactly 0 there, in whole vectors and in the tail."""
    shape = (5, 53)
    x, dout, mask = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), some_mask(*shape)
    mask[2], mask[3] = False, True
    clean = gradient(pykern.softmax, x, dout, mask)
    for poison in POISON:
        dirty = gradient(pykern.softmax, x.masked_fill(~mask, poison), dout.masked_fill(~mask, poison), mask)
        for name, a, b in zip(("out", "dx"), clean, dirty, strict=True):
            assert_bitwise(a, b, name=f"{name} with {poison} behind the mask")
            assert (b[~mask] == 0).all(), name
    sums = clean[0].double().sum(-1)
    roundings = 53 * torch.finfo(dtype).eps / 2  # of 53 quotients
    assert sums[2] == 0 and ((sums[[0, 1, 3, 4]] - 1).abs() <= roundings).all(), sums


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(dtype, masked):
    """-inf alone gives 0, a NaN or +inf that takes part gives NaN in its row, behind the mask 0, elsewhere nothing."""
    x = draw(5, 21, dtype=dtype)
    x[1], x[2, 4], x[3, 4] = -math.inf, math.nan, math.inf
    x[4, 4] = -math.inf
    mask = torch.ones(5, 21, dtype=torch.bool)
    mask[:, 9] = not masked
    out, dx = gradient(pykern.softmax, x, torch.ones(5, 21), *([mask] if masked else []))
    assert (out[1] == 0).all() and (dx[1] == 0).all()
    for row in (2, 3):
        assert out[row, mask[row]].isnan().all() and (out[row, ~mask[row]] == 0).all(), row
    finite = [0, 4]
    assert_close(out[finite], reference.softmax(x[finite], mask[finite]), name="other rows")
    assert out[4, 4] == 0 and dx[4, 4] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_do_not_overflow(dtype):
    big = 6e4 if dtype == torch.float16 else 1e30
    out = pykern.softmax(torch.tensor([[big, big, -big], [-big, -big, -big]], dtype=dtype))
    assert_close(out, torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3], dtype=torch.float64), name="out")


@pytest.mark.parametrize("shape", [(), (1,), (17,), (4, 1), (4, 17), (2, 1, 17), (3, 4, 1), (1, 4, 17), (1, 1, 1)])
def test_mask_broadcasts(shape):
    x, dout = draw(3, 4, 17), draw(3, 4, 17, seed=1)
    x, dout = (x[:2], dout[:2]) if shape[:1] == (2,) else (x, dout)
    mask = some_mask(*shape, part=0.6)
    out, dx = gradient(pykern.softmax, x, dout, mask)
    expected, wanted = gradient(pykern.softmax, x, dout, mask.expand(x.shape).contiguous())
    assert_bitwise(out, expected, name="out")
    assert_bitwise(dx, wanted, name="dx")
    assert_close(out, reference.softmax(x, mask), name="out")


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    view=st.sampled_from(["packed", "row gaps", "transposed", "column steps", "expanded", "offset"]),
    mask_view=st.sampled_from(["none", "packed", "transposed", "column steps", "one row", "one column"]),
    part=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_any_shape_and_strides(rows, columns, dtype, view, mask_view, part):
    make = dict(
        packed=lambda: draw(rows, columns, dtype=dtype),
        transposed=lambda: draw(columns, rows, dtype=dtype).T,
        expanded=lambda: draw(1, columns, dtype=dtype).expand(rows, columns),
        offset=lambda: draw(rows, columns + 3, dtype=dtype)[:, 3:],
    )
    make["row gaps"] = lambda: draw(2 * rows, columns + 2, dtype=dtype)[::2, :columns]
    make["column steps"] = lambda: draw(rows, 2 * columns, dtype=dtype)[:, ::2]
    masks = {
        "none": lambda: None,
        "packed": lambda: some_mask(rows, columns, part=part),
        "transposed": lambda: some_mask(columns, rows, part=part).T,
        "column steps": lambda: some_mask(rows, 2 * columns, part=part)[:, ::2],
        "one row": lambda: some_mask(columns, part=part),
        "one column": lambda: some_mask(rows, 1, part=part),
    }
    x, mask, dout = make[view](), masks[mask_view](), draw(rows, columns, dtype=dtype, seed=1)
    out, dx = gradient(pykern.softmax, x, dout, mask)
    copy = x.clone(memory_format=torch.contiguous_format)
    whole = None if mask is None else mask.expand(x.shape).contiguous()
    for name, a, b in zip(("out", "dx"), (out, dx), gradient(pykern.softmax, copy, dout, whole), strict=True):
        assert_bitwise(a, b, name=f"{name} of a {view} view, mask {mask_view}")
    if columns:
        assert_close(out, reference.softmax(x, mask), name="out")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count_and_neighbours(dtype, masked, with_threads):
    x, dout = draw(400, 77, dtype=dtype), draw(400, 77, dtype=dtype, seed=1)
    mask = (some_mask(400, 77),) if masked else ()
    out, dx = with_threads(1, lambda: gradient(pykern.softmax, x, dout, *mask))
    for n in (2, 3):
        for a, b in zip((out, dx), with_threads(n, lambda: gradient(pykern.softmax, x, dout, *mask)), strict=True):
            assert_bitwise(a, b, name=f"{n} threads")
    row = slice(123, 124)
    alone = gradient(pykern.softmax, x[row], dout[row], *(m[row] for m in mask))
    for a, b in zip(alone, (out[row], dx[row]), strict=True):
        assert_bitwise(a, b, name="a row alone")


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_changes_no_bit(dtype):
    x = draw(3, 200, dtype=dtype)
    for length in (1, 15, 16, 64, 77, 200):
        out = pykern.softmax(x, torch.arange(200) < length)
        assert_bitwise(out[:, :length], pykern.softmax(x[:, :length]), name=f"{length} of 200")
    all_true = pykern.softmax(x, torch.ones((), dtype=torch.bool))
    assert_bitwise(all_true, pykern.softmax(x), name="a mask that hides nothing")


def test_strided_output_is_written_and_nothing_else():
    x, buffer = np.random.default_rng(0).standard_normal((4, 9)), np.full((8, 12), 7.0)
    _C.softmax_forward(x, None, buffer[::2, 1:10])
    assert_close(buffer[::2, 1:10], reference.softmax(torch.from_numpy(x)), name="out")
    buffer[::2, 1:10] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.one_isa
@pytest.mark.parametrize("mask", [None, some_mask(3, 5), some_mask(3, 1)])
def test_opcheck(mask):
    x = draw(3, 5, dtype=torch.float32)
    torch.library.opcheck(torch.ops.pykern.softmax.default, (x, mask))
    torch.library.opcheck(torch.ops.pykern.softmax.default, (x.clone().requires_grad_(), mask))


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    def f(x, mask):
        return pykern.softmax(x * 2, mask)

    x, dout, mask = draw(4, 6), draw(4, 6, seed=1), some_mask(4, 1)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradient(f, x, dout, mask), gradient(compiled, x, dout, mask), strict=True):
        assert_bitwise(a, b)


@pytest.mark.one_isa
def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in DTYPES:
            assert pykern.softmax(draw(2, 3, dtype=dtype)).dtype == dtype


@pytest.mark.one_isa
def test_second_derivative_is_refused():
    x = draw(2, 3).requires_grad_()
    (dx,) = torch.autograd.grad(pykern.softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::softmax has no second derivative"):
        dx.sum().backward()


@pytest.mark.one_isa
def test_refusals():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    cases = [
        (lambda: pykern.softmax([1.0]), TypeError, "softmax: x must be a torch.Tensor, got list"),
        (lambda: pykern.softmax(x, [True]), TypeError, "softmax: mask must be a torch.Tensor, got list"),
        (lambda: pykern.softmax(x.long()), TypeError, "softmax: x has dtype int64, expected float32"),
        (lambda: pykern.softmax(x, x), TypeError, "softmax: mask has dtype float32, expected bool"),
        (
            lambda: pykern.softmax(torch.tensor(1.0)),
            ValueError,
            r"softmax: x must be \[..., D\] with at least one dimension",
        ),
        (
            lambda: pykern.softmax(x, mask.T),
            ValueError,
            r"softmax: mask of shape \[3, 2\] does not broadcast to x, \[2, 3\]",
        ),
        (
            lambda: pykern.softmax(x, mask[None]),
            ValueError,
            r"softmax: mask of shape \[1, 2, 3\] does not broadcast to x",
        ),
        (
            lambda: pykern.softmax(x, mask[:, :0]),
            ValueError,
            r"softmax: mask of shape \[2, 0\] does not broadcast to x",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.one_isa
def test_refusals_of_the_extension_leave_the_output_alone():
    x, out, mask = np.ones((4, 6), np.float32), np.full((4, 6), 7, np.float32), np.ones((4, 12), np.bool_)
    cases = [
        ((x, None, x), "softmax: out shares memory with x"),
        ((x, mask, out), r"softmax: mask has shape \[4, 12\] but x has \[4, 6\]"),
        ((x, mask[:, ::2], out), "softmax: mask must have stride 1 in its last dimension, got 2"),
        ((x, None, out[:, :5]), r"softmax: out has shape \[4, 5\] but x has \[4, 6\]"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            _C.softmax_forward(*arguments)
    assert (out == 7).all()
