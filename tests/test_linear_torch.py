"""linear: torch's machinery (opcheck, compile, autocast, checkpointing) and the words of every refusal."""

import copy

import numpy as np
import pytest
import torch
from test_linear import apply, inputs, named
from tools import with_gradients

import pykern
from pykern import _C
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa


def test_nothing_is_kept_between_calls():
    """weight.data.add_ bumps no version counter; a deep copy shares nothing with its original."""
    tensors, dout = inputs(5, 6, 7, dtype=torch.float32)
    before = apply(tensors, dout)
    tensors["weight"].data.add_(1.0)
    after = apply(tensors, dout)
    copied = copy.deepcopy(tensors)
    tensors["weight"].data.zero_()
    for name, x in apply(copied, dout).items():
        assert_bitwise(x, after[name], name=name)
    assert not torch.equal(before["out"], after["out"]) and not torch.equal(before["dx"], after["dx"])


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_opcheck(activation):
    for rows in ((3,), (2, 3)):
        tensors, _ = inputs(None, 4, 5, rows=rows, residual=True, dtype=torch.float32)
        op = torch.ops.pykern.linear.default
        torch.library.opcheck(op, (*tensors.values(), activation, False))
        torch.library.opcheck(op, (tensors["x"], tensors["weight"], None, None, activation, True))
        torch.library.opcheck(op, (*(x.requires_grad_() for x in tensors.values()), activation, False))


@pytest.mark.slow
def test_compile_fullgraph():
    tensors, dout = inputs(None, 4, 5, rows=(2, 3), residual=True, dtype=torch.float32)
    eager = apply(tensors, dout, activation="silu")
    compiled = torch.compile(pykern.linear, fullgraph=True, backend="aot_eager")
    again = with_gradients(named(compiled, activation="silu"), tensors, dict(out=dout))
    for name, x in eager.items():
        assert_bitwise(x, again[name], name=name)


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    tensors, dout = inputs(6, 5, 4, dtype=torch.float32)
    plain = apply(tensors, dout, activation="gelu")

    def again(x, weight, bias):
        return checkpoint(lambda *args: pykern.linear(*args, activation="gelu"), x, weight, bias, use_reentrant=False)

    for name, x in with_gradients(named(again), tensors, dict(out=dout)).items():
        assert_bitwise(x, plain[name], name=name)


