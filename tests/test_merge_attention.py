"""merge_attention: attention over splits of the keys, merged, is attention over all of them, gradients too."""

import itertools
import math

import pytest
import torch
from tools import draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close, ratios, reference

pytestmark = pytest.mark.one_isa  # torch merges; the parts come from kernels that are tested elsewhere

B, H, G, T, S, D, E = 2, 4, 2, 9, 150, 16, 20
SPLITS = {
    "one part": [150],
    "two": [70, 80],
    "one key apart": [149, 1],
    "an empty part": [70, 0, 80],
    "many": [1, 2, 3, 5, 8, 13, 21, 34, 63],
}


def inputs(dtype=torch.float64):
    return {
        name: draw(*shape, dtype=dtype, seed=i)
        for i, (name, shape) in enumerate(dict(q=(B, H, T, D), k=(B, G, S, D), v=(B, G, S, E)).items())
    }


def in_parts(attention, merge, sizes, order=None, **options):
    """attention over each part of the keys, merged in this order."""

    def f(q, k, v, mask=None, bias=None):
        outs, lses = [], []
        for first, last in itertools.pairwise([0, *itertools.accumulate(sizes)]):
            part = dict(mask=None if mask is None else mask[..., first:last])
            part |= {} if bias is None else dict(bias=bias[..., first:last])
            out, lse = attention(q, k[:, :, first:last], v[:, :, first:last], return_lse=True, **part, **options)
            outs.append(out)
            lses.append(lse)
        order_ = range(len(outs)) if order is None else order
        return dict(zip(("out", "lse"), merge([outs[i] for i in order_], [lses[i] for i in order_]), strict=True))

    return f


def whole(attention, **options):
    return lambda **x: dict(zip(("out", "lse"), attention(**x, return_lse=True, **options), strict=True))


def finite(results):
    return results | dict(lse=results["lse"].masked_fill(results["lse"].isneginf(), 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPLITS)
def test_parts_make_the_whole(name, dtype):
    mask = torch.rand(T, S, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[2], mask[4, :80] = False, False  # a row that sees nothing, one that sees nothing of some parts
    tensors = inputs(dtype) | dict(bias=draw(H, T, S, dtype=dtype, seed=5))
    douts = dict(out=draw(B, H, T, E, dtype=dtype, seed=8), lse=draw(B, H, T, seed=9))
    ours = in_parts(pykern.attention, pykern.merge_attention, SPLITS[name])
    found = with_gradients(lambda **x: finite(ours(**x, mask=mask)), tensors, douts)
    exact = {n: x.double() for n, x in tensors.items()}
    exact = with_gradients(lambda **x: finite(whole(reference.attention)(**x, mask=mask)), exact, douts)
    assert (found["out"][:, :, 2] == 0).all() and (found["dq"][:, :, 2] == 0).all()
    terms = max(exact[f"d{n}"].abs().max().item() for n in "qkv")  # dS = P (dP - delta) cancels
    for tensor, x in found.items():
        gradient = tensor[0] == "d"
        assert x.dtype == (torch.float64 if tensor == "lse" and dtype == torch.float64 else dtype)
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=gradient, scale=terms if gradient else None)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    """Beside the formula over all keys in the same dtype, not merged."""
    ours = in_parts(pykern.attention, pykern.merge_attention, [40, 60, 50])
    formula = whole(reference.in_own_dtype(reference.attention))
    case = ratios.Case(
        "merge_attention",
        lambda g: {n: torch.randn(x.shape, generator=g, dtype=x.dtype) for n, x in inputs().items()},
        ours,
        formula,
    )
    rows = ratios.measure(case, dtype)
    print(ratios.table(rows))
    assert {row.tensor for row in rows} == {"out", "lse", "dq", "dk", "dv"}
    assert all(row.passes for row in rows), ratios.table(rows)


def test_order_does_not_matter():
    tensors = inputs()
    first = in_parts(pykern.attention, pykern.merge_attention, [40, 60, 50])(**tensors)
    for order in itertools.permutations(range(3)):
        again = in_parts(pykern.attention, pykern.merge_attention, [40, 60, 50], order)(**tensors)
        for name, x in first.items():
            assert_close(again[name], x, name=f"{name} {order}")


def test_merging_in_steps():
    """Of the results of a merge: as decoding with a shared prefix does."""
    q, k, v = inputs().values()
    parts = [pykern.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in map(slice, (0, 40, 90), (40, 90, S))]
    left = pykern.merge_attention(*zip(*parts[:2], strict=True))
    out, lse = pykern.merge_attention([left[0], parts[2][0]], [left[1], parts[2][1]])
    exact = reference.attention(q, k, v, return_lse=True)
    assert_close(out, exact[0], name="out")
    assert_close(lse, exact[1], name="lse")


def test_ragged_parts():
    """outs [total, H, E], lses [H, total]."""
    q, k, v = draw(7, H, D), draw(30, G, D, seed=1), draw(30, G, E, seed=2)
    cu_q, cu_k = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 20, 30]).int()
    whole_ = pykern.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    halves = [
        torch.cat([torch.arange(0, 8), torch.arange(20, 25)]),
        torch.cat([torch.arange(8, 20), torch.arange(25, 30)]),
    ]
    parts = [
        pykern.attention(q, k[i], v[i], cu_seqlens_q=cu_q, cu_seqlens_k=torch.tensor(cu).int(), return_lse=True)
        for i, cu in zip(halves, ([0, 8, 13], [0, 12, 17]), strict=True)
    ]
    for name, x, exact in zip(("out", "lse"), pykern.merge_attention(*zip(*parts, strict=True)), whole_, strict=True):
        assert_close(x, exact, name=name)


