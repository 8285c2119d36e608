"""attention: sequences of different lengths end to end, by cu_seqlens_q and cu_seqlens_k.

Each sequence must have the bits that it has alone, so most comparisons are bitwise, against calls without cu_seqlens.
"""

import math

import pytest
import torch
from attention_tools import attend, compare, inputs, ragged_inputs, too_wide
from hypothesis import given
from hypothesis import strategies as st
from test_attention import KEYS
from test_attention_options import optional, slopes
from tools import DTYPES, draw

import pykern
from pykern.testing import assert_bitwise

PAIR = [torch.float32, torch.bfloat16]
SIZES = [0, 1, 7, 63, 64, 65, 130]

# lengths of queries and of keys
LENGTHS = {
    "one sequence": ([40], [90]),
    "every size": (SIZES, SIZES[3:] + SIZES[:3]),
    "as many queries as keys": (SIZES[::-1], SIZES[::-1]),
    "empty sequences on all sides": ([0, 0, 5, 0, 3, 0], [0, 0, 70, 0, 2, 0]),
    "queries without keys": ([5, 9, 3], [0, 70, 0]),
    "keys without queries": ([0, 9, 0], [70, 5, 64]),
    "more queries than keys": ([130, 20], [7, 3]),
    "one long among many short": ([1] * 6 + [150] + [2] * 3, [3] * 6 + [200] + [1] * 3),
    "decoding": ([1] * 6, [300, 1, 64, 65, 129, 7]),
    "no query at all": ([0, 0], [5, 6]),
}
OPTIONS = {
    "plain": dict(),
    "causal": dict(causal=True),
    "window": dict(window=(20, 3)),
    "everything": dict(window=(70, 0), softcap=1.5, alibi_slopes=slopes(4)),
}


def sequences(tensors, offsets, dout=None, dlse=None):
    """What each sequence is on its own: tensors [1, heads, rows, .], dout, dlse."""
    cu_q, cu_k = (offsets[f"cu_seqlens_{name}"].tolist() for name in "qk")
    for b in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        one = {name: tensors[name][rows if name == "q" else keys].transpose(0, 1)[None] for name in "qkv"}
        one |= {name: x for name, x in tensors.items() if name not in one}
        yield one, None if dout is None else dout[rows].transpose(0, 1)[None], None if dlse is None else dlse[:, rows]


def joined(results, name):
    """The results of sequences as a ragged call gives them."""
    parts = [x[name] for x in results]
    return torch.cat([x[0] for x in parts], 1) if name == "lse" else torch.cat([x[0].transpose(0, 1) for x in parts])


def check_alone(tensors, dout, dlse, offsets, name, **options):
    together = attend(tensors, dout, dlse, **offsets, **options)
    alone = [attend(one, out, lse[None], **options) for one, out, lse in sequences(tensors, offsets, dout, dlse)]
    for tensor, x in together.items():
        if tensor != "dsinks":  # that one is summed over the sequences
            assert_bitwise(x, joined(alone, tensor), name=f"{name}: {tensor}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_sequence_is_the_formula_and_itself_alone(lengths, dtype):
    queries, keys = LENGTHS[lengths]
    tensors, dout, offsets = ragged_inputs(queries, keys, D=9, E=20, H=4, G=2, dtype=dtype)
    dlse = draw(4, sum(queries), seed=5)
    for name, options in OPTIONS.items():
        given = optional(tensors, None, name == "everything")
        compare(given, dout, dlse, name=name, **offsets, **options)
        check_alone(given, dout, dlse, offsets, name, **options)


@pytest.mark.parametrize("dtype", PAIR)
def test_more_sequences_than_a_warp_has_lanes(dtype):
    """CUDA's kernels find their block among 32 sequences at a time: 70, a tenth of them empty, one of two blocks."""
    queries, keys = ([i % 10 and 1 + i % 3 for i in range(70)] for _ in "qk")
    queries[50], keys[50] = 66, 70
    tensors, dout, offsets = ragged_inputs(queries, keys, D=5, H=2, G=1, dtype=dtype)
    compare(tensors, dout, name="70 sequences", causal=True, **offsets)


@pytest.mark.parametrize("dtype", PAIR)
def test_slopes_of_each_sequence(dtype):
    queries, keys = [5, 0, 33, 70], [65, 9, 64, 20]
    tensors, dout, offsets = ragged_inputs(queries, keys, D=9, H=4, G=2, dtype=dtype)
    slope = slopes(4, 4)
    compare(tensors, dout, name="slopes", alibi_slopes=slope, **offsets)
    together = pykern.attention(**tensors, alibi_slopes=slope, **offsets)
    alone = [
        dict(out=pykern.attention(**one, alibi_slopes=slope[b]))
        for b, (one, _, _) in enumerate(sequences(tensors, offsets))
    ]
    assert_bitwise(together, joined(alone, "out"))


@pytest.mark.parametrize("D, E", [(1, 7), (80, 96), (112, 80), (128, 64), (256, 3), (512, 512)])
@pytest.mark.parametrize("dtype", PAIR)
def test_head_sizes(D, E, dtype):
    tensors, dout, offsets = ragged_inputs([5, 20, 1], [70, 3, 64], D=D, E=E, H=3, G=1, dtype=dtype)
    if too_wide(tensors, **offsets):
        return
    compare(tensors, dout, name=f"D={D}, E={E}", causal=True, **offsets)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 140)), min_size=1, max_size=5),
    D=st.sampled_from([1, 7, 16, 80]),
    E=st.sampled_from([1, 5, 65]),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, (0, 0), (3, None), (None, 2), (64, 0)]),
    softcap=st.sampled_from([None, 1.5]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    causal=st.booleans(),
)
def test_any_lengths(lengths, D, E, groups, dtype, window, softcap, alibi, sinks, causal):
    queries, keys = zip(*lengths, strict=True)
    tensors, dout, offsets = ragged_inputs(queries, keys, D=D, E=E, H=groups[0], G=groups[1], dtype=dtype)
    tensors = optional(tensors, None, sinks)
    options = dict(window=window, softcap=softcap, causal=causal)
    if alibi:
        options["alibi_slopes"] = slopes(len(lengths), groups[0])
    compare(tensors, dout, **offsets, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    tensors, _, offsets = ragged_inputs([3, 0, 2, 4], [5, 2, 0, 3], D=2, E=3, H=4, G=2)
    tensors = optional(tensors, None, name == "everything")

    def f(*leaves):
        arguments = dict(zip(tensors, leaves, strict=True))
        out, lse = pykern.attention(**arguments, **offsets, return_lse=True, **OPTIONS[name])
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()), atol=1e-7, rtol=1e-6)


