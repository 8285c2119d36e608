"""The two models: gradients, and that they learn."""

import numpy as np
import pytest

from pykern.tape import SGD, AdamW, NeuralNetwork, TransformerLM, check_gradients, no_tape, tape, tape_bwd


def moons(n, rng):
    """Two half circles, one inside the other: not separable by a line."""
    angle, label = rng.uniform(0, np.pi, n), rng.integers(0, 2, n)
    x = np.stack([np.cos(angle) + label, np.sin(angle) * (1 - 2 * label) + 0.5 * label], 1)
    return x + rng.normal(0, 0.05, (n, 2)), label


def train(model, optimizer, steps, *batch):
    losses = []
    for _ in range(steps):
        loss = model.apply_fwd(*batch)
        tape_bwd()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.out_tensor))
    return losses


def test_neural_network_gradients():
    rng = np.random.default_rng(0)
    net = NeuralNetwork(3, 5, 4, rng=0)
    check_gradients(net, rng.normal(size=(6, 3)), np.array([0, 3, 1, 2, 0, 1]))
    check_gradients(net, rng.normal(size=(2, 3)), rng.dirichlet(np.ones(4), size=2))
    check_gradients(net, rng.normal(size=(2, 3)))


def test_neural_network_learns_xor():
    x, targets = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    net = NeuralNetwork(2, 8, 2, rng=0)
    losses = train(net, SGD(net.parameters(), lr=2.0, momentum=0.9), 500, x, targets)
    assert losses[0] > 0.5 and losses[-1] < 0.01
    with no_tape():
        probabilities = net.apply_fwd(x).out_tensor
    assert probabilities.argmax(1).tolist() == [0, 1, 1, 0]
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_neural_network_separates_moons_it_has_not_seen():
    rng = np.random.default_rng(0)
    x, labels = moons(200, rng)
    net = NeuralNetwork(2, 16, 2, rng=0)
    losses = train(net, AdamW(net.parameters(), lr=0.05, weight_decay=0.0), 300, x, labels)
    assert losses[-1] < 0.02
    x, labels = moons(200, rng)
    with no_tape():
        assert (net.apply_fwd(x).out_tensor.argmax(1) == labels).mean() > 0.98


def test_transformer_gradients():
    rng = np.random.default_rng(0)
    model = TransformerLM(5, 4, n_layer=2, n_head=2, n_embd=4, rng=0)
    for parameter in model.parameters():
        parameter.value += rng.normal(0, 0.5, parameter.value.shape)  # away from the flat start
    ids, targets = rng.integers(0, 5, (2, 4)), rng.integers(0, 5, (2, 4))
    check_gradients(model, ids, targets)


def test_the_head_shares_the_table_of_the_tokens():
    model = TransformerLM(7, 4, n_layer=1, n_head=1, n_embd=6)
    assert model.head.weight is model.tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tokens.weight" in names and "head.weight" not in names and len(names) == 2 + 16 + 2


def test_a_row_of_logits_depends_on_the_tokens_before_it_only():
    model, rng = TransformerLM(11, 8, rng=0), np.random.default_rng(0)
    ids = rng.integers(0, 11, (1, 8))
    other = ids.copy()
    other[0, 5:] = (other[0, 5:] + 1) % 11
    with no_tape():
        one, two = model.apply_fwd(ids).out_tensor, model.apply_fwd(other).out_tensor
    np.testing.assert_array_equal(one[:, :5], two[:, :5])
    assert (one[:, 5:] != two[:, 5:]).any(-1).all()


def test_transformer_learns_a_sequence_by_heart():
    text = "the tape pops in reverse order"
    letters = sorted(set(text))
    ids = np.array([[letters.index(letter) for letter in text]])
    model = TransformerLM(len(letters), len(text), n_layer=2, n_head=2, n_embd=32, rng=0)
    losses = train(model, AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), 200, ids[:, :-1], ids[:, 1:])
    assert losses[0] == pytest.approx(np.log(len(letters)), rel=0.05) and losses[-1] < 0.02
    generated = model.generate(ids[:, :1], len(text) - 1)
    assert "".join(letters[i] for i in generated[0]) == text
    assert tape == []


def test_generation_goes_on_past_the_block():
    model = TransformerLM(5, 4, n_layer=1, n_head=1, n_embd=4, rng=0)
    assert model.generate(np.array([[1, 2, 3], [0, 0, 4]]), 6).shape == (2, 9)
