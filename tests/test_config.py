"""pykern.show_config() and what one reads whose extension does not load: versions, OpenMP runtimes, libraries.

A second OpenMP runtime is the real one of a wheel, where there is one; the parsing also sees maps written here.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pykern
from pykern import _C, config

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent
MAPS = """\
55d0c5c00000-55d0c5c01000 r--p 00000000 fe:00 1054                       /usr/bin/python3.11
7f0000000000-7f0000010000 r--p 00000000 fe:00 2001                       /usr/lib/with space/torch/lib/libgomp.so.1
7f0000010000-7f0000020000 r-xp 00010000 fe:00 2001                       /usr/lib/with space/torch/lib/libgomp.so.1
7f0000030000-7f0000040000 r-xp 00000000 fe:00 2002                       /usr/lib/sk/libgomp-e985bcbb.so.1.0.0 (deleted)
7f0000040000-7f0000050000 r-xp 00000000 fe:00 2003                       /usr/lib/intel/libiomp5.so
7f0000050000-7f0000060000 r-xp 00000000 fe:00 2004                       /usr/lib/llvm/libomp.so.5
7f0000060000-7f0000070000 r-xp 00000000 fe:00 2005                       /usr/lib/llvm/libomptarget.so.16
7f0000070000-7f0000080000 r-xp 00000000 fe:00 2006                       /usr/lib/libomp/lib/_decomp.so
7f0000080000-7f0000090000 rw-p 00000000 00:00 0
7f0000090000-7f00000a0000 rw-p 00000000 00:00 0                          [heap]
"""
RUNTIMES = [
    "/usr/lib/intel/libiomp5.so",
    "/usr/lib/llvm/libomp.so.5",
    "/usr/lib/sk/libgomp-e985bcbb.so.1.0.0",
    "/usr/lib/with space/torch/lib/libgomp.so.1",
]


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120, **options)


def fact(text: str, name: str) -> str:
    found = re.search(rf"^ *{name}: (.*)$", text, re.MULTILINE)
    assert found, f"no {name!r} in\n{text}"
    return found[1]


def test_versions_of_pykern_numpy_and_torch():
    facts = config.config()
    assert facts["pykern"] == pykern.__version__ and facts["numpy"] == np.__version__
    assert facts["torch"] == torch.__version__ and facts["python"] == ".".join(map(str, sys.version_info[:3]))


def test_what_is_not_imported_is_not_imported():
    shown = run("import sys, pykern; pykern.show_config(); print('torch' in sys.modules)", cwd=ROOT)
    assert fact(shown.stdout, "torch") == f"{torch.__version__}, not imported", shown.stderr
    assert shown.stdout.splitlines()[-1] == "False"


def test_what_is_not_installed_is_said():
    assert config._version("no_such_package_of_pykern") == "not installed"


# ---- OpenMP


def test_each_runtime_in_the_maps_is_found_once():
    assert config.openmp_runtimes(MAPS) == RUNTIMES
    assert config.openmp_runtimes("") == []


@pytest.mark.parametrize("count", [0, 1])
def test_one_runtime_is_no_warning(count):
    assert config.openmp_warning(RUNTIMES[:count]) is None


def test_the_warning_says_what_it_means_and_what_to_do():
    warning = config.openmp_warning(RUNTIMES[:2])
    assert warning.startswith("2 OpenMP runtimes are loaded: each keeps threads of its own, which compete")
    assert "OMP_NUM_THREADS" in warning and "pykern.set_num_threads(n)" in warning and "\n" not in warning


def test_show_config_without_maps_says_so(monkeypatch):
    monkeypatch.setattr(config, "Path", lambda path: Path(str(path) + "-absent"))
    assert config.config()["openmp runtimes"] == "not known without /proc/self/maps"


def second_runtime() -> Path:
    """The libgomp that scikit-learn's wheel bundles under a name of its own."""
    found = importlib.util.find_spec("sklearn")
    folder = Path(found.origin).parent.parent / "scikit_learn.libs" if found else Path("absent")
    libraries = sorted(folder.glob("libgomp-*.so*"))
    if not libraries:
        pytest.skip("needs a second OpenMP runtime, that of scikit-learn's wheel: pip install 'pykern[course]'")
    return libraries[0]


def test_a_real_second_runtime_is_warned_of():
    library = second_runtime()
    load = "import pykern; from pykern import _C; pykern.set_num_threads(0)\n"
    alone = run(load + "pykern.show_config()", cwd=ROOT)
    assert alone.returncode == 0 and "warning" not in alone.stdout, alone.stdout + alone.stderr
    two = run(load + f"import ctypes; ctypes.CDLL({str(library)!r}); pykern.show_config()", cwd=ROOT)
    assert str(library) in fact(two.stdout, "openmp runtimes").split(", "), two.stderr
    assert fact(two.stdout, "warning") == config.openmp_warning(RUNTIMES[:2])


def test_a_thread_count_of_the_second_runtime_does_not_reach_pykern():
    """What the warning says. The count of pykern's own runtime does reach it."""
    library = second_runtime()
    code = (
        "import ctypes, pykern\n"
        f"other, before = ctypes.CDLL({str(library)!r}), pykern.get_num_threads()\n"
        "other.omp_set_num_threads(before + 4)\n"
        "print(other.omp_get_max_threads() - before, pykern.get_num_threads() - before)\n"
        "mine = ctypes.CDLL('libgomp.so.1'); mine.omp_set_num_threads(before + 4)\n"
        "print(pykern.get_num_threads() - before)\n"
    )
    shown = run(code, cwd=ROOT)
    assert shown.stdout.splitlines() == ["4 0", "4"], shown.stdout + shown.stderr


# ---- an extension that does not load


# An editable install finds pykern before the folder at hand does.
WITHOUT_FINDERS = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]; "


def copied_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "pykern", folder / "pykern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder / "pykern"


def test_a_missing_library_is_named(tmp_path):
    """The extension with the name of its OpenMP library changed to one that nobody has: the loader refuses it."""
    image = Path(_C.__file__).read_bytes()
    name, changed = b"libgomp.so.1\0", b"libgonp.so.9\0"
    if name not in image:
        pytest.skip("this extension is not linked with libgomp.so.1")
    (copied_package(tmp_path) / Path(_C.__file__).name).write_bytes(image.replace(name, changed))
    refused = run(WITHOUT_FINDERS + "import pykern; pykern.show_config()", cwd=tmp_path)
    assert refused.returncode == 1
    assert "needs the library libgonp.so.9, which this system does not have" in refused.stderr
    assert "'apt install libgomp1' or 'dnf install libgomp'" in refused.stderr


def test_an_extension_of_another_python_is_named(tmp_path):
    package = copied_package(tmp_path)
    (package / "_C.cpython-38-x86_64-linux-gnu.so").write_bytes(b"")
    refused = run(WITHOUT_FINDERS + "import pykern; pykern.show_config()", cwd=tmp_path)
    assert refused.returncode == 1
    assert "is for another Python:" in refused.stderr and "_C.cpython-38-x86_64-linux-gnu.so" in refused.stderr
    assert f"({sys.implementation.cache_tag}). Install pykern again with this Python's pip" in refused.stderr
