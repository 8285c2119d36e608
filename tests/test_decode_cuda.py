"""attention_with_kvcache where its CUDA kernels have branches: parts of the keys, values that are not finite, sequences
that the host does not check. The bits are the CPU's promises, too."""

import math
import sys

import pytest
import torch
from dlpack_producers import Elsewhere
from test_decode import compare, inputs, int32, run
from test_decode_options import paged
from test_memory import far
from tools import DTYPES, constant, draw, unchecked

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close

kvcache = pykern.attention_with_kvcache
PAIR = (torch.float32, torch.bfloat16)
PART, SAME_SIZE = (constant("cuda/decode.cuh", name)[0] for name in ("kPartKeys", "kPartsOfASize"))
BLOCKS = constant("cuda/decode.cu", "kBlocks")[0]


def launched(call):
    """(launches, blocks) of call() on the emulator of the CUDA kernels; None elsewhere."""
    emulated = sys.modules.get("emulated")
    before = emulated and emulated.counts()
    result = call()
    return result, emulated and [b - a for a, b in zip(before, emulated.counts(), strict=True)]


def assert_same(ours, expected, name):
    for tensor in ("out", "lse"):
        assert_bitwise(ours[tensor], expected[tensor], name=f"{name}: {tensor}")


# ---- parts of the keys


@pytest.mark.parametrize("dtype", PAIR)
def test_blocks_that_share_the_keys_have_the_bits_of_one(dtype):
    """A sequence of several parts, alone: a block for each; among so many that a block takes its parts in order."""
    lengths = [3 * PART + 7, 0, PART + 1] + [2, 5, 1] * 90
    together = inputs(lengths, T=1, H=4, G=2, R=8, dtype=dtype)
    assert BLOCKS // (2 * len(lengths)) < 2
    everyone, seen = launched(lambda: run(together))
    if seen:
        assert seen[0] == 2 and seen[1] < 4 * len(lengths), "not one block for each key head"
    for b in (0, 1, 2, 3):
        alone = {n: x if n.startswith("rotary") else x[b : b + 1] for n, x in together.items()}
        result, seen = launched(lambda alone=alone: run(alone))
        if seen:
            assert seen[0] == 2 and seen[1] >= 2 * -(-max(lengths) // PART), "not a block for each part"
        for name, x in result.items():
            assert_bitwise(x, everyone[name][b : b + 1, :, : x.shape[2]], name=f"sequence {b}: {name}")


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("window", [None, (PART + 40, 0)])
def test_capacity_pages_and_padding_change_no_bit(dtype, window):
    plain = inputs([2 * PART + 77, 20], T=3, H=4, G=2, D=24, E=40, dtype=dtype)
    expected = run(plain, window=window)
    compare(plain, "plain", window=window)
    roomy = dict(plain)
    for name in ("k_cache", "v_cache"):
        roomy[name] = torch.nn.functional.pad(plain[name], (0, 0, 0, 9000), value=math.nan)
    assert_same(run(roomy, window=window), expected, "capacity")
    for page in (1, 16, 100, PART, 3 * PART):
        assert_same(run(paged(plain, page), window=window), expected, f"pages of {page}")
    pads = [5, 300]
    late = dict(plain, cache_seqlens=plain["cache_seqlens"] + int32(*pads))
    for name in ("k_cache", "v_cache"):
        late[name] = torch.nn.functional.pad(plain[name], (0, 0, max(pads), 0), value=math.nan)
        for b, n in enumerate(pads):
            late[name][b] = late[name][b].roll(n - max(pads), 1)
    assert_same(run(late, window=window, cache_leftpad=int32(*pads)), expected, "padding")


@pytest.mark.parametrize("dtype", PAIR)
def test_parts_of_larger_sizes(dtype):
    """Behind 64 parts of one size those of twice the size begin."""
    long = SAME_SIZE * PART + 3 * PART + 5
    arguments = inputs([long, 2], T=1, H=2, G=1, D=8, E=3, dtype=dtype)
    compare(arguments, "long")
    short = dict(arguments, **{n: arguments[n][1:] for n in ("q", "k", "v", "cache_seqlens")})
    short |= {n: arguments[n][1:, :, :3] for n in ("k_cache", "v_cache")}
    assert_bitwise(run(short)["out"], run(arguments)["out"][1:], name="a short sequence beside a long one")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_has_the_bits_of_its_steps(dtype):
    """Rows of other queries in the same block change nothing, nor does which parts a block begins with."""
    T, first = 21, PART - 9
    options = dict(window=(PART - 3, 0), alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]) / 16)
    chunk = inputs([first], T=T, H=4, G=2, R=8, dtype=dtype)
    whole = run(chunk, **options)
    step = dict(chunk, **{n: chunk[n].clone() for n in ("k_cache", "v_cache")})
    for t in range(T):
        one = {n: chunk[n][:, :, t : t + 1] for n in ("q", "k", "v")} | dict(cache_seqlens=int32(first + t))
        out, lse = kvcache(**(step | one), return_lse=True, **options)
        assert_bitwise(out, whole["out"][:, :, t : t + 1], name=f"step {t}")
        assert_bitwise(lse, whole["lse"][:, :, t : t + 1], name=f"lse of step {t}")


