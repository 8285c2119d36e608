"""attention: torch's machinery (opcheck, compile, autocast, checkpointing) and the words of every refusal."""

import copy
import math

import numpy as np
import pytest
import torch
from attention_tools import inputs, named, op_arguments
from tools import VIEWS, draw, with_gradients

import pykern
from pykern import _C
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa


def everything(dtype=torch.float32):
    """q, k, v, bias and dout; and a mask."""
    tensors, dout = inputs(5, 9, D=4, E=3, B=2, H=4, G=2, dtype=dtype)
    tensors["bias"] = draw(4, 1, 9, dtype=dtype, seed=8)
    return tensors, dout, torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.7


def apply(tensors, dout, attention=pykern.attention, **options):
    return with_gradients(named(attention, **options), tensors, dict(out=dout))


@pytest.mark.parametrize("view", VIEWS)
def test_opcheck(view):
    """Of every layout: the fake must give the strides of the real result and of its gradients."""
    tensors, _, mask = everything()
    q, k, v = (VIEWS[view](tensors[name]) for name in "qkv")
    bias = tensors["bias"][None]
    op = torch.ops.pykern.attention.default
    masked = dict(mask=mask[None, None], bias=bias)
    torch.library.opcheck(op, op_arguments(op, q=q, k=k, v=v, right=0))
    torch.library.opcheck(op, op_arguments(op, q=q, k=k, v=v, **masked))
    leaves = {name: x.detach().requires_grad_() for name, x in dict(q=q, k=k, v=v, bias=bias).items()}
    torch.library.opcheck(op, op_arguments(op, **(masked | leaves), right=0))
    saved = dict(q=q, k=k, v=v, bias=bias, right=0)
    out, lse = op(*op_arguments(op, **saved))
    saved |= dict(out=out, lse=lse, dout=torch.ones_like(out), want_bias=True, want_sinks=False)
    backward = torch.ops.pykern.attention_backward.default
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(backward, op_arguments(backward, **saved, dlse=dlse))


@pytest.mark.slow
def test_compile_fullgraph():
    tensors, dout, mask = everything()
    eager = apply(tensors, dout, mask=mask, causal=True)
    compiled = torch.compile(pykern.attention, fullgraph=True, backend="aot_eager")
    for name, x in apply(tensors, dout, compiled, mask=mask, causal=True).items():
        assert_bitwise(x, eager[name], name=name)


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    tensors, dout, mask = everything()
    plain = apply(tensors, dout, mask=mask)

    def again(q, k, v, bias, **options):
        def f(q, k, v, bias):
            return pykern.attention(q, k, v, bias=bias, **options)

        return checkpoint(f, q, k, v, bias, use_reentrant=False)

    for name, x in apply(tensors, dout, again, mask=mask).items():
        assert_bitwise(x, plain[name], name=name)


