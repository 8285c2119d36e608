"""Files, corpus and batches of pykern.lm."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from pykern.lm import corpus
from pykern.lm.batches import Batches, load_tokens, save_tokens, validation_batches
from pykern.lm.files import json_bytes, read_json, replace_file

# ---- files ----


def test_replace_file_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


BAD_JSON = {
    "truncated": b'{"a": 1',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "not an object": b"[1]",
    "repeated key": b'{"a": 1, "a": 2}',
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "integer of a million digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "empty": b"",
}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_read_json_refuses_and_names_the_file(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json: "):
        read_json(path, 1 << 22)


def test_read_json_checks_kind_and_size_before_reading(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": 1}')
    with pytest.raises(ValueError, match="8 bytes, but at most 7"):
        read_json(tmp_path / "x.json", 7)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe", 100)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json", 100)


@pytest.mark.parametrize("value", [{"a": math.nan}, {"a": (1, 2)}, {1: 2}, {"a": {1, 2}}], ids=str)
def test_json_bytes_refuses_what_would_not_come_back(value):
    with pytest.raises(ValueError):
        json_bytes(value)


# ---- corpus ----


def test_corpus_stdlib_is_split_by_file_and_repeatable():
    text = corpus.load("stdlib")
    assert text == corpus.load("stdlib")
    assert 0.04 < text.val_bytes / (text.train_bytes + text.val_bytes) <= 0.05
    assert text.train_bytes > 4_000_000 and len(text.val_texts) > 5
    assert len(text.sha256) == 64 and "standard library of Python" in text.description
    assert any('"""Text wrapping and filling.' in part for part in (*text.train_texts, *text.val_texts))
    assert not any("class TestCase_" in part for part in text.train_texts)


def test_corpus_stdlib_does_not_depend_on_hash_seed_or_folder_order(monkeypatch):
    code = "from pykern.lm import corpus; c = corpus.load('stdlib'); print(c.sha256, c.val_bytes)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = corpus.load("stdlib")
    walk = os.walk

    def reversed_walk(root):
        for folder, folders, files in walk(root):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(corpus.os, "walk", reversed_walk)
    assert corpus.load("stdlib") == here
    assert seen == {f"{here.sha256} {here.val_bytes}\n"}


def test_corpus_stdlib_missing_sources(monkeypatch, tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"x")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no library source files"):
        corpus.load("stdlib")


def test_corpus_file_is_split_by_position(tmp_path):
    path = tmp_path / "poem.txt"
    content = "Größe\r\n" * 100
    path.write_bytes(content.encode())
    text = corpus.load(path)
    assert text.train_texts[0] + text.val_texts[0] == content  # line endings untouched
    assert len(text.val_texts[0]) == 35
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert text.train_bytes + text.val_bytes == 900


def test_corpus_folder_is_split_by_file(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"file {index:02} " * (1 + index % 3))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_bytes(b"\xff\xfe")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.txt").write_text("deep")
    text = corpus.load(tmp_path)
    assert len(text.train_texts) + len(text.val_texts) == 41 and text.val_texts
    assert not set(text.train_texts) & set(text.val_texts)
    assert "deep" in text.train_texts + text.val_texts and "hidden" not in text.train_texts + text.val_texts
    (tmp_path / "0.txt").write_text("changed")
    assert corpus.load(tmp_path).sha256 != text.sha256


def test_corpus_folder_split_follows_names_not_places(tmp_path):
    for root in (tmp_path / "a", tmp_path / "b"):
        root.mkdir()
        for index in range(60):
            (root / f"{index}.txt").write_text(f"text {index:02}")
    first, second = corpus.load(tmp_path / "a"), corpus.load(tmp_path / "b")
    assert (first.val_texts, first.sha256) == (second.val_texts, second.sha256) and len(first.val_texts) == 3