def test_autocast():
    """x in the autocast dtype, the weight rounded by the kernel, bias and residual as they are; float64 left alone."""
    tensors, dout = inputs(6, 5, 4, residual=True, dtype=torch.float32)
    mixed = dict(tensors, x=tensors["x"].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = apply(tensors, dout)
        assert pykern.linear(tensors["x"].double(), tensors["weight"].double()).dtype == torch.float64
        plain = pykern.linear(tensors["x"], tensors["weight"])
    for name, x in apply(mixed, dout).items():
        assert cast[name].dtype == torch.float32
        assert_bitwise(cast[name], x.to(torch.float32), name=name)
    assert_bitwise(plain, pykern.linear(mixed["x"], tensors["weight"].bfloat16()), name="without bias and residual")


# ---- refusals


def test_refusals():
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    f = pykern.linear
    shapes = r"linear: weight must be \[N, K\] with K the last size of x, got x "
    cases = [
        (lambda: f([1.0], weight), TypeError, "linear: x must be a torch.Tensor, got list"),
        (lambda: f(x, None), TypeError, "linear: weight must be a torch.Tensor, got NoneType"),
        (lambda: f(x, weight, [1.0]), TypeError, "linear: bias must be a torch.Tensor, got list"),
        (lambda: f(x, weight, residual=2.0), TypeError, "linear: residual must be a torch.Tensor, got float"),
        (lambda: f(torch.ones(()), weight), ValueError, shapes + r"\[\], weight \[4, 3\]"),
        (lambda: f(x, torch.ones(3)), ValueError, shapes + r"\[2, 3\], weight \[3\]"),
        (lambda: f(x, weight.T), ValueError, shapes + r"\[2, 3\], weight \[3, 4\]"),
        (lambda: f(x, weight, x), ValueError, r"linear: bias must be \[N\], got shape \[2, 3\]"),
        (
            lambda: f(x, weight, torch.ones(3)),
            ValueError,
            r"linear: bias has shape \[3\], expected N = 4 in dimension 0",
        ),
        (lambda: f(x, weight, residual=bias), ValueError, r"linear: residual has shape \[4\], expected \[2, 4\]"),
        (lambda: f(x, weight, residual=x), ValueError, r"linear: residual has shape \[2, 3\], expected \[2, 4\]"),
        (
            lambda: f(x.long(), weight.long()),
            TypeError,
            "linear: x has dtype int64, expected float32, float64, bfloat16",
        ),
        (lambda: f(x.cfloat(), weight), TypeError, "linear: x has dtype complex64, expected float32"),
        (lambda: f(x, weight.double()), TypeError, "linear: weight has dtype float64 but x has float32"),
        (lambda: f(x, weight, bias.half()), TypeError, "linear: bias has dtype float16 but x has float32"),
        (
            lambda: f(x, weight, residual=f(x, weight).bfloat16()),
            TypeError,
            "linear: residual has dtype bfloat16 but x",
        ),
        (
            lambda: f(x, weight, activation="tanh"),
            ValueError,
            "linear: activation is 'tanh', expected None or one of relu, gelu, gelu_tanh, silu, sigmoid",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_a_second_derivative_is_refused():
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(pykern.linear(x, weight, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::linear has no second derivative"):
        dx.sum().backward()


def test_refusals_of_the_kernel_write_nothing():
    x, weight, bias, dout = (np.ones(s) for s in ((2, 3), (4, 3), 4, (2, 4)))
    out, dx, dweight, dbias = (np.full(s, 7.0) for s in ((2, 4), (2, 3), (4, 3), 4))
    readonly = np.full((2, 4), 7.0)
    readonly.flags.writeable = False
    big = np.full((4, 4), 7.0)

    def forward(activation="none", **changed):
        arguments = dict(x=x, weight=weight, bias=bias, residual=None, out=out, pre=None) | changed
        _C.linear_forward(*arguments.values(), activation=activation)

    def backward(activation="none", **changed):
        arguments = dict(x=x, weight=weight, pre=None, dout=dout, dx=dx, dweight=dweight, dbias=dbias) | changed
        _C.linear_backward(*arguments.values(), activation=activation)

    cases = [
        (forward, dict(x=np.ones(())), r"linear: x must be \[..., K\], got a scalar"),
        (forward, dict(weight=np.ones((4, 4))), r"linear: weight has shape \[4, 4\] but x has 3 inputs"),
        (forward, dict(weight=np.ones(3)), r"linear: weight must be \[N, K\], got shape \[3\]"),
        (forward, dict(x=np.ones((3, 2)).T), "linear: x must have stride 1 in its last dimension, got 2"),
        (
            forward,
            dict(x=np.ones((2, 5, 3))[:, ::2], out=np.full((2, 3, 4), 7.0)),
            "linear: x of shape .* must have rows of one",
        ),
        (
            forward,
            dict(out=np.full((2, 5), 7.0)),
            r"linear: out has shape \[2, 5\], expected the leading dimensions of x \[2, 3\] and 4",
        ),
        (forward, dict(pre=np.full((3, 4), 7.0)), r"linear: pre has shape \[3, 4\], expected the leading"),
        (forward, dict(out=np.full((4, 2), 7.0).T), "linear: out must have stride 1 in its last dimension, got 2"),
        (forward, dict(out=readonly), "linear: out is read-only"),
        (
            forward,
            dict(out=np.lib.stride_tricks.as_strided(big, (2, 4), (0, 8))),
            "linear: elements of out share memory",
        ),
        (forward, dict(out=big[:2], residual=big[1:3]), "linear: out shares memory with residual"),
        (forward, dict(out=big[:2], pre=big[1:3]), "linear: pre shares memory with out"),
        (forward, dict(out=big[:2], weight=big[:, :3]), "linear: out shares memory with weight"),
        (forward, dict(activation="tanh"), "linear: activation 'tanh' is not one of none, relu"),
        (backward, dict(activation="gelu"), "linear: pre is needed for the gradient of an activation"),
        (backward, dict(dout=np.ones((2, 3))), r"linear: dout has shape \[2, 3\], expected the leading"),
        (backward, dict(dx=np.full((3, 3), 7.0)), r"linear: dx has shape \[3, 3\] but x has \[2, 3\]"),
        (backward, dict(dweight=np.full((4, 4), 7.0)), r"linear: dweight has shape \[4, 4\] but weight has \[4, 3\]"),
        (backward, dict(dbias=np.full(3, 7.0)), r"linear: dbias has shape \[3\], expected N = 4 in dimension 0"),
        (backward, dict(dx=dweight[:2]), "linear: dweight shares memory with dx"),
        (backward, dict(dx=big[:2, :3], dout=big[1:3]), "linear: dx shares memory with dout"),
        (
            backward,
            dict(activation="gelu", pre=np.ones((2, 3))),
            r"linear: pre has shape \[2, 3\], expected the leading",
        ),
    ]
    for call, changed, words in cases:
        with pytest.raises(ValueError, match=words):
            call(**changed)
        written = [a for a in changed.values() if isinstance(a, np.ndarray) and a.size and a.flat[0] == 7.0]
        for array in (out, dx, dweight, dbias, big, *written):
            assert (array == 7.0).all(), f"written although refused: {words}"
    with pytest.raises(TypeError, match="linear: out has dtype float32 but x has float64"):
        forward(out=np.full((2, 4), 7.0, np.float32))
    forward()
    backward()
