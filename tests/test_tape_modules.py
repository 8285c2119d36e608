"""Every module: its output against the formula in numpy, every element of every gradient against finite differences."""

import math

import numpy as np
import pytest

from pykern.tape import (
    GELU,
    Add,
    CrossEntropy,
    Embedding,
    LayerNorm,
    Linear,
    MergeHeads,
    Mul,
    ReLU,
    Reshape,
    RMSNorm,
    Scale,
    Sigmoid,
    SiLU,
    Softmax,
    SoftmaxCrossEntropy,
    SplitHeads,
    Sum,
    Tensor,
    Transpose,
    check_gradients,
    no_tape,
    tape,
    tape_bwd,
)

rng = np.random.default_rng(0)
TOLERANCE = dict(rtol=1e-12, atol=1e-13)  # float64, sums of a few dozen terms


def normal(*shape):
    return rng.normal(size=shape)


def positive(*shape):
    return rng.uniform(0.1, 1.0, size=shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalise(x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


LINEAR, NO_BIAS, LAYER_NORM, RMS_NORM = Linear(3, 5, rng=1), Linear(3, 5, bias=False, rng=1), LayerNorm(7), RMSNorm(7)
EMBEDDING = Embedding(6, 3, rng=1)
for parameter in (LINEAR.bias, LAYER_NORM.weight, LAYER_NORM.bias, RMS_NORM.weight):
    parameter.value = normal(*parameter.value.shape)

# name: module, inputs, formula
CASES = {
    "linear": (LINEAR, [normal(4, 3)], lambda a: a @ LINEAR.weight.value.T + LINEAR.bias.value),
    "linear without bias": (NO_BIAS, [normal(2, 2, 3)], lambda a: a @ NO_BIAS.weight.value.T),
    "linear on one row": (LINEAR, [normal(3)], lambda a: LINEAR.weight.value @ a + LINEAR.bias.value),
    "sigmoid": (Sigmoid(), [normal(3, 7)], sigmoid),
    "relu": (ReLU(), [normal(3, 7)], lambda a: np.maximum(a, 0)),
    "silu": (SiLU(), [normal(3, 7)], lambda a: a * sigmoid(a)),
    "gelu": (GELU(), [normal(3, 7)], lambda a: 0.5 * a * (1 + erf(a / math.sqrt(2)))),
    "gelu of gpt-2": (
        GELU(tanh=True),
        [normal(3, 7)],
        lambda a: 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    ),
    "softmax": (Softmax(), [normal(2, 3, 7)], softmax),
    "layer norm": (
        LAYER_NORM,
        [normal(2, 3, 7)],
        lambda a: normalise(a) * LAYER_NORM.weight.value + LAYER_NORM.bias.value,
    ),
    "rms norm": (
        RMS_NORM,
        [normal(3, 7)],
        lambda a: a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) * RMS_NORM.weight.value,
    ),
    "embedding with a repeated token": (
        EMBEDDING,
        [np.array([[1, 5, 1], [0, 1, 2]])],
        lambda ids: EMBEDDING.weight.value[ids],
    ),
    "cross entropy of distributions": (
        CrossEntropy(),
        [positive(4, 5), positive(4, 5)],
        lambda p, a: -(a * np.log(p)).sum() / 4,
    ),
    "cross entropy of labels": (
        CrossEntropy(reduction="sum"),
        [positive(3, 5), np.array([4, 0, 4])],
        lambda p, a: -np.log(p[[0, 1, 2], a]).sum(),
    ),
    "cross entropy per row": (
        CrossEntropy(reduction="none"),
        [positive(2, 3, 5), positive(2, 3, 5)],
        lambda p, a: -(a * np.log(p)).sum(-1),
    ),
    "softmax cross entropy of labels": (
        SoftmaxCrossEntropy(),
        [normal(2, 2, 5), np.array([[4, 0], [3, 3]])],
        lambda x, a: -np.log(softmax(x)[[[0, 0], [1, 1]], [[0, 1], [0, 1]], a]).mean(),
    ),
    "softmax cross entropy with an ignored label": (
        SoftmaxCrossEntropy(),
        [normal(3, 5), np.array([4, -100, 1])],
        lambda x, a: -np.log(softmax(x)[[0, 2], [4, 1]]).mean(),
    ),
    "softmax cross entropy with smoothing": (
        SoftmaxCrossEntropy(label_smoothing=0.2, reduction="none"),
        [normal(3, 5), np.array([4, 0, 1])],
        lambda x, a: -((0.8 * np.eye(5)[a] + 0.04) * np.log(softmax(x))).sum(-1),
    ),
    "softmax cross entropy of distributions": (
        SoftmaxCrossEntropy(reduction="sum"),
        [normal(3, 5), positive(3, 5)],
        lambda x, a: -(a * np.log(softmax(x))).sum(),
    ),
    "add": (Add(), [normal(2, 3), normal(2, 3)], lambda a, b: a + b),
    "add with broadcasting": (Add(), [normal(3), normal(2, 1), normal(4, 2, 3)], lambda a, b, c: a + b + c),
    "mul with broadcasting": (Mul(), [normal(4, 1, 3), normal(2, 1)], lambda a, b: a * b),
    "scale": (Scale(-2.5), [normal(2, 3)], lambda a: -2.5 * a),
    "sum": (Sum(), [normal(2, 3)], np.sum),
    "reshape": (Reshape(3, -1), [normal(2, 6)], lambda a: a.reshape(3, 4)),
    "transpose": (Transpose(), [normal(2, 3)], lambda a: a.T),
    "transpose of three dimensions": (Transpose(1, 2, 0), [normal(2, 3, 4)], lambda a: a.transpose(1, 2, 0)),
    "split heads": (SplitHeads(2), [normal(2, 3, 8)], lambda a: np.stack([a[..., :4], a[..., 4:]], 1)),
    "merge heads": (MergeHeads(), [normal(2, 2, 3, 4)], lambda a: np.concatenate([a[:, 0], a[:, 1]], -1)),
}


@pytest.mark.parametrize("name", CASES)
def test_output_is_the_formula(name):
    module, arrays, formula = CASES[name]
    with no_tape():
        out = module.apply_fwd(*map(Tensor, arrays)).out_tensor
    expected = formula(*arrays)
    assert out.shape == np.shape(expected) and out.dtype == np.float64
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_finite_differences(name):
    module, arrays, _ = CASES[name]
    check_gradients(module, *arrays)
    assert tape == []


def gradient(module, *arrays, g):
    tensors = [Tensor(array) for array in arrays]
    module.apply_fwd(*tensors).out_gradient = g
    tape_bwd()
    return [tensor.out_gradient for tensor in tensors]


def test_linear_gradients_are_g_bT_and_wT_g():
    a, g = normal(4, 3), normal(4, 5)
    LINEAR.zero_grad()
    (g_a,) = gradient(LINEAR, a, g=g)
    np.testing.assert_allclose(LINEAR.weight.grad, sum(np.outer(g[i], a[i]) for i in range(4)), **TOLERANCE)
    np.testing.assert_allclose(LINEAR.bias.grad, g.sum(0), **TOLERANCE)
    np.testing.assert_allclose(g_a, [LINEAR.weight.value.T @ g[i] for i in range(4)], **TOLERANCE)


def test_softmax_gradient_is_gT_times_diag_b_minus_b_bT():
    a, g = normal(5), normal(5)
    b = softmax(a)
    np.testing.assert_allclose(gradient(Softmax(), a, g=g)[0], g @ (np.diag(b) - np.outer(b, b)), **TOLERANCE)


def test_cross_entropy_gradient_is_minus_g_a_over_p():
    p, a = positive(1, 5), positive(1, 5)
    np.testing.assert_allclose(gradient(CrossEntropy(), p, a, g=2.0)[0], -2.0 * a / p, **TOLERANCE)


@pytest.mark.parametrize("targets", [np.array([4, 0, 1]), np.eye(5)[[4, 0, 1]], positive(3, 5)])
def test_fused_cross_entropy_agrees_with_softmax_and_cross_entropy(targets):
    logits, fused = Tensor(normal(3, 5)), SoftmaxCrossEntropy()
    fused.apply_fwd(logits, Tensor(targets))
    tape_bwd()
    expected, logits.out_gradient = logits.out_gradient, None
    two_steps = CrossEntropy().apply_fwd(Softmax().apply_fwd(logits), Tensor(targets))
    tape_bwd()
    np.testing.assert_allclose(two_steps.out_tensor, fused.out_tensor, **TOLERANCE)
    np.testing.assert_allclose(logits.out_gradient, expected, **TOLERANCE)


def test_fused_cross_entropy_stays_finite_where_probabilities_vanish():
    logits = Tensor([[0.0, 2000.0], [0.0, -2000.0]])
    loss = SoftmaxCrossEntropy(reduction="none").apply_fwd(logits, Tensor([0, 1]))
    loss.out_gradient = [1.0, 1.0]
    tape_bwd()
    np.testing.assert_allclose(loss.out_tensor, [2000, 2000])
    np.testing.assert_allclose(logits.out_gradient, [[-1, 1], [1, -1]])


def test_cross_entropy_of_a_zero_probability():
    p = Tensor([[0.0, 1.0]])
    assert CrossEntropy().apply_fwd(p, Tensor([[0.0, 1.0]])).out_tensor == 0  # 0 log 0 = 0
    tape_bwd()
    np.testing.assert_array_equal(p.out_gradient, [[0, -1]])
    assert CrossEntropy().apply_fwd(p, Tensor([[1.0, 0.0]])).out_tensor == np.inf
    tape.clear()


def test_ignored_labels_have_no_loss_and_no_gradient():
    logits = Tensor(normal(2, 5))
    loss = SoftmaxCrossEntropy(ignore_index=-1).apply_fwd(logits, Tensor([-1, -1]))
    tape_bwd()
    assert loss.out_tensor == 0 and not logits.out_gradient.any()


@pytest.mark.parametrize("module", [Linear(3, 2), Sigmoid(), GELU(), Softmax(), LayerNorm(3), Scale(2.0), Sum()])
def test_no_rows_at_all(module):
    x = Tensor(np.empty((0, 3)))
    out = module.apply_fwd(x)
    out.out_gradient = np.ones_like(out.out_tensor)
    tape_bwd()
    assert x.out_gradient.shape == (0, 3)


def test_start_values_are_reproducible_and_in_range():
    one, two, other = Linear(16, 8, rng=3), Linear(16, 8, rng=3), Linear(16, 8, rng=4)
    np.testing.assert_array_equal(one.weight.value, two.weight.value)
    assert one.weight.value.shape == (8, 16) and (one.weight.value != other.weight.value).any()
    assert np.abs(one.weight.value).max() <= 0.25 and not one.bias.value.any()
    assert Embedding(500, 20, rng=0).weight.value.std() == pytest.approx(0.02, rel=0.05)
