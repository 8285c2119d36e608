"""SGD and AdamW against their formulas, step by step."""

import numpy as np
import pytest

from pykern.tape import SGD, AdamW, Linear, Parameter

rng = np.random.default_rng(0)
gradients = [rng.normal(size=(3, 5)) for _ in range(4)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    start = rng.normal(size=(3, 5))
    parameter, expected, m = Parameter(start), start.copy(), np.zeros((3, 5))
    optimizer = SGD([parameter], lr=0.1, momentum=momentum)
    for g in gradients:
        parameter.grad = g
        optimizer.step()
        m = momentum * m + g
        expected = expected - 0.1 * m
        np.testing.assert_allclose(parameter.value, expected, rtol=1e-13)


def test_adamw():
    start = rng.normal(size=(3, 5))
    parameter, expected, m, v = Parameter(start), start.copy(), 0.0, 0.0
    optimizer = AdamW([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step, g in enumerate(gradients, 1):
        parameter.grad = g
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        expected = expected - 0.01 * 0.1 * expected
        expected = expected - 0.01 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-6)
        np.testing.assert_allclose(parameter.value, expected, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_zero_grad_and_a_shared_parameter(optimizer):
    linear = Linear(2, 2, rng=0)
    once, twice = Parameter(linear.weight.value), linear.weight
    once.grad, twice.grad = np.ones((2, 2)), np.ones((2, 2))
    optimizer([once], lr=0.1).step()
    both = optimizer([twice, twice], lr=0.1)
    both.step()  # listed twice, moved once
    np.testing.assert_array_equal(once.value, twice.value)
    both.zero_grad()
    assert not twice.grad.any()


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_float32_parameters(optimizer):
    linear = Linear(2, 3, dtype=np.float32, rng=0)
    before = linear.weight.value.copy()
    linear.weight.grad = np.ones((3, 2))
    optimizer(linear.parameters(), lr=0.1).step()
    assert linear.weight.value.dtype == np.float32 and (linear.weight.value < before).all()
