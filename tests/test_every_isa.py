"""The kernel tests again, in one process for each further ISA that this machine runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykern import _C

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.stem for path in (ROOT / "csrc/ops").glob("*.cpp") if path.stem != "check")
FILES = sorted({path.name for room in ROOMS for path in (ROOT / "tests").glob(f"test_{room}*.py")})
FILES += ["test_memory.py", "test_mixed_dtypes.py"]
OTHER_ISAS = [isa for isa, here in _C.isas() if here and isa != _C.isa()]
EXAMPLES = "5"  # of each property: the main run has tried more, on the same algorithm


def python(*args, isa=None, **env):
    env = {**os.environ, **env}
    env.pop("PYKERN_ISA", None)
    if isa is not None:
        env["PYKERN_ISA"] = isa
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, text=True, capture_output=True, timeout=1200)


def test_best_isa_is_chosen():
    run = python("-c", "from pykern import _C; print(_C.isa())")
    assert run.stdout.split() == [next(isa for isa, here in _C.isas() if here)], run.stderr


@pytest.mark.parametrize("isa", [isa for isa, here in _C.isas() if here])
def test_forced_isa_is_the_one_running(isa):
    code = "import torch, pykern; x = pykern.relu(torch.ones(3)); print(pykern._C.isa(), pykern.explain('relu', x))"
    run = python("-c", code, isa=isa)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(isa + " relu: CPU kernel") and f"ISA {isa}," in run.stdout


def test_unknown_isa_names_the_known_ones():
    run = python("-c", "import torch, pykern; pykern.relu(torch.ones(3))", isa="v9")
    known = ", ".join(isa for isa, _ in _C.isas())
    assert run.returncode == 1
    assert f"RuntimeError: PYKERN_ISA=v9 is not one of {known}" in run.stderr


def test_isa_of_another_processor_is_refused():
    absent = [isa for isa, here in _C.isas() if not here]
    if not absent:
        pytest.skip("this processor runs every ISA that was built")
    run = python("-c", "from pykern import _C; _C.isa()", isa=absent[0])
    assert run.returncode == 1 and f"PYKERN_ISA={absent[0]} does not run on this processor" in run.stderr


def test_empty_variable_is_no_choice():
    run = python("-c", "from pykern import _C; print(_C.isa())", isa="")
    assert run.returncode == 0 and run.stdout.strip() == next(isa for isa, here in _C.isas() if here)


def test_every_room_has_its_tests():
    assert ROOMS and [room for room in ROOMS if not (ROOT / f"tests/test_{room}.py").exists()] == []


@pytest.mark.one_isa
@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_kernel_tests_pass_on(isa):
    files = [f"tests/{name}" for name in FILES]
    run = python(
        *("-m", "pytest", *files, "-m", "not one_isa", "-v", "--no-header", "--tb=short", "-p", "no:cacheprovider"),
        *("-o", "addopts="),
        isa=isa,
        PYKERN_TEST_EXAMPLES=EXAMPLES,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert f"ran on isa {isa}" in run.stdout
    passed = [line for line in run.stdout.splitlines() if " PASSED" in line]
    assert len(passed) > len(ROOMS), run.stdout[-2000:]
