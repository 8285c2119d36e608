"""sample: the documented rule draw by draw, frequencies, penalty, broken logits, independence of rows, refusals."""

import math

import numpy as np
import pytest
import torch
from philox import philox

from pykern import _C
from pykern.lm import Sampler

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}

OPTIONS = {
    "everything": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 4.0},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k of more than there are": {"top_k": 2000, "temperature": 1.5},
    "top_p": {"top_p": 0.71},
    "a small top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.137},
    "min_p and top_p": {"min_p": 0.083, "top_p": 0.93},
    "top_k and top_p": {"top_k": 7, "top_p": 0.77, "temperature": 1.7},
    "top_k and min_p": {"top_k": 6, "min_p": 0.211, "temperature": 0.8},
    "all of them": {"top_k": 9, "top_p": 0.87, "min_p": 0.0613, "temperature": 1.3, "repetition_penalty": 1.7},
    "penalty": {"repetition_penalty": 1.9},
    "a penalty that rewards": {"repetition_penalty": 0.6, "temperature": 0.9},
    "greedy": {"temperature": 0.0},
    "greedy with a penalty": {"temperature": 0.0, "repetition_penalty": 2.5},
}


def uniform(draw, seed):
    words = philox((draw & 0xFFFFFFFF, draw >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return (int(words[0]) << 32 | int(words[1])) // 2048 * 2.0**-53


def token(logits, draw, seed, text, *, temperature, top_k, top_p, min_p, repetition_penalty):
    """The token of one row of Python floats, and the distance of the closest comparison from a tie.

    The candidates are walked most likely first, or in the order of their ids when nothing is cut.
    """
    values = list(logits)
    for i in set(text):
        values[i] = logits[i] / repetition_penalty if logits[i] > 0 else logits[i] * repetition_penalty
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if temperature == 0:
        return order[0], 1.0
    most, gap = values[order[0]], 1.0
    weight = [math.exp((value - most) / temperature) for value in values]
    kept = order[:top_k] if top_k else order
    if top_p < 1:
        total, reached, count = math.fsum(weight[i] for i in kept), 0.0, 0
        while reached < top_p:
            reached += weight[kept[count]] / total
            gap, count = min(gap, abs(reached - top_p)), count + 1
        kept = kept[:count]
    if min_p > 0:
        gap = min(gap, *(abs(weight[i] - min_p) for i in kept))
        kept = [i for i in kept if weight[i] >= min_p]
    if not (0 < top_k < len(values) or top_p < 1 or min_p > 0):
        kept = range(len(values))
    total, target, reached, chosen = math.fsum(weight[i] for i in kept), uniform(draw, seed), 0.0, None
    for i in kept:
        reached += weight[i] / total
        gap = min(gap, abs(reached - target))
        if chosen is None and reached > target:
            chosen = i
    return chosen, gap


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).to(dtype)


def integers(limit, *shape, seed=0):
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


def case(B, V, n=9, dtype=torch.float32, seed=0):
    """logits, seeds, draws, history, counts of random rows."""
    return (
        draw(B, V, dtype=dtype, seed=seed),
        *(integers(2**63 - 1, B, seed=seed), integers(2**40, B, seed=seed + 1)),
        *(integers(V, B, n, seed=seed + 2), integers(n + 1, B, seed=seed + 3)),
    )


def sample(logits, seeds, draws, history=None, counts=None, **options):
    ids = torch.full((logits.shape[0],), -7)
    _C.sample(logits, seeds, draws, history, counts, ids, **PLAIN | options)
    return ids


# ---- the rule


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_those_of_the_rule(dtype, options):
    settings = PLAIN | OPTIONS[options]
    for B, V in ((48, 23), (24, 6), (6, 1003), (3, 1)):
        arguments = case(B, V, dtype=dtype, seed=V)
        logits, seeds, draws, history, counts = (x.tolist() for x in (arguments[0].double(), *arguments[1:]))
        got = sample(*arguments, **settings)
        for b in range(B):
            expected, gap = token(logits[b], draws[b], seeds[b], history[b][: counts[b]], **settings)
            assert gap > 1e-9, f"V {V}, row {b} is too close to a tie to be compared: choose another seed"
            assert got[b] == expected, f"V {V}, row {b}"


def test_draws_use_all_bits_of_the_seed_and_of_the_count():
    """A thousand equal tokens: the id tells the ten leading bits of the uniform number."""
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63 - 1, 5, 5, 5]
    draws = [0, 0, 0, 0, 0, 1, 2**32, 2**62 + 1]
    got = sample(torch.zeros(8, 1024), torch.tensor(seeds), torch.tensor(draws)).tolist()
    assert got == [int(uniform(d, s) * 1024) for d, s in zip(draws, seeds, strict=True)]
    assert len(set(got)) == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_and_top_k_take_the_lowest_id_among_equals(dtype):
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 2.0, 3.0, 1.0], [-1.0, -1.0, -1.0, -1.0]], dtype=dtype)
    seeds, draws = torch.arange(3), torch.arange(3)
    assert sample(logits, seeds, draws, temperature=0.0).tolist() == [1, 0, 0]
    assert Sampler(0.0, batch=3)(logits).tolist() == [1, 0, 0]
    for seed in range(20):
        assert sample(logits, seeds + seed, draws, top_k=1).tolist() == [1, 0, 0]
        assert sample(logits, seeds + seed, draws, top_p=1e-9).tolist() == [1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_coldest_temperatures_are_greedy(cut, temperature):
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0, -1.0]]).expand(16, 5)
    seeds = torch.arange(16)
    assert sample(logits, seeds, torch.zeros_like(seeds), temperature=temperature, **cut).eq(2).all()


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"min_p": 0.5}])
def test_equals_are_both_drawn_at_the_coldest_temperatures(cut):
    """1 / 1e-310 is infinite, and exp(0 / 1e-310) is 1 all the same."""
    seeds = torch.arange(64)
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0, 3.0]]).expand(64, 5)
    assert set(sample(logits, seeds, torch.zeros_like(seeds), temperature=1e-310, **cut).tolist()) == {2, 4}


