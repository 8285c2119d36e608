"""flash_attn_with_kvcache against a plain loop over the sequences in float64: what is written, and what comes out."""

import math

import pytest
import torch
from test_flash_attn import SLOPES, formula, int32
from tools import DTYPES, draw

import pykern
from pykern.testing import assert_bitwise, assert_close, reference

flash = pykern.flash_attn_with_kvcache


def turned(x, cos, sin, positions, interleaved):
    """x [1, T, H, D] rotated to positions [T]."""
    return reference.rope(x.transpose(1, 2), cos, sin, positions=positions, interleaved=interleaved).transpose(1, 2)


def expected(q, k_cache, v_cache, k=None, v=None, rotary=None, lengths=None, rows=None, pads=None, **options):
    """(out, lse, k_cache, v_cache): FlashAttention's docstring, sequence by sequence, in float64."""
    interleaved, slopes = options.pop("rotary_interleaved", True), options.pop("alibi_slopes", None)
    k_cache, v_cache = k_cache.double(), v_cache.double()
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    local = options.get("causal", False) or tuple(options.get("window_size", (-1, -1))) != (-1, -1)
    outs, lses = [], []
    for b, length in enumerate(lengths):
        query, T = q[b : b + 1].double(), q.shape[1]
        row, pad = b if rows is None else rows[b], 0 if pads is None else pads[b]
        stop = length
        if rotary is not None:
            positions = length + torch.arange(T) if local else torch.full((T,), length)
            query = turned(query, *rotary, positions, interleaved)
        if k is not None:
            stop += k.shape[1]
            key = k[b : b + 1]
            if rotary is not None:
                key = turned(key, *rotary, torch.arange(length, stop), interleaved)
            k_cache[row, length:stop], v_cache[row, length:stop] = key[0].double(), v[b].double()
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        out, lse = formula(
            query, k_cache[row, None, pad:stop], v_cache[row, None, pad:stop], alibi_slopes=own, **options
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), k_cache, v_cache


