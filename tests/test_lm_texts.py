"""Training on short texts, padded or packed: exact resume, one loss whatever the batches, each held-out text alone."""

import json
import math

import numpy as np
import pytest
import torch
from lm_models import POSITIONS, make
from lm_training import OPTIONS, assert_same, changed, losses, make_data, make_trainer, weights

from pykern.cli import main
from pykern.lm import Data, Tokenizer, Trainer, train
from pykern.lm.batches import save_tokens
from pykern.lm.corpus import SPLITS, Corpus, parts
from pykern.lm.documents import DocumentBatch, Documents, PackedBatches, bounds_path
from pykern.lm.evaluation import evaluate_texts
from pykern.lm.objective import Texts
from pykern.lm.plot import LossLog, column, read_rows
from pykern.lm.ranks import Ranks

pytestmark = pytest.mark.one_isa
KINDS = ("padded", "packed")
TEXT = "".join("-" * (i * i % 13) + f" {i % 5}\n" for i in range(300))  # lines of 3 to 15 tokens


def data_of(text=TEXT, split="lines"):
    return make_data(text, split=split)


def trainer_of(out, kind, *, data=None, dropout=0.0, **changes):
    options = changed(**{"batches": kind} | changes)
    return make_trainer(out, options, data_of() if data is None else data, dropout=dropout, positions="rope")


def tokens_of(out):
    return column(read_rows(out / "loss.csv"), "tokens")[1]


# ---- what a text is


def test_parts_keep_what_separates_them():
    text = "a\nb c\n\n  d\r\n \n\n\n\te"
    assert parts([text], "files") == [text]
    assert parts([text, "f\n"], "lines") == ["a\n", "b c\n", "  d\r\n", "\te", "f\n"]
    assert parts([text, "f\n"], "paragraphs") == ["a\nb c\n\n", "  d\r\n \n\n\n", "\te", "f\n"]
    assert "".join(parts([text], "paragraphs")) == text
    assert parts(["\n \n x\n"], "paragraphs") == [" x\n"] and parts([" \n\n"], "lines") == []
    with pytest.raises(ValueError, match="split is 'words' but must be one of files, lines, paragraphs"):
        parts([text], "words")


@pytest.mark.parametrize("kind", ["byte", "character", "word", "bpe"])
def test_texts_encoded_together_are_those_encoded_alone(kind):
    texts = ["one two\n", "", "é", "two two three\n", "a" * 9000 + " b\n"]
    tokenizer = Tokenizer.train(kind, texts, 300 if kind == "bpe" else None)
    tokens, lengths = tokenizer.encode_each(texts)
    alone = [tokenizer.encode_texts([text]) for text in texts]
    assert np.array_equal(tokens, np.concatenate(alone)) and lengths.tolist() == [len(ids) for ids in alone]
    assert tokens.dtype == tokenizer.dtype and lengths.dtype == np.int64
    tokens, lengths = tokenizer.encode_each([])
    assert len(tokens) == len(lengths) == 0 and tokens.dtype == tokenizer.dtype


@pytest.mark.parametrize("split", SPLITS)
def test_data_has_the_texts_of_its_split(split):
    corpus = Corpus(("a b\n\nc\n", "d\n"), ("e\nf\n",), "0" * 64, "letters")
    data = Data.encode(corpus, Tokenizer.train("byte"), split=split)
    for texts, tokens, files in (
        (data.train_texts, data.train, corpus.train_texts),
        (data.val_texts, data.val, corpus.val_texts),
    ):
        assert [data.tokenizer.decode(texts[i]) for i in range(len(texts))] == parts(files, split)
        assert texts.tokens is tokens
    assert data.split == split


def test_the_first_targets():
    texts = Documents(np.arange(20, dtype=np.uint16), np.array([0, 1, 7, 7, 10, 20]))  # targets, cut to 4: 0 4 0 2 4
    for targets, lengths in ((1, [1, 2]), (4, [1, 6]), (5, [1, 6, 0, 2]), (6, [1, 6, 0, 3]), (7, [1, 6, 0, 3, 2])):
        assert texts.first(targets, 4).lengths.tolist() == lengths
    for targets in (10, 99):
        assert texts.first(targets, 4).lengths.tolist() == texts.lengths.tolist()


