"""The Attention of the tape: its output against numpy, every element of every gradient against finite differences."""

import numpy as np
import pytest

from pykern import _C
from pykern.tape import Attention, Parameter, Tensor, check_gradients, no_tape, tape, tape_bwd

rng = np.random.default_rng(0)
TOLERANCE = dict(rtol=1e-12, atol=1e-13)  # float64, sums of a few dozen terms
SEED = 12345


def normal(*shape):
    return rng.normal(size=shape)


def kept(p, *shape):
    keep = np.empty(shape, bool)
    _C.attention_dropout(np.array([SEED]), keep, dropout_p=p)
    return keep


def attention(
    q, k, v, *, causal=False, window=(None, None), mask=None, bias=0.0, scale=None, softcap=None, slopes=None,
    sinks=None, dropout_p=0.0,
):  # fmt: skip
    group, (T, S) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * q @ k.swapaxes(-1, -2)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    ahead = np.arange(S) - (np.arange(T)[:, None] + S - T)  # of the diagonal
    if slopes is not None:
        scores = scores - np.asarray(slopes)[..., None, None] * np.abs(ahead)
    scores = scores + bias
    keep = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
    left, right = window
    keep = keep & (ahead >= (-S - T if left is None else -left)) & (ahead <= (S + T if right is None else right))
    if causal:
        keep = keep & (ahead <= 0)
    e = np.where(keep, np.exp(scores), 0)
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks)[:, None, None]
    p = e / np.where(total == 0, 1, total)
    if dropout_p:
        p = np.where(kept(dropout_p, *p.shape), p / (1 - dropout_p or 1), 0)
    return p @ v


MASK = np.array([[True, False, True, True, False], [False] * 5, [True] * 5])
SLOPES, SLOPES_OF_EACH_TEXT = [0.5, 0.25], [[0.5, 0.25], [2.0, 0.0]]
SINKS = np.array([0.5, -1.0])


def qkv(B=2, H=2, T=3, S=5, D=4, G=None, E=None):
    G, E = H if G is None else G, D if E is None else E
    return [normal(B, H, T, D), normal(B, G, S, D), normal(B, G, S, E)]


# name: options of Attention, inputs
CASES = {
    "plain": ({}, qkv()),
    "causal": (dict(causal=True), qkv(B=1, T=4, S=4, D=3)),
    "causal, the queries are the last rows": (dict(causal=True), qkv(B=1, H=1, T=2, D=3)),
    "causal, more queries than keys: some see nothing": (dict(causal=True), qkv(B=1, H=1, T=4, S=2, D=3)),
    "shared key heads, wider values, scale": (dict(scale=0.3), qkv(H=4, G=2, D=3, E=6)),
    "mask with an empty row": ({}, [*qkv(), MASK]),
    "bias of one row per head": (dict(causal=True), [*qkv(), normal(2, 1, 5)]),
    "bias of one column, then a mask": ({}, [*qkv(), normal(2, 1, 3, 1), MASK]),
    "mask, then a full bias": ({}, [*qkv(B=1), MASK, normal(1, 2, 3, 5)]),
    "window": (dict(window=(1, 1)), qkv(T=6, S=6)),
    "window to the left": (dict(window=(2, None)), qkv(T=6, S=6)),
    "window to the right": (dict(window=(None, 0)), qkv()),
    "causal window over shared heads": (dict(window=(2, 3), causal=True), qkv(H=4, G=2, T=4, S=7)),
    "window that leaves rows nothing": (dict(window=(0, 0)), qkv(T=6, S=3)),
    "softcap": (dict(softcap=0.7), qkv()),
    "softcap, bias and mask": (dict(softcap=1.5, causal=True), [*qkv(), normal(3, 1), MASK]),
    "alibi": (dict(alibi_slopes=SLOPES, causal=True), qkv(T=5)),
    "alibi of each text, both ways": (dict(alibi_slopes=SLOPES_OF_EACH_TEXT), qkv()),
    "sinks": (dict(sinks=SINKS), qkv()),
    "sinks, and a row with nothing else": (dict(sinks=SINKS, causal=True), [*qkv(), MASK]),
    "dropout": (dict(dropout_p=0.4, seed=SEED), qkv()),
    "dropout of everything": (dict(dropout_p=1.0, seed=SEED), qkv()),
    "dropout over shared heads": (dict(dropout_p=0.4, seed=SEED, causal=True), qkv(H=4, G=2, T=5, D=3, E=6)),
    "all at once": (
        dict(
            scale=0.8,
            softcap=2.0,
            window=(3, 1),
            alibi_slopes=SLOPES,
            sinks=SINKS,
            dropout_p=0.3,
            seed=SEED,
        ),
        [*qkv(T=5, S=6, G=1, E=3), normal(2, 5, 6), normal(2, 1, 1, 6) > -1],
    ),
}


def module(case):
    return Attention(**CASES[case][0])


