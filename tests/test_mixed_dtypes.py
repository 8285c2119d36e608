"""linear, mlp and linear_cross_entropy with x in half precision beside float32 weights, biases and residual.

The kernels round a weight to x's dtype while they pack it, add biases and residual unrounded, and write the gradients
of float32 parameters in float32: a step of training under autocast has no casts.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tools import TILE_ROWS, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close, ratios, reference

HALVES = (torch.bfloat16, torch.float16)


# ---- the ops: shapes of their tensors, ours, the formula, and torch's own functions


def torch_mlp(x, up_weight, down_weight, up_bias=None, down_bias=None, gate_weight=None, gate_bias=None, residual=None):
    up = F.linear(x, up_weight, up_bias)
    gated = gate_weight is not None
    h = F.silu(F.linear(x, gate_weight, gate_bias)) * up if gated else F.silu(up)
    out = F.linear(h, down_weight, down_bias)
    return out if residual is None else out + residual


def torch_linear(x, weight, bias=None, residual=None):
    out = F.silu(F.linear(x, weight, bias))
    return out if residual is None else out + residual


def torch_head(x, weight, target, bias=None):
    return F.cross_entropy(F.linear(x, weight, bias), target)


def with_silu(function):
    return lambda **tensors: function(**tensors, activation="silu")


PLAIN = dict(x=("M", "K"), up_weight=("H", "K"), down_weight=("N", "H"), up_bias=("H",), down_bias=("N",))
GATE = dict(gate_weight=("H", "K"), gate_bias=("H",))
RESIDUAL = dict(residual=("M", "N"))
LINEAR = dict(x=("M", "K"), weight=("N", "K"), bias=("N",))
OPS = {
    "linear": (LINEAR | RESIDUAL, with_silu(pykern.linear), with_silu(reference.linear), torch_linear),
    "mlp": (PLAIN | RESIDUAL, with_silu(pykern.mlp), with_silu(reference.mlp), torch_mlp),
    "gated mlp": (PLAIN | GATE | RESIDUAL, with_silu(pykern.mlp), with_silu(reference.mlp), torch_mlp),
    "linear_cross_entropy": (LINEAR, pykern.linear_cross_entropy, reference.linear_cross_entropy, torch_head),
}
WITH_RESIDUAL = [(op, residual) for op in OPS for residual in (False, True) if "residual" in OPS[op][0] or not residual]


def inputs(op, half, *, M=40, K=96, H=130, N=70, without=(), seed=0):
    """x in half precision, everything else in float32, and what reaches out from above."""
    sizes = dict(M=M, K=K, H=H, N=N)
    tensors = {}
    for i, (name, dims) in enumerate(OPS[op][0].items()):
        if not any(word in name for word in without):
            shape = [sizes[d] for d in dims]
            spread = shape[-1] ** -0.5 if name.endswith("weight") else 1.0
            tensors[name] = draw(*shape, seed=seed + i, spread=spread, dtype=half if name == "x" else torch.float32)
    if op == "linear_cross_entropy":
        tensors["target"] = torch.arange(M) * 7919 % N
        return tensors, torch.ones(())
    dout = draw(M, N, seed=seed + 9, dtype=torch.float32)
    return tensors, dout if "residual" in tensors else dout.to(half)


def apply(function, tensors, dout):
    return with_gradients(lambda **t: dict(out=function(**t)), tensors, dict(out=dout))


def rounded(tensors, half):
    """Numbers as the kernels see them, in float64: weights rounded to x's dtype."""
    return {
        name: (x.to(half) if name.endswith("weight") else x).double() if x.is_floating_point() else x
        for name, x in tensors.items()
    }


# ---- values


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op", OPS)
def test_a_float32_weight_is_rounded_first(op, half):
    """Without bias and residual all of it is the call in half precision, but for one rounding of the gradients."""
    for M in (1, 5, 40):
        tensors, dout = inputs(op, half, M=M, without=("bias", "residual"))
        _, ours, _, _ = OPS[op]
        mixed = apply(ours, tensors, dout)
        halves = {name: x.to(half) if x.is_floating_point() else x for name, x in tensors.items()}
        for name, x in apply(ours, halves, dout).items():
            assert mixed[name].dtype == (torch.float32 if name.endswith("weight") or x.dim() == 0 else half)
            assert_bitwise(mixed[name].to(x.dtype), x, name=f"{name}, M={M}")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op", OPS)
def test_each_may_be_float32_by_itself(op, half):
    """The result has residual's dtype, else x's; a gradient has the dtype of what it is the gradient of."""
    _, ours, formula, _ = OPS[op]
    tensors, dout = inputs(op, half, M=13, K=21, H=33, N=19)
    parts = ("weight", "bias", *(["residual"] if "residual" in tensors else []))
    for wide in itertools.product((False, True), repeat=len(parts)):
        dtypes = {part: torch.float32 if w else half for part, w in zip(parts, wide, strict=True)}
        given = {
            name: next((x.to(dtype) for part, dtype in dtypes.items() if name.endswith(part)), x)
            for name, x in tensors.items()
        }
        out_dtype = torch.float32 if dout.dim() == 0 else dtypes["residual"]
        reached = dout.to(out_dtype)
        exact = apply(formula, rounded(given, half), reached.double())
        for name, x in apply(ours, given, reached).items():
            assert x.dtype == (out_dtype if name == "out" else given[name[1:]].dtype), f"{name} of {dtypes}"
            assert_close(x.to(half), exact[name], name=f"{name} of {dtypes}", gradient=name != "out")


