"""Runs on short texts from outside: going on, token files, the command line and what it refuses."""

import json

import numpy as np
import pytest
from lm_texts import KINDS, TEXT, data_of, tokens_of, trainer_of
from lm_training import OPTIONS, changed, losses, make_data, make_trainer

from pykern.cli import main
from pykern.lm import Data, Tokenizer, Trainer, train
from pykern.lm.batches import save_tokens
from pykern.lm.corpus import Corpus
from pykern.lm.documents import Documents, PackedBatches, bounds_path
from pykern.lm.objective import Texts
from pykern.lm.ranks import Ranks

pytestmark = pytest.mark.one_isa


# ---- going on


def test_a_checkpoint_from_before_there_were_texts(tmp_path):
    """It names neither batches nor split, and no tokens: blocks, counted as ever."""
    make_trainer(tmp_path / "whole").run()
    make_trainer(tmp_path / "old", changed(steps=5)).run()
    path = tmp_path / "old" / "training.json"
    state = json.loads(path.read_text())
    assert state["options"].pop("batches") == "blocks" and state["corpus"].pop("split") is None
    assert state.pop("tokens") == 5 * 4 * 16
    state["options"]["steps"] = 12
    path.write_text(json.dumps(state))
    Trainer.resume(tmp_path / "old", make_data()).run()
    assert tokens_of(tmp_path / "old") == tokens_of(tmp_path / "whole") == [i * 64 for i in range(1, 13)]


def test_padding_may_become_packing(tmp_path):
    first = trainer_of(tmp_path, "padded")
    first.run()
    second = Trainer.resume(tmp_path, data_of(), changed(batches="packed", steps=13))
    row = second.train_step()
    assert isinstance(second.batches, PackedBatches)
    assert row["tokens"] == first.tokens + second.batches.at(12).tokens


