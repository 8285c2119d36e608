"""linear_cross_entropy: formula, gradients, rows at a time, ignored rows, memory, bits, torch."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tools import DTYPES, VIEWS, constant, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close, ratios, reference

CLASSES = 1024  # of a block
OPTIONS = {
    "plain": {},
    "label smoothing": dict(label_smoothing=0.1),
    "z loss": dict(z_loss=1e-2),
    "all": dict(label_smoothing=0.2, z_loss=1e-3, ignore_index=3),
}


def inputs(M, V, K, bias=True, dtype=torch.float64, seed=0, rows=None):
    """x, weight, bias and target. Every third row has label 3, which the options "all" ignore."""
    rows = (M,) if rows is None else rows
    tensors = dict(x=draw(*rows, K, dtype=dtype, seed=seed), weight=draw(V, K, dtype=dtype, seed=seed + 1, spread=0.5))
    if bias:
        tensors["bias"] = draw(V, dtype=dtype, seed=seed + 2)
    target = torch.randint(max(V, 1), rows, generator=torch.Generator().manual_seed(seed))
    target.view(-1)[::3] = min(3, V - 1)
    return tensors, target


def named(head, target, **options):
    return lambda **tensors: dict(loss=head(target=target, **tensors, **options))


def apply(tensors, target, dloss=None, **options):
    dloss = torch.ones(()) if dloss is None else dloss
    return with_gradients(named(pykern.linear_cross_entropy, target, **options), tensors, dict(loss=dloss))


def compare(tensors, target, name="", reduction="mean", **options):
    options |= dict(reduction=reduction)
    dloss = draw(*target.shape, seed=9) if reduction == "none" else torch.tensor(0.7)
    ours = apply(tensors, target, dloss, **options)
    exact = {name: x.double() for name, x in tensors.items()}
    exact = with_gradients(named(reference.linear_cross_entropy, target, **options), exact, dict(loss=dloss))
    dtype = tensors["x"].dtype
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    # The terms of a loss are as large as the logits, those of a gradient as a row's weight times a number of x or
    # weight; both may cancel, with one class to an exact 0.
    logits = reference.linear(tensors["x"], tensors["weight"], tensors.get("bias"))
    largest = lambda x: x.detach().double().abs().max().item() if x.numel() else 0.0  # noqa: E731
    row = largest(dloss) / (max(target.numel(), 1) if reduction == "mean" else 1)
    terms = dict(
        loss=largest(logits), dx=row * largest(tensors["weight"]), dweight=row * largest(tensors["x"]), dbias=row
    )
    for tensor, x in ours.items():
        assert x.dtype == (stat if tensor == "loss" else dtype)
        scale = max(terms[tensor], largest(exact[tensor]))
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=tensor != "loss", scale=scale)


# Rows, classes and inputs: what is one more than a block of classes, or than a run of the sums over inputs.
CASES = {
    "one class": (1, 1, 1),
    "a few": (7, 5, 3),
    "no input": (7, 5, 0),
    "one class short of a block": (5, CLASSES - 1, 9),
    "a whole block": (5, CLASSES, 9),
    "one class more": (5, CLASSES + 1, 9),
    "three blocks": (37, 2 * CLASSES + 77, 20),
    "long rows": (3, 33, 2 * constant("cpu/tile.h", "kChunk")[0] + 1),
    "many rows": (300, 40, 8),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_named_case(name, dtype):
    tensors, target = inputs(*CASES[name], dtype=dtype)
    for options in OPTIONS:
        compare(tensors, target, name=f"{name}, {options}", **OPTIONS[options])
    compare({n: tensors[n] for n in ("x", "weight")}, target, name=f"{name}, no bias", reduction="none")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_leading_dimensions(reduction):
    for rows in ((), (3,), (2, 3), (2, 1, 2)):
        compare(*inputs(None, 11, 5, rows=rows), name=f"{rows}", reduction=reduction)
    tensors, target = inputs(None, 11, 5, rows=(2, 0))
    results = apply(tensors, target, target.double() if reduction == "none" else None, reduction=reduction)
    assert results["dx"].shape == (2, 0, 5) and (results["dweight"] == 0).all()
    assert results["loss"].isnan() if reduction == "mean" else results["loss"].sum() == 0  # as torch: 0 / 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options, reduction):
    tensors, target = inputs(5, 6, 3)

    def f(x, weight, bias):
        return pykern.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, **OPTIONS[options])

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()), atol=1e-7, rtol=1e-6)


def test_gradcheck_of_two_blocks():
    """x, and the weights of the last class of a block and of the first of the next; all of them would take long."""
    tensors, target = inputs(2, CLASSES + 2, 2, bias=False)
    target[0] = CLASSES + 1
    x, edge = tensors["x"].requires_grad_(), tensors["weight"][CLASSES - 1 : CLASSES + 1].clone().requires_grad_()

    def f(x, edge):
        weight = torch.cat([tensors["weight"][: CLASSES - 1], edge, tensors["weight"][CLASSES + 1 :]])
        return pykern.linear_cross_entropy(x, weight, target)

    assert torch.autograd.gradcheck(f, (x, edge), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("linear_cross_entropy", dtype)


def test_is_cross_entropy_of_linear():
    """Bits of the loss: in float32 the same products and the same sums as the two ops in a row."""
    tensors, target = inputs(40, 2 * CLASSES + 5, 33, dtype=torch.float32)
    for options in OPTIONS.values():
        two = pykern.cross_entropy(pykern.linear(**tensors), target, reduction="none", **options)
        one = pykern.linear_cross_entropy(**tensors, target=target, reduction="none", **options)
        assert_bitwise(one, two)


@given(
    M=st.integers(0, 40),
    V=st.integers(1, 80),
    K=st.integers(0, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from([*OPTIONS]),
    views=st.tuples(*[st.sampled_from([*VIEWS])] * 2),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(M, V, K, bias, dtype, options, views, seed):
    packed, target = inputs(M, V, K, bias, dtype=dtype, seed=seed)
    options = dict(OPTIONS[options], reduction="sum")
    compare(packed, target, **options)
    strided = {n: VIEWS[v](packed[n]) for n, v in zip(("x", "weight"), views, strict=True)}
    if bias:
        strided["bias"] = torch.stack([packed["bias"]] * 2, 1)[:, 0]
    again = apply(strided, torch.stack([target] * 2, 1)[:, 0], **options)
    for name, x in apply(packed, target, **options).items():
        assert_bitwise(x, again[name], name=f"{name} of {views}")


# ---- ignored rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_ignored_rows_are_not_read(bad, dtype):
    """Whatever is in them: the gradients of weight and bias are those of the other rows alone, their own is 0."""
    tensors, target = inputs(30, CLASSES + 9, 7, dtype=dtype)
    kept = torch.arange(30) % 3 != 1
    alone = apply(tensors | dict(x=tensors["x"][kept]), target[kept])
    tensors["x"][~kept], target[~kept] = bad, -100
    results = apply(tensors, target)
    assert_bitwise(results["loss"], alone["loss"], name="loss")
    assert_bitwise(results["dx"][kept], alone["dx"], name="dx")
    assert (results["dx"][~kept] == 0).all()
    exact = {name: x.double() for name, x in (tensors | dict(x=tensors["x"][kept])).items()}
    exact = with_gradients(named(reference.linear_cross_entropy, target[kept]), exact, dict(loss=torch.ones(())))
    for name in ("dweight", "dbias"):
        assert_close(results[name], exact[name], name=name, gradient=True)


def test_nothing_but_ignored_rows():
    tensors, target = inputs(5, 6, 3)
    results = apply(tensors, torch.full_like(target, -100), reduction="sum")
    assert results["loss"] == 0 and all((results[f"d{name}"] == 0).all() for name in tensors)
    tensors["weight"][0] = math.nan  # which every row that counts would see
    assert (apply(tensors, torch.full_like(target, -100), reduction="sum")["dx"] == 0).all()
    results = apply(dict(x=draw(5, 3), weight=draw(0, 3)), torch.full_like(target, -100), reduction="sum")
    assert results["loss"] == 0 and (results["dx"] == 0).all() and results["dweight"].shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(dtype):
    tensors, target = inputs(20, CLASSES + 9, 7, dtype=dtype)
    dloss = draw(20, seed=9)
    clean = apply(tensors, target, dloss, reduction="none")
    tensors["x"][13, 2] = math.nan
    bad = apply(tensors, target, dloss, reduction="none")
    row = torch.arange(20) == 13
    for name in ("loss", "dx"):
        assert bad[name][row].isnan().all()
        assert_bitwise(bad[name][~row], clean[name][~row], name=name)
    assert bad["dweight"].isnan().all() and bad["dbias"].isnan().all()


# ---- memory and bits

PEAK = """
import numpy as np
from pykern import _C

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

