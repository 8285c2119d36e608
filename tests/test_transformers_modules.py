"""Norms and MLPs that only look like those that pykern computes: patch() tells them apart by what they compute."""

import copy
import math

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'pykern[hf]'")

from transformers_models import counted, make  # noqa: E402

from pykern.integrations.transformers import patch  # noqa: E402

pytestmark = pytest.mark.one_isa


class Norm(nn.Module):
    """A root-mean-square norm with one step changed."""

    def __init__(self, twist):
        super().__init__()
        self.weight, self.eps, self.twist = nn.Parameter(torch.ones(8)), 1e-6, twist

    def forward(self, x):
        eps = 0.0 if self.twist == "no epsilon" else self.eps
        if self.twist == "epsilon outside":
            y = x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)
        elif self.twist == "mean":
            y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)
        else:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return y * self.weight.exp() if self.twist == "exponential" else y * self.weight


class TwistedRMSNorm(Norm):
    pass


@pytest.mark.parametrize("twist", ["nothing", "no epsilon", "epsilon outside", "mean", "exponential"])
def test_norms_are_recognised_by_what_they_compute(twist):
    holder = nn.ModuleList([TwistedRMSNorm(twist)])
    x = torch.randn(3, 8)
    expected = holder[0](x)
    patched = patch(holder)
    if twist == "nothing":
        assert patched.replaced == {"0": "pykern.rms_norm"}
    else:
        assert patched.left == {"0": "computes something else than a root-mean-square norm"}
    torch.testing.assert_close(holder[0](x), expected, rtol=1e-6, atol=1e-6)  # float32, sums of 8 numbers


def test_a_norm_of_another_dtype_than_its_weight_is_the_family_s_own(monkeypatch):
    """A float32 weight makes of bfloat16 a float32 result in Llama, which pykern.rms_norm would not."""
    theirs, ours = make("llama").model.norm, make("llama").model.norm
    patch(nn.ModuleList([ours]))
    calls = counted(monkeypatch, "rms_norm_forward", "mlp_forward")
    x = torch.randn(3, 32)
    assert ours(x.bfloat16()).dtype == torch.float32 and torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))
    assert calls["rms_norm_forward"] == 0
    ours(x)
    assert calls["rms_norm_forward"] == 1


def test_a_norm_without_a_weight_is_left():
    holder = nn.ModuleList([TwistedRMSNorm("nothing")])
    holder[0].bias = nn.Parameter(torch.zeros(8))
    assert patch(holder).left == {"0": "is not a norm with one weight [D] and one epsilon"}


class MLP(nn.Module):
    """Two layers with something between them, or around them."""

    def __init__(self, between, after=None, p=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 6)
        self.between, self.after, self.p = between, after, p

    def forward(self, x):
        h = nn.functional.dropout(self.between(self.fc1(x)), self.p, self.training)
        out = self.fc2(h)
        return out if self.after is None else self.after(out)


def tanh_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ALIKE = {
    "relu": (MLP(torch.relu), "pykern.mlp, relu"),
    "gelu": (MLP(nn.GELU()), "pykern.mlp, gelu"),
    "gelu by hand": (MLP(tanh_gelu), "pykern.mlp, gelu_tanh"),
    "silu": (MLP(nn.SiLU()), "pykern.mlp, silu"),
    "sigmoid": (MLP(torch.sigmoid), "pykern.mlp, sigmoid"),
    "quick gelu": (MLP(lambda x: x * torch.sigmoid(1.702 * x)), None),
    "squared relu": (MLP(lambda x: torch.relu(x) ** 2), None),
    "a scale after": (MLP(torch.relu, after=lambda x: 1.001 * x), None),
    "dropout by hand": (MLP(torch.relu, p=0.1), None),
}


@pytest.mark.parametrize("case", ALIKE)
def test_mlps_are_recognised_by_what_they_compute(case, monkeypatch):
    module, words = ALIKE[case]
    holder = nn.ModuleList([copy.deepcopy(module)]).train()
    patched = patch(holder, linear=False)
    expected = "computes something else than an MLP of relu, gelu, gelu_tanh, silu, sigmoid"
    assert (patched.replaced, patched.left) == (({"0": words}, {}) if words else ({}, {"0": expected}))
    assert all(m.training for m in holder.modules())  # trying it out left no trace
    calls = counted(monkeypatch, "rms_norm_forward", "mlp_forward")
    x = torch.randn(3, 6)
    holder.eval()
    torch.testing.assert_close(holder[0](x), copy.deepcopy(module).eval()(x), rtol=1e-5, atol=1e-6)  # float32, 9 terms
    assert calls["mlp_forward"] == (1 if words else 0)


def test_an_mlp_with_other_parts_is_left():
    module = MLP(torch.relu)
    module.norm = nn.LayerNorm(6)
    assert patch(nn.ModuleList([module])).left == {"0": "has parts that an MLP has not: norm"}
