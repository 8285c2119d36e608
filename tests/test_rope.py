"""rope: formula, gradient, both styles, positions, partial rotation, same bits, torch, refusals."""

import math

import numpy as np
import pytest
import torch
from dlpack_producers import Elsewhere
from hypothesis import given
from hypothesis import strategies as st
from tools import unchecked

import pykern
import pykern.ops  # registers torch.ops.pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# (B, H, T, D), R: vectors hold 2 to 16 pairs, interleaved ones twice as many numbers.
CASES = {
    "one pair": ((1, 1, 1, 2), 2),
    "a tail of pairs": ((2, 3, 5, 14), 14),
    "odd head size, the last number is left alone": ((1, 2, 4, 33), 32),
    "head size of GPT-2": ((2, 2, 9, 64), 64),
    "half the head is rotated": ((2, 2, 7, 80), 40),
    "vectors and a tail": ((1, 2, 3, 102), 102),
    "nothing is rotated": ((1, 2, 3, 8), 0),
    "rows in several tasks": ((2, 5, 60, 40), 40),
}


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tables(P, R, dtype=torch.float64):
    """cos and sin [P, R/2] of the angles position / 10000^(2i / R)"""
    angles = torch.arange(P, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, R, 2) / max(R, 1))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def some_positions(kind, B, T, P):
    generator = torch.Generator().manual_seed(7)
    shape = dict(none=None, row=(T,), batch=(B, T))[kind]
    return None if shape is None else torch.randint(P, shape, generator=generator)


def gradient(function, x, dout):
    x = x.clone().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]


