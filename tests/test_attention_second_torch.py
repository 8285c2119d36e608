"""attention differentiated twice in torch's machinery: a third time, some inputs alone, checkpointing, opcheck."""

import pytest
import torch
from attention_tools import HIDDEN_ROW, gradients, second, small_inputs
from tools import draw

import pykern
from pykern.testing import assert_bitwise, assert_close, reference

pytestmark = pytest.mark.one_isa


def test_a_third_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in small_inputs().values())
    (dq,) = torch.autograd.grad(pykern.attention(q, k, v).square().sum(), q, create_graph=True)
    (ddk,) = torch.autograd.grad(dq.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::attention has no third derivative"):
        ddk.sum().backward()


def test_only_some_inputs_require_grad():
    """Each alone gets what it gets among all."""
    tensors, dout = small_inputs(bias=(3, 4), sinks=True), draw(1, 2, 3, 3, seed=8)

    def penalty(leaves):
        first = gradients(pykern.attention, {n: x for n, x in leaves.items() if x.requires_grad}, dout, **constant)
        return sum(g.square().sum() for g in first.values())

    for name in tensors:
        constant = {n: x for n, x in tensors.items() if n != name}
        leaf = tensors[name].detach().requires_grad_()
        alone = torch.autograd.grad(penalty({name: leaf}), leaf, materialize_grads=True)[0]
        exact_leaf = leaf.detach().requires_grad_()
        out = reference.attention(**constant, **{name: exact_leaf})
        (g,) = torch.autograd.grad(out, exact_leaf, dout, create_graph=True)
        exact = (
            torch.autograd.grad(g.square().sum(), exact_leaf, materialize_grads=True)[0]
            if g.requires_grad
            else torch.zeros_like(leaf)  # out is linear in v
        )
        assert_close(alone, exact, name=name, gradient=True)


def test_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    def checkpointed(q, k, v, return_lse):
        return checkpoint(lambda *x: pykern.attention(*x, causal=True, return_lse=True), q, k, v, use_reentrant=False)

    tensors, dout, dlse = small_inputs(), draw(1, 2, 3, 3, seed=8), draw(1, 2, 3, seed=9)
    plain = second(pykern.attention, tensors, dout, dlse, causal=True)
    for name, x in second(checkpointed, tensors, dout, dlse).items():
        assert_bitwise(x, plain[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    """Of both derivatives: schema, autograd, fake and symbolic tracing, through the second backward, too."""
    tensors = small_inputs(B=2, dtype=dtype, bias=(1, 2, 1, 4), sinks=True)
    q, k, v, bias, sinks = (x.requires_grad_() for x in tensors.values())
    mask, seed = HIDDEN_ROW.expand(2, 1, 3, 4), torch.tensor([3])
    options = (mask, bias, torch.ones(2, 2), sinks, None, None, seed, 2, 1, 0.5, 1.5, 0.3)
    ops = torch.ops.pykern
    torch.library.opcheck(ops.attention.default, (q, k, v, *options))
    out, lse = (x.detach() for x in ops.attention(q, k, v, *options))
    dout = draw(*out.shape, dtype=dtype).requires_grad_()
    for dlse in (None, torch.ones_like(lse).requires_grad_()):
        arguments = (q, k, v, out, lse, dout, dlse, True, True, *options)
        torch.library.opcheck(ops.attention_backward.default, arguments)
        rest = [x.detach() for x in (dout, q, k, v, bias, sinks)]
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (q, k, v, dout, dlse)]
        options_ = [x.detach() if isinstance(x, torch.Tensor) else x for x in options]
        torch.library.opcheck(ops.attention_second.default, (*plain, *rest[1:], *options_))
