"""The pages are right: links lead somewhere, the site holds every page, the examples run and print what they say.

A python block of a page runs unless a comment right before it, <!-- not run: reason -->, says why not: all of a page in
order, with the same names, in an empty folder. What stands in a text block right behind it is what it prints.
"""

import argparse
import contextlib
import doctest
import importlib.util
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pages import PAGES, ROOT, anchor, anchors, blocks, broken, commands, headings, links, name

import pykern
from pykern.cli import PASSED_ON, make_parser
from pykern.cli import main as pykern_command
from pykern.lm import Config, Tokenizer, Transformer, save_hf
from pykern.tape import tape

pytestmark = pytest.mark.one_isa

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
RUNNABLE = [page for page, text in TEXTS.items() if any(block.language == "python" for block in blocks(text))]


# ---- links


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_and_anchor_resolves(page):
    assert broken(page, TEXTS[page]) == []


def test_links_are_found_and_broken_ones_reported():
    page = ROOT / "docs" / "softmax.md"
    text = "# A `b(c, *, d)` + e\n\n[1](norm.md) ![2](no.png) `[3](x.md)` [4](#a-bc--d--e) [5](norm.md#no)\n"
    text += "\n    [6](y.md)\n"
    assert links(text) == ["norm.md", "no.png", "#a-bc--d--e", "norm.md#no"]
    assert broken(page, text) == ["no.png: no such file", "norm.md#no: no heading of that name"]
    assert anchor("On an H200") == "on-an-h200" and anchors("# x\n## x\n") == {"x", "x-1"}
    assert broken(page, "[up](../../etc/passwd)") == ["../../etc/passwd: no such file"]
    assert sum(len(links(text)) for text in TEXTS.values()) > 200


# ---- the site


