"""pykern.nn's modules copied, pickled, saved by torch, and their state exchanged with the torch.nn twins both ways."""

import copy
import io
import pickle

import pytest
import torch
from nn_cases import CASES, make, outputs
from nn_twins import randomise

from pykern import nn, optim
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa
TWINS = [name for name in CASES if CASES[name]()[2] is not None]


def through_file(thing, weights_only):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: through_file(module, weights_only=False),
}


def results(module, inputs):
    """Outputs and gradients."""
    out = outputs(module, inputs)
    parameters = list(module.parameters())
    if not parameters:
        return out
    return [*out, *torch.autograd.grad(sum(x.square().sum() for x in out), parameters)]


def test_every_module_is_in_the_table():
    assert sorted(CASES) == sorted(nn.__all__)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CASES)
def test_copies(name, how):
    """Of the same class, with the same bits, and of their own memory; after a use, too."""
    module, inputs, _ = make(name)
    module.eval()
    expected = results(module, inputs)
    twin = COPIES[how](module)
    assert type(twin) is type(module) and repr(twin) == repr(module) and not twin.training
    for ours, theirs in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()
    randomise(module, seed=50)  # the copy must not see it
    for ours, wanted in zip(results(twin, inputs), expected, strict=True):
        assert_bitwise(ours, wanted, name=name)


def test_constant_slopes_survive_copies():
    """ALiBi without parameters keeps its slopes outside the state dict."""
    module = nn.ALiBi(3)
    for how in COPIES.values():
        assert torch.equal(how(module).slopes, module.slopes)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_needs_no_pickled_classes(name):
    module, inputs, _ = make(name)
    expected = results(module, inputs)
    state = through_file(module.state_dict(), weights_only=True)
    twin, _, _ = make(name)
    randomise(twin, seed=50)
    twin.load_state_dict(state, strict=True)
    for ours, wanted in zip(results(twin, inputs), expected, strict=True):
        assert_bitwise(ours, wanted, name=name)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_state_dicts_both_ways(name, assign):
    """Strictly, by file; outputs agree to float64's rounding of short sums."""
    close = dict(rtol=1e-12, atol=1e-13)
    ours, inputs, theirs = make(name, dtype=torch.float64)
    theirs.load_state_dict(through_file(ours.state_dict(), weights_only=True), strict=True, assign=assign)
    for x, y in zip(outputs(ours, inputs), outputs(theirs, inputs), strict=True):
        torch.testing.assert_close(x, y, **close)
    randomise(theirs, seed=50)
    ours.load_state_dict(through_file(theirs.state_dict(), weights_only=True), strict=True, assign=assign)
    for x, y in zip(outputs(ours, inputs), outputs(theirs, inputs), strict=True):
        torch.testing.assert_close(x, y, **close)


@pytest.mark.parametrize("how", COPIES)
def test_an_optimizer_is_copied_with_its_state(how):
    """Masters of bfloat16 parameters included: the next step gives the same bits."""
    module = randomise(nn.Linear(4, 3, dtype=torch.bfloat16))
    optimizer = optim.AdamW(module.parameters(), lr=0.1, max_norm=1.0)

    def step(module, optimizer):
        module(torch.ones(2, 4, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(module, optimizer)
    twin = COPIES[how]({"module": module, "optimizer": optimizer})
    for pair in ((module, optimizer), tuple(twin.values())):
        step(*pair)
    for ours, theirs in zip(module.parameters(), twin["module"].parameters(), strict=True):
        assert_bitwise(theirs, ours)
    assert_bitwise(twin["optimizer"].state[twin["module"].weight]["master"], optimizer.state[module.weight]["master"])
