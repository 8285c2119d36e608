"""attention: mask, bias and causal masking; rows that see nothing; NaN and infinity in slots that are seen or not.

"Masked means never read": a NaN in a slot that nobody sees changes no bit, forward or backward, and a row that sees a
NaN is NaN. Most comparisons are therefore bitwise, against the same call without the NaN.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention import KEYS, compare, inputs, named
from tools import DTYPES, VIEWS, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close, reference

POISONS = (math.nan, math.inf, -math.inf)


def bools(*shape, seed=0, share=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def attend(tensors, dout, dlse=None, **options):
    douts = dict(out=dout) if dlse is None else dict(out=dout, lse=dlse)
    return with_gradients(named(pykern.attention, **options), tensors, douts)


# ---- mask and bias against the formula


def mask_of(kind, B, H, T, S):
    mask = bools(B, H, T, S)
    if kind == "first key hidden":
        mask[..., 0] = False
    if kind == "first tile hidden":
        mask[..., :KEYS] = False
    if kind == "rows hidden":
        mask[:, :, ::3] = False
    if kind == "strips hidden":
        mask[:, :, :12] = False
    if kind == "one key a row":
        mask = torch.arange(S) == torch.randint(S, (B, H, T, 1), generator=torch.Generator().manual_seed(0))
    if kind == "all hidden":
        mask[:] = False
    if kind == "none hidden":
        mask[:] = True
    return mask


MASKS = ["random", "first key hidden", "first tile hidden", "rows hidden", "strips hidden", "one key a row"]
MASKS += ["all hidden", "none hidden"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, dtype):
    B, H, T, S = 2, 4, 27, 150
    mask = mask_of(kind, B, H, T, S)
    tensors, dout = inputs(T, S, D=20, B=B, H=H, G=2, dtype=dtype)
    compare(tensors, dout, draw(B, H, T, seed=5), mask=mask, name=kind)
    compare(tensors, dout, mask=mask, causal=True, name=f"{kind}, causal")
    assert_bitwise(
        pykern.attention(**tensors, mask=mask, causal=True),
        pykern.attention(**tensors, mask=mask & torch.ones(T, S, dtype=torch.bool).tril(S - T)),
        name="causal is a mask",
    )


# Every way to broadcast to [B, H, T, S] = [2, 4, 5, 70], by rank.
BROADCASTS = [(70,), (1,), (5, 70), (5, 1), (1, 70), (1, 1), (4, 5, 70), (4, 1, 70), (4, 1, 1), (1, 5, 1)]
BROADCASTS += [(2, 4, 5, 70), (2, 1, 5, 70), (2, 1, 1, 70), (2, 4, 1, 1), (1, 4, 5, 1), (2, 1, 5, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", BROADCASTS)
def test_broadcasting(shape):
    """mask and bias of a smaller shape equal the expanded ones; the gradient of bias is summed to its shape."""
    tensors, dout = inputs(5, 70, D=6, B=2, H=4, G=2)
    mask, bias = bools(*shape, seed=1, share=0.8), draw(*shape, seed=2)
    compare(tensors | dict(bias=bias), dout, mask=mask, causal=True, name=f"bias {shape}")
    small = attend(tensors | dict(bias=bias), dout, mask=mask)
    large = attend(tensors | dict(bias=bias.expand(2, 4, 5, 70)), dout, mask=mask.expand(2, 4, 5, 70).contiguous())
    assert small["dbias"].shape == bias.shape
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert_bitwise(small[name], large[name], name=name)
    summed, terms = (x.sum_to_size(shape) for x in (large["dbias"], large["dbias"].abs()))
    assert_close(small["dbias"], summed, name="dbias", gradient=True, scale=terms.max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 27, 150), (4, 27, 150), (27, 150), (150,), (27, 1), (2, 1, 1, 150)])
def test_bias(shape, dtype):
    tensors, dout = inputs(27, 150, D=20, B=2, H=4, G=2, dtype=dtype)
    tensors["bias"] = draw(*shape, dtype=dtype, seed=7, spread=2.0)
    compare(tensors, dout, draw(2, 4, 27, seed=5), causal=True, name=f"bias {shape}")


@pytest.mark.parametrize(
    "shape", [(6,), (4, 6), (4, 1), (1, 1), (2, 4, 6), (2, 1, 6), (2, 2, 4, 6), (2, 1, 1, 6), (1, 2, 4, 1)]
)
def test_gradcheck_bias(shape):
    tensors, _ = inputs(4, 6, D=2, B=2, H=2, G=1)
    tensors["bias"] = draw(*shape, seed=4)
    mask = bools(2, 1, 4, 6, share=0.7)
    mask[0, 0, 1] = False  # a row that sees nothing
    mask[1, 0, 2, 0] = False  # a first key

    def f(q, k, v, bias):
        out, lse = pykern.attention(q, k, v, bias=bias, mask=mask, causal=True, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()), atol=1e-7, rtol=1e-6)


@given(
    T=st.integers(1, 40),
    S=st.integers(1, 130),
    sizes=st.tuples(*[st.booleans()] * 4),
    rank=st.integers(1, 4),
    view=st.sampled_from([*VIEWS]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_mask_and_bias(T, S, sizes, rank, view, dtype, causal, seed):
    shape = [size if whole else 1 for size, whole in zip((2, 4, T, S), sizes, strict=True)][4 - rank :]
    tensors, dout = inputs(T, S, D=5, B=2, H=4, G=2, dtype=dtype, seed=seed)
    bias, mask = draw(*shape, dtype=dtype, seed=seed), bools(*shape, seed=seed, share=0.8)
    options = dict(mask=mask, causal=causal)
    compare(tensors | dict(bias=bias), dout, name=f"{shape}", **options)
    if rank > 1:  # any strides, the last one included
        packed = attend(tensors | dict(bias=bias), dout, **options)
        options["mask"] = VIEWS[view](mask)
        strided = attend(tensors | dict(bias=VIEWS[view](bias)), dout, **options)
        for name, x in packed.items():
            assert_bitwise(x, strided[name], name=f"{name}, bias {view}")


# ---- what nobody sees


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_nothing(dtype):
    """0, lse -inf and zero gradients, whatever the numbers in it: by mask, by a bias of -inf, without keys."""
    tensors, dout = inputs(20, 90, D=8, H=2, G=1, dtype=dtype)
    tensors["bias"] = draw(20, 90, dtype=dtype, seed=8)
    hidden = torch.zeros(20, dtype=torch.bool)
    hidden[[0, 7, 19]] = True
    dlse = draw(1, 2, 20, seed=5)
    clean = attend(tensors, dout, dlse, mask=~hidden[:, None])
    assert (clean["out"][:, :, hidden] == 0).all() and (clean["lse"][:, :, hidden] == -math.inf).all()
    assert (clean["dq"][:, :, hidden] == 0).all() and (clean["dbias"][hidden] == 0).all()
    by_bias = tensors | dict(bias=tensors["bias"].masked_fill(hidden[:, None], -math.inf))
    for name, x in attend(by_bias, dout, dlse).items():
        assert_bitwise(x, clean[name], name=f"bias of -inf: {name}")
    for poison in POISONS:
        bad = {name: tensors[name].clone() for name in tensors}
        bad["q"][:, :, hidden], bad["bias"][hidden] = poison, poison
        bad_dout, bad_dlse = dout.clone(), dlse.clone()
        bad_dout[:, :, hidden], bad_dlse[:, :, hidden] = poison, poison
        for name, x in attend(bad, bad_dout, bad_dlse, mask=~hidden[:, None]).items():
            assert_bitwise(x, clean[name], name=f"{poison} in hidden rows: {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_key_that_nobody_sees(causal, dtype):
    """NaN or infinity in its k, v and bias changes no bit; its own gradients are 0."""
    T, S = 30, 150
    tensors, dout = inputs(T, S, D=9, E=20, H=4, G=2, dtype=dtype)
    tensors["bias"] = draw(4, T, S, dtype=dtype, seed=8)
    mask = bools(4, T, S)
    unseen = torch.zeros(S, dtype=torch.bool)
    unseen[[0, 1, 33, 63, 64, 149]] = True
    mask[..., unseen] = False
    clean = attend(tensors, dout, mask=mask, causal=causal)
    seen = mask & torch.ones(T, S, dtype=torch.bool).tril(S - T if causal else S)
    for poison in POISONS:
        bad = {name: x.clone() for name, x in tensors.items()}
        bad["k"][:, :, unseen], bad["v"][:, :, unseen] = poison, poison
        bad["bias"][~seen] = poison
        results = attend(bad, dout, mask=mask, causal=causal)
        for name, x in results.items():
            assert_bitwise(x, clean[name], name=f"{poison}: {name}")
        for name in ("dk", "dv"):
            assert (results[name][:, :, unseen] == 0).all()
        assert (results["dbias"][~seen] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_minus_infinity_hides_a_key(dtype):
    tensors, dout = inputs(30, 90, D=9, H=4, G=2, dtype=dtype)
    bias, mask = draw(4, 30, 90, dtype=dtype, seed=8), bools(4, 30, 90)
    mask[..., :70:7] = False
    masked = attend(tensors | dict(bias=bias), dout, mask=mask)
    tensors["k"][:, :, :70:7] = tensors["v"][:, :, :70:7] = math.nan  # hidden from all
    hidden = attend(tensors | dict(bias=bias.masked_fill(~mask, -math.inf)), dout)
    for name, x in masked.items():
        assert_bitwise(x, hidden[name], name=name)


# ---- what some see: they become NaN, the others keep their bits


@pytest.fixture(params=DTYPES, ids=str)
def scene(request):
    """Tensors, dout, mask [T, S] and the results without any NaN. 27 queries: strips with rows of both kinds."""
    tensors, dout = inputs(27, 150, D=9, E=20, H=4, G=2, dtype=request.param)
    tensors["bias"] = draw(27, 150, dtype=request.param, seed=8)
    mask = bools(27, 150, share=0.5)
    return tensors, dout, mask, attend(tensors, dout, mask=mask)


def check_poisoned(clean, results, nan, name):
    """`nan` maps a result to where it must be NaN, None: nowhere; elsewhere the bits are those of the clean run."""
    for tensor, x in results.items():
        where = nan.get(tensor)
        where = torch.zeros(x.shape, dtype=torch.bool) if where is None else where.expand(x.shape)
        assert x[where].isnan().all(), f"{name}: {tensor} hides a NaN"
        assert_bitwise(x[~where], clean[tensor][~where], name=f"{name}: {tensor}")


@pytest.mark.parametrize("key", [0, 5, 63, 64, 149])
def test_a_nan_in_a_key(scene, key):
    tensors, dout, mask, clean = scene
    bad = tensors | dict(k=tensors["k"].clone())
    bad["k"][:, :, key, 3] = math.nan
    rows = mask[:, key]  # these see it
    keys = mask[rows].any(0)  # and whatever they see gets a NaN
    bits = dict(out=rows[:, None], lse=rows, dq=rows[:, None], dk=keys[:, None], dv=keys[:, None])
    bits["dbias"] = rows[:, None] & mask
    check_poisoned(clean, attend(bad, dout, mask=mask), bits, f"key {key}")


@pytest.mark.parametrize("key", [0, 5, 63, 64, 149])
def test_a_nan_in_a_value(scene, key):
    tensors, dout, mask, clean = scene
    bad = tensors | dict(v=tensors["v"].clone())
    bad["v"][:, :, key, 3] = math.nan
    rows = mask[:, key]
    column = torch.arange(20) == 3
    keys = mask[rows].any(0)
    bits = dict(out=rows[:, None] & column, dq=rows[:, None], dk=keys[:, None], dbias=rows[:, None] & mask)
    check_poisoned(clean, attend(bad, dout, mask=mask), bits, f"value {key}")  # lse and dv do not depend on v here


@pytest.mark.parametrize("row", [0, 11, 12, 26])
def test_a_nan_in_a_query(scene, row):
    tensors, dout, mask, clean = scene
    bad = tensors | dict(q=tensors["q"].clone())
    bad["q"][:, :, row, 8] = math.nan
    rows, keys = torch.arange(27) == row, mask[row]
    bits = dict(out=rows[:, None], lse=rows, dq=rows[:, None], dk=keys[:, None], dv=keys[:, None])
    bits["dbias"] = rows[:, None] & mask
    check_poisoned(clean, attend(bad, dout, mask=mask), bits, f"query {row}")


@pytest.mark.parametrize("row", [0, 11, 12, 26])
def test_a_nan_in_the_gradient(scene, row):
    tensors, dout, mask, clean = scene
    bad = dout.clone()
    bad[:, :, row, 4] = math.nan
    rows, keys = torch.arange(27) == row, mask[row]
    column = torch.arange(20) == 4
    bits = dict(dq=rows[:, None], dk=keys[:, None], dv=keys[:, None] & column, dbias=rows[:, None] & mask)
    check_poisoned(clean, attend(tensors, bad, mask=mask), bits, f"dout {row}")


def test_a_nan_in_a_bias(scene):
    tensors, dout, mask, clean = scene
    row = 12
    key = int(mask[row].nonzero()[3])
    bad = tensors | dict(bias=tensors["bias"].clone())
    bad["bias"][row, key] = math.nan
    rows, keys = torch.arange(27) == row, mask[row]
    bits = dict(out=rows[:, None], lse=rows, dq=rows[:, None], dk=keys[:, None], dv=keys[:, None])
    bits["dbias"] = rows[:, None] & mask
    check_poisoned(clean, attend(bad, dout, mask=mask), bits, "bias")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_values_propagate_as_the_formula(dtype):
    """A row that sees an infinite value is infinite or NaN, as the formula says."""
    tensors, _ = inputs(14, 90, D=9, E=20, dtype=dtype)
    tensors["v"][:, :, 7, 2], tensors["v"][:, :, 70, 3], tensors["v"][:, :, 8, 3] = math.inf, -math.inf, math.inf
    mask = bools(14, 90)
    exact = reference.attention(**tensors, mask=mask)
    assert exact.isinf().any() and exact.isnan().any() and exact.isfinite().any()
    assert_close(pykern.attention(**tensors, mask=mask), exact, name="out")
