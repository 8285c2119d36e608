"""attention: formula, gradients, shapes, strides and bits. Masks, bias and NaN: test_attention_masks.py."""

from types import SimpleNamespace

import pytest
import torch
from attention_tools import both, compare, inputs, named
from hypothesis import given
from hypothesis import strategies as st
from tools import DTYPES, EMULATED, PAIRED, TILE_ROWS, VIEWS, constant, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close, ratios, reference
from pykern.testing.cases import masked_sdpa
from pykern.testing.compare import Tolerance

KEYS = constant("cpu/attention_tile.h", "kKeys")[0]
BLOCK_ROWS = constant("cpu/attention_memory.h", "kBlockRows")[0]
CHUNK_ROWS = constant("cpu/attention_weights.h", "kChunkRows")[0]
CHAINS = constant("cpu/attention_backward.cpp", "kChains")[0]

HEAD_SIZES = [1, 7, 33, 64, 80, 96, 112, 128, 256]


# ---- named cases, each with what it must reach


def facts(T, S, D=16, E=None, B=1, H=1, G=None, causal=False):
    G = G or H
    rows, tiles = H // G * T, -(-S // KEYS)
    return SimpleNamespace(
        rows=rows,
        blocks=-(-rows // BLOCK_ROWS),
        heads=H // G,
        tiles=tiles,
        strip_tail=rows % TILE_ROWS,
        key_tail=S % KEYS,
        chunks=-(-T // CHUNK_ROWS),
        chained=B * G < CHAINS and tiles > 1,
        longest_chain=-(-tiles // CHAINS),
        dead=max(T - S, 0) if causal else 0,
    )


CASES = {
    "one query, one key": (dict(T=1, S=1), lambda f: f.rows == f.tiles == 1),
    "no key at all": (dict(T=3, S=0), lambda f: f.tiles == 0),
    "no query": (dict(T=0, S=5), lambda f: f.rows == 0),
    "whole strips and whole tiles": (dict(T=24, S=128), lambda f: f.strip_tail == f.key_tail == 0 and f.tiles == 2),
    "a strip spans two heads": (dict(T=7, S=20, H=2, G=1), lambda f: f.heads == 2 and 7 % TILE_ROWS),
    "a block spans two heads": (dict(T=70, S=9, H=4, G=2), lambda f: f.blocks == 2 and BLOCK_ROWS % 70),
    "a block of one row": (dict(T=97, S=40), lambda f: f.blocks == 2 and f.rows % BLOCK_ROWS == 1),
    "a chunk of one row": (dict(T=97, S=65, causal=True), lambda f: f.chunks == 2 and f.key_tail == 1),
    "causal, earlier blocks skip tiles": (dict(T=200, S=200, causal=True), lambda f: f.blocks == 3 and f.tiles == 4),
    "causal, queries are a suffix": (dict(T=8, S=133, causal=True), lambda f: f.dead == 0 and f.tiles == 3),
    "causal, first queries see nothing": (dict(T=133, S=70, causal=True), lambda f: f.dead == 63 and f.blocks == 2),
    "causal, a whole block sees nothing": (dict(T=130, S=10, causal=True), lambda f: f.dead > BLOCK_ROWS),
    "one query, many keys": (dict(T=1, S=300), lambda f: f.tiles == 5 and f.rows == 1),
    "gradient of q in one chain": (dict(T=20, S=70, B=2, H=4), lambda f: not f.chained and f.longest_chain == 1),
    "heads in chains of one tile": (dict(T=20, S=150, B=2, H=4), lambda f: not f.chained and f.tiles > 2),
    "heads in chains of two tiles": (dict(T=9, S=600, H=8), lambda f: not f.chained and f.longest_chain == 2),
    "few heads, chains shared": (dict(T=20, S=150, H=2), lambda f: f.chained and f.longest_chain == 1),
    "few heads, chains of two tiles": (dict(T=20, S=600), lambda f: f.chained and f.longest_chain == 2),
    "few heads, causal chains": (dict(T=300, S=590, H=3, G=1, causal=True), lambda f: f.chained and f.chunks == 4),
    "multi-query": (dict(T=5, S=33, B=2, H=6, G=1), lambda f: f.heads == 6),
    "values narrower than keys": (dict(T=13, S=70, D=40, E=3), lambda f: f.rows == 13),
    "values wider than keys": (dict(T=13, S=70, D=3, E=72), lambda f: f.rows == 13),
    "values of size 0": (dict(T=3, S=5, D=4, E=0), lambda f: f.rows == 3),
    "no batch": (dict(T=3, S=5, B=0), lambda f: f.heads == 1),
}


@pytest.mark.parametrize("name", CASES)
def test_named_case(name):
    shape, reached = CASES[name]
    assert reached(facts(**shape)), "the case no longer reaches what it is named after"
    options = dict(shape)
    causal = options.pop("causal", False)
    for dtype in DTYPES:
        tensors, dout = inputs(**options, dtype=dtype)
        compare(tensors, dout, dlse=draw(*dout.shape[:3], seed=9), name=f"{name} {dtype}", causal=causal)


@pytest.mark.parametrize("G", [0, 2])
def test_no_query_heads(G):
    """Nothing to compute: the gradients of k, v and of a bias without heads are zeros."""
    tensors = dict(q=draw(2, 0, 3, 4), k=draw(2, G, 5, 4), v=draw(2, G, 5, 6), bias=draw(3, 5))
    results = with_gradients(named(pykern.attention), tensors, dict(out=draw(2, 0, 3, 6)))
    assert results["out"].shape == (2, 0, 3, 6) and results["lse"].shape == (2, 0, 3)
    for name in ("dk", "dv", "dbias"):
        assert results[name].shape == tensors[name[1:]].shape and (results[name] == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_height_of_a_strip(dtype):
    for T in range(1, TILE_ROWS + 2):
        tensors, dout = inputs(T, 70, D=9, E=5, dtype=dtype, seed=T)
        compare(tensors, dout, name=f"T={T}", causal=T % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_head_sizes(D, dtype):
    """Odd sizes end in half a pair of bfloat16; a size is no multiple of a vector, a panel, or is both."""
    E = HEAD_SIZES[(HEAD_SIZES.index(D) + 4) % len(HEAD_SIZES)]
    tensors, dout = inputs(14, 70, D=D, E=E, H=2, G=1, dtype=dtype, seed=D)
    compare(tensors, dout, name=f"D={D}, E={E}")


def test_all_numbers_of_queries_and_keys():
    for T in range(1, 131):
        S = T * 37 % 131
        tensors, dout = inputs(T, S, D=8, seed=T, dtype=torch.float32)
        compare(tensors, dout, name=f"T={T}, S={S}", causal=T % 2 == 0)


# ---- gradients


def small(T, S, **shape):
    tensors, _ = inputs(T, S, **shape)
    return {name: x.requires_grad_() for name, x in tensors.items()}


GRADCHECKS = {
    "plain": (dict(T=4, S=5, D=3), {}),
    "causal, T < S": (dict(T=3, S=6, D=3), dict(causal=True)),
    "causal, T = S": (dict(T=5, S=5, D=3), dict(causal=True)),
    "causal, T > S": (dict(T=6, S=4, D=3), dict(causal=True)),
    "grouped heads": (dict(T=3, S=4, D=2, B=2, H=4, G=2), {}),
    "multi-query, causal": (dict(T=3, S=4, D=2, H=3, G=1), dict(causal=True)),
    "values of another size": (dict(T=3, S=4, D=2, E=5), {}),
    "scale": (dict(T=3, S=4, D=2), dict(scale=-0.7)),
    "scale 0": (dict(T=3, S=4, D=2), dict(scale=0.0)),
    "two tiles": (dict(T=3, S=KEYS + 2, D=2), dict(causal=True)),
    "two chunks": (dict(T=CHUNK_ROWS + 1, S=2, D=1), {}),
    "two tiles in a chain": (dict(T=2, S=KEYS * CHAINS + 1, D=1), {}),
    "eight heads": (dict(T=2, S=KEYS + 1, D=1, B=2, H=4), dict(causal=True)),
}


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, with_lse):
    shape, options = GRADCHECKS[name]
    tensors = small(**shape)

    def f(*args):
        out, lse = pykern.attention(*args, return_lse=True, **options)
        return (out, lse.masked_fill(lse.isneginf(), 0.0)) if with_lse else out

    assert torch.autograd.gradcheck(f, tuple(tensors.values()), atol=1e-7, rtol=1e-6)


def test_gradient_of_lse_alone():
    """out takes no part: the gradient that reaches it is None."""
    tensors, _ = inputs(5, 70, D=4)
    dlse = dict(lse=draw(1, 1, 5))
    ours = with_gradients(named(pykern.attention), tensors, dlse)
    v = tensors.pop("v")
    exact = with_gradients(named(reference.attention, v=v), tensors, dlse)
    for name in ("dq", "dk"):
        assert_close(ours[name], exact[name], name=name, gradient=True)
    assert (ours["dv"] == 0).all()


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("attention", dtype)


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_the_rival_of_the_ratio_rule_is_fused(dtype):
    tensors, _ = inputs(40, 90, D=80, B=2, H=4, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in tensors.values())
    bias, mask = draw(4, 40, 90, dtype=dtype), torch.ones(40, 90, dtype=torch.bool)
    assert "FlashAttention" in masked_sdpa(q, k, v, bias, mask).grad_fn.name()
    assert "FlashAttention" not in masked_sdpa(q, k, v, bias.requires_grad_(), mask).grad_fn.name()


def test_large_scores_stay_finite():
    """Scores up to 1e6, exact in float32, in rising and falling order: the maximum moves in every tile, or never."""
    q, v = torch.ones(1, 1, 1, 1), draw(1, 1, 300, 4, dtype=torch.float32)
    for scores in (torch.arange(300.0), 300 - torch.arange(300.0), torch.arange(300.0) * 3000):
        tensors = dict(q=q, k=scores.view(1, 1, 300, 1), v=v)
        ours, exact = both(tensors, draw(1, 1, 1, 4, dtype=torch.float32), scale=1.0)
        for name in ("out", "lse"):
            assert_close(ours[name], exact[name], name=name)
        # P = exp(score - lse): the rounding of lse, of its own size, is a relative error of the weights
        rounding = exact["lse"].max().item() * torch.finfo(torch.float32).eps / 2
        assert_close(ours["dv"], exact["dv"], name="dv", tolerance=Tolerance(2e-6 + rounding, 2e-6, "see above"))


def test_scale():
    tensors, dout = inputs(6, 70, D=5, dtype=torch.float32)
    mean = pykern.attention(**tensors, scale=0.0)
    assert_close(mean, tensors["v"].double().mean(2, keepdim=True).expand(1, 1, 6, 5), name="scale 0 is the mean")
    best = pykern.attention(**tensors, scale=1e30)  # all the weight on the largest score
    top = (tensors["q"] @ tensors["k"].mT).argmax(-1)[0, 0]
    assert_bitwise(best[0, 0], tensors["v"][0, 0, top], name="a huge scale picks one key")
    assert_bitwise(pykern.attention(**tensors), pykern.attention(**tensors, scale=5**-0.5), name="the default scale")
    compare(tensors, dout, scale=-1.5, name="negative scale")


# ---- shapes and strides


@given(
    T=st.integers(1, 130),
    S=st.integers(0, 130),
    D=st.sampled_from([1, 3, 7, 16, 33, 80]),
    E=st.sampled_from([1, 5, 32, 65]),
    B=st.integers(1, 2),
    G=st.integers(1, 3),
    heads=st.integers(1, 3),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    views=st.tuples(*[st.sampled_from([*VIEWS])] * 4),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(T, S, D, E, B, G, heads, causal, dtype, views, seed):
    packed, dout = inputs(T, S, D, E, B, G * heads, G, dtype, seed)
    compare(packed, dout, causal=causal)
    strided = {name: VIEWS[view](x) for (name, x), view in zip(packed.items(), views, strict=False)}
    for name, x in packed.items():
        assert_bitwise(strided[name], x, name="the view itself")
    first = with_gradients(named(pykern.attention, causal=causal), packed, dict(out=dout))
    again = with_gradients(named(pykern.attention, causal=causal), strided, dict(out=VIEWS[views[3]](dout)))
    for name, x in first.items():
        assert_bitwise(x, again[name], name=f"{name} of {views}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_one_packed_projection(dtype):
    """q, k, v as a model makes them: heads inside a row of [B, T, (H + 2 G) D]; out comes in that layout, too."""
    B, T, H, G, D = 2, 37, 4, 2, 24
    qkv = draw(B, T, (H + 2 * G) * D, dtype=dtype).requires_grad_()
    views = [x.unflatten(2, (-1, D)).transpose(1, 2) for x in qkv.split([H * D, G * D, G * D], 2)]
    out = pykern.attention(*views, causal=True)
    assert out.transpose(1, 2).is_contiguous()
    packed = [x.detach().contiguous().requires_grad_() for x in views]
    expected = pykern.attention(*packed, causal=True)
    assert_bitwise(out, expected)
    dout = draw(B, H, T, D, dtype=dtype, seed=1)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    gradients = torch.autograd.grad(expected, packed, dout)
    assert_bitwise(dqkv, torch.cat([x.transpose(1, 2).flatten(2) for x in gradients], 2))


def test_expanded_inputs():
    """Stride 0 over batch, heads, queries or keys; gradients are summed by torch."""
    tensors, dout = inputs(9, 70, D=8, dtype=torch.float32)
    q, k, v = (tensors[name] for name in "qkv")
    cases = {
        "batch and heads": (q.expand(2, 4, 9, 8), k.expand(2, 2, 70, 8), v.expand(2, 2, 70, 8)),
        "one query": (q[:, :, :1].expand(1, 1, 9, 8), k, v),
        "one key": (q, k[:, :, :1].expand(1, 1, 70, 8), v),
        "one number": (q[..., :1].expand(1, 1, 9, 8), k, v[:, :, :1, :1].expand(1, 1, 70, 8)),
    }
    for name, views in cases.items():
        B, H = views[0].shape[:2]
        expanded, packed = (
            with_gradients(named(pykern.attention), dict(zip("qkv", x, strict=True)), dict(out=dout.expand(B, H, 9, 8)))
            for x in (views, [x.contiguous() for x in views])
        )
        for tensor, x in packed.items():
            assert_bitwise(x, expanded[tensor], name=f"{name}: {tensor}")


# ---- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [dict(T=150, S=300, H=3, G=1), dict(T=40, S=600, B=2, H=8, G=4)])
def test_same_bits_for_any_thread_count(shape, dtype, with_threads):
    tensors, dout = inputs(**shape, D=20, dtype=dtype)
    tensors["bias"] = draw(shape["H"], 1, shape["S"], dtype=dtype, seed=7)
    f = named(pykern.attention, causal=True)
    first = with_threads(1, lambda: with_gradients(f, tensors, dict(out=dout)))
    for n in (2, 3):
        again = with_threads(n, lambda: with_gradients(f, tensors, dict(out=dout)))
        for name, x in first.items():
            assert_bitwise(x, again[name], name=f"{n} threads, {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [300, 700])
def test_same_bits_for_any_batch_neighbours(S, dtype):
    """Nine heads of keys are nine tasks, one alone is shared among chains (of one tile, of two): all results agree."""
    tensors, dout = inputs(50, S, D=10, B=9, H=2, G=1, dtype=dtype)
    f = named(pykern.attention, causal=True)
    together = with_gradients(f, tensors, dict(out=dout))
    alone = with_gradients(f, {name: x[4:5].clone() for name, x in tensors.items()}, dict(out=dout[4:5]))
    for name, x in together.items():
        assert_bitwise(x[4:5], alone[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [1, 59, 700])
def test_same_bits_for_any_padding(padding, dtype):
    """Masked keys behind the others, up to a NaN in each, change nothing: not even the gradient of q."""
    S = 70
    tensors, dout = inputs(30, S, D=10, H=4, G=2, dtype=dtype)
    plain = with_gradients(named(pykern.attention), tensors, dict(out=dout))
    padded = dict(tensors)
    for name in ("k", "v"):
        padded[name] = torch.cat([tensors[name], torch.full((1, 2, padding, 10), torch.nan, dtype=dtype)], 2)
    mask = torch.arange(S + padding) < S
    again = with_gradients(named(pykern.attention, mask=mask), padded, dict(out=dout))
    for name, x in plain.items():
        got = again[name][:, :, :S] if name in ("dk", "dv") else again[name]
        assert_bitwise(x, got, name=name)
    assert (again["dk"][:, :, S:] == 0).all() and (again["dv"][:, :, S:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [1, 59, 300])
def test_same_bits_for_any_padding_of_queries(padding, dtype):
    T = 40
    tensors, dout = inputs(T, 90, D=10, H=4, G=2, dtype=dtype)
    plain = with_gradients(named(pykern.attention), tensors, dict(out=dout))
    longer = tensors | dict(q=torch.cat([tensors["q"], torch.full((1, 4, padding, 10), torch.nan, dtype=dtype)], 2))
    mask = (torch.arange(T + padding) < T)[:, None]
    dout = torch.cat([dout, torch.full((1, 4, padding, 10), torch.nan, dtype=dtype)], 2)
    for name, x in with_gradients(named(pykern.attention, mask=mask), longer, dict(out=dout)).items():
        assert_bitwise(x if name in ("dk", "dv") else x[:, :, :T], plain[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_chunks_of_queries(dtype):
    tensors, _ = inputs(150, 150, D=20, H=4, G=2, dtype=dtype)
    q, k, v = tensors.values()
    whole, lse = pykern.attention(q, k, v, causal=True, return_lse=True)
    for first, last in ((0, 1), (0, 13), (17, 63), (63, 65), (64, 150), (149, 150)):
        out, part = pykern.attention(q[:, :, first:last], k[:, :, :last], v[:, :, :last], causal=True, return_lse=True)
        assert_bitwise(out, whole[:, :, first:last], name=f"queries {first} to {last}")
        assert_bitwise(part, lse[:, :, first:last], name=f"lse of queries {first} to {last}")
    for i in range(150):  # decoding, one query at a time
        step = pykern.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True)
        assert_bitwise(step[:, :, 0], whole[:, :, i], name=f"query {i} alone")
    rows = pykern.attention(q[:, :, 5:9], k, v)
    assert_bitwise(rows, pykern.attention(q, k, v)[:, :, 5:9], name="not causal")


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_heads_are_repeated_heads(dtype):
    tensors, dout = inputs(30, 90, D=12, H=6, G=2, dtype=dtype)
    grouped = with_gradients(named(pykern.attention), tensors, dict(out=dout))
    repeated = {name: x if name == "q" else x.repeat_interleave(3, 1) for name, x in tensors.items()}
    repeated = with_gradients(named(pykern.attention), repeated, dict(out=dout))
    for name in ("out", "lse", "dq"):
        assert_bitwise(grouped[name], repeated[name], name=name)


def test_bfloat16_reaches_the_pairs_where_the_processor_has_them():
    """An ISA that multiplies pairs, or a tensor core, rounds the weights to bfloat16 before they meet v."""
    k = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).bfloat16()
    v = torch.tensor([256.0, -94.0]).view(1, 1, 2, 1).bfloat16()
    out = pykern.attention(torch.ones(1, 1, 1, 1).bfloat16(), k, v, scale=1.0).item()
    weight = torch.tensor(-1.0, dtype=torch.float64).exp()  # 0.36788; 0.3671875 = 94 / 256 in bfloat16
    assert out == (0.0 if PAIRED or EMULATED else ((256 * weight - 94) / (1 + weight)).bfloat16().item())
