"""scaled_dot_product_attention: torch's documented formula, case by case. In torch's place: test_sdpa_torch.py."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from tools import VIEWS, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close

sdpa, torch_sdpa = pykern.scaled_dot_product_attention, F.scaled_dot_product_attention
room = sys.modules["pykern.ops.sdpa"]


def documented(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The code in torch's docstring, in float64; a row that sees no key is 0, as torch's own kernels have it."""
    query, key, value = query.double(), key.double(), value.double()
    L, S = query.size(-2), key.size(-2)
    scale_factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    attn_bias = torch.zeros(L, S, dtype=query.dtype)
    if is_causal:
        assert attn_mask is None
        attn_bias = attn_bias.masked_fill(torch.ones(L, S, dtype=torch.bool).tril().logical_not(), -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_bias = torch.zeros(attn_mask.shape).double().masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            attn_bias = attn_mask.double() + attn_bias
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * scale_factor + attn_bias
    dead = scores.isneginf().all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0) @ value


def keep(*shape, seed=5):
    """bool, True in three of four."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.75


def results(attention, q, k, v, mask=None, dtype=torch.float64, **options):
    """out and the gradients of everything that takes one; `mask` is a tensor, or the shape of one that does."""
    tensors = {n: draw(*s, dtype=dtype, seed=i) for i, (n, s) in enumerate(dict(query=q, key=k, value=v).items())}
    if isinstance(mask, tuple):
        tensors["attn_mask"] = draw(*mask, dtype=dtype, seed=7)
    elif mask is not None:
        options["attn_mask"] = mask
    with torch.no_grad():
        shape = attention(**tensors, **options).shape
    dout = draw(*shape, dtype=dtype, seed=9)
    return with_gradients(lambda **t: dict(out=attention(**t, **options)), tensors, dict(out=dout))


def compare(ours, exact, name):
    for tensor, x in ours.items():
        scale = max(exact[t].abs().max().item() if exact[t].numel() else 0.0 for t in exact)
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=tensor != "out", scale=scale)


# ---- documented cases

X = torch.ones(5, 7, dtype=torch.bool)
CASES = {
    "batch and heads": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3)),
    "a value size of its own": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 6)),
    "scale": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), scale=-0.3),
    "scale 0": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), scale=0),
    "rank 2": dict(q=(5, 3), k=(7, 3), v=(7, 4)),
    "rank 3": dict(q=(6, 5, 3), k=(6, 7, 3), v=(6, 7, 3)),
    "rank 5": dict(q=(2, 3, 2, 5, 3), k=(2, 3, 2, 7, 3), v=(2, 3, 2, 7, 3)),
    "rank 6": dict(q=(2, 1, 3, 2, 5, 3), k=(1, 2, 3, 2, 7, 3), v=(3, 2, 7, 3)),
    "keys shared by all": dict(q=(2, 4, 5, 3), k=(7, 3), v=(7, 3)),
    "queries shared by all": dict(q=(5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3)),
    "one head of keys": dict(q=(2, 4, 5, 3), k=(2, 1, 7, 3), v=(2, 1, 7, 3)),
    "one head of values": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 1, 7, 3)),
    "one head of queries": dict(q=(2, 1, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3)),
    "one batch of queries": dict(q=(1, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3)),
    "one batch of keys": dict(q=(2, 4, 5, 3), k=(1, 4, 7, 3), v=(4, 7, 3)),
    "causal, square": dict(q=(2, 4, 7, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), is_causal=True),
    "causal, more keys": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), is_causal=True),
    "causal, more queries": dict(q=(2, 4, 9, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 2), is_causal=True),
    "causal, tiles": dict(q=(1, 2, 130, 3), k=(1, 2, 70, 3), v=(1, 2, 70, 3), is_causal=True),
    "causal, rank 2": dict(q=(9, 3), k=(7, 3), v=(7, 3), is_causal=True),
    "bool [L, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=keep(5, 7)),
    "bool [1, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=keep(1, 7)),
    "bool [L, 1]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=X[:, :1]),
    "bool [H, L, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=keep(4, 5, 7)),
    "bool [B, 1, 1, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=keep(2, 1, 1, 7)),
    "bool, rank 3": dict(q=(4, 5, 3), k=(4, 7, 3), v=(4, 7, 3), mask=keep(4, 5, 7)),
    "bool, rank 2": dict(q=(5, 3), k=(7, 3), v=(7, 3), mask=keep(5, 7)),
    "float [L, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=(5, 7)),
    "float [1, H, L, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=(1, 4, 5, 7)),
    "float [B, 1, 1, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=(2, 1, 1, 7)),
    "float [B, H, L, S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=(2, 4, 5, 7)),
    "float [1, 1, 1, 1]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=(1, 1, 1, 1)),
    "float, constant": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=draw(5, 7)),
    "float, rank 3": dict(q=(4, 5, 3), k=(4, 7, 3), v=(4, 7, 3), mask=(4, 1, 7)),
    "float, rank 5": dict(q=(2, 3, 4, 5, 3), k=(2, 3, 4, 7, 3), v=(2, 3, 4, 7, 3), mask=(2, 3, 4, 5, 7)),
    "float, rank 4 of 5": dict(q=(2, 3, 4, 5, 3), k=(2, 3, 4, 7, 3), v=(2, 3, 4, 7, 3), mask=(3, 1, 5, 7)),
    "float, rank 3 of 5": dict(q=(2, 3, 4, 5, 3), k=(2, 3, 4, 7, 3), v=(2, 3, 4, 7, 3), mask=(4, 5, 7)),
    "float, one of 5": dict(q=(2, 3, 4, 5, 3), k=(2, 3, 4, 7, 3), v=(2, 3, 4, 7, 3), mask=(1, 1, 4, 5, 7)),
    "grouped": dict(q=(2, 4, 5, 3), k=(2, 2, 7, 3), v=(2, 2, 7, 3), enable_gqa=True),
    "grouped, equal heads": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), enable_gqa=True),
    "grouped, causal": dict(q=(2, 6, 5, 3), k=(2, 2, 9, 3), v=(2, 2, 9, 3), enable_gqa=True, is_causal=True),
    "grouped, masked": dict(q=(2, 4, 5, 3), k=(2, 2, 7, 3), v=(2, 2, 7, 3), enable_gqa=True, mask=(4, 5, 7)),
    "grouped, rank 3": dict(q=(4, 5, 3), k=(2, 7, 3), v=(2, 7, 3), enable_gqa=True),
    "grouped, rank 5": dict(q=(2, 2, 4, 5, 3), k=(2, 2, 2, 7, 3), v=(2, 2, 2, 7, 3), enable_gqa=True),
    "grouped, one batch of keys": dict(q=(2, 4, 5, 3), k=(1, 2, 7, 3), v=(2, 7, 3), enable_gqa=True),
    "grouped, values otherwise": dict(q=(2, 4, 5, 3), k=(2, 2, 7, 3), v=(2, 1, 7, 3), enable_gqa=True),
    "no query": dict(q=(2, 4, 0, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3)),
    "no query, causal": dict(q=(2, 4, 0, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), is_causal=True),
    "no key": dict(q=(2, 4, 5, 3), k=(2, 4, 0, 3), v=(2, 4, 0, 6)),
    "no key, causal": dict(q=(2, 4, 5, 3), k=(2, 4, 0, 3), v=(2, 4, 0, 3), is_causal=True),
    "no batch": dict(q=(0, 4, 5, 3), k=(0, 4, 7, 3), v=(0, 4, 7, 3)),
}
NOT_TORCH = {  # broadcastable, so within its documentation, but refused by its kernels
    "bool [S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=keep(7)),
    "float [S]": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=(7,)),
    "a number": dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=()),
}


@pytest.mark.parametrize("name", [*CASES, *NOT_TORCH])
def test_documented_case(name):
    """Outputs and gradients in float64: of the documented formula, and of torch's function."""
    case = (CASES | NOT_TORCH)[name]
    ours, formula = results(sdpa, **case), results(documented, **case)
    assert ours.keys() == formula.keys()
    compare(ours, formula, f"{name}, the documented formula:")
    if name in CASES:
        compare(ours, results(torch_sdpa, **case), f"{name}, torch:")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    """Against the formula in float64, of inputs of this dtype; the sums of gradients cancel, so all share a scale."""
    for name in ("batch and heads", "causal, tiles", "float [1, H, L, S]", "bool [B, 1, 1, S]", "grouped, causal"):
        ours, exact = results(sdpa, **CASES[name], dtype=dtype), results(documented, **CASES[name], dtype=dtype)
        assert all(x.dtype == dtype for x in ours.values())
        compare(ours, exact, f"{name}, {dtype}:")


