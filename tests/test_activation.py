"""activation, swiglu: formula, gradients, odd shapes, special values, threads, torch's machinery, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pykern
from pykern import _C
from pykern.ops.activation import activation
from pykern.testing import assert_bitwise, assert_close, ratios, reference

KINDS = ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PIECE = 4096  # numbers in one task of the kernel, csrc/cpu/activation.cpp

# Vectors hold 2 to 16 numbers, tasks 4096: a tail alone, whole vectors, both, two tasks, rows in one task, no rows.
SHAPES = [(), (1,), (7,), (16,), (33,), (2, PIECE + 5), (3, 5, 17), (0, 4), (4, 0), (300, 31)]


def draw(*shape, dtype=torch.float64, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def gradients(function, inputs, dout):
    """Output and gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_is_its_formula(kind, dtype):
    for shape in SHAPES:
        x, dout = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
        out, (dx,) = gradients(lambda x: activation(x, kind), [x], dout)
        expected, (dexpected,) = gradients(lambda x: reference.activation(x, kind), [x.double()], dout)
        assert out.dtype == dx.dtype == dtype
        assert_close(out, expected, name=f"{kind} {shape}")
        assert_close(dx, dexpected, name=f"{kind} {shape} dx", gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_its_formula(dtype):
    for shape in SHAPES:
        gate, up, dout = (draw(*shape, dtype=dtype, seed=i) for i in range(3))
        out, got = gradients(pykern.swiglu, [gate, up], dout)
        expected, wanted = gradients(reference.swiglu, [gate.double(), up.double()], dout)
        assert_close(out, expected, name=f"swiglu {shape}")
        for name, a, b in zip(("dgate", "dup"), got, wanted, strict=True):
            assert_close(a, b, name=f"swiglu {shape} {name}", gradient=True)


def test_public_names_are_the_kinds():
    x = draw(50, dtype=torch.float32)
    functions = dict(relu=pykern.relu, gelu=pykern.gelu, silu=pykern.silu, sigmoid=pykern.sigmoid)
    functions["gelu_tanh"] = lambda x: pykern.gelu(x, approximate="tanh")
    for kind, function in functions.items():
        assert_bitwise(function(x), activation(x, kind), name=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x = draw(3, 11).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: activation(x, kind), (x,), atol=1e-7, rtol=1e-6)


def test_gradcheck_swiglu():
    gate, up = draw(3, 11).requires_grad_(), draw(3, 11, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(pykern.swiglu, (gate, up), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
@pytest.mark.parametrize("op", ["relu", "sigmoid", "silu", "gelu", "gelu_tanh", "swiglu"])
def test_ratio_rule(op, dtype):
    ratios.assert_ratio(op, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relative_error_in_the_tails(kind, dtype):
    """Each element to 8 roundings of exp's argument y, which exp(y) turns into a relative error of |y| roundings."""
    x = torch.cat([torch.linspace(-40, 40, 20011, dtype=torch.float64), torch.tensor([-1e-30, 0.0, 1e-30])]).to(dtype)
    exponents = dict(none=0 * x, relu=0 * x, sigmoid=x, silu=x, gelu=x * x / 2, gelu_tanh=1.6 * (x + 0.045 * x**3))
    bound = 8 * torch.finfo(dtype).eps / 2 * (1 + exponents[kind].double().abs())
    # sigmoid(y) = 1 / (1 + exp(-y)) is 0 once exp(-y) overflows: results near the smallest normal number may be 0
    tiny = 64 * torch.finfo(dtype).tiny
    expected, out = reference.activation(x, kind), activation(x, kind).double()
    off = (out - expected).abs() > torch.where(expected.abs() > tiny, bound * expected.abs(), tiny)
    assert not off.any(), [f"{kind}({x[i]}) = {out[i]}, expected {expected[i]}" for i in off.nonzero()[:3, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kind, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e4, -1e4, 0.0, -0.0], dtype=dtype)
    out, (dx,) = gradients(lambda x: activation(x, kind), [x], torch.ones_like(x))
    assert_close(out, reference.activation(x, kind), name=kind)  # NaN at -infinity where it is -infinity * 0
    far_right, far_left = (0.0 if kind == "sigmoid" else 1.0), (1.0 if kind == "none" else 0.0)
    for i, limit in ((1, far_right), (3, far_right), (2, far_left), (4, far_left)):
        assert abs(dx[i].item() - limit) < 1e-19, i  # f' keeps its value at 50 from there on
    assert dx[0] == 1 if kind == "none" else dx[0].isnan()
    at_zero = dict(none=1.0, relu=0.0, gelu=0.5, gelu_tanh=0.5, silu=0.5, sigmoid=0.25)[kind]
    assert dx[5] == dx[6] == at_zero


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    view=st.sampled_from(["packed", "row gaps", "transposed", "column steps", "expanded", "offset"]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(rows, columns, dtype, kind, view, seed):
    make = dict(
        packed=lambda: draw(rows, columns, dtype=dtype, seed=seed),
        transposed=lambda: draw(columns, rows, dtype=dtype, seed=seed).T,
        expanded=lambda: draw(1, columns, dtype=dtype, seed=seed).expand(rows, columns),
        offset=lambda: draw(rows, columns + 3, dtype=dtype, seed=seed)[:, 3:],
    )
    make["row gaps"] = lambda: draw(2 * rows, columns + 2, dtype=dtype, seed=seed)[::2, :columns]
    make["column steps"] = lambda: draw(rows, 2 * columns, dtype=dtype, seed=seed)[:, ::2]
    x = make[view]()
    out = activation(x, kind)
    assert_bitwise(
        out, activation(x.clone(memory_format=torch.contiguous_format), kind), name=f"{kind} of a {view} view"
    )
    assert_close(out, reference.activation(x, kind), name=kind)


def test_strided_output_is_written_and_nothing_else():
    x, buffer = np.random.default_rng(0).standard_normal((4, 9)), np.full((8, 12), 7.0)
    _C.activation_forward(x, buffer[::2, 1:10], kind="relu")
    np.testing.assert_array_equal(buffer[::2, 1:10], np.maximum(x, 0))
    buffer[::2, 1:10] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "sigmoid"])
def test_same_bits_for_any_thread_count_and_neighbours(kind, dtype, with_threads):
    x, dout = draw(3, 3 * PIECE + 11, dtype=dtype), draw(3, 3 * PIECE + 11, dtype=dtype, seed=1)
    first = with_threads(1, lambda: gradients(lambda x: activation(x, kind), [x], dout))
    for n in (2, 3):
        again = with_threads(n, lambda: gradients(lambda x: activation(x, kind), [x], dout))
        assert_bitwise(first[0], again[0], name=f"{n} threads")
        assert_bitwise(first[1][0], again[1][0], name=f"{n} threads, dx")
    alone = gradients(lambda x: activation(x, kind), [x[1, 5:38].clone()], dout[1, 5:38])
    assert_bitwise(first[0][1, 5:38], alone[0], name="a piece of a row alone")
    assert_bitwise(first[1][0][1, 5:38], alone[1][0], name="a piece of a row alone, dx")


@pytest.mark.one_isa
@pytest.mark.parametrize("name, args", [("activation", ("gelu",)), ("swiglu", (draw(3, 5, dtype=torch.float32),))])
def test_opcheck(name, args):
    x = draw(3, 5, dtype=torch.float32, seed=1)
    op = getattr(torch.ops.pykern, name).default
    torch.library.opcheck(op, (x, *args))
    torch.library.opcheck(op, (x.clone().requires_grad_(), *args))


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    def f(gate, up):
        return (pykern.swiglu(gate, up) + pykern.gelu(gate)).sum()

    gate, up = (
        draw(4, 6, dtype=torch.float32).requires_grad_(),
        draw(4, 6, dtype=torch.float32, seed=1).requires_grad_(),
    )
    f(gate, up).backward()
    eager = [gate.grad.clone(), up.grad.clone()]
    gate.grad = up.grad = None
    torch.compile(f, fullgraph=True, backend="aot_eager")(gate, up).backward()
    assert_bitwise(gate.grad, eager[0], name="dgate")
    assert_bitwise(up.grad, eager[1], name="dup")


@pytest.mark.one_isa
def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    x = draw(4, 9, dtype=torch.float32)
    _, (plain,) = gradients(pykern.silu, [x], torch.ones(4, 9))
    _, (again,) = gradients(lambda x: checkpoint(pykern.silu, x, use_reentrant=False), [x], torch.ones(4, 9))
    assert_bitwise(plain, again)


@pytest.mark.one_isa
def test_autocast_keeps_the_dtype_of_elementwise_ops():
    """As torch's own gelu and silu do: autocast converts for matrix products only."""
    x = draw(4, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pykern.gelu(x).dtype == torch.nn.functional.gelu(x).dtype == torch.float32
        assert pykern.gelu(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.one_isa
def test_refusals():
    x = torch.ones(2, 3)
    cases = [
        (lambda: pykern.gelu([1.0]), TypeError, "gelu: x must be a torch.Tensor, got list"),
        (lambda: pykern.relu(None), TypeError, "relu: x must be a torch.Tensor, got NoneType"),
        (lambda: pykern.silu(torch.ones(3, dtype=torch.int64)), TypeError, "silu: x has dtype int64, expected float32"),
        (
            lambda: pykern.sigmoid(torch.ones(3, dtype=torch.complex64)),
            TypeError,
            "sigmoid: x has dtype complex64, expected float32",
        ),
        (
            lambda: pykern.gelu(x, approximate="erf"),
            ValueError,
            "gelu: approximate is 'erf', expected 'none' or 'tanh'",
        ),
        (lambda: activation(x, "tanh"), ValueError, "activation: activation 'tanh' is not one of none, relu, gelu"),
        (
            lambda: pykern.swiglu(x, torch.ones(3, 2)),
            ValueError,
            r"swiglu: up has shape \[3, 2\] but gate has \[2, 3\]",
        ),
        (lambda: pykern.swiglu(x, x.bfloat16()), TypeError, "swiglu: up has dtype bfloat16 but gate has float32"),
        (lambda: pykern.swiglu(x, 2.0), TypeError, "swiglu: up must be a torch.Tensor, got float"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
