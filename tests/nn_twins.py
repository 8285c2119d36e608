"""What the tests of pykern.nn share: a module beside its torch.nn twin, with the same weights, in float64."""

import torch

# float64 sums in another order: a few hundred roundings of 1.1e-16 on values of size 1.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(module, seed=1):
    """Gives every parameter random values, so that a weight of 1 or a bias of 0 cannot hide a mistake."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(randn(*p.shape, seed=seed + i))
    return module


def same_module(ours, theirs):
    """Random weights in theirs, loaded by ours through the state dict."""
    randomise(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)


def assert_same_gradients(ours, theirs, our_inputs, their_inputs, our_out, their_out):
    """Backward of the same random gradient: inputs and parameters agree."""
    torch.testing.assert_close(our_out, their_out, **CLOSE)
    seed = randn(*our_out.shape, seed=9)
    (our_out * seed).sum().backward()
    (their_out * seed).sum().backward()
    for a, b in zip(our_inputs, their_inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
