"""attention_with_kvcache with windows, caps, slopes, sinks and pages: the formula, the bits of a prefill, refusals."""

import math

import pytest
import torch
from test_decode import compare, inputs, int32, run
from tools import DTYPES, draw

import pykern
from pykern.testing import assert_bitwise

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
QUERIES = (1, 3, 20, 70)  # 2 heads a key head: few rows, and many


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


PAGED = paged(inputs([5, 9], T=1, D=8, H=4, G=2), 4)
REFUSED = {
    "page out of range": (dict(block_table=torch.full((2, 4), 100).int()), IndexError, r"block_table\[0, 0\] is 100"),
    "negative page": (dict(block_table=torch.full((2, 4), -1).int()), IndexError, r"block_table\[0, 0\] is -1"),
    "table of int64": (dict(block_table=torch.zeros(2, 4).long()), TypeError, "block_table has dtype int64"),
    "table of one row": (dict(block_table=torch.zeros(1, 4).int()), ValueError, r"block_table has shape \[1, 4\]"),
    "table of rank 1": (dict(block_table=torch.zeros(4).int()), ValueError, r"block_table must be \[B, pages"),
    "table as a list": (dict(block_table=[[0]]), TypeError, "block_table must be a torch.Tensor, got list"),
    "too few pages": (dict(block_table=PAGED["block_table"][:, :1]), ValueError, "the cache is full|expected 0..4"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes has shape \[3\], expected \[4\]"),
    "slopes of float64": (dict(alibi_slopes=torch.ones(4).double()), TypeError, "alibi_slopes has dtype float64"),
    "sinks": (dict(sinks=torch.ones(3).double()), ValueError, r"sinks has shape \[3\]"),
    "sinks of float32": (dict(sinks=torch.ones(4)), TypeError, "sinks has dtype float32"),
    "window": (dict(window=(-3, 0)), ValueError, r"window is \(-3, 0\)"),
    "window of floats": (dict(window=(3.0, 0)), TypeError, r"window is \(3.0, 0\)"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name):
    changed, error, words = REFUSED[name]
    arguments = PAGED | dict(k_cache=PAGED["k_cache"].clone(), v_cache=PAGED["v_cache"].clone())
    with pytest.raises((error, IndexError) if name == "too few pages" else error, match=words) as caught:
        kvcache(**(arguments | changed))
    assert str(caught.value).startswith("attention_with_kvcache: ")
    for cache in ("k_cache", "v_cache"):
        assert_bitwise(arguments[cache], PAGED[cache], name=f"{name}: {cache}")


def test_a_full_cache_of_pages():
    arguments = paged(inputs([8], T=1, spare=0, D=8), 4)
    arguments["cache_seqlens"] = int32(12)
    with pytest.raises(ValueError, match="the cache is full: sequence 0 holds 12 keys and 1 are appended"):
        kvcache(**arguments)
