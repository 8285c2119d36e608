"""cross_entropy refuses bad input before it writes anything, in a sentence that names it."""

import math

import numpy as np
import pytest
import torch

import pykern
from pykern import _C

pytestmark = pytest.mark.one_isa


def _refused():
    x, y = torch.ones(2, 3), torch.tensor([0, 2])
    return {
        "list": (dict(logits=[1.0]), TypeError, "cross_entropy: logits must be a torch.Tensor, got list"),
        "no target": (dict(target=None), TypeError, "cross_entropy: target must be a torch.Tensor, got NoneType"),
        "integer logits": (dict(logits=x.long()), TypeError, "cross_entropy: logits has dtype int64, expected float32"),
        "int32 target": (dict(target=y.int()), TypeError, "cross_entropy: target has dtype int32, expected int64"),
        "probabilities": (dict(target=x), TypeError, "cross_entropy: target has dtype float32, expected int64"),
        "scalar": (dict(logits=x[0, 0]), ValueError, r"cross_entropy: logits must be \[\.\.\., V\], got a scalar"),
        "shape": (dict(target=y[:1]), ValueError, r"cross_entropy: target has shape \[1\], expected that of logits"),
        "rank": (dict(target=y[None]), ValueError, r"cross_entropy: target has shape \[1, 2\], expected that of"),
        "reduction": (
            dict(reduction="avg"),
            ValueError,
            "cross_entropy: reduction is 'avg', expected 'mean', 'sum' or",
        ),
        "smoothing": (dict(label_smoothing=1.5), ValueError, "cross_entropy: label_smoothing is 1.5, expected 0..1"),
        "NaN smoothing": (dict(label_smoothing=math.nan), ValueError, "cross_entropy: label_smoothing is nan"),
        "z loss": (dict(z_loss=-1.0), ValueError, "cross_entropy: z_loss is -1, expected a finite number >= 0"),
        "label V": (
            dict(target=torch.tensor([0, 3])),
            IndexError,
            "cross_entropy: target 3 at position 1 is neither in 0 <= target < 3 nor ignore_index = -100",
        ),
        "label -1": (
            dict(target=torch.tensor([-1, 0])),
            IndexError,
            "cross_entropy: target -1 at position 0 is neither",
        ),
        "-100 not ignored": (
            dict(target=torch.tensor([0, -100]), ignore_index=7),
            IndexError,
            "target -100 at position 1",
        ),
        "no classes": (dict(logits=x[:, :0]), IndexError, "target 0 at position 0 is neither in 0 <= target < 0"),
    }


@pytest.mark.parametrize("case", _refused())
def test_refused(case):
    arguments, error, words = _refused()[case]
    with pytest.raises(error, match=words):
        pykern.cross_entropy(**{"logits": torch.ones(2, 3), "target": torch.tensor([0, 2]), **arguments})


def test_refused_before_any_write():
    options = dict(ignore_index=-100, label_smoothing=0.0, z_loss=0.0)
    logits, target = np.ones((2, 3), np.float32), np.array([0, 3])
    loss, lse, dlogits = np.full(2, 7, np.float32), np.full(2, 7.0), np.full((2, 3), 7, np.float32)
    with pytest.raises(IndexError, match="target 3 at position 1"):
        _C.cross_entropy_forward(logits, target, loss, lse, **options)
    with pytest.raises(IndexError, match="target 3 at position 1"):
        _C.cross_entropy_backward(logits, target, lse, loss, dlogits, **options)
    good = np.array([1, 2])
    backward = [
        ((logits, good, lse, loss, dlogits[:, :2]), ValueError, r"dlogits has shape \[2, 2\] but logits has \[2, 3\]"),
        ((logits, good, lse, loss.astype(float), dlogits), TypeError, "dloss has dtype float64, expected float32"),
        ((logits, good, lse.astype(int), loss, dlogits), TypeError, "lse has dtype int64, expected float32"),
        ((logits, good, lse, loss[:1], dlogits), ValueError, r"dloss has shape \[1\], expected that of logits without"),
        ((dlogits[:, 1:], good - 1, lse, loss, dlogits[:, :2]), ValueError, "dlogits shares memory with logits"),
    ]
    for arguments, error, words in backward:
        with pytest.raises(error, match=f"cross_entropy: {words}"):
            _C.cross_entropy_backward(*arguments, **options)
    with pytest.raises(ValueError, match="cross_entropy: lse has shape"):
        _C.cross_entropy_forward(logits, good, loss, lse[:1], **options)
    with pytest.raises(ValueError, match="cross_entropy: elements of loss share memory"):
        _C.cross_entropy_forward(logits, good, np.lib.stride_tricks.as_strided(loss, (2,), (0,)), lse, **options)
    assert (loss == 7).all() and (lse == 7).all() and (dlogits == 7).all()
