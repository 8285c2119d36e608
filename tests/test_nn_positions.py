"""Biases of relative position: T5's buckets against their formula, and gradients of what is learnt in float64."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from nn_twins import CLOSE, randn

import pykern
from pykern import nn
from pykern.nn.positions import alibi_slopes, bucket_starts, relative_buckets

# (num_buckets, max_distance), T5's own first; then odd halves, few buckets, and more buckets than distances.
BUCKETS = [(32, 128), (32, 256), (64, 512), (20, 100), (22, 77), (4, 3), (8, 16), (32, 20), (320, 800)]


def bucket(relative, buckets, furthest, bidirectional):
    """The formula of T5 for one key - query, exact: the logarithms are compared as whole numbers."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, distance = buckets * (relative > 0), abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # the largest i <= n - 1 with log(distance / exact) / log(furthest / exact) * n >= i
    n = buckets - exact
    ratio, whole = Fraction(distance, exact) ** n, Fraction(furthest, exact)
    return first + exact + max(i for i in range(n) if ratio >= whole**i)


def t5(relative, bidirectional, num_buckets, max_distance):
    """T5's `_relative_position_bucket`, in float32 as published."""
    buckets = torch.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        buckets += (relative > 0).long() * num_buckets
        relative = relative.abs()
    else:
        relative = -torch.min(relative, torch.zeros_like(relative))
    exact = num_buckets // 2
    large = torch.log(relative.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    large = torch.min(exact + large.long(), torch.full_like(relative, num_buckets - 1))
    return buckets + torch.where(relative < exact, relative, large)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", BUCKETS)
def test_buckets_are_their_formula(sizes, bidirectional):
    relative = torch.arange(-300, 301)
    got = relative_buckets(relative, *sizes, bidirectional)
    assert got.tolist() == [bucket(r, *sizes, bidirectional) for r in range(-300, 301)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [(32, 128), (32, 256), (64, 512), (320, 800)])
def test_buckets_are_t5s(sizes, bidirectional):
    relative = torch.arange(-3000, 3001)
    got = relative_buckets(relative, *sizes, bidirectional)
    assert torch.equal(got, t5(relative, bidirectional, *sizes))
    assert set(got.tolist()) == set(range(sizes[0])) - ({sizes[0] // 2} if bidirectional else set())


def test_bucket_starts():
    assert bucket_starts(8, 16) == (0, 1, 2, 3, 4, 6, 8, 12)  # 4 * 4^(i / 4)
    assert bucket_starts(3, 9) == (0, 1, 3)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("T, S", [(4, 4), (2, 7), (7, 2), (1, 5), (5, 1), (0, 3), (3, 0), (0, 0)])
def test_relative_position_bias_is_a_table_of_distances(T, S, bidirectional):
    module = nn.RelativePositionBias(3, 8, 6, bidirectional, dtype=torch.float64)
    bias = module(T, S)
    assert bias.shape == (1, 3, T, S) and bias.is_contiguous()
    for t in range(T):
        for s in range(S):
            row = module.weight[bucket(s - (S - T + t), 8, 6, bidirectional)]
            assert torch.equal(bias[0, :, t, s], row), (t, s)
    if T == S:
        assert torch.equal(module(T), bias)


@pytest.mark.parametrize("T, S", [(4, 4), (2, 7), (7, 2), (1, 1), (0, 3)])
def test_alibi_is_slope_times_distance(T, S):
    module = nn.ALiBi(3, learnable=True, dtype=torch.float64)
    bias = module(T, S)
    expected = torch.zeros(1, 3, T, S, dtype=torch.float64)
    for h, slope in enumerate([2**-4, 2**-8, 2**-2]):
        for t in range(T):
            for s in range(S):
                expected[0, h, t, s] = -slope * abs(s - (S - T + t))
    assert torch.equal(bias, expected)


def test_alibi_slopes():
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(3).tolist() == [2**-4, 2**-8, 2**-2]
    assert nn.ALiBi(12).slopes.tolist() == alibi_slopes(12).float().tolist()


def attend(bias, causal, seed=0):
    """Attention of fixed random q, k, v [2, 3, T | S, 4] with this bias."""
    _, _, T, S = bias.shape
    q, k, v = randn(2, 3, T, 4, seed=seed), randn(2, 3, S, 4, seed=seed + 1), randn(2, 3, S, 4, seed=seed + 2)
    return pykern.attention(q, k, v, bias=bias, causal=causal)


LEARNT = {
    "t5": lambda: nn.RelativePositionBias(3, 8, 6, dtype=torch.float64),
    "t5, causal": lambda: nn.RelativePositionBias(3, 8, 6, bidirectional=False, dtype=torch.float64),
    "alibi": lambda: nn.ALiBi(3, learnable=True, dtype=torch.float64),
    "alibi, causal": lambda: nn.ALiBi(3, learnable=True, dtype=torch.float64),
}


@pytest.mark.parametrize("T, S", [(6, 6), (3, 8)])
@pytest.mark.parametrize("case", LEARNT)
def test_gradients_reach_the_parameter_through_attention(case, T, S):
    module = LEARNT[case]()
    ((name, parameter),) = module.named_parameters()

    def f(value):
        return attend(torch.func.functional_call(module, {name: value}, (T, S)), "causal" in case)

    value = randn(*parameter.shape, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(f, value)
    f(value).square().sum().backward()
    assert value.grad.abs().max() > 1e-3
    (f(parameter) ** 2).sum().backward()
    assert parameter.grad is not None and parameter.grad.abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_constant_slopes_are_the_bias_they_stand_for(causal):
    constant, learnt = nn.ALiBi(3), nn.ALiBi(3, learnable=True, dtype=torch.float64)
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 9, 4, seed=1), randn(2, 3, 9, 4, seed=2)
    out = pykern.attention(q, k, v, alibi_slopes=constant.slopes, causal=causal)
    torch.testing.assert_close(out, attend(learnt(5, 9), causal), **CLOSE)


def test_bfloat16_sums_its_gradient_in_float32():
    """1000 ones: in bfloat16 a sum of ones ends at 256."""
    t5, alibi = nn.RelativePositionBias(1, 4, 2, dtype=torch.bfloat16), nn.ALiBi(1, learnable=True).bfloat16()
    bias = t5(1000)
    assert bias.dtype == torch.bfloat16
    bias.sum().backward()
    n = 1000 * 999 // 2
    assert t5.weight.grad.flatten().tolist() == torch.tensor([1000, n, 0, n]).bfloat16().tolist()
    assert alibi(1, 1002)[0, 0, 0, 0] == -torch.tensor(1001 / 256).bfloat16()


def test_constant_slopes_survive_dtypes_and_the_meta_device():
    module = nn.ALiBi(16)
    expected = alibi_slopes(16).float()
    assert not module.state_dict() and not list(module.parameters())
    assert torch.equal(module.slopes, expected)
    for moved in (
        module.bfloat16(),
        module.double(),
        copy.deepcopy(module),
        nn.ALiBi(16, device="meta").to_empty(device="cpu"),
    ):
        assert moved.slopes.dtype == torch.float32 and torch.equal(moved.slopes, expected)
    learnt = nn.ALiBi(16, learnable=True)
    assert list(learnt.state_dict()) == ["slopes"] and learnt.double().slopes.dtype == torch.float64


REFUSALS = {
    "heads": (lambda: nn.RelativePositionBias(0), "RelativePositionBias: num_heads is 0, expected 1 or more"),
    "odd buckets": (lambda: nn.RelativePositionBias(2, 7), "RelativePositionBias: num_buckets is 7, expected an even"),
    "few buckets": (
        lambda: nn.RelativePositionBias(2, 1, bidirectional=False),
        "RelativePositionBias: num_buckets is 1, expected 2 or more",
    ),
    "max_distance": (
        lambda: nn.RelativePositionBias(2, 32, 8),
        "RelativePositionBias: max_distance is 8, expected more than the 8 distances that have a bucket each",
    ),
    "lengths": (lambda: nn.RelativePositionBias(2)(3, -1), "RelativePositionBias: T is 3 and S -1, expected lengths"),
    "heads of ALiBi": (lambda: nn.ALiBi(-2), "ALiBi: num_heads is -2, expected 1 or more"),
    "lengths of ALiBi": (lambda: nn.ALiBi(2)(-3), "ALiBi: T is -3 and S -3, expected lengths that are not negative"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