@pytest.mark.parametrize("half", HALVES)
def test_bias_and_residual_are_added_unrounded(half):
    fine = 1 + torch.arange(70) * 2.0**-20
    x, weight, residual = torch.zeros(5, 8, dtype=half), draw(70, 8, dtype=torch.float32), 3 * fine.expand(5, 70)
    assert_bitwise(pykern.linear(x, weight, fine, residual=residual), fine + residual)
    up, down = draw(6, 8, dtype=torch.float32), draw(70, 6, dtype=torch.float32)
    assert_bitwise(pykern.mlp(x, up, down, None, fine, residual=residual, activation="relu"), fine + residual)
    target = torch.zeros(5, dtype=torch.int64)
    loss = pykern.linear_cross_entropy(x, weight, target, bias=fine, reduction="none")
    exact = torch.full((5,), (fine.double().logsumexp(0) - 1).item(), dtype=torch.float64)
    assert_close(loss, exact, name="loss")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op, residual", WITH_RESIDUAL)
def test_errors_beside_torch_under_autocast(op, residual, half):
    """The ratio rule; float32 gradients of weights are at least as accurate as torch's, which were rounded to half."""
    _, ours, formula, torchs = OPS[op]

    def under_autocast(**tensors):
        with torch.autocast("cpu", dtype=half):
            return torchs(**tensors)

    worst: dict[str, list[float]] = {}
    dtypes = {}
    for seed in range(ratios.SEEDS):
        tensors, dout = inputs(op, half, M=150, without=() if residual else ("residual",), seed=10 * seed)
        exact = apply(formula, rounded(tensors, half), dout.double())
        pair = [apply(function, tensors, dout) for function in (ours, under_autocast)]
        for name, reference_ in exact.items():
            errors = [((x[name].double() - reference_).abs().max() / reference_.abs().max()).item() for x in pair]
            worst[name] = [max(e) for e in zip(errors, worst.get(name, errors), strict=True)]
            dtypes[name] = pair[0][name].dtype
    rows = [
        ratios.Row(op, half, name, name != "out", *errors, None, torch.finfo(dtypes[name]).eps / 2)
        for name, errors in worst.items()
    ]
    print(ratios.table(rows))
    failed = [row for row in rows if not row.passes]
    assert not failed, ratios.table(failed)
    assert dtypes["out"] == (torch.float32 if residual or op == "linear_cross_entropy" else half)
    for name, (pykerns, torch_) in worst.items():
        if name.endswith("weight"):
            assert dtypes[name] == torch.float32
            assert pykerns <= torch_, f"{name}: {pykerns:.2e}, torch {torch_:.2e}"


# ---- bits


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op", ["linear", "mlp", "gated mlp"])
def test_a_row_is_the_same_alone_and_among_many(op, half):
    tensors, dout = inputs(op, half, M=300, K=600, H=150)
    _, ours, _, _ = OPS[op]
    many = apply(ours, tensors, dout)
    for rows in (slice(0, 1), slice(299, 300), slice(7, 8 + TILE_ROWS), slice(100, 250)):
        part = {name: tensors[name][rows] for name in ("x", "residual")}
        few = apply(ours, tensors | part, dout[rows])
        for name in ("out", "dx"):
            assert_bitwise(few[name], many[name][rows], name=f"{name} of {rows}")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_thread_count(op, half, with_threads):
    tensors, dout = inputs(op, half, M=200)
    _, ours, _, _ = OPS[op]
    first = with_threads(1, lambda: apply(ours, tensors, dout))
    for n in (2, 3):
        for name, x in with_threads(n, lambda: apply(ours, tensors, dout)).items():
            assert_bitwise(x, first[name], name=f"{n} threads, {name}")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op", OPS)
def test_strided_float32_weights(op, half):
    tensors, dout = inputs(op, half, K=97, H=33)
    _, ours, _, _ = OPS[op]
    packed = apply(ours, tensors, dout)
    for view in (lambda t: t.T.contiguous().T, lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]]):
        strided = {name: view(x) if name.endswith(("weight", "residual")) else x for name, x in tensors.items()}
        for name, x in apply(ours, strided, dout).items():
            assert_bitwise(x, packed[name], name=name)


# ---- torch.autocast, and refusals


@pytest.mark.one_isa
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_x_alone(op, half):
    tensors, dout = inputs(op, half)
    _, ours, _, _ = OPS[op]
    explicit = apply(ours, tensors, dout)
    with torch.autocast("cpu", dtype=half):
        cast = apply(ours, tensors | dict(x=tensors["x"].float()), dout)
    for name, x in cast.items():
        assert x.dtype == torch.float32
        assert_bitwise(x, explicit[name].float(), name=name)


@pytest.mark.one_isa
@pytest.mark.parametrize("op", OPS)
def test_refused_mixtures(op):
    """Wider than float32 beside half, half beside float32, and one half beside the other."""
    tensors, _ = inputs(op, torch.bfloat16, M=2, K=3, H=4, N=5)
    _, ours, _, _ = OPS[op]
    public = op.removeprefix("gated ")
    others = [name for name, x in tensors.items() if name != "x" and x.is_floating_point()]
    for x_dtype, bad in (
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ):
        for name in others:
            given = {n: t.to(x_dtype) if t.is_floating_point() else t for n, t in tensors.items()}
            given[name] = given[name].to(bad)
            words = f"^{public}: {name} has dtype {str(bad)[6:]} but x has {str(x_dtype)[6:]}"
            with pytest.raises(TypeError, match=words):
                ours(**given)
