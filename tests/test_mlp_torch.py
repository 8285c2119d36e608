"""mlp: torch's machinery (opcheck, compile, autocast, checkpointing), nn.MLP, and the words of every refusal."""

import copy

import numpy as np
import pytest
import torch
from test_mlp import apply, inputs, named
from tools import with_gradients
from torch.nn.utils import prune

import pykern
from pykern import _C, nn
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa

# the order of the arguments of torch.ops.pykern.mlp
ORDER = ("x", "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias", "residual")


def test_nothing_is_kept_between_calls():
    """weight.data.add_ bumps no version counter; a deep copy shares nothing with its original."""
    tensors, dout = inputs(5, 6, 7, 4, gated=True, dtype=torch.float32)
    before = apply(tensors, dout)
    for name in ("up_weight", "gate_weight", "down_weight"):
        now = apply(tensors, dout)
        tensors[name].data.add_(1.0)
        after = apply(tensors, dout)
        for tensor in ("out", "dx"):
            assert not torch.equal(now[tensor], after[tensor]), f"{tensor} does not see the new {name}"
    copied = copy.deepcopy(tensors)
    for x in tensors.values():
        x.data.zero_()
    for name, x in apply(copied, dout).items():
        assert_bitwise(x, after[name], name=name)
    assert not torch.equal(before["out"], after["out"])


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_opcheck(gated):
    op = torch.ops.pykern.mlp.default
    for rows in ((3,), (2, 3)):
        tensors, _ = inputs(None, 4, 5, 6, rows=rows, gated=gated, dtype=torch.float32)
        arguments = [tensors.get(name) for name in ORDER]
        bare = [None if name.endswith("bias") or name == "residual" else tensors.get(name) for name in ORDER]
        torch.library.opcheck(op, (*arguments, "silu", False))
        torch.library.opcheck(op, (*bare, "gelu", True))
        torch.library.opcheck(op, (*(x if x is None else x.requires_grad_() for x in arguments), "silu", False))
    half = [None if x is None else x.detach().bfloat16() if i == 0 else x for i, x in enumerate(arguments)]
    torch.library.opcheck(op, (*half, "silu", True))


def test_opcheck_of_the_backward_pass():
    tensors, dout = inputs(None, 4, 5, 6, rows=(2, 3), gated=True, dtype=torch.float32)
    up, gate = (pykern.linear(tensors["x"], tensors[f"{n}_weight"], tensors[f"{n}_bias"]) for n in ("up", "gate"))
    op, given = torch.ops.pykern.mlp_backward.default, [tensors[name] for name in ORDER[:-1]]
    for wanted in ([True] * 7, [False] * 6 + [True], [i % 2 == 0 for i in range(7)]):
        torch.library.opcheck(op, (*given, up, gate, dout, "silu", wanted))


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_compile_fullgraph(gated):
    tensors, dout = inputs(None, 4, 5, 6, rows=(2, 3), gated=gated, dtype=torch.float32)
    eager = apply(tensors, dout, activation="silu")
    compiled = torch.compile(pykern.mlp, fullgraph=True, backend="aot_eager")
    again = with_gradients(named(compiled, activation="silu"), tensors, dict(out=dout))
    for name, x in eager.items():
        assert_bitwise(x, again[name], name=name)


@pytest.mark.slow
def test_the_module_compiles_fullgraph():
    module, x = nn.MLP(4, 6, "swiglu"), torch.ones(2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x, x), module(x, x))


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    tensors, dout = inputs(6, 5, 7, 4, gated=True, dtype=torch.float32)
    names = list(tensors)

    def again(**kwargs):
        def mlp(*args):
            return pykern.mlp(**dict(zip(names, args, strict=True)), activation="silu")

        return checkpoint(mlp, *(kwargs[name] for name in names), use_reentrant=False)

    plain = apply(tensors, dout, activation="silu")
    for name, x in with_gradients(named(again), tensors, dict(out=dout)).items():
        assert_bitwise(x, plain[name], name=name)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_autocast_casts_x_and_keeps_the_weights(gated, half):
    """Float32 weights get float32 gradients, rounded once; a float32 residual makes a float32 result."""
    tensors, dout = inputs(6, 5, 7, 4, gated=gated, dtype=torch.float32)
    mixed = apply(tensors | dict(x=tensors["x"].to(half)), dout)
    with torch.autocast("cpu", dtype=half):
        cast = apply(tensors, dout)
        bare = pykern.mlp(tensors["x"], tensors["up_weight"], tensors["down_weight"])
        lower = pykern.mlp(*(tensors[n].to(half) for n in ("x", "up_weight", "down_weight")))
    assert bare.dtype == lower.dtype == half
    assert_bitwise(bare, lower, name="weights rounded before")
    for name, x in cast.items():
        assert x.dtype == torch.float32
        assert_bitwise(x, mixed[name].float(), name=name)


