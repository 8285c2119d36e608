"""The process around the kernels: references, threads, the GIL, fork, lazy import, configuration and explain."""

import gc
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dlpack_producers import Old, Wrapped

import pykern
from pykern import _C, config
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent


def relu(x, out):
    _C.activation_forward(x, out, kind="relu")


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)


def test_references_do_not_leak():
    arrays = [np.ones(4), torch.ones(4, dtype=torch.float64), np.ones(4)]
    x, t, out = arrays
    wrapped, old = Wrapped(x), Old(x)
    objects = [*arrays, wrapped, old, type(t), type(wrapped)]
    for source in (t, wrapped):
        relu(source, out)  # types are cached on first sight
    del source
    gc.collect()  # else what earlier tests left may go while this one counts
    before = [sys.getrefcount(o) for o in objects]

    def use(source):
        relu(source, out)
        with pytest.raises(ValueError, match="relu: out has shape"):
            relu(source, np.ones(5))
        with pytest.raises(TypeError, match="relu: out must be an array"):
            relu(source, [1.0])

    for _ in range(200):
        for i in range(4):
            use((x, t, wrapped, old)[i])
    assert [sys.getrefcount(o) for o in objects] == before


def test_many_types_cross():
    """More types than the cache of exchange APIs holds."""
    for i in range(40):
        kind = type(f"Array{i}", (Wrapped,), {})
        assert _C.borrow_path(kind(np.ones(2))) == "dlpack"
        assert _C.borrow_path(type(f"Tensor{i}", (torch.Tensor,), {})(torch.ones(2))) == "exchange"


def test_gil_is_released_while_a_kernel_runs():
    x = np.linspace(-3, 3, 6_000_000)  # float64 erfc: some hundred milliseconds
    out, span = np.empty_like(x), []

    def kernel():
        start = time.perf_counter()
        _C.activation_forward(x, out, kind="gelu")
        span.extend((start, time.perf_counter()))

    worker = threading.Thread(target=kernel)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
    start, stop = span
    tenth = (stop - start) / 10
    assert sum(start + tenth < tick < stop - tenth for tick in ticks) > 3, (stop - start, len(ticks))


