"""attention_with_kvcache: append, rotate, attend. The float64 formula, the bits of a prefill, the cache, refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention import BLOCK_ROWS, KEYS
from tools import DTYPES, TILE_ROWS, VIEWS, draw, of_the_cpu

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

kvcache = pykern.attention_with_kvcache


def int32(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def inputs(lengths, T=1, N=None, D=16, E=None, H=2, G=None, spare=3, R=0, dtype=torch.float64, seed=0):
    """Arguments for sequences of these lengths: N new keys (None: T), R rotated numbers, `spare` slots left over.

    What is not in the cache yet is NaN.
    """
    B, G, E, N = len(lengths), G or H, D if E is None else E, T if N is None else N
    capacity = max(lengths) + N + spare
    arguments = dict(
        q=draw(B, H, T, D, dtype=dtype, seed=seed),
        k_cache=draw(B, G, capacity, D, dtype=dtype, seed=seed + 1),
        v_cache=draw(B, G, capacity, E, dtype=dtype, seed=seed + 2),
        cache_seqlens=int32(*lengths),
    )
    for b, length in enumerate(lengths):
        arguments["k_cache"][b, :, length:] = arguments["v_cache"][b, :, length:] = math.nan
    if N:
        arguments |= dict(
            k=draw(B, G, N, D, dtype=dtype, seed=seed + 3), v=draw(B, G, N, E, dtype=dtype, seed=seed + 4)
        )
    if R:
        angles = draw(capacity, R // 2, seed=seed + 5)
        arguments |= dict(rotary_cos=angles.cos().to(dtype), rotary_sin=angles.sin().to(dtype))
    return arguments


def run(arguments, **options):
    """out, lse and both caches; the arguments are not changed."""
    arguments = dict(arguments, k_cache=arguments["k_cache"].clone(), v_cache=arguments["v_cache"].clone())
    out, lse = kvcache(**arguments, return_lse=True, **options)
    return dict(out=out, lse=lse, k_cache=arguments["k_cache"], v_cache=arguments["v_cache"])


def rotated(arguments, rotary_interleaved=False):
    """The same call without rotary tables: q and k are rotated already, and rounded to their dtype."""
    arguments = dict(arguments)
    lengths, T = arguments["cache_seqlens"].long()[:, None], arguments["q"].shape[2]
    cos, sin = arguments.pop("rotary_cos"), arguments.pop("rotary_sin")
    N = arguments["k"].shape[2] if "k" in arguments else 0
    positions = dict(q=lengths + N - T + torch.arange(T), k=lengths + torch.arange(N))
    for name in ("q", "k"):
        if name in arguments:
            options = dict(positions=positions[name], interleaved=rotary_interleaved)
            arguments[name] = pykern.rope(arguments[name], cos, sin, **options)
    return arguments


def compare(arguments, name="", **options):
    """Caches against the formula in float64; out and lse against it, too, after the rounding of what is rotated."""
    names = ("out", "lse", "k_cache", "v_cache")
    ours = run(arguments, **options)
    exact = dict(zip(names, reference.attention_with_kvcache(**arguments, **options), strict=True))
    dtype = arguments["q"].dtype
    if "rotary_cos" in arguments:
        plain = dict(options)
        turned = rotated(arguments, plain.pop("rotary_interleaved", False))
        after = dict(zip(names, reference.attention_with_kvcache(**turned, **plain), strict=True))
        exact |= {name: after[name] for name in ("out", "lse")}
    for tensor, x in ours.items():
        assert x.dtype == (dtype if tensor != "lse" or dtype == torch.float64 else torch.float32)
        assert_close(x, exact[tensor], name=f"{name} {tensor}")
    for b, length in enumerate(arguments["cache_seqlens"].tolist()):
        stop = length + (arguments["k"].shape[2] if "k" in arguments else 0)
        for cache in ("k_cache", "v_cache"):
            assert_bitwise(ours[cache][b, :, :length], arguments[cache][b, :, :length], name=f"{name}: old slots")
            assert ours[cache][b, :, stop:].isnan().all(), f"{name}: slots behind the new ones"


# ---- named cases, each with what it must reach


def facts(lengths, T=1, N=None, H=2, G=None, R=0, **_):
    N, G = T if N is None else N, G or H
    rows = H // G * T
    return SimpleNamespace(
        rows=rows,
        blocks=-(-rows // BLOCK_ROWS),
        strip_tail=rows % TILE_ROWS,
        keys=[length + N for length in lengths],
        tiles=[-(-(length + N) // KEYS) for length in lengths],
        dead=[max(T - length - N, 0) for length in lengths],
    )


CASES = {
    "an empty cache": (dict(lengths=[0]), lambda f: f.keys == [1]),
    "one step": (dict(lengths=[5, 0, 30]), lambda f: f.tiles == [1, 1, 1]),
    "the new key opens a tile": (dict(lengths=[64]), lambda f: f.tiles == [2] and f.keys == [KEYS + 1]),
    "the new key fills a tile": (dict(lengths=[63, 127]), lambda f: f.keys == [KEYS, 2 * KEYS]),
    "nothing is appended": (dict(lengths=[70, 1], N=0), lambda f: f.keys == [70, 1]),
    "nothing is there": (dict(lengths=[0, 2], N=0), lambda f: f.keys == [0, 2] and f.dead == [1, 0]),
    "a full cache": (dict(lengths=[20, 9], spare=0), lambda f: f.keys == [21, 10]),
    "a chunk of a prompt": (dict(lengths=[100, 3], T=13), lambda f: f.strip_tail == 13 % TILE_ROWS),
    "a prompt in blocks": (dict(lengths=[0, 7], T=200, H=1), lambda f: f.blocks == 3),
    "more queries than keys": (dict(lengths=[0, 2], T=6, N=1), lambda f: f.dead == [5, 3]),
    "more keys than queries": (dict(lengths=[3, 60], T=1, N=5), lambda f: f.keys == [8, 65]),
    "keys without queries": (dict(lengths=[3, 60], T=0, N=5, R=8), lambda f: f.rows == 0),
    "multi-query: heads fill a strip": (dict(lengths=[70], H=13, G=1), lambda f: f.rows == 13),
    "grouped heads": (dict(lengths=[70, 5], T=3, H=6, G=2), lambda f: f.rows == 9),
    "values of another size": (dict(lengths=[70, 5], D=7, E=33), lambda f: f.rows == 1),
    "a size of 1": (dict(lengths=[70, 5], D=1, E=1), lambda f: f.rows == 1),
    "rotated as a whole": (dict(lengths=[70, 5], T=2, R=16), lambda f: True),
    "rotated in part": (dict(lengths=[70, 5], T=3, D=33, R=10), lambda f: True),
    "rotated, many heads": (dict(lengths=[70, 5], T=60, H=4, G=2, R=8), lambda f: f.blocks == 2 and BLOCK_ROWS % 60),
    "no sequence": (dict(lengths=[]), lambda f: f.keys == []),
}


@pytest.mark.parametrize("name", [n for n in CASES if n != "no sequence"])
def test_named_case(name):
    shape, reached = CASES[name]
    assert reached(facts(**shape)), "the case no longer reaches what it is named after"
    for dtype in DTYPES:
        arguments = inputs(**shape, dtype=dtype)
        interleaved = dict(rotary_interleaved=True) if "rotary_cos" in arguments else {}
        compare(arguments, name=f"{name} {dtype}")
        compare(arguments, name=f"{name} {dtype}, not causal", causal=False, scale=-0.3, **interleaved)


def test_no_sequence():
    empty = dict(q=torch.ones(0, 2, 1, 4), k_cache=torch.ones(0, 2, 5, 4), v_cache=torch.ones(0, 2, 5, 3))
    out, lse = kvcache(**empty, cache_seqlens=int32(), return_lse=True)
    assert out.shape == (0, 2, 1, 3) and lse.shape == (0, 2, 1)


@given(
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=3),
    T=st.integers(0, 20),
    N=st.integers(0, 20),
    D=st.sampled_from([1, 6, 16, 33, 80]),
    E=st.sampled_from([1, 5, 32, 65]),
    G=st.integers(1, 2),
    heads=st.integers(1, 3),
    R=st.sampled_from([0, 2, 6, 16, 30]),
    views=st.tuples(*[st.sampled_from([*VIEWS])] * 3),
    causal=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(lengths, T, N, D, E, G, heads, R, views, causal, interleaved, dtype, seed):
    R = min(R, D // 2 * 2)
    if R:
        T = min(T, min(lengths) + N)  # a query before the first key has no position
    arguments = inputs(lengths, T, N, D, E, G * heads, G, R=R, dtype=dtype, seed=seed)
    options = dict(causal=causal, rotary_interleaved=interleaved)
    compare(arguments, **options)
    packed = run(arguments, **options)
    strided = dict(arguments)
    for name, view in zip(("q", "k", "v"), views, strict=True):
        if name in strided:
            strided[name] = VIEWS[view](strided[name])
    for name, view in (("k_cache", "padded rows"), ("v_cache", "rows before matrices")):
        strided[name] = VIEWS[view](strided[name])
    out, lse = kvcache(**strided, return_lse=True, **options)
    for name, x in (dict(out=out, lse=lse) | {n: strided[n] for n in ("k_cache", "v_cache")}).items():
        assert_bitwise(x, packed[name], name=f"{name} of {views}")


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("attention_with_kvcache", dtype)


# ---- bits


@of_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [None, False, True])
def test_every_step_has_the_bits_of_the_prefill(interleaved, dtype):
    """Row i of a causal attention over all keys, of chunks of any size, and of step i: the same."""
    B, H, G, S, D = 2, 4, 2, 90, 20
    q, k, v = (draw(B, heads, S, D, dtype=dtype, seed=i) for i, heads in enumerate((H, G, G)))
    tables, rotated = {}, (q, k)
    if interleaved is not None:
        angles = draw(S, 6, seed=5)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        tables = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
        rotated = [pykern.rope(x, cos, sin, interleaved=interleaved) for x in (q, k)]
    whole, lse = pykern.attention(*rotated, v, causal=True, return_lse=True)
    for steps in ([S], [1] * S, [7, 1, 56, 1, 20, 5]):
        k_cache, v_cache = (torch.full((B, G, S + 5, D), math.nan, dtype=dtype) for _ in range(2))
        start = 0
        for n in steps:
            at = slice(start, start + n)
            out, part = kvcache(
                q[:, :, at],
                k_cache,
                v_cache,
                k[:, :, at],
                v[:, :, at],
                cache_seqlens=int32(start, start),
                return_lse=True,
                **tables,
            )
            assert_bitwise(out, whole[:, :, at], name=f"rows {at}")
            assert_bitwise(part, lse[:, :, at], name=f"lse of rows {at}")
            start += n
        assert_bitwise(k_cache[:, :, :S], rotated[1], name="keys in the cache")
        assert_bitwise(v_cache[:, :, :S], v, name="values in the cache")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_neighbours_and_capacity(dtype):
    lengths = [70, 3, 129, 0]
    together = inputs(lengths, T=2, H=4, G=2, R=8, dtype=dtype)
    results = run(together)
    for b, length in enumerate(lengths):
        alone = {n: x if n.startswith("rotary") else x[b : b + 1] for n, x in together.items()}
        alone |= {n: alone[n][:, :, : length + 2].clone() for n in ("k_cache", "v_cache")}
        for name, x in run(alone).items():
            assert_bitwise(x, results[name][b : b + 1, :, : x.shape[2]], name=f"sequence {b}: {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype, with_threads):
    arguments = inputs([150, 70, 3], T=70, H=4, G=2, R=8, dtype=dtype)
    first = with_threads(1, lambda: run(arguments))
    for n in (2, 3):
        for name, x in with_threads(n, lambda: run(arguments)).items():
            assert_bitwise(x, first[name], name=f"{n} threads, {name}")


# ---- the cache


def test_slots_of_one_buffer():
    """k_cache and v_cache as views of one tensor of [B, capacity, 2, G, D], where a server may keep them."""
    arguments = inputs([20, 7], T=2, H=4, G=2)
    expected = run(arguments)
    buffer = torch.stack([arguments["k_cache"], arguments["v_cache"]]).permute(1, 3, 0, 2, 4).contiguous()
    views = dict(zip(("k_cache", "v_cache"), (buffer[:, :, i].transpose(1, 2) for i in range(2)), strict=True))
    out = kvcache(**(arguments | views))
    assert_bitwise(out, expected["out"])
    for name, view in views.items():
        assert_bitwise(view, expected[name], name=name)


def test_the_version_of_the_cache_is_bumped():
    arguments = inputs([4])
    kvcache(**arguments)
    assert arguments["k_cache"]._version > 0 and arguments["v_cache"]._version > 0
    assert arguments["q"]._version == arguments["cache_seqlens"]._version == 0
    reading = inputs([4], N=0)
    kvcache(**reading)
    assert reading["k_cache"]._version == inputs([4], N=0)["k_cache"]._version


def test_inference_mode():
    expected = run(inputs([4, 2]))
    with torch.inference_mode():
        arguments = inputs([4, 2])
        assert_bitwise(kvcache(**arguments), expected["out"])
        assert_bitwise(arguments["k_cache"], expected["k_cache"])


def test_numpy_arrays_cross_as_well():
    arguments = inputs([4, 2], T=2)
    expected = run(arguments)
    arrays = {name: x.numpy() for name, x in arguments.items()}
    out, lse = np.zeros((2, 2, 2, 16)), np.zeros((2, 2, 2))
    names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens")
    options = dict(causal=True, scale=0.25, rotary_interleaved=False)
    _C.attention_with_kvcache(*(arrays[n] for n in names), None, None, out, lse, **options)
    assert_bitwise(out, expected["out"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_the_cache_shows_where_it_is_seen(dtype):
    arguments = inputs([70, 20], T=3, dtype=dtype)
    clean = run(arguments)
    arguments["v_cache"][0, 1, 69, 2] = math.nan
    arguments["k"][1, 0, 2, 0] = math.nan  # the last key of sequence 1: its last query sees it
    poisoned = run(arguments)
    nan = torch.zeros_like(clean["out"], dtype=torch.bool)
    nan[0, 1, :, 2] = True
    nan[1, 0, 2, :] = True
    assert poisoned["out"][nan].isnan().all()
    assert_bitwise(poisoned["out"][~nan], clean["out"][~nan])


# ---- refusals


@pytest.mark.one_isa
def test_refusals_write_nothing():
    base = inputs([4, 2], T=2, D=4, E=3, H=4, G=2, R=4, dtype=torch.float32)
    ones, full = torch.ones, base["k_cache"].shape[2]
    types = [
        (dict(q=[1.0]), "q must be a torch.Tensor, got list"),
        (dict(k_cache=None), "k_cache must be a torch.Tensor, got NoneType"),
        (dict(k=[1.0]), "k must be a torch.Tensor, got list"),
        (dict(rotary_sin=1.0), "rotary_sin must be a torch.Tensor, got float"),
        (dict(cache_seqlens=[4, 2]), "cache_seqlens must be a torch.Tensor, got list"),
        (dict(cache_seqlens=torch.tensor([4, 2])), "cache_seqlens has dtype int64, expected int32"),
        (dict(q=base["q"].long()), "q has dtype int64, expected float32"),
        (dict(k_cache=base["k_cache"].half()), "k_cache has dtype float16 but q has float32"),
        (dict(v=base["v"].double()), "v has dtype float64 but q has float32"),
        (
            dict(rotary_cos=base["rotary_cos"].half()),
            "rotary_cos has dtype float16, expected that of q, float32, or fl",
        ),
        (dict(rotary_sin=base["rotary_sin"].double()), "rotary_sin has dtype float64 but rotary_cos has float32"),
    ]
    values = [
        (dict(q=base["q"][0]), r"q must be \[B, H, T, D\], got shape \[4, 2, 4\]"),
        (dict(k_cache=base["k_cache"][0]), r"k_cache must be \[B, G, capacity, D\], got shape \[2, 9, 4\]"),
        (dict(v_cache=ones(3)), r"v_cache must be \[B, G, capacity, E\], got shape \[3\]"),
        (dict(k=ones(2, 2, 4)), r"k must be \[B, G, N, D\], got shape \[2, 2, 4\]"),
        (dict(v=None), "k and v must be given together"),
        (dict(rotary_sin=None), "rotary_cos and rotary_sin must be given together"),
        (dict(q=base["q"][:, :3]), "q has 3 heads, which is not a multiple of the 2 heads of k_cache"),
        (dict(q=base["q"][..., :3]), r"k_cache has shape \[2, 2, 9, 4\], expected head size of q = 3 in dimension 3"),
        (
            dict(k_cache=base["k_cache"][:1]),
            r"k_cache has shape \[1, 2, 9, 4\], expected batch of q = 2 in dimension 0",
        ),
        (
            dict(v_cache=base["v_cache"][:, :, 1:]),
            r"v_cache has shape \[2, 2, 8, 3\], expected that of q or k_cache = 9",
        ),
        (dict(k=base["k"][:, :1]), r"k has shape \[2, 1, 2, 4\], expected that of k_cache = 2 in dimension 1"),
        (dict(v=base["v"][:, :, :1]), r"v has shape \[2, 2, 1, 3\], expected that of k and v_cache = 2 in dimension 2"),
        (dict(v=ones(2, 2, 2, 4)), r"v has shape \[2, 2, 2, 4\], expected that of k and v_cache = 3 in dimension 3"),
        (dict(cache_seqlens=int32(4)), r"cache_seqlens has shape \[1\], expected batch = 2 in dimension 0"),
        (dict(cache_seqlens=int32(4, 2)[None]), r"cache_seqlens must be \[B\], got shape \[1, 2\]"),
        (
            dict(cache_seqlens=int32(4, full - 1)),
            "the cache is full: sequence 1 holds 8 keys and 2 are appended, but k_c",
        ),
        (
            dict(rotary_cos=ones(9, 3), rotary_sin=ones(9, 3)),
            r"rotary_cos of shape \[9, 3\] rotates R = 6 numbers, but q",
        ),
        (dict(rotary_sin=ones(9, 1)), r"rotary_sin has shape \[9, 1\] but rotary_cos has \[9, 2\]"),
        (dict(rotary_cos=ones(9)), r"rotary_cos must be \[positions, R/2\], got shape \[9\]"),
        (dict(scale=math.nan), "scale is nan, expected a finite number"),
        (dict(k_cache=base["k_cache"].mT.contiguous().mT), "k_cache must have stride 1 in its last dimension, got 9"),
        (dict(k_cache=base["k_cache"][:, :1].expand(2, 2, 9, 4)), "elements of k_cache share memory"),
        (dict(k=base["k_cache"][:, :, :2]), "k_cache shares memory with k"),
    ]
    indices = [
        (dict(cache_seqlens=int32(-1, 2)), r"cache_seqlens\[0\] is -1, expected 0..9"),
        (dict(cache_seqlens=int32(4, 10)), r"cache_seqlens\[1\] is 10, expected 0..9"),
        (
            dict(rotary_cos=base["rotary_cos"][:5], rotary_sin=base["rotary_sin"][:5]),
            "sequence 0 rotates positions 4..5, but rotary_cos has 5 rows",
        ),
        (
            dict(q=base["q"][:, :, :0], rotary_cos=base["rotary_cos"][:5], rotary_sin=base["rotary_sin"][:5]),
            "sequence 0 rotates positions 6..5, but rotary_cos has 5 rows",
        ),
        (
            dict(q=ones(2, 4, 5, 4), cache_seqlens=int32(4, 2)),
            "sequence 1 rotates positions -1..3, but rotary_cos has 9 rows",
        ),
    ]
    clean = {name: x.clone() for name, x in base.items()}
    for error, cases in ((TypeError, types), (ValueError, values), (IndexError, indices)):
        for changed, words in cases:
            with pytest.raises(error, match=f"attention_with_kvcache: {words}"):
                kvcache(**(base | changed))
            for name in ("k_cache", "v_cache"):
                assert_bitwise(base[name], clean[name], name=f"{name} after: {words}")
    for name in ("q", "k_cache", "v"):
        with pytest.raises(
            RuntimeError, match=r"attention_with_kvcache: has no gradient; call it under torch\.no_grad"
        ):
            kvcache(**(base | {name: base[name].clone().requires_grad_()}))
    one = torch.zeros(2, 2, 9, 4)
    with pytest.raises(ValueError, match="attention_with_kvcache: v_cache shares memory with k_cache"):
        kvcache(**(base | dict(k_cache=one, v_cache=one, v=base["k"])))
    assert (one == 0).all()