# ---- frequencies

QUANTILES = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}  # 0.999, of chi-square


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_frequencies_are_the_probabilities(options):
    """20000 draws of 9 tokens, chi-square below its 0.999 quantile; what is left out never comes."""
    logits = draw(1, 9, dtype=torch.float32, seed=4) / 2
    p, ids = Sampler(**options).probabilities(logits)
    expected = torch.zeros(9, dtype=torch.float64).index_put((ids[0],), p[0])
    assert torch.isclose(expected.sum(), torch.ones((), dtype=torch.float64))
    sampler = Sampler(seed=1, batch=200, **options)
    counts = torch.bincount(torch.cat([sampler(logits.expand(200, 9)) for _ in range(100)]), minlength=9)
    left = expected > 0
    assert counts[~left].sum() == 0
    assert (~left).any() == any(name != "temperature" for name in options)
    expected = expected[left] * 20000
    assert ((counts[left] - expected).square() / expected).sum() < QUANTILES[int(left.sum()) - 1]


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.full((64, 5), -math.inf)
    logits[:, 2] = 0.0
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 5}, {"min_p": 0.5}, {"temperature": 1e30}):
        assert Sampler(seed=0, batch=64, **options)(logits).eq(2).all(), options


# ---- the penalty


def test_penalty_counts_a_token_once_and_only_what_counts():
    """Greedy: 4 / 2 and -1 * 2 stay ahead of 1.5 and -3, as they would not, were they penalised twice."""
    logits = torch.tensor([[4.0, 1.5, 0.0], [-1.0, -3.0, -9.0], [4.0, 3.0, 0.0], [4.0, 3.0, 0.0]])
    history = torch.tensor([[0, 0, 0], [0, 0, 0], [2, 0, 0], [2, 0, 0]])
    counts = torch.tensor([3, 3, 1, 2])
    zero = torch.zeros(4, dtype=torch.int64)
    options = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert sample(logits, zero, zero, history, counts, **options).tolist() == [0, 0, 0, 1]
    assert Sampler(0.0, batch=4, repetition_penalty=2.0)(logits, history).tolist() == [0, 0, 1, 1]


def test_history_behind_counts_is_not_read():
    history = torch.tensor([[0, 99, -1]])
    zero = torch.zeros(1, dtype=torch.int64)
    got = sample(torch.ones(1, 2), zero, zero, history, zero + 1, temperature=0.0, repetition_penalty=2.0)
    assert got.tolist() == [1]


def test_no_history_means_no_penalty():
    logits, seeds, draws, _, _ = case(32, 50)
    assert torch.equal(sample(logits, seeds, draws, repetition_penalty=3.0), sample(logits, seeds, draws))


# ---- broken logits


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_logits_give_no_token(dtype, options):
    nan, inf = math.nan, math.inf
    rows = [[0, nan, 1], [nan, nan, nan], [0, inf, 1], [inf, -inf, 0], [-inf, -inf, -inf], [-inf, 0, -inf]]
    logits = torch.tensor(rows, dtype=dtype)
    zero = torch.zeros(6, dtype=torch.int64)
    assert sample(logits, zero, zero, **options).tolist() == [-1, -1, -1, -1, -1, 1]
    for row in range(5):
        sampler = Sampler(seed=0, **options)
        with pytest.raises(ValueError, match=r"sampling: logits have no finite maximum \(NaN or infinity\)"):
            sampler(logits[row : row + 1])
        assert sampler.draws.tolist() == [0]


