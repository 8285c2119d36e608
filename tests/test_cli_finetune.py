"""pykern finetune and pykern classify: what they write and print, and that every refusal is one line."""

import io
import json
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from pykern.cli import main
from pykern.cli.finetune import OPTIONS
from pykern.lm import Config, Tokenizer, Transformer
from pykern.lm.checkpoint import load_checkpoint, save_checkpoint
from pykern.lm.finetune_options import FineTuneOptions
from pykern.lm.lora import load_adapter
from pykern.lm.options import TrainOptions
from pykern.lm.plot import read_rows
from pykern.lm.trainer import make_model

pytestmark = pytest.mark.one_isa

TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i % 5}\n\n\n" for i in range(60))
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 256}


def write_model(folder, **changes):
    model = make_model(Config(**SHAPE | changes), TrainOptions())
    tokenizer = Tokenizer.train("byte")
    save_checkpoint(folder, config=model.config, tensors=dict(model.state_dict()), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("finetune")
    write_model(tmp / "model")
    (tmp / "text.txt").write_text(TEXT)
    generator = random.Random(0)
    words = ["".join(generator.choice("abc") for _ in range(6)) for _ in range(80)]
    (tmp / "words.tsv").write_text(
        "".join(f"{word}\t{'ends in a' if word[-1] == 'a' else 'other'}\n" for word in words)
    )
    (tmp / "single.tsv").write_text("x\ta\ny\tb\nz\tb\n")
    (tmp / "broken.tsv").write_text("x\ta\nno label\n")
    (tmp / "long.tsv").write_text("".join(f"{'x' * 30}{i}\t{'ab'[i % 2]}\n" for i in range(8)))
    assert main(arguments(tmp, "classify", "words.tsv", tmp / "classifier", "--steps", "3")) == 0
    return tmp


def arguments(places, task, data, out, *more):
    return [
        *("finetune", "--model", str(places / "model"), "--data", str(places / data), "--out", str(out)),
        *("--task", task, *more),
    ]


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder):
    return load_checkpoint(folder).tensors


# ---- lm


