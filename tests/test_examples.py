"""Each program of examples/ runs, short, and what it prints is what it promises. demo.py runs in CI (make demo).

Losses are those of a few steps: that they fall is looked at, how far is the business of the longer run.
tape_graph.py is run by tests/test_tape_graph.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pykern.lm import Config, Tokenizer, Transformer

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent
# How each is run here, and by whom else: a new example without a test is found by the first test below.
RUN_ELSEWHERE = {"demo.py": ".ci/run", "tape_graph.py": "tests/test_tape_graph.py"}
RUN_HERE = {"autocast.py", "finetune.py", "neural_network.py", "serve.py", "swap_attention.py", "walkthrough.py"}


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=120, check=False)


def run(name: str, *options: str, cwd: Path) -> str:
    ran = python(str(ROOT / "examples" / name), *options, cwd=cwd)
    assert ran.returncode == 0, f"{name}: exit code {ran.returncode}\n{ran.stdout}\n{ran.stderr[-3000:]}"
    return ran.stdout


def test_every_example_has_a_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == RUN_HERE | set(RUN_ELSEWHERE)
    assert "make demo" in (ROOT / ".ci" / "run").read_text() and "examples/demo.py" in (ROOT / "Makefile").read_text()
    assert '"tape_graph.py"' in (ROOT / RUN_ELSEWHERE["tape_graph.py"]).read_text()


def test_swap_attention(tmp_path):
    said = run("swap_attention.py", "--length", "33", "--seconds", "0.05", cwd=tmp_path)
    assert said.startswith("2 attention modules replaced, the others left\n")
    ours = re.search(r"loss (\S+) and (\S+), gradients differ by (\S+) at most", said)
    assert ours and float(ours[1]) == pytest.approx(float(ours[2]), abs=1e-5) and 0 < float(ours[3]) < 1e-4
    assert "with torch's attention: " in said and "with pykern's attention: " in said
    assert "F.scaled_dot_product_attention replaced: outputs differ by " in said
    assert "scaled_dot_product_attention: CPU kernel for ISA " in said


def test_swap_attention_calls_the_kernel():
    """Two layers are two calls of the compiled kernel where plain torch makes none."""
    code = (
        "import torch, swap_attention as example\n"
        "from pykern import _C\n"
        "calls, kernel = [], _C.attention_forward\n"
        "_C.attention_forward = lambda *a, **k: calls.append(1) or kernel(*a, **k)\n"
        "model = example.Classifier(10, 16, 2, 2, 3)\n"
        "given = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)\n"
        "model(*given); before = len(calls); example.swap(model); model(*given); print(before, len(calls))\n"
    )
    ran = python("-c", code)
    assert ran.stdout == "0 2\n", ran.stderr


def test_autocast(tmp_path):
    said = run("autocast.py", "--steps", "40", cwd=tmp_path)
    lines = re.findall(r"^(\w+): loss (\S+) -> (\S+) nats .*, attention's output is (\S+)$", said, re.MULTILINE)
    assert [(line[0], line[3]) for line in lines] == [("float32", "torch.float32"), ("bfloat16", "torch.bfloat16")]
    assert all(float(last) < float(first) - 1 for _, first, last, _ in lines), said
    # Curves of 8 bits of mantissa and of 24: the same to a few hundredths of a nat while the loss is 2.5.
    assert abs(float(lines[0][2]) - float(lines[1][2])) < 0.05, said


def test_serve(tmp_path):
    said = run("serve.py", "--requests", "4", "--tokens", "6", cwd=tmp_path)
    assert re.findall(r"request (\d) comes", said) == list("1234")
    assert sorted(re.findall(r"request (\d) is done", said)) == list("1234")
    second, first = said.index("request 2 comes"), said.index("request 1 is done")
    assert second < first, "no two requests ran together"
    assert "24 tokens of 4 requests in " in said and said.endswith("each has the tokens that it gets alone\n")


def test_serve_a_trained_model(tmp_path):
    """A checkpoint folder, and int8 weights."""
    config = Config(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=256)
    Transformer(config).save(tmp_path / "model")
    Tokenizer.train("byte").save(tmp_path / "model" / "tokenizer.json")
    options = ("--model", "model", "--dtype", "int8", "--requests", "2", "--tokens", "5")
    assert run("serve.py", *options, cwd=tmp_path).endswith("each has the tokens that it gets alone\n")
    refused = python(str(ROOT / "examples" / "serve.py"), *options, "--dtype", "int3", cwd=tmp_path)
    assert refused.returncode == 1 and "session: dtype is 'int3' but must be one of" in refused.stderr


def test_neural_network(tmp_path):
    said = run("neural_network.py", "--steps", "400", cwd=tmp_path)
    assert re.search(
        r"^the worst of all gradients.*: backward gives \S+, the difference quotient \S+$", said, re.MULTILINE
    )
    losses = [float(x) for x in re.findall(r"loss (\S+)", said)]
    assert losses[0] > 1.0 > 0.5 > losses[-1], said  # a guess among three classes costs log 3 = 1.10
    assert float(re.search(r"not seen: (\S+)%", said)[1]) > 80
    plane = said.partition("\n\n")[2].splitlines()
    assert [len(row) for row in plane] == [40] * 15 and set("".join(plane)) == set(".ox")


def test_neural_network_needs_no_torch():
    code = "import sys, neural_network\nneural_network.main(['--steps', '1']); print('torch' in sys.modules)"
    ran = python("-c", code)
    assert ran.stdout.endswith("\nFalse\n"), ran.stderr


def test_walkthrough(tmp_path):
    said = run("walkthrough.py", "--steps", "60", cwd=tmp_path)
    kinds = re.findall(r"^(.+): largest difference (\S+)$", said, re.MULTILINE)
    assert [what for what, _ in kinds[:5]] == [
        "softmax",
        "attention",
        "causal attention",
        "self-attention layer",
        "gradient of q",
    ]
    assert len(kinds) == 13 and all(float(worst) <= 1e-12 for _, worst in kinds)
    assert [float(worst) for what, worst in kinds if "cache" in what or "session" in what] == [0.0] * 6
    losses = [float(x) for x in re.findall(r"loss (\S+)", said)]
    assert losses[-1] < losses[0] - 1 and "\n    def " in said


def test_walkthrough_is_made_of_cells():
    """Each cell starts with its mark, and text cells hold nothing but comments."""
    cells = (ROOT / "examples" / "walkthrough.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", cells, flags=re.MULTILINE)[1:]
    assert len(cells) > 15
    for cell in cells:
        if cell.startswith(" [markdown]"):
            assert all(line.startswith("#") for line in cell.splitlines()[1:] if line), cell
        else:
            compile(cell, "cell", "exec")


@pytest.mark.slow
def test_finetune(tmp_path):
    said = run("finetune.py", "--steps", "2", "--epochs", "0.05", "--seeds", "1", cwd=tmp_path)
    assert "| frozen body | " in said and "| LoRA, rank 8 | " in said and said.count("\n| ") >= 5
