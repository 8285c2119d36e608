"""pykern generate: which text and which line about its speed come out, and what is refused."""

import re

import pytest
import torch

from pykern.cli import main
from pykern.lm import Config, Session, Tokenizer, Transformer
from pykern.lm.checkpoint import save_checkpoint

pytestmark = pytest.mark.one_isa
LINE = re.compile(
    r"prompt: (?P<prompt>\d+) tokens, [\d,]+ tok/s; new: (?P<new>\d+) tokens, [\d,]+ tok/s; "
    r"weights read at (?P<read>[\d.e+-]+) GB/s, \d+% of (?P<most>[\d.e+-]+)"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train("byte", [])
    config = Config(n_layer=1, n_head=2, n_embd=64, block_size=32, vocab_size=tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("generate") / "model"
    save_checkpoint(folder, config=config, tensors=Transformer(config).state_dict(), tokenizer=tokenizer)
    return folder


def run(model, *arguments):
    return main(["generate", "--model", str(model), "--prompt", "def ", "--seed", "1", *arguments])


def text(capsys):
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_dtype_reaches_the_session(model, dtype, capsys):
    """The text is that of a session of the dtype, though it may be longer than the block."""
    assert run(model, "--dtype", dtype, "--max-new-tokens", "40", "--temperature", "0") == 0
    session = Transformer.load(model).session(dtype)
    ids = session.generate(torch.tensor([list(b"def ")]), max_new_tokens=40, temperature=0)
    assert text(capsys) == bytes(ids[0].tolist()).decode(errors="replace") + "\n"


def test_options_reach_the_sampling(model, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(Session, "stream", lambda self, ids, **options: seen.update(options) or iter([]))
    options = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.125, "repetition_penalty": 1.5}
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert run(model, *flags, "--max-new-tokens", "3") == 0
    assert seen == options | {"max_new_tokens": 3, "seed": 1}


def test_min_p_of_1_is_greedy(model, capsys):
    assert run(model, "--max-new-tokens", "20", "--min-p", "1") == 0
    certain = text(capsys)
    assert run(model, "--max-new-tokens", "20", "--temperature", "0") == 0
    assert text(capsys) == certain


def test_one_line_on_stderr(model, capsys):
    """Tokens, rates, and the bandwidth of the weights beside the one measured."""
    assert run(model, "--max-new-tokens", "12") == 0
    lines = capsys.readouterr().err.splitlines()
    found = LINE.fullmatch(lines[0])
    assert len(lines) == 1 and found, lines
    assert (found["prompt"], found["new"]) == ("4", "12")
    assert float(found["read"]) > 0 and float(found["most"]) > 0


@pytest.mark.parametrize("new, line", [(0, "prompt: 4 tokens; new: 0 tokens"), (1, r"prompt.*tok/s; new: 1 tokens")])
def test_no_rate_without_a_second_token(model, new, line, capsys):
    assert run(model, "--max-new-tokens", str(new)) == 0
    assert re.fullmatch(line, capsys.readouterr().err.rstrip("\n"))


def test_quiet_measures_nothing(model, capsys, monkeypatch):
    import pykern.lm.roof

    assert run(model, "--max-new-tokens", "8") == 0
    loud = text(capsys)
    monkeypatch.setattr(pykern.lm.roof, "read_bandwidth", None)
    assert run(model, "--max-new-tokens", "8", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.out == loud and printed.err == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dtype", "int3"], "dtype is 'int3' but must be one of float32, bfloat16, int8, int4"),
        (["--min-p", "2"], "min_p is 2.0 but must be from 0 to 1"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0 but must be a positive number"),
        (["--device", "cuda"], "--device cuda: torch sees no NVIDIA GPU here"),
    ],
)
def test_refused(model, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(model, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("pykern generate: ") and words in printed.err
    assert len(printed.err.splitlines()) == 1