def test_lm_learns_and_generates(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(places, "lm", "text.txt", out, "--steps", "30", "--lr", "1e-2")) == 0
    printed = capsys.readouterr()
    before, after = (line for line in printed.out.splitlines() if line.startswith(("before", "after")))
    values = [float(line.split("loss ")[1].split(",")[0]) for line in (before, after)]
    assert values[0] == pytest.approx(5.545, abs=0.1) and values[1] < 3.5
    assert "30 of 30 steps" in printed.out and "step 30/30" in printed.err
    assert sorted(listing(out)) == [
        "config.json",
        "finetune.json",
        "loss.csv",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
    ]
    rows = read_rows(out / "loss.csv")
    assert len(rows) == 30 and float(rows[-1]["val_loss"]) == pytest.approx(values[1], abs=1e-4)
    assert main(["evaluate", "--model", str(out), "--data", str(places / "text.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(values[1], abs=1e-4)
    assert main(["generate", "--model", str(out), "--prompt", "def", "--max-new-tokens", "3", "--quiet"]) == 0


def test_lm_with_a_frozen_body_unties_the_head(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(places, "lm", "text.txt", out, "--steps", "10", "--freeze-body")) == 0
    before, after = tensors(places / "model"), tensors(out)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert set(after) - set(before) == {"lm_head.weight"}
    assert not torch.equal(after["lm_head.weight"], before["transformer.wte.weight"])
    assert not Transformer.load(out).config.tied_head and "4,096 parameters trained" in capsys.readouterr().out


def test_lm_with_a_frozen_body_and_its_own_head(places, tmp_path):
    write_model(tmp_path / "model", tied_head=False)
    out = tmp_path / "out"
    assert main(arguments(tmp_path, "lm", places / "text.txt", out, "--steps", "5", "--freeze-body")) == 0
    before, after = tensors(tmp_path / "model"), tensors(out)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lm_head.weight"}


def test_lm_with_lora_writes_the_sums_and_the_adapter(places, tmp_path):
    out = tmp_path / "out"
    options = ["--steps", "10", "--lora", "2", "--lora-alpha", "4", "--dtype", "bfloat16"]
    assert main(arguments(places, "lm", "text.txt", out, *options)) == 0
    before, after = tensors(places / "model"), tensors(out)
    moved = {name.split(".", 3)[3] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    base = Transformer.load(places / "model")
    load_adapter(base, out)
    ids = torch.tensor([list(b"def f1")])
    assert torch.equal(base(ids), Transformer.load(out)(ids))
    assert json.loads((out / "finetune.json").read_text())["options"]["lora_alpha"] == 4.0


def test_lm_that_gets_worse_stays_as_it_was(places, tmp_path, capsys):
    out = tmp_path / "out"
    more = [
        "--steps",
        "40",
        "--lr",
        "1000",
        "--clip",
        "0",
        "--eval-every",
        "1",
        "--patience",
        "2",
        "--eval-tokens",
        "20",
    ]
    assert main(arguments(places, "lm", "text.txt", out, *more)) == 0
    printed = capsys.readouterr().out
    assert "2 of 40 steps, ended early" in printed and "weights of step 0" in printed and "of all" in printed
    after = tensors(out)
    assert all(torch.equal(value, after[name]) for name, value in tensors(places / "model").items())


# ---- classify


def test_classify_from_data_to_answers(places, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    before = listing(places / "model")
    options = ["--steps", "80", "--lr", "1e-2", "--class-weights", "balanced", "--held-out", "0.2"]
    assert main(arguments(places, "classify", "words.tsv", out, *options)) == 0
    printed = capsys.readouterr()
    assert "balanced accuracy 100.0%" in printed.out and "truth \\ answer" in printed.out
    assert sorted(listing(out)) == [
        *("classes.json", "config.json", "finetune.json", "head.safetensors", "loss.csv", "model.safetensors"),
        "tokenizer.json",
    ]
    assert listing(places / "model") == before
    assert main(["classify", "--model", str(out), "ccca", "caab"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["ends in a", "other"]
    assert lines[0][1].startswith("ends in a=") and lines[0][2].startswith("other=")
    monkeypatch.setattr(sys, "stdin", io.StringIO("ccca\ncaab\n"))
    assert main(["classify", "--model", str(out), "--json"]) == 0
    values = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [value["label"] for value in values] == ["ends in a", "other"]
    assert sum(values[0]["probabilities"].values()) == pytest.approx(1.0)
    assert main(["classify", "--model", str(out), "--test", str(places / "words.tsv"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["balanced_accuracy"] > 0.9 and scores["texts"] == 80 == sum(map(sum, scores["confusion"]))
    assert main(["classify", "--model", str(out), "--test", str(places / "words.tsv")]) == 0
    assert f"balanced accuracy {scores['balanced_accuracy']:.1%}" in capsys.readouterr().out


def test_texts_that_are_cut_are_counted(places, tmp_path, capsys):
    assert main(arguments(places, "classify", "long.tsv", tmp_path / "out", "--steps", "1")) == 0
    assert "8 texts are longer than the model sees: their first 16 tokens count" in capsys.readouterr().err


def test_every_option_reaches_the_run(places, tmp_path):
    values = {
        "steps": 2,
        "batch_size": 3,
        "lr": 0.5,
        "weight_decay": 0.3,
        "clip": 0.25,
        "dtype": "bfloat16",
        "eval_every": 2,
        "eval_tokens": 7,
        "patience": 3,
        "lora_alpha": 3.0,
        "class_weights": "balanced",
        "held_out": 0.25,
        "seed": 9,
    }
    assert set(values) | {"epochs"} == set(OPTIONS)
    assert set(OPTIONS) | {"freeze_body", "lora"} == set(asdict(FineTuneOptions()))
    flags = [x for name, value in values.items() for x in ("--" + name.replace("_", "-"), str(value))]
    out = tmp_path / "out"
    assert main(arguments(places, "classify", "words.tsv", out, *flags, "--lora", "2")) == 0
    saved = json.loads((out / "finetune.json").read_text())
    assert saved["options"] == values | {"epochs": None, "freeze_body": False, "lora": 2}
    assert (saved["task"], saved["texts"] + saved["held_out"]) == ("classify", 80)


def test_epochs_become_steps(places, tmp_path, capsys):
    assert main(arguments(places, "classify", "words.tsv", tmp_path / "out", "--epochs", "0.5")) == 0
    # 80 words, 8 of them held out, half of 72 in batches of 16
    assert "3 of 3 steps" in capsys.readouterr().out


def test_the_parser_does_not_import_torch():
    code = "import sys; from pykern.cli import make_parser; make_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- refusals

BAD_COMMAND_LINES = {
    "no task": (["finetune", "--model", "{model}", "--data", "{words}", "--out", "{out}"], "--task"),
    "unknown task": (["{classify}", "--task", "sing"], "'sing'"),
    "frozen and lora": (["{classify}", "--freeze-body", "--lora", "2"], "not allowed with argument"),
    "no model": (["classify", "text"], "--model"),
}
BAD_VALUES = {
    "steps and epochs": (["{classify}", "--steps", "1", "--epochs", "1"], "steps and epochs are both given"),
    "steps 0": (["{classify}", "--steps", "0"], "steps is 0"),
    "epochs": (["{classify}", "--epochs", "nan"], "epochs is nan"),
    "lr": (["{classify}", "--lr", "-1"], "lr is -1.0"),
    "patience": (["{classify}", "--patience", "-1"], "patience is -1"),
    "held out": (["{classify}", "--held-out", "1"], "held_out is 1.0"),
    "rank 0": (["{classify}", "--lora", "0"], "lora is 0"),
    "rank too large": (["{classify}", "--lora", "17"], "rank is 17 but transformer.h.0.attn.c_attn has shape [48, 16]"),
    "alpha alone": (["{classify}", "--lora-alpha", "2"], "lora_alpha needs lora"),
    "threads": (["{classify}", "--threads", "0"], "--threads is 0"),
    "class weights of a language model": (
        ["{lm}", "--class-weights", "balanced"],
        "class_weights are for a classifier",
    ),
    "no such model": (
        ["finetune", "--model", "{out}", "--data", "{words}", "--out", "{out}", "--task", "lm"],
        "no such checkpoint folder",
    ),
    "taken folder": (
        ["finetune", "--model", "{model}", "--data", "{words}", "--out", "{model}", "--task", "classify"],
        "already holds a checkpoint",
    ),
    "out is a file": (
        ["finetune", "--model", "{model}", "--data", "{words}", "--out", "{words}", "--task", "classify"],
        "not a folder",
    ),
    "text as labelled": (
        ["finetune", "--model", "{model}", "--data", "{text}", "--out", "{out}", "--task", "classify"],
        "ends in .jsonl or .tsv",
    ),
    "a line without a label": (
        ["finetune", "--model", "{model}", "--data", "{broken}", "--out", "{out}", "--task", "classify"],
        "line 2: 0 tabs",
    ),
    "one text of a class": (
        ["finetune", "--model", "{model}", "--data", "{single}", "--out", "{out}", "--task", "classify"],
        "class 'a' has 1 different texts",
    ),
    "too little text": (
        ["finetune", "--model", "{model}", "--data", "{single}", "--out", "{out}", "--task", "lm"],
        "evaluation needs at least 2",
    ),
    "not a classifier": (["classify", "--model", "{model}", "x"], "not a classifier"),
    "empty text": (["classify", "--model", "{classifier}", "x", ""], "text 2: the text is empty"),
    "text and file": (["classify", "--model", "{classifier}", "x", "--test", "{words}"], "leave TEXT out"),
    "batch": (["classify", "--model", "{classifier}", "x", "--batch-size", "0"], "--batch-size is 0"),
    "labels of another": (
        ["classify", "--model", "{classifier}", "--test", "{single}"],
        "label 'a' but the classes are ends in a, other",
    ),
    "missing test file": (["classify", "--model", "{classifier}", "--test", "{out}.tsv"], "no such file"),
}


def filled(case, places, tmp_path):
    names = {name: places / name for name in ("model", "classifier")}
    names |= {name: places / f"{name}.tsv" for name in ("words", "single", "broken")}
    names |= {"out": tmp_path / "out", "text": places / "text.txt"}
    starts = {
        "{classify}": arguments(places, "classify", "words.tsv", tmp_path / "out"),
        "{lm}": arguments(places, "lm", "text.txt", tmp_path / "out"),
    }
    first, *rest = case
    return [*starts.get(first, [first]), *(part.format(**names) for part in rest)]


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_bad_command_line(case, places, tmp_path, capsys):
    line, message = BAD_COMMAND_LINES[case]
    with pytest.raises(SystemExit) as end:
        main(filled(line, places, tmp_path))
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and message in printed.err
    assert len(printed.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(case, places, tmp_path, capsys):
    line, message = BAD_VALUES[case]
    before = listing(places / "model")
    assert main(filled(line, places, tmp_path)) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert printed.err.startswith(f"pykern {filled(line, places, tmp_path)[0]}: ")
    assert len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [] and listing(places / "model") == before


def test_no_stdin_no_answer(places, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["classify", "--model", str(places / "classifier")]) == 1
    assert capsys.readouterr().err == "pykern classify: there is no text to classify\n"
