"""A classifier on a language model: padding, loss, scores, splits, files of strangers, and what fine-tuning learns."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_models import SHAPES, make

from pykern.lm import Config, Tokenizer, Transformer
from pykern.lm.classifier import Classifier, Encoded, evaluate_classifier, probabilities, score_texts
from pykern.lm.finetune import finetune_classifier
from pykern.lm.finetune_options import FineTuneOptions
from pykern.lm.fit import fit, quality
from pykern.lm.labelled import Labelled, LabelledBatches, balanced_weights, read_labelled, split
from pykern.lm.lora import adapters, plain_state
from pykern.lm.options import TrainOptions
from pykern.lm.progress import Silent
from pykern.lm.scores import Scores, confusion
from pykern.lm.trainer import make_model

pytestmark = pytest.mark.one_isa

TOKENIZER = Tokenizer.train("character", ["ab"])


def small(seed=0, **changes):
    fields = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 12, "vocab_size": 3, "positions": "rope"} | changes
    return make_model(Config(**fields), TrainOptions(seed=seed))


def words(n, seed=0, length=(5, 11), share=0.5):
    """Texts of a and b; each letter is a with probability share."""
    generator = random.Random(seed)
    return ["".join("ab"[generator.random() >= share] for _ in range(generator.randrange(*length))) for _ in range(n)]


def by_majority(texts):
    texts = [text if text.count("a") != text.count("b") else text + "a" for text in texts]
    return Labelled.of(texts, ["a" if text.count("a") > text.count("b") else "b" for text in texts])


def by_last(texts):
    return Labelled.of(texts, [text[-1] for text in texts])


# ---- the model


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_nothing(shape):
    """The logits of a text do not depend on what stands behind its last token, nor on its neighbours."""
    model = Classifier(make(**SHAPES[shape]), ("x", "y", "z")).eval()
    encoded = Encoded(tuple(np.arange(n, dtype=np.uint16) % 11 for n in (3, 9, 5)), 0)
    ids, lengths = encoded.batch([0, 1, 2])
    assert lengths.tolist() == [3, 9, 5] and ids.shape == (3, 9) and ids[0, 3:].tolist() == [0] * 6
    logits = model(ids, lengths)
    for row in range(3):
        alone = model(*encoded.batch([row]))
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-5, atol=1e-6)
    ids[0, 3:] = 7
    assert torch.equal(model(ids, lengths)[0], logits[0])
    ids[0, 2] = 7
    assert not torch.equal(model(ids, lengths)[0], logits[0])


def test_logits_are_the_head_on_the_last_state():
    model = Classifier(make(dtype=torch.float64), ("x", "y", "z"))
    ids, lengths = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([3, 4])
    states = model.body.hidden(ids)
    expected = torch.stack([states[0, 2], states[1, 3]]) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(ids, lengths), expected, rtol=1e-12, atol=1e-12)


def test_loss_and_class_weights():
    model = Classifier(make(), ("x", "y", "z"))
    ids, lengths = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(0)), torch.full((6,), 5)
    labels, weights = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 1.0, 2.0])
    logits = model(ids, lengths).double()
    each = F.cross_entropy(logits, labels, reduction="none")
    assert model.loss(ids, lengths, labels).item() == pytest.approx(each.mean().item(), rel=1e-6)
    weighted = sum(weights[labels[i]].item() * each[i].item() for i in range(6)) / 6
    assert model.loss(ids, lengths, labels, weights).item() == pytest.approx(weighted, rel=1e-6)


def test_balanced_weights():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(labels, 3)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert np.bincount(labels, weights[labels]) == pytest.approx([10 / 3] * 3)  # the same share each
    with pytest.raises(ValueError, match="1 of 4 classes have no text"):
        balanced_weights(labels, 4)


def test_probabilities():
    body = small()
    model = Classifier(body, ("x", "y"))
    texts = words(7, 3)
    found = probabilities(model, TOKENIZER, texts, batch_size=3)
    assert found.shape == (7, 2) and found.sum(1) == pytest.approx(np.ones(7))
    for text, row in zip(texts, found, strict=True):
        logits = model(torch.tensor([TOKENIZER.encode(text)]), torch.tensor([len(text)]))[0]
        assert row == pytest.approx(torch.softmax(logits.double(), 0).tolist(), rel=1e-5)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        probabilities(model, TOKENIZER, texts)


def test_long_texts_are_cut_at_their_end():
    encoded = Encoded.of(["ab" * 20, "ab"], TOKENIZER, 12)
    assert [one.tolist() for one in encoded.ids] == [[1, 2] * 6, [1, 2]] and encoded.truncated == 1


MODEL_REFUSALS = {
    "length 0": (lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.tensor([0])), IndexError, "run from 0 to 0"),
    "length 4": (lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.tensor([4])), IndexError, "ids have 3 tokens"),
    "two lengths": (lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.tensor([1, 1])), ValueError, "lengths have"),
    "one class": (lambda m: Classifier(m.body, ("x",)), ValueError, "classes must be 2 to 10000 names"),
    "a class twice": (lambda m: Classifier(m.body, ("x", "x")), ValueError, "a name occurs twice"),
    "a class of lines": (lambda m: Classifier(m.body, ("x", "y\n")), ValueError, "printable characters"),
    "a class that is a number": (lambda m: Classifier(m.body, (1, 2)), ValueError, "label must be a string, got int"),
    "no body": (lambda m: Classifier(m, ("x", "y")), TypeError, "body must be a Transformer, got Classifier"),
    "a str": (lambda m: probabilities(m, TOKENIZER, "ab"), TypeError, "texts must be a sequence of str, got str"),
    "an empty text": (lambda m: probabilities(m, TOKENIZER, ["a", ""]), ValueError, "text 2: the text is empty"),
    "other classes": (lambda m: score_texts(m, TOKENIZER, by_last(["a", "b"])), ValueError, "the data have classes"),
}


@pytest.mark.parametrize("case", MODEL_REFUSALS)
def test_model_refuses(case):
    call, kind, message = MODEL_REFUSALS[case]
    with pytest.raises(kind) as error:
        call(Classifier(small(), ("x", "y")))
    assert message in str(error.value)


# ---- scores


def test_scores_by_hand():
    """Truth 0: 8 texts, 6 right. Truth 1: 2 texts, 1 right. Class 2 never occurs and is answered once."""
    truth = np.array([0] * 8 + [1] * 2)
    answers = np.array([0] * 6 + [1, 2] + [1, 0])
    scores = Scores(confusion(truth, answers, 4), 0.5)
    assert scores.confusion.tolist() == [[6, 1, 1, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert scores.accuracy == pytest.approx(0.7) and scores.texts == 10
    assert scores.recall[:2] == pytest.approx([0.75, 0.5]) and np.isnan(scores.recall[2:]).all()
    assert scores.balanced_accuracy == pytest.approx(0.625)
    # F1: 2*6/(8+7), 2*1/(2+2), 0/(0+1); class 3 has neither texts nor answers
    assert scores.macro_f1 == pytest.approx((12 / 15 + 0.5 + 0.0) / 3)
    table = scores.table(["one", "two", "three", "four"]).splitlines()
    assert table[1].split() == ["one", "6", "1", "1", "0", "75.0%"] and table[3].split()[-1] == "-"
    assert "441 cells" in Scores(np.eye(21, dtype=np.int64), 0.0).table(list("abcdefghijklmnopqrstu"))


def test_balanced_accuracy_is_not_fooled():
    """Always the most frequent of three classes: 98 % right, a third by balanced accuracy."""
    truth = np.array([0] * 98 + [1, 2])
    scores = Scores(confusion(truth, np.zeros(100, np.int64), 3), 0.1)
    assert scores.accuracy == 0.98 and scores.balanced_accuracy == pytest.approx(1 / 3)
    worse_accuracy = Scores(confusion(truth, np.array([0] * 60 + [1] * 38 + [1, 2]), 3), 9.0)
    assert quality(worse_accuracy) > quality(scores)


def test_confusion_refuses():
    with pytest.raises(IndexError, match="answers runs from 0 to 2 but classes is 2"):
        confusion(np.array([0, 1]), np.array([0, 2]), 2)
    with pytest.raises(IndexError, match="truth runs from -1 to 1"):
        confusion(np.array([-1, 1]), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match=r"truth has shape \[2\], answers \[1\]"):
        confusion(np.array([0, 1]), np.array([0]), 2)


# ---- split and batches


def test_split_is_stratified_and_keeps_equal_texts_together():
    texts = [f"text {i}" for i in range(100)] + [f"rare {i}" for i in range(10)] + ["text 3"] * 5
    labels = ["often"] * 100 + ["rare"] * 10 + ["often"] * 5
    data = Labelled.of(texts, labels)
    seen = set()
    for seed in range(4):
        train, val = split(data, 0.2, seed)
        assert len(train) + len(val) == len(data) and not set(train.texts) & set(val.texts)
        different = [len({t for t, c in zip(val.texts, val.labels, strict=True) if c == k}) for k in (0, 1)]
        assert different == [20, 2] and train.classes == val.classes == ("often", "rare")
        again = split(data, 0.2, seed)
        assert again[0].texts == train.texts and np.array_equal(again[1].labels, val.labels)
        seen.add(val.texts)
    assert len(seen) == 4


SPLITS = {
    "one text": (["x", "y", "z"], "aab", 0.1, "class 'b' has 1 different texts"),
    "equal texts": (["x", "y", "z", "z"], "aabb", 0.1, "class 'b' has 1 different texts"),
    "share 0": (["x", "y"], "ab", 0.0, "share is 0.0"),
    "share NaN": (["x", "y"], "ab", float("nan"), "share is nan"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_split_refuses(case):
    texts, labels, share, message = SPLITS[case]
    with pytest.raises(ValueError) as error:
        split(Labelled.of(texts, list(labels)), share)
    assert message in str(error.value)


def test_batches_visit_every_text_once_per_epoch():
    batches = LabelledBatches(10, 4, seed=3)
    drawn = np.concatenate([batches.rows(step) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert LabelledBatches(10, 4, seed=3).rows(4).tolist() == drawn[16:].tolist()
    assert LabelledBatches(10, 4, seed=4).rows(4).tolist() != drawn[16:].tolist()


# ---- files


def test_read_both_kinds(tmp_path):
    (tmp_path / "a.tsv").write_bytes("\ufeffgrün\tcolour\r\nred house\tthing\n".encode())
    lines = [{"text": "grün", "label": "colour", "id": 7}, {"label": "thing", "text": "red\thouse\n"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    a, b = read_labelled(tmp_path / "a.tsv"), read_labelled(tmp_path / "a.jsonl")
    assert a.texts == ("grün", "red house") and b.texts == ("grün", "red\thouse\n")
    assert a.classes == b.classes == ("colour", "thing") and a.labels.tolist() == b.labels.tolist() == [0, 1]
    c = read_labelled(tmp_path / "a.tsv", ("other", "thing", "colour"))
    assert c.labels.tolist() == [2, 1] and c.counts.tolist() == [0, 1, 1]


OK = b"x\ta\ny\tb\n"
FILES = {
    "no tab": ("f.tsv", OK + b"text\n", "line 3: 0 tabs, expected one"),
    "two tabs": ("f.tsv", OK + b"a\tb\tc\n", "line 3: 2 tabs"),
    "empty line": ("f.tsv", b"x\ta\n\ny\tb\n", "line 2: 0 tabs"),
    "empty text": ("f.tsv", OK + b"\ta\n", "line 3: the text is empty"),
    "empty label": ("f.tsv", OK + b"z\t\n", "line 3: label '' must be"),
    "escape in a label": ("f.tsv", OK + b"z\t\x1b[31m\n", "line 3: label '\\x1b[31m' must be"),
    "long label": ("f.tsv", OK + b"z\t" + b"l" * 101, "line 3: label"),
    "not UTF-8": ("f.tsv", OK + b"\xff\ta\n", "line 3: not UTF-8 text (byte 0)"),
    "one class": ("f.tsv", b"x\ta\ny\ta\n", "1 classes, expected 2 to 10000"),
    "no lines": ("f.tsv", b"", "no labelled texts"),
    "long text": ("f.tsv", OK + b"x" * (2**20 + 1) + b"\ta\n", "line 3: the text has 1048577 characters"),
    "ending": ("f.csv", OK, "expected a name that ends in .jsonl or .tsv"),
    "broken JSON": ("f.jsonl", b'{"text": "x", "label": "a"}\n{"text"\n', "line 2: not valid JSON"),
    "a list": ("f.jsonl", b"[1]\n", "line 1: expected a JSON object, got list"),
    "deep JSON": ("f.jsonl", b'{"text":' + b"[" * 100_000 + b"\n", "line 1: JSON nested too deeply"),
    "NaN": ("f.jsonl", b'{"text": "x", "label": NaN}\n', "line 1: not valid JSON"),
    "no label": ("f.jsonl", b'{"text": "x"}\n', "line 1: label is missing"),
    "no text": ("f.jsonl", b'{"label": "x"}\n', "line 1: text is missing"),
    "a number as label": ("f.jsonl", b'{"text": "x", "label": 1}\n', "line 1: label must be a string, got int"),
    "null as text": ("f.jsonl", b'{"text": null, "label": "a"}\n', "line 1: text must be a string, got NoneType"),
    "lone surrogate": ("f.jsonl", b'{"text": "x\\ud800", "label": "a"}\n', "line 1: the text has a lone surrogate at"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_file(case, tmp_path):
    name, data, message = FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_labelled(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_unknown_label_missing_and_huge_file(tmp_path):
    (tmp_path / "f.tsv").write_bytes(OK)
    with pytest.raises(ValueError, match=r"text 2 has label 'b' but the classes are a, c"):
        read_labelled(tmp_path / "f.tsv", ("a", "c"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_labelled(tmp_path / "g.tsv")
    with (tmp_path / "g.tsv").open("wb") as file:
        file.truncate((256 << 20) + 1)  # sparse: takes no room on the disk
    with pytest.raises(ValueError, match="at most 268435456 are accepted"):
        read_labelled(tmp_path / "g.tsv")


# ---- folders


def test_save_and_load(tmp_path):
    model = Classifier(small(), ("x", "y", "z"), seed=4)
    model.save(tmp_path / "m", TOKENIZER)
    loaded, tokenizer = Classifier.load(tmp_path / "m")
    texts = words(5)
    assert loaded.classes == ("x", "y", "z") and not loaded.training
    found = [probabilities(m, tokenizer, texts) for m in (model, loaded)]
    assert np.array_equal(*found)
    Transformer.load(tmp_path / "m")  # the body is an ordinary checkpoint
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        model.save(tmp_path / "m", TOKENIZER)


def edit(folder, **changes):
    path = folder / "classes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FOLDERS = {
    "no classes": (lambda f: (f / "classes.json").unlink(), ValueError, "not a classifier, it has no classes.json"),
    "another format": (lambda f: edit(f, format="x"), ValueError, "not a pykern-classifier-1 file"),
    "one class": (lambda f: edit(f, classes=["x"]), ValueError, "classes.json: Classifier: classes must be 2"),
    "a class with an escape": (lambda f: edit(f, classes=["x", "\x1b"]), ValueError, "printable"),
    "more classes": (lambda f: edit(f, classes=["x", "y", "z"]), ValueError, "has shape [2, 32], expected [3, 32]"),
    "another body": (lambda f: small(seed=5).save(f), ValueError, "no tokenizer.json"),
    "another body's weights": (
        lambda f: (f / "model.safetensors").write_bytes(other_weights(f)),
        ValueError,
        "trained on other weights",
    ),
    "no head": (lambda f: (f / "head.safetensors").unlink(), FileNotFoundError, "head.safetensors: no such file"),
    "broken head": (lambda f: (f / "head.safetensors").write_bytes(b"x" * 20), ValueError, "head.safetensors"),
    "no checkpoint": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
}


def other_weights(folder):
    small(seed=5).save(folder.parent / "other")
    return (folder.parent / "other" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folder(case, tmp_path):
    change, kind, message = FOLDERS[case]
    Classifier(small(), ("x", "y")).save(tmp_path / "m", TOKENIZER)
    change(tmp_path / "m")
    with pytest.raises(kind) as error:
        Classifier.load(tmp_path / "m")
    assert message in str(error.value)


# ---- what is learned

RUNS = {  # name: (data, options, least balanced accuracy)
    "whole": (by_majority, {"steps": 150, "lr": 5e-3}, 0.9),
    "lora": (by_majority, {"steps": 150, "lr": 2e-2, "lora": 4}, 0.9),
    "frozen": (by_last, {"steps": 80, "lr": 3e-2, "freeze_body": True}, 0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_it_learns_what_it_should(run, tmp_path):
    """Above 90 % on texts that nobody saw, and only what should move moves, bit for bit."""
    labelled, options, least = RUNS[run]
    body = small()
    before = {name: p.detach().clone() for name, p in body.named_parameters()}
    data, options = labelled(words(300)), FineTuneOptions(**options)
    model, result = finetune_classifier(body, TOKENIZER, data, tmp_path / "m", options)
    seen = set(data.texts)
    test = labelled([text for text in words(400, 99) if text not in seen])
    assert len(test) > 100
    scores = score_texts(model, TOKENIZER, test)
    assert scores.balanced_accuracy > least
    assert result.first.balanced_accuracy < 0.8 and result.ended == "steps"
    after = plain_state(model.body)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    matrices = {name for name in before if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))}
    assert moved == {"whole": set(before), "lora": matrices, "frozen": set()}[run]
    head = model.head.weight.numel() + model.head.bias.numel()
    in_body = {"whole": sum(p.numel() for p in before.values()), "frozen": 0}
    in_body["lora"] = sum(4 * sum(before[name].shape) for name in matrices)
    assert result.trained == head + in_body[run]
    loaded, tokenizer = Classifier.load(tmp_path / "m")
    assert np.array_equal(score_texts(loaded, tokenizer, test).confusion, scores.confusion)
    assert (tmp_path / "m" / "adapter.json").exists() == (run == "lora") and not adapters(model)


def test_rare_class_is_found_with_balanced_weights(tmp_path):
    """One text in 20 ends in b. Scores are by class, so answering a always is worth 50 %, not 95 %."""
    generator = random.Random(0)
    texts = [text[:-1] + ("b" if generator.random() < 0.05 else "a") for text in words(400, 1)]
    data = by_last(texts)
    assert 10 < data.counts[1] < 40
    _, result = finetune_classifier(
        small(), TOKENIZER, data, tmp_path / "m", FineTuneOptions(steps=60, lr=5e-3, class_weights="balanced")
    )
    assert result.first.balanced_accuracy == 0.5 and result.best.balanced_accuracy > 0.9
    fooled = torch.zeros(len(data), dtype=torch.int64).numpy()
    always = Scores(confusion(data.labels, fooled, 2), 0.0)
    assert always.accuracy > 0.9 and always.balanced_accuracy == 0.5


def test_same_seed_same_classifier(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(weights))  # torch's own stream must not matter, dropout included
        body, options = small(dropout=0.1), FineTuneOptions(steps=5, seed=seed)
        model, _ = finetune_classifier(body, TOKENIZER, by_last(words(60)), tmp_path / name, options)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---- early stopping


class Walk(torch.nn.Module):
    """One weight that grows by about lr at every step; its held-out losses are given."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))


