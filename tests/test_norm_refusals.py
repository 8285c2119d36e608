"""layer_norm and rms_norm refuse bad input in a sentence that names it, and the extension writes nothing then."""

import math

import numpy as np
import pytest
import torch

import pykern
from pykern import _C

pytestmark = pytest.mark.one_isa


def test_refusals():
    x, w = torch.ones(2, 3), torch.ones(3)
    norm = pykern.layer_norm
    cases = [
        (lambda: norm([1.0]), TypeError, "layer_norm: x must be a torch.Tensor, got list"),
        (lambda: norm(x, 1.0), TypeError, "layer_norm: weight must be a torch.Tensor, got float"),
        (lambda: norm(x, w, residual=1), TypeError, "layer_norm: residual must be a torch.Tensor, got int"),
        (lambda: pykern.rms_norm(x, [1, 1, 1]), TypeError, "rms_norm: weight must be a torch.Tensor, got list"),
        (
            lambda: norm(x.long()),
            TypeError,
            "layer_norm: x has dtype int64, expected float32, float64, bfloat16 or float16",
        ),
        (lambda: norm(x, w.half()), TypeError, "layer_norm: weight has dtype float16 but x has float32"),
        (lambda: norm(x, w, w.double()), TypeError, "layer_norm: bias has dtype float64 but x has float32"),
        (
            lambda: norm(x, residual=x.bfloat16()),
            TypeError,
            "layer_norm: residual has dtype bfloat16 but x has float32",
        ),
        (
            lambda: norm(torch.tensor(1.0)),
            ValueError,
            r"layer_norm: x must be \[..., D\] with at least one dimension, got a scalar",
        ),
        (
            lambda: norm(x, torch.ones(2)),
            ValueError,
            r"layer_norm: weight has shape \[2\], expected D = 3 in dimension 0",
        ),
        (lambda: norm(x, torch.ones(1, 3)), ValueError, r"layer_norm: weight must be \[D\], got shape \[1, 3\]"),
        (
            lambda: norm(x, residual=torch.ones(3)),
            ValueError,
            r"layer_norm: residual has shape \[3\] but x has \[2, 3\]",
        ),
        (lambda: norm(x, eps=-1.0), ValueError, "layer_norm: eps is -1, expected a finite number of at least 0"),
        (
            lambda: pykern.rms_norm(x, eps=math.nan),
            ValueError,
            "rms_norm: eps is nan, expected a finite number of at least 0",
        ),
    ]
    for refused, error, words in cases:
        with pytest.raises(error, match=words):
            refused()


def test_refusals_of_the_extension_leave_the_outputs_alone():
    """What a caller of _C can break: nothing is written."""
    x = np.ones((4, 6), np.float32)

    def forward(out=None, total=None, mean=None, rstd=None, residual=None, x=x):
        arrays = dict(out=out, mean=mean, rstd=rstd)
        for name, shape in dict(out=(4, 6), mean=(4,), rstd=(4,)).items():
            arrays[name] = np.full(shape, 7, np.float32) if arrays[name] is None else arrays[name]
        try:
            _C.layer_norm_forward(
                x, None, None, residual, arrays["out"], total, arrays["mean"], arrays["rstd"], eps=1e-5
            )
        finally:
            assert arrays["out"] is x or (arrays["out"] == 7).all()

    readonly = np.full((4, 6), 7, np.float32)
    readonly.setflags(write=False)
    sevens = np.full((8,), 7, np.float32)
    cases = [
        (dict(residual=x.copy()), ValueError, "layer_norm: residual is given without sum"),
        (dict(total=x.copy()), ValueError, "layer_norm: sum is given without residual"),
        (dict(out=x), ValueError, "layer_norm: out shares memory with x"),
        (dict(out=readonly), ValueError, "layer_norm: out is read-only"),
        (dict(out=np.broadcast_to(sevens[:6], (4, 6))), ValueError, "layer_norm: out is read-only"),
        (dict(mean=np.ones(4)), TypeError, "layer_norm: mean has dtype float64, expected float32"),
        (dict(mean=sevens), ValueError, r"layer_norm: mean has shape \[8\], expected that of x without its last"),
        (dict(mean=sevens[::2]), ValueError, r"layer_norm: mean of shape \[4\] must be contiguous"),
        (dict(mean=sevens[:4], rstd=sevens[2:6]), ValueError, "layer_norm: rstd shares memory with mean"),
        (
            dict(x=np.ones((4, 12), np.float32)[:, ::2]),
            ValueError,
            "layer_norm: x must have stride 1 in its last dimension, got 2",
        ),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            forward(**arguments)
