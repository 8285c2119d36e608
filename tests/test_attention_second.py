"""attention differentiated twice: finite differences of its gradients, the formula, NaN, memory."""

import math

import pytest
import torch
from attention_tools import HIDDEN_ROW, gradients, second, small_inputs
from tools import draw
from torch.utils._python_dispatch import TorchDispatchMode

import pykern
from pykern import _C
from pykern.ops import attention_formula
from pykern.ops.attention_dropout import kept
from pykern.testing import assert_bitwise, assert_close, ratios, reference

pytestmark = (
    pytest.mark.one_isa
)  # the second derivative is computed by torch; the first one's bits are tested elsewhere


def finite_lse(lse):
    return lse.masked_fill(lse.isneginf(), 0.0)


# ---- against finite differences of the kernel's gradients

CASES = {
    "plain": (dict(B=2), {}),
    "as many heads": (dict(H=2, G=2), {}),
    "causal, T < S": (dict(T=2, S=5), dict(causal=True)),
    "causal, T > S: rows that see nothing": (dict(T=5, S=3), dict(causal=True)),
    "mask": (dict(), dict(mask=HIDDEN_ROW)),
    "bias of every score": (dict(bias=(1, 2, 3, 4)), {}),
    "bias of a head": (dict(B=2, bias=(2, 1, 1)), {}),
    "bias of a key": (dict(B=2, bias=(2, 1, 1, 4)), dict(causal=True)),
    "bias of a row": (dict(bias=(3, 1)), dict(mask=HIDDEN_ROW)),
    "one bias": (dict(bias=(1,)), {}),
    "window": (dict(T=4, S=5), dict(window=(1, 1))),
    "window on one side": (dict(T=4, S=5), dict(window=(None, 0))),
    "softcap": (dict(), dict(softcap=0.8, scale=1.1)),
    "alibi": (dict(), dict(alibi_slopes=torch.tensor([0.3, 0.7]))),
    "alibi of a batch": (dict(B=2, H=1), dict(alibi_slopes=torch.tensor([[0.3], [0.7]]))),
    "sinks": (dict(sinks=True), {}),
    "sinks, hidden rows": (dict(sinks=True), dict(mask=HIDDEN_ROW)),
    "dropout": (dict(B=2, S=6), dict(dropout_p=0.4, seed=-7)),
    "dropout of everything": (dict(), dict(dropout_p=1.0, seed=1)),
    "ragged": (
        dict(T=5, S=6, ragged=True),
        dict(cu_seqlens_q=torch.tensor([0, 2, 2, 5]).int(), cu_seqlens_k=torch.tensor([0, 3, 4, 6]).int(), causal=True),
    ),
    "everything": (
        dict(bias=(2, 3, 4), sinks=True),
        dict(
            window=(2, 1),
            softcap=1.2,
            alibi_slopes=torch.tensor([0.3, 0.7]),
            dropout_p=0.3,
            seed=5,
            mask=torch.tensor([1, 1, 0, 1]).bool(),
        ),
    ),
    "everything ragged": (
        dict(T=5, S=6, ragged=True, sinks=True),
        dict(
            cu_seqlens_q=torch.tensor([0, 2, 2, 5]).int(),
            cu_seqlens_k=torch.tensor([0, 0, 2, 6]).int(),
            window=(1, 1),
            softcap=1.2,
            alibi_slopes=torch.tensor([[0.1, 0.2], [0.3, 0.7], [0.5, 0.4]]),
            dropout_p=0.3,
            seed=5,
        ),
    ),
}


def check_second(tensors, with_lse, **options):
    leaves = [x.requires_grad_() for x in tensors.values()]

    def f(*args):
        out, lse = pykern.attention(**dict(zip(tensors, args, strict=True)), return_lse=True, **options)
        return (out, finite_lse(lse)) if with_lse else out

    assert torch.autograd.gradgradcheck(f, leaves, atol=1e-6, rtol=1e-5)


