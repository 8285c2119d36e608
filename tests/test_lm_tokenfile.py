"""Texts as token files: they come back as they were, a run on them is the run on the text, and bad ones are refused."""

import json
import os

import numpy as np
import pytest
import torch

from pykern.cli import main
from pykern.lm import Data, Tokenizer, corpus, tokenfile
from pykern.lm.batches import load_tokens, save_tokens
from pykern.lm.documents import Documents, PackedBatches, bounds_path
from pykern.lm.plot import column, read_rows

pytestmark = pytest.mark.one_isa


def documents_of(lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 200, sum(lengths)).astype(np.uint16)
    return Documents(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


# ---- files of texts


def test_documents_come_back_from_their_files(tmp_path):
    tokenizer = Tokenizer.train("byte")
    texts = Documents.encode(["one", "", "two three", "é"], tokenizer)
    texts.save(tmp_path / "t.npy")
    assert sorted(os.listdir(tmp_path)) == ["t.documents.npy", "t.npy"]
    loaded = Documents.load(tmp_path / "t.npy")
    assert len(loaded) == 4 and isinstance(loaded.tokens, np.memmap) and isinstance(loaded.bounds, np.memmap)
    assert [tokenizer.decode(loaded[i]) for i in range(4)] == ["one", "", "two three", "é"]
    assert loaded.lengths.tolist() == [3, 0, 9, 2]
    batch = PackedBatches(loaded, 10, 2).at(0)
    assert torch.equal(batch.ids, PackedBatches(texts, 10, 2).at(0).ids)
    for i in (-1, 4):
        with pytest.raises(IndexError, match=f"text {i}, but there are 4 texts"):
            loaded[i]
    with pytest.raises(TypeError, match="several texts, got one str"):
        Documents.encode("one", tokenizer)
    with pytest.raises(ValueError, match=r"named NAME\.npy, not t\.bin"):
        texts.save(tmp_path / "t.bin")


BAD_BOUNDS = {
    "of other tokens": (np.array([0, 3, 9]), "bounds go from 0 to 9, but the tokens from 0 to 6"),
    "not from 0": (np.array([1, 6]), "bounds go from 1 to 6"),
    "falling": (np.array([0, 5, 2, 6]), "text 1 ends before it begins"),
    "huge": (np.array([0, 2**62, 6]), "text 1 ends before it begins"),
    "int32": (np.array([0, 6], np.int32), "bounds must be int64, got int32"),
    "big-endian": (np.array([0, 6], ">i8"), "bounds must be int64, got >i8"),
    "square": (np.zeros((2, 2), np.int64), r"shape \[texts \+ 1\], got \[2, 2\]"),
    "empty": (np.zeros(0, np.int64), r"shape \[texts \+ 1\], got \[0\]"),
    "objects": (np.array([0, "x"], object), "not the bounds of"),
}


@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_bad_bounds_are_refused_by_name(case, tmp_path):
    bounds, words = BAD_BOUNDS[case]
    save_tokens(tmp_path / "t.npy", np.arange(6, dtype=np.uint16))
    np.save(bounds_path(tmp_path / "t.npy"), bounds, allow_pickle=True)
    with pytest.raises(ValueError, match=words) as refusal:
        Documents.load(tmp_path / "t.npy")
    assert str(tmp_path / "t.documents.npy") in str(refusal.value)


def test_missing_and_truncated_bounds(tmp_path):
    documents_of([3, 4]).save(tmp_path / "t.npy")
    data = bounds_path(tmp_path / "t.npy").read_bytes()
    for cut in (0, 5, len(data) - 8):
        bounds_path(tmp_path / "t.npy").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="not the bounds of"):
            Documents.load(tmp_path / "t.npy")
    bounds_path(tmp_path / "t.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"t\.documents\.npy: no such file"):
        Documents.load(tmp_path / "t.npy")


# ---- training on a token file

TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i % 5}\n\n\n" for i in range(60))
RUN = ["--steps", "4", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(TEXT[i * 20 : i * 20 + 40 + i])
    Tokenizer.train("bpe", [TEXT], 280).save(folder / "tokenizer.json")
    return folder


def losses(out):
    return column(read_rows(out / "loss.csv"), "loss")[1]


@pytest.mark.slow
def test_a_run_on_tokens_is_the_run_on_the_text(folder, tmp_path, capsys):
    text, tokens, tokenizer = str(folder / "text"), str(tmp_path / "t.npy"), str(folder / "tokenizer.json")
    assert main(["prepare", "--data", text, "--tokenizer", tokenizer, "--out", tokens]) == 0
    assert "tokens of bpe" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["t.documents.npy", "t.json", "t.npy"]
    for source, out in ((text, "a"), (tokens, "b")):
        arguments = ["train", "--data", source, "--tokenizer", tokenizer, "--out", str(tmp_path / out), *RUN]
        assert main(arguments) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert main(["train", "--out", str(tmp_path / "b"), "--resume", "--steps", "6"]) == 0
    assert main(["train", "--out", str(tmp_path / "a"), "--resume", "--steps", "6", "--data", tokens]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 6
    loaded = Documents.load(tokens)
    assert len(loaded) == 30
    corpus_texts = corpus.load(text)
    trained = Tokenizer.load(tokenizer)
    assert [trained.decode(loaded[i]) for i in range(30)] == [*corpus_texts.train_texts, *corpus_texts.val_texts]


def test_data_of_a_token_file_is_mapped(folder, tmp_path):
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokenfile.prepare(folder / "text", tokenizer, tmp_path / "t.npy")
    data, text = Data.load(tmp_path / "t.npy", tokenizer), Data.load(folder / "text", tokenizer)
    assert isinstance(data.train.base, np.memmap) or isinstance(data.train.base.base, np.memmap)
    assert np.array_equal(data.train, text.train) and np.array_equal(data.val, text.val)
    assert (data.sha256, data.description) == (text.sha256, text.description)


def test_a_bare_token_file_holds_its_end_out(tmp_path):
    tokens = np.frombuffer(b"abcde" * 40, np.uint8).astype(np.uint16)
    save_tokens(tmp_path / "t.npy", tokens)
    data = Data.load(tmp_path / "t.npy")
    assert (len(data.train), len(data.val)) == (190, 10) and "last 5 %" in data.description
    assert np.array_equal(np.concatenate([data.train, data.val]), load_tokens(tmp_path / "t.npy"))
    save_tokens(tmp_path / "other.npy", tokens[::-1].copy())
    assert Data.load(tmp_path / "other.npy").sha256 != data.sha256


def test_bad_token_files(folder, tmp_path, capsys):
    path, tokenizer = tmp_path / "t.npy", str(folder / "tokenizer.json")

    def refused(words, *extra, data=path):
        before = sorted(os.listdir(tmp_path))
        assert main(["train", "--data", str(data), "--out", str(tmp_path / "out"), *extra, *RUN]) == 1
        printed = capsys.readouterr()
        assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
        assert sorted(os.listdir(tmp_path)) == before

    refused("no such file")
    save_tokens(path, np.array([1, 2, 300] * 20, np.uint16))
    refused("token 300, but the tokenizer has 256 tokens")
    save_tokens(path, np.array([1, -2, 3] * 20, np.int64))
    refused("token -2, but the tokenizer has 256 tokens")
    save_tokens(path, np.array([1, 2], np.uint16))
    refused("too short to split, 2 tokens")
    path.write_bytes(b"\x93NUMPY junk")
    refused("not a token file")
    save_tokens(path, np.array([1, 2, 3] * 20, np.uint16))
    refused("give the tokenizer that made them", "--tokenizer", "bpe", "--vocab-size", "300")
    refused("--vocab-size is fixed by the tokenizer", "--tokenizer", tokenizer, "--vocab-size", "300")
    path.unlink()
    assert main(["prepare", "--data", str(folder / "text"), "--tokenizer", tokenizer, "--out", str(path)]) == 0
    capsys.readouterr()
    refused("was made with another tokenizer than the byte one")
    about = json.loads((tmp_path / "t.json").read_text())
    for change, words in (
        ({"tokens": about["tokens"] + 1}, "but"),
        ({"held_out": -1}, "describes"),
        ({"held_out": True}, "held_out must be int"),
        ({"sha256": None}, "sha256 must be str"),
    ):
        (tmp_path / "t.json").write_text(json.dumps(about | change))
        refused(words, "--tokenizer", tokenizer)
    (tmp_path / "t.json").write_text("[")
    refused("not valid JSON", "--tokenizer", tokenizer)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "{text}", "--out", "{out}.bin"], "a token file is named NAME.npy"),
        (["--data", "{text}", "--out", "{out}.npy", "--tokenizer", "{text}/none"], "no such file"),
        (["--data", "{text}/none", "--out", "{out}.npy"], "no such file"),
    ],
)
def test_prepare_refuses(arguments, words, folder, tmp_path, capsys):
    assert main(["prepare", *(a.format(text=folder / "text", out=tmp_path / "t") for a in arguments)]) == 1
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and os.listdir(tmp_path) == []