def navigation():
    """The pages that mkdocs.yml lists, without a YAML library: every line of nav that ends with a page."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    return re.findall(r": (\S+\.md)$", nav, re.MULTILINE)


def shown():
    """The pages that docs/hooks.py makes of files outside docs/."""
    line = re.search(r"^SHOWN = \{(.*)\}$", (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(re.findall(r'"(\S+?)": "(\S+?)"', line.group(1)))


def test_every_page_is_in_the_navigation_once():
    assert set(shown()) == {"index.md", "changelog.md", "contributing.md"}
    assert all((ROOT / file).is_file() for file in shown().values())
    pages = sorted([page.name for page in (ROOT / "docs").glob("*.md")] + list(shown()))
    assert sorted(navigation()) == pages


def test_the_site_is_built_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: `make docs` builds the site")
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: `make docs` builds the site")
    out = tmp_path / "site"
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert {f"{page.removesuffix('.md')}.html" for page in navigation()} <= {file.name for file in out.glob("*.html")}
    fetched = re.compile(r'<(?:script|img|iframe)[^>]* src="?https?://|<link[^>]*stylesheet[^>]* href="?https?://')
    for file in out.rglob("*.html"):
        html = file.read_text(encoding="utf-8")
        assert not fetched.search(html), file
        assert str(ROOT) not in html, file
    assert "<math" in (out / "softmax.html").read_text(encoding="utf-8")
    assert "def apply_fwd" in re.sub(r"<[^>]+>", "", (out / "source/pykern/tape/engine.py.html").read_text("utf-8"))


# ---- the pictures


def plots():
    spec = importlib.util.spec_from_file_location("plots", ROOT / "docs" / "plots.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plots"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_pictures_are_small():
    pictures = list((ROOT / "docs").glob("*.png"))
    assert len(pictures) >= 5 and all(picture.stat().st_size < 100_000 for picture in pictures)
    used = {link for page in PAGES for link in links(TEXTS[page])}
    assert all(picture.name in used or f"docs/{picture.name}" in used for picture in pictures)


def test_roofline_points_are_those_of_the_results(tmp_path):
    row = {"bench": "linear", "case": "a", "dtype": "float32", "threads": 2, "flops": 8e9, "moved": 4e9, "seconds": 2.0}
    rows = [row | {"who": "pykern"}, row | {"who": "torch", "seconds": 4.0}, row | {"who": "other", "seconds": 3.0}]
    rows.append(row | {"who": "pykern", "bench": "adamw", "flops": 0.0})
    flops = {"float32": 5e10, "bfloat16": 1e11}
    roofline = [
        {"threads": 2, "flops": flops, "read": {"1024": 9e10, "16384": 2e10}},
        {"threads": 1, "flops": {}, "read": {}},
    ]
    machine = {"processor": "p", "isa": "v3", "torch": "2"}
    document = {"machine": machine, "roofline": roofline, "results": rows}
    found = plots().points([document])
    assert {(p.bench, p.ours, p.intensity, p.rate) for p in found} == {
        ("linear", True, 2.0, 4e9),
        ("linear", False, 2.0, 8e9 / 3),  # the faster of the two
    }
    roofs = plots().roofs([document, document | {"roofline": [roofline[0] | {"read": {"16384": 3e10}}]}], 2)
    assert roofs.flops == flops and roofs.read == (2e10, 3e10)
    plots().plot([document], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_roofline_refuses_files_of_other_thread_counts():
    results = ROOT / "benchmarks" / "results"
    files = [results / "zen4_2threads_attention.json", results / "zen4_1thread_attention.json"]
    with pytest.raises(ValueError, match=r"results of \[1, 2\] threads, expected one"):
        plots().read_results(files)
    assert len(plots().points(plots().read_results(files[:1]))) > 50


# ---- what a page of an op has

NOT_ONE_OP = {"lm_step"}  # a step of a whole model; its page says what bounds it


def op_pages():
    ops = re.search(r"^  - Ops:\n((?: {6}.*\n)+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    return [page for page in re.findall(r": (\w+)\.md$", ops.group(1), re.MULTILINE) if page not in NOT_ONE_OP]


SECTIONS = {
    "gradient": {"Gradient", "Backward"},
    "cost": {"Cost"},
    "tiles": {"Tiles", "What each block size costs", "The kernel on the CPU"},
    "measured": {"Measured", "Speed"},
}
NO_GRADIENT = {"adamw"}  # an optimiser's step; decode and sampling have the section, and say that there is none


@pytest.mark.parametrize("op", op_pages())
def test_every_page_of_an_op_has_formula_gradient_cost_tiles_and_measurement(op):
    assert len(op_pages()) >= 13
    text = TEXTS[ROOT / "docs" / f"{op}.md"]
    sections = {words for _, words in headings(text)}
    missing = [part for part, names in SECTIONS.items() if not names & sections]
    assert missing == (["gradient"] if op in NO_GRADIENT else [])
    assert re.search(r"^    .*(?:=|->).*$", text, re.MULTILINE), "no formula"
    measured = re.split(r"^## (?:Measured|Speed)$", text, flags=re.MULTILINE)[1].partition("\n## ")[0]
    assert re.search(r"^\|", measured, re.MULTILINE) or links(measured), "neither a table nor a link to one"


# ---- the examples run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the pages take for granted: a checkpoint, a Hugging Face folder, labelled texts."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64, "vocab_size": 256}
    tokenizer = Tokenizer.train("byte")
    (folder / "out" / "small").mkdir(parents=True)
    Transformer(Config(**shape, positions="rope")).save(folder / "out" / "small")
    tokenizer.save(folder / "out" / "small" / "tokenizer.json")
    save_hf(Transformer(Config(**shape)), folder / "gpt2-folder", Tokenizer.train("bpe", ["a"], vocab_size=256))
    for file in ("train.tsv", "test.tsv"):
        (folder / file).write_text("".join(f"{label} {n}\t{label}\n" for n in range(12) for label in ("one", "two")))
    return folder


def machine_free(printed):
    """What depends on the machine replaced: the instruction set, the threads, how arrays are lent."""
    printed = re.sub(r"\bISA \w+", "ISA …", printed)
    printed = re.sub(r"\b\d+ threads?\b", "… threads", printed)
    return re.sub(r"borrowed by \w+", "borrowed by …", printed)


def run_python(page, block, names):
    printed = io.StringIO()
    code = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name(page), "exec"), names)
    if block.printed is not None:
        assert machine_free(printed.getvalue()) == machine_free(block.printed)


def run_commands(block):
    """Commands of pykern run; of others it is checked that what they name is there."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "pykern":
            assert pykern_command(words[1:]) == 0, line
        elif words[:2] == ["pip", "install"]:
            wanted = re.match(r"\.(?:\[([\w,]+)\])?$", words[2])
            assert wanted and set((wanted.group(1) or "lm").split(",")) <= set(extras), line
        else:
            assert words[0] == "make" and words[1] in targets, line


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, workplace, tmp_path, monkeypatch, capsys):
    todo = [block for block in blocks(TEXTS[page]) if block.language in ("python", "bash")]
    if all(block.not_run for block in todo):
        pytest.skip(f"not run: {todo[0].not_run}")
    if "save_gguf(" in TEXTS[page]:
        pytest.importorskip("gguf", reason="the page writes a GGUF file, and the package gguf is not installed")
    # start.md begins with nothing, as its reader does
    monkeypatch.chdir(tmp_path if page.name == "start.md" else workplace)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # put back afterwards
    tape.clear()
    names = {"__name__": "__main__"}
    try:
        for block in todo:
            if block.not_run is None:
                run_python(page, block, names) if block.language == "python" else run_commands(block)
    finally:
        tape.clear()
        pykern.set_num_threads(0)


