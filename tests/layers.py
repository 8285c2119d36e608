"""Who may include or import whom, as rules over source text: violations(files) lists what breaks them.

csrc: core <- ops <- {cpu, cuda, runtime} <- bind; cpu and cuda see neither each other nor Python nor std:: containers.
pykern: _C <- ops <- nn <- lm; _C <- tape, which never imports torch; only tests, benchmarks and the CLI import testing.
"""

import ast
import re
from collections.abc import Iterator

# folder of csrc -> folders whose headers it may include
MAY_INCLUDE = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "cpu": {"core", "ops", "cpu"},
    "cuda": {"core", "ops", "cuda"},
    "runtime": {"core", "ops", "runtime"},
    "bind": {"core", "ops", "runtime", "bind"},
}
TABLE = ("csrc/cpu/table.cpp", "runtime/cpu_table.h")  # the one meeting point: each ISA fills in a dispatch table

# A kernel is compiled with instructions that not every processor has. An inline function or template of a system
# header could be the copy that the linker keeps for the whole program, so kernels include C headers only.
KERNEL_HEADERS = {"stdint.h", "string.h", "stdlib.h", "math.h", "omp.h", "sched.h"}
VEC_HEADERS = {"immintrin.h", "arm_neon.h", "utility"}  # integer_sequence is a type without code
VEC_FILES = ("csrc/cpu/vec.h", "csrc/cpu/vec_arithmetic.h")  # the only ones with intrinsics
KERNEL_STD = {"integer_sequence", "make_integer_sequence", "index_sequence", "make_index_sequence"}

# part of pykern -> what it may not import, besides pykern.testing
MAY_NOT_IMPORT = {
    "ops": ("pykern.nn", "pykern.lm", "pykern.tape", "pykern.optim", "pykern.cli"),
    "nn": ("pykern.lm", "pykern.tape", "pykern.cli"),
    "arrays": ("pykern.nn", "pykern.lm", "pykern.tape", "pykern.optim", "pykern.cli"),
    "optim": ("pykern.lm", "pykern.tape", "pykern.nn", "pykern.cli"),
    "lm": ("pykern.tape",),
    "course": ("pykern.cli",),
    "tape": ("torch", "pykern.ops", "pykern.nn", "pykern.lm", "pykern.optim", "pykern.cli"),
    "integrations": ("pykern.tape", "pykern.cli"),
    "config": ("torch", "pykern.ops", "pykern.nn", "pykern.lm", "pykern.tape", "pykern.cli"),
    "__init__": ("torch", "numpy", "pykern._C", "pykern.ops", "pykern.nn", "pykern.lm", "pykern.tape", "pykern.cli"),
    "testing": ("pykern.lm", "pykern.cli"),
}
MAY_IMPORT_TESTING = ("testing", "cli")
MAX_LINES = 500
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:root|home|work|tmp|Users|opt)/")


def _code(text: str) -> str:
    """C++ without comments and string literals, so that words in them do not count."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', " ", text, flags=re.DOTALL)


def _cpp(path: str, text: str) -> Iterator[str]:
    layer = path.split("/")[1]
    if layer not in MAY_INCLUDE:
        yield f"{path}: csrc/{layer} is not one of {', '.join(MAY_INCLUDE)}"
        return
    for name in re.findall(r'#\s*include\s+"([^"]+)"', text):
        folder = name.split("/")[0]
        if folder not in MAY_INCLUDE[layer] and (path, name) != TABLE and name != "isa_list.h":
            yield f"{path}: csrc/{layer} may not include {name}"
    system = set(re.findall(r"#\s*include\s+<([^>]+)>", text))
    code = _code(text)
    if layer != "bind":
        for name in sorted(system):
            if name.startswith(("pybind11", "Python.h")) or "dlpack" in name:
                yield f"{path}: only csrc/bind may include {name}"
    if layer == "cpu":
        allowed = KERNEL_HEADERS | (VEC_HEADERS if path in VEC_FILES else set())
        for name in sorted(system - allowed):
            yield f"{path}: kernels may not include {name}"
        for name in sorted(set(re.findall(r"\bstd::(\w+)", code)) - KERNEL_STD):
            yield f"{path}: kernels may not use std::{name}"
        if path not in VEC_FILES and (found := re.search(r"\b_mm\w+|\bv(?:ld|st|add|mul)1?q?_\w+", code)):
            yield f"{path}: the intrinsic {found[0]} belongs into {VEC_FILES[0]}"
        if re.search(r"\b(?:throw|new)\b|(?<!= )\bdelete\b", code):
            yield f"{path}: kernels neither throw nor allocate with new"
    if found := re.search(r"\b(?:printf|fprintf|puts|cout|cerr|exit|abort|assert)\b\s*[(<]", code):
        yield f"{path}: nothing in csrc prints, exits or aborts ({found[0].rstrip('(< ')})"


def _imports(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _python(path: str, text: str) -> Iterator[str]:
    part = path.split("/")[1].removesuffix(".py")
    for name in _imports(text):
        for module in MAY_NOT_IMPORT.get(part, ()):
            if _within(name, module):
                yield f"{path}: pykern.{part} may not import {name}"
        if part not in MAY_IMPORT_TESTING and _within(name, "pykern.testing"):
            yield f"{path}: pykern.testing is for tests, benchmarks and `pykern check` only"


def violations(files: dict[str, str]) -> list[str]:
    """One sentence for each broken rule, of a repository given as {path: text}."""
    found: list[str] = []
    for path, text in sorted(files.items()):
        if path.startswith("csrc/") and path.endswith((".h", ".cpp", ".cu", ".cuh")):
            found += _cpp(path, text)
        if path.startswith("pykern/") and path.endswith(".py"):
            found += _python(path, text)
        if path.startswith(("csrc/", "pykern/")) and (lines := text.count("\n")) > MAX_LINES:
            found.append(f"{path}: {lines} lines, at most {MAX_LINES}")
        if hit := MACHINE_PATH.search(text):
            found.append(f"{path}: {text[hit.start() : hit.start() + 30].split()[0]} is a path of one machine")
    return found