@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    dropped=st.tuples(*[st.integers(0, 3)] * 4),
    ones=st.tuples(*[st.lists(st.booleans(), min_size=5, max_size=5)] * 4),
    L=st.integers(0, 6),
    S=st.integers(0, 6),
    kind=st.sampled_from(["bool", "float", "causal", "none"]),
)
def test_any_broadcasting(lead, dropped, ones, L, S, kind):
    """Leading dimensions left out or of size 1 in any argument, as numpy broadcasts them."""

    def shape(argument, *last):
        own = [1 if ones[argument][i] else n for i, n in enumerate(lead)][dropped[argument] :]
        return (*own, *last)

    q, k, v = shape(0, L, 3), shape(1, S, 3), shape(2, S, 2)
    mask = (*shape(3)[-max(len(q), len(k)) + 2 :], *(1 if ones[3][3 + i] else n for i, n in enumerate((L, S))))
    scores = torch.broadcast_shapes(q[:-2], k[:-2])
    assume(len(mask) - 2 <= len(scores) and torch.broadcast_shapes(mask[:-2], scores) == scores)
    masks = dict(bool=keep(*mask), float=mask)
    options = dict(is_causal=True) if kind == "causal" else dict(mask=masks.get(kind))
    compare(results(sdpa, q, k, v, **options), results(documented, q, k, v, **options), f"{q} {k} {v} {options}")


