"""The sdist and the wheel: what they hold, that one builds from the other, and that numpy is all the wheel needs.

The wheel is built from the unpacked sdist, in a folder of its own, by pip as a user would, but without its build
isolation, for the ISA base alone and without optimisation (-O0, a quarter of the time): the same files in the same
places, other machine code. How fast or how large code for use is, it does not show; the size of that is taken from the
extension that runs these tests.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
import zlib
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest

from pykern import _C

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

pytestmark = [pytest.mark.one_isa, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME = f"pykern-{PROJECT['project']['version']}"
MOST = 30_000_000  # bytes of a wheel with all ISAs and CUDA
QUICK = {
    "PYKERN_ISAS": "base",
    "PYKERN_CUDA": "OFF",
    "PYKERN_OPTIMIZE": "-O0",
    "CMAKE_CXX_FLAGS_RELEASE": "-O0",
    "CMAKE_CXX_COMPILER_LAUNCHER": "",  # a ccache would hide a file that the sdist lacks
}
SYSTEM = ("libgomp.so.1", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux")
LEFTOVERS = (".so", ".o", ".a", ".pyc", ".whl", ".pyd", ".ninja")
FOLDERS = ("build", "dist", "out", ".venv", ".git", "__pycache__", ".hypothesis", ".pytest_cache")


def call(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A command outside the checkout that sees none of this process's packages by PYTHONPATH."""
    names = ("PYTHONPATH", "PYTHONHOME", "PYKERN_ISA", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    words = [str(word) for word in command]
    run = subprocess.run(words, cwd=cwd, env=clean | env, text=True, capture_output=True, timeout=600, check=False)
    assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run


def files_below(folder: Path) -> set[str]:
    """Paths below folder as the sdist names them, without what a build or a run leaves there."""
    files = (path.relative_to(ROOT) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.suffix not in LEFTOVERS and not set(path.parts) & set(FOLDERS)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(path of the archive, names of its files below its only folder)."""
    for name in ("scikit_build_core", "pybind11", "pip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install {name.replace('_', '-')}")
    folder = tmp_path_factory.mktemp("sdist")
    hook = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    call(sys.executable, "-c", hook, folder, cwd=ROOT)  # what every frontend calls
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as tar:
        names = [member.name for member in tar.getmembers() if member.isfile()]
    assert {name.partition("/")[0] for name in names} == {NAME}
    return archive, {name.partition("/")[2] for name in names}


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler: c++ or $CXX")
    folder = tmp_path_factory.mktemp("wheel")
    options = [f"--config-settings=cmake.define.{name}={value}" for name, value in QUICK.items()]
    level = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    call(
        *(sys.executable, "-m", "pip", "wheel", "--isolated", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--no-cache-dir", "--wheel-dir", folder, *options, sdist[0]),
        cwd=folder,
        CMAKE_BUILD_PARALLEL_LEVEL=level,
        CCACHE_DISABLE="1",
    )
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def fresh_python(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel, and with the numpy of this one by symbolic links.

    pip sees that numpy as installed, has no index, and would refuse to install a wheel that asked for anything else.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout[:-1]
    )
    assert list(packages.iterdir()) == []
    numpy = metadata.distribution("numpy")
    for part in {path.parts[0] for path in numpy.files if ".." not in path.parts}:
        (packages / part).symlink_to(numpy.locate_file(part))
    pip = [sys.executable, "-m", "pip", "--python", python]
    call(*pip, "install", "--isolated", "--no-index", "--no-cache-dir", wheel, cwd=folder)
    call(*pip, "check", cwd=folder)
    return python


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# ---- the sdist


def test_sdist_holds_all_that_a_build_and_its_tests_need(sdist):
    """The CUDA kernels and the emulator too, which the wheel of these tests does not compile."""
    wanted = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"}
    for folder in ("csrc", "pykern", "tests", "examples"):
        found = files_below(ROOT / folder)
        assert len(found) > 2
        wanted |= found
    assert wanted - sdist[1] == set()


def test_sdist_holds_no_build_products(sdist):
    wrong = [n for n in sdist[1] if n.endswith(LEFTOVERS) or set(n.split("/")) & set(FOLDERS)]
    assert wrong == []


# ---- the wheel


def test_wheel_is_for_this_python_and_platform(wheel):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"{NAME}-{tag}-{tag}-linux_"), wheel.name


def test_wheel_holds_the_package_and_nothing_else(wheel, sdist):
    """Each file of pykern/ in the sdist, one extension and the metadata: no tests, data, sources or build products."""
    info = f"{NAME}.dist-info"
    extra = {f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    extra |= {f"pykern/{Path(_C.__file__).name}"}
    assert names_in(wheel) == {n for n in sdist[1] if n.startswith("pykern/")} | extra
    assert "pykern/py.typed" in names_in(wheel) and "pykern/_C.pyi" in names_in(wheel)


def test_wheel_brings_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_wheel_asks_for_numpy_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        fields = HeaderParser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
    assert [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line] == ["numpy>=1.26"]
    assert fields["Requires-Python"] == ">=3.10" and fields["License-Expression"] == "MIT"


def test_extension_links_system_libraries_only(wheel, tmp_path):
    """No libtorch, no libcuda, no libpython: what manylinux has, and libgomp."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf, of GNU binutils")
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(f"pykern/{Path(_C.__file__).name}", tmp_path)
    listed = call("readelf", "--dynamic", "--wide", path, cwd=tmp_path).stdout
    needed = [line.rpartition("[")[2].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert "libgomp.so.1" in needed and [name for name in needed if not name.startswith(SYSTEM)] == []
    assert "RPATH" not in listed and "RUNPATH" not in listed


def test_sizes(wheel):
    """The wheel of these tests, and what the extension that runs them weighs in a wheel, which is deflated too."""
    assert wheel.stat().st_size < MOST
    packed = len(zlib.compress(Path(_C.__file__).read_bytes()))
    rest = sum(path.stat().st_size for path in (ROOT / "pykern").rglob("*") if path.suffix in (".py", ".pyi", ".html"))
    assert packed + rest < MOST, f"{packed} bytes of the extension deflated, {rest} of Python"


# ---- installed


def test_the_wheel_works_with_numpy_alone(fresh_python, tmp_path):
    """With the very command that cibuildwheel will run on each wheel."""
    command = PROJECT["tool"]["cibuildwheel"]["test-command"].replace("{project}", str(ROOT))
    program, *words = shlex.split(command)
    assert program == "python"
    said = call(fresh_python, *words, cwd=tmp_path).stdout
    lines = {name.strip(): value for name, _, value in (line.partition(": ") for line in said.splitlines())}
    assert lines["isa built"] == "base" and lines["torch"] == "not installed"
    assert lines["extension"].startswith(str(fresh_python.parent.parent)), lines
    assert said.endswith("trained on isa base\n")


def test_what_needs_torch_says_how_to_get_it(fresh_python, tmp_path):
    code = (
        "import pykern\n"
        "for name in ('attention', 'nn'):\n"
        "    try:\n        getattr(pykern, name)\n"
        "    except ImportError as error:\n        print(error)\n"
    )
    said = call(fresh_python, "-c", code, cwd=tmp_path).stdout.splitlines()
    words = "needs torch, which is not installed: pip install 'pykern[torch]'"
    assert said == [f"pykern.ops {words}", f"pykern.nn {words}"]


def test_the_command_is_installed(fresh_python, tmp_path):
    program = fresh_python.parent / "pykern"
    assert "isa: base" in call(program, "info", cwd=tmp_path).stdout
    refused = subprocess.run(
        [program, "train", "--data", "stdlib", "--out", tmp_path / "out"], cwd=tmp_path, text=True, capture_output=True
    )
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert refused.stderr.endswith("No module named 'torch': pip install 'pykern[lm]'\n"), refused.stderr


def test_cibuildwheel_leaves_the_openmp_runtime_to_the_system():
    """A bundled copy would be a second runtime beside that of torch."""
    table = PROJECT["tool"]["cibuildwheel"]
    assert "--exclude libgomp.so.1" in table["linux"]["repair-wheel-command"]
    assert (ROOT / "tests" / "wheel_smoke.py").is_file() and "tests/wheel_smoke.py" in table["test-command"]
