"""The tape itself: order, accumulation, reuse, seeds, depth; with modules of one line, so that numbers are plain."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import pykern.tape as pt
from pykern.tape import (
    Add,
    Linear,
    Module,
    Mul,
    Network,
    Scale,
    Sigmoid,
    Sum,
    Tensor,
    check_gradients,
    tape,
    tape_bwd,
)


class Square(Module):
    """Keeps a in self, so a second application would spoil the first one if they were the same object."""

    def forward(self, a):
        self.a = a
        return a * a

    def backward(self, in_tensors, out_tensor, out_gradient):
        return 2 * self.a * out_gradient


@pytest.fixture(autouse=True)
def empty_tape():
    tape.clear()
    yield
    tape.clear()


def test_applications_are_pushed_in_order_and_popped_in_reverse():
    popped = []

    class Logged(Square):
        def backward(self, *arguments):
            popped.append(self)
            return super().backward(*arguments)

    first = Logged().apply_fwd(Tensor(3.0))
    second = Logged().apply_fwd(first)
    assert tape == [first, second] and pt.tape is tape
    tape_bwd()
    assert popped == [second, first] and tape == []


def test_apply_fwd_stores_the_output_on_the_module_and_on_what_it_returns():
    square = Square()
    y = square.apply_fwd(Tensor([1.0, -2.0]))
    assert isinstance(y, Square)
    assert y.out_tensor.tolist() == square.out_tensor.tolist() == [1.0, 4.0]


def test_modules_themselves_serve_as_inputs():
    x, inner, outer = Tensor(3.0), Square(), Square()
    inner.apply_fwd(x)
    outer.apply_fwd(inner)
    tape_bwd()
    assert outer.out_tensor == 81 and inner.out_gradient == 18 and x.out_gradient == 4 * 3**3


def test_calling_a_module_is_apply_fwd():
    x = Tensor(3.0)
    assert Square()(x).out_tensor == 9 and len(tape) == 1


def test_seed_of_a_scalar_is_one():
    x = Tensor(3.0)
    y = Square()(x)
    tape_bwd()
    assert y.out_gradient == 1 and x.out_gradient == 6


def test_the_seed_is_the_out_gradient_of_the_module():
    x, square = Tensor([1.0, 2.0]), Square()
    square(x)
    square.out_gradient = [10, 100]
    tape_bwd()
    assert x.out_gradient.tolist() == [20, 400]


def test_a_vector_without_a_seed_is_refused_and_can_be_seeded_afterwards():
    x = Tensor([1.0, 2.0])
    y = Square()(x)
    with pytest.raises(ValueError, match=r"^Square: out_gradient is not set, .*shape \(2,\)"):
        tape_bwd()
    assert tape == [y]
    y.out_gradient = np.ones(2)
    tape_bwd()
    assert x.out_gradient.tolist() == [2, 4]


def test_seeds_in_the_middle_and_at_the_end_add_up():
    x = Tensor(3.0)
    y = Square()(x)
    z = Square()(y)
    y.out_gradient, z.out_gradient = 5.0, 1.0
    tape_bwd()
    assert x.out_gradient == (5 + 2 * 9) * 6


def test_what_the_loss_does_not_depend_on_is_dropped():
    x = Tensor([1.0, 2.0])
    aside = Square()(x)
    Sum()(Scale(3.0)(x))
    tape_bwd()
    assert aside.out_gradient is None and x.out_gradient.tolist() == [3, 3] and tape == []


def test_one_input_used_twice_gets_both_gradients():
    x = Tensor(3.0)
    Mul()(x, x)
    tape_bwd()
    assert x.out_gradient == 6


def test_gradients_of_two_inputs_are_separate_arrays():
    a, b = Tensor([1.0, 2.0]), Tensor([3.0, 4.0])
    Sum()(Add()(a, b))
    tape_bwd()
    a.out_gradient *= 0
    assert b.out_gradient.tolist() == [1, 1]


def test_a_module_applied_twice_keeps_both_applications_apart():
    square, x = Square(), Tensor(3.0)
    y = square(x)
    z = square(y)
    assert (y.out_tensor, z.out_tensor) == (9, 81) and square.out_tensor == 81
    tape_bwd()
    assert (z.out_gradient, y.out_gradient) == (1, 18) and x.out_gradient == 4 * 3**3
    assert square.out_gradient == 1


def test_applying_an_application_again_does_not_disturb_it():
    square = Square()
    y = square(Tensor(3.0))
    z = y(y)
    assert (y.out_tensor, z.out_tensor, square.out_tensor) == (9, 81, 9)
    tape_bwd()
    assert y.out_gradient == 18


def test_shared_weights_collect_the_gradients_of_every_application():
    x, linear = Tensor([[1.0, -2.0]]), Linear(2, 2, rng=0)
    w, c = linear.weight.value, linear.bias.value
    h = linear(x)
    Sum()(linear(h))
    tape_bwd()
    g = np.ones((1, 2))  # of the second application; the first receives g w
    np.testing.assert_allclose(linear.weight.grad, g.T @ h.out_tensor + (g @ w).T @ x.out_tensor, rtol=1e-14)
    np.testing.assert_allclose(linear.bias.grad, (g + g @ w)[0], rtol=1e-14)
    np.testing.assert_allclose(x.out_gradient, g @ w @ w, rtol=1e-14)
    np.testing.assert_allclose(h.out_tensor, x.out_tensor @ w.T + c, rtol=1e-14)


def test_results_of_one_pass_survive_the_next():
    square = Square()
    before = square(Tensor(2.0))
    tape_bwd()
    after = square(Tensor(5.0))
    tape_bwd()
    assert (before.out_tensor, after.out_tensor) == (4, 25)


def test_parameter_gradients_add_up_over_passes_until_zeroed():
    x, linear = Tensor([[1.0, 2.0]]), Linear(2, 1, rng=0)

    def one_pass():
        Sum()(linear(x))
        tape_bwd()
        return linear.weight.grad.copy()

    once = one_pass()
    np.testing.assert_array_equal(once, [[1, 2]])
    np.testing.assert_array_equal(one_pass(), 2 * once)
    np.testing.assert_array_equal(x.out_gradient, 2 * linear.weight.value)
    linear.zero_grad()
    x.zero_grad()
    assert x.out_gradient is None and not linear.weight.grad.any()
    np.testing.assert_array_equal(one_pass(), once)


def test_tape_bwd_on_an_empty_tape_changes_nothing():
    x = Tensor(3.0)
    y = Square()(x)
    tape_bwd()
    tape_bwd()
    assert (y.out_gradient, x.out_gradient) == (1, 6)


def test_an_application_that_left_the_tape_cannot_be_continued():
    x = Tensor(3.0)
    y = Square()(x)
    tape_bwd()
    with pytest.raises(ValueError, match=r"^Square: a \(Square\) has left the tape"):
        Square()(y)
    Square()(Tensor(y.out_tensor))  # a constant is fine
    tape_bwd()
    assert x.out_gradient == 6


def test_apply_bwd_adds_into_the_inputs():
    x, square = Tensor(3.0), Square()
    square(x)
    square.apply_bwd()
    assert x.out_gradient == 6
    square.apply_bwd()
    assert x.out_gradient == 12


def test_old_applications_are_freed_at_once():
    """Without the garbage collector: an application that nobody holds must not live in a chain or a circle."""
    square, x = Square(), Tensor(3.0)
    gc.disable()
    try:
        y = square(x)
        z = y(y)
        tape_bwd()
        references = [weakref.ref(y), weakref.ref(z)]
        del y, z
        square(x)  # takes the place of the latest application
        tape_bwd()
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs_with_shared_modules_and_values(seed):
    class Graph(Network):
        def __init__(self):
            self.linear, self.sigmoid, self.add, self.mul = Linear(3, 3, rng=seed), Sigmoid(), Add(), Mul()

        def connect(self, a, b):
            rng, values = np.random.default_rng(seed), [a, b]
            for _ in range(20):
                one, two = (values[i] for i in rng.integers(0, len(values), 2))
                kind = rng.integers(4)
                if kind < 2:
                    values.append([self.linear, self.sigmoid][kind](one))
                else:
                    values.append([self.add, self.mul][kind - 2](one, two))
            return self.sigmoid(self.add(*values[-4:]))

    rng = np.random.default_rng(seed)
    check_gradients(Graph(), 0.5 * rng.normal(size=(2, 3)), 0.5 * rng.normal(size=(2, 3)))


def test_no_tape_forgets_what_is_applied_inside():
    x = Tensor(3.0)
    y = Square()(x)
    with pt.no_tape():
        assert Square()(Square()(y)).out_tensor == 9**4
    assert tape == [y]
    with pytest.raises(RuntimeError, match="inside"), pt.no_tape():
        Square()(y)
        raise RuntimeError("inside")
    assert tape == [y]


def test_the_tape_is_empty_after_an_error_in_backward():
    class Broken(Square):
        def backward(self, in_tensors, out_tensor, out_gradient):
            raise RuntimeError("broken on purpose")

    Square()(Broken()(Tensor(3.0)))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        tape_bwd()
    assert tape == []


def test_a_chain_of_5000_modules():
    x = y = Tensor([1.0, -1.0])
    for _ in range(5000):
        y = Scale(1.0001)(y)
    Sum()(y)
    tape_bwd()
    np.testing.assert_allclose(x.out_gradient, [1.0001**5000] * 2, rtol=1e-11)  # 5000 roundings


def test_a_chain_of_5000_applications_of_one_network_in_a_small_stack():
    """Freeing the graph must not recurse either: a thread with a small stack runs it all."""
    results = []

    def work():
        linear, sigmoid = Linear(1, 1, rng=0), Sigmoid()
        x = y = Tensor([[0.5]])
        for _ in range(2500):
            y = sigmoid(linear(y))
        tape_bwd()
        results.append((np.isfinite(x.out_gradient).all(), linear.weight.grad.shape, len(tape)))

    size = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    assert results == [(True, (1, 1), 0)]


def test_a_network_has_the_output_and_gradient_of_its_last_application():
    class Twice(Network):
        def __init__(self):
            self.square = Square()

        def connect(self, x):
            return self.square(self.square(x))

    x, twice = Tensor(3.0), Twice()
    out = twice(x)
    assert twice.out_tensor == out.out_tensor == 81
    twice.out_gradient = 2.0
    tape_bwd()
    assert x.out_gradient == 2 * 4 * 3**3 and twice.out_gradient == 2


def test_importing_the_tape_does_not_import_torch():
    code = "import sys, pykern.tape; print(sorted({'torch', 'numpy', 'pykern._C'} & set(sys.modules)))"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['numpy', 'pykern._C']"