# ---- how it is done


@pytest.fixture
def calls(monkeypatch):
    """The calls of pykern.attention that scaled_dot_product_attention makes."""
    made = []
    kernel = room.attention

    def attention(q, k, v, **options):
        made.append((q, k, v, options))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(room, "attention", attention)
    return made


def test_causal_is_never_a_mask(calls):
    """Rows against the diagonal, keys behind the last query cut off: no [L, S] array, no key read in vain."""
    q, k, v = draw(2, 4, 5, 3), draw(2, 4, 7, 3), draw(2, 4, 7, 3)
    for query, keys, window, causal in (
        (q, 5, None, True),
        (k, 7, None, True),
        (draw(2, 4, 9, 3), 7, (None, 2), False),
    ):
        sdpa(query, k, v, is_causal=True)
        options = calls[-1][3]
        assert options["mask"] is None and options["bias"] is None
        assert calls[-1][1].shape[2] == calls[-1][2].shape[2] == keys
        assert (options["window"], options["causal"]) == (window, causal)
    k[:, :, 5:] = v[:, :, 5:] = math.nan
    assert sdpa(q, k, v, is_causal=True).isfinite().all()


def test_inputs_are_not_copied(calls):
    q, k, v = (VIEWS["rows before matrices"](draw(2, 4, 5, 3, seed=i)) for i in range(3))
    sdpa(q, k[:1], v[:, :1], attn_mask=keep(2, 1, 1, 5))
    for x, original in zip(calls[0], (q, k, v), strict=False):
        assert x.data_ptr() == original.data_ptr()
    packed = draw(5, 2, 3, 4, 3)  # [L, B, 3, H, E], as a projection may leave it
    q, k, v = packed.permute(2, 1, 3, 0, 4)
    assert_bitwise(sdpa(q, k, v), sdpa(q.contiguous(), k.contiguous(), v.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_mask_keeps_its_numbers(dtype):
    """In the dtype of the queries they would be rounded, by up to 0.25 at 100: a quarter of each weight."""
    mask = -100 + torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    case = dict(q=(2, 4, 5, 8), k=(2, 4, 7, 8), v=(2, 4, 7, 8), mask=mask)
    ours, exact = results(sdpa, **case, dtype=dtype), results(documented, **case, dtype=dtype)
    assert all(x.dtype == dtype for x in ours.values())
    compare(ours, exact, f"{dtype}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_of_the_least_float_is_not_hidden(dtype):
    """Models write torch.finfo(dtype).min for -inf; a row of it is the mean of the values in torch."""
    q, k, v = (draw(1, 1, n, 4, dtype=dtype, seed=i) for i, n in enumerate((3, 5, 5)))
    least = torch.full((3, 5), torch.finfo(dtype).min, dtype=dtype)
    assert_close(sdpa(q, k, v, least), documented(q, k, v, least), name="the least float")


def test_a_float32_mask_of_float64():
    mask = draw(5, 7, dtype=torch.float32)
    case = dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, 3), mask=mask)
    compare(results(sdpa, **case), results(documented, **case), "float64")


# ---- masks that hide all, dropout


@pytest.mark.parametrize("E", [3, 2])
def test_a_row_that_sees_no_key_is_0(E):
    """As in torch, whatever kernel it takes: fused (v as wide as k) or not; with its gradients, and with NaN there."""
    hidden = X.clone()
    hidden[2] = False
    numbers = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~hidden, -math.inf)
    for mask in (hidden, numbers):
        case = dict(q=(2, 4, 5, 3), k=(2, 4, 7, 3), v=(2, 4, 7, E), mask=mask)
        ours = results(sdpa, **case)
        assert (ours["out"][:, :, 2] == 0).all() and (ours["dquery"][:, :, 2] == 0).all()
        compare(ours, results(torch_sdpa, **case), "torch:")
    q, k, v = draw(1, 1, 5, 3), draw(1, 1, 7, 3), draw(1, 1, 7, E)
    q[:, :, 2] = math.nan
    assert (sdpa(q, k, v, hidden)[:, :, 2] == 0).all()