def formula(case):
    options, (q, k, v, *extras) = dict(CASES[case][0]), CASES[case][1]
    options.pop("seed", None)
    options["slopes"] = options.pop("alibi_slopes", None)
    for extra in extras:
        options["mask" if extra.dtype == bool else "bias"] = extra
    return attention(q, k, v, **options)


@pytest.mark.parametrize("case", CASES)
def test_output_is_the_formula(case):
    with no_tape():
        out = module(case).apply_fwd(*map(Tensor, CASES[case][1])).out_tensor
    expected = formula(case)
    assert out.shape == expected.shape and out.dtype == np.float64
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_finite_differences(case):
    check_gradients(module(case), *CASES[case][1])
    assert tape == []


def gradient(module, *arrays, g):
    tensors = [Tensor(array) for array in arrays]
    module.apply_fwd(*tensors).out_gradient = g
    tape_bwd()
    return [tensor.out_gradient for tensor in tensors]


def test_a_query_that_sees_nothing_gives_zero_and_gets_no_gradient():
    attend = Attention()
    dq, dk, dv, dmask = gradient(attend, *qkv(B=1, H=1), MASK, g=np.ones((1, 1, 3, 4)))
    assert not attend.out_tensor[0, 0, 1].any() and not dq[0, 0, 1].any()
    assert dq[0, 0, 0].any() and dk.any() and dv.any() and dmask is None


def test_masked_keys_and_values_are_never_read():
    q, k, v = qkv(B=1, H=1)
    mask = np.array([True, True, False, True, False])
    clean = Attention().apply_fwd(q, k, v, mask).out_tensor
    k[..., ~mask, :], v[..., ~mask, :] = np.nan, np.inf
    np.testing.assert_array_equal(Attention().apply_fwd(q, k, v, mask).out_tensor, clean)
    tape.clear()


def test_sinks_are_a_parameter_whose_gradient_adds_up():
    arrays, g = qkv(), normal(2, 2, 3, 4)
    attend = Attention(sinks=SINKS)
    assert [name for name, _ in attend.named_parameters()] == ["sinks"]
    gradient(attend, *arrays, g=g)
    once = attend.sinks.grad.copy()
    gradient(attend, *arrays, g=g)
    assert once.all()
    np.testing.assert_allclose(attend.sinks.grad, 2 * once, **TOLERANCE)
    shared = Parameter(SINKS)
    assert Attention(sinks=shared).sinks is shared and Attention().parameters() == []


def test_without_a_seed_each_application_drops_others_and_remembers_which():
    """The backward pass has the mask of its own application: v's gradient is nonzero where its weight was kept."""
    T = 16
    q, k, v = np.zeros((1, 1, T, 1)), np.zeros((1, 1, T, 1)), np.eye(T)[None, None]
    attend = Attention(dropout_p=0.5)
    applications = [attend.apply_fwd(*map(Tensor, (q, k, v))) for _ in range(2)]
    first, second = (node.out_tensor[0, 0] > 0 for node in applications)  # values of the identity show the weights
    assert 0.3 < first.mean() < 0.7 and (first != second).any()
    for node in applications:
        node.out_gradient = np.ones((1, 1, T, T))
    tape_bwd()
    for node, keep in zip(applications, (first, second), strict=True):
        np.testing.assert_allclose(node.in_modules[2].out_gradient[0, 0, :, 0], keep.sum(0) / T / 0.5, **TOLERANCE)


def test_a_seed_decides_by_position():
    q, k, v = qkv()
    outs = [Attention(dropout_p=0.5, seed=s).apply_fwd(q, k, v).out_tensor for s in (1, 1, 2, -1)]
    tape.clear()
    np.testing.assert_array_equal(outs[0], outs[1])
    assert (outs[0] != outs[2]).any() and (outs[0] != outs[3]).any()


def test_float32():
    options = dict(softcap=2.0, window=(2, 1), alibi_slopes=SLOPES, dropout_p=0.3, seed=SEED)
    arrays, g = qkv(), normal(2, 2, 3, 4)
    exact = Attention(**options, sinks=SINKS)
    gradients = gradient(exact, *arrays, g=g)
    attend = Attention(**options, sinks=Parameter(SINKS, dtype=np.float32))
    tensors = [Tensor(array, dtype=np.float32) for array in arrays]
    attend.apply_fwd(*tensors).out_gradient = g
    tape_bwd()
    assert attend.out_tensor.dtype == attend.sinks.grad.dtype == np.float32
    close = dict(rtol=1e-5, atol=1e-5)  # a few dozen roundings of 6e-8
    np.testing.assert_allclose(attend.out_tensor, exact.out_tensor, **close)
    np.testing.assert_allclose(attend.sinks.grad, exact.sinks.grad, **close)
    for tensor, expected in zip(tensors, gradients, strict=True):
        assert tensor.out_gradient.dtype == np.float32
        np.testing.assert_allclose(tensor.out_gradient, expected, **close)
