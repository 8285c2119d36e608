"""linear_cross_entropy refuses bad input before it writes anything, in a sentence that names it."""

import math

import numpy as np
import pytest
import torch

import pykern
from pykern import _C

pytestmark = pytest.mark.one_isa


def test_refusals():
    x, weight, bias, target = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), torch.tensor([0, 3])
    f = pykern.linear_cross_entropy
    shapes = "target must have the shape of x without its last dimension, got x "
    cases = [
        (lambda: f([1.0], weight, target), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: f(x, None, target), TypeError, "weight must be a torch.Tensor, got NoneType"),
        (lambda: f(x, weight, 3), TypeError, "target must be a torch.Tensor, got int"),
        (lambda: f(x, weight, target, bias=1.0), TypeError, "bias must be a torch.Tensor, got float"),
        (lambda: f(x.long(), weight, target), TypeError, "x has dtype int64, expected float32"),
        (lambda: f(x, weight.double(), target), TypeError, "weight has dtype float64 but x has float32"),
        (lambda: f(x, weight, target, bias=bias.half()), TypeError, "bias has dtype float16 but x has float32"),
        (lambda: f(x, weight, target.int()), TypeError, "target has dtype int32, expected int64"),
        (lambda: f(x, weight, target[:1]), ValueError, shapes + r"\[2, 3\], target \[1\]"),
        (lambda: f(torch.ones(()), weight, target), ValueError, shapes + r"\[\], target \[2\]"),
        (
            lambda: f(x, weight[:, :2], target),
            ValueError,
            r"weight has shape \[4, 2\], expected inputs of x = 3 in dim",
        ),
        (lambda: f(x, bias, target), ValueError, r"weight must be \[V, K\], got shape \[4\]"),
        (
            lambda: f(x, weight, target, bias=bias[:3]),
            ValueError,
            r"bias has shape \[3\], expected classes of weight = 4",
        ),
        (lambda: f(x, weight, target, bias=weight), ValueError, r"bias must be \[V\], got shape \[4, 3\]"),
        (lambda: f(x, weight, target, reduction="max"), ValueError, "reduction is 'max', expected 'mean', 'sum' or 'n"),
        (lambda: f(x, weight, target, label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected 0..1"),
        (lambda: f(x, weight, target, z_loss=math.nan), ValueError, "z_loss is nan, expected a finite number >= 0"),
        (
            lambda: f(x, weight, target + 1),
            IndexError,
            "target 4 at position 1 is neither in 0 <= target < 4 nor ignore",
        ),
        (
            lambda: f(x, weight, target - 1),
            IndexError,
            "target -1 at position 0 is neither in 0 <= target < 4 nor ignor",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=f"linear_cross_entropy: {words}"):
            call()


def test_refusals_of_the_kernel_write_nothing():
    x, weight, target = np.ones((2, 3)), np.ones((4, 3)), np.array([0, 3])
    loss, dx, dweight, dbias = (np.full(shape, 7.0) for shape in (2, (2, 3), (4, 3), 4))
    options = dict(ignore_index=-100, label_smoothing=0.0, z_loss=0.0)

    def run(**changed):
        inputs = dict(x=x, weight=weight, bias=np.ones(4), target=target, loss=loss, dloss=np.ones(2))
        _C.linear_cross_entropy(*(inputs | dict(dx=dx, dweight=dweight, dbias=dbias) | changed).values(), **options)

    cases = [
        (dict(x=np.ones((1, 2, 3))), ValueError, r"x must be \[M, K\], got shape \[1, 2, 3\]"),
        (dict(loss=np.full(3, 7.0)), ValueError, r"loss has shape \[3\], expected rows of x = 2 in dimension 0"),
        (dict(loss=np.full(2, 7.0, np.float32)), TypeError, "loss has dtype float32, expected float64"),
        (dict(target=np.array([0, 4])), IndexError, "target 4 at position 1 is neither"),
        (dict(loss=dx[:, 0]), ValueError, "dx shares memory with loss"),
        (dict(x=np.ones((3, 2)).T), ValueError, "x must have stride 1 in its last dimension, got 2"),
        (dict(dx=np.full((2, 4), 7.0)), ValueError, r"dx has shape \[2, 4\] but x has \[2, 3\]"),
        (dict(dbias=np.full(3, 7.0)), ValueError, r"dbias has shape \[3\], expected classes of weight = 4"),
        (dict(dx=dweight[:2]), ValueError, "dweight shares memory with dx"),
        (dict(dloss=np.ones(3)), ValueError, r"dloss has shape \[3\], expected rows of x = 2 in dimension 0"),
        (dict(dloss=None), ValueError, "dloss is needed for gradients"),
        (dict(target=np.array([-1, 3])), IndexError, "target -1 at position 0 is neither"),
    ]
    for changed, error, words in cases:
        with pytest.raises(error, match=f"linear_cross_entropy: {words}"):
            run(**changed)
        for array in (loss, dx, dweight, dbias):
            assert (array == 7.0).all(), f"written although refused: {words}"
    run()