def test_a_sink_counts_once():
    tensors, sinks = inputs(), draw(H, seed=6)
    q, k, v = tensors.values()
    parts = [
        pykern.attention(q, k[:, :, :70], v[:, :, :70], sinks=sinks, return_lse=True),
        pykern.attention(q, k[:, :, 70:], v[:, :, 70:], return_lse=True),
    ]
    out, lse = pykern.merge_attention(*zip(*parts, strict=True))
    exact = reference.attention(**tensors, sinks=sinks, return_lse=True)
    assert_close(out, exact[0], name="out")
    assert_close(lse, exact[1], name="lse")


# ---- the merge alone


def parts(n=3, dtype=torch.float64):
    return [draw(1, 2, 4, 3, dtype=dtype, seed=i) for i in range(n)], [draw(1, 2, 4, seed=9 + i) for i in range(n)]


def test_gradcheck_twice():
    """In outs and lses, with a row that one part does not see and one that none sees."""
    outs, lses = parts()
    hidden = torch.zeros(3, 1, 2, 4).bool()
    hidden[1, :, :, 0], hidden[:, :, :, 2] = True, True
    leaves = [x.requires_grad_() for x in (*outs, *lses)]

    def f(*x):
        out, lse = pykern.merge_attention(
            x[:3], [y.masked_fill(h, -math.inf) for y, h in zip(x[3:], hidden, strict=True)]
        )
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    unseen = [x.detach().masked_fill(h, -math.inf).requires_grad_() for x, h in zip(lses, hidden, strict=True)]
    dlse = torch.ones(1, 2, 4, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(pykern.merge_attention(outs, unseen)[1], unseen, dlse, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), [*unseen, dlse])
    assert all((g[:, :, 2] == 0).all() and g.isfinite().all() for g in second)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_part_that_saw_nothing_has_no_effect(poison):
    outs, lses = parts()
    lses[1][:, :, 0], outs[1][:, :, 0] = -math.inf, poison
    for lse, out in zip(lses, outs, strict=True):
        lse[:, :, 2], out[:, :, 2] = -math.inf, poison
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = pykern.merge_attention(outs, lses)
    some = pykern.merge_attention([outs[0], outs[2]], [lses[0], lses[2]])
    assert_bitwise(out[:, :, 0], some[0][:, :, 0])
    assert_bitwise(lse[:, :, 0], some[1][:, :, 0])
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    dout[:, :, 2], dlse[:, :, 2] = poison, poison  # of a row that is 0 whatever its parts are
    gradients = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    assert all(g.isfinite().all() for g in gradients)
    for i, g in enumerate(gradients):
        assert (g[:, :, 2] == 0).all() and (i % 3 != 1 or (g[:, :, 0] == 0).all())