def test_autocast_leaves_float64_alone_and_turns_other_halves():
    tensors, _ = inputs(6, 5, 7, 4)
    plain = pykern.mlp(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise(pykern.mlp(**tensors), plain)
        halves = {name: x.half() for name, x in tensors.items()}
        cast = pykern.mlp(**halves)
    assert_bitwise(cast, pykern.mlp(**{name: x.bfloat16() for name, x in halves.items()}))


# ---- nn.MLP


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_the_module_is_one_op(activation, monkeypatch):
    module, x = nn.MLP(4, 6, activation), torch.ones(2, 4)
    expected = module(x, x)
    for name in ("linear", "swiglu"):
        monkeypatch.setattr(pykern.ops, name, lambda *args, **kwargs: pytest.fail("not one op"))
    assert_bitwise(module(x, x), expected)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_layers_with_hooks_or_replaced_are_called(activation):
    """torch.nn.utils.prune computes the weight in a hook; adapters replace the layer or its forward."""
    x = torch.ones(2, 4)
    names = ["c_fc", "c_proj"] + ["c_gate"] * (activation == "swiglu")
    for name in names:
        module = nn.MLP(4, 6, activation)
        prune.random_unstructured(getattr(module, name), "weight", amount=0.5)
        layer = getattr(module, name)
        layer.weight_orig.data.add_(1.0)  # its hook masks it, into weight
        out = module(x)
        assert_bitwise(out, module(x), name=name)
        prune.remove(layer, "weight")
        torch.testing.assert_close(module(x), out)

        module = nn.MLP(4, 6, activation)
        plain = module(x)
        setattr(module, name, torch.nn.Sequential(getattr(module, name)))
        torch.testing.assert_close(module(x), plain)

        module, reached = nn.MLP(4, 6, activation), []
        layer = getattr(module, name)
        forward = layer.forward
        layer.forward = lambda *a, f=forward, r=reached: r.append(1) or f(*a)
        module(x)
        assert reached == [1]


# ---- refusals


def test_refusals():
    x, up, down, gate, bias = torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 5), torch.ones(5, 3), torch.ones(5)
    f = pykern.mlp
    of_up = r"mlp: up_weight must be \[H, K\] with K the last size of x, got x "
    of_down = r"mlp: down_weight must be \[N, H\] with H the rows of up_weight, got up_weight \[5, 3\], down_weight "
    cases = [
        (lambda: f([1.0], up, down), TypeError, "mlp: x must be a torch.Tensor, got list"),
        (lambda: f(x, None, down), TypeError, "mlp: up_weight must be a torch.Tensor, got NoneType"),
        (lambda: f(x, up, 1), TypeError, "mlp: down_weight must be a torch.Tensor, got int"),
        (lambda: f(x, up, down, [1.0]), TypeError, "mlp: up_bias must be a torch.Tensor, got list"),
        (lambda: f(x, up, down, None, 1.0), TypeError, "mlp: down_bias must be a torch.Tensor, got float"),
        (lambda: f(x, up, down, gate_weight="g"), TypeError, "mlp: gate_weight must be a torch.Tensor, got str"),
        (lambda: f(x, up, down, residual=2.0), TypeError, "mlp: residual must be a torch.Tensor, got float"),
        (lambda: f(x.to_sparse(), up, down), TypeError, "mlp: x must be a dense tensor, got a sparse_coo one"),
        (lambda: f(torch.ones(()), up, down), ValueError, of_up + r"\[\], up_weight \[5, 3\]"),
        (lambda: f(x, torch.ones(3), down), ValueError, of_up + r"\[2, 3\], up_weight \[3\]"),
        (lambda: f(x, up.T, down), ValueError, of_up + r"\[2, 3\], up_weight \[3, 5\]"),
        (lambda: f(x, up, down.T), ValueError, of_down + r"\[5, 4\]"),
        (lambda: f(x, up, bias), ValueError, of_down + r"\[5\]"),
        (lambda: f(x, up, down, bias[:4]), ValueError, r"mlp: up_bias has shape \[4\], expected \[5\]"),
        (lambda: f(x, up, down, None, bias), ValueError, r"mlp: down_bias has shape \[5\], expected \[4\]"),
        (
            lambda: f(x, up, down, gate_weight=down),
            ValueError,
            r"mlp: gate_weight has shape \[4, 5\], expected \[5, 3\]",
        ),
        (
            lambda: f(x, up, down, gate_weight=gate, gate_bias=bias[:1]),
            ValueError,
            r"mlp: gate_bias has shape \[1\], expected \[5\]",
        ),
        (lambda: f(x, up, down, gate_bias=bias), ValueError, "mlp: gate_bias is given without gate_weight"),
        (lambda: f(x, up, down, residual=x), ValueError, r"mlp: residual has shape \[2, 3\], expected \[2, 4\]"),
        (lambda: f(x, up, down, residual=bias[:4]), ValueError, r"mlp: residual has shape \[4\], expected \[2, 4\]"),
        (
            lambda: f(x, up, down, activation="tanh"),
            ValueError,
            "mlp: activation is 'tanh', expected one of relu, gelu, gelu_tanh, silu, sigmoid",
        ),
        (lambda: f(x, up, down, activation=None), ValueError, "mlp: activation is None, expected one of relu"),
        (lambda: f(x.long(), up.long(), down.long()), TypeError, "mlp: x has dtype int64, expected float32, float64"),
        (lambda: f(x.cfloat(), up, down), TypeError, "mlp: x has dtype complex64, expected float32"),
        (lambda: f(x, up.double(), down), TypeError, "mlp: up_weight has dtype float64 but x has float32"),
        (lambda: f(x, up, down.bfloat16()), TypeError, "mlp: down_weight has dtype bfloat16 but x has float32"),
        (lambda: f(x.half(), up.bfloat16(), down), TypeError, "mlp: up_weight has dtype bfloat16 but x has float16"),
        (lambda: f(x.double(), up, down), TypeError, "mlp: up_weight has dtype float32 but x has float64"),
        (lambda: f(x, up, down, bias.half()), TypeError, "mlp: up_bias has dtype float16 but x has float32"),
        (lambda: f(x, up, down, None, bias[:4].double()), TypeError, "mlp: down_bias has dtype float64 but x has"),
        (lambda: f(x, up, down, gate_weight=gate.half()), TypeError, "mlp: gate_weight has dtype float16 but x has"),
        (
            lambda: f(x, up, down, gate_weight=gate, gate_bias=bias.half()),
            TypeError,
            "mlp: gate_bias has dtype float16 but x has float32",
        ),
        (
            lambda: f(x, up, down, residual=f(x, up, down).double()),
            TypeError,
            "mlp: residual has dtype float64 but x has float32",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_a_second_derivative_is_refused():
    x, up, down = (torch.ones(*shape, requires_grad=True) for shape in ((2, 3), (5, 3), (4, 5)))
    (dx,) = torch.autograd.grad(pykern.mlp(x, up, down).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::mlp has no second derivative"):
        dx.sum().backward()


def test_refusals_of_the_kernel_write_nothing():
    shapes = dict(x=(2, 3), up_weight=(5, 3), up_bias=(5,), gate_weight=(5, 3), gate_bias=(5,), down_weight=(4, 5))
    given = {name: np.ones(shape) for name, shape in (shapes | dict(down_bias=(4,), residual=(2, 4))).items()}
    made = {name: np.full(shape, 7.0) for name, shape in dict(out=(2, 4), up=(2, 5), gate=(2, 5)).items()}
    saved = {name: given[name] for name in ("x", "up_weight", "gate_weight", "down_weight")}
    saved |= dict(up=np.ones((2, 5)), gate=np.ones((2, 5)), dout=np.ones((2, 4)))
    gradients = {f"d{name}": np.full(given[name].shape, 7.0) for name in ORDER[:-1]}
    readonly = np.full((2, 4), 7.0)
    readonly.flags.writeable = False
    big = np.full((6, 6), 7.0)

    def forward(activation="silu", **changed):
        _C.mlp_forward(*(given | made | changed).values(), activation=activation)

    def backward(activation="silu", **changed):
        _C.mlp_backward(*(saved | gradients | changed).values(), activation=activation)

    of_gate = "mlp: gate must be given with up when there is a gate_weight, and only then"
    cases = [
        (forward, dict(x=np.ones(())), r"mlp: x must be \[..., K\], got a scalar"),
        (forward, dict(x=np.ones((3, 2)).T), "mlp: x must have stride 1 in its last dimension, got 2"),
        (forward, dict(up_weight=np.ones(3)), r"mlp: up_weight must be \[H, K\], got shape \[3\]"),
        (forward, dict(up_weight=np.ones((5, 4))), r"mlp: up_weight has shape \[5, 4\], expected inputs = 3"),
        (forward, dict(gate_weight=np.ones((4, 3))), r"mlp: gate_weight has shape \[4, 3\], expected outputs = 5"),
        (forward, dict(down_weight=np.ones(5)), r"mlp: down_weight must be \[N, H\], got shape \[5\]"),
        (forward, dict(down_weight=np.ones((4, 6))), r"mlp: down_weight has shape \[4, 6\], expected inputs = 5"),
        (forward, dict(down_weight=np.ones((5, 4)).T), "mlp: down_weight must have stride 1 in its last dimension"),
        (forward, dict(up_bias=np.ones(4)), r"mlp: up_bias has shape \[4\], expected outputs = 5"),
        (forward, dict(gate_bias=np.ones((5, 1))), r"mlp: gate_bias must be a vector, got shape \[5, 1\]"),
        (forward, dict(down_bias=np.ones(5)), r"mlp: down_bias has shape \[5\], expected outputs = 4"),
        (forward, dict(gate_weight=None), "mlp: gate_bias is given without gate_weight"),
        (forward, dict(gate_weight=None, gate_bias=None), of_gate),
        (forward, dict(gate=None), of_gate),
        (forward, dict(up=None), of_gate),
        (forward, dict(residual=np.ones((2, 5))), r"mlp: residual has shape \[2, 5\], expected the leading dimensions"),
        (forward, dict(out=np.full((3, 4), 7.0)), r"mlp: out has shape \[3, 4\], expected the leading dimensions of x"),
        (forward, dict(up=np.full((2, 4), 7.0)), r"mlp: up has shape \[2, 4\], expected the leading .* and 5"),
        (forward, dict(out=np.full((4, 2), 7.0).T), "mlp: out must have stride 1 in its last dimension, got 2"),
        (forward, dict(out=readonly), "mlp: out is read-only"),
        (forward, dict(out=big[:2, :4], residual=big[1:3, :4]), "mlp: out shares memory with residual"),
        (forward, dict(up=big[:2, :5], gate=big[1:3, :5]), "mlp: gate shares memory with up"),
        (forward, dict(up=big[:2, :5], down_weight=big[:4, :5]), "mlp: up shares memory with down_weight"),
        (forward, dict(activation="tanh"), "mlp: activation 'tanh' is not one of none, relu"),
        (backward, dict(gate=None), "mlp: gate must be given with gate_weight, and only then"),
        (
            backward,
            dict(gate=None, gate_weight=None),
            "mlp: gradients of a gate are wanted without gate_weight",
        ),
        (backward, dict(up=np.ones((2, 4))), r"mlp: up has shape \[2, 4\], expected the leading dimensions of x"),
        (backward, dict(dout=np.ones((2, 5))), r"mlp: dout has shape \[2, 5\], expected the leading dimensions of x"),
        (backward, dict(dx=np.full((3, 3), 7.0)), r"mlp: dx has shape \[3, 3\] but x has \[2, 3\]"),
        (
            backward,
            dict(dup_weight=np.full((4, 3), 7.0)),
            r"mlp: dup_weight has shape \[4, 3\] but up_weight has \[5, 3\]",
        ),
        (backward, dict(ddown_weight=big[:4, :6]), r"mlp: ddown_weight has shape \[4, 6\] but down_weight has"),
        (backward, dict(ddown_bias=np.full(5, 7.0)), r"mlp: ddown_bias has shape \[5\], expected outputs = 4"),
        (backward, dict(dx=big[:2, :3], dout=big[1:3, :4]), "mlp: dx shares memory with dout"),
        (backward, dict(dup_weight=gradients["dgate_weight"]), "mlp: dgate_weight shares memory with dup_weight"),
    ]
    for call, changed, words in cases:
        with pytest.raises(ValueError, match=words):
            call(**changed)
        written = [a for a in changed.values() if isinstance(a, np.ndarray) and a.size and a.flat[0] == 7.0]
        for array in (*made.values(), *gradients.values(), big, *written):
            assert (array == 7.0).all(), f"written although refused: {words}"
    with pytest.raises(TypeError, match="mlp: out has dtype float32 but residual has float64"):
        forward(out=np.full((2, 4), 7.0, np.float32))
    with pytest.raises(TypeError, match="mlp: dx has dtype float32 but x has float64"):
        backward(dx=np.full((2, 3), 7.0, np.float32))
    forward()
    backward()
