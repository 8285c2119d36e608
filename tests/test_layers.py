"""The rules of the layers on the real sources, with planted violations; the symbols that kernels export."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from layers import violations

from pykern import _C

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent
SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".py", ".pyi", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", "Makefile")


def sources():
    """Tracked text files by path; in an unpacked archive, where there is no git, the files of the source folders."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if git.returncode == 0:
        paths = git.stdout.split("\n")
    else:
        folders = ("csrc", "pykern", "tests", "benchmarks", "docs", "examples")
        paths = [str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    return {path: (ROOT / path).read_text() for path in paths if path.endswith(SUFFIXES) and (ROOT / path).exists()}


def test_no_rule_is_broken():
    files = sources()
    assert len([path for path in files if path.startswith("csrc/")]) > 20
    assert violations(files) == []


PLANTED = {
    "csrc/core/tensor.h": ('#include "ops/check.h"\n', "csrc/core may not include ops/check.h"),
    "csrc/ops/linear.cpp": ('#include "cpu/vec.h"\n', "csrc/ops may not include cpu/vec.h"),
    "csrc/cpu/linear.cpp": ('#include "cuda/launch.h"\n', "csrc/cpu may not include cuda/launch.h"),
    "csrc/cpu/gemm.h": ('#include "runtime/cpu_table.h"\n', "csrc/cpu may not include runtime/cpu_table.h"),
    "csrc/cuda/linear.cu": ('#include "cpu/gemm.h"\n', "csrc/cuda may not include cpu/gemm.h"),
    "csrc/runtime/runtime.h": ('#include "bind/borrow.h"\n', "csrc/runtime may not include bind/borrow.h"),
    "csrc/ops/check.h": ("#include <pybind11/pybind11.h>\n", "only csrc/bind may include pybind11/pybind11.h"),
    "csrc/cpu/norm.cpp": ("#include <vector>\n", "kernels may not include vector"),
    "csrc/cpu/rope.cpp": ("std::sort(x, y);\n", "kernels may not use std::sort"),
    "csrc/cpu/softmax.cpp": ("x = _mm256_add_ps(x, y);\n", "the intrinsic _mm256_add_ps belongs into csrc/cpu/vec.h"),
    "csrc/cpu/decode.cpp": ("float* p = new float[3];\n", "kernels neither throw nor allocate with new"),
    "csrc/ops/norm.cpp": ('printf("%d", 3);\n', "nothing in csrc prints, exits or aborts (printf)"),
    "csrc/extra/a.h": ("\n", "csrc/extra is not one of core, ops"),
    "pykern/ops/linear.py": ("from pykern import nn\n", "pykern.ops may not import pykern.nn"),
    "pykern/nn/mlp.py": ("import pykern.lm.model\n", "pykern.nn may not import pykern.lm.model"),
    "pykern/tape/engine.py": ("def f():\n    import torch.nn\n", "pykern.tape may not import torch.nn"),
    "pykern/lm/trainer.py": ("from pykern.testing import reference\n", "pykern.testing is for tests"),
    "pykern/__init__.py": ("import torch\n", "pykern.__init__ may not import torch"),
    "pykern/ops/long.py": ("x = 1\n" * 501, "501 lines, at most 500"),
    "docs/build.md": ("see /" + "home/someone/pykern\n", "is a path of one machine"),
}


@pytest.mark.parametrize("path", PLANTED)
def test_planted_violation_is_caught(path):
    text, words = PLANTED[path]
    found = violations({path: text})
    assert len(found) == 1 and found[0].startswith(path + ": ") and words in found[0], found


def test_what_is_allowed_is_not_reported():
    allowed = {
        "csrc/cpu/table.cpp": '#include "runtime/cpu_table.h"\n#include "cpu/isa.h"\n',
        "csrc/cpu/a.cpp": "#include <math.h>\n// std::vector, new and throw in a comment\n",
        "csrc/cpu/vec.h": "#include <immintrin.h>\n#include <utility>\nstd::integer_sequence<int>;\n_mm_pause();\n",
        "csrc/bind/a.cpp": "#include <pybind11/pybind11.h>\n#include <vector>\n",
        "pykern/cli/__init__.py": "from pykern.testing import ratios\n",
        "pykern/tape/a.py": "import numpy\nfrom pykern import _C\n",
    }
    assert violations(allowed) == []


# ---- symbols

ISA_FLAGS = {
    "base": [],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4"],
    "v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}


def exported(compiler, source, isa, folder, *, defines=()):
    """Names that a kernel compiled without optimisation gives away: every helper that is not local shows."""
    target = folder / "kernel.o"
    command = [
        compiler,
        "-std=gnu++20",
        "-O0",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-w",
        "-I",
        str(ROOT / "csrc"),
    ]
    command += [*ISA_FLAGS[isa], f"-DPYKERN_ISA={isa}", "-c", str(source), "-o", str(target)]
    built = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    listed = subprocess.run(
        ["nm", "-C", "--extern-only", "--defined-only", str(target)], text=True, capture_output=True
    )
    return [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]


@pytest.fixture
def compiler():
    found = next(
        (path for name in (os.environ.get("CXX", ""), "g++", "clang++") if name and (path := shutil.which(name))), None
    )
    if found is None or shutil.which("nm") is None:
        pytest.skip("no C++ compiler (g++, clang++ or $CXX) or no nm here")
    return found


def leaks(symbols, isa):
    return [(kind, name) for kind, name in symbols if kind in "WVu" or not name.startswith(f"pykern::cpu::{isa}::")]


# Every kernel on one ISA; the table and the two that use most of the shared headers on each.
KERNELS = sorted(path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp"))
BUILT = [isa for isa, _ in _C.isas()]
COMPILED = [(k, isa) for k in KERNELS for isa in (BUILT if k in ("table", "activation", "linear") else BUILT[:1])]


@pytest.mark.slow
@pytest.mark.parametrize("kernel, isa", COMPILED)
def test_kernels_export_only_names_of_their_isa(kernel, isa, compiler, tmp_path):
    symbols = exported(compiler, ROOT / f"csrc/cpu/{kernel}.cpp", isa, tmp_path)
    assert symbols and leaks(symbols, isa) == []


def test_a_planted_weak_symbol_is_caught(compiler, tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(
        '#include "cpu/isa.h"\ninline int shared(int x) { return x + 1; }\nPYKERN_BEGIN_ISA\n'
        "inline int weak(int x) { return shared(x); }\nint kernel(int x) { return weak(x); }\nPYKERN_END_ISA\n"
    )
    symbols = exported(compiler, source, "base", tmp_path)
    assert {name for _, name in leaks(symbols, "base")} == {"shared(int)", "pykern::cpu::base::weak(int)"}