def inputs(lengths, T=1, N=None, rows=None, D=16, E=12, H=4, G=2, capacity=40, R=0, dtype=torch.float64, pads=None):
    """Positional arguments up to v, and the rotary tables; slots that nobody wrote yet are NaN."""
    B, N = len(lengths), T if N is None else N
    slots = B if rows is None else 6
    caches = [draw(slots, capacity, G, n, dtype=dtype, seed=i) for i, n in enumerate((D, E))]
    for b, length in enumerate(lengths):
        for cache in caches:
            row = cache[b if rows is None else rows[b]]
            row[length:] = math.nan
            row[: 0 if pads is None else pads[b]] = math.nan
    new = [draw(B, N, G, n, dtype=dtype, seed=4 + i) for i, n in enumerate((D, E))] if N else [None, None]
    angles = draw(capacity, R // 2, seed=7)
    return [draw(B, T, H, D, dtype=dtype, seed=3), *caches, *new], (angles.cos().to(dtype), angles.sin().to(dtype))


def compare(lengths, name="", rows=None, pads=None, R=0, T=1, N=None, dtype=torch.float64, capacity=40, **options):
    arguments, tables = inputs(lengths, T, N, rows, R=R, dtype=dtype, pads=pads, capacity=capacity)
    q, k_cache, v_cache, k, v = arguments
    rotary = tables if R else None
    wanted = expected(q, k_cache, v_cache, k, v, rotary, lengths, rows, pads, **options)
    before = [x.clone() for x in (k_cache, v_cache)]
    batch = None if rows is None else int32(*rows)
    start = None if pads is None else int32(*pads)
    more = dict(cache_batch_idx=batch, cache_leftpad=start, return_softmax_lse=True)
    out, lse = flash(*arguments, *(tables if R else (None, None)), int32(*lengths), **more, **options)
    assert out.dtype == dtype and out.is_contiguous()
    names = ("out", "lse", "k_cache", "v_cache")
    for tensor, x, exact in zip(names, (out, lse, k_cache, v_cache), wanted, strict=True):
        if R and tensor in ("out", "lse") and dtype != torch.float64:
            continue  # what is rotated is rounded first: test_decode.py compares after that rounding
        assert_close(x.nan_to_num(7.0), exact.nan_to_num(7.0), name=f"{name} {tensor}")
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        written = torch.zeros_like(cache, dtype=torch.bool)
        for b, length in enumerate(lengths):
            if k is not None:
                written[b if rows is None else rows[b], length : length + k.shape[1]] = True
        assert_bitwise(cache[~written], old[~written], name=f"{name}: slots that are not written")
    return out, lse


OPTIONS = {
    "nothing": {},
    "causal": dict(causal=True),
    "scale": dict(softmax_scale=-0.4),
    "window": dict(window_size=(6, 1)),
    "causal window": dict(window_size=(6, -1), causal=True),
    "softcap": dict(softcap=0.7),
    "slopes [H]": dict(alibi_slopes=SLOPES),
    "slopes [B, H]": dict(alibi_slopes=torch.stack([SLOPES, SLOPES.flip(0), 2 * SLOPES]), causal=True),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("T, N", [(1, 1), (5, 5), (1, 3), (4, 1), (3, 0)])
def test_append_and_attend(name, T, N):
    compare([7, 0, 30], f"{name}, T={T}, N={N}", T=T, N=N, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("T, N", [(1, 1), (4, 4), (1, 3), (4, 2)])
def test_rotation(name, interleaved, T, N):
    """Causal or local: query i turned to cache_seqlens + i, whatever N is; else all queries to cache_seqlens."""
    compare([7, 0, 30], f"{name}, T={T}, N={N}", T=T, N=N, R=10, rotary_interleaved=interleaved, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_has_the_bits_of_the_kernel(dtype):
    """The way round the kernel (T other than N, or not causal) and the way through it rotate to the same bits."""
    arguments, tables = inputs([7, 0, 30], T=4, R=10, dtype=dtype)
    lengths = int32(7, 0, 30)

    def run(T, N, causal):
        q, k_cache, v_cache, k, v = (x.clone() for x in arguments)
        return flash(q[:, :T], k_cache, v_cache, k[:, :N], v[:, :N], *tables, lengths, causal=causal), k_cache

    for T, N, causal in ((1, 1, False), (1, 4, True), (3, 4, True)):  # round the kernel
        around, cache = run(T, N, causal)
        through, expected_cache = run(N, N, True)
        assert_bitwise(cache, expected_cache, name=f"keys, T={T}, N={N}")
        if T == N == 1:  # one query sees all keys, causal or not
            assert_bitwise(around, through, name="a query at cache_seqlens")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    for options in ({}, dict(causal=True, R=10), dict(R=10), dict(rows=[4, 0, 2], pads=[3, 0, 30])):
        _, lse = compare([7, 0, 30], f"{dtype}", T=2, dtype=dtype, **options)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("R", [0, 8])
def test_rows_and_left_padding(name, R):
    """A cache of six rows, of which three belong to the batch, keys from cache_leftpad on; positions count from 0."""
    for rows, pads in (([4, 0, 2], None), (None, [3, 0, 30]), ([5, 1, 3], [7, 0, 12])):
        for T, N in ((2, 2), (3, 1), (1, 0)):
            if R and not N:
                continue
            case = dict(T=T, N=N, R=R, rows=rows, pads=pads, **OPTIONS[name])
            compare([7, 0, 30], f"{name}, rows {rows}, pads {pads}, T={T}, N={N}", **case)


def test_rows_that_are_read_twice():
    """Without new keys a row may serve several sequences: the beams of one prompt."""
    (q, k_cache, v_cache, _, _), _ = inputs([30, 30, 30], N=0)
    lengths = int32(30, 20, 30)
    out = flash(q, k_cache, v_cache, cache_seqlens=lengths, cache_batch_idx=int32(1, 1, 0))
    for b, row in enumerate((1, 1, 0)):
        alone = flash(
            *(x[i : i + 1] for x, i in ((q, b), (k_cache, row), (v_cache, row))), cache_seqlens=lengths[b:][:1]
        )
        assert_bitwise(out[b], alone[0])


def test_no_sequence():
    none = torch.ones(0, 1, 4, 16)
    for rows in (None, int32()):
        cache = torch.ones(0 if rows is None else 3, 40, 2, 16)
        out, lse = flash(none, cache, cache, cache_seqlens=int32(), cache_batch_idx=rows, return_softmax_lse=True)
        assert out.shape == (0, 1, 4, 16) and lse.shape == (0, 4, 1)


def test_lengths():
    """An int counts for all sequences; None, without new keys, is the whole cache."""
    (q, k_cache, v_cache, k, v), _ = inputs([9, 9, 9])
    caches = [x.clone() for x in (k_cache, v_cache)]
    assert_bitwise(
        flash(q, *caches, k, v, cache_seqlens=9), flash(q, k_cache, v_cache, k, v, cache_seqlens=int32(9, 9, 9))
    )
    assert_bitwise(caches[0], k_cache)
    full = [draw(3, 40, 2, 16, seed=1), draw(3, 40, 2, 12, seed=2)]
    assert_bitwise(flash(q, *full), flash(q, *full, cache_seqlens=40))
    assert_bitwise(flash(q, *full, num_splits=3), flash(q, *full))
    assert_close(flash(q, *full), formula(q, *full)[0], name="whole cache")


def test_the_cache_is_written_in_place():
    """Heads in the last but one dimension are a view to the kernel; so is a cache inside a larger one."""
    (q, k_cache, v_cache, k, v), _ = inputs([7, 0, 30])
    outer = torch.full((3, 40, 2, 2, 16), math.nan, dtype=torch.float64)
    outer[:, :, 0], outer[:, :, 1, :, :12] = k_cache, v_cache
    views = outer[:, :, 0], outer[:, :, 1, :, :12]
    lengths, version = int32(7, 0, 30), outer._version
    for caches in ((k_cache, v_cache), views):
        flash(q, *caches, k, v, cache_seqlens=lengths)
        for cache, new in zip(caches, (k, v), strict=True):
            for b, length in enumerate(lengths.tolist()):
                assert_bitwise(cache[b, length], new[b, 0])
    assert outer._version > version and lengths.tolist() == [7, 0, 30]


@pytest.mark.parametrize("R", [0, 8])
def test_pages(R):
    """Pages [P, page, G, D] of 5 slots, in any order, against the same keys in one piece."""
    for options in ({}, dict(causal=True), dict(causal=True, T=3, N=1)):
        T, N = options.pop("T", 2), options.pop("N", 2)
        (q, k_cache, v_cache, k, v), tables = inputs([7, 0, 30], T, N, R=R)
        table = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:24].int().view(3, 8)
        pools = [torch.full((30, 5, *x.shape[2:]), math.nan, dtype=x.dtype) for x in (k_cache, v_cache)]
        for pool, cache in zip(pools, (k_cache, v_cache), strict=True):
            pool[table.long()] = cache.view(3, 8, 5, *cache.shape[2:])
        rotary = tables if R else (None, None)
        more = dict(cache_seqlens=int32(7, 0, 30), return_softmax_lse=True, **options)
        whole = flash(q, k_cache, v_cache, k, v, *rotary, **more)
        paged = flash(q, *pools, k, v, *rotary, block_table=table, **more)
        for name, x, y in zip(("out", "lse"), paged, whole, strict=True):
            assert_bitwise(x, y, name=name)
        for pool, cache in zip(pools, (k_cache, v_cache), strict=True):
            assert_bitwise(pool[table.long()].view(cache.shape), cache)


# ---- refusals


@pytest.mark.one_isa
def test_refusals_write_nothing():
    (q, k_cache, v_cache, k, v), (cos, sin) = inputs([7, 0, 30], T=2, R=8, dtype=torch.float32)
    base = dict(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, cache_seqlens=int32(7, 0, 30))
    rotary, ones = dict(rotary_cos=cos, rotary_sin=sin), torch.ones
    types = [
        (dict(q=[1.0]), "q must be a torch.Tensor, got list"),
        (dict(v_cache=None), "v_cache must be a torch.Tensor, got NoneType"),
        (dict(rotary_cos=1.0), "rotary_cos must be a torch.Tensor, got float"),
        (dict(block_table=[[0]]), "block_table must be a torch.Tensor, got list"),
        (dict(cache_seqlens=[7, 0, 30]), "cache_seqlens must be a torch.Tensor, got list"),
        (dict(cache_seqlens=int32(7, 0, 30).long()), "cache_seqlens has dtype torch.int64, expected int32"),
        (dict(cache_batch_idx=torch.tensor([0, 1, 2])), "cache_batch_idx has dtype torch.int64, expected int32"),
        (dict(cache_leftpad=torch.tensor([0, 0, 0])), "cache_leftpad has dtype torch.int64, expected int32"),
        (dict(k=k.double()), "k has dtype float64 but q has float32"),
        (dict(q=q.long()), "q has dtype int64, expected float32"),
        (dict(window_size=("1", 2)), r"window_size is \('1', 2\), expected integers, -1 for no limit"),
    ]
    values = [
        (dict(q=q[0]), r"q must be \[B, S, H, D\], got shape \[2, 4, 16\]"),
        (dict(v=None), "k and v must be given together"),
        (dict(k=k[0]), r"k must be \[B, N, G, D\], got shape \[2, 2, 16\]"),
        (dict(k=k[:, :, :1]), r"k has shape \[3, 2, 1, 16\], expected \[3, 2, 2, 16\]"),
        (dict(v=v[:, :1]), r"v has shape \[3, 1, 2, 12\], expected \[3, 2, 2, 12\]"),
        (dict(q=q[:, :, :3]), "q has 3 heads, which is not a multiple of the 2 heads of k_cache"),
        (dict(v_cache=v_cache[:, 1:]), r"v_cache has shape \[3, 39, 2, 12\] but k_cache has \[3, 40, 2, 16\]"),
        (
            dict(k_cache=ones(4, 40, 2, 16), v_cache=ones(4, 40, 2, 12)),
            "k_cache has 4 sequences but q has 3; give cache_b",
        ),
        (dict(cache_seqlens=None), "cache_seqlens must be given with k and v, to say where they go"),
        (dict(cache_seqlens=int32(7, 0)), r"cache_seqlens has shape \[2\], expected \[3\], one for each sequence of q"),
        (dict(cache_batch_idx=int32(0, 1)), r"cache_batch_idx has shape \[2\], expected \[3\]"),
        (dict(cache_seqlens=int32(7, 0, 39)), "the cache is full: sequence 2 holds 39 keys and 2 are appended"),
        (dict(cache_batch_idx=int32(0, 1, 1)), r"cache_batch_idx is \[0, 1, 1\]: two sequences of k would be written"),
        (
            dict(cache_batch_idx=int32(0, 1, 2), cache_seqlens=int32(7, 0, 39)),
            "the cache is full: sequence 2 ends at 39 and 2 keys are appended, but k_cache has room for 40",
        ),
        (dict(cache_leftpad=int32(0, 0, 0), alibi_slopes=ones(2, 4)), r"alibi_slopes has shape \[2, 4\], expected \[H"),
        (
            dict(cache_leftpad=int32(0, 0, 0), block_table=int32(0)[None]),
            "cache_leftpad cannot be combined with block_",
        ),
        (
            dict(cache_batch_idx=int32(0, 1, 2), block_table=int32(0)[None]),
            "cache_batch_idx cannot be combined with blo",
        ),
        (dict(rotary_cos=cos), "rotary_cos and rotary_sin must be given together"),
        (dict(rotary, k=None, v=None), "rotary_cos is given without k, the new keys that it rotates"),
        (dict(rotary, causal=True, rotary_sin=sin[:9]), r"rotary_sin has shape \[9, 4\] but rotary_cos has \[40, 4\]"),
        (dict(rotary, rotary_cos=cos[0]), r"rotary_cos must be \[positions, R/2\], got shape \[4\]"),
        (dict(softmax_scale=math.nan), "softmax_scale is nan, expected a finite number"),
        (dict(window_size=(1,)), r"window_size is \(1,\), expected \(left, right\), -1 for no limit"),
        (dict(k_cache=k_cache.mT.contiguous().mT), "k_cache must have stride 1 in its last dimension"),
    ]
    indices = [
        (dict(cache_seqlens=-1), "cache_seqlens is -1, expected a number of keys"),
        (dict(cache_seqlens=int32(7, -1, 30)), r"cache_seqlens\[1\] is -1, expected 0..40"),
        (
            dict(cache_leftpad=int32(0, 0, 0), cache_seqlens=int32(7, 0, 41)),
            r"cache_seqlens\[2\] is 41, expected 0..40",
        ),
        (dict(cache_leftpad=int32(0, 0, 31)), r"cache_leftpad\[2\] is 31, expected 0..cache_seqlens\[2\] = 30"),
        (dict(cache_leftpad=int32(-1, 0, 0)), r"cache_leftpad\[0\] is -1, expected 0..cache_seqlens\[0\] = 7"),
        (dict(cache_batch_idx=int32(0, 1, 3)), r"cache_batch_idx\[2\] is 3, but k_cache has 3 sequences"),
        (dict(cache_batch_idx=int32(-1, 1, 2)), r"cache_batch_idx\[0\] is -1, but k_cache has 3 sequences"),
        (dict(rotary, causal=True, rotary_cos=cos[:31], rotary_sin=sin[:31]), "sequence 2 rotates positions 30..31, b"),
        (
            dict(rotary, rotary_cos=cos[:31], rotary_sin=sin[:31]),
            "positions up to 31 are rotated, but rotary_cos has 31",
        ),
    ]
    clean = [x.clone() for x in (k_cache, v_cache)]
    for error, cases in ((TypeError, types), (ValueError, values), (IndexError, indices)):
        for changed, words in cases:
            with pytest.raises(error, match=f"^flash_attn_with_kvcache: {words}"):
                flash(**(base | changed))
            for cache, before in zip((k_cache, v_cache), clean, strict=True):
                assert_bitwise(cache, before, name=f"cache after: {words}")
    with pytest.raises(RuntimeError, match=r"attention_with_kvcache: has no gradient; call it under torch\.no_grad"):
        flash(**(base | dict(q=q.clone().requires_grad_())))
    # new keys that lie in another sequence's part of the cache are copied before anything is written
    assert_bitwise(k_cache, clean[0])
    expected_keys = k_cache[[1, 2, 0], 20:22].clone()
    flash(**(base | dict(k=k_cache[[1, 2, 0]][:, 20:22], v=v_cache[[1, 2, 0]][:, 20:22], cache_leftpad=int32(0, 0, 0))))
    assert_bitwise(k_cache[0, 7:9], expected_keys[0])