def run(V, M=2048, K=2):
    x, weight, target = np.ones((M, K), np.float32), np.ones((V, K), np.float32), np.zeros(M, np.int64)
    loss, dx, dweight = np.ones(M, np.float32), np.empty_like(x), np.empty_like(weight)
    options = dict(ignore_index=-100, label_smoothing=0.0, z_loss=0.0)
    _C.linear_cross_entropy(x, weight, None, target, loss, None, None, None, None, **options)
    _C.linear_cross_entropy(x, weight, None, target, None, loss, dx, dweight, None, **options)

run(1024)
before = peak()
run(65536)
print(peak() - before)
"""


@pytest.mark.one_isa
def test_the_logits_are_never_in_memory_as_a_whole():
    """2048 rows of 65536 logits are 512 MiB, those that exist at a time 40 MiB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status to read the peak of memory from")
    run = subprocess.run([sys.executable, "-c", PEAK], cwd=Path(__file__).parent.parent, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 56, f"{run.stdout} MiB"


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count_and_neighbours(dtype, with_threads):
    tensors, target = inputs(150, 2 * CLASSES + 9, 21, dtype=dtype)
    dloss = draw(150, seed=9)
    first = with_threads(1, lambda: apply(tensors, target, dloss, reduction="none"))
    for n in (2, 3):
        again = with_threads(n, lambda: apply(tensors, target, dloss, reduction="none"))
        for name, x in first.items():
            assert_bitwise(x, again[name], name=f"{n} threads, {name}")
    rows = slice(77, 90)
    alone = apply(tensors | dict(x=tensors["x"][rows].clone()), target[rows], dloss[rows], reduction="none")
    for name in ("loss", "dx"):
        assert_bitwise(alone[name], first[name][rows], name=f"{name} of a few rows alone")


# ---- torch's machinery


@pytest.mark.one_isa
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction):
    tensors, target = inputs(None, 11, 5, rows=(2, 3), dtype=torch.float32)
    op = torch.ops.pykern.linear_cross_entropy.default
    options = (target, 3, 0.1, 0.01, reduction)
    for wanted in ([False] * 3, [True, True, False]):
        torch.library.opcheck(op, (tensors["x"], tensors["weight"], None, *options, wanted))
    torch.library.opcheck(op, (*tensors.values(), *options, [True] * 3))
    torch.library.opcheck(op, (*(x.requires_grad_() for x in tensors.values()), *options, [False] * 3))


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    tensors, target = inputs(6, 11, 5, dtype=torch.float32)
    eager = apply(tensors, target)
    compiled = torch.compile(pykern.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for name, x in with_gradients(named(compiled, target), tensors, dict(loss=torch.ones(()))).items():
        assert_bitwise(x, eager[name], name=name)


@pytest.mark.one_isa
def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    tensors, target = inputs(6, 11, 5, dtype=torch.float32)

    def again(x, weight, bias, target):
        f = lambda *args: pykern.linear_cross_entropy(*args, target, bias=bias)  # noqa: E731
        return checkpoint(f, x, weight, use_reentrant=False)

    plain = apply(tensors, target)
    for name, x in with_gradients(named(again, target), tensors, dict(loss=torch.ones(()))).items():
        assert_bitwise(x, plain[name], name=name)


@pytest.mark.one_isa
def test_autocast():
    """x is cast; the kernel rounds the weight, and makes float32 gradients of it."""
    tensors, target = inputs(6, 11, 5, dtype=torch.float32)
    mixed = apply(dict(tensors, x=tensors["x"].bfloat16()), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = apply(tensors, target)
    for name, x in cast.items():
        assert x.dtype == torch.float32
        assert_bitwise(x, mixed[name].float(), name=name)


@pytest.mark.one_isa
def test_means_the_same_as_torch():
    tensors, target = inputs(12, 20, 6)
    target[4] = -100
    for options in (dict(), dict(label_smoothing=0.1), dict(reduction="sum"), dict(reduction="none")):
        ours = pykern.linear_cross_entropy(**tensors, target=target, **options)
        assert_close(
            ours,
            F.cross_entropy(
                F.linear(**{"input": tensors["x"], **{n: tensors[n] for n in ("weight", "bias")}}), target, **options
            ),
            name=f"{options}",
        )


@pytest.mark.one_isa
def test_a_second_derivative_is_refused():
    tensors, target = inputs(3, 4, 2, bias=False)
    x = tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(pykern.linear_cross_entropy(x, tensors["weight"], target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::linear_cross_entropy has no second derivative"):
        dx.sum().backward()