@pytest.mark.parametrize("V", [1, 7, 16, 47, 64, 101])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_in_whole_vectors_and_behind_them(dtype, V):
    """The largest, or one that is broken, at every place: in a first vector, a later one, the tail; -inf around it."""
    zero = torch.zeros(V, dtype=torch.int64)
    low = torch.linspace(-3, -1, V).expand(V, V)
    place = torch.eye(V, dtype=torch.bool)
    largest = low.masked_fill(place, 2.0).to(dtype)
    assert sample(largest, zero, zero, temperature=0.0).tolist() == list(range(V))
    alone = torch.full((V, V), -math.inf).masked_fill(place, -5.0).to(dtype)
    assert sample(alone, zero, zero, temperature=0.0).tolist() == list(range(V))
    twice = largest.clone()
    twice[:, -1] = 2.0
    assert sample(twice, zero, zero, temperature=0.0).tolist() == list(range(V))  # the lowest of two equals
    for broken in (math.nan, math.inf):
        assert sample(low.masked_fill(place, broken).to(dtype), zero, zero, temperature=0.0).tolist() == [-1] * V


# ---- independence


@pytest.mark.parametrize("options", ["everything", "top_p", "all of them"])
def test_threads_and_other_rows_change_nothing(options, threads, with_threads):
    arguments, settings = case(37, 301), OPTIONS[options]
    got = sample(*arguments, **settings)
    assert torch.equal(got, with_threads(1, lambda: sample(*arguments, **settings)))
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(*(x[order] for x in arguments), **settings), got[order])
    for b in (0, 17, 36):
        assert torch.equal(sample(*(x[b : b + 1] for x in arguments), **settings), got[b : b + 1])


def test_rows_may_be_apart_and_come_from_numpy():
    logits, seeds, draws, history, counts = case(5, 33)
    expected = sample(logits, seeds, draws, history, counts, top_k=4, repetition_penalty=1.5)
    wide, text = torch.full((5, 40), math.nan), torch.full((10, 9), 1)
    wide[:, 3:36], text[::2] = logits, history
    got = sample(wide[:, 3:36], seeds, draws, text[::2], counts, top_k=4, repetition_penalty=1.5)
    assert torch.equal(got, expected)
    ids = np.zeros(5, np.int64)
    arrays = [x.numpy() for x in (logits, seeds, draws, history, counts)]
    _C.sample(*arrays, ids, **PLAIN | {"top_k": 4, "repetition_penalty": 1.5})
    assert ids.tolist() == expected.tolist()


def test_sampler_streams_are_seeds_and_draws():
    logits = draw(3, 50, dtype=torch.float32)
    sampler = Sampler(1.5, 20, 0.9, seed=2**63 - 2, batch=3, min_p=0.01)
    for n in range(4):
        expected = sample(
            *(logits, torch.tensor([2**63 - 2, 2**63 - 1, 0]), torch.full((3,), n)),
            **dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01),
        )
        assert torch.equal(sampler(logits), expected)
    across, again = Sampler(seed=5, batch=3), Sampler(seed=5, batch=3)
    assert torch.equal(across(logits.T.contiguous().T), again(logits))


# ---- refusals


def read_only(n):
    array = np.full(n, 7)
    array.flags.writeable = False
    return array


def valid():
    logits, seeds, draws, history, counts = case(3, 5, 4)
    ids = torch.full((3,), 7)
    return dict(logits=logits, seeds=seeds, draws=draws, history=history, counts=counts, ids=ids, **PLAIN)


FLOATS = "float32, float64, bfloat16 or float16"
VECTORS = ("seeds", "draws", "counts", "ids")
BUFFER = torch.full((6, 5), 7)  # int64, of which outputs and inputs may both be views