# ---- what a row does not see


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_reach_the_rows_that_see_them(dtype, value):
    """Among the new ones, which some queries see; in front of a window, where some see one; at both ends of tiles."""
    arguments = inputs([70, 30], T=5, H=6, G=2, D=24, E=40, dtype=dtype)
    options = dict(window=(20, 0))
    clean = run(arguments, **options)["out"]
    arguments["v"][0, 1, 3, 7] = value  # key 73: seen by queries 3 and 4
    arguments["v_cache"][0, 0, 51, 0] = value  # queries 0 and 1: their windows begin at 50 and 51
    arguments["v_cache"][1, :, :9] = value  # nobody's
    arguments["k_cache"][1, :, :9] = value
    odd = torch.zeros_like(clean, dtype=torch.bool)
    odd[0, 3:, 3:, 7] = odd[0, :3, :2, 0] = True
    found = run(arguments, **options)["out"]
    assert (found[odd].isnan() if math.isnan(value) else found[odd] == value).all()
    assert_bitwise(found[~odd], clean[~odd])


@pytest.mark.parametrize("dtype", PAIR)
def test_offsets_beyond_32_bits(dtype):
    """Sequences, or pages, heads and rows of everything further apart than 2^31 numbers."""
    arguments = inputs([2, 1], T=1, N=1, D=16, H=2, G=2, R=8, spare=0, dtype=dtype)
    expected = run(arguments)
    for kind in (arguments, paged(arguments, 2)):
        apart = {name: far(x) if x.dim() > 1 else x for name, x in kind.items()}
        out, lse = kvcache(**apart, return_lse=True)
        assert_same(dict(out=out, lse=lse), expected, "far apart")


# ---- sequences that the host does not check


def on_a_gpu(device, arguments, **options):
    """out, lse and both caches of a call that the host does not check."""
    shape = arguments["q"].shape[:3]
    out = arguments["q"].new_full((*shape, arguments["v_cache"].shape[3]), 7.0)
    lse = torch.full(shape, 7.0, dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
    results = dict(out=out, lse=lse, k_cache=arguments["k_cache"].clone(), v_cache=arguments["v_cache"].clone())
    move = Elsewhere if device == "emulator" else lambda x: x.cuda()
    given = {name: move(x) for name, x in (arguments | results).items()}
    names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "rotary_cos", "rotary_sin", "out", "lse")
    more = {name: given[name] for name in ("cache_leftpad", "block_table") if name in given}
    options = dict(causal=True, scale=0.25, rotary_interleaved=False) | options | more
    _C.attention_with_kvcache(*(given.get(name) for name in names), **options)
    return results if device == "emulator" else {name: given[name].cpu() for name in results}


