"""attention_with_kvcache with windows, caps, slopes, sinks and pages: the formula, the bits of a prefill, refusals."""

import math

import pytest
import torch
from test_attention import BLOCK_ROWS
from test_decode import compare, inputs, int32, run
from tools import DTYPES, ROOT, draw, of_the_cpu

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, reference

kvcache = pykern.attention_with_kvcache
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
OPTIONS = {
    "window": dict(window=(9, 0)),
    "window, both sides": dict(window=(40, 2), causal=False),
    "window, left only": dict(window=(70, None)),
    "softcap": dict(softcap=2.0),
    "slopes": dict(alibi_slopes=SLOPES),
    "slopes of each sequence": dict(alibi_slopes=torch.stack((SLOPES, SLOPES * 3))),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 4.0, -math.inf])),
    "all": dict(window=(80, 0), softcap=3.0, alibi_slopes=SLOPES, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), scale=0.4),
}
QUERIES = (1, 3, 20, 70)  # 2 heads a key head


def few_rows(dtype):
    """kFewRows: blocks of no more rows have keys in the lanes of their vectors, larger ones have queries there."""
    assert "kFewRows = Vec<Compute<T>>::lanes / 2;" in (ROOT / "csrc/cpu/attention_memory.h").read_text()
    vector_bytes = {"v4": 64, "v3": 32}.get(_C.isa()[:2], 16)
    return vector_bytes // (8 if dtype == torch.float64 else 4) // 2


def typed(options, dtype):
    return {name: x.to(dtype) if name == "sinks" else x for name, x in options.items()}


