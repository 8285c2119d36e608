"""The paged cache: what it holds, copy on write, what a full one refuses, and the blocks' own use of it."""

import math

import pytest
import torch
from lm_models import POSITIONS, full_logits, make, random_ids
from tools import EMULATED, of_the_cpu

from pykern.lm import KVCache


def filled(batch=2, capacity=12, page=4, tokens=0, **options):
    cache = KVCache(2, batch, 3, capacity, 5, page=page, **options)
    numbers = torch.randn(2, 2, batch, 3, tokens, 5, generator=torch.Generator().manual_seed(0))
    if tokens:
        cache.append(*numbers)
    return cache, numbers


def contents(cache, text):
    return torch.stack([torch.stack(cache.keys_and_values(layer, text)) for layer in range(2)], 1)


@pytest.mark.parametrize("page", [1, 3, 4, 12, 64])
def test_append_stores_across_pages(page):
    cache, numbers = filled(page=page, tokens=7)
    more = torch.randn(2, 2, 2, 3, 4, 5)
    cache.append(*more)
    for text in range(2):
        assert torch.equal(contents(cache, text), torch.cat([numbers, more], 4)[:, :, text])
    assert cache.lengths.tolist() == [11, 11] and cache.free_pages == 2 * (-(-12 // page)) - 2 * (-(-11 // page))


def test_fork_shares_pages_until_one_writes():
    cache, numbers = filled(tokens=6)
    free = cache.free_pages
    cache.fork(0, 1)
    assert cache.free_pages == free + 2 and torch.equal(cache.table[0], cache.table[1])
    more = torch.randn(2, 2, 2, 3, 1, 5)
    cache.append(*more)  # in the shared second page: one of the two gets a copy of it
    assert cache.table[0, 0] == cache.table[1, 0] and cache.table[0, 1] != cache.table[1, 1]
    for text in range(2):
        assert torch.equal(contents(cache, text), torch.cat([numbers[:, :, 0], more[:, :, text]], 3))


def test_a_fork_outlives_its_source():
    cache, numbers = filled(tokens=6)
    cache.fork(0, 1)
    cache.truncate(0, 0)
    assert torch.equal(contents(cache, 1), numbers[:, :, 0])
    cache.reset()
    assert cache.free_pages == 6 and cache.length == 0


def test_truncate_gives_pages_back_and_what_follows_is_new():
    cache, numbers = filled(tokens=9)
    cache.truncate(5, 1)
    assert cache.lengths.tolist() == [9, 5] and cache.free_pages == 1
    cache.truncate(2)
    assert cache.lengths.tolist() == [2, 2] and cache.free_pages == 4
    more = torch.randn(2, 2, 2, 3, 3, 5)
    cache.append(*more)
    assert torch.equal(contents(cache, 1), torch.cat([numbers[:, :, 1, :, :2], more[:, :, 1]], 3))


def test_a_pool_that_is_too_small_for_all_refuses_and_takes_nothing():
    cache, _ = filled(pages=3, tokens=4)
    table = cache.table.clone()
    with pytest.raises(ValueError, match="1 more tokens in 2 texts need 2 pages of 4, 1 are free"):
        cache.reserve(1)
    assert cache.free_pages == 1 and torch.equal(cache.table, table)
    cache.reserve(1, [1])
    cache.advance(1, [1])
    assert cache.lengths.tolist() == [4, 5] and cache.free_pages == 0


REFUSALS = {
    "sizes": (lambda c: KVCache(1, 1, 1, 4, 4, page=0), ValueError, "page 0"),
    "no pages": (lambda c: KVCache(1, 1, 1, 4, 4, pages=0), ValueError, "pages is 0"),
    "full": (lambda c: c.reserve(7), ValueError, "7 more tokens after 6 exceed its capacity of 12"),
    "fork from nobody": (lambda c: c.fork(2, 0), IndexError, "source is 2 but there are 2 texts"),
    "fork to nobody": (lambda c: c.fork(0, -1), IndexError, "target is -1"),
    "shape": (lambda c: c.append(torch.zeros(2, 2, 3, 1, 4), torch.zeros(2, 2, 3, 1, 5)), ValueError, "k has shape"),
    "dtype": (lambda c: c.append(*torch.zeros(2, 2, 2, 3, 1, 5).double()), TypeError, "torch.float64 but the cache"),
    "advance without pages": (lambda c: c.advance(3), ValueError, r"reserve\(\) them first"),
    "truncate beyond": (lambda c: c.truncate(7), ValueError, "length 7 is outside 0 .. 6"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_changes_nothing(case):
    call, error, message = REFUSALS[case]
    cache, _ = filled(tokens=6)
    parts, free = (cache.k, cache.v, cache.table, cache.lengths), cache.free_pages
    before = [part.clone() for part in parts]
    with pytest.raises(error, match=message):
        call(cache)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True)) and cache.free_pages == free


@of_the_cpu
@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_blocks_with_a_cache_have_the_bits_of_the_full_forward(positions, dtype):
    """In the dtypes that no session has, too; pages hold NaN until they are written."""
    model = make(positions=positions, n_kv_head=2).to(getattr(torch, dtype))
    ids, cache = random_ids(2, 20), KVCache(2, 2, 2, 24, 4, getattr(torch, dtype), page=6)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    with torch.no_grad():
        got = torch.cat([model.logits(model.hidden(piece, cache)) for piece in ids.split([9, 1, 3, 7], 1)], 1)
    assert torch.equal(got, full_logits(model, ids))


# ---- int8


def test_an_int8_cache_is_within_half_a_scale():
    cache, numbers = filled(tokens=7, dtype=torch.int8)
    for text in range(2):
        error = (contents(cache, text) - numbers[:, :, text]).abs()
        scale = numbers[:, :, text].abs().amax(-1, keepdim=True) / 127
        assert cache.k.dtype == torch.uint8 and (error <= scale * 0.5001).all() and error.max() > 0
    assert cache.k.element_size() == 1


def test_an_int8_cache_keeps_what_is_not_finite_and_zeros():
    cache, _ = filled(batch=1, tokens=0, dtype=torch.int8)
    k = torch.zeros(2, 1, 3, 3, 5)
    k[:, :, :, 1, 2], k[:, :, :, 2, 0] = math.inf, 3.0
    cache.append(k, k)
    stored = contents(cache, 0)
    assert (stored[:, :, :, 0] == 0).all() and stored[:, :, :, 1].isnan().all()
    assert torch.equal(stored[:, :, :, 2], k.transpose(0, 1)[:, 0, :, 2].expand_as(stored[:, :, :, 2]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *([] if EMULATED else ["int4"])])
@pytest.mark.parametrize(
    "shape",
    [
        dict(positions="rope", n_kv_head=2),
        dict(positions="alibi", n_kv_head=2),
        *([] if EMULATED else [dict(positions="t5", n_kv_head=2)]),
        dict(positions="rope", n_head=2, n_kv_head=1, n_embd=128),  # the CUDA kernels have a width for each of these
        dict(positions="none", n_head=1, n_layer=1, n_embd=128),
        dict(positions="rope", n_head=1, n_layer=1, n_embd=200),
        dict(positions="rope", n_head=2, n_layer=1, n_embd=44),  # rows at odd addresses
    ],
    ids=str,
)
def test_a_session_reads_an_int8_cache_as_the_blocks_do(shape, dtype):
    """The same bits as from the model's own modules over such a cache, and near those without quantisation."""
    model = make(block_size=90, **shape)
    if dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    ids, pieces = random_ids(2, 80), [9, 1, 40, 1, 1, 20, 8]
    session = model.session(dtype=dtype, batch=2, cache_dtype="int8")
    got = torch.stack([session.prefill(piece) for piece in ids.split(pieces, 1)], 1)
    plain = model.session(dtype=dtype, batch=2)
    exact = torch.stack([plain.prefill(piece) for piece in ids.split(pieces, 1)], 1)
    most = 0.05 if model.config.n_embd < 100 else 0.1  # wide heads of such weights have scores of hundreds
    assert not torch.equal(got, exact) and (got - exact).abs().max() < most * exact.abs().max()
    if dtype == "int4":
        return
    k = session.cache.k
    cache = KVCache(k.shape[0], 2, k.shape[2], 90, k.shape[-1], torch.int8)
    with torch.no_grad():
        blocks = torch.stack([model.logits(model.hidden(piece, cache))[:, -1] for piece in ids.split(pieces, 1)], 1)
    if EMULATED:  # there the blocks read keys that were put together from the cache, and rounded, before
        assert (got - blocks).abs().max() < (1e-5 if dtype == "float32" else 0.03) * blocks.abs().max()
        return
    assert torch.equal(got, blocks)
    assert torch.equal(session.cache.k, cache.k) and torch.equal(session.cache.v_scale, cache.v_scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_of_nan_does_not_reach_those_before_it(dtype):
    """Its row of an int8 cache has a scale of NaN; queries of the same chunk that do not see it have the same bits."""
    model, ids = make(block_size=40, n_head=2, n_embd=128), random_ids(1, 30, vocab=7)
    clean = model.to(getattr(torch, dtype)).session(dtype=dtype, cache_dtype="int8")
    clean.prefill(ids)
    with torch.no_grad():
        model.transformer.wte.weight[9] = torch.nan
    broken = model.session(dtype=dtype, cache_dtype="int8")
    ids[0, 20] = 9
    broken.prefill(ids)
    for found, wanted in zip(broken.cache.keys_and_values(1, 0), clean.cache.keys_and_values(1, 0), strict=True):
        assert torch.equal(found[:, :20], wanted[:, :20]) and found[:, 20:].isnan().all()


def test_an_int8_cache_forks_truncates_and_ignores_what_is_not_written():
    model, ids = make(block_size=40), random_ids(1, 30)
    session, other = (model.session(batch=2, cache_dtype="int8") for _ in range(2))
    for x in (session.cache.k_scale, session.cache.v_scale):
        x.fill_(math.nan)
    session.extend([ids[0, :20]], [0])
    session.cache.fork(0, 1)
    session.cache.truncate(10, 1)
    logits = session.extend([ids[0, 20:], ids[0, 10:]], [0, 1])
    assert torch.equal(logits[:1], logits[1:])
    assert torch.equal(logits[:1], other.extend([ids[0]], [0])[-1:])


def test_cache_dtype_is_refused():
    with pytest.raises(ValueError, match="cache_dtype is 'int4' but must be None"):
        make().session(cache_dtype="int4")
    cache, _ = filled(tokens=0, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"k is torch\.int64"):
        cache.append(*torch.zeros(2, 2, 2, 3, 1, 5, dtype=torch.int64))