def test_autocast():
    """As torch's own: in the autocast dtype, gradients in that of the inputs; float64 is left alone."""
    tensors, dout, mask = everything()
    halves = apply({name: x.bfloat16() for name, x in tensors.items()}, dout.bfloat16(), mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = apply(tensors, dout, mask=mask)
        doubles = {name: x.double() for name, x in tensors.items()}
        assert pykern.attention(**doubles).dtype == torch.float64
    for name, x in cast.items():
        assert x.dtype == (torch.bfloat16 if name == "out" else torch.float32)
        assert_bitwise(x, halves[name].to(x.dtype), name=name)


def test_nothing_is_kept_between_calls():
    tensors, dout, mask = everything()
    before = apply(tensors, dout, mask=mask)
    tensors["k"].data.add_(1.0)  # bumps no version counter
    tensors["k"].data[:, :, 0] = 0
    after = apply(tensors, dout, mask=mask)
    copied = copy.deepcopy(tensors)
    tensors["k"].data.zero_()
    for name, x in apply(copied, dout, mask=mask).items():
        assert_bitwise(x, after[name], name=name)
    assert not torch.equal(before["out"], after["out"])


def test_saved_tensors_that_change_are_refused():
    tensors, dout, _ = everything()
    q = tensors["q"].requires_grad_()
    out = pykern.attention(q, tensors["k"], tensors["v"])
    tensors["k"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_a_negated_view_is_read_with_its_sign():
    tensors, _, _ = everything()
    q, k, v = (tensors[name] for name in "qkv")
    assert_bitwise(pykern.attention(torch._neg_view(q), k, v), pykern.attention(-q, k, v))


# ---- refusals


def test_refusals():
    q, k, v = torch.ones(2, 4, 5, 3), torch.ones(2, 2, 7, 3), torch.ones(2, 2, 7, 6)
    f, ones = pykern.attention, torch.ones
    broadcast = r"does not broadcast to \[B, H, T, S\] = \[2, 4, 5, 7\]"
    types = [
        (lambda: f([1.0], k, v), "attention: q must be a torch.Tensor, got list"),
        (lambda: f(q, None, v), "attention: k must be a torch.Tensor, got NoneType"),
        (lambda: f(q, k, 1.0), "attention: v must be a torch.Tensor, got float"),
        (lambda: f(q, k, v, mask=[True]), "attention: mask must be a torch.Tensor, got list"),
        (lambda: f(q, k, v, bias=0.5), "attention: bias must be a torch.Tensor, got float"),
        (
            lambda: f(q.int(), k.int(), v.int()),
            "attention: q has dtype int32, expected float32, float64, bfloat16 or f",
        ),
        (lambda: f(q.cfloat(), k, v), "attention: q has dtype complex64, expected float32, float64, bfloat16, float16"),
        (lambda: f(q, k.double(), v), "attention: k has dtype float64 but q has float32"),
        (lambda: f(q, k, v.half()), "attention: v has dtype float16 but q has float32"),
        (lambda: f(q, k, v, bias=ones(7).bfloat16()), "attention: bias has dtype bfloat16 but q has float32"),
        (lambda: f(q, k, v, mask=ones(7)), "attention: mask has dtype float32, expected bool"),
        (lambda: f(q, k, v, mask=ones(7).int()), "attention: mask has dtype int32, expected bool"),
    ]
    values = [
        (lambda: f(q[0], k, v), r"attention: q must be \[B, H, T, D\], got shape \[4, 5, 3\]"),
        (lambda: f(q, k[0], v), r"attention: k must be \[B, G, S, D\], got shape \[2, 7, 3\]"),
        (lambda: f(q, k, v[None]), r"attention: v must be \[B, G, S, E\], got shape \[1, 2, 2, 7, 6\]"),
        (lambda: f(q, k[:1], v), r"attention: k has shape \[1, 2, 7, 3\], expected batch = 2 in dimension 0"),
        (lambda: f(q, k, v[:1]), r"attention: v has shape \[1, 2, 7, 6\], expected batch = 2 in dimension 0"),
        (lambda: f(q, v, v), "attention: k has head size 6 but q has 3"),
        (lambda: f(q, k, v[:, :1]), "attention: v has 1 heads but k has 2"),
        (lambda: f(q, k, v[:, :, :6]), "attention: v has 6 keys but k has 7"),
        (lambda: f(q[:, :3], k, v), "attention: q has 3 heads, which is not a multiple of the 2 heads of k"),
        (lambda: f(q, k[:, :0], v[:, :0]), "attention: q has 4 heads, which is not a multiple of the 0 heads of k"),
        (lambda: f(q[..., :0], k[..., :0], v, scale=1.0), "attention: head sizes 0 and 6 must be 1..1024"),
        (lambda: f(q, k, ones(2, 2, 7, 1025)), "attention: head sizes 3 and 1025 must be 1..1024"),
        (lambda: f(q, k, v, mask=ones(6).bool()), r"attention: mask of shape \[6\] " + broadcast),
        (lambda: f(q, k, v, mask=ones(2, 2, 5, 7).bool()), r"attention: mask of shape \[2, 2, 5, 7\] " + broadcast),
        (lambda: f(q, k, v, mask=ones(()).bool()), r"attention: mask of shape \[\] " + broadcast),
        (lambda: f(q, k, v, bias=ones(1, 1, 1, 1, 7)), r"attention: bias of shape \[1, 1, 1, 1, 7\] " + broadcast),
        (lambda: f(q, k, v, bias=ones(7, 5)), r"attention: bias of shape \[7, 5\] " + broadcast),
        (lambda: f(q, k, v, scale=math.nan), "attention: scale is nan, expected a finite number"),
        (lambda: f(q, k, v, scale=-math.inf), "attention: scale is -inf, expected a finite number"),
    ]
    for error, cases in ((TypeError, types), (ValueError, values)):
        for call, words in cases:
            with pytest.raises(error, match=words):
                call()


def sentinel(*shape, dtype=np.float64):
    return np.full(shape, 7.0, dtype)


def test_refusals_of_the_kernel_write_nothing():
    q, k, v = np.ones((2, 4, 5, 3)), np.ones((2, 2, 7, 3)), np.ones((2, 2, 7, 6))
    mask, bias = np.ones((2, 4, 5, 7), bool), np.ones((2, 4, 5, 7))
    dout, dlse = np.ones((2, 4, 5, 6)), np.ones((2, 4, 5))
    out, lse, dq, dk, dv, dbias = (sentinel(*x.shape) for x in (dout, dlse, q, k, v, bias))
    readonly, big = sentinel(*out.shape), sentinel(3, 4, 5, 6)
    readonly.flags.writeable = False
    strided = np.lib.stride_tricks.as_strided

    def forward(**changed):
        arguments = dict(q=q, k=k, v=v, mask=mask, bias=bias, out=out, lse=lse) | changed
        options = {name: arguments.pop(name, default) for name, default in (("causal", True), ("scale", 1.0))}
        _C.attention_forward(*arguments.values(), **options)

    def backward(**changed):
        saved = dict(q=q, k=k, v=v, mask=mask, bias=bias, out=np.ones_like(out), lse=np.ones_like(lse))
        arguments = saved | dict(dout=dout, dlse=dlse, dq=dq, dk=dk, dv=dv, dbias=dbias) | changed
        _C.attention_backward(*arguments.values(), causal=True, scale=1.0)

    cases = [
        (forward, dict(q=np.ones((2, 4, 3, 5)).swapaxes(2, 3)), "q must have stride 1 in its last dimension, got 5"),
        (forward, dict(mask=mask[0]), r"mask must be expanded to \[B, H, T, S\], got shape \[4, 5, 7\]"),
        (forward, dict(mask=mask[:1]), r"mask has shape \[1, 4, 5, 7\], expected \[2, 4, 5, 7\]"),
        (forward, dict(bias=bias[..., :6]), r"bias has shape \[2, 4, 5, 6\], expected \[2, 4, 5, 7\]"),
        (forward, dict(out=sentinel(2, 4, 5)), r"out must be \[B, H, T, E\], got shape \[2, 4, 5\]"),
        (
            forward,
            dict(out=sentinel(2, 4, 6, 6)),
            r"out has shape \[2, 4, 6, 6\], expected that of q = 5 in dimension 2",
        ),
        (forward, dict(out=sentinel(2, 4, 5, 3)), r"out has shape \[2, 4, 5, 3\], expected head size of v = 6 in"),
        (forward, dict(out=sentinel(2, 4, 6, 5).swapaxes(2, 3)), "out must have stride 1 in its last dimension, got 5"),
        (forward, dict(out=readonly), "out is read-only"),
        (forward, dict(out=strided(big, out.shape, (0, 240, 48, 8))), "elements of out share memory"),
        (forward, dict(out=sentinel(2, 4, 5, 6)[..., ::-1]), "out must have stride 1 in its last dimension, got -1"),
        (forward, dict(lse=sentinel(2, 4)), r"lse has shape \[2, 4\], expected that of q without its last dimension"),
        (forward, dict(out=big[:2], lse=big[:2, ..., 0]), "lse shares memory with out"),
        (forward, dict(out=big[:2], q=big[1:, ..., :3]), "out shares memory with q"),
        (forward, dict(lse=bias[..., 0], out=sentinel(*out.shape)), "lse shares memory with bias"),
        (forward, dict(scale=math.nan), "scale is nan, expected a finite number"),
        (backward, dict(dout=dout[:, :, :4]), r"dout has shape \[2, 4, 4, 6\], expected that of q = 5 in dimension 2"),
        (backward, dict(dlse=dlse[:, :3]), r"dlse has shape \[2, 3, 5\], expected that of q without its last"),
        (backward, dict(dq=sentinel(2, 4, 5, 4)), r"dq has shape \[2, 4, 5, 4\] but q has \[2, 4, 5, 3\]"),
        (backward, dict(dk=sentinel(2, 4, 7, 3)), r"dk has shape \[2, 4, 7, 3\] but k has \[2, 2, 7, 3\]"),
        (backward, dict(dv=sentinel(2, 2, 7, 7)), r"dv has shape \[2, 2, 7, 7\] but v has \[2, 2, 7, 6\]"),
        (backward, dict(bias=None), "dbias is given without bias"),
        (backward, dict(dbias=sentinel(5, 7)), r"dbias must be \[B, H, T, S\], sizes of 1 allowed, got shape \[5, 7\]"),
        (backward, dict(dbias=sentinel(2, 2, 1, 7)), r"dbias has shape \[2, 2, 1, 7\], which does not broadcast to"),
        (backward, dict(dk=dv[..., :3]), "dv shares memory with dk"),
        (backward, dict(dq=big[:2, ..., :3], dout=big[1:]), "dq shares memory with dout"),
        (backward, dict(dbias=strided(dbias, dbias.shape, (0, 0, 0, 8))), "elements of dbias share memory"),
    ]
    for call, changed, words in cases:
        with pytest.raises(ValueError, match=f"attention: {words}"):
            call(**changed)
        written = [a for a in changed.values() if isinstance(a, np.ndarray) and a.flat[0] == 7.0]
        for array in (out, lse, dq, dk, dv, dbias, big, *written):
            assert (array == 7.0).all(), f"written although refused: {words}"
    with pytest.raises(TypeError, match="attention: lse has dtype float32, expected float64"):
        forward(lse=sentinel(2, 4, 5, dtype=np.float32))
    with pytest.raises(TypeError, match="attention: out must be an array, got NoneType"):
        forward(out=None)
    assert (out == 7.0).all()
    forward(lse=None)
    assert not (out == 7.0).any() and (lse == 7.0).all()
    without = out.copy()
    forward()
    assert (out == without).all()
    backward()
    assert not any((x == 7.0).any() for x in (out, lse, dq, dk, dv, dbias))