OUT_ALONE = ("plain", "mask", "everything", "everything ragged")  # no gradient reaches lse: dlse is None


@pytest.mark.parametrize("name, with_lse", [*((name, True) for name in CASES), *((name, False) for name in OUT_ALONE)])
def test_gradgradcheck(name, with_lse):
    shape, options = CASES[name]
    check_second(small_inputs(**shape), with_lse, **options)


@pytest.fixture
def blocks_of_two(monkeypatch):
    """Blocks of two rows; returns the rows of each that was made."""
    monkeypatch.setattr(attention_formula, "BLOCK_SCORES", 1)
    monkeypatch.setattr(attention_formula, "MIN_ROWS", 2)
    made, key_range = [], attention_formula._key_range

    def spy(rows, *args):
        made.append(rows.tolist())
        return key_range(rows, *args)

    monkeypatch.setattr(attention_formula, "_key_range", spy)
    return made


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_rows_add_up(name, blocks_of_two, monkeypatch):
    shape, options = CASES[name]
    tensors = small_inputs(**shape)
    out, lse = pykern.attention(**tensors, return_lse=True, **options)
    dout, dlse = draw(*out.shape, seed=8), draw(*lse.shape, seed=9)
    pieces = second(pykern.attention, tensors, dout, dlse, **options)
    assert blocks_of_two and max(len(rows) for rows in blocks_of_two) == 2
    assert sorted(row for rows in blocks_of_two for row in rows) == list(range(shape.get("T", 3)))
    monkeypatch.setattr(attention_formula, "MIN_ROWS", 100)
    whole = second(pykern.attention, tensors, dout, dlse, **options)
    terms = max(x.abs().max().item() for x in whole.values())  # a bias of all keys of a row sums them up to 0
    for tensor, x in whole.items():
        assert_close(pieces[tensor], x, name=tensor, gradient=True, scale=terms)


@pytest.mark.parametrize("T, S, H, G", [(0, 4, 2, 1), (3, 0, 2, 1), (3, 4, 0, 0), (3, 4, 0, 2)])
def test_nothing_to_do(T, S, H, G):
    tensors = small_inputs(T, S, H=H, G=G, sinks=True)
    found = second(pykern.attention, tensors, draw(1, H, T, 3), draw(1, H, T))
    for name, x in tensors.items():
        assert found[f"dd{name}"].shape == x.shape and (found[f"dd{name}"] == 0).all()


# ---- against the formula

FORMULA = {
    "plain": ({}, {}),
    "causal": (dict(bias=(12, 24, 60)), dict(causal=True)),
    "window, softcap, sinks": (dict(bias=(12, 1, 60), sinks=True), dict(window=(15, 3), softcap=1.5)),
    "alibi, mask": ({}, dict(alibi_slopes=2.0 ** -torch.arange(12.0), mask=torch.arange(24)[:, None] % 7 > 0)),
}


