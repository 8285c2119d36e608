"""pykern tokenize: every kind trained, used and compared; refusals in one line."""

import io
import os
import subprocess
import sys

import pytest

from pykern.cli import main
from pykern.lm.tokenizer import KINDS, Tokenizer

pytestmark = pytest.mark.one_isa

TEXT = "def f(x):\n    return x + 1  # the größe of x\nprint(f(2), f(3))\n" * 8
SIZES = {"byte": [], "character": [], "word": [], "wordpiece": ["150"], "bpe": ["300"], "unigram": ["320"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("tokenize")
    (tmp / "text.txt").write_text(TEXT)
    (tmp / "binary.txt").write_bytes(b"abc\xff\xfe" * 100)
    (tmp / "empty.txt").write_text("")
    for kind, size in SIZES.items():
        size = ["--vocab-size", *size] if size else []
        train = ["tokenize", "train", "--data", str(tmp / "text.txt"), "--kind", kind, *size]
        assert main([*train, "--out", str(tmp / f"{kind}.json")]) == 0
    return tmp


@pytest.mark.parametrize("kind", KINDS)
def test_encode_decode_and_inspect(folder, capsys, kind):
    path = str(folder / f"{kind}.json")
    assert Tokenizer.load(path).kind == kind
    assert main(["tokenize", "encode", "--tokenizer", path, "def f(x):"]) == 0
    ids = capsys.readouterr().out.split()
    assert ids == [str(i) for i in Tokenizer.load(path).encode("def f(x):")]
    assert main(["tokenize", "decode", "--tokenizer", path, *ids]) == 0
    assert capsys.readouterr().out == "def f(x):\n"
    assert main(["tokenize", "inspect", "--tokenizer", path, "def f(x):"]) == 0
    split, counts = capsys.readouterr().out.splitlines()
    assert split.replace("|", "").replace("##", "") == "def f(x):"
    assert counts == f"9 characters, 9 bytes, {len(ids)} tokens of {kind}, 0 unknown"


def test_inspect_shows_unknown_text_in_brackets(folder, capsys):
    assert main(["tokenize", "inspect", "--tokenizer", str(folder / "word.json"), "def zebra(x)"]) == 0
    assert capsys.readouterr().out == "def|[ zebra]|(|x|)\n12 characters, 12 bytes, 5 tokens of word, 1 unknown\n"
    assert main(["tokenize", "inspect", "--tokenizer", str(folder / "byte.json"), "é\n\x1b"]) == 0
    assert capsys.readouterr().out.startswith("<C3>|<A9>|⏎|<U+001B>\n")


def test_inspect_several(folder, capsys):
    paths = [part for kind in KINDS for part in ("--tokenizer", str(folder / f"{kind}.json"))]
    assert main(["tokenize", "inspect", *paths, "def zebra(x)"]) == 0
    counts, _, head, *lines = capsys.readouterr().out.splitlines()
    assert counts == "12 characters, 12 bytes" and head.split()[0] == "tokenizer"
    rows = {line.split()[0]: line.split() for line in lines[:6]}
    assert rows["byte"] == ["byte", "256", "12", "1.00", "0"] and rows["word"][2:] == ["5", "2.40", "1"]
    assert [line.split()[0] for line in lines[7:]] == list(KINDS) and "[ zebra]" in lines[9]


def test_inspect_names_two_of_a_kind_by_path(folder, tmp_path, capsys):
    Tokenizer.train("word", "a b").save(tmp_path / "other.json")
    paths = ["--tokenizer", str(folder / "word.json"), "--tokenizer", str(tmp_path / "other.json")]
    assert main(["tokenize", "inspect", *paths, "def"]) == 0
    assert f"word {tmp_path / 'other.json'}" in capsys.readouterr().out


def test_inspect_trains_each_kind(folder, tmp_path, capsys):
    data = ["--data", str(folder / "text.txt"), "--vocab-size", "300", "--plot", str(tmp_path / "split.png")]
    assert main(["tokenize", "inspect", *data, "def f(x)"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{kind} " in printed for kind in KINDS)
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")


def test_time(folder, tmp_path, capsys):
    data = ["--data", str(folder / "text.txt"), "--kind", "word"]
    assert main(["tokenize", "train", *data, "--out", str(tmp_path / "t.json"), "--time"]) == 0
    _, counts, training, encoding = capsys.readouterr().out.splitlines()
    tokens = len(Tokenizer.load(tmp_path / "t.json").encode(TEXT[: len(TEXT) - len(TEXT) // 20]))
    assert counts == f"{len(TEXT) - len(TEXT) // 20} characters, {tokens} tokens"
    assert training.startswith("training: ") and encoding.endswith("M characters/s")


def stdin(data, monkeypatch):
    """stdin with these bytes, under a locale that is not UTF-8."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_stdin(folder, monkeypatch, capsys):
    path = str(folder / "byte.json")
    stdin("größe\n".encode(), monkeypatch)
    assert main(["tokenize", "encode", "--tokenizer", path]) == 0
    assert capsys.readouterr().out == " ".join(map(str, "größe\n".encode())) + "\n"
    stdin(b"", monkeypatch)
    assert main(["tokenize", "encode", "--tokenizer", path]) == 0
    assert capsys.readouterr().out == "\n"
    stdin(b"", monkeypatch)
    assert main(["tokenize", "inspect", "--tokenizer", path]) == 0
    assert "0 characters, 0 bytes, 0 tokens of byte" in capsys.readouterr().out
    line = b"x" * (1 << 20)
    stdin(line, monkeypatch)
    assert main(["tokenize", "encode", "--tokenizer", path]) == 0
    assert len(capsys.readouterr().out) == 4 * len(line)  # "120" and a space or line end


@pytest.mark.parametrize("action", ["encode", "inspect"])
def test_stdin_that_is_no_text(folder, monkeypatch, capsys, action):
    stdin(b"ab\xffc", monkeypatch)
    assert main(["tokenize", action, "--tokenizer", str(folder / "bpe.json")]) == 1
    assert capsys.readouterr() == ("", "pykern tokenize: stdin is not UTF-8 text (byte 2)\n")


def test_argument_that_is_no_text(folder):
    code = "import sys; from pykern.cli import main; sys.exit(main(sys.argv[1:]))"
    path = os.fsencode(folder / "bpe.json")
    run = subprocess.run(
        [sys.executable, "-c", code, b"tokenize", b"encode", b"--tokenizer", path, b"a\xff"], capture_output=True
    )
    assert (run.returncode, run.stdout) == (1, b"") and b"lone surrogate at character 1\n" in run.stderr


REFUSED = {
    "binary data": (["train", "--data", "{}/binary.txt", "--out", "{}/x"], "not UTF-8 text (byte 3)"),
    "empty data": (["train", "--data", "{}/empty.txt", "--out", "{}/x"], "is empty"),
    "no size": (["train", "--data", "{}/text.txt", "--kind", "unigram", "--out", "{}/x"], "unigram needs a vocab_size"),
    "small": (
        ["train", "--data", "{}/text.txt", "--kind", "unigram", "--vocab-size", "259", "--out", "{}/x"],
        "at least 260, got 259",
    ),
    "kind": (["train", "--data", "{}/text.txt", "--kind", "runes", "--out", "{}/x"], "kind must be one of byte"),
    "both": (["inspect", "--tokenizer", "{}/bpe.json", "--data", "{}/text.txt", "a"], "either --tokenizer or --data"),
    "neither": (["inspect", "a"], "either --tokenizer or --data"),
    "size without data": (["inspect", "--tokenizer", "{}/bpe.json", "--vocab-size", "300", "a"], "needs --data"),
    "picture": (["inspect", "--tokenizer", "{}/bpe.json", "--plot", "{}/no/a.png", "a"], "there is no folder"),
    "inspect binary": (["inspect", "--data", "{}/binary.txt", "a"], "not UTF-8 text"),
    "ids": (["decode", "--tokenizer", "{}/word.json", "1", "x"], "invalid literal for an id: 'x'"),
    "huge id": (["decode", "--tokenizer", "{}/word.json", "9" * 30], "but there are"),
    "negative id": (["decode", "--tokenizer", "{}/word.json", "--", "-1"], "id -1 at position 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line(folder, capsys, name):
    arguments, words = REFUSED[name]
    before = sorted(os.listdir(folder))
    assert main(["tokenize", *(part.replace("{}", str(folder)) for part in arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pykern tokenize: ") and words in err and err.count("\n") == 1
    assert sorted(os.listdir(folder)) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["word", "wordpiece", "unigram"])
def test_train_takes_the_kind(folder, tmp_path, capsys, kind):
    shape = [
        "--n-layer",
        "1",
        "--n-head",
        "2",
        "--n-embd",
        "16",
        "--block-size",
        "8",
        "--batch-size",
        "2",
        "--steps",
        "2",
    ]
    size = ["--tokenizer", kind, "--vocab-size", "300"]
    out = tmp_path / "out"
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(out), *shape, *size]) == 0
    assert Tokenizer.load(out).kind == kind
    capsys.readouterr()
    assert main(["generate", "--model", str(out), "--prompt", "def f", "--max-new-tokens", "3", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("def f")
