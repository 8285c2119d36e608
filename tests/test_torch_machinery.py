"""Every op of pykern.ops under opcheck, torch.compile and torch.export, from the table of torch_cases.py.

What an op's own file tests under the same tools are its options; here nothing is left out, a new op neither.
"""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import CASES, clones, floating, leaves, results

from pykern import ops
from pykern.ops._library import operators

pytestmark = pytest.mark.one_isa
EXACT = dict(rtol=0, atol=0)  # the same kernels run
COMPOSED = {"merge_attention"}  # made of torch's own ops


def test_every_op_is_in_the_table():
    assert {case.op for case in CASES.values()} == set(ops.__all__)
    assert all(set(case.written) <= set(case.batched) <= set(case.tensors()) for case in CASES.values())


# ---- opcheck


class Recorded(TorchDispatchMode):
    """Keeps the arguments of the first call of each of pykern's operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pykern":
            copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.setdefault(func._schema.name.removeprefix("pykern::"), (copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def recorded():
    """The operators that the table reaches, forward, backward and backward again, with arguments."""
    with Recorded() as mode:
        for case in CASES.values():
            tensors = leaves(case.tensors()) if case.gradient else case.tensors()
            out = results(case.call(**tensors))
            if not case.gradient:
                continue
            wanted = floating(tensors)
            once = torch.autograd.grad(sum(x.square().sum() for x in out), wanted, create_graph=case.twice)
            if case.twice:
                torch.autograd.grad(sum(x.square().sum() for x in once), wanted)
    return mode.calls


@pytest.fixture(scope="module")
def calls():
    return recorded()


def test_the_table_reaches_every_operator(calls):
    assert sorted(calls) == sorted(operators)


@pytest.mark.parametrize("name", operators)
def test_opcheck(name, calls):
    args, kwargs = calls[name]
    op = getattr(torch.ops.pykern, name).default
    torch.library.opcheck(op, tuple(args), kwargs)
    if operators[name].function is not None:
        wanting = [x.clone().requires_grad_() if _is_float(x) and _may_want(op, i) else x for i, x in enumerate(args)]
        torch.library.opcheck(op, tuple(wanting), kwargs)


def _is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _may_want(op, i):
    """rope's tables and ALiBi's slopes refuse a gradient; out and lse beside dout are functions of the others."""
    return op._schema.arguments[i].name not in ("cos", "sin", "alibi_slopes", "out", "lse", "dlse")


# ---- torch.compile


@pytest.fixture
def compiled():
    """compiled(f): one graph for any sizes; its counter holds the graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield lambda f: (torch.compile(f, fullgraph=True, dynamic=True, backend=counter), counter)
    torch.compiler.reset()


def run(function, case, B, gradient):
    """Results, written inputs and gradients."""
    tensors = leaves(case.tensors(B)) if gradient else clones(case.tensors(B))
    out = results(function(**tensors))
    found = [*out, *(tensors[name] for name in case.written)]
    if gradient:
        found += torch.autograd.grad(sum(x.square().sum() for x in out), floating(tensors))
    return found


@pytest.mark.parametrize("name", CASES)
def test_compile(name, compiled):
    """One graph, forward and backward, whatever the batch; it holds pykern's operator, and gives eager's bits."""
    case = CASES[name]
    gradient = case.gradient and not name.startswith("flash_attn")  # whose gradients are attention's: saves seconds
    function, counter = compiled(case.call)
    for B in (7, 9):  # no other size: torch takes equal ones for one
        torch.testing.assert_close(run(function, case, B, gradient), run(case.call, case, B, gradient), **EXACT)
    graphs = [graph for graph in counter.graphs if any(n.op == "call_function" for n in graph.graph.nodes)]
    assert len(graphs) == 1
    assert ("torch.ops.pykern." in graphs[0].code) == (name not in COMPOSED)


INDUCTOR = """
import torch, pykern

def f(x, weight):
    return pykern.linear(pykern.layer_norm(x) + 1.0, weight, activation="gelu")

function = torch.compile(f, fullgraph=True, dynamic=True)
for B in (7, 9):
    x, weight = torch.randn(B, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    out, expected = function(x, weight), f(x, weight)
    grads = (torch.autograd.grad(y, (x, weight), torch.ones_like(y)) for y in (out, expected))
    torch.testing.assert_close((out, *next(grads)), (expected, *next(grads)), rtol=0.0, atol=0.0)
"""


def test_inductor():
    """The default backend, with torch's own op between pykern's; in a process of its own, as it imports setuptools."""
    done = subprocess.run([sys.executable, "-c", INDUCTOR], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- torch.export


class Called(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, tensors):
        return self.call(**tensors)


@pytest.mark.parametrize("name", CASES)
def test_export(name):
    """An exported program for any batch, with the op in it, gives eager's bits."""
    case = CASES[name]
    tensors = case.tensors(4)
    sizes = {key: {0: torch.export.Dim.DYNAMIC} if key in case.batched else None for key in tensors}
    program = torch.export.export(Called(case.call), (clones(tensors),), dynamic_shapes=(sizes,))
    assert ("torch.ops.pykern." in program.graph_module.code) == (name not in COMPOSED)
    for B in (2, 3):
        ours, theirs = clones(case.tensors(B)), clones(case.tensors(B))
        torch.testing.assert_close(results(program.module()(ours)), results(case.call(**theirs)), **EXACT)
        torch.testing.assert_close(ours, theirs, **EXACT)  # what was written