# ---- training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [{}, {"dtype": "bfloat16", "autocast": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("stop", [0, 5])
def test_resume_is_exact(stop, way, kind, tmp_path):
    """Losses, tokens and final weights, dropout included, are those of a run that went through."""
    whole = trainer_of(tmp_path / "whole", kind, dropout=0.1, **way)
    whole.run()
    torch.manual_seed(99)
    first = trainer_of(tmp_path / "parts", kind, dropout=0.1, **way)
    first.out.mkdir()
    log = LossLog(first.out / "loss.csv", 0)
    for _ in range(stop):
        log.add(first.train_step())
    log.close()
    first.save()
    second = Trainer.resume(tmp_path / "parts", data_of())
    assert (second.step, second.options.batches, second.tokens) == (stop, kind, first.tokens)
    second.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert tokens_of(tmp_path / "parts") == tokens_of(tmp_path / "whole")
    assert_same(weights(second), weights(whole))
    without = trainer_of(tmp_path / "without", kind, **way)
    assert without.train_step()["loss"] != losses(tmp_path / "whole")[0]  # dropout does something


def test_padded_and_packed_runs_on_the_same_batches_have_one_curve(tmp_path):
    """Every batch holds all texts, one a row or end to end: losses and norms agree to rounding."""
    data = data_of(TEXT[:500])
    rows = {"padded": len(data.train_texts)}
    rows["packed"] = trainer_of(tmp_path / "none", "packed", data=data).batches.rows_per_epoch
    assert rows["packed"] < 0.75 * rows["padded"]
    curves = {}
    for kind in KINDS:
        trainer = trainer_of(tmp_path / kind, kind, data=data, batch_size=rows[kind])
        steps = [trainer.train_step() for _ in range(12)]
        assert {row["tokens"] for row in steps} == {i * int(trainer.batches.lengths.sum()) for i in range(1, 13)}
        curves[kind] = [row[name] for row in steps for name in ("loss", "grad_norm")]
    assert curves["packed"] == pytest.approx(curves["padded"], rel=1e-4)
    assert curves["padded"][-2] < curves["padded"][0] - 1.0


