"""_C.pyi, the table of ops and the compiled extension name the same functions and arguments."""

import ast
import re
from pathlib import Path

import pytest

from pykern import _C

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent


METHODS = {"lm_step": "LmModel.step", "lm_generate": "LmModel.generate"}  # ops that are methods


def declared():
    """Function name, or Class.method -> (positional names, keyword-only names) in _C.pyi."""

    def functions(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, ([a.arg for a in node.args.args], [a.arg for a in node.args.kwonlyargs])
            elif isinstance(node, ast.ClassDef):
                yield from functions(node.body, f"{node.name}.")

    return dict(functions(ast.parse((ROOT / "pykern/_C.pyi").read_text()).body))


def bound():
    """The same from the signatures in pybind11's docstrings."""

    def functions(owner, prefix=""):
        for name, member in vars(owner).items():
            if isinstance(member, type):
                yield from functions(member, f"{name}.")
            signature = re.match(rf"{name}\((.*)\) -> ", getattr(member, "__doc__", None) or "")
            if signature:
                parts = re.split(r", (?![^\[]*\])", signature[1]) if signature[1] else []
                names = [part.split(":")[0] for part in parts]
                star = names.index("*") if "*" in names else len(names)
                yield prefix + name, (names[:star], names[star + 1 :])

    return dict(functions(_C))


def test_pyi_and_extension_agree():
    said, real = declared(), bound()
    assert sorted(said) == sorted(real)
    assert {name: said[name] for name in said if said[name] != real[name]} == {}


def test_every_op_of_the_table_is_in_the_contract():
    kernels = re.findall(r"^\s*X\((\w+), \w+\)", (ROOT / "csrc/ops/all.h").read_text(), flags=re.MULTILINE)
    runtime = {
        "isa",
        "isas",
        "num_threads",
        "set_num_threads",
        "cuda_status",
        "cuda_kernels",
        "borrow_path",
        "large_result",
        "kept_results",
    }
    runtime |= {"panel_width", "pairs_bf16", "LmModel.__init__"}
    assert sorted(METHODS.get(kernel, kernel) for kernel in kernels) == sorted(set(declared()) - runtime)
