"""Training on short texts, padded or packed: exact resume, one loss whatever the batches, each held-out text alone."""

import math

import numpy as np
import pytest
import torch
from lm_models import POSITIONS, make
from lm_texts import KINDS, TEXT, data_of, tokens_of, trainer_of
from lm_training import assert_same, changed, losses, weights

from pykern.lm import Data, Tokenizer, Trainer
from pykern.lm.corpus import SPLITS, Corpus, parts
from pykern.lm.documents import DocumentBatch, Documents
from pykern.lm.evaluation import evaluate_texts
from pykern.lm.objective import Texts, make_objective
from pykern.lm.plot import LossLog, read_rows
from pykern.lm.ranks import Ranks

pytestmark = pytest.mark.one_isa


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


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["blocks", *KINDS])
def test_a_batch_goes_where_the_model_is(kind, size):
    data = Data.encode(Corpus((TEXT,), (TEXT,), "0" * 64, "letters"), Tokenizer.train("byte"), split=None)
    data = data if kind == "blocks" else data_of()
    objective = make_objective(data, 8, changed(batches=kind, batch_size=2), Ranks(size - 1, size))
    devices = set()

    def network(*ids, **layout):
        devices.update(x.device.type for x in (*ids, *layout.values()) if isinstance(x, torch.Tensor))
        return torch.zeros(())

    objective.loss(network, 0, torch.device("meta"))
    assert devices == {"meta"}


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