def walk(losses, patience, steps=8):
    model, seen, rows = Walk(), [], []

    def evaluated(check):
        seen.append(model.w.item())
        return Scores(np.eye(2, dtype=np.int64), losses[len(seen) - 1])

    result = fit(
        *(model, TrainOptions(steps=steps, eval_every=1, lr=0.1, warmup=0, schedule="constant", weight_decay=0.0)),
        batch=lambda step: (-model.w.sum(), 1),
        evaluated=evaluated,
        patience=patience,
        log=rows.append,
        report=Silent(),
    )
    return model, result, seen, rows


def test_best_weights_are_kept():
    model, result, seen, rows = walk([9, 5, 4, 6, 7, 3, 8, 8, 8], patience=0)
    assert (result.ended, result.step, result.best_step) == ("steps", 8, 5)
    assert model.w.item() == seen[5] and seen == sorted(set(seen)) and len(rows) == 8
    assert result.first.loss == 9 and result.best.loss == 3


@pytest.mark.parametrize("patience, step", [(1, 3), (2, 4), (3, 8)])
def test_patience_ends_the_run(patience, step):
    """No better at steps 3 and 4, better at 5: patience 3 lives to see it."""
    model, result, seen, rows = walk([9, 5, 4, 6, 4, 3, 8, 2, 8], patience)
    assert result.step == step == len(rows)
    assert (result.ended, result.best_step) == (("patience", 2) if patience < 3 else ("steps", 7))
    assert model.w.item() == seen[result.best_step]


