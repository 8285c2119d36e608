"""Squared error and layer-wise pre-training: gradients, what each phase changes, the best linear autoencoder."""

import copy

import numpy as np
import pytest

from pykern.tape import (
    Autoencoder,
    Classifier,
    Encoder,
    Linear,
    Network,
    SquaredError,
    Tensor,
    check_gradients,
    fit,
    no_tape,
    pretrain_autoencoders,
    pretrain_supervised,
    tape,
    tape_bwd,
)
from pykern.tape.autoencoder import Headed, batches

pytestmark = pytest.mark.one_isa


def values(module):
    return {name: parameter.value.copy() for name, parameter in module.named_parameters()}


def changed(module, before):
    """Names of the parameters whose value is another one than before."""
    return {name for name, parameter in module.named_parameters() if (parameter.value != before[name]).any()}


def clusters(n, rng):
    """n points [n, 6] round three corners in a plane, and which corner: two features tell the classes apart."""
    plane = rng.normal(size=(2, 6))
    corners = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]])
    labels = rng.integers(0, 3, n)
    return (corners[labels] + 0.3 * rng.normal(size=(n, 2))) @ plane, labels


@pytest.mark.parametrize("reduction, expected", [("none", [5.0, 0.0]), ("sum", 5.0), ("mean", 2.5)])
def test_squared_error_is_the_sum_over_a_row(reduction, expected):
    y, a = Tensor([[1.0, 2.0], [3.0, 4.0]]), Tensor([[2.0, 0.0], [3.0, 4.0]])
    loss = SquaredError(reduction=reduction).apply_fwd(y, a)
    np.testing.assert_array_equal(loss.out_tensor, expected)
    loss.out_gradient = np.ones_like(loss.out_tensor)
    tape_bwd()
    share = 0.5 if reduction == "mean" else 1.0
    np.testing.assert_array_equal(y.out_gradient, share * np.array([[-2.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(a.out_gradient, -y.out_gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_squared_error_gradients(reduction):
    rng = np.random.default_rng(0)
    check_gradients(SquaredError(reduction=reduction), rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4)))
    check_gradients(SquaredError(reduction=reduction), rng.normal(size=3), rng.normal(size=3))


def test_squared_error_of_no_rows_is_zero():
    assert SquaredError().apply_fwd(np.zeros((0, 3)), np.zeros((0, 3))).out_tensor == 0
    tape_bwd()


def test_squared_error_refuses():
    with pytest.raises(
        ValueError, match=r"SquaredError: targets has shape \(3,\), expected that of predictions, \(2, 3\)"
    ):
        SquaredError().apply_fwd(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"SquaredError: predictions has shape \(\), expected 1 dimensions or more"):
        SquaredError().apply_fwd(np.array(1.0), np.array(1.0))
    with pytest.raises(TypeError, match="SquaredError: predictions is float32 but targets is float64"):
        SquaredError().apply_fwd(Tensor([1.0], dtype="float32"), np.zeros(1))
    with pytest.raises(ValueError, match="SquaredError: reduction is 'max'"):
        SquaredError(reduction="max")
    assert tape == []


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_gradients_of_the_networks(activation):
    rng = np.random.default_rng(1)
    encoder = Encoder(4, 3, activation=activation, rng=0)
    x, labels = rng.normal(size=(5, 4)), np.array([0, 1, 2, 1, 0])
    for network, arrays in (
        (Autoencoder(encoder, rng=1), (x,)),
        (Headed(encoder, 3, rng=1), (x, labels)),
        (Classifier((4, 3, 3, 3), activation=activation, rng=0), (x, labels)),
    ):
        for parameter in network.parameters():  # biases start at 0, the kink of a ReLU whose inputs are 0
            parameter.value += rng.normal(0, 0.3, parameter.value.shape)
        check_gradients(network, *arrays)


def test_the_loss_of_an_autoencoder_is_its_formula():
    autoencoder, x = Autoencoder(Encoder(4, 2, rng=0), rng=1), np.random.default_rng(0).normal(size=(7, 4))
    encode, decode = autoencoder.encoder.linear, autoencoder.decoder
    h = 1 / (1 + np.exp(-(x @ encode.weight.value.T + encode.bias.value)))
    expected = np.mean(np.sum((x - h @ decode.weight.value.T - decode.bias.value) ** 2, axis=1))
    with no_tape():
        assert autoencoder.apply_fwd(x).out_tensor == pytest.approx(expected, rel=1e-13)
        assert autoencoder.reconstruct(x).out_tensor.shape == x.shape


class Straight(Network):
    """An autoencoder without an activation, whose best loss is known."""

    def __init__(self):
        self.encode, self.decode, self.loss = Linear(5, 2, rng=0), Linear(2, 5, rng=1), SquaredError()

    def connect(self, x):
        return self.loss(self.decode(self.encode(x)), x)


def test_a_linear_autoencoder_finds_the_principal_components():
    """No linear code of two numbers loses less than the variance outside the first two principal components."""
    x = np.random.default_rng(0).normal(size=(60, 5)) * [3.0, 2.0, 0.5, 0.3, 0.2]
    lost = np.linalg.svd(x - x.mean(0), compute_uv=False)[2:] ** 2 / len(x)
    losses = fit(Straight(), x, steps=600, batch_size=60, lr=0.02, rng=0)
    assert losses[0] > 5 and (1 - 1e-12) * lost.sum() <= losses[-1] < 1.001 * lost.sum()


def test_autoencoders_are_trained_one_after_the_other_and_leave_the_head():
    x, _ = clusters(60, np.random.default_rng(0))
    classifier = Classifier((6, 5, 4, 3), rng=0)
    twin, before = copy.deepcopy(classifier), values(classifier)
    losses = pretrain_autoencoders(classifier, x, steps=40, rng=3, lr=0.02)
    assert [len(layer) for layer in losses] == [40, 40]
    assert all(np.mean(layer[-5:]) < 0.9 * np.mean(layer[:5]) for layer in losses)
    assert changed(classifier, before) == {f"encoders.{i}.linear.{name}" for i in (0, 1) for name in ("weight", "bias")}

    rng = np.random.default_rng(3)  # the same by hand: the second layer learns from what the first gives in the end
    assert fit(Autoencoder(twin.encoders[0], rng=rng), x, steps=40, rng=rng, lr=0.02) == losses[0]
    with no_tape():
        h = twin.encoders[0].apply_fwd(x).out_tensor
    assert fit(Autoencoder(twin.encoders[1], rng=rng), h, steps=40, rng=rng, lr=0.02) == losses[1]
    assert changed(classifier, values(twin)) == set()


def test_supervised_layers_learn_the_labels_and_leave_the_head():
    x, labels = clusters(60, np.random.default_rng(0))
    classifier = Classifier((6, 5, 4, 3), rng=0)
    before = values(classifier)
    losses = pretrain_supervised(classifier, x, labels, steps=80, rng=3, lr=0.03)
    assert all(layer[0] > 0.8 and layer[-1] < 0.3 for layer in losses)
    assert not any(name.startswith("head") for name in changed(classifier, before))
    assert len(changed(classifier, before)) == 4


def test_fine_tuning_classifies_what_it_has_not_seen():
    rng = np.random.default_rng(0)
    x, labels = clusters(300, rng)
    classifier = Classifier((6, 8, 4, 3), rng=0)
    pretrain_autoencoders(classifier, x[:200], steps=40, rng=0, lr=0.02)
    before = values(classifier)
    fit(classifier, x[:200], labels[:200], steps=150, rng=0, lr=0.02)
    assert changed(classifier, before) == set(before)  # the body is not frozen
    predicted = classifier.predict(x[200:])
    assert predicted.dtype == np.int64 and (predicted == labels[200:]).mean() > 0.95
    assert tape == []


def test_an_epoch_has_each_row_once():
    drawn = list(batches(7, 3, 5, np.random.default_rng(0)))
    assert [len(rows) for rows in drawn] == [3] * 5
    for one, two in (drawn[0:2], drawn[2:4]):
        assert len({*one, *two}) == 6
    (everything,) = batches(4, 50, 1, np.random.default_rng(0))
    assert sorted(everything) == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_losses():
    x, labels = clusters(40, np.random.default_rng(0))
    one, two, other = (fit(Classifier((6, 3, 3), rng=0), x, labels, steps=5, batch_size=8, rng=s) for s in (1, 1, 2))
    assert one == two != other
    assert fit(Classifier((6, 3, 3)), x, labels, steps=0) == []


X = np.zeros((4, 6))
REFUSED = {
    "labels out of range": (IndexError, r"targets\[1\] is 3, expected 0 .. 2", [X, [0, 3, 0, 0]], {}),
    "labels that are not whole": (TypeError, "targets is float64, expected integers", [X, np.zeros(4)], {}),
    "wrong width": (ValueError, "Linear: a has shape", [np.zeros((4, 5)), [0] * 4], {}),
    "lengths differ": (ValueError, r"fit: arrays\[1\] has shape \(3,\), expected one number of rows", [X, [0] * 3], {}),
    "no rows": (ValueError, r"fit: arrays\[0\] has shape \(0, 6\)", [X[:0], np.zeros(0, int)], {}),
    "a number": (ValueError, r"fit: arrays\[0\] has shape \(\)", [1.0, [0]], {}),
    "nothing": (TypeError, "fit: got no arrays", [], {}),
    "text": (TypeError, r"fit: arrays\[0\] is a str", ["digits", [0]], {}),
    "no loss": (ValueError, r"fit: the network gives shape \(4, 3\), expected a scalar loss", [X], {}),
    "NaN": (FloatingPointError, "fit: the loss before the first step is nan", [X * np.nan, [0] * 4], {}),
    "steps below 0": (ValueError, "fit: steps is -1, expected 1 or more", [X, [0] * 4], {"steps": -1}),
    "half a step": (TypeError, "fit: steps is 0.5, expected a whole number", [X, [0] * 4], {"steps": 0.5}),
    "an empty batch": (ValueError, "fit: batch_size is 0", [X, [0] * 4], {"batch_size": 0}),
    "NaN rate": (ValueError, "AdamW: lr is nan", [X, [0] * 4], {"lr": float("nan")}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fit_refuses_before_a_weight_changes(case):
    error, message, arrays, options = REFUSED[case]
    classifier = Classifier((6, 4, 3), rng=0)
    before = values(classifier)
    with pytest.raises(error, match=message):
        fit(classifier, *arrays, **({"steps": 3} | options))
    assert changed(classifier, before) == set() and tape == []


def test_a_loss_that_overflows_later_is_refused():
    x, labels = clusters(20, np.random.default_rng(0))
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"fit: the loss of step \d+ is (nan|inf)"):
        fit(Classifier((6, 3, 3), activation="relu", rng=0), x, labels, steps=20, lr=1e200)
    assert tape == []


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match=r"Classifier: sizes is \(6, 3\), expected input, one or more hidden layers"):
        Classifier((6, 3))
    with pytest.raises(ValueError, match="Classifier: sizes is '643'"):
        Classifier("643")
    with pytest.raises(ValueError, match="Linear: n_out is 0"):
        Classifier((6, 0, 3))
    with pytest.raises(ValueError, match="Encoder: activation is 'tanh', expected one of 'sigmoid', 'relu'"):
        Encoder(3, 2, activation="tanh")
    with pytest.raises(TypeError, match="pretrain_autoencoders: classifier is a Linear, expected a Classifier"):
        pretrain_autoencoders(Linear(6, 3), X, steps=1)
    with pytest.raises(TypeError, match="pretrain_supervised: classifier is a Encoder, expected a Classifier"):
        pretrain_supervised(Encoder(6, 3), X, [0] * 4, steps=1)