OUTSIDE = {
    "a negative length": lambda a: a["cache_seqlens"].fill_(-1),
    "the least length": lambda a: a["cache_seqlens"].fill_(-(2**31)),
    "a length behind the cache": lambda a: a["cache_seqlens"].fill_(2**31 - 1),
    "no room for the new keys": lambda a: a["cache_seqlens"].fill_(a["capacity"] - 1),
    "negative padding": lambda a: a["cache_leftpad"].fill_(-1),
    "padding behind the length": lambda a: a["cache_leftpad"].fill_(31),
    "a position outside of the table": lambda a: a["cache_seqlens"].fill_(a["positions"] - 1),
    "a negative page": lambda a: a["block_table"][0, 0].fill_(-1),
    "a page too far": lambda a: a["block_table"][0, 2].fill_(a["pages"]),
    "a page for a new key": lambda a: a["block_table"][0, 3].fill_(2**30),
}


@unchecked
@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_sequence_out_of_range_is_nan_and_appends_nothing(kind, device):
    for dtype in DTYPES:
        arguments = inputs([30, 30, 5], T=2, H=4, G=2, D=24, E=40, R=16, spare=12, dtype=dtype)
        for name in ("rotary_cos", "rotary_sin"):
            arguments[name] = arguments[name][:40]
        arguments["cache_leftpad"] = int32(2, 0, 1)
        pages = "page" in kind
        if pages:
            arguments = paged(arguments, 10)
        expected = on_a_gpu(device, arguments)
        k_cache, table = arguments["k_cache"], arguments.get("block_table")
        sizes = dict(capacity=k_cache.shape[2], positions=40, pages=k_cache.shape[0])
        counts = [name for name in ("cache_seqlens", "cache_leftpad", "block_table") if name in arguments]
        broken = arguments | {name: arguments[name].clone() for name in counts}
        OUTSIDE[kind](sizes | {name: broken[name][1:2] for name in counts})
        found = on_a_gpu(device, broken)
        for tensor in ("out", "lse"):
            assert found[tensor][1].isnan().all(), f"{kind}: {tensor} {dtype}"
            for b in (0, 2):
                assert_bitwise(found[tensor][b], expected[tensor][b], name=f"{kind}: {tensor} of sequence {b}")
        for tensor in ("k_cache", "v_cache"):
            own = table[1].long()[:4] if pages else slice(1, 2)
            assert_bitwise(found[tensor][own], arguments[tensor][own], name=f"{kind}: {tensor} of the sequence")
            rest = torch.ones(k_cache.shape[0], dtype=torch.bool)
            rest[own] = False
            assert_bitwise(found[tensor][rest], expected[tensor][rest], name=f"{kind}: {tensor} of the others")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_with_kvcache_on_a_gpu(causal):
    """The host waits for nothing, not for the positions either: a sequence that leaves the rotary table is NaN."""
    q, k, v = (draw(3, 2, heads, 16, seed=i).bfloat16() for i, heads in enumerate((4, 2, 2)))
    caches = [draw(3, 40, 2, 16, seed=i).bfloat16() for i in (3, 4)]
    angles, lengths = draw(30, 4, seed=5), int32(7, 29, 28)
    rotary = [angles.cos().bfloat16(), angles.sin().bfloat16()]
    fits = [x[::2] for x in (q, *caches, k, v)]
    expected = pykern.flash_attn_with_kvcache(*fits, *rotary, lengths[::2], causal=causal)
    given = [x.cuda() for x in (q, *caches, k, v, *rotary, lengths)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = pykern.flash_attn_with_kvcache(*given, causal=causal)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out[1].isnan().all()
    assert_close(out[::2].cpu(), expected.double(), name="flash_attn_with_kvcache")
    assert_bitwise(given[1][1].cpu(), caches[0][1], name="the cache of the sequence that is out of range")
