"""attention: dropout. The generator against Philox in numpy, the results against the formula with what it keeps.

tests/philox.py says which word of which counter decides about a weight. Statistics are of fixed seeds: they cannot
fail by chance, and the bounds of five standard deviations say that these seeds are no lucky ones.
"""

import math

import numpy as np
import pytest
import torch
from attention_tools import attend, compare, inputs, ragged_inputs
from dlpack_producers import Forged
from philox import kept, philox
from test_attention_options import optional, slopes
from tools import DTYPES, draw

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close

PAIR = [torch.float32, torch.bfloat16]
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -0x7EDCBA9876543210]


def kernel_keeps(seed, *shape, dropout_p):
    keep = torch.zeros(shape, dtype=torch.bool)
    _C.attention_dropout(torch.tensor([seed]), keep, dropout_p=dropout_p)
    return keep


# ---- the generator


def test_the_oracle_gives_the_published_answers():
    """The known-answer file of Random123: philox4x32 10."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    answers = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((ones, ones, ones, ones), (ones, ones)): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        pi: "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), words in answers.items():
        assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 63), (1, 2, 3, 64), (3, 1, 7, 65), (1, 1, 2, 1030)], ids=str)
def test_the_kernel_is_the_oracle(shape, seed):
    for p in (0.1, 0.5, 0.999):
        assert_bitwise(kernel_keeps(seed, *shape, dropout_p=p), kept(seed, *shape, p), name=f"p = {p}")


def test_every_size_of_a_row():
    for S in range(1, 200):
        assert_bitwise(kernel_keeps(5, 1, 1, 2, S, dropout_p=0.5), kept(5, 1, 1, 2, S, 0.5), name=f"S = {S}")


@pytest.mark.parametrize("p", [0.0, 2.0**-33, 2.0**-32, 1e-9, 0.25, 1 - 2.0**-32, 1 - 2.0**-33, 1.0])
def test_every_probability(p):
    """The threshold is floor(p 2^32): nothing falls below 2^-32, nothing stays at 1."""
    keep = kernel_keeps(7, 1, 2, 100, 640, dropout_p=p)
    assert_bitwise(keep, kept(7, 1, 2, 100, 640, p))
    assert keep.all() or p > 1e-9
    assert not keep.any() or p < 1


def test_no_element():
    for shape in ((0, 1, 1, 1), (1, 0, 3, 4), (2, 2, 0, 5), (2, 2, 3, 0)):
        assert kernel_keeps(1, *shape, dropout_p=0.5).shape == shape


def test_the_share_that_stays():
    n = 4 * 8 * 128 * 256
    for seed, p in ((0, 0.1), (1, 0.5), (2, 0.9)):
        keep = kernel_keeps(seed, 4, 8, 128, 256, dropout_p=p)
        assert abs(keep.sum().item() - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))
        for axis, size in enumerate(keep.shape):  # and in each sequence, head, query, key
            counts = keep.movedim(axis, 0).flatten(1).sum(1)
            assert ((counts - n / size * (1 - p)).abs() < 5 * math.sqrt(n / size * p * (1 - p))).all()


def test_neighbours_are_independent():
    """Of weights one step apart on each axis, of keys one word or one counter apart, and of two seeds."""
    keep = kernel_keeps(3, 4, 8, 128, 256, dropout_p=0.5)
    pairs = [(keep.narrow(i, 0, n - 1), keep.narrow(i, 1, n - 1)) for i, n in enumerate(keep.shape)]
    pairs += [(keep[..., :-step], keep[..., step:]) for step in (16, 64)]
    pairs += [(keep, kernel_keeps(seed, *keep.shape, dropout_p=0.5)) for seed in (4, 2 - 2**63, 3 + 2**32)]
    for a, b in pairs:
        assert abs((a == b).sum().item() - a.numel() / 2) < 5 * math.sqrt(a.numel() / 4)


# ---- results and gradients

OPTIONS = {
    "plain": (dict(), dict()),
    "causal": (dict(causal=True), dict()),
    "window, softcap, slopes": (dict(window=(70, 3), softcap=1.5, alibi_slopes=slopes(4)), dict()),
    "bias and sinks": (dict(), dict(bias=(4, 1, 150), sinks=True)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_dropout(name, dtype):
    options, extra = OPTIONS[name]
    for T, p, seed in ((27, 0.2, 1), (97, 0.6, -5)):
        tensors, dout = inputs(T, 150, D=20, E=13, B=2, H=4, G=2, dtype=dtype)
        tensors, dlse = optional(tensors, **extra), draw(2, 4, T, seed=5)
        compare(tensors, dout, dlse, name=name, dropout_p=p, seed=seed, **options)


@pytest.mark.parametrize("D, E", [(1, 7), (80, 96), (128, 64), (256, 3)])
@pytest.mark.parametrize("dtype", PAIR)
def test_head_sizes(D, E, dtype):
    tensors, dout = inputs(14, 70, D=D, E=E, H=2, G=1, dtype=dtype, seed=D)
    compare(tensors, dout, name=f"D={D}, E={E}", dropout_p=0.3, seed=9)


def test_every_pair_of_sizes():
    sizes = [0, 1, 7, 63, 64, 65, 130]
    for T in sizes:
        for S in sizes:
            tensors, dout = inputs(T, S, D=7, H=2, G=1, dtype=torch.float32, seed=T)
            compare(tensors, dout, name=f"T={T}, S={S}", dropout_p=0.3, seed=S, causal=T % 2 == 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    options, extra = OPTIONS[name]
    tensors, _ = inputs(3, 7, D=2, E=3, B=2, H=4, G=2)
    tensors = optional(tensors, **(extra | (dict(bias=(4, 1, 7)) if "bias" in extra else {})))

    def f(*leaves):
        arguments = dict(zip(tensors, leaves, strict=True))
        return pykern.attention(**arguments, dropout_p=0.4, seed=3, return_lse=True, **options)

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_drop_the_same(dtype):
    """With values of the unit matrix out is the weights themselves, and with dout of ones dv is the sum of a column."""
    tensors, _ = inputs(1, 150, D=8, H=2, dtype=dtype)
    tensors["v"] = torch.eye(150, dtype=dtype).expand(1, 2, 150, 150).contiguous()
    results = attend(tensors, torch.ones(1, 2, 1, 150, dtype=dtype), dropout_p=0.5, seed=8)
    keep = kept(8, 1, 2, 1, 150, 0.5)
    assert_bitwise(results["out"] != 0, keep, name="out")
    assert_bitwise((results["dv"] != 0).all(-1), keep[:, :, 0], name="dv")
    assert_bitwise((results["dv"] == 0).all(-1), ~keep[:, :, 0], name="dv of what is dropped")


def test_no_probability_and_all():
    tensors, dout = inputs(20, 90, D=8, H=4, G=2, dtype=torch.float32)
    tensors = optional(tensors, (90,), True)
    plain = attend(tensors, dout)
    for name, x in attend(tensors, dout, dropout_p=0.0, seed=4).items():
        assert_bitwise(x, plain[name], name=f"p = 0: {name}")
    nothing = attend(tensors, dout, dropout_p=1.0, seed=4)
    assert_bitwise(nothing.pop("lse"), plain["lse"], name="lse")
    for name, x in nothing.items():
        assert (x == 0).all(), f"p = 1: {name}"


def test_lse_does_not_depend_on_dropout():
    tensors, _ = inputs(20, 90, D=8, H=4, G=2, dtype=torch.float32)
    _, lse = pykern.attention(**tensors, return_lse=True)
    for seed in range(3):
        assert_bitwise(pykern.attention(**tensors, dropout_p=0.5, seed=seed, return_lse=True)[1], lse)


def test_the_mean_over_seeds_is_attention_without_dropout():
    tensors, _ = inputs(2, 70, D=8, H=2, dtype=torch.float32)
    p, n = 0.3, 400
    mean = torch.stack([pykern.attention(**tensors, dropout_p=p, seed=seed).double() for seed in range(n)]).mean(0)
    exact = pykern.attention(**{name: x.double() for name, x in tensors.items()})
    scores = tensors["q"].double() @ tensors["k"].double().mT * 8**-0.5
    variance = scores.softmax(-1).square() @ tensors["v"].double().square() * (p / (1 - p) / n)
    assert ((mean - exact).abs() < 5 * variance.sqrt()).all()


# ---- seeds


def test_the_same_seed_the_same_bits():
    tensors, dout = inputs(20, 90, D=8, H=4, G=2, dtype=torch.float32)
    first = attend(tensors, dout, dropout_p=0.5, seed=4)
    for seed in (4, torch.tensor([4]), torch.tensor(4)):
        for name, x in attend(tensors, dout, dropout_p=0.5, seed=seed).items():
            assert_bitwise(x, first[name], name=f"seed {seed!r}: {name}")
    for seed in (5, 4 + 2**32, -4):
        assert not torch.equal(attend(tensors, dout, dropout_p=0.5, seed=seed)["out"], first["out"])


def test_without_a_seed_torch_draws_one():
    tensors, _ = inputs(20, 90, D=8, H=4, G=2, dtype=torch.float32)
    torch.manual_seed(1)
    first, second = (pykern.attention(**tensors, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert_bitwise(pykern.attention(**tensors, dropout_p=0.5), first)
    assert_bitwise(pykern.attention(**tensors, dropout_p=0.5), second)
    state = torch.get_rng_state()
    pykern.attention(**tensors)
    pykern.attention(**tensors, dropout_p=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "a number was drawn that nobody needed"


def test_nothing_is_stored():
    """What waits for the backward pass is O(T): no array of T S elements."""
    T = S = 130
    tensors, _ = inputs(T, S, D=4, dtype=torch.float32)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        pykern.attention(**{n: x.requires_grad_() for n, x in tensors.items()}, dropout_p=0.5, seed=1, causal=True)
    assert stored and max(stored) <= T * 4


# ---- position decides, and nothing else


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(dtype, with_threads):
    for B, T, S in ((1, 150, 300), (3, 40, 200)):
        tensors, dout = inputs(T, S, D=10, B=B, H=4, G=2, dtype=dtype)
        tensors = optional(tensors, (4, 1, S), True)
        run = lambda a=(tensors, dout): attend(*a, dropout_p=0.4, seed=2, causal=True)  # noqa: E731
        first = with_threads(1, run)
        for n in (2, 3):
            for name, x in with_threads(n, run).items():
                assert_bitwise(x, first[name], name=f"{n} threads: {name}")


@pytest.mark.parametrize("dtype", PAIR)
def test_any_numbers_in_the_neighbours(dtype):
    """The other sequences change, NaN included; a mask and further keys that it hides do not move what is dropped."""
    tensors, dout = inputs(50, 150, D=10, B=3, H=4, G=2, dtype=dtype)
    first = attend(tensors, dout, dropout_p=0.4, seed=2)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[0], x[2] = math.nan, 1.0
    for name, x in attend(changed, dout, dropout_p=0.4, seed=2).items():
        assert_bitwise(x[1], first[name][1], name=name)
    fewer = attend({name: x[:2] for name, x in tensors.items()}, dout[:2], dropout_p=0.4, seed=2)
    for name, x in fewer.items():
        assert_bitwise(x, first[name][:2], name=f"two sequences of three: {name}")
    longer = dict(tensors)
    for name in "kv":
        longer[name] = torch.cat([tensors[name], torch.full((3, 2, 300, 10), math.nan, dtype=dtype)], 2)
    padded = attend(longer, dout, dropout_p=0.4, seed=2, mask=torch.arange(450) < 150)
    for name, x in first.items():
        assert_bitwise(padded[name][:, :, : x.shape[2]], x, name=f"padded: {name}")


@pytest.mark.parametrize("dtype", PAIR)
def test_leading_queries_are_dropped_alike(dtype):
    """t counts the rows of the call: the first ones keep their bits when later ones are left out."""
    tensors, _ = inputs(150, 200, D=10, H=4, G=2, dtype=dtype)
    whole = pykern.attention(**tensors, dropout_p=0.4, seed=2)
    for T in (1, 13, 64, 97):
        part = pykern.attention(**(tensors | dict(q=tensors["q"][:, :, :T])), dropout_p=0.4, seed=2)
        assert_bitwise(part, whole[:, :, :T], name=f"{T} queries")


# ---- ragged: b is the sequence, t and s count inside of it


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged(dtype):
    queries, keys = [33, 0, 70, 1, 5], [65, 7, 130, 64, 0]
    tensors, dout, offsets = ragged_inputs(queries, keys, D=9, E=20, H=4, G=2, dtype=dtype)
    dlse = draw(4, sum(queries), seed=5)
    compare(tensors, dout, dlse, name="ragged", dropout_p=0.3, seed=6, causal=True, **offsets)
    compare(optional(tensors, None, True), dout, dlse, name="ragged", dropout_p=0.3, seed=6, window=(20, 5), **offsets)


@pytest.mark.parametrize("dtype", PAIR)
def test_equal_sequences_are_a_batch(dtype):
    B, T, S = 3, 40, 90
    tensors, dout = inputs(T, S, D=9, B=B, H=4, G=2, dtype=dtype)
    batch = attend(tensors, dout, dropout_p=0.3, seed=6)
    end_to_end = {name: x.transpose(1, 2).flatten(0, 1) for name, x in tensors.items()}
    _, _, offsets = ragged_inputs([T] * B, [S] * B, H=4)
    ragged = attend(end_to_end, dout.transpose(1, 2).flatten(0, 1), dropout_p=0.3, seed=6, **offsets)
    for name, x in batch.items():
        expected = x.transpose(0, 1).flatten(1, 2) if name == "lse" else x.transpose(1, 2).flatten(0, 1)
        assert_bitwise(ragged[name], expected, name=name)


def test_a_row_whose_weights_are_all_dropped():
    """out 0 and no gradient through it, but lse and its gradient stand."""
    seed = next(seed for seed in range(100) if not kept(seed, 1, 1, 1, 5, 0.7).any())
    tensors, dout = inputs(1, 5, D=4, dtype=torch.float32)
    results = attend(tensors, dout, dropout_p=0.7, seed=seed)
    assert all((results[name] == 0).all() for name in ("out", "dq", "dk", "dv")) and results["lse"].isfinite().all()
    results = attend(tensors, dout, torch.ones(1, 1, 1), dropout_p=0.7, seed=seed)
    scores = tensors["q"].double() @ tensors["k"].double().mT * 0.5
    assert_close(results["dq"], scores.softmax(-1) @ tensors["k"].double() * 0.5, name="dq", gradient=True)


def test_keep_is_numpy_too():
    keep = np.zeros((2, 1, 3, 70), bool)
    _C.attention_dropout(np.array([5]), keep, dropout_p=0.5)
    assert_bitwise(keep, kept(5, 2, 1, 3, 70, 0.5).numpy())


def test_a_seed_on_another_device_is_not_read():
    elsewhere = Forged(device=(2, 0), code=0, bits=64)  # int64 that claims to be on a GPU
    q, out, lse = np.ones((1, 1, 2, 4)), np.full((1, 1, 2, 4), 7.0), np.full((1, 1, 2), 7.0)
    with pytest.raises(ValueError, match="attention: seed and q are on different devices"):
        _C.attention_forward(q, q, q, None, None, out, lse, causal=True, scale=1.0, dropout_p=0.5, seed=elsewhere)
    keep = np.zeros((1, 1, 2, 2), bool)
    with pytest.raises(ValueError, match="attention: seed and keep are on different devices"):
        _C.attention_dropout(elsewhere, keep, dropout_p=0.5)
    assert (out == 7.0).all() and (lse == 7.0).all() and not keep.any()