def test_a_nan_that_counts_is_seen():
    outs, lses = parts()
    outs[1][0, 0, 0, 0], lses[2][0, 1, 3] = math.nan, math.nan
    out, lse = pykern.merge_attention(outs, lses)
    expected = torch.zeros_like(out).bool()
    expected[0, 0, 0, 0] = expected[0, 1, 3] = True
    assert torch.equal(out.isnan(), expected) and torch.equal(lse.isnan(), expected.all(-1))


def test_large_lse():
    """Far from 0, and so far apart that one part is all."""
    outs, lses = parts(2)
    for shift in (1e4, -1e4):
        out, lse = pykern.merge_attention(outs, [x + shift for x in lses])
        near = pykern.merge_attention(outs, lses)
        torch.testing.assert_close(out, near[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, near[1] + shift, rtol=1e-14, atol=0)
    out, lse = pykern.merge_attention(outs, [lses[0], lses[1] + 1e4])
    assert_bitwise(out, outs[1])
    assert_bitwise(lse, lses[1] + 1e4)


def test_one_part_is_itself():
    outs, lses = parts(1, torch.bfloat16)
    out, lse = pykern.merge_attention(tuple(outs), tuple(x.float() for x in lses))
    assert_bitwise(out, outs[0])
    assert_bitwise(lse, lses[0].float())


@pytest.mark.slow
def test_compile_fullgraph():
    outs, lses = parts(dtype=torch.float32)
    tensors = {f"x{i}": x.float() for i, x in enumerate([*outs, *lses])}

    def f(**x):
        values = list(x.values())
        return dict(zip(("out", "lse"), pykern.merge_attention(values[:3], values[3:]), strict=True))

    douts = dict(out=draw(1, 2, 4, 3), lse=draw(1, 2, 4))
    eager = with_gradients(f, tensors, douts)
    for name, x in with_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors, douts).items():
        assert_bitwise(x, eager[name], name=name)


def test_refusals():
    f, ones = pykern.merge_attention, torch.ones
    out, lse = ones(2, 4, 5, 3), ones(2, 4, 5)
    packed = ones(5, 4, 3)
    types = [
        (lambda: f(out, [lse]), "outs must be a sequence of tensors, got Tensor"),
        (lambda: f([out], None), "lses must be a sequence of tensors, got NoneType"),
        (lambda: f([out, 1.0], [lse, lse]), r"outs\[1\] must be a torch.Tensor, got float"),
        (lambda: f([out], [None]), r"lses\[0\] must be a torch.Tensor, got NoneType"),
        (lambda: f([out.int()], [lse]), r"outs\[0\] has dtype int32, expected float32, float64, bfloat16, float16"),
        (lambda: f([out, out.half()], [lse, lse]), r"outs\[1\] has dtype float16 but outs\[0\] has float32"),
        (lambda: f([out], [lse.half()]), r"lses\[0\] has dtype float16, expected float32, float64"),
        (lambda: f([out, out], [lse, lse.double()]), r"lses\[1\] has dtype float64 but lses\[0\] has float32"),
    ]
    values = [
        (lambda: f([], []), "outs has 0 parts and lses 0, expected as many, at least one"),
        (lambda: f([out, out], [lse]), "outs has 2 parts and lses 1, expected as many, at least one"),
        (lambda: f([lse[0]], [lse]), r"outs\[0\] has shape \[4, 5\], expected \[B, H, T, E\] or \[total, H, E\]"),
        (lambda: f([out, out[:1]], [lse, lse]), r"outs\[1\] has shape \[1, 4, 5, 3\] but outs\[0\] has \[2, 4, 5, 3\]"),
        (lambda: f([out], [lse[:1]]), r"lses\[0\] has shape \[1, 4, 5\], expected \[2, 4, 5\] for outs of shape"),
        (lambda: f([packed], [ones(5, 4)]), r"lses\[0\] has shape \[5, 4\], expected \[4, 5\] for outs of shape"),
        (lambda: f([out, out.to("meta")], [lse, lse]), r"outs\[1\] is on meta but outs\[0\] on cpu"),
        (lambda: f([out], [lse.to("meta")]), r"lses\[0\] is on meta but outs\[0\] on cpu"),
    ]
    for error, cases in ((TypeError, types), (ValueError, values)):
        for call, words in cases:
            with pytest.raises(error, match="^merge_attention: " + words):
                call()
