"""The attention references: against a loop over plain Python numbers, and where nothing or NaN is seen."""

import itertools
import math

import pytest
import torch

from pykern.testing import assert_bitwise, assert_close, reference

pytestmark = pytest.mark.one_isa

B, H, G, T, S, D, E = 2, 4, 2, 4, 6, 3, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bools(*shape, seed=0, share=0.7):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


Q, K, V = draw(B, H, T, D), draw(B, G, S, D, seed=1), draw(B, G, S, E, seed=2)
EVERYTHING = dict(
    mask=bools(B, 1, T, S),
    bias=draw(H, 1, S, seed=3),
    window=(2, 1),
    scale=0.7,
    softcap=1.5,
    alibi_slopes=draw(B, H, seed=4).abs(),
    sinks=draw(H, seed=5),
    dropout_p=0.25,
    keep=bools(B, H, T, S, seed=6, share=0.75),
)


def loop(q, k, v, **options):
    """The formula of one row at a time, with math's functions: (out, lse, P)."""
    get = options.get
    (B, H, T, D), (G, S, E) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    left, right = get("window") or (None, None)
    out, lse, weights = q.new_zeros(B, H, T, E), q.new_zeros(B, H, T), q.new_zeros(B, H, T, S)
    scale, cap = get("scale", D**-0.5), get("softcap")
    mask = options.get("mask", torch.ones(1, dtype=torch.bool)).expand(B, H, T, S)
    bias = options.get("bias", torch.zeros(1)).expand(B, H, T, S)
    slopes = options.get("alibi_slopes", torch.zeros(1)).expand(B, H)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        d, g, scores = S - T + t, h * G // H, {}
        for s in range(S):
            inside = (left is None or s >= d - left) and (right is None or s <= d + right)
            if not (inside and mask[b, h, t, s] and (s <= d or not get("causal"))):
                continue
            x = scale * sum((q[b, h, t, i] * k[b, g, s, i]).item() for i in range(D))
            x = x if cap is None else cap * math.tanh(x / cap)
            scores[s] = x - slopes[b, h].item() * abs(s - d) + bias[b, h, t, s].item()
        total = sum(math.exp(x) for x in scores.values())
        total += math.exp(options["sinks"][h]) if "sinks" in options else 0.0
        lse[b, h, t] = math.log(total) if total else -math.inf
        for s, x in scores.items():
            weights[b, h, t, s] = math.exp(x) / total
            factor = get("keep")[b, h, t, s].item() / (1 - options["dropout_p"]) if "keep" in options else 1.0
            out[b, h, t] += weights[b, h, t, s] * factor * v[b, g, s]
    return out, lse, weights


CASES = {name: (name,) for name in ("mask", "bias", "window", "scale", "softcap", "alibi_slopes", "sinks")}
CASES |= {"nothing": (), "dropout": ("dropout_p", "keep"), "everything": tuple(EVERYTHING)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_loop(name, causal):
    options = {option: EVERYTHING[option] for option in CASES[name]} | dict(causal=causal)
    for query in (Q, draw(B, H, S + 2, D, seed=7)):  # the second has rows that see nothing where it is causal
        if query is not Q:
            options = {n: x for n, x in options.items() if n not in ("mask", "keep")}
        out, lse, weights = loop(query, K, V, **options)
        assert_close(reference.attention(query, K, V, **options), out, name="out")
        assert_close(reference.attention(query, K, V, **options, return_lse=True)[1], lse, name="lse")
        options = {n: x for n, x in options.items() if n not in ("keep", "dropout_p")}
        rows = torch.tensor([3, 0, 3])
        assert_close(reference.attention_weights(query, K, **options), weights, name="weights")
        assert_close(reference.attention_weights(query, K, lse, **options), weights, name="weights by lse")
        assert_close(reference.attention_weights(query, K, rows=rows, **options), weights[:, :, rows], name="rows")


def test_every_option_matters():
    base = reference.attention(Q, K, V)
    for name, options in CASES.items():
        changed = reference.attention(Q, K, V, **{option: EVERYTHING[option] for option in options})
        assert torch.equal(base, changed) == (name == "nothing"), name


def test_slopes_of_all_sequences():
    slopes = draw(H).abs()
    assert_bitwise(
        reference.attention(Q, K, V, alibi_slopes=slopes),
        reference.attention(Q, K, V, alibi_slopes=slopes.expand(B, H)),
    )


def test_float64_whatever_the_dtype():
    options = {n: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in EVERYTHING.items()}
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    exact = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    assert_bitwise(
        reference.attention(q, k, v, **options), reference.attention(q.double(), k.double(), v.double(), **exact)
    )
    own = reference.in_own_dtype(reference.attention)(q, k, v, **options, return_lse=True)
    assert [x.dtype for x in own] == [torch.bfloat16] * 2
    lists = [q.double(), q.double()], [draw(B, H, T), draw(B, H, T, seed=1)]
    merged = reference.merge_attention([q, q], lists[1])
    assert_bitwise(merged[0], reference.merge_attention(*lists)[0])


def test_gradients_of_the_formula():
    floats = dict(q=Q, k=K, v=V, bias=EVERYTHING["bias"], sinks=EVERYTHING["sinks"])
    rest = {name: x for name, x in EVERYTHING.items() if name not in floats}

    def f(q, k, v, bias, sinks):
        return reference.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **rest)

    assert torch.autograd.gradcheck(f, tuple(x.clone().requires_grad_() for x in floats.values()))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_seen_has_no_effect(poison):
    """Not on a result, not on a gradient; and a row that sees nothing is 0, its lse -inf or the sink."""
    mask = EVERYTHING["mask"].clone()
    mask[:, :, 1] = False
    mask[..., 4] = False
    for name in ("without sinks", "with sinks"):
        options = {n: x for n, x in EVERYTHING.items() if n not in ("mask", "bias", "sinks")} | dict(mask=mask)
        results = []
        for value in (0.5, poison):
            inputs = dict(q=Q.clone(), k=K.clone(), v=V.clone(), bias=draw(T, S, seed=3))
            inputs["q"][:, :, 1] = inputs["k"][:, :, 4] = inputs["v"][:, :, 4] = value
            inputs["bias"][1] = inputs["bias"][:, 4] = value
            inputs |= dict(sinks=EVERYTHING["sinks"].clone()) if name == "with sinks" else {}
            leaves = [x.requires_grad_() for x in inputs.values()]
            out, lse = reference.attention(**inputs, **options, return_lse=True)
            gradients = torch.autograd.grad(
                [out, lse], leaves, [draw(*out.shape, seed=8), torch.ones(B, H, T).double()]
            )
            results.append((out.detach(), lse.detach(), *gradients))
        for clean, poisoned in zip(*results, strict=True):
            assert_close(poisoned, clean, name=name)
        out, lse, dq, dk, dv, dbias, *_ = results[1]
        dead = torch.tensor(-math.inf).expand(H) if name == "without sinks" else EVERYTHING["sinks"]
        assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == dead).all()
        assert (dq[:, :, 1] == 0).all() and (dbias[1] == 0).all() and (dbias[:, 4] == 0).all()
        assert (dk[:, :, 4] == 0).all() and (dv[:, :, 4] == 0).all()


