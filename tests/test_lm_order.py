"""Attention without positions cannot tell order: the worked example by hand, by permutations, and in whole models."""

import math

import pytest
import torch
from lm_models import make, random_ids

from pykern import nn
from pykern.cli import main
from pykern.lm import order
from pykern.lm.order import INPUTS, ROUNDING, SWAP, outputs, swap, table
from pykern.lm.positions import rotary

KINDS = ("learned", "sinusoidal", "rope", "alibi", "t5")
X = torch.tensor(INPUTS, dtype=torch.float64)


def by_hand(x, causal=False, score=lambda q, k, t, s: sum(a * b for a, b in zip(q, k, strict=True))):
    """softmax over the keys, term by term in Python floats."""
    rows = []
    for t, q in enumerate(x):
        seen = range(t + 1 if causal else len(x))
        weights = [math.exp(score(q, x[s], t, s)) for s in seen]
        rows.append([sum(w * x[s][i] for w, s in zip(weights, seen, strict=True)) / sum(weights) for i in (0, 1)])
    return torch.tensor(rows, dtype=torch.float64)


def test_worked_numbers():
    """y4: scores 1, -1, 0, 2; y2: scores 0, 1, 1, -1, so x2 and x3 weigh the same."""
    e = math.e
    y = swap("none").before
    total = e + 1 / e + 1 + e**2
    torch.testing.assert_close(
        y[3], torch.tensor([(e + 1 + e**2) / total, (1 / e + 1 - e**2) / total], dtype=torch.float64)
    )
    total = 1 + 2 * e + 1 / e
    torch.testing.assert_close(y[1], torch.tensor([(1 + e + 1 / e) / total, (2 * e - 1 / e) / total]).double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "learned", "sinusoidal", "rope", "alibi", "t5"])
def test_outputs_are_those_by_hand(kind, causal):
    def dot(a, b):
        return a[0] * b[0] + a[1] * b[1]

    def turned(v, t):
        return (v[0] * math.cos(t) - v[1] * math.sin(t), v[0] * math.sin(t) + v[1] * math.cos(t))

    def bucket(key_minus_query):  # distances up to 3 have buckets of their own; the second half is for keys ahead
        ahead = 0 if causal or key_minus_query <= 0 else 16
        return ahead + abs(key_minus_query)

    scores = {
        "rope": lambda q, k, t, s: dot(turned(q, t), turned(k, s)),
        "alibi": lambda q, k, t, s: dot(q, k) - order.SLOPE * abs(t - s),
        "t5": lambda q, k, t, s: dot(q, k) + math.cos(bucket(s - t)),
    }
    x = [list(v) for v in INPUTS]
    if kind == "learned":
        x = [[a + b for a, b in zip(v, p, strict=True)] for v, p in zip(x, order.LEARNED, strict=True)]
    if kind == "sinusoidal":
        x = [[v[0] + math.sin(t), v[1] + math.cos(t)] for t, v in enumerate(x)]
    expected = by_hand(x, causal, *([scores[kind]] if kind in scores else []))
    torch.testing.assert_close(outputs(X, kind, causal=causal), expected, rtol=1e-12, atol=1e-12)


def test_without_positions_and_mask_order_cannot_be_told():
    case = swap("none")
    assert not case.tells_order and case.last_change <= ROUNDING and case.first_change <= ROUNDING
    torch.testing.assert_close(case.after[[0, 2, 1, 3]], case.before, rtol=0, atol=1e-15)
    assert (case.after[1] - case.before[1]).abs().max() > 0.1  # the outputs of x2 and x3 differ, so they did move


def test_any_permutation_in_any_number_of_layers():
    for p in ([3, 1, 0, 2], [1, 2, 3, 0]):
        for layers in (1, 2, 3):
            y = outputs(X, "none", layers=layers)
            torch.testing.assert_close(outputs(X[p], "none", layers=layers), y[p], rtol=1e-13, atol=0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_positions_tells_order(kind, causal, layers):
    case = swap(kind, causal=causal, layers=layers)
    assert case.tells_order and case.last_change > 0.01
    assert case.swapped_change > 0.01


def test_causal_mask_leaks_order():
    """One layer: the outputs of x2 and x3 tell, the last one does not; it does in two layers."""
    one, two = swap("none", causal=True), swap("none", causal=True, layers=2)
    assert one.tells_order and one.swapped_change > 0.1 and one.last_change <= ROUNDING
    assert two.last_change > 1e-3 and two.first_change == 0.0


def test_table_has_every_case_once():
    cases = [(case.kind, case.causal, case.layers) for case in table()]
    assert len(set(cases)) == len(cases) == 18
    assert [case[0] for case in cases if case[1:] == (False, 1)] == ["none", *KINDS]
    assert [(case.kind, case.causal) for case in table() if not case.tells_order] == [("none", False)]


# ---- models


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_two_layers_of_self_attention(kind):
    """SelfAttention without a mask, random weights: only with positions do the other outputs change."""
    torch.manual_seed(0)
    layers = [nn.SelfAttention(16, 2, causal=False, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    place = {}
    if kind == "rope":
        place["rotary"] = rotary(0, 5, 8, x)
    if kind == "alibi":
        place["alibi_slopes"] = torch.tensor([0.5, 0.25])
    if kind == "t5":
        place["bias"] = nn.RelativePositionBias(2, dtype=torch.float64)(5)
    added = torch.randn(5, 16, dtype=torch.float64) if kind in ("learned", "sinusoidal") else 0.0
    p = [0, 2, 1, 3, 4]

    def run(x):
        h = x + added
        for layer in layers:
            h = layer(h, h, **place)
        return h

    with torch.no_grad():
        change = (run(x[:, p])[:, p] - run(x))[0].abs().amax(-1)
    if kind == "none":
        assert change.max() < 1e-14
    else:
        assert change.min() > 1e-6  # every output, those of the tokens that stayed included


@pytest.mark.parametrize("layers", [1, 2])
def test_language_model_without_positions(layers):
    """Causal: with one layer the last logits do not know the order of what comes before, with two they do."""
    model = make(positions="none", n_layer=layers, dtype=torch.float64)
    ids = random_ids(1, 9)
    p = [0, 2, 1, 5, 4, 3, 6, 7, 8]
    assert not torch.equal(ids, ids[:, p])
    with torch.no_grad():
        change = (model(ids[:, p]) - model(ids))[0, -1].abs().max()
    assert change < 1e-13 if layers == 1 else change > 1e-6


# ---- the command


def test_command(tmp_path, capsys):
    path = tmp_path / "order.png"
    assert main(["order", "--plot", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "x4     2.0   7.3891   0.6439   ( 0.6439, -0.6439)" in printed
    assert printed.count("( 0.9679, -0.5247)") == 6  # twice as a sum, four times in the table of outputs
    assert printed.count(" yes") == 17 and printed.count(" no\n") == 1
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000


def test_command_refuses(tmp_path, capsys):
    assert main(["order", "--plot", str(tmp_path / "none" / "order.png")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("pykern order: ") and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((X, "clock"), "kind must be one of"),
        ((X[:3], "none"), r"x must be \[4, 2\], got \[3, 2\]"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        outputs(*arguments)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        outputs(X, "none", layers=0)


def test_swap_is_of_x2_and_x3():
    assert SWAP == (0, 2, 1, 3)
