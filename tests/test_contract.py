"""_C.pyi, the table of ops and the compiled extension name the same functions and arguments."""

import ast
import re
from pathlib import Path

import pytest

from pykern import _C

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent


def declared():
    """Function name -> (positional names, keyword-only names) in _C.pyi."""
    tree = ast.parse((ROOT / "pykern/_C.pyi").read_text())
    return {
        node.name: ([a.arg for a in node.args.args], [a.arg for a in node.args.kwonlyargs])
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def bound():
    """The same from the signatures in pybind11's docstrings."""
    functions = {}
    for name in dir(_C):
        signature = (
            re.match(rf"{name}\((.*)\) -> ", getattr(_C, name).__doc__ or "") if callable(getattr(_C, name)) else None
        )
        if signature:
            parts = re.split(r", (?![^\[]*\])", signature[1]) if signature[1] else []
            names = [part.split(":")[0] for part in parts]
            star = names.index("*") if "*" in names else len(names)
            functions[name] = (names[:star], names[star + 1 :])
    return functions


def test_pyi_and_extension_agree():
    said, real = declared(), bound()
    assert sorted(said) == sorted(real)
    assert {name: said[name] for name in said if said[name] != real[name]} == {}


def test_every_op_of_the_table_is_in_the_contract():
    kernels = re.findall(r"^\s*X\((\w+), \w+\)", (ROOT / "csrc/ops/all.h").read_text(), flags=re.MULTILINE)
    runtime = {"isa", "isas", "num_threads", "set_num_threads", "cuda_status", "borrow_path", "huge_pages"}
    assert sorted(kernels) == sorted(set(declared()) - runtime)
