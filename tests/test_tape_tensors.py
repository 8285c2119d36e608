"""The leaves: tensors and parameters, their dtypes, and how parameters are found."""

import numpy as np
import pytest

from pykern.tape import (
    Linear,
    Module,
    Mul,
    Network,
    Parameter,
    Scale,
    Sigmoid,
    SoftmaxCrossEntropy,
    Tensor,
    tape,
    tape_bwd,
)


class Square(Module):
    def forward(self, a):
        return a * a

    def backward(self, in_tensors, out_tensor, out_gradient):
        return 2 * in_tensors[0] * out_gradient


@pytest.fixture(autouse=True)
def empty_tape():
    tape.clear()
    yield
    tape.clear()


def test_parameters_are_found_in_attributes_lists_and_dicts_once_each():
    class Many(Network):
        def __init__(self):
            self.scale = Parameter(2.0)
            self.layers = [Linear(2, 2), Linear(2, 2, bias=False)]
            self.named = {"tied": self.layers[0], "own": Linear(2, 2, bias=False)}
            self.constant = Tensor(1.0)

        def connect(self, x):
            return self.layers[1](self.layers[0](x))

    many = Many()
    many(Tensor(np.ones((1, 2))))
    assert [key for key, _ in many.named_parameters()] == [
        "scale",
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "named.own.weight",
    ]


def test_a_parameter_is_an_input_like_any_other():
    scale, x = Parameter([2.0]), Tensor([3.0])
    Mul()(scale, x)
    tape_bwd()
    assert scale.grad.tolist() == scale.out_gradient.tolist() == [3] and x.out_gradient.tolist() == [2]


def test_parameter_value_and_grad_can_be_assigned():
    parameter = Parameter([1, 2])
    assert parameter.value.dtype == np.float64 and parameter.grad.tolist() == [0, 0]
    parameter.value = [3, 4]
    parameter.grad += [1, 1]
    parameter.grad += [1, 1]
    assert parameter.out_tensor.tolist() == [3, 4] and parameter.grad.tolist() == [2, 2]
    mine = np.array([5.0, 5.0])
    parameter.value = parameter.grad = mine
    parameter.value -= 1
    parameter.grad += 1
    assert (parameter.value.tolist(), parameter.grad.tolist(), mine.tolist()) == ([4, 4], [6, 6], [5, 5])
    with pytest.raises(ValueError, match=r"^Parameter: value has shape \(3,\), expected \(2,\)"):
        parameter.value = [1, 2, 3]
    with pytest.raises(ValueError, match=r"^Parameter: out_gradient has shape \(3,\), out_tensor has \(2,\)"):
        parameter.grad = [1, 2, 3]


@pytest.mark.parametrize(
    "array, dtype",
    [
        (1.5, np.float64),
        ([[1.0, 2.0]], np.float64),
        (np.ones(3, np.float32), np.float64),
        (np.ones(3, np.float16), np.float64),
        (np.ones(3, ">f8"), np.float64),
        ([1, 2], np.int64),
        (np.ones(3, np.int32), np.int64),
        ([True, False], np.bool_),
    ],
)
def test_dtype_of_a_tensor(array, dtype):
    assert Tensor(array).out_tensor.dtype == dtype


def test_float32_stays_float32_where_it_is_asked_for():
    x, linear = Tensor(np.ones((2, 3)), dtype=np.float32), Linear(3, 4, dtype=np.float32)
    y = Sigmoid()(linear(x))
    loss = Scale(0.5)(SoftmaxCrossEntropy()(y, Tensor([0, 3])))
    tape_bwd()
    arrays = [loss.out_tensor, y.out_gradient, x.out_gradient, linear.weight.grad, linear.bias.grad]
    assert {array.dtype.name for array in arrays} == {"float32"}


def test_integers_are_numbers_where_no_indices_are_meant():
    x = Tensor([[1, 2, 3]])
    linear = Linear(3, 2, rng=0)
    linear(x).out_gradient = [[1.0, 0.0]]
    tape_bwd()
    np.testing.assert_array_equal(x.out_gradient, linear.weight.value[:1])


def test_a_tensor_is_a_copy_of_its_array():
    array = np.array([1.0, 2.0])
    x = Tensor(array)
    y = Square()(x)
    array[:] = 0
    y.out_gradient = np.ones(2)
    tape_bwd()
    assert x.out_gradient.tolist() == [2, 4]