def test_a_step_is_the_mean_over_its_targets(tmp_path):
    trainer = trainer_of(tmp_path, "padded")
    batch = trainer.batches.at(0)
    with torch.no_grad():
        alone = [
            trainer.model(ids[None, :n], targets[None, :n], reduction="sum").item()
            for ids, targets, n in zip(batch.ids, batch.targets, batch.lengths.tolist(), strict=True)
        ]
    row = trainer.train_step()
    assert row["loss"] == pytest.approx(sum(alone) / batch.tokens, rel=1e-6) and row["tokens"] == batch.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_an_epoch_are_its_targets(kind, tmp_path):
    data = data_of(TEXT[:400])
    trainer = trainer_of(tmp_path, kind, data=data, batch_size=1)
    rows = [trainer.train_step() for _ in range(trainer.batches.rows_per_epoch)]
    assert rows[-1]["tokens"] == sum(min(n - 1, 16) for n in data.train_texts.lengths if n >= 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_counts_targets(kind, tmp_path, monkeypatch):
    """And the work that they take is that of texts of their length, not of blocks."""

    class Seen(list):
        status, note, close = list.append, (lambda self, line: None), (lambda self: None)

    trainer = trainer_of(tmp_path, kind, steps=1)
    trainer.report = Seen()
    clock = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr("pykern.lm.trainer.time.perf_counter", lambda: 2.0 * next(clock))
        patch.setattr("pykern.lm.trainer.plot", lambda *args, **kwargs: None)
        trainer.run()
    (status,) = trainer.report
    assert status.tokens_per_second == trainer.batches.at(0).tokens / 2.0
    lengths = trainer.batches.lengths.tolist()
    length = round(sum(n * n for n in lengths) / sum(lengths))
    flops = trainer.model.config.training_flops_per_token(length)
    assert length < 16 and status.gflops == pytest.approx(status.tokens_per_second * flops / 1e9)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_where_texts_end(kind, tmp_path):
    trainer = trainer_of(tmp_path, kind, steps=100, lr=2e-2, batch_size=8)
    result = trainer.run()
    assert result.evaluation.loss < 1.2
    with torch.no_grad():
        logits = trainer.model(torch.tensor([list(b"--- 3")]))[0, -1]
    assert logits.argmax() == ord("\n")


# ---- several ranks, without processes


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_weigh_their_targets(kind):
    """The average over ranks, of losses and of gradients, is that of the whole batch; float64."""
    model = make(positions="rope", vocab_size=256, block_size=16, dtype=torch.float64)

    def objective(rank, size):
        return Texts(data_of(), 16, changed(batches=kind, batch_size=6 // size), Ranks(rank, size))

    def result(*places):
        model.zero_grad(set_to_none=True)
        found = [objective(*place).loss(model, 2) for place in places]
        sum(loss for loss, _ in found).backward()
        tokens = {count for _, count in found}
        return sum(loss.item() for loss, _ in found), tokens, [p.grad.clone() for p in model.parameters()]

    whole, tokens, gradients = result((0, 1))
    for size in (2, 3):
        value, counted, found = result(*((rank, size) for rank in range(size)))
        assert value / size == pytest.approx(whole, rel=1e-12) and counted == tokens
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a / size, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_targets_has_a_gradient_of_zero(kind, positions, monkeypatch):
    model = make(positions=positions, vocab_size=256, block_size=16)
    objective = Texts(data_of(), 16, changed(batches=kind, batch_size=1), Ranks(1, 2))
    full = objective.batches.at(0)
    empty = DocumentBatch(full.ids, full.targets, full.lengths * torch.tensor([1, 0]), full.documents)
    monkeypatch.setattr(objective.batches, "at", lambda step: empty)
    loss, tokens = objective.loss(model, 0)
    loss.backward()
    assert loss.item() == 0.0 and tokens == int(full.lengths[0])
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())  # NaN would be any


# ---- evaluation


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tokens", [None, 1, 40])
def test_evaluation_is_the_sum_over_single_texts(positions, tokens):
    model = make(positions=positions, vocab_size=256, block_size=10).train()
    texts = ["größer\n", "x", "als\n", "a much longer text than the block\n", "é\n"]
    tokenizer = Tokenizer.train("byte")
    documents = Documents.encode(texts * 3, tokenizer)
    result = evaluate_texts(model, documents, tokenizer, batch_size=2, tokens=tokens)
    nats, left = 0.0, 10**9 if tokens is None else tokens
    for text in texts * 3:
        ids = torch.tensor(list(text.encode()))[: min(10, left) + 1]
        if left and len(ids) > 1:
            with torch.no_grad():
                nats += model(ids[None, :-1], ids[None, 1:], reduction="sum").item()
            left -= len(ids) - 1
    assert result.tokens == result.bytes == (3 * (8 + 3 + 10 + 2) if tokens is None else tokens)
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5) and model.training


def test_bits_per_byte_of_texts_divide_by_the_bytes_of_the_targets():
    texts = ["über\n", "ü\n", "üü\n"]
    tokenizer = Tokenizer.train("character", texts)
    model = make(vocab_size=tokenizer.vocab_size)
    result = evaluate_texts(model, Documents.encode(texts, tokenizer), tokenizer)
    assert (result.tokens, result.bytes) == (4 + 1 + 2, 4 + 1 + 3)
    assert result.bits_per_byte == pytest.approx(result.loss * 7 / 8 / math.log(2))


def test_evaluations_of_a_run(tmp_path):
    """Every one is of texts; those on the way of eval_tokens targets; both kinds of batches give the same."""
    found = {}
    for kind in KINDS:
        trainer = trainer_of(tmp_path / kind, kind, eval_tokens=20)
        untrained = trainer.evaluate(trainer.options.eval_tokens)
        assert untrained.tokens == 20 and trainer.evaluate().tokens == int(
            np.maximum(trainer.data.val_texts.lengths - 1, 0).sum()
        )
        found[kind] = (untrained, trainer.evaluate())
        assert trainer.evaluate(interrupted=lambda: True) is None and trainer.model.training
        result = trainer.run()
        last = read_rows(tmp_path / kind / "loss.csv")[-1]
        assert float(last["val_loss"]) == pytest.approx(result.evaluation.loss, rel=1e-6)
        assert result.evaluation == trainer.evaluate()
        assert result.evaluation == evaluate_texts(
            trainer.model, trainer.data.val_texts, trainer.data.tokenizer, batch_size=4
        )
    assert found["padded"] == found["packed"]


def test_evaluation_holds_to_autocast(tmp_path):
    trainer = trainer_of(tmp_path, "packed", dtype="bfloat16", autocast=True)
    plain = evaluate_texts(trainer.model, trainer.data.val_texts, trainer.data.tokenizer, batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate_texts(trainer.model, trainer.data.val_texts, trainer.data.tokenizer, batch_size=4)
    assert trainer.evaluate() == cast != plain and cast.loss == pytest.approx(plain.loss, rel=1e-2)
    first = trainer.train_step()["loss"]
    assert first != trainer_of(tmp_path, "packed").train_step()["loss"] == pytest.approx(first, rel=1e-2)


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
