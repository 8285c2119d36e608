"""The Transformer of the tape beside the same model in plain torch, float64: loss and every gradient to 1e-10."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pykern.tape import AdamW, TransformerLM, tape, tape_bwd

TOLERANCE = 1e-10  # of float64 sums of some thousand terms, in another order
ATTENTION = ("query", "key", "value", "project")


def torch_loss(w, ids, targets, n_layer, n_head):
    """The mean cross entropy of the model whose weights have TransformerLM's names; ids and targets [B, T]."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    T = ids.shape[1]
    x = w["tokens.weight"][ids] + w["positions.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(n_layer):
        block = f"blocks.{i}"
        h = norm(x, f"{block}.norm1")
        q, k, v = (linear(h, f"{block}.{name}").unflatten(-1, (n_head, -1)).transpose(1, 2) for name in ATTENTION[:3])
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{block}.project")
        h = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.expand"), approximate="tanh")
        x = x + linear(h, f"{block}.contract")
    logits = norm(x, "norm") @ w["tokens.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def twins(vocab_size, block_size, seed=0, **shape):
    """(TransformerLM, its weights as torch parameters), away from the flat start: every bias and norm matters."""
    model, rng = TransformerLM(vocab_size, block_size, rng=seed, **shape), np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.value += rng.normal(0, 0.2, parameter.value.shape)
    weights = {name: torch.nn.Parameter(torch.tensor(p.value)) for name, p in model.named_parameters()}
    assert all(w.dtype == torch.float64 for w in weights.values())
    return model, weights


def assert_close(name, found, expected):
    """|found - expected| <= TOLERANCE max(1, |expected|) in every element."""
    error = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert error[worst] <= TOLERANCE, f"{name}{list(worst)}: {found[worst]!r}, torch has {expected[worst]!r}"


CASES = {
    "one layer, one head": (dict(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4), (2, 4)),
    "two layers, two heads": (dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16), (3, 8)),
    "shorter than the block": (dict(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=16), (2, 5)),
    "one position": (dict(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8), (4, 1)),
    "tails of vectors, many keys": (dict(vocab_size=67, block_size=130, n_layer=2, n_head=3, n_embd=33), (2, 130)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_torchs(case):
    shape, (B, T) = CASES[case]
    model, weights = twins(**shape)
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, shape["vocab_size"], (2, B, T))
    loss = model.apply_fwd(ids, targets)
    tape_bwd()
    expected = torch_loss(weights, torch.tensor(ids), torch.tensor(targets), shape["n_layer"], shape["n_head"])
    expected.backward()
    assert abs(float(loss.out_tensor) - expected.item()) <= TOLERANCE
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 2 + 16 * shape["n_layer"] + 2 and set(names) == set(weights)
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad.numpy()
        # softmax ignores what is added to all scores of a row, and with one key everything: exactly those are 0
        zero = name.endswith("key.bias") or (T == 1 and ".query." in name) or (T == 1 and ".key." in name)
        assert (np.abs(gradient).max() > 1e-6) != zero, name
        assert_close(name, parameter.grad, gradient)


def test_training_follows_torchs():
    """30 steps of AdamW: the losses and in the end the weights, although Adam divides small gradients by their size."""
    shape = dict(n_layer=2, n_head=2, n_embd=16)
    model, weights = twins(13, 8, **shape)
    options = dict(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer, other = AdamW(model.parameters(), **options), torch.optim.AdamW(weights.values(), **options)
    rng, losses = np.random.default_rng(2), []
    for _ in range(30):
        ids = rng.integers(0, 13, (4, 9))
        ids[:, 1::2] = (ids[:, :-1:2] * 5 + 3) % 13  # half of the tokens follow from the one before
        loss = model.apply_fwd(ids[:, :-1], ids[:, 1:])
        tape_bwd()
        optimizer.step()
        optimizer.zero_grad()
        expected = torch_loss(weights, torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:]), 2, 2)
        other.zero_grad()
        expected.backward()
        other.step()
        losses.append((float(loss.out_tensor), expected.item()))
    found, expected = np.array(losses).T
    assert found[-1] < found[0] - 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is rounding around 0, which Adam blows up to a full step
            np.testing.assert_allclose(parameter.value, weights[name].detach().numpy(), rtol=0, atol=1e-8, err_msg=name)


def test_a_wrong_gradient_is_found():
    model, weights = twins(5, 4, n_layer=1, n_head=1, n_embd=4)
    ids = np.array([[0, 1, 2, 3]])
    model.apply_fwd(ids, ids)
    tape_bwd()
    torch_loss(weights, torch.tensor(ids), torch.tensor(ids), 1, 1).backward()
    wrong = copy.deepcopy(model.tokens.weight.grad)
    wrong[2, 1] += 1e-9
    with pytest.raises(AssertionError, match=r"tokens\.weight\[.*2.*1.*\]"):
        assert_close("tokens.weight", wrong, weights["tokens.weight"].grad.numpy())


def test_it_trains_where_torch_cannot_be_imported():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from pykern.tape import AdamW, TransformerLM, tape_bwd

model, ids = TransformerLM(3, 6, n_layer=1, n_head=2, n_embd=8, rng=0), np.array([[0, 1, 2, 0, 1, 2, 0]])
optimizer, losses = AdamW(model.parameters(), lr=0.01), []
for _ in range(60):
    loss = model.apply_fwd(ids[:, :-1], ids[:, 1:])
    tape_bwd()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.out_tensor))
print(losses[0] > 1, losses[-1] < 0.3)
"""
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "True"]
    assert tape == []
