"""The command line: what each command does, and that every refusal is one line, an exit code, and nothing written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pykern
from pykern.cli import main
from pykern.cli.train import OPTIONS, SHAPE
from pykern.lm import Config, Tokenizer, TrainOptions, Transformer
from pykern.lm.plot import column, read_rows

TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i % 5}\n\n\n" for i in range(150))
SMALL = [
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--block-size",
    "16",
    "--batch-size",
    "4",
    "--warmup",
    "2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with text.txt and a small model trained on it for 8 steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    code = main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "model"), "--steps", "8", *SMALL])
    assert code == 0
    return folder


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments):
    """The command in a process of its own, from whatever folder pykern was imported from."""
    root = str(Path(pykern.__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"args": [sys.executable, "-m", "pykern", *map(str, arguments)], "env": os.environ | {"PYTHONPATH": paths}}


# ---- train


def test_train_writes_a_model_and_says_where(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(out), "--steps", "6", *SMALL]) == 0
    printed = capsys.readouterr()
    assert "bits per byte" in printed.out and str(out) in printed.out and "loss.png" in printed.out
    assert "step 6/6 (100.0%)" in printed.err
    assert sorted(listing(out)) == [
        "config.json",
        "loss.csv",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
        "training.safetensors",
    ]
    config = Transformer.load(out).config
    assert (config.n_layer, config.n_embd, config.block_size, config.vocab_size) == (1, 16, 16, 256)


def test_every_option_reaches_the_run(folder, tmp_path):
    shape = {
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 16,
        "n_hidden": 20,
        "block_size": 8,
        "positions": "learned",
        "norm": "layernorm",
        "activation": "relu",
        "dropout": 0.25,
    }
    options = {
        "steps": 2,
        "minutes": 5.0,
        "batch_size": 2,
        "lr": 0.002,
        "final_lr": 0.3,
        "warmup": 1,
        "schedule": "linear",
        "weight_decay": 0.2,
        "beta1": 0.8,
        "beta2": 0.9,
        "clip": 0.5,
        "residual_init": "zero",
        "dtype": "bfloat16",
        "autocast": True,
        "eval_every": 1,
        "eval_tokens": 50,
        "checkpoint_every": 1,
        "seed": 5,
        "recompute": True,
        "batches": "packed",
    }
    assert set(shape) == set(SHAPE) and set(options) == set(OPTIONS) == set(TrainOptions().to_dict())
    flags = []
    for name, value in (shape | options).items():
        flags += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    tokenizer = ["--tokenizer", "bpe", "--vocab-size", "270", "--untied-head", "--qk-norm", "--split", "paragraphs"]
    out = tmp_path / "out"
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(out), *flags, *tokenizer]) == 0
    state = json.loads((out / "training.json").read_text())
    assert state["options"] == options and state["corpus"]["split"] == "paragraphs"
    loaded = Transformer.load(out).config
    assert loaded == Config(vocab_size=Tokenizer.load(out).vocab_size, tied_head=False, qk_norm=True, **shape)
    assert Tokenizer.load(out).kind == "bpe" and loaded.vocab_size <= 270


def test_resume_goes_on(folder, tmp_path, capsys):
    data, whole, parts = str(folder / "text.txt"), tmp_path / "whole", tmp_path / "parts"
    # a constant rate does not depend on where the run is meant to end
    common = ["--schedule", "constant", *SMALL]
    assert main(["train", "--data", data, "--out", str(whole), "--steps", "6", *common]) == 0
    assert main(["train", "--data", data, "--out", str(parts), "--steps", "3", *common]) == 0
    assert main(["train", "--out", str(parts), "--resume", "--steps", "6"]) == 0
    losses = [column(read_rows(out / "loss.csv"), "loss")[1] for out in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    capsys.readouterr()
    for flag, value in (("--n-layer", "2"), ("--tokenizer", "bpe"), ("--vocab-size", "300")):
        assert main(["train", "--out", str(parts), "--resume", flag, value]) == 1
        assert f"{flag} is fixed by the checkpoint" in capsys.readouterr().err


def test_resume_switches_autocast_off_and_on(folder, tmp_path, capsys):
    data, out = str(folder / "text.txt"), tmp_path / "out"
    assert main(["train", "--data", data, "--out", str(out), "--steps", "2", "--dtype", "bfloat16", *SMALL]) == 0
    for steps, flags, autocast in ((3, ["--autocast"], True), (4, [], True), (5, ["--no-autocast"], False)):
        assert main(["train", "--out", str(out), "--resume", "--steps", str(steps), *flags]) == 0
        options = json.loads((out / "training.json").read_text())["options"]
        assert (options["dtype"], options["autocast"], options["steps"]) == ("bfloat16", autocast, steps)
    capsys.readouterr()
    before = listing(out)
    assert main(["train", "--out", str(out), "--resume", "--autocast", "--dtype", "float32"]) == 1
    assert "autocast computes in bfloat16 but dtype is 'float32'" in capsys.readouterr().err
    assert listing(out) == before


def test_ctrl_c_finishes_the_step_and_exits_130(folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["train", "--data", folder / "text.txt", "--out", out, "--steps", "1000000", *SMALL]
    process = subprocess.Popen(**command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while "step 1/" not in (line := process.stderr.readline()):
            assert line and time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == "" and "Traceback" not in stderr
    assert "interrupted after step" in stderr.splitlines()[-1] and str(out) in stderr.splitlines()[-1]
    step = json.loads((out / "training.json").read_text())["step"]
    assert step >= 1 and f"after step {step}:" in stderr
    assert main(["train", "--out", str(out), "--resume", "--steps", str(step + 2)]) == 0
    assert len(read_rows(out / "loss.csv")) == step + 2


# ---- generate and evaluate


def test_generate(folder, capsys):
    model = str(folder / "model")
    arguments = ["generate", "--model", model, "--prompt", "def ", "--max-new-tokens", "20", "--seed", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.out.startswith("def ") and "20 tokens" in first.err
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out
    assert main([*arguments[:-1], "2"]) == 0
    assert capsys.readouterr().out != first.out
    for extra in (["--temperature", "0"], ["--top-k", "3"], ["--top-p", "0.5"], ["--dtype", "bfloat16"]):
        assert main([*arguments, *extra]) == 0
        assert capsys.readouterr().out.startswith("def ")


def test_generated_bytes_join_to_characters(folder, capsys, monkeypatch):
    """A character of two tokens is printed once whole; half a character at the end becomes U+FFFD."""
    import torch

    from pykern.lm import Session

    tokens = [torch.tensor([b]) for b in "é€".encode()[:-1]]
    monkeypatch.setattr(Session, "stream", lambda self, ids, **options: iter(tokens))
    assert main(["generate", "--model", str(folder / "model"), "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "aé\ufffd\n"


def test_generate_reads_the_prompt_from_stdin(folder, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("return"))
    assert main(["generate", "--model", str(folder / "model"), "--prompt", "-", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("return")


def test_reader_that_leaves_is_no_error(folder):
    arguments = ["generate", "--model", folder / "model", "--max-new-tokens", "5000"]
    process = subprocess.Popen(**command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1 and "Traceback" not in stderr and "BrokenPipe" not in stderr


def test_evaluate(folder, capsys):
    arguments = ["evaluate", "--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--baseline"]
    assert main(arguments) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(lines) == set(values) and lines["loss"] == f"{values['loss']:.4f}"
    last = read_rows(folder / "model" / "loss.csv")[-1]
    assert values["loss"] == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / 0.6931471805599453)
    assert 0 < values["ngram_5_bits_per_byte"] < 1  # the text repeats itself


# ---- tokenize


def test_tokenize(folder, tmp_path, capsys):
    path = str(tmp_path / "tokenizer.json")
    train = ["tokenize", "train", "--data", str(folder / "text.txt"), "--vocab-size", "280", "--out", path]
    assert main(train) == 0
    assert "bpe, 2" in capsys.readouterr().out
    assert main(["tokenize", "encode", "--tokenizer", path, "return", "x"]) == 0
    ids = capsys.readouterr().out.split()
    assert ids == [str(i) for i in Tokenizer.load(path).encode("return x")]
    assert main(["tokenize", "decode", "--tokenizer", path, *ids]) == 0
    assert capsys.readouterr().out == "return x\n"
    assert main(["tokenize", "inspect", "--tokenizer", path, "return x"]) == 0
    split, counts = capsys.readouterr().out.splitlines()
    assert split.replace("|", "") == "return x" and f"8 characters, 8 bytes, {len(ids)} tokens of bpe" in counts


def test_tokenize_does_not_import_torch(folder):
    code = (
        "import sys; from pykern.cli import main; "
        f"main(['tokenize', 'encode', '--tokenizer', {str(folder / 'model')!r}, 'x']); sys.exit('torch' in sys.modules)"
    )
    run = command()
    run["args"] = [sys.executable, "-c", code]
    run["env"].pop("LMSTUB", None)
    result = subprocess.run(**run, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "120\n"), result.stderr


# ---- the rest


def test_info(capsys):
    assert main(["info"]) == 0
    assert "threads" in capsys.readouterr().out


def test_check_and_bench_pass_their_arguments_on(monkeypatch):
    import types

    seen = []
    fake = types.ModuleType("pykern.testing.ratios")
    fake.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, "pykern.testing.ratios", fake)
    assert main(["check", "--op", "linear"]) == 3
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kw: seen.append(command[1:]) or types.SimpleNamespace(returncode=4)
    )
    assert main(["bench", "--json", "x.json"]) == 4
    assert seen == [["--op", "linear"], ["-m", "benchmarks", "--json", "x.json"]]


def test_bench_outside_a_checkout(monkeypatch, capsys):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert main(["bench"]) == 1
    assert "not installed with the package" in capsys.readouterr().err


def test_help(capsys):
    for arguments in (["--help"], ["train", "--help"], ["generate", "--help"], ["tokenize", "encode", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "--n-kv-head" in printed and "--top-p" in printed


def test_module_runs_as_a_script():
    result = subprocess.run(**command("--nonsense"), capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("pykern: ")


# ---- refusals: arguments with {model}, {text}, {out} for paths; words of the message

BAD_COMMAND_LINES = {
    "nothing": ([], "COMMAND"),
    "unknown command": (["fly"], "invalid choice: 'fly'"),
    "unknown option": (["train", "--data", "{text}", "--out", "{out}", "--layers", "3"], "--layers"),
    "abbreviated option": (["train", "--data", "{text}", "--out", "{out}", "--step", "3"], "--step"),
    "not a number": (["train", "--data", "{text}", "--out", "{out}", "--steps", "many"], "--steps: invalid int value"),
    "not a choice": (["train", "--data", "{text}", "--out", "{out}", "--norm", "batchnorm"], "'batchnorm'"),
    "autocast with a value": (["train", "--data", "{text}", "--out", "{out}", "--autocast=bfloat16"], "--autocast"),
    "no --out": (["train", "--data", "{text}"], "--out"),
    "no --model": (["generate"], "--model"),
    "unknown tokenize action": (["tokenize", "swallow"], "'swallow'"),
}
BAD_VALUES = {
    "no data": (["train", "--out", "{out}"], "--data is missing"),
    "missing file": (["train", "--data", "{out}.txt", "--out", "{out}"], "no such file"),
    "empty file": (["train", "--data", "{empty}", "--out", "{out}"], "is empty"),
    "binary file": (["train", "--data", "{binary}", "--out", "{out}"], "not UTF-8"),
    "text shorter than the block": (
        ["train", "--data", "{text}", "--out", "{out}", "--block-size", "100000"],
        "needs at least 100001",
    ),
    "no steps": (["train", "--data", "{text}", "--out", "{out}", "--steps", "0"], "steps is 0"),
    "nan": (["train", "--data", "{text}", "--out", "{out}", "--lr", "nan"], "lr is nan"),
    "autocast in float32": (
        ["train", "--data", "{text}", "--out", "{out}", "--autocast"],
        "autocast computes in bfloat16 but dtype is 'float32': choose dtype bfloat16",
    ),
    "width": (
        ["train", "--data", "{text}", "--out", "{out}", "--n-embd", "30"],
        "n_embd 30 is not a multiple of n_head 4",
    ),
    "dropout": (["train", "--data", "{text}", "--out", "{out}", "--dropout", "1"], "dropout must lie in"),
    "tokenizer": (["train", "--data", "{text}", "--out", "{out}", "--tokenizer", "runes"], "kind must be one of"),
    "bpe without a size": (["train", "--data", "{text}", "--out", "{out}", "--tokenizer", "bpe"], "needs a vocab_size"),
    "threads": (["train", "--data", "{text}", "--out", "{out}", "--threads", "0"], "--threads is 0"),
    "taken folder": (["train", "--data", "{text}", "--out", "{model}"], "already holds a checkpoint"),
    "out is a file": (["train", "--data", "{text}", "--out", "{text}"], "not a folder"),
    "nothing to resume": (["train", "--data", "{text}", "--out", "{out}", "--resume"], "no such checkpoint folder"),
    "resumed on another text": (
        ["train", "--data", "{other}", "--out", "{model}", "--resume"],
        "trained on another text",
    ),
    "no such model": (["generate", "--model", "{out}"], "no such checkpoint folder"),
    "broken model": (["generate", "--model", "{broken}"], "model.safetensors"),
    "empty prompt": (["generate", "--model", "{model}", "--prompt", ""], "the prompt is empty"),
    "negative length": (["generate", "--model", "{model}", "--max-new-tokens", "-1"], "max_new_tokens is -1"),
    "temperature": (["generate", "--model", "{model}", "--temperature", "-1"], "temperature is -1.0"),
    "top-p": (["generate", "--model", "{model}", "--top-p", "2"], "top_p is 2.0"),
    "session dtype": (["generate", "--model", "{model}", "--dtype", "int3"], "float32, bfloat16, int8, int4"),
    "evaluation of nothing": (["evaluate", "--model", "{model}", "--data", "{empty}"], "is empty"),
    "evaluation batch": (["evaluate", "--model", "{model}", "--data", "{text}", "--batch-size", "0"], "batch_size"),
    "id out of range": (["tokenize", "decode", "--tokenizer", "{model}", "999"], "id 999"),
    "id that is no number": (["tokenize", "decode", "--tokenizer", "{model}", "x"], "invalid literal"),
    "no such tokenizer": (["tokenize", "encode", "--tokenizer", "{out}", "x"], "no such file"),
}


@pytest.fixture(scope="module")
def places(folder, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "empty.txt").write_text("")
    (tmp / "binary.txt").write_bytes(b"abc\xff\xfe" * 100)
    (tmp / "other.txt").write_text(TEXT[::-1])
    (tmp / "broken").mkdir()
    for file in (folder / "model").iterdir():
        data = file.read_bytes()
        (tmp / "broken" / file.name).write_bytes(data[: len(data) // 2] if file.name == "model.safetensors" else data)
    return {
        "model": folder / "model",
        "text": folder / "text.txt",
        "empty": tmp / "empty.txt",
        "binary": tmp / "binary.txt",
        "other": tmp / "other.txt",
        "broken": tmp / "broken",
    }


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_bad_command_line(case, places, tmp_path, capsys):
    arguments, message = BAD_COMMAND_LINES[case]
    with pytest.raises(SystemExit) as end:
        main([a.format(out=tmp_path / "out", **places) for a in arguments])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and message in printed.err
    assert len(printed.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(case, places, tmp_path, capsys):
    arguments, message = BAD_VALUES[case]
    before = listing(places["model"])
    assert main([a.format(out=tmp_path / "out", **places) for a in arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert printed.err.startswith(f"pykern {arguments[0]}: ") and len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [] and listing(places["model"]) == before