@pytest.mark.parametrize("wide_tables", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_formula(dtype, interleaved, wide_tables):
    """With tables of x's dtype, and with float32 ones beside bfloat16 and float16."""
    for name, ((B, H, T, D), R) in CASES.items():
        P = T + 3
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = tables(P, R, wide if wide_tables else dtype)
        x, dout = draw(B, H, T, D, dtype=dtype), draw(B, H, T, D, dtype=dtype, seed=1)
        for kind in ("none", "row", "batch"):
            options = dict(positions=some_positions(kind, B, T, P), interleaved=interleaved)
            out, dx = gradient(lambda x: pykern.rope(x, cos, sin, **options), x, dout)  # noqa: B023
            expected, wanted = gradient(lambda x: reference.rope(x, cos, sin, **options), x.double(), dout)  # noqa: B023
            assert out.dtype == dtype
            assert_close(out, expected, name=f"{name}, positions {kind}")
            assert_close(dx, wanted, name=f"{name}, positions {kind}, dx", gradient=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    cos, sin = tables(9, 6)
    x = draw(2, 2, 4, 8).requires_grad_()
    positions = some_positions("batch", 2, 4, 9)
    options = dict(positions=positions, interleaved=interleaved)
    assert torch.autograd.gradcheck(lambda x: pykern.rope(x, cos, sin, **options), (x,))


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("rope", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_styles_are_one_rotation(dtype):
    """Pairs (2i, 2i+1) moved to (i, i + R/2): to the bit."""
    x, (cos, sin) = draw(2, 3, 5, 54, dtype=dtype), tables(5, 54, dtype)
    halves = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    rotated = pykern.rope(x, cos, sin, interleaved=True)
    assert_bitwise(pykern.rope(halves, cos, sin), torch.cat((rotated[..., ::2], rotated[..., 1::2]), -1))


def test_position_0_and_numbers_behind_R_are_copied():
    x, (cos, sin) = draw(1, 2, 3, 20, dtype=torch.float32), tables(3, 12, torch.float32)
    x[..., 15] = math.nan
    out = pykern.rope(x, cos, sin)
    assert_bitwise(out[:, :, 0], x[:, :, 0], name="position 0")
    assert_bitwise(out[..., 12:], x[..., 12:], name="behind R")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_for_any_thread_count(dtype, interleaved, with_threads):
    """A decode step rotates one row at a given position: the bits are those of the prefill."""
    (B, H, T, D), (cos, sin) = (2, 5, 300, 22), tables(300, 18, dtype)
    x, dout = draw(B, H, T, D, dtype=dtype), draw(B, H, T, D, dtype=dtype, seed=1)

    def rotate(x, dout, positions=None):
        return gradient(lambda x: pykern.rope(x, cos, sin, positions=positions, interleaved=interleaved), x, dout)

    out, dx = with_threads(1, lambda: rotate(x, dout))
    for n in (2, 3):
        for a, b in zip((out, dx), with_threads(n, lambda: rotate(x, dout)), strict=True):
            assert_bitwise(a, b, name=f"{n} threads")
    b, h, t = (slice(i, i + 1) for i in (1, 3, 211))
    one, done = rotate(x[b, h, t], dout[b, h, t], torch.tensor([211]))
    assert_bitwise(one, out[b, h, t], name="a row alone")
    assert_bitwise(done, dx[b, h, t], name="a row alone, dx")


def test_gradient_is_the_inverse_rotation():
    x, (cos, sin) = draw(2, 3, 5, 16, dtype=torch.float32), tables(5, 16, torch.float32)
    out, dx = gradient(lambda x: pykern.rope(x, cos, sin), x, x)
    back = torch.empty_like(x)
    _C.rope(x, cos, sin, None, back, interleaved=False, inverse=True)
    assert_bitwise(dx, back)
    _C.rope(out, cos, sin, None, back, interleaved=False, inverse=True)
    assert_close(back, x, name="there and back")


@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 6), st.integers(1, 40)),
    pairs=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    positions=st.sampled_from(["none", "row", "batch"]),
    view=st.sampled_from(["packed", "heads behind tokens", "gaps", "column steps", "expanded"]),
)
def test_any_shape_and_strides(sizes, pairs, dtype, interleaved, positions, view):
    B, H, T, D = sizes
    make = {
        "packed": lambda: draw(B, H, T, D, dtype=dtype),
        "heads behind tokens": lambda: draw(B, T, H, D, dtype=dtype).transpose(1, 2),
        "gaps": lambda: draw(B, 2 * H, T + 1, D + 3, dtype=dtype)[:, ::2, 1:, 2 : D + 2],
        "column steps": lambda: draw(B, H, T, 2 * D, dtype=dtype)[..., ::2],
        "expanded": lambda: draw(B, 1, T, D, dtype=dtype).expand(B, H, T, D),
    }
    x, (cos, sin) = make[view](), tables(8, 2 * min(pairs, D // 2), dtype)
    options = dict(positions=some_positions(positions, B, T, 8), interleaved=interleaved)
    out = pykern.rope(x, cos, sin, **options)
    copy = x.clone(memory_format=torch.contiguous_format)
    assert_bitwise(out, pykern.rope(copy, cos, sin, **options), name=f"rope of {view}")
    assert_close(out, reference.rope(x, cos, sin, **options), name="rope")


def test_strided_tables_and_positions():
    x, (cos, sin) = draw(2, 2, 4, 12), tables(20, 12)
    positions = torch.arange(16).view(4, 4)[1::2]
    expected = pykern.rope(x, cos, sin, positions=positions)
    half = torch.cat((cos, sin), -1)[:, :6]
    assert_bitwise(expected, pykern.rope(x, half, sin.T.contiguous().T, positions=positions.T.contiguous().T))
    few = torch.arange(8).view(2, 4)
    assert_bitwise(pykern.rope(x, cos, sin, positions=2 * few), pykern.rope(x, cos[::2], sin[::2], positions=few))


@pytest.mark.one_isa
def test_opcheck():
    x, (cos, sin) = draw(2, 2, 4, 8, dtype=torch.float32), tables(6, 6, torch.float32)
    for arguments in (
        (x, cos, sin, None, True, False),
        (x.clone().requires_grad_(), cos, sin, torch.arange(4), False, False),
    ):
        torch.library.opcheck(torch.ops.pykern.rope.default, arguments)


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    cos, sin = tables(6, 6, torch.float32)

    def f(x):
        return pykern.rope(x, cos, sin, positions=torch.arange(4) + 1) * 2

    x, dout = draw(2, 2, 4, 8, dtype=torch.float32), draw(2, 2, 4, 8, seed=1)
    pairs = zip(
        gradient(f, x, dout), gradient(torch.compile(f, fullgraph=True, backend="aot_eager"), x, dout), strict=True
    )
    for eager, compiled in pairs:
        assert_bitwise(eager, compiled)


@pytest.mark.one_isa
def test_no_gradient_is_cut_silently():
    x, (cos, sin) = draw(1, 1, 4, 6).requires_grad_(), tables(4, 6)
    with pytest.raises(RuntimeError, match=r"rope: cos and sin get no gradient; call detach\(\) on them"):
        pykern.rope(x, cos.requires_grad_(), sin)
    (dx,) = torch.autograd.grad(pykern.rope(x, cos.detach(), sin).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::rope has no second derivative"):
        dx.sum().backward()


@pytest.mark.one_isa
def test_refusals():
    x, (cos, sin) = torch.ones(2, 3, 4, 8), tables(5, 8, torch.float32)

    def rope(x=x, cos=cos, sin=sin, **options):
        return pykern.rope(x, cos, sin, **options)

    cases = [
        (lambda: rope([1.0]), TypeError, "rope: x must be a torch.Tensor, got list"),
        (lambda: rope(positions=[0, 1, 2, 3]), TypeError, "rope: positions must be a torch.Tensor, got list"),
        (lambda: rope(x.long()), TypeError, "rope: x has dtype int64, expected float32, float64, bfloat16 or float16"),
        (
            lambda: rope(cos=cos.double()),
            TypeError,
            "rope: cos has dtype float64, expected float32",
        ),
        (lambda: rope(sin=sin.bfloat16()), TypeError, "rope: sin has dtype bfloat16 but cos has float32"),
        (lambda: rope(positions=torch.zeros(4)), TypeError, "rope: positions has dtype float32, expected int64"),
        (lambda: rope(x[0]), ValueError, r"rope: x must be \[B, H, T, D\], got shape \[3, 4, 8\]"),
        (lambda: rope(cos=cos[0]), ValueError, r"rope: cos must be \[P, R/2\], got shape \[4\]"),
        (lambda: rope(sin=sin[:4]), ValueError, r"rope: sin has shape \[4, 4\] but cos has \[5, 4\]"),
        (lambda: rope(x[..., :7]), ValueError, r"rope: cos of shape \[5, 4\] rotates R = 8 numbers, but x has D = 7"),
        (lambda: rope(positions=torch.zeros(3).long()), ValueError, r"rope: positions has shape \[3\], expected T = 4"),
        (
            lambda: rope(positions=torch.zeros(3, 4).long()),
            ValueError,
            r"rope: positions has shape \[3, 4\], expected B = 2",
        ),
        (
            lambda: rope(positions=torch.tensor(1)),
            ValueError,
            r"rope: positions must be \[T\] or \[B, T\], got shape \[\]",
        ),
        (
            lambda: rope(positions=torch.tensor([0, 1, 5, 2])),
            IndexError,
            "rope: positions contains 5, but cos has 5 rows",
        ),
        (
            lambda: rope(positions=torch.tensor([0, -1, 4, 2])),
            IndexError,
            "rope: positions contains -1, but cos has 5 rows",
        ),
        (lambda: rope(cos=cos[:3], sin=sin[:3]), IndexError, "rope: x has 4 positions, but cos has 3 rows"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


@unchecked
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_position_outside_of_the_table_on_a_gpu_is_a_row_of_nan(device, interleaved, inverse):
    """The host does not look at positions there; tables in a page that ends behind them, positions far away."""
    outside = [-1, 5, 2**40, -(2**62)]
    for dtype in DTYPES:
        for D, R in ((24, 16), (33, 14), (8, 0)):
            x, (cos, sin) = draw(2, 3, 6, D, dtype=dtype), tables(5, R, dtype)
            positions = torch.tensor([[0, 4, 2, 3, 1, 0], [outside[0], 4, outside[1], 0, *outside[2:]]])
            out = torch.full_like(x, 7.0)
            move = Elsewhere if device == "emulator" else torch.Tensor.cuda
            given = [move(each) for each in (x, cos, sin, positions, out)]
            _C.rope(*given, interleaved=interleaved, inverse=inverse)
            out = out if device == "emulator" else given[-1].cpu()
            known = (positions >= 0) & (positions < 5)
            turned = reference.rope(
                *(x.double(), cos.double(), (-sin if inverse else sin).double()),
                positions=positions * known,
                interleaved=interleaved,
            )
            for b, t in known.nonzero().tolist():
                assert_close(out[b, :, t], turned[b, :, t], name=f"text {b}, place {t}")
            assert out.transpose(1, 2)[~known].isnan().all() and known.sum() == 8


@pytest.mark.one_isa
def test_nothing_is_written_when_the_last_position_is_out_of_range():
    x, out = np.ones((1, 1, 4, 8), np.float32), np.full((1, 1, 4, 8), 7, np.float32)
    cos, sin = (t.numpy() for t in tables(5, 8, torch.float32))
    with pytest.raises(IndexError, match="rope: positions contains 9, but cos has 5 rows"):
        _C.rope(x, cos, sin, np.array([[0, 1, 2, 9]]), out, interleaved=False, inverse=False)
    with pytest.raises(ValueError, match="rope: out shares memory with x"):
        _C.rope(out, cos, sin, None, out, interleaved=False, inverse=False)
    assert (out == 7).all()