def test_corpus_never_holds_out_everything(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    one = corpus.load(tmp_path)
    assert len(one.train_texts[0]) == 950 and len(one.val_texts[0]) == 50
    (tmp_path / "b.txt").write_text("b" * 10)
    two = corpus.load(tmp_path)
    assert two.val_texts == ("b" * 10,) and two.train_texts == ("a" * 1000,)


def test_corpus_refusals(tmp_path):
    refused = {
        "empty.txt": (b"", "is empty"),
        "short.txt": (b"x", "too short"),
        "latin.txt": (b"abc\xe9def", r"latin.txt is not UTF-8 text \(byte 3\)"),
        "utf16.txt": ("text".encode("utf-16"), "not UTF-8"),
    }
    for name, (data, words) in refused.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"^corpus: .*{words}"):
            corpus.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        corpus.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"corpus: .*none.txt: no such file"):
        corpus.load(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="bytes"):
        corpus.load(tmp_path / "latin.txt", max_bytes=3)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="has no text"):
        corpus.load(tmp_path / "void")
    os.mkfifo(tmp_path / "void" / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        corpus.load(tmp_path / "void" / "pipe")
    with pytest.raises(ValueError, match="has no text"):
        corpus.load(tmp_path / "void")


def test_corpus_folder_size_limit_counts_all_files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("x" * 10)
    assert corpus.load(tmp_path, max_bytes=30).train_bytes == 20
    with pytest.raises(ValueError, match="more than 29 bytes"):
        corpus.load(tmp_path, max_bytes=29)


# ---- batches ----

TOKENS = np.arange(1000, dtype=np.uint16)


def test_batches_are_blocks_of_the_text_one_token_apart():
    x, y = Batches(TOKENS, 16, 4, seed=1).at(0)
    assert x.shape == y.shape == (4, 16) and str(x.dtype) == str(y.dtype) == "torch.int64"
    assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
    assert x.is_contiguous() and y.is_contiguous()


def test_batches_depend_on_seed_and_step_only():
    straight = Batches(TOKENS, 16, 5, seed=7)
    expected = [straight.at(step) for step in range(40)]  # 61 blocks an epoch: batches straddle epochs
    resumed = Batches(TOKENS, 16, 5, seed=7)
    for step in (39, 3, 12, 13, 0):
        for got, wanted in zip(resumed.at(step), expected[step], strict=True):
            assert (got == wanted).all()
    other = Batches(TOKENS, 16, 5, seed=8).at(0)[0]
    assert (other != expected[0][0]).any() and (expected[1][0] != expected[0][0]).any()


def test_batches_of_a_step_never_change():
    """A resumed run must see what the interrupted one would have seen, also after numpy was upgraded."""
    assert Batches(TOKENS, 100, 4, seed=3).at(5)[0][:, 0].tolist() == [820, 220, 520, 320]


@pytest.mark.parametrize("length, block", [(1000, 16), (17, 16), (32, 16), (33, 16), (34, 16), (5, 1), (2, 1)])
def test_batches_visit_every_block_once_per_epoch(length, block):
    batches = Batches(np.arange(length, dtype=np.uint16), block, 1, seed=5)
    n = batches.blocks_per_epoch
    offsets = set()
    for epoch in range(12):
        starts = [int(batches.at(epoch * n + index)[0][0, 0]) for index in range(n)]
        assert sorted(starts) == list(range(min(starts), min(starts) + n * block, block))
        assert min(starts) < 2 * block and max(starts) + block < length
        offsets.add(min(starts))
    assert n >= max(1, (length - 1) // block - 1)
    if length == 1000:
        assert len(offsets) > 4


def test_batches_reach_first_and_last_token():
    batches = Batches(np.arange(40, dtype=np.uint16), 7, 1, seed=0)
    seen = set()
    for step in range(40 * batches.blocks_per_epoch):
        x, y = batches.at(step)
        seen |= set(x.flatten().tolist()) | set(y.flatten().tolist())
    assert seen == set(range(40))


def test_batches_refusals():
    with pytest.raises(ValueError, match="16 tokens of text, but block_size 16 needs at least 17"):
        Batches(TOKENS[:16], 16, 4)
    for changed, words in (
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Batches(TOKENS, **{"block_size": 16, "batch_size": 4, "seed": 0, **changed})
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        Batches(TOKENS, 16, 4.0)
    with pytest.raises(TypeError, match="numpy array"):
        Batches([1, 2, 3], 1, 1)
    with pytest.raises(TypeError, match="dtype"):
        Batches(TOKENS.astype(np.float32), 16, 4)
    with pytest.raises(ValueError, match="shape"):
        Batches(TOKENS.reshape(10, 100), 16, 4)
    with pytest.raises(ValueError, match="step must be at least 0"):
        Batches(TOKENS, 16, 4).at(-1)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 33, 34, 100, 129])
def test_validation_batches_predict_each_token_once(length):
    seen, shapes = [], []
    for x, y in validation_batches(TOKENS[:length], 16, 3):
        assert (y == x + 1).all()
        seen += y.flatten().tolist()
        shapes.append(tuple(x.shape))
    assert seen == list(range(1, length))
    assert all(rows <= 3 and columns <= 16 for rows, columns in shapes)
    assert all(shape == (3, 16) for shape in shapes[:-2])


def test_validation_batches_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        validation_batches(TOKENS[:1], 16, 3)
    with pytest.raises(ValueError, match="block_size"):
        validation_batches(TOKENS, 0, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_token_file_is_mapped_and_gives_the_same_batches(tmp_path, dtype):
    tokens = TOKENS.astype(dtype)
    save_tokens(tmp_path / "tokens.npy", tokens)
    mapped = load_tokens(tmp_path / "tokens.npy")
    assert isinstance(mapped, np.memmap) and mapped.dtype == dtype and not mapped.flags.writeable
    for got, wanted in zip(Batches(mapped, 16, 4, 1).at(9), Batches(tokens, 16, 4, 1).at(9), strict=True):
        assert (got == wanted).all()


def test_token_file_refusals(tmp_path):
    path = tmp_path / "tokens.npy"
    save_tokens(path, TOKENS)
    whole = path.read_bytes()
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for data in (whole[:-1], whole[:50], b"", b"not an array", objects.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"tokens\.npy: not a token file"):
            load_tokens(path)
    np.save(path, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="dtype"):
        load_tokens(path)
    with pytest.raises(FileNotFoundError):
        load_tokens(tmp_path / "none.npy")


def test_importing_the_data_side_loads_nothing_heavy():
    names = ("config", "files", "corpus", "tokenizer", "batches", "ngram", "checkpoint")
    code = "import sys, importlib\n" + "".join(f"importlib.import_module('pykern.lm.{name}')\n" for name in names)
    code += "print([m for m in ('torch', 'tokenizers', 'safetensors', 'matplotlib', 'rich') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert run.stdout.strip() == "[]"
