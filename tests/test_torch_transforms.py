"""Every op of pykern.ops under autocast, checkpointing and torch.func (grad, vjp, jvp, vmap); table: torch_cases.py."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint
from torch_cases import CASES, clones, floating, leaves, results

import pykern
from pykern.ops._transforms import in_transform

pytestmark = [
    pytest.mark.one_isa,
    # torch says so of an op that vmap runs as a loop
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented"),
]
# The same kernels run; only sums of several gradients, and the loss head's scale, are taken in another order.
CLOSE = dict(rtol=1e-12, atol=1e-13)
DIFFERENTIABLE = [name for name, case in CASES.items() if case.gradient]
OTHERS = [name for name, case in CASES.items() if not case.gradient]
ONCE = [name for name in DIFFERENTIABLE if not CASES[name].twice]
FORWARD_MODE = {"merge_attention"}  # made of torch's own ops


def draw(name, seed=0):
    return CASES[name].tensors(2, dtype=torch.float64, seed=seed)


def split(tensors):
    """(floating tensors, the others)."""
    return (
        {key: x for key, x in tensors.items() if x.is_floating_point()},
        {key: x for key, x in tensors.items() if not x.is_floating_point()},
    )


def loss(name, **tensors):
    return sum(x.square().sum() for x in results(CASES[name].call(**tensors)))


def gradients(name, tensors):
    """By torch.autograd."""
    inputs = leaves(tensors)
    grads = torch.autograd.grad(loss(name, **inputs), floating(inputs))
    return dict(zip(split(inputs)[0], grads, strict=True))


# ---- autocast and checkpointing


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    """The result's dtype is that of torch's op of the kind; gradients have that of the float32 inputs."""
    case = CASES[name]
    tensors = leaves(case.tensors()) if case.gradient else case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        first, *_ = results(case.call(**tensors))
    assert first.dtype == (torch.bfloat16 if case.casts else torch.float32)
    if case.gradient:
        grads = torch.autograd.grad(first.float().square().sum(), floating(tensors), allow_unused=True)
        assert {g.dtype for g in grads if g is not None} == {torch.float32}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_checkpointing(name):
    """The op runs again in backward, to the same bits."""
    calls = []

    def call(tensors):
        calls.append(name)
        return loss(name, **tensors)

    inputs = leaves(draw(name))
    grads = torch.autograd.grad(checkpoint(call, inputs, use_reentrant=False), floating(inputs))
    assert len(calls) == 2
    for grad, expected in zip(grads, gradients(name, inputs).values(), strict=True):
        assert torch.equal(grad, expected)


# ---- torch.func


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_grad(name):
    tensors = draw(name)
    floats, others = split(tensors)
    found = torch.func.grad(lambda floats: loss(name, **floats, **others))(floats)
    torch.testing.assert_close(found, gradients(name, tensors), **CLOSE)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vjp(name):
    """The pullback runs when the transform is over."""
    tensors = draw(name)
    floats, others = split(tensors)
    out, pullback = torch.func.vjp(lambda floats: tuple(results(CASES[name].call(**floats, **others))), floats)
    assert not in_transform()
    (found,) = pullback(tuple(2 * x for x in out))  # the gradient of the sum of squares
    torch.testing.assert_close(found, gradients(name, tensors), **CLOSE)


def stacked(name):
    """Inputs of two calls, and those one above the other."""
    both = draw(name), draw(name, seed=20)
    return both, {key: torch.stack([x[key] for x in both]) for key in both[0]}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap(name):
    both, tensors = stacked(name)
    found = torch.vmap(lambda tensors: tuple(results(CASES[name].call(**tensors))))(tensors)
    expected = [results(CASES[name].call(**one)) for one in both]
    torch.testing.assert_close(list(found), [torch.stack(x) for x in zip(*expected, strict=True)], rtol=0, atol=0)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_each_sample(name):
    both, tensors = stacked(name)
    floats, others = split(tensors)
    found = torch.vmap(torch.func.grad(lambda floats, others: loss(name, **floats, **others)))(floats, others)
    expected = [gradients(name, one) for one in both]
    torch.testing.assert_close(found, {key: torch.stack([x[key] for x in expected]) for key in found}, **CLOSE)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autograd_through_vmap(name):
    both, tensors = stacked(name)
    inputs = leaves(tensors)
    total = torch.vmap(lambda tensors: loss(name, **tensors))(inputs).sum()
    found = dict(zip(split(inputs)[0], torch.autograd.grad(total, floating(inputs)), strict=True))
    expected = [gradients(name, one) for one in both]
    torch.testing.assert_close(found, {key: torch.stack([x[key] for x in expected]) for key in found}, **CLOSE)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative(name):
    """Attention has one; elsewhere it is refused, never taken for zero."""
    floats, others = split(draw(name))

    def slope(floats):
        grads = torch.func.grad(lambda floats: loss(name, **floats, **others))(floats)
        return sum(x.square().sum() for x in grads.values())

    if not CASES[name].twice:
        with pytest.raises(RuntimeError, match=r"pykern::\w+ has no second derivative"):
            torch.func.grad(slope)(floats)
        return
    inputs = leaves(floats)
    once = torch.autograd.grad(loss(name, **inputs, **others), list(inputs.values()), create_graph=True)
    twice = torch.autograd.grad(sum(x.square().sum() for x in once), list(inputs.values()))
    found = torch.func.grad(slope)(floats)
    # second derivatives of some hundred: sums of terms that cancel
    torch.testing.assert_close(found, dict(zip(inputs, twice, strict=True)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_jvp_is_refused(name):
    floats, others = split(draw(name))

    def call(floats):
        return loss(name, **floats, **others)

    if name in FORWARD_MODE:
        _, found = torch.func.jvp(call, (floats,), (clones(floats),))
        grads = gradients(name, floats | others)
        torch.testing.assert_close(found, sum((grads[key] * x).sum() for key, x in floats.items()), **CLOSE)
        return
    with pytest.raises(NotImplementedError, match=r"pykern::\w+ has no forward-mode derivative \(torch.func.jvp"):
        torch.func.jvp(call, (floats,), (clones(floats),))


@pytest.mark.parametrize("name", OTHERS)
def test_ops_that_write_have_no_transforms(name):
    floats, others = split(draw(name))
    with pytest.raises(RuntimeError, match=r"has no gradient|not differentiable; call it under torch.no_grad\(\)"):
        torch.func.grad(lambda floats: loss(name, **floats, **others))(clones(floats))
    _, tensors = stacked(name)
    before = clones(tensors)
    with pytest.raises(RuntimeError, match=r"Batching rule not implemented for pykern::\w+; the fallback path doesn't"):
        torch.vmap(lambda tensors: loss(name, **tensors))(tensors)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match=r"pykern::\w+ has no forward-mode derivative"):
        torch.func.jvp(lambda floats: loss(name, **floats, **others), (floats,), (clones(floats),))


def test_torch_ops_and_compiled_transforms_are_refused():
    x = torch.randn(3)
    words = "pykern::activation: torch.func.grad and vjp take pykern's functions in eager code"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.grad(lambda x: torch.ops.pykern.activation(x, "gelu").sum())(x)
    compiled = torch.compile(torch.func.grad(lambda x: pykern.gelu(x).sum()), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=words):
        compiled(x)
    torch.compiler.reset()


def test_a_gradient_that_an_op_refuses_is_refused_in_transforms_too():
    x, table = torch.randn(1, 1, 3, 4), torch.randn(3, 2)
    with pytest.raises(RuntimeError, match="rope: cos and sin get no gradient"):
        torch.func.grad(lambda table: pykern.rope(x, table, table).sum())(table)


def test_transforms_inside_one_another():
    """A Jacobian is vmap over a pullback; jacrev of jacrev of attention is its Hessian."""
    x = torch.randn(2, 3, dtype=torch.float64)
    found = torch.func.jacrev(pykern.gelu)(x)
    torch.testing.assert_close(found, torch.func.jacrev(gelu)(x), rtol=1e-10, atol=1e-12)
    q = torch.randn(1, 1, 2, 3, dtype=torch.float64)

    def attend(attention):
        return torch.func.jacrev(torch.func.jacrev(lambda q: attention(q, q + 1.0, q * q).sum()))(q)

    expected = attend(lambda q, k, v: (q @ k.mT * 3**-0.5).softmax(-1) @ v)
    torch.testing.assert_close(attend(pykern.attention), expected, rtol=1e-10, atol=1e-12)


def test_a_module_by_functional_call():
    """Gradients for each text by all parameters of a block."""
    block = pykern.nn.TransformerBlock(8, 2, dtype=torch.float64)
    parameters, x = dict(block.named_parameters()), torch.randn(3, 1, 4, 8, dtype=torch.float64)

    def of_text(parameters, x):
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    found = torch.vmap(torch.func.grad(of_text), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(of_text(parameters, x[i]), list(parameters.values()))
        for (name, grad), wanted in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(grad[i], wanted, **CLOSE, msg=name)


def test_dropout_in_vmap_follows_its_randomness():
    x = torch.randn(1, 1, 3, 4).expand(2, 1, 1, 3, 4)

    def drop(x):
        return pykern.attention(x, x, x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        torch.vmap(drop)(x)
    a, b = torch.vmap(drop, randomness="same")(x)
    assert torch.equal(a, b)


def test_documented_example():
    """docs/torch.md: its code runs."""
    page = (Path(__file__).parent.parent / "docs" / "torch.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/torch.md", "exec"), {})
