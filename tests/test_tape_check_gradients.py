"""check_gradients must find every kind of wrong gradient, name the worst element and leave no trace."""

import numpy as np
import pytest

from pykern.tape import (
    Embedding,
    GradientError,
    Linear,
    Module,
    Network,
    Parameter,
    ReLU,
    Scale,
    Sum,
    Tensor,
    check_gradients,
    tape,
    tape_bwd,
)

x = np.random.default_rng(0).normal(size=(3, 4))


class Square(Module):
    def forward(self, a):
        return a * a

    def backward(self, in_tensors, out_tensor, out_gradient):
        (a,) = in_tensors
        return self.spoil(2 * a * out_gradient)

    def spoil(self, gradient):
        return gradient


class Gain(Module):
    """b = gain a"""

    def __init__(self):
        self.gain = Parameter(np.array([1.0, -2.0, 3.0, 0.5]))

    def forward(self, a):
        return a * self.gain.value

    def backward(self, in_tensors, out_tensor, out_gradient):
        (a,) = in_tensors
        self.gain.grad += (out_gradient * a).sum(0)
        return out_gradient * self.gain.value


def test_a_right_module_passes_and_the_worst_element_is_named():
    worst = check_gradients(Gain(), x)
    assert worst.name.startswith(("a[", "gain["))
    assert worst.backward == pytest.approx(worst.difference, rel=1e-5, abs=1e-7)
    assert worst.name in str(worst)


def test_a_single_wrong_element_is_found_and_named():
    class Wrong(Square):
        def spoil(self, gradient):
            gradient[1, 2] += 1e-4
            return gradient

    with pytest.raises(GradientError, match=r"^Wrong: 1 of 12 gradient elements are wrong, the worst is a\[1, 2\]: "):
        check_gradients(Wrong(), x)


def test_the_worst_of_several_wrong_elements_is_named():
    class Wrong(Square):
        def spoil(self, gradient):
            gradient[0, 0] += 0.1
            gradient[2, 3] += 10.0
            return gradient

    with pytest.raises(GradientError, match=r"2 of 12 .* worst is a\[2, 3\]: backward gives"):
        check_gradients(Wrong(), x)


def test_a_wrong_parameter_gradient_is_found():
    class Wrong(Gain):
        def backward(self, in_tensors, out_tensor, out_gradient):
            (a,) = in_tensors
            self.gain.grad += out_gradient[0] * a[0]  # forgets the other rows
            return out_gradient * self.gain.value

    with pytest.raises(GradientError, match=r"^Wrong: 4 of 16 .* gain\[\d\]"):
        check_gradients(Wrong(), x)


def test_a_missing_gradient_is_found():
    class Wrong(Square):
        def spoil(self, gradient):
            return None

    with pytest.raises(GradientError, match="12 of 12"):
        check_gradients(Wrong(), x)


def test_a_backward_that_ignores_out_gradient_is_found():
    class Wrong(Module):
        def forward(self, a):
            return a.sum()

        def backward(self, in_tensors, out_tensor, out_gradient):
            return np.ones_like(in_tensors[0])

    with pytest.raises(GradientError, match="12 of 12"):
        check_gradients(Wrong(), x)


def test_a_parameter_gradient_that_is_overwritten_is_found():
    class Wrong(Gain):
        def backward(self, in_tensors, out_tensor, out_gradient):
            (a,) = in_tensors
            self.gain.grad = (out_gradient * a).sum(0)
            return out_gradient * self.gain.value

    with pytest.raises(GradientError, match=r"^Wrong: a second pass does not double the gradient of gain"):
        check_gradients(Wrong(), x)


def test_nan_is_wrong():
    class Wrong(Square):
        def spoil(self, gradient):
            gradient[2, 1] = np.nan
            return gradient

    with pytest.raises(GradientError, match=r"1 of 12 .* a\[2, 1\]: backward gives nan"):
        check_gradients(Wrong(), x)


def test_a_kink_shows_as_a_mismatch():
    with pytest.raises(GradientError, match=r"ReLU: 1 of 2 .* a\[1\]: backward gives -?0, "):
        check_gradients(ReLU(), np.array([1.0, 0.0]))


def test_the_tolerance_is_used():
    class Rough(Square):
        def spoil(self, gradient):
            return gradient * 1.01

    check_gradients(Rough(), x, rtol=0.05)
    with pytest.raises(GradientError):
        check_gradients(Rough(), x, rtol=0.001)


def test_scalars_have_no_index():
    assert check_gradients(Square(), 3.0).name == "a"


def test_large_values_are_stepped_in_proportion():
    check_gradients(Square(), np.array([1e6, -1e-6, 0.0]))


def test_networks_are_checked_through_all_their_parameters():
    class Net(Network):
        def __init__(self):
            self.embedding, self.linear = Embedding(4, 3, rng=0), Linear(3, 2, rng=0)

        def connect(self, ids):
            return self.linear(self.embedding(ids))

    net = Net()
    check_gradients(net, np.array([0, 3, 3]))
    net.linear.weight.value[:] = 0  # still right, and now the embedding has no gradient at all
    check_gradients(net, np.array([0, 3, 3]))


def test_values_gradients_and_tape_are_left_as_they_were():
    gain, data = Gain(), Tensor(x)
    value = gain.gain.value.copy()
    waiting = Sum()(Scale(2.0)(data))
    gain.gain.grad += 7.0
    check_gradients(gain, data)
    np.testing.assert_array_equal(gain.gain.value, value)
    assert (gain.gain.grad == 7).all() and data.out_gradient is None and tape[-1] is waiting and len(tape) == 2
    tape_bwd()
    assert (data.out_gradient == 2).all()


def test_values_are_restored_after_an_error():
    class Fragile(Gain):
        def forward(self, a):
            if self.gain.value[1] != -2.0:
                raise RuntimeError("touched")
            return super().forward(a)

    gain = Fragile()
    with pytest.raises(RuntimeError, match="touched"):
        check_gradients(gain, x)
    assert gain.gain.value.tolist() == [1, -2, 3, 0.5] and gain.gain.out_gradient is None and tape == []


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match=r"^check_gradients: Square has no float inputs and no parameters"):
        check_gradients(Square(), np.array([1, 2]))
    with pytest.raises(TypeError, match=r"^check_gradients: weight is float32, expected float64"):
        check_gradients(Linear(4, 2, dtype=np.float32), x)
    with pytest.raises(TypeError, match=r"^Square: got 2 inputs, expected \(a\)"):
        check_gradients(Square(), x, x)
