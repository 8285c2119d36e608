"""Type checkers: py.typed in the wheel, the stub of pykern names what pykern has, and a user's program under mypy."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pykern

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent

# Enough of torch for a user's program: reading all of torch's own types takes mypy a quarter of a minute.
TORCH = """
from typing import Any
class Tensor:
    def __add__(self, other: "Tensor") -> "Tensor": ...
    def backward(self) -> None: ...
def randn(*size: int) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
"""

PROGRAM = """
import torch
import pykern
from pykern import arrays, nn, optim


def attend(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = pykern.attention(x, x, x, causal=True, window=(4, 0))
    again, lse = pykern.attention(x, x, x, return_lse=True)
    normed, total = pykern.layer_norm(x, residual=out + again)
    return pykern.rms_norm(normed) + pykern.gelu(total, approximate="tanh"), lse


def train(x: torch.Tensor, labels: torch.Tensor) -> float:
    layer = nn.Linear(4, 4, activation="gelu")
    loss = nn.LinearCrossEntropyLoss(4, 7, label_smoothing=0.1)
    optimizer = optim.AdamW([*layer.parameters(), *loss.parameters()], lr=1e-3, max_norm=1.0)
    pykern.cross_entropy(pykern.linear(x, x, activation="silu"), labels).backward()
    optimizer.step()
    pykern.set_num_threads(2)
    print(pykern.__version__, arrays.gelu(x), pykern.explain("gelu", x))
    return pykern.get_num_threads() + optimizer.finite_norm()
"""

MISTAKES = {
    'pykern.gelu(x, aproximate="tanh")': 'Unexpected keyword argument "aproximate" for "gelu"',
    "pykern.linear(x)": 'Missing positional argument "weight" in call to "linear"',
    "pykern.attention(x, x, x, True)": 'No overload variant of "attention" matches',
    "a, b = pykern.attention(x, x, x)": '"Tensor" object is not iterable',
    "pykern.softmax(3)": 'Argument 1 to "softmax" has incompatible type "int"; expected "Tensor"',
    "pykern.relu6(x)": 'Module has no attribute "relu6"',
    "pykern.nn.Linear(4)": 'Missing positional argument "out_features" in call to "Linear"',
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What mypy says of the program and of the mistakes, with pykern as an installed package."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "stubs" / "torch").mkdir(parents=True)
    (folder / "stubs" / "torch" / "__init__.pyi").write_text(TORCH)
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {folder / 'stubs'}:{ROOT}\nignore_missing_imports = true\n"
        "[mypy-pykern.*]\nfollow_imports = silent\n"
        "[mypy-numpy.*,pykern.lm.*,pykern.tape.*,pykern.testing.*]\nfollow_imports = skip\n"  # saves seconds
    )
    (folder / "program.py").write_text(PROGRAM)
    (folder / "mistakes.py").write_text("import pykern, torch\nx = torch.randn(3)\n" + "\n".join(MISTAKES) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "program.py", "mistakes.py"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_program_type_checks_strictly(said):
    assert said[-1].endswith("(checked 2 source files)")
    assert [line for line in said[:-1] if not line.startswith("mistakes.py:")] == []


def test_mistakes_are_found(said):
    """Each on its line: the types are there, not Any."""
    for i, (line, words) in enumerate(MISTAKES.items(), start=3):
        found = [message for message in said if message.startswith(f"mistakes.py:{i}: error: ")]
        assert found and words in found[0], (line, said)


def test_the_stub_names_what_pykern_has():
    tree = ast.parse((ROOT / "pykern/__init__.pyi").read_text())
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imported for alias in node.names)  # `as`: exported
    said = {alias.name: node.module for node in imported for alias in node.names}
    assert said == pykern._NAMES | dict.fromkeys(pykern._MODULES, "pykern")
    assert sorted(said) == sorted(pykern.__all__)


def test_the_wheel_has_the_types(tmp_path):
    """Built without the extension: what pyproject.toml packs beside it."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is not installed: pip install scikit-build-core")
    code = f"from scikit_build_core.build import build_wheel as b; b({str(tmp_path)!r}, {{'wheel.cmake': 'false'}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("py.typed", "__init__.pyi", "_C.pyi", "__init__.py", "arrays.py"):
        assert f"pykern/{name}" in names, name