def test_no_page_but_these_leaves_code_unrun():
    """A list that is to shrink: every reason is that the code takes minutes."""
    unrun = {name(page) for page, text in TEXTS.items() for block in blocks(text) if block.not_run}
    assert unrun == {f"docs/{page}.md" for page in ("compare", "data", "digits", "icl", "lm")}


def test_an_example_that_prints_something_else_is_caught():
    text = '# x\n\n```python\nprint("ISA v3, 4 threads")\n```\n```text\nISA v4, 1 thread\n```\n'
    (block,) = blocks(text)
    run_python(ROOT / "docs" / "x.md", block, {})
    (wrong,) = blocks(text.replace("v4, 1", "v4; 1"))
    with pytest.raises(AssertionError, match="ISA …; … threads"):
        run_python(ROOT / "docs" / "x.md", wrong, {})
    (left,) = blocks("<!-- not run: long -->\n```python\n1 / 0\n```\n\n```text\nno\n```\n")[:1]
    assert left.not_run == "long" and left.printed is None


# ---- the commands that pages name


def options(parser):
    """Every option of a command and of the commands below it."""
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= options(below)
    return found


def unknown(line, parsers):
    """The command, or the options of it, that `pykern` does not have."""
    words = re.findall(r"--?[a-z][\w-]*|[a-z]+", line)[1:]
    if words[0] not in parsers:
        return [words[0]]
    if words[0] in PASSED_ON:  # these parse for themselves
        return []
    known = options(parsers[words[0]])
    return [word for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", line) if word not in known]


def test_commands_and_options_that_pages_name_exist():
    (parsers,) = [a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]  # what was, may be gone
    lines = [(name(page), line) for page in pages for line in commands(TEXTS[page])]
    assert len(lines) > 80
    lines = [(page, line) for page, line in lines if "|" not in line.split()[1:3]]  # pykern train | generate | ...
    assert [(page, line, unknown(line, parsers)) for page, line in lines if unknown(line, parsers)] == []
    assert unknown("pykern trian --data x", parsers) == ["trian"]
    assert unknown("pykern train --data x --stpes 3", parsers) == ["--stpes"]


# ---- examples in docstrings


def modules_with_examples():
    found = pkgutil.walk_packages(pykern.__path__, "pykern.", onerror=lambda module: None)
    for module in found:
        spec = importlib.util.find_spec(module.name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        with open(spec.origin, encoding="utf-8") as file:
            if re.search(r"^\s*>>> ", file.read(), re.MULTILINE):
                yield module.name


def test_examples_in_docstrings_print_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(modules_with_examples())
    for module in names:
        failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
        assert tried > 0 and failed == 0, module
    assert "pykern.tape" in names
