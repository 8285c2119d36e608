"""CMakeLists.txt says what is missing and what to do: cmake is run where one thing is not there.

A compiler without OpenMP, or too old, is the real one behind a script that refuses an option. An old Python cannot be
made here; the same lines refuse one that does not exist.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent
WRAPPER = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    {pattern}) echo "unknown option $word" >&2; exit 1 ;;
  esac
done
exec {compiler} "$@"
"""


@pytest.fixture
def compiler():
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("needs a C++ compiler: c++ or $CXX")
    return found


@pytest.fixture
def configure(tmp_path):
    """configure(name=value, ..., cxx=...) is what cmake prints, as one line, and must end in a refusal."""
    cmake = shutil.which("cmake")
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs cmake and pybind11: pip install cmake pybind11")
    import pybind11

    def run(*, cxx=None, cuda=None, **settings):
        found = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(), "PYKERN_CUDA": "OFF"}
        settings = found | settings
        env = dict(os.environ)
        env |= {} if cxx is None else {"CXX": str(cxx)}
        env |= {} if cuda is None else {"CUDACXX": str(cuda)}
        command = [cmake, "-S", ROOT, "-B", tmp_path / "build", *(f"-D{n}={v}" for n, v in settings.items())]
        ran = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300, check=False)
        assert ran.returncode != 0, ran.stdout
        assert "CMake Error at CMakeLists.txt" in ran.stderr and ran.stderr.count("CMake Error") == 1, ran.stderr
        return " ".join(ran.stderr.split())

    return run


def refusing(compiler, pattern, folder):
    """A compiler that does not know an option."""
    script = folder / "compiler"
    script.write_text(WRAPPER.format(pattern=pattern, compiler=compiler))
    script.chmod(0o755)
    return script


def test_no_compiler(configure, tmp_path):
    said = configure(cxx=tmp_path / "absent")
    assert (
        f"none that works was found (CXX='{tmp_path / 'absent'}'): 'apt install g++' or 'dnf install gcc-c++'" in said
    )


def test_a_compiler_without_openmp(configure, compiler, tmp_path):
    said = configure(cxx=refusing(compiler, "-fopenmp*", tmp_path))
    assert f"pykern needs a C++ compiler with OpenMP, and {tmp_path / 'compiler'}" in said
    assert "has none. GCC brings it along: 'apt install g++' and CXX=g++; Clang needs its runtime" in said


def test_a_compiler_too_old_for_cxx20(configure, compiler, tmp_path):
    said = configure(cxx=refusing(compiler, "-std=gnu++2*", tmp_path))
    assert "pykern needs a C++20 compiler with _Float16, GCC 12 or later (13 on aarch64), and" in said
    assert "Name another one with CXX=/path/to/g++" in said


def test_no_python(configure):
    said = configure(Python_EXECUTABLE="/nonexistent/python3")
    assert "pykern needs Python 3.10 or later, found: '/nonexistent/python3'" in said
    assert "-DPython_EXECUTABLE=/path/to/python3" in said


def test_no_headers_of_python(configure):
    said = configure(Python_INCLUDE_DIR="/nonexistent")
    assert "pykern needs the C headers of Python" in said and "'apt install python3-dev'" in said


def test_no_pybind11(configure):
    said = configure(CMAKE_DISABLE_FIND_PACKAGE_pybind11="ON")
    assert "pykern needs pybind11 3 or later to build" in said and "'pip install \"pybind11>=3\"' first" in said


def test_cuda_wanted_without_nvcc(configure):
    said = configure(PYKERN_CUDA="ON", cuda="/nonexistent/nvcc")
    assert "PYKERN_CUDA=ON, but there is no nvcc that works, neither on PATH nor in CUDACXX" in said
    assert "or build for the CPU alone with PYKERN_CUDA=OFF" in said


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"PYKERN_CUDA": "yes"}, "PYKERN_CUDA is 'yes', expected AUTO (built where nvcc is found), ON or OFF"),
        ({"PYKERN_ISAS": "base;v5"}, "PYKERN_ISAS has 'v5', expected one or more of v4_bf16;v4;v3;base, best first"),
        ({"PYKERN_ISAS": ""}, "PYKERN_ISAS is empty, expected one or more of v4_bf16;v4;v3;base, best first"),
    ],
)
def test_wrong_settings(configure, setting, words):
    assert words in configure(**setting)


def test_x86_isas_on_another_processor(configure):
    said = configure(CMAKE_SYSTEM_NAME="Linux", CMAKE_SYSTEM_PROCESSOR="aarch64", PYKERN_ISAS="v3;base")
    assert "PYKERN_ISAS has 'v3', which is for x86-64; on aarch64 there is base" in said