def test_gradcheck_across_tiles():
    tensors, _, offsets = ragged_inputs([2, 1], [KEYS + 1, 2 * KEYS], D=1)

    def f(q, k, v):
        return pykern.attention(q, k, v, causal=True, return_lse=True, **offsets)

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()), atol=1e-7, rtol=1e-6)


# ---- bits


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("name", OPTIONS)
def test_equal_lengths_are_a_batch(name, dtype):
    B, T, S = 3, 40, 90
    tensors, dout = inputs(T, S, D=9, E=20, B=B, H=4, G=2, dtype=dtype)
    dlse, sinks = draw(B, 4, T, seed=5), optional(tensors, None, True)["sinks"]
    batch = attend(tensors | dict(sinks=sinks), dout, dlse, **OPTIONS[name])
    end_to_end = {n: x.transpose(1, 2).flatten(0, 1) for n, x in tensors.items()} | dict(sinks=sinks)
    _, _, offsets = ragged_inputs([T] * B, [S] * B)
    flat = dout.transpose(1, 2).flatten(0, 1), dlse.transpose(0, 1).flatten(1, 2)
    ragged = attend(end_to_end, *flat, **offsets, **OPTIONS[name])
    for tensor, x in batch.items():
        if tensor == "lse":
            x = x.transpose(0, 1).flatten(1, 2)
        elif tensor != "dsinks":
            x = x.transpose(1, 2).flatten(0, 1)
        assert_bitwise(ragged[tensor], x, name=tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(dtype, with_threads):
    for queries, keys in (([150, 1, 0, 33], [300, 7, 65, 200]), ([5] * 40, [30] * 40)):
        tensors, dout, offsets = ragged_inputs(queries, keys, D=10, H=4, G=2, dtype=dtype)
        arguments = optional(tensors, None, True), dout
        run = lambda a=arguments, o=offsets: attend(*a, causal=True, **o)  # noqa: E731
        first = with_threads(1, run)
        for n in (2, 3):
            for name, x in with_threads(n, run).items():
                assert_bitwise(x, first[name], name=f"{n} threads: {name}")


@pytest.mark.parametrize("dtype", PAIR)
def test_any_order_of_the_sequences(dtype):
    queries, keys, order = [33, 0, 70, 5], [65, 9, 130, 64], [2, 3, 1, 0]
    tensors, dout, offsets = ragged_inputs(queries, keys, D=10, H=4, G=2, dtype=dtype)
    first = attend(tensors, dout, causal=True, **offsets)
    parts = [x for x, _, _ in sequences(tensors, offsets)]
    turned = {name: torch.cat([parts[b][name][0].transpose(0, 1) for b in order]) for name in "qkv"}
    _, _, new_offsets = ragged_inputs([queries[b] for b in order], [keys[b] for b in order])
    cu_q = offsets["cu_seqlens_q"].tolist()
    turned_dout = torch.cat([dout[cu_q[b] : cu_q[b + 1]] for b in order])
    results = attend(turned, turned_dout, causal=True, **new_offsets)
    for name in ("out", "dq", "dk", "dv"):
        cu = offsets[f"cu_seqlens_{'q' if name in ('out', 'dq') else 'k'}"].tolist()
        expected = torch.cat([first[name][cu[b] : cu[b + 1]] for b in order])
        assert_bitwise(results[name], expected, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_sequence_of_nan_is_alone_with_it(poison, dtype):
    """NaN in q, k, v and dout of one sequence, right up to its neighbours in memory and in a vector."""
    queries, keys = [5, 3, 6], [7, 66, 9]
    tensors, dout, offsets = ragged_inputs(queries, keys, D=5, E=3, H=4, G=2, dtype=dtype)
    clean = attend(tensors, dout, **offsets)
    bad, bad_dout = {name: x.clone() for name, x in tensors.items()}, dout.clone()
    bad["q"][5:8] = bad["k"][7:73] = bad["v"][7:73] = bad_dout[5:8] = poison
    results = attend(bad, bad_dout, **offsets)
    for name, x in clean.items():
        own, axis = (slice(7, 73), 0) if name in ("dk", "dv") else (slice(5, 8), 1 if name == "lse" else 0)
        others = torch.ones(x.shape[axis], dtype=torch.bool)
        others[own] = False
        x, got = x.movedim(axis, 0), results[name].movedim(axis, 0)
        assert_bitwise(got[others], x[others], name=name)
        assert not got[own].isfinite().any(), name


@pytest.mark.parametrize("dtype", PAIR)
def test_keys_outside_every_window(dtype):
    """Of sequences of 300 and 200 keys the last 30 are seen; NaN in the others changes no bit."""
    tensors, dout, offsets = ragged_inputs([10, 20], [300, 200], D=9, H=4, G=2, dtype=dtype)
    options = dict(window=(10, 0), softcap=2.0, **offsets)
    clean = attend(tensors, dout, **options)
    for poison in (math.nan, math.inf):
        bad = {name: x.clone() for name, x in tensors.items()}
        for name in "kv":
            bad[name][:280] = bad[name][300:470] = poison
        results = attend(bad, dout, **options)
        for name, x in clean.items():
            assert_bitwise(results[name], x, name=f"{poison}: {name}")


# ---- layouts


@pytest.mark.parametrize("dtype", PAIR)
def test_views_of_one_packed_projection(dtype):
    """q, k, v inside rows of [total, (H + 2 G) D], as a model makes them; out comes as rows of H E."""
    lengths, H, G, D = [33, 0, 7, 64], 4, 2, 24
    total = sum(lengths)
    qkv = draw(total, (H + 2 * G) * D, dtype=dtype).requires_grad_()
    _, _, offsets = ragged_inputs(lengths, lengths)
    views = [x.unflatten(1, (-1, D)) for x in qkv.split([H * D, G * D, G * D], 1)]
    out = pykern.attention(*views, causal=True, **offsets)
    assert out.shape == (total, H, D) and out.is_contiguous()
    packed = [x.detach().contiguous().requires_grad_() for x in views]
    expected = pykern.attention(*packed, causal=True, **offsets)
    assert_bitwise(out, expected)
    dout = draw(total, H, D, dtype=dtype, seed=1)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    gradients = torch.autograd.grad(expected, packed, dout)
    assert_bitwise(dqkv, torch.cat([x.flatten(1) for x in gradients], 1))


def test_heads_before_rows():
    """Views of [H, total, D], and offsets that are every second number of an array."""
    tensors, dout, offsets = ragged_inputs([33, 5], [65, 7], D=9, H=4, G=2, dtype=torch.float32)
    expected = attend(tensors, dout, **offsets)
    turned = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in tensors.items()}
    apart = {name: torch.stack([x, torch.full_like(x, -9)], 1)[:, 0] for name, x in offsets.items()}
    assert all(x.stride(0) == 2 for x in apart.values())
    for name, x in attend(turned, dout.transpose(0, 1).contiguous().transpose(0, 1), **apart).items():
        assert_bitwise(x, expected[name], name=name)


def test_no_sequence():
    """Also beside sinks, whose gradient is 0; but rows that belong to no sequence are refused."""
    tensors, dout, offsets = ragged_inputs([], [], D=5, E=3, H=4, G=2)
    assert [len(x) for x in offsets.values()] == [1, 1]
    results = attend(optional(tensors, None, True), dout, **offsets)
    assert {n: tuple(x.shape) for n, x in results.items()} == dict(
        out=(0, 4, 3), lse=(4, 0), dq=(0, 4, 5), dk=(0, 2, 5), dv=(0, 2, 3), dsinks=(4,)
    )
    assert (results["dsinks"] == 0).all()
    with pytest.raises(ValueError, match="attention: cu_seqlens_q ends with 0, expected the 1 rows of q"):
        pykern.attention(tensors["q"].new_ones(1, 4, 5), tensors["k"], tensors["v"], **offsets)


def test_lse_has_the_shape_of_the_contract():
    tensors, _, offsets = ragged_inputs([3, 4], [5, 6], H=4, G=2, dtype=torch.bfloat16)
    out, lse = pykern.attention(**tensors, **offsets, return_lse=True)
    assert out.shape == (7, 4, 16) and out.dtype == torch.bfloat16
    assert lse.shape == (4, 7) and lse.dtype == torch.float32
