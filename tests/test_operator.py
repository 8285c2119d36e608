"""How torch reaches an op: plain calls skip the dispatcher with the same bits, all others go through it."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import pykern
from pykern.ops._library import is_plain, operators
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa

OPS = {
    "linear": lambda x, w: pykern.linear(x, w, activation="gelu"),
    "attention": lambda x, w: pykern.attention(x[None, None], w[None, None], w[None, None]),
    "layer_norm": lambda x, w: pykern.layer_norm(x, w[0]),
    "rms_norm": lambda x, w: pykern.rms_norm(x, w[0]),
    "mlp": lambda x, w: pykern.mlp(x, w, w.t()),
    "softmax": lambda x, w: pykern.softmax(x * w[:1]),
    "swiglu": lambda x, w: pykern.swiglu(x, w[:1].expand_as(x)),
    "embedding": lambda x, w: pykern.embedding(w, torch.tensor([0, 2, 2])) * x[:1],
    "cross_entropy": lambda x, w: pykern.cross_entropy(x, torch.tensor([0, 2, 1])) * w.sum(),
    "linear_cross_entropy": lambda x, w: pykern.linear_cross_entropy(x, w, torch.tensor([0, 2, 1])),
}


class Seen(TorchDispatchMode):
    """Counts the calls of pykern's ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pykern":
            self.names.append(func._schema.name.removeprefix("pykern::"))
        return func(*args, **(kwargs or {}))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, generator=generator), torch.randn(4, 5, generator=generator)


def gradients(f):
    x, w = (t.requires_grad_() for t in inputs())
    out = f(x, w)
    return out, *torch.autograd.grad(out.square().sum(), (x, w))


@pytest.mark.parametrize("name", OPS)
def test_plain_calls_skip_the_dispatcher_with_the_same_bits(name, monkeypatch):
    with Seen() as seen:
        expected = gradients(OPS[name])
    assert name in seen.names, "the mode must see the op: else both ways are one"
    for op in operators.values():
        monkeypatch.setattr(op, "dispatched", None)  # a call through the dispatcher would fail
    for a, b in zip(gradients(OPS[name]), expected, strict=True):
        assert_bitwise(a, b, name=name)
    with torch.no_grad():
        assert_bitwise(OPS[name](*inputs()), expected[0].detach(), name=f"{name} without gradient")


def test_what_is_plain():
    x = torch.randn(2, 3)
    assert is_plain((x, Parameter(x), None, 1.0, "relu", [True]))
    assert not is_plain((x, torch.empty(2, device="meta")))
    assert not is_plain((torch.view_as_complex(torch.randn(2, 2)).conj().imag,))  # its sign is not in memory

    class Labelled(torch.Tensor):
        pass

    assert not is_plain((x.as_subclass(Labelled),))
    with Seen():
        assert not is_plain((x,))
    with torch.profiler.profile():
        assert not is_plain((x,))
    with forward_ad.dual_level():
        assert not is_plain((x,))
    assert not torch.func.vmap(lambda row: torch.tensor(is_plain((row,))))(x).any()


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_refused_not_dropped(name):
    x, w = inputs()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(OPS[name], (x, w), (torch.ones_like(x), torch.ones_like(w)))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        OPS[name](forward_ad.make_dual(x, torch.ones_like(x)), forward_ad.make_dual(w, torch.ones_like(w)))
    with forward_ad.dual_level():
        OPS[name](x, w)  # nothing to drop