def test_no_keys_and_a_sink():
    out, lse = reference.attention(Q, K[:, :, :0], V[:, :, :0], sinks=EVERYTHING["sinks"], return_lse=True)
    assert (out == 0).all() and torch.equal(lse, EVERYTHING["sinks"][:, None].expand(B, H, T))


def test_all_is_dropped():
    nothing = torch.zeros(B, H, T, S, dtype=torch.bool)
    out, lse = reference.attention(Q, K, V, dropout_p=1.0, keep=nothing, return_lse=True)
    assert out.dtype == torch.float64 and (out == 0).all()
    assert_bitwise(lse, reference.attention(Q, K, V, return_lse=True)[1])


def test_ragged_is_one_sequence_after_the_other():
    cu_q, cu_k = torch.tensor([0, 3, 3, 4]), torch.tensor([0, 2, 5, 5])
    q, k, v = draw(4, H, D), draw(5, G, D, seed=1), draw(5, G, E, seed=2)
    options = dict(window=(1, 0), softcap=2.0, sinks=EVERYTHING["sinks"], dropout_p=0.5)
    slopes, keep = draw(3, H, seed=3).abs(), bools(3, H, 3, 3, share=0.5)
    out, lse = reference.attention(
        *(q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, alibi_slopes=slopes, keep=keep, return_lse=True, **options
    )
    assert out.shape == (4, H, E) and lse.shape == (H, 4)
    rows = [x.transpose(0, 1)[None] for x in (q[:3], k[:2], v[:2])]
    first = reference.attention(
        *rows, alibi_slopes=slopes[:1], keep=keep[:1, :, :, :2], return_lse=True, causal=True, **options
    )
    assert_close(out[:3].transpose(0, 1)[None], first[0], name="out of the first sequence")
    assert_close(lse[:, :3][None], first[1], name="lse of the first sequence")
    assert (out[3] == 0).all() and torch.equal(lse[:, 3], options["sinks"])  # the third has no keys
    no_sequence = reference.attention(q[:0], k[:0], v[:0], cu_seqlens_q=cu_q[:1], cu_seqlens_k=cu_k[:1])
    assert no_sequence.shape == (0, H, E)


def test_merged_parts_are_the_whole():
    mask = bools(T, S)
    mask[1] = False
    mask[2, :4] = False
    whole = reference.attention(Q, K, V, mask=mask, return_lse=True)
    parts = [(slice(0, 4), slice(4, 6)), (slice(0, 1), slice(1, 5), slice(5, 6)), (slice(0, 6),)]
    for slices in parts:
        pieces = [reference.attention(Q, K[:, :, at], V[:, :, at], mask=mask[:, at], return_lse=True) for at in slices]
        outs, lses = ([piece[i] for piece in pieces] for i in (0, 1))
        for out, lse in zip(outs, lses, strict=True):
            out[lse.isneginf()] = math.nan  # a part that saw nothing takes no part
        merged = reference.merge_attention(outs, lses)
        for name, ours, expected in zip(("out", "lse"), merged, whole, strict=True):
            assert_close(ours, expected, name=f"{name} of {len(slices)} parts")
    assert (whole[0][:, :, 1] == 0).all() and (whole[1][:, :, 1] == -math.inf).all()
