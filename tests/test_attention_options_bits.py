"""attention with options on: the same bits for any threads, neighbours, padding, chunks; masked means never read."""

import math

import pytest
import torch
from attention_tools import attend, inputs
from test_attention_options import WINDOW_CASES, optional, slopes
from tools import DTYPES, EMULATED, VIEWS, draw

import pykern
from pykern.testing import assert_bitwise

POISONS = (math.nan, math.inf, -math.inf)
PAIR = [torch.float32, torch.bfloat16]

# By name: the options behind attention's q, k, v for heads H = 4 of S keys, and what goes with the tensors.
SETS = {
    "window": (dict(window=(70, 0)), dict()),
    "softcap and slopes": (dict(softcap=1.5, alibi_slopes=slopes(4), causal=True), dict()),
    "sinks": (dict(causal=True), dict(sinks=True)),
    "bias and sinks": (dict(causal=True), dict(sinks=True, bias=True)),
    "everything": (dict(window=(70, 0), softcap=1.5, alibi_slopes=slopes(4)), dict(sinks=True, bias=True)),
}
everyone = pytest.mark.parametrize("name", SETS)


def scene(name, T, S, dtype, B=1, G=2, D=10, bias=None):
    """tensors, dout, options; bias of this shape, or else one number for each head and key."""
    options, extra = SETS[name]
    tensors, dout = inputs(T, S, D=D, B=B, H=4, G=G, dtype=dtype)
    return optional(tensors, (bias or (4, 1, S)) if "bias" in extra else None, "sinks" in extra), dout, dict(options)


def check_same(results, expected, name, only=None):
    for tensor, x in expected.items():
        if only is None or tensor in only:
            assert_bitwise(results[tensor], x, name=f"{name}: {tensor}")


# ---- threads, neighbours


@pytest.mark.parametrize("dtype", DTYPES)
@everyone
def test_any_thread_count(name, dtype, with_threads):
    for B, T, S in ((1, 150, 300), (3, 40, 200)):  # shared among threads within a head, and head by head
        tensors, dout, options = scene(name, T, S, dtype, B=B)
        first = with_threads(1, lambda a=(tensors, dout), o=options: attend(*a, **o))
        for n in (2, 3):
            again = with_threads(n, lambda a=(tensors, dout), o=options: attend(*a, **o))
            check_same(again, first, f"{n} threads")


@pytest.mark.parametrize("dtype", PAIR)
@everyone
def test_any_batch_neighbours(name, dtype):
    tensors, dout, options = scene(name, 50, 300, dtype, B=9, bias=(9, 4, 1, 300))
    together = attend(tensors, dout, **options)
    own = {n: x if n == "sinks" else x[4:5].clone() for n, x in tensors.items()}
    alone = attend(own, dout[4:5], **options)
    for tensor, x in alone.items():
        if tensor != "dsinks":  # a sum over the batch
            assert_bitwise(together[tensor][4:5], x, name=tensor)


def test_slopes_belong_to_their_sequence():
    tensors, dout = inputs(20, 90, B=3, H=4, G=2, dtype=torch.float32)
    slope = slopes(3, 4)
    together = attend(tensors, dout, alibi_slopes=slope)
    for b in range(3):
        one = {n: x[b : b + 1] for n, x in tensors.items()}
        for given in (slope[b], slope[b : b + 1]):
            for tensor, x in attend(one, dout[b : b + 1], alibi_slopes=given).items():
                assert_bitwise(together[tensor][b : b + 1], x, name=f"{tensor} of sequence {b}")


# ---- padding: queries and keys alike, for the diagonal is counted from the end


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("padding", [1, 59, 300])
@everyone
def test_any_padding(name, padding, dtype):
    """NaN in the padding of q, k and v. Its rows have sinks to look at, so their dout is 0."""
    T, S = 40, 90
    tensors, dout, options = scene(name, T, S, dtype)
    expected = attend(tensors, dout, **options)
    longer = {}
    for tensor, x in tensors.items():
        axis = dict(q=2, k=2, v=2, bias=-1).get(tensor)
        tail = [] if axis is None else [torch.full_like(x.narrow(axis, 0, 1), math.nan)] * padding
        longer[tensor] = torch.cat([x, *tail], axis or 0)
    seen = (torch.arange(T + padding) < T)[:, None] & (torch.arange(S + padding) < S)
    long_dout = torch.cat([dout, torch.zeros(1, 4, padding, dout.shape[3], dtype=dtype)], 2)
    results = attend(longer, long_dout, mask=seen, **options)
    for tensor, x in expected.items():
        whole = results[tensor]
        if tensor in ("out", "lse", "dq"):
            got, rest = whole[:, :, :T], whole[:, :, T:]
        elif tensor in ("dk", "dv"):
            got, rest = whole[:, :, :S], whole[:, :, S:]
        else:
            got, rest = (whole[..., :S], whole[..., S:]) if tensor == "dbias" else (whole, whole[:0])
        assert_bitwise(got, x, name=f"{tensor}, padded by {padding}")
        assert tensor == "lse" or (rest == 0).all(), tensor