REFUSALS = {
    "no array": ({"logits": 3}, TypeError, "logits"),
    "no ids": ({"ids": None}, TypeError, "ids"),
    "whole logits": ({"logits": torch.ones(3, 5).long()}, TypeError, f"logits has dtype int64, expected {FLOATS}"),
    "logits of rank 1": ({"logits": torch.ones(3)}, ValueError, r"logits must be \[B, V\], got shape \[3\]"),
    "logits across": (
        {"logits": torch.ones(5, 3).T},
        ValueError,
        "logits must have stride 1 in its last dimension, got",
    ),
    "no vocabulary": ({"logits": torch.ones(3, 0)}, ValueError, "logits have no columns"),
    **{f"{v} dtype": ({v: BUFFER[0, :3].int()}, TypeError, f"{v} has dtype int32, expected int64") for v in VECTORS},
    **{f"{v} rank": ({v: BUFFER[:3, :1]}, ValueError, rf"{v} must be \[B\]") for v in VECTORS},
    **{
        f"{v} size": ({v: BUFFER[0, :4]}, ValueError, rf"{v} has shape \[4\], expected rows of logits = 3")
        for v in VECTORS
    },
    **{f"{v} steps": ({v: BUFFER[:3, 0]}, ValueError, f"{v} of shape .* must be contiguous") for v in VECTORS},
    "history alone": ({"counts": None}, ValueError, "history and counts must be given together"),
    "counts alone": ({"history": None}, ValueError, "history and counts must be given together"),
    "history dtype": ({"history": torch.ones(3, 4)}, TypeError, "history has dtype float32, expected int64"),
    "history rank": ({"history": torch.ones(3).long()}, ValueError, r"history must be \[B, n\]"),
    "history rows": ({"history": torch.ones(2, 4).long()}, ValueError, "history .* rows of logits = 3"),
    "history across": ({"history": torch.ones(4, 3).long().T}, ValueError, "history must have stride 1"),
    "too many": ({"counts": torch.tensor([4, 5, 0])}, IndexError, r"counts\[1\] is 5, but history has 4 columns"),
    "negative count": (
        {"counts": torch.tensor([4, 4, -1])},
        IndexError,
        r"counts\[2\] is -1, but history has 4 columns",
    ),
    "token beyond": (
        {"history": torch.full((3, 4), 5), "counts": torch.full((3,), 4)},
        IndexError,
        "history contains 5",
    ),
    "token before": (
        {"history": torch.full((3, 4), -1), "counts": torch.full((3,), 4)},
        IndexError,
        "history contains -1",
    ),
    "read-only ids": ({"ids": read_only(3)}, ValueError, "ids is read-only"),
    **{
        f"ids in {name}": ({"ids": BUFFER[0, :3], name: BUFFER[0, 2:5]}, ValueError, f"ids shares memory with {name}")
        for name in ("seeds", "draws")
    },
    "ids in counts": (
        {"ids": BUFFER[0, :3], "counts": BUFFER[0, 2:], "history": BUFFER.clone()[:3].repeat(1, 2) - 4},
        ValueError,
        "ids shares memory with counts",
    ),
    "ids in logits": (
        {"ids": BUFFER[1, :3], "logits": BUFFER.view(torch.float64)[:3]},
        ValueError,
        "ids shares memory",
    ),
    "ids in history": (
        {"ids": BUFFER[1, :3], "history": BUFFER[:3, :4], "logits": torch.ones(3, 8)},
        ValueError,
        "ids shares memory with history",
    ),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature is -1 but must be 0"),
    "infinite temperature": ({"temperature": math.inf}, ValueError, "temperature is inf but must be 0"),
    "no temperature": ({"temperature": math.nan}, ValueError, "temperature is nan but must be 0"),
    "top_k": ({"top_k": -1}, ValueError, "top_k is -1 but must be at least 1, or 0"),
    **{
        f"top_p {x}": ({"top_p": x}, ValueError, f"top_p is {x:g} but must be above 0 and at most 1")
        for x in (0.0, 1.5, math.nan)
    },
    **{f"min_p {x}": ({"min_p": x}, ValueError, f"min_p is {x:g} but must be from") for x in (-0.5, 1.5, math.nan)},
    **{
        f"penalty {x}": ({"repetition_penalty": x}, ValueError, f"repetition_penalty is {x:g} but must be a positive")
        for x in (0.0, -2.0, math.inf, math.nan)
    },
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    changes, error, words = REFUSALS[name]
    arguments = valid() | changes
    ids = arguments["ids"]
    with pytest.raises(error, match=f"^sample: {words}"):
        _C.sample(**arguments)
    assert ids is None or set(ids.flatten().tolist()) == {7}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0 but must be 0"),
        ({"top_k": 0}, "top_k is 0 but must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0 but must be above 0"),
        ({"min_p": 1.5}, "min_p is 1.5 but must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0 but must be a positive"),
        ({"seed": -1}, r"seed is -1 but must be from 0 to 2\^63 - 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_sampler_refusal(options, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**options)


def test_sampler_refuses_another_batch():
    with pytest.raises(ValueError, match="logits have 2 rows but the sampler 3 streams"):
        Sampler(batch=3)(torch.zeros(2, 4))