def paged(arguments, page, seed=0):
    """The same cache in shuffled pages: slots and pages without a key are NaN, table entries without one absurd."""
    B, G, capacity, D = arguments["k_cache"].shape
    E, n = arguments["v_cache"].shape[3], -(-capacity // page)
    order = torch.randperm(B * n + 2, generator=torch.Generator().manual_seed(seed))[: B * n].view(B, n).int()
    k_pages = torch.full((B * n + 2, G, page, D), math.nan, dtype=arguments["k_cache"].dtype)
    v_pages = torch.full((B * n + 2, G, page, E), math.nan, dtype=arguments["k_cache"].dtype)
    new = arguments["k"].shape[2] if "k" in arguments else 0
    for b, length in enumerate(arguments["cache_seqlens"].tolist()):
        for s in range(length):
            k_pages[order[b, s // page], :, s % page] = arguments["k_cache"][b, :, s]
            v_pages[order[b, s // page], :, s % page] = arguments["v_cache"][b, :, s]
        order[b, -(-(length + new) // page) :] = 2**30
    return arguments | dict(k_cache=k_pages, v_cache=v_pages, block_table=order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_formula(name, dtype):
    for T in QUERIES:
        arguments = inputs([101, 30], T=T, D=24, E=40, H=4, G=2, R=16, dtype=dtype)
        compare(arguments, f"{name} T={T}", **typed(OPTIONS[name], dtype))


@pytest.mark.parametrize("page", [None, 1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padding_has_the_bits_of_a_cache_without_it(dtype, page):
    """Keys behind 13 and 70 slots of NaN; positions, window and slopes count from the first key."""
    for T in QUERIES:
        plain = inputs([101, 30], T=T, D=24, E=40, H=4, G=2, R=16, dtype=dtype)
        options = typed(dict(window=(80, 0), alibi_slopes=SLOPES), dtype)
        expected = run(plain, **options)
        padding = [13, 70]
        padded = dict(plain)
        for name in ("k_cache", "v_cache"):
            padded[name] = torch.full_like(torch.nn.functional.pad(plain[name], (0, 0, 70, 0)), math.nan)
            for b, n in enumerate(padding):
                padded[name][b, :, n : n + plain[name].shape[2]] = plain[name][b]
        padded["cache_seqlens"] = plain["cache_seqlens"] + int32(*padding)
        if page is not None:
            padded = paged(padded, page)
        ours = run(padded, cache_leftpad=int32(*padding), **options)
        for name in ("out", "lse"):
            assert_bitwise(ours[name], expected[name], name=f"T={T} {name}")


def test_left_padding_out_of_range_is_refused():
    arguments = inputs([5, 9], T=1, D=8, E=8, H=2, G=1)
    before = arguments["k_cache"].clone()
    for padding, error, words in (
        ([6, 0], IndexError, r"cache_leftpad\[0\] is 6, expected 0..cache_seqlens\[0\] = 5"),
        ([0, -1], IndexError, r"cache_leftpad\[1\] is -1"),
        ([0], ValueError, "cache_leftpad has shape"),
    ):
        with pytest.raises(error, match=words):
            kvcache(**arguments, cache_leftpad=int32(*padding))
    with pytest.raises(TypeError, match="cache_leftpad has dtype int64"):
        kvcache(**arguments, cache_leftpad=torch.tensor([0, 0]))
    assert torch.equal(arguments["k_cache"].view(torch.int64), before.view(torch.int64))


@of_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_those_of_a_prefill(name, dtype):
    options = typed(OPTIONS[name], dtype)
    for T in QUERIES:
        arguments = inputs([101, 30], T=T, D=24, E=40, H=4, G=2, dtype=dtype)
        ours = run(arguments, **options)
        for b, length in enumerate((101, 30)):
            whole = dict(causal=True) | options
            if "alibi_slopes" in whole and whole["alibi_slopes"].dim() == 2:
                whole["alibi_slopes"] = whole["alibi_slopes"][b : b + 1]
            k, v = (ours[cache][b : b + 1, :, : length + T] for cache in ("k_cache", "v_cache"))
            out, lse = pykern.attention(arguments["q"][b : b + 1], k, v, return_lse=True, **whole)
            assert_bitwise(ours["out"][b : b + 1], out, name=f"{name} T={T} out")
            assert_bitwise(ours["lse"][b : b + 1], lse, name=f"{name} T={T} lse")


@of_the_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_few_rows_and_many_have_the_bits_of_the_whole(name, dtype):
    """The last T rows of a call over all 150, which are many: T on both sides of kFewRows, then a block and one row."""
    options, few = typed(OPTIONS[name], dtype) | dict(causal=True), few_rows(dtype)
    q, k, v = (draw(2, 4, 150, n, dtype=dtype, seed=i) for i, n in enumerate((16, 16, 9)))
    whole, lse = pykern.attention(q, k, v, return_lse=True, **options)
    assert 1 <= few < 150 - BLOCK_ROWS  # no block of the whole has few rows
    for T in (1, few, few + 1, 70, BLOCK_ROWS + 1):
        old, new = slice(0, 150 - T), slice(150 - T, 150)
        caches = [torch.full_like(x, math.nan) for x in (k, v)]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, :, old] = x[:, :, old]
        call = dict(k=k[:, :, new], v=v[:, :, new], cache_seqlens=int32(150 - T, 150 - T), return_lse=True)
        out, own = kvcache(q[:, :, new], *caches, **call, **options)
        assert_bitwise(out, whole[:, :, new], name=f"{name} T={T} out")
        assert_bitwise(own, lse[:, :, new], name=f"{name} T={T} lse")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_formula_of_pages(name, dtype):
    for T, page in ((1, 3), (3, 64), (70, 16)):
        arguments = paged(inputs([101, 30], T=T, D=24, E=40, H=4, G=2, dtype=dtype), page)
        options = typed(OPTIONS[name], dtype)
        ours = run(arguments, **options)
        exact = zip(ours.items(), reference.attention_with_kvcache(**arguments, **options), strict=True)
        for (tensor, x), wanted in exact:
            if tensor in ("out", "lse"):
                assert_close(x, wanted, name=f"{name} T={T} page {page} {tensor}")
            else:  # the new keys in their slots, NaN where there was NaN
                assert_bitwise(x.isnan(), wanted.isnan(), name=f"{name} T={T} page {page} {tensor} is NaN")
                assert_bitwise(x.nan_to_num(), wanted.to(dtype).nan_to_num(), name=f"{name} T={T} page {page} {tensor}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [1, 3, 16, 64, 100])
def test_pages_have_the_bits_of_a_row_of_slots(page, dtype):
    """A tile of 64 keys lies in one page, or in many; the append crosses from one page to the next."""
    for T, name in ((1, "all"), (3, "window"), (20, "slopes"), (70, "sinks")):
        arguments = inputs([95, 0], T=T, D=24, E=40, H=4, G=2, R=8, dtype=dtype)
        options = typed(OPTIONS[name], dtype)
        ours, plain = run(paged(arguments, page), **options), run(arguments, **options)
        for tensor in ("out", "lse"):
            assert_bitwise(ours[tensor], plain[tensor], name=f"page {page} T={T} {tensor}")
        table = paged(arguments, page)["block_table"]
        for b, length in enumerate((95, 0)):
            for s in range(length + T):
                slot = ours["k_cache"][table[b, s // page], :, s % page]
                assert_bitwise(slot, plain["k_cache"][b, :, s], name=f"page {page} T={T} key {s}")


def test_pages_of_any_strides():
    arguments = inputs([50, 7], T=2, D=24, E=40, H=4, G=2)
    pages = paged(arguments, 16)
    wide = pages | dict(k_cache=draw(*pages["k_cache"].shape[:3], 50)[..., 3:27])
    wide["k_cache"].copy_(pages["k_cache"])
    swapped = pages["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    out = kvcache(**(wide | dict(v_cache=swapped)))
    assert_bitwise(out, kvcache(**arguments), name="strided pages")


def test_no_new_keys():
    arguments = inputs([50, 7], T=2, N=0, D=24, H=4, G=2)
    assert_bitwise(kvcache(**paged(arguments, 5)), kvcache(**arguments), name="only attends")


def test_a_page_of_several_sequences():
    """A common beginning is stored once; the table is a view, too."""
    arguments = inputs([40, 37], T=1, D=24, H=4, G=2)
    for cache in ("k_cache", "v_cache"):
        arguments[cache][1, :, :32] = arguments[cache][0, :, :32]
    pages = paged(arguments, 16)
    table = torch.full((2, 9), 2**30, dtype=torch.int32)
    table[:, 1 : 1 + 2 * pages["block_table"].shape[1] : 2] = pages["block_table"]
    table[1, 1:5:2] = table[0, 1:5:2]
    for page in pages["block_table"][1, :2].tolist():
        pages["k_cache"][page] = pages["v_cache"][page] = math.nan
    pages["block_table"] = table[:, 1 : 1 + 2 * pages["block_table"].shape[1] : 2]
    assert_bitwise(kvcache(**pages), kvcache(**arguments), name="shared pages")


PAGED = paged(inputs([5, 9], T=1, D=8, H=4, G=2), 4)
LAST = PAGED["block_table"].clone()
LAST[1, 2] = 10  # as many as there are pages
REFUSED = {
    "page out of range": (dict(block_table=torch.full((2, 4), 100).int()), IndexError, r"block_table\[0, 0\] is 100"),
    "the last page of the last sequence": (
        dict(block_table=LAST),
        IndexError,
        r"block_table\[1, 2\] is 10, expected 0..9",
    ),
    "negative page": (dict(block_table=torch.full((2, 4), -1).int()), IndexError, r"block_table\[0, 0\] is -1"),
    "table of int64": (dict(block_table=torch.zeros(2, 4).long()), TypeError, "block_table has dtype int64"),
    "table of one row": (dict(block_table=torch.zeros(1, 4).int()), ValueError, r"block_table has shape \[1, 4\]"),
    "table of rank 1": (dict(block_table=torch.zeros(4).int()), ValueError, r"block_table must be \[B, pages"),
    "table as a list": (dict(block_table=[[0]]), TypeError, "block_table must be a torch.Tensor, got list"),
    "too few pages": (dict(block_table=PAGED["block_table"][:, :1]), ValueError, "the cache is full|expected 0..4"),
    "pages of values": (dict(v_cache=PAGED["v_cache"][:-1]), ValueError, "v_cache has shape"),
    "pages without slots": (
        dict(k_cache=PAGED["k_cache"][:, :, :0], v_cache=PAGED["v_cache"][:, :, :0]),
        ValueError,
        "k_cache has pages of 0 keys",
    ),
    "slopes of three sequences": (dict(alibi_slopes=torch.ones(3, 4)), ValueError, r"alibi_slopes has shape \[3, 4\]"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes has shape \[3\], expected \[4\]"),
    "slopes of float64": (dict(alibi_slopes=torch.ones(4).double()), TypeError, "alibi_slopes has dtype float64"),
    "sinks of rank 2": (dict(sinks=torch.ones(1, 4).double()), ValueError, r"sinks must be \[H\]"),
    "sinks": (dict(sinks=torch.ones(3).double()), ValueError, r"sinks has shape \[3\]"),
    "sinks of float32": (dict(sinks=torch.ones(4)), TypeError, "sinks has dtype float32"),
    "window": (dict(window=(-3, 0)), ValueError, r"window is \(-3, 0\)"),
    "window of one number": (dict(window=(3,)), ValueError, r"window is \(3,\)"),
    "window of floats": (dict(window=(3.0, 0)), TypeError, r"window is \(3.0, 0\)"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name):
    changed, error, words = REFUSED[name]
    arguments = PAGED | changed
    arguments |= {cache: arguments[cache].clone() for cache in ("k_cache", "v_cache")}
    with pytest.raises((error, IndexError) if name == "too few pages" else error, match=words) as caught:
        kvcache(**arguments)
    assert str(caught.value).startswith("attention_with_kvcache: ")
    for cache in ("k_cache", "v_cache"):
        assert_bitwise(arguments[cache], (PAGED | changed)[cache], name=f"{name}: {cache}")


def test_a_full_cache_of_pages():
    arguments = paged(inputs([8], T=1, spare=0, D=8), 4)
    arguments["cache_seqlens"] = int32(12)
    with pytest.raises(ValueError, match="the cache is full: sequence 0 holds 12 keys and 1 are appended"):
        kvcache(**arguments)


# ---- parts of keys that different threads sum

PARTED = {
    "plain": {},
    "window": dict(window=(1500, 0)),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 4.0, -math.inf])),
    "all": dict(window=(2100, 0), softcap=3.0, alibi_slopes=SLOPES / 64, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@of_the_cpu
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PARTED)
def test_threads_that_share_the_keys_change_no_bit(name, dtype, key_heads, with_threads):
    """With one thread the 2500 keys of a head are one task, else three parts, when its 4 or 2 rows are few: 2 are in
    all dtypes, but in float64 on base, and are dealt from 3 threads on. Parts begin at multiples of 1024 in a prefill,
    too."""
    assert "kPartKeys = 1024;" in (ROOT / "csrc/cpu/attention_memory.h").read_text()
    options = typed(PARTED[name], dtype)
    arguments = inputs([2499, 1030], T=1, D=16, H=4, G=key_heads, dtype=dtype)
    one = with_threads(1, lambda: run(arguments, **options))
    for threads in (2, 3, 4):
        shared = with_threads(threads, lambda: run(arguments, **options))
        assert_bitwise(shared["out"], one["out"], name=f"{threads} threads, out")
        assert_bitwise(shared["lse"], one["lse"], name=f"{threads} threads, lse")
    shared = with_threads(2, lambda: run(paged(arguments, 100), **options))
    assert_bitwise(shared["out"], one["out"], name="pages")
    for b, length in enumerate((2500, 1031)):
        k, v = (one[cache][b : b + 1, :, :length] for cache in ("k_cache", "v_cache"))
        q = draw(1, 4, length, 16, dtype=dtype, seed=9)
        q[:, :, -1] = arguments["q"][b, :, 0]
        out = pykern.attention(q, k, v, causal=True, **options)
        assert_bitwise(one["out"][b : b + 1], out[:, :, -1:], name=f"sequence {b}, prefill")
    compare(arguments, name, **options)