# ---- chunks of queries, down to one: decoding


@pytest.mark.parametrize("dtype", PAIR)
@everyone
def test_any_chunks_of_queries(name, dtype):
    n = 150
    tensors, _, options = scene(name, n, n, dtype, bias=(4, n, n))
    whole, lse = pykern.attention(**tensors, **options, return_lse=True)
    chunks = [(0, 1), (0, 13), (17, 63), (63, 65), (64, 150), (149, 150), *((i, i + 1) for i in range(n))]
    for first, last in chunks:
        part = dict(tensors, q=tensors["q"][:, :, first:last])
        part |= {x: tensors[x][:, :, :last] for x in "kv"}
        if "bias" in part:
            part["bias"] = part["bias"][:, first:last, :last]
        out, own = pykern.attention(**part, **options, return_lse=True)
        assert_bitwise(out, whole[:, :, first:last], name=f"queries {first} to {last}")
        assert_bitwise(own, lse[:, :, first:last], name=f"lse of queries {first} to {last}")


# ---- windows and masks


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("name", WINDOW_CASES)
def test_a_window_is_its_mask(name, dtype):
    """Skipped blocks give the bits of masked ones, with and without sinks."""
    shape, _ = WINDOW_CASES[name]
    T, S, left, right = shape["T"], shape["S"], shape.get("left"), shape.get("right")
    behind = torch.arange(S) - torch.arange(S - T, S)[:, None]
    mask = (behind >= -(S if left is None else left)) & (behind <= (T + S if right is None else right))
    for sinks in (False, True):
        tensors, dout = inputs(T, S, D=9, H=2, G=1, dtype=dtype)
        tensors = optional(tensors, None, sinks)
        window = attend(tensors, dout, window=(left, right))
        masked = attend(tensors, dout, mask=mask)
        check_same(window, masked, name)
        unseen = ~mask.any(0)
        assert (window["dk"][:, :, unseen] == 0).all() and (window["dv"][:, :, unseen] == 0).all()


def test_causal_is_a_window():
    tensors, dout = inputs(40, 90, D=9, H=2, G=1, dtype=torch.float32)
    check_same(attend(tensors, dout, window=(None, 0)), attend(tensors, dout, causal=True), "right = 0")
    check_same(
        attend(tensors, dout, window=(30, 0)), attend(tensors, dout, window=(30, 7), causal=True), "causal and window"
    )


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63 - 1, 2**70])
@pytest.mark.parametrize("T, S", [(40, 90), (90, 40), (3, 90)])
def test_a_window_beyond_every_key_is_none(T, S, huge):
    """sys.maxsize is a common word for "no limit": added to a position it must not wrap around."""
    tensors, dout = inputs(T, S, D=9, H=2, G=1, dtype=torch.float32)
    all_keys = attend(tensors, dout)
    for window in ((huge, huge), (None, huge), (huge, None)):
        check_same(attend(tensors, dout, window=window), all_keys, f"window {window}")
    check_same(attend(tensors, dout, window=(huge, 0)), attend(tensors, dout, causal=True), "causal")
    cached = dict(cache_seqlens=torch.tensor([S], dtype=torch.int32))
    q, k, v = (tensors[name] for name in "qkv")
    ours = pykern.attention_with_kvcache(q, k, v, causal=False, window=(huge, huge), **cached)
    assert_bitwise(ours, pykern.attention_with_kvcache(q, k, v, causal=False, **cached), name="cached")
    if not EMULATED:  # a promise of the CPU's kernels
        assert_bitwise(ours, all_keys["out"], name="cached and not")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(softcap=1.5, alibi_slopes=slopes(4))], ids=["", "softcap and slopes"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("T", [1, 20])
def test_keys_outside_every_window(T, sinks, options, dtype):
    """Of 300 keys one row of two heads, and 20, see the last 100 or less: NaN and infinity elsewhere change no bit."""
    tensors, dout = inputs(T, 300, D=9, E=20, H=4, G=2, dtype=dtype)
    tensors = optional(tensors, (4, T, 300), sinks)
    options = dict(window=(80, 2), **options)
    clean = attend(tensors, dout, **options)
    behind = torch.arange(300) - torch.arange(300 - T, 300)[:, None]
    seen = (behind >= -80) & (behind <= 2)
    unseen = ~seen.any(0)
    assert unseen[: 220 - T].all() and not unseen[220 - T :].any()
    for poison in POISONS:
        bad = {name: x.clone() for name, x in tensors.items()}
        bad["k"][:, :, unseen] = bad["v"][:, :, unseen] = poison
        bad["bias"][:, ~seen] = poison
        results = attend(bad, dout, **options)
        check_same(results, clean, f"{poison}")
        assert (results["dk"][:, :, unseen] == 0).all() and (results["dv"][:, :, unseen] == 0).all()
        assert (results["dbias"][:, ~seen] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(softcap=1.5, alibi_slopes=slopes(4))], ids=["", "softcap and slopes"])