def test_what_a_run_cannot_go_on_with(tmp_path):
    make_trainer(tmp_path / "blocks", changed(steps=1)).run()
    trainer_of(tmp_path / "texts", "packed", steps=1).run()
    for folder, data, options, words in (
        ("blocks", make_data(), changed(batches="packed"), "trained on blocks, so it cannot go on with packed batches"),
        ("texts", data_of(), OPTIONS, "trained on texts, so it cannot go on with blocks"),
        ("texts", data_of(split="paragraphs"), None, "a text split by lines, the data by paragraphs"),
        ("texts", make_data(TEXT), None, "a text split by lines, the data by None"),
        ("blocks", data_of(make_data.__defaults__[0]), None, "a text split by None, the data by lines"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer.resume(tmp_path / folder, data, options)
    for key, value in (("tokens", -1), ("tokens", None), ("tokens", True), ("corpus", {"split": "words"})):
        path = tmp_path / "texts" / "training.json"
        before = path.read_text()
        state = json.loads(before)
        state[key] = state[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match="makes no sense"):
            Trainer.resume(tmp_path / "texts", data_of())
        path.write_text(before)


# ---- token files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """text/ with 40 files of a line each, lines.txt, and text.npy which prepare wrote."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text").mkdir()
    for i, line in enumerate(TEXT.splitlines(keepends=True)[:40]):
        (folder / "text" / f"{i}.txt").write_text(line)
    (folder / "lines.txt").write_text(TEXT)
    assert main(["prepare", "--data", str(folder / "text"), "--out", str(folder / "text.npy")]) == 0
    return folder


RUN = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--warmup", "0"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_a_token_file_are_the_files(kind, folder, tmp_path):
    for source in ("text", "text.npy"):
        arguments = ["--data", str(folder / source), "--out", str(tmp_path / source), "--batches", kind, "--steps", "4"]
        assert main(["train", *arguments, *RUN]) == 0
    assert losses(tmp_path / "text") == losses(tmp_path / "text.npy")
    state = json.loads((tmp_path / "text.npy" / "training.json").read_text())
    assert (state["options"]["batches"], state["corpus"]["split"]) == (kind, "files")
    resume = ["train", "--resume", "--steps", "6", "--out"]
    assert main([*resume, str(tmp_path / "text.npy")]) == 0
    assert main([*resume, str(tmp_path / "text"), "--data", str(folder / "text.npy")]) == 0
    assert losses(tmp_path / "text") == losses(tmp_path / "text.npy") and len(losses(tmp_path / "text")) == 6


def test_a_bare_token_file_holds_whole_texts_out(tmp_path):
    path = tmp_path / "t.npy"
    Documents(np.arange(100, dtype=np.uint16), np.array([0, 90, 94, 97, 97, 100, 100])).save(path)
    data = Data.load(path, split="files")
    assert (len(data.train), len(data.val)) == (97, 3)  # 6 tokens are more than 5 %
    assert data.train_texts.bounds.tolist() == [0, 90, 94, 97] and data.val_texts.bounds.tolist() == [0, 0, 3, 3]
    assert "last texts" in data.description and data.sha256 != Data.load(path).sha256
    Documents(np.arange(100, dtype=np.uint16), np.array([0, 40, 100])).save(path)
    longer = Data.load(path, split="files")
    assert (len(longer.train), len(longer.val)) == (40, 60)  # the last one does not fit: it alone
    assert longer.sha256 != data.sha256
    for bounds, words in (([0, 100], "too short to split, 100 tokens in 1 texts"), ([0, 7], "bounds go from 0 to 7")):
        np.save(bounds_path(path), np.array(bounds))
        with pytest.raises(ValueError, match=words):
            Data.load(path, split="files")
    save_tokens(path, np.zeros(0, np.uint16))
    np.save(bounds_path(path), np.array([0]))
    with pytest.raises(ValueError, match="too short to split, 0 tokens"):
        Data.load(path, split="files")


def test_held_out_texts_begin_where_a_text_does(folder, tmp_path):
    for name in ("text.npy", "text.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokens = Data.load(tmp_path / "text.npy")
    total = len(tokens.train) + len(tokens.val)
    np.save(bounds_path(tmp_path / "text.npy"), np.array([0, len(tokens.train) + 1, total]))
    with pytest.raises(ValueError, match=f"no text begins at token {len(tokens.train)}, where the held-out texts of"):
        Data.load(tmp_path / "text.npy", split="files")


# ---- the command line


@pytest.mark.parametrize("kind", KINDS)
def test_command_trains_on_lines_and_goes_on(kind, folder, tmp_path, capsys):
    common = ["train", "--data", str(folder / "lines.txt"), "--batches", kind, "--split", "lines", *RUN]
    common += ["--schedule", "constant"]
    assert main([*common, "--steps", "6", "--out", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr()
    data = Data.load(folder / "lines.txt", split="lines")
    assert f"{len(data.train_texts)} texts of" in printed.err and "split by lines" in printed.err
    assert main([*common, "--steps", "3", "--out", str(tmp_path / "parts")]) == 0
    assert main(["train", "--resume", "--steps", "6", "--out", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "parts")) == 6
    assert tokens_of(tmp_path / "whole") == tokens_of(tmp_path / "parts")
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_the_run_says_what_it_leaves_out():
    corpus = Corpus(("0123456789abcdefghij\n" * 4 + "ok\n" * 3 + "x",), ("ab\n",), "0" * 64, "short")
    data = Data.encode(corpus, Tokenizer.train("byte"), split="lines")
    for kind, rows in (("padded", 7), ("packed", 5)):
        assert str(Texts(data, 16, changed(batches=kind), Ranks())) == (
            "8 texts of 94 tokens (4 of them cut to 17 tokens, 16 tokens less; 1 too short) to train on, "
            f"1 texts of 3 tokens held out, split by lines; {rows} rows an epoch"
        )


def test_train_function_splits(folder, tmp_path):
    options = changed(batches="packed", steps=2)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    train(folder / "lines.txt", tmp_path / "a", options=options, split="lines", **shape)
    train(folder / "text", tmp_path / "b", options=options, **shape)
    for out, split in (("a", "lines"), ("b", "files")):
        assert json.loads((tmp_path / out / "training.json").read_text())["corpus"]["split"] == split
    with pytest.raises(ValueError, match="split lines is for texts, but batches is 'blocks'"):
        train(folder / "lines.txt", tmp_path / "c", options=changed(steps=2), split="lines", **shape)


REFUSED = {
    "batches": (["--data", "{lines}", "--batches", "ragged"], 2, "'ragged'"),
    "split": (["--data", "{lines}", "--batches", "packed", "--split", "words"], 2, "'words'"),
    "split of blocks": (
        ["--data", "{lines}", "--split", "lines"],
        1,
        "split lines is for texts, but batches is 'blocks'",
    ),
    "lines of tokens": (
        ["--data", "{tokens}", "--batches", "packed", "--split", "lines"],
        1,
        "holds tokens, whose texts are fixed: it cannot be split into lines",
    ),
    "tokens without bounds": (
        ["--data", "{bare}", "--batches", "padded"],
        1,
        "bare.documents.npy: no such file; without it",
    ),
    "single bytes": (
        ["--data", "{bytes}", "--batches", "padded"],
        1,
        "none of the 19 texts has 2 tokens or more",
    ),
    "held-out bytes": (
        ["--data", "{held}", "--batches", "packed", "--split", "lines"],
        1,
        "none of the 1 held-out texts has 2 tokens or more",
    ),
    "split of a resumed run": (["--resume", "--split", "lines"], 1, "--split is fixed by the checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_write_nothing(case, folder, tmp_path, capsys):
    arguments, code, words = REFUSED[case]
    places = {"lines": folder / "lines.txt", "tokens": folder / "text.npy"}
    places |= {name: tmp_path / f"{name}{end}" for name, end in (("bare", ".npy"), ("bytes", ""), ("held", ".txt"))}
    save_tokens(places["bare"], np.arange(100, dtype=np.uint16))
    places["bytes"].mkdir()
    for i in range(20):
        (places["bytes"] / f"{i}.txt").write_text("x")
    places["held"].write_text("two lines\n" * 3 + "y")
    before = sorted(tmp_path.rglob("*"))
    command = ["train", "--out", str(tmp_path / "out"), *(a.format(**places) for a in arguments)]
    if code == 2:
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
    else:
        assert main(command) == 1
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_and_blocks_need_data_of_their_kind(tmp_path):
    with pytest.raises(ValueError, match="batches is 'packed' but the data are not split into texts"):
        trainer_of(tmp_path / "out", "packed", data=make_data())
    with pytest.raises(ValueError, match="batches is 'blocks' but the data are split by lines"):
        trainer_of(tmp_path / "out", "blocks")
    with pytest.raises(ValueError, match="batches is 'rows' but must be one of blocks, padded, packed"):
        changed(batches="rows")
    assert not (tmp_path / "out").exists()