def test_weights_before_the_first_step_can_be_the_best():
    model, result, _, _ = walk([1, 2, 3, 4], patience=3)
    assert (result.best_step, result.step, model.w.item()) == (0, 3, 0.0)


def test_ctrl_c_finishes_the_step_and_keeps_the_best():
    model, seen = Walk(), []

    def batch(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return -model.w.sum(), 1

    def evaluated(check):
        check()
        seen.append(model.w.item())
        return Scores(np.eye(2, dtype=np.int64), [9, 5, 6][len(seen) - 1])

    options = TrainOptions(steps=8, eval_every=1, lr=0.1, warmup=0, weight_decay=0.0)
    before = signal.getsignal(signal.SIGINT)
    result = fit(*(model, options), batch=batch, evaluated=evaluated, patience=0, log=lambda row: None, report=Silent())
    assert (result.ended, result.step, result.best_step) == ("interrupted", 3, 1)
    assert model.w.item() == seen[1] and signal.getsignal(signal.SIGINT) is before


def test_nan_ends_the_run_with_the_weights_as_they_were():
    model = Walk()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        fit(
            *(model, TrainOptions(steps=2)),
            batch=lambda step: (model.w.sum() * float("nan"), 1),
            evaluated=lambda check: Scores(np.eye(2, dtype=np.int64), 1.0),
            patience=0,
            log=lambda row: None,
            report=Silent(),
        )
    assert model.w.item() == 0.0


def test_evaluation_agrees_with_torch():
    model = Classifier(small(), ("x", "y"))
    data = by_last(words(20))
    encoded = Encoded.of(data.texts, TOKENIZER, 12)
    model.train()
    scores = evaluate_classifier(model, encoded, data.labels, batch_size=3)
    assert model.training
    logits = torch.cat([model(*encoded.batch([i])) for i in range(20)]).double()
    labels = torch.from_numpy(data.labels)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