@pytest.mark.parametrize("tensor", ["k", "v", "bias"])
def test_a_nan_in_a_window(tensor, options, dtype):
    """The rows whose window holds the key are NaN; the others keep their bits."""
    T, S, key = 100, 150, 64
    tensors, dout = inputs(T, S, D=9, E=20, H=4, G=2, dtype=dtype)
    tensors = optional(tensors, (T, S), True)
    options = dict(window=(30, 5), **options)
    clean = attend(tensors, dout, **options)
    bad = {name: x.clone() for name, x in tensors.items()}
    column = (..., key) if tensor == "bias" else (slice(None), slice(None), key)
    bad[tensor][column] = math.nan
    results = attend(bad, dout, **options)
    behind = key - torch.arange(S - T, S)
    rows = (behind >= -30) & (behind <= 5)
    assert 0 < rows.sum() < T
    assert results["out"][:, :, rows].isnan().all() and results["dq"][:, :, rows].isnan().all()
    for name in ("out", "lse", "dq"):
        assert_bitwise(results[name][:, :, ~rows], clean[name][:, :, ~rows], name=name)
    assert_bitwise(results["dbias"][~rows], clean["dbias"][~rows], name="dbias")
    assert results["lse"][:, :, rows].isnan().all() == (tensor != "v")
    assert results["dsinks"].isnan().all()  # every head has a row of NaN


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_a_sink_or_a_slope(dtype):
    """Its head is NaN; the other heads keep their bits."""
    tensors, dout = inputs(20, 90, D=9, H=4, G=2, dtype=dtype)
    tensors = optional(tensors, None, True)
    slope = slopes(4)
    clean = attend(tensors, dout, alibi_slopes=slope)
    others = [0, 1, 3]
    bad_sinks, bad_slope = tensors["sinks"].clone(), slope.clone()
    bad_sinks[2] = bad_slope[2] = math.nan
    for results in (
        attend(tensors | dict(sinks=bad_sinks), dout, alibi_slopes=slope),
        attend(tensors, dout, alibi_slopes=bad_slope),
    ):
        for name in ("out", "lse", "dq"):
            assert results[name][:, 2].isnan().all(), name
            assert_bitwise(results[name][:, others], clean[name][:, others], name=name)
        assert results["dsinks"].isnan().tolist() == [False, False, True, False]
        assert_bitwise(results["dsinks"][others], clean["dsinks"][others], name="dsinks")
        assert_bitwise(results["dk"][:, 0], clean["dk"][:, 0], name="dk of the other group")


# ---- layouts


@pytest.mark.parametrize("dtype", PAIR)
def test_views_of_one_packed_projection(dtype):
    """Heads inside rows of [B, T, (H + 2 G) D], read in place, with every option."""
    B, n, H, G, D = 2, 70, 4, 2, 24
    qkv = draw(B, n, (H + 2 * G) * D, dtype=dtype)
    views = {
        x: part.unflatten(2, (-1, D)).transpose(1, 2)
        for x, part in zip("qkv", qkv.split([H * D, G * D, G * D], 2), strict=True)
    }
    dout = draw(B, n, H, D, dtype=dtype, seed=1).transpose(1, 2)
    options = dict(window=(30, 0), softcap=1.5, alibi_slopes=slopes(B, H))
    results = attend(optional(views, (H, 1, n), True), dout, **options)
    assert results["out"].transpose(1, 2).is_contiguous()
    packed = {name: x.contiguous() for name, x in views.items()}
    check_same(attend(optional(packed, (H, 1, n), True), dout.contiguous(), **options), results, "packed")


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "packed"])
def test_views_of_the_other_tensors(view):
    """bias, slopes and sinks of any strides."""
    tensors, dout = inputs(20, 90, D=9, B=2, H=4, G=2, dtype=torch.float32)
    tensors = optional(tensors, (4, 20, 90), True)
    slope = slopes(2, 4)
    expected = attend(tensors, dout, alibi_slopes=slope)
    column = torch.full((4, 3), math.nan)
    column[:, 1] = tensors["sinks"]
    strided = tensors | dict(bias=VIEWS[view](tensors["bias"]), sinks=column[:, 1])
    check_same(attend(strided, dout, alibi_slopes=VIEWS[view](slope)), expected, view)
    same = slopes(1, 4)
    check_same(
        attend(tensors, dout, alibi_slopes=same.expand(2, 4)),
        attend(tensors, dout, alibi_slopes=same.repeat(2, 1)),
        "expanded slopes",
    )