@pytest.mark.parametrize("dtype", ratios.DTYPES)
@pytest.mark.parametrize("name", FORMULA)
def test_ratio_rule(name, dtype):
    """Each second gradient is at most 3 times as far from float64 as torch's double backward of the formula."""
    shape, options = FORMULA[name]
    tensors = small_inputs(24, 60, D=16, E=24, B=2, H=12, G=4, **shape) | dict(dout=draw(2, 12, 24, 24, seed=8))

    def of(attention):
        return lambda dout, **leaves: gradients(attention, leaves, dout, **options)

    formula = of(reference.in_own_dtype(reference.attention))
    case = ratios.Case("attention second", lambda g: tensors, of(pykern.attention), formula)
    rows = [row for row in ratios.measure(case, dtype) if row.gradient]
    print(ratios.table(rows))
    assert {row.tensor for row in rows} == {f"d{tensor}" for tensor in tensors}
    assert all(row.passes for row in rows), ratios.table(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_penalty(dtype):
    """A loss with the squared norm of a gradient in it, as critics and force fields are trained."""

    def loss(attention, q, k, v):
        out = attention(q, k, v, causal=True)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return out.sum() + (dq.square().sum((1, 2, 3)).sqrt() - 1).square().mean()

    found = {}
    for attention, kind in ((pykern.attention, dtype), (reference.attention, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in small_inputs(30, 50, D=8, B=2, H=4, G=2, dtype=dtype).values()]
        loss(attention, *leaves).backward()
        found[attention] = [x.grad for x in leaves]
    for name, ours, exact in zip("qkv", *found.values(), strict=True):
        assert_close(ours, exact, name=f"d{name}", gradient=True)


def test_the_dropout_is_that_of_the_kernel():
    keep = torch.empty(2, 3, 5, 200, dtype=torch.bool)
    b = torch.arange(2)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789012345):
        for p in (0.1, 0.5, 0.999, 1.0):
            _C.attention_dropout(torch.tensor([seed]), keep, dropout_p=p)
            for t, keys in (([0, 1, 2, 3, 4], slice(0, 200)), ([3, 1], slice(67, 190)), ([4], slice(70, 70))):
                rows = torch.tensor(t)
                assert torch.equal(kept(torch.tensor([seed]), p, b, 3, rows, keys), keep[:, :, rows, keys])
    assert not keep.any() and kept(torch.tensor([1]), 1e-12, b, 3, torch.arange(5), slice(0, 200)).all()


# ---- what is masked

POISONS = (math.nan, math.inf, -math.inf)


def within(T, S, width):
    return (torch.arange(S) - torch.arange(T)[:, None] - (S - T)).abs() <= width


@pytest.mark.parametrize("poison", POISONS)
def test_what_nobody_sees_has_no_effect(poison):
    """Keys, values, bias, rows of q and dout, and the weights of their gradients: the second gradients of what is seen
    stay what they were, those of the rest are 0."""
    T, S = 6, 9
    mask = torch.rand(4, T, S, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., [0, 7]] = False
    mask[:, 2] = False
    tensors = small_inputs(T, S, D=3, B=2, H=4, G=2, bias=(4, T, S), sinks=True)
    tensors["sinks"][:] = -math.inf  # a sink that takes nothing, so that there are rows without any weight
    dout, dlse = draw(2, 4, T, 3, seed=8), draw(2, 4, T, seed=9)
    options = dict(mask=mask, softcap=1.5, window=(6, 6))
    seen = mask & within(T, S, 6)

    def spoil(tensors):
        tensors["k"][:, :, [0, 7]], tensors["v"][:, :, [0, 7]], tensors["q"][:, :, 2] = poison, poison, poison
        tensors["bias"][~seen] = poison

    clean = second(pykern.attention, tensors, dout, dlse, **options)
    bad = {name: x.clone() for name, x in tensors.items()}
    spoil(bad)
    bad_dout, bad_dlse = dout.clone(), dlse.clone()
    bad_dout[:, :, 2], bad_dlse[:, :, 2] = poison, poison
    found = second(pykern.attention, bad, bad_dout, bad_dlse, spoil, **options)
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name
    assert (found["ddk"][:, :, [0, 7]] == 0).all() and (found["ddv"][:, :, [0, 7]] == 0).all()
    assert (found["ddq"][:, :, 2] == 0).all() and (found["dddout"][:, :, 2] == 0).all()
    assert (found["dddlse"][:, :, 2] == 0).all() and (found["ddbias"][~seen] == 0).all()


@pytest.mark.parametrize(
    "tensor, of_weights",
    [(name, of_weights) for name in ("q", "k", "v") for of_weights in (False, True)] + [("dout", False)],
)
def test_a_nan_reaches_only_what_sees_it(tensor, of_weights):
    """Key 4, or row 2, is NaN: its rows, and the keys that these see, may become NaN; the others are what they were."""
    T, S = 6, 9
    mask = torch.rand(T, S, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[:, 4] = False
    mask[[2, 3], 4] = True
    mask[2:4, 6:] = False
    rows = torch.arange(T) == 2 if tensor in ("q", "dout") else mask[:, 4]
    keys = mask[rows].any(0)
    others = mask[~rows].any(0) & ~keys
    assert others.any() and not rows.all()
    given = small_inputs(T, S, D=3, B=2, H=4, G=2) | dict(dout=draw(2, 4, T, 3, seed=8), dlse=draw(2, 4, T, seed=9))
    clean = second(pykern.attention, **split(given), mask=mask)

    def spoil(tensors):
        tensors[tensor] = tensors[tensor].clone()
        tensors[tensor][:, :, 2 if tensor in ("q", "dout") else 4] = math.nan

    if not of_weights:
        spoil(given)
    found = second(pykern.attention, **split(given), poison=spoil if of_weights else None, mask=mask)
    assert any(x.isnan().any() for x in found.values())
    for name, where in (("ddq", rows), ("dddout", rows), ("dddlse", rows), ("ddk", keys), ("ddv", keys)):
        assert torch.equal(found[name][:, :, ~where], clean[name][:, :, ~where]), name
    if tensor == "k" and not of_weights:
        assert found["ddq"][:, :, rows].isnan().all() and found["ddk"][:, :, keys].isnan().all()


def split(given):
    return dict(
        tensors={name: given[name] for name in given if name not in ("dout", "dlse")},
        dout=given["dout"],
        dlse=given["dlse"],
    )


def test_a_bias_of_minus_infinity_is_a_mask():
    tensors, dout = small_inputs(bias=(3, 4)), draw(1, 2, 3, 3, seed=8)
    mask = HIDDEN_ROW & torch.tensor([1, 0, 1, 1]).bool()  # key 1 is hidden from all: it may be NaN
    masked = second(pykern.attention, tensors, dout, mask=mask)
    tensors["bias"] = tensors["bias"].masked_fill(~mask, -math.inf)
    tensors["k"][:, :, 1] = tensors["v"][:, :, 1] = math.nan
    for name, x in second(pykern.attention, tensors, dout).items():
        assert torch.equal(x, masked[name]), name


# ---- cost


class Largest(TorchDispatchMode):
    """The most elements of any tensor that a torch operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return results


@pytest.mark.parametrize("options", [{}, dict(dropout_p=0.1, seed=1), dict(window=(30, 0), softcap=2.0)], ids=str)
def test_no_array_of_all_scores(monkeypatch, options):
    """With 512 x 512 scores a head, nothing is larger than a block of 2^15 of them; q, k, v have 2^13 elements."""
    monkeypatch.setattr(attention_formula, "BLOCK_SCORES", 1 << 15)
    q, k, v, dout, cq, ck, cv = (draw(1, 2, 512, 8, dtype=torch.float32, seed=i) for i in range(7))
    arguments = [None] * 6 + [torch.tensor([options["seed"]]) if "seed" in options else None]
    left, right = options.get("window", (-1, -1))
    arguments += [left, right, 0.3, options.get("softcap", 0.0), options.get("dropout_p", 0.0)]
    with Largest() as largest:
        pykern.ops.attention_second._second(q, k, v, dout, None, cq, ck, cv, None, None, *arguments)
    assert 1 << 13 <= largest.elements <= 1 << 15


def test_an_ordinary_backward_makes_no_graph_and_the_same_bits():
    tensors = {name: x.requires_grad_() for name, x in small_inputs(20, 90, D=8, bias=(20, 90), sinks=True).items()}
    dout, dlse = draw(1, 2, 20, 3, seed=8), draw(1, 2, 20, seed=9)
    plain = gradients(pykern.attention, tensors, dout, dlse, create_graph=False, causal=True)
    twice = gradients(pykern.attention, tensors, dout, dlse, create_graph=True, causal=True)
    for name, x in plain.items():
        assert x.grad_fn is None and twice[name].grad_fn is not None
        assert_bitwise(x, twice[name], name=name)