def test_concurrent_calls_give_the_same_bits():
    inputs = [torch.randn(64, 777, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [pykern.gelu(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.equal(pykern.gelu(inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


FORK = """
import os, signal, torch, pykern
pykern.set_num_threads(2)
x = torch.linspace(-3, 3, 100_000).reshape(4, -1)
before = pykern.gelu(x).numpy().tobytes()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    same = pykern.gelu(x).numpy().tobytes() == before
    os._exit(0 if same and pykern.get_num_threads() == 1 else 3)
_, status = os.waitpid(pid, 0)
assert pykern.gelu(x).numpy().tobytes() == before and pykern.get_num_threads() == 2
print("child", os.waitstatus_to_exitcode(status))
"""


def test_forked_child_computes_and_exits():
    run = python(FORK)  # a child that waits for the parent's threads is ended by its alarm
    assert run.stdout == "child 0\n", run.stderr


def test_import_is_lazy():
    loaded = "print([m for m in ('torch', 'numpy', 'pykern._C', 'pykern.ops') if m in sys.modules])"
    run = python(f"import sys, pykern; dir(pykern); {loaded}; pykern.set_num_threads; {loaded}")
    assert run.stdout.splitlines() == ["[]", "['numpy', 'pykern._C']"] or run.stdout.splitlines() == [
        "[]",
        "['pykern._C']",
    ]


def test_the_first_call_imports_no_compiler():
    """torch._dynamo and what it imports take seconds; torch.nn.attention.bias would import it."""
    run = python(
        "import sys, torch; a = set(sys.modules); import pykern; pykern.relu(torch.ones(3)); b = set(sys.modules);"
        "print(sorted((b - a) & {'torch._dynamo', 'sympy', 'torch.nn.attention.bias'}))"
    )
    assert run.stdout == "[]\n", run.stderr


def test_every_public_name_resolves():
    run = python("import pykern; [getattr(pykern, name) for name in pykern._NAMES]; print(pykern.gelu.__module__)")
    assert run.stdout == "pykern.ops.activation\n", run.stderr
    with pytest.raises(AttributeError, match="module 'pykern' has no attribute 'atention'"):
        pykern.atention  # noqa: B018


def test_missing_extension_is_explained(tmp_path):
    shutil.copytree(ROOT / "pykern", tmp_path / "pykern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pykern; pykern.show_config()"
    run = python(code, "-S", "-P") if sys.version_info >= (3, 11) else python(code, "-S", "-I")
    assert run.returncode == 1
    assert "ImportError: pykern's compiled extension is missing or does not load. In a source checkout" in run.stderr
    assert "pip install -e ." in run.stderr


# ---- configuration


def test_config_states_the_facts(monkeypatch):
    monkeypatch.setenv("PYKERN_ISA", "")
    facts = config.config()
    assert facts["isa"] in facts["isa available"]
    assert set(facts["isa available"]) <= set(facts["isa built"])
    assert facts["threads"] == _C.num_threads()
    assert facts["torch"] == torch.__version__
    assert facts["dlpack exchange api"] == "yes"
    assert any("gomp" in name or "omp" in name for name in facts["openmp runtimes"])
    assert facts["cuda"] == _C.cuda_status()
    assert facts["extension"] == _C.__file__


def test_show_config_prints_every_fact(capsys):
    pykern.show_config()
    printed = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0].strip() for line in printed]
    assert [name for name in names if name != "warning"] == list(config.config())  # tests/test_config.py: the warning
    isas = ", ".join(name for name, _ in _C.isas())
    assert any(line.strip() == f"isa built: {isas}" for line in printed)


def test_one_openmp_runtime():
    """Two would each start their own threads and fight for the cores.

    In a process of its own: scikit-learn, which other tests import, brings another one along.
    """
    code = "import torch, pykern.nn; from pykern import config; print(*config.config()['openmp runtimes'], sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 1, run.stdout


def test_thread_count_follows_torch_unless_set():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert pykern.get_num_threads() == 1
        pykern.set_num_threads(3)
        assert pykern.get_num_threads() == 3
        pykern.set_num_threads(0)
        assert pykern.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        pykern.set_num_threads(0)


@pytest.mark.parametrize("n", [-1, 1025, 10**30])
def test_thread_count_out_of_range(n):
    with pytest.raises(ValueError, match=rf"^set_num_threads: n is {n}, expected 1\.\.1024, or 0 to follow OpenMP$"):
        pykern.set_num_threads(n)


@pytest.mark.parametrize("n", [1.5, "2", None])
def test_thread_count_is_an_integer(n):
    with pytest.raises(TypeError, match=f"^set_num_threads: n must be an integer, got {type(n).__name__}$"):
        pykern.set_num_threads(n)


# ---- explain


def test_explain_names_kernel_and_path(with_threads):
    said = with_threads(2, lambda: pykern.explain("gelu", torch.ones(3, dtype=torch.bfloat16)))
    assert said == f"gelu: CPU kernel for ISA {_C.isa()}, bfloat16, 2 threads, arrays borrowed by exchange"
    assert pykern.explain("swiglu", gate=np.ones(3), up=np.ones(3)).endswith("arrays borrowed by numpy")


def test_explain_says_what_raises():
    said = pykern.explain("relu", torch.ones(3, dtype=torch.complex64))
    assert said.startswith("relu: raises, because array has dtype complex64, expected float32")


class OnCuda:
    """What explain() looks at of a tensor."""

    device, dtype, shape = "cuda:0", torch.bfloat16, (3,)


def test_explain_says_what_would_run_on_cuda(monkeypatch):
    if not _C.cuda_kernels():
        said = pykern.explain("swiglu", OnCuda())
        assert said == "swiglu: raises, because pykern has no CUDA kernels in this build"
        return
    said = pykern.explain("swiglu", OnCuda())
    assert said.startswith("swiglu: CUDA kernel swiglu_forward, bfloat16, verified on an H200; ")
    assert said.endswith(_C.cuda_status())
    monkeypatch.setattr(config, "_VERIFIED", frozenset())
    emulated = "swiglu: CUDA kernel swiglu_forward, bfloat16, tested on an emulator, not yet on a GPU; "
    assert pykern.explain("swiglu", OnCuda()).startswith(emulated)
    monkeypatch.setitem(config._KERNELS, "rope", "roofline_read")
    x = OnCuda()
    x.dtype, x.is_cuda = torch.float32, True
    assert "linear_forward, float32, " in pykern.explain("linear", x)
    monkeypatch.setattr("pykern.config.allows_tf32", lambda x: True)
    assert "linear_forward, float32 in tf32, which torch allows, " in pykern.explain("linear", x)
    assert pykern.explain("rope", OnCuda()) == "rope: raises, because pykern has no CUDA kernel for it yet"
    assert pykern.explain("merge_attention", OnCuda()).startswith("merge_attention: torch functions")


def test_explain_knows_the_kernel_of_every_op():
    """Each op's CUDA kernel is a function of the extension."""
    from pykern.config import _KERNELS

    for op in (name for name, module in pykern._NAMES.items() if module == "pykern.ops"):
        kernel = _KERNELS.get(op, "attention_forward")
        assert kernel is None or hasattr(_C, kernel.format(op=op)), op


def test_explain_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"^explain: 'convolution' is not one of .*gelu, .*swiglu"):
        pykern.explain("convolution", torch.ones(3))
    with pytest.raises(ValueError, match=r"^explain: gelu needs at least one array argument"):
        pykern.explain("gelu")


# ---- torch's machinery around every op


@pytest.mark.parametrize(
    "op, call",
    [
        ("activation", pykern.silu),
        ("swiglu", lambda x: pykern.swiglu(x, 2 * x)),
        ("linear", lambda x: pykern.linear(x, torch.ones(2, 3, dtype=torch.float64), activation="gelu")),
    ],
)
def test_no_second_derivative_is_an_error_not_a_cut_graph(op, call):
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"pykern::{op} has no second derivative"):
        (dx.square().sum() + x.sum()).backward()


def test_inference_mode_and_no_grad():
    x = torch.ones(3, requires_grad=True)
    expected = pykern.silu(x).detach()
    with torch.inference_mode():
        assert_bitwise(pykern.silu(x), expected)
    with torch.no_grad():
        out = pykern.silu(x)
    assert not out.requires_grad
    assert_bitwise(out, expected)


def test_vmap_is_a_loop():
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    assert_bitwise(torch.vmap(pykern.silu)(x), pykern.silu(x))