def test_dropout_is_that_of_torch_in_distribution():
    """Read off with values that are the unit vectors: a weight is 0 or 1 / (1 - p) of what it was."""
    torch.manual_seed(0)
    q, k, v = draw(2, 3, 50, 8), draw(2, 3, 40, 8), torch.eye(40, dtype=torch.float64).expand(2, 3, 40, 40)
    weights, dropped = sdpa(q, k, v), sdpa(q, k, v, dropout_p=0.3)
    kept = dropped != 0
    assert_close(dropped, weights * kept / 0.7, name="kept weights")
    assert abs(kept.double().mean().item() - 0.7) < 4 * math.sqrt(0.21 / kept.numel())
    assert (sdpa(q, k, v, dropout_p=1.0) == 0).all()
    assert_bitwise(sdpa(q, k, v, dropout_p=0.0), weights)


def test_manual_seed_repeats_dropout():
    q, k, v = draw(2, 3, 20, 8), draw(2, 3, 20, 8), draw(2, 3, 20, 8)

    def run(seed):
        torch.manual_seed(seed)
        leaves = dict(q=q, k=k, v=v)
        f = lambda q, k, v: dict(out=sdpa(q, k, v, dropout_p=0.5, is_causal=True))  # noqa: E731
        return with_gradients(f, leaves, dict(out=torch.ones(2, 3, 20, 8)))

    first, second, other = run(1), run(1), run(2)
    for name, x in first.items():
        assert_bitwise(x, second[name], name=name)
    assert not torch.equal(first["out"], other["out"])
    assert not torch.equal(sdpa(q, k, v, dropout_p=0.5), sdpa(q, k, v, dropout_p=0.5))


def test_dropout_takes_the_same_weights_in_the_gradient():
    """out = W v for one draw of W: dv = W^T dout."""
    q, k = draw(1, 2, 9, 4), draw(1, 2, 11, 4)
    v = torch.eye(11, dtype=torch.float64).expand(1, 2, 11, 11).clone().requires_grad_()
    dout = draw(1, 2, 9, 11, seed=3)
    torch.manual_seed(0)
    out = sdpa(q, k, v, dropout_p=0.4)
    out.backward(dout)
    assert_close(v.grad, out.detach().mT @ dout, name="dv", gradient=True)
