"""The computation graph: what it holds, that backward runs in reverse topological order, what the picture shows."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pykern.tape import (
    Add,
    Mul,
    NeuralNetwork,
    Scale,
    Sum,
    Tensor,
    TransformerLM,
    applications,
    graph_svg,
    record_backward,
    tape,
    tape_bwd,
)
from pykern.tape.graph import HEIGHT, WIDTH, inputs_of, label

pytestmark = pytest.mark.one_isa
EXAMPLE = Path(__file__).parent.parent / "examples" / "tape_graph.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def empty_tape():
    tape.clear()
    yield
    tape.clear()


def users(nodes, node):
    return [user for user in nodes if any(module is node for module in inputs_of(user))]


def small_lm():
    model = TransformerLM(7, 4, n_layer=2, n_head=2, n_embd=8, rng=0)
    ids = np.random.default_rng(0).integers(0, 7, (1, 5))
    return model, model.apply_fwd(ids[:, :-1], ids[:, 1:])


def boxes(svg):
    """(x, y) of the upper left corner of each box of the picture."""
    found = ET.fromstring(svg).iter(f"{SVG}rect")
    return [(float(r.get("x")), float(r.get("y"))) for r in found if r.get("width") == str(WIDTH)]


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_applications_come_after_their_inputs():
    x, y = Tensor(2.0), Tensor(3.0)
    p = Mul().apply_fwd(x, y)
    q = Scale(2.0).apply_fwd(x)
    unused = Scale(5.0).apply_fwd(x)
    z = Add().apply_fwd(p, q)
    found = applications(z)
    assert {id(node) for node in found} == {id(node) for node in (x, y, p, q, z)}
    assert found[-1] is z and unused not in found
    place = {id(node): i for i, node in enumerate(found)}
    assert all(place[id(module)] < place[id(node)] for node in found for module in inputs_of(node))


def test_a_chain_of_5000_is_no_problem():
    x = Tensor(1.0)
    for _ in range(5000):
        x = Scale(1.0).apply_fwd(x)
    assert len(applications(x)) == 5001


@pytest.mark.parametrize("network", ["classifier", "Transformer"])
def test_backward_runs_in_reverse_topological_order(network):
    if network == "Transformer":
        _, loss = small_lm()
    else:
        loss = NeuralNetwork(2, 3, 2, rng=0).apply_fwd(np.ones((4, 2)), np.zeros(4, int))
    forward = tape[:]
    nodes = [node for node in applications(loss) if not isinstance(node, Tensor)]
    order = record_backward(loss)
    assert order == []
    tape_bwd()
    assert len(order) == len(nodes) == len(forward) and {id(n) for n in order} == {id(n) for n in nodes}
    place = {id(node): i for i, node in enumerate(order)}
    for node in order:
        assert all(place[id(user)] < place[id(node)] for user in users(nodes, node))
    assert all(a is b for a, b in zip(order, reversed(forward), strict=True))


def test_recording_leaves_the_gradients_alone():
    def gradients(record):
        model, loss = small_lm()
        if record:
            record_backward(loss)
        tape_bwd()
        return [parameter.grad for parameter in model.parameters()]

    for one, two in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_the_loss_does_not_depend_on_is_not_recorded():
    x = Tensor(2.0)
    loss = Sum().apply_fwd(Scale(2.0).apply_fwd(x))
    order = record_backward(loss)
    Scale(3.0).apply_fwd(x)
    loss.out_gradient = 1.0
    tape_bwd()
    assert [type(node).__name__ for node in order] == ["Sum", "Scale"]


def test_labels_name_the_parameters_of_a_network():
    model, loss = small_lm()
    labels = [label(node, model) for node in applications(loss)]
    assert "Linear [1, 4, 8]  blocks.1.query: weight, bias" in labels
    assert "Linear [1, 4, 7]  tokens: weight" in labels  # the head shares the table
    assert "Attention [1, 2, 4, 4]" in labels and label(loss) == "SoftmaxCrossEntropy []"


def test_the_picture_names_every_module_and_its_place_in_both_passes():
    model, loss = small_lm()
    order = record_backward(loss)
    forward = tape[:]
    tape_bwd()
    svg = graph_svg(loss, network=model, backward=order)
    nodes, shown = applications(loss), texts(svg)
    for node in nodes:
        assert label(node, model).split("  ")[0] in shown
    for path, _ in model.named_parameters():
        owner, _, own = path.rpartition(".")
        assert any(text and re.fullmatch(rf"{owner}: (.*, )?{own}(, .*)?", text) for text in shown), path
    root = ET.fromstring(svg)
    groups = {
        kind: [t.text for t in root.iter(f"{SVG}text") if t.get("class") == kind] for kind in ("forward", "backward")
    }
    pairs = [(int(f), int(b)) for f, b in zip(groups["forward"], groups["backward"], strict=True) if f]
    assert sorted(pairs) == [(i, len(forward) + 1 - i) for i in range(1, len(forward) + 1)]
    edges = [p for p in root.iter(f"{SVG}path") if p.get("marker-end")]
    assert len(edges) == sum(len(inputs_of(node)) for node in nodes)
    assert len(boxes(svg)) == len(nodes)


def test_no_box_covers_another_and_edges_keep_clear():
    model, loss = small_lm()
    svg = graph_svg(loss, network=model)
    found = boxes(svg)
    for i, (x, y) in enumerate(found):
        assert x >= 0 and y >= 0
        for u, v in found[:i]:
            assert abs(x - u) >= WIDTH or abs(y - v) >= HEIGHT
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if path.get("marker-end"):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))]
            ends = list(zip(numbers[0::2], numbers[1::2], strict=True))
            points = [ends[0], *ends[3::3]]
            for (x0, y0), (x1, y1) in pairwise(points):
                assert y1 > y0
                for x, y in found:  # a straight piece beside boxes, or a bend between two rows
                    crosses = y < y1 - 0.2 and y + HEIGHT > y0 + 0.2
                    assert not crosses or (x0 == x1 and not x - 0.1 < x0 < x + WIDTH + 0.1)


def test_names_are_escaped():
    class Odd(Scale):
        pass

    Odd.__name__ = "a<b>&"
    svg = graph_svg(Odd(1.0).apply_fwd(Tensor(1.0)))
    assert "a&lt;b&gt;&amp; []" in svg and "a<b>& []" in texts(svg)


def test_refusals():
    with pytest.raises(TypeError, match="applications: output is a float, expected a module that was applied"):
        applications(1.0)
    with pytest.raises(ValueError, match="Scale: not applied yet"):
        record_backward(Scale(1.0))
    with pytest.raises(ValueError, match="graph_svg: output is a leaf, expected an application"):
        graph_svg(Tensor(1.0))


def test_the_example_draws_prints_and_learns_without_torch(tmp_path):
    code = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code, "--steps", "60", "--out", str(tmp_path / "pictures")],
        env={"PYTHONPATH": str(EXAMPLE.parent.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "  1. CrossEntropy []  -> 2" in lines and "  1. SoftmaxCrossEntropy []  -> 2" in lines
    order = [line for line in lines if re.match(r" *\d+\. ", line)]
    assert len(order) == 5 + 22
    for line in order:  # gradients go to modules that come later
        number, _, to = line.partition(".")
        assert all(int(target) > int(number) for target in re.findall(r"\d+", to.partition("->")[2]))
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(losses) >= 3 and losses[-1] < losses[0] - 1
    for name, count in (("network", 5 + 2), ("transformer", 22 + 3)):
        assert len(boxes((tmp_path / "pictures" / f"{name}.svg").read_text())) == count
