"""A classifier on a language model: padding, loss, folders, what fine-tuning learns, early stopping."""

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
from pykern.lm.fit import fit
from pykern.lm.labelled import Labelled
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
    always = Scores(confusion(data.labels, fooled, 2), 0.0, 0.0)
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
        return Scores(np.eye(2, dtype=np.int64), -1.0, losses[len(seen) - 1])

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
    assert result.first.balanced_loss == 9 and result.best.balanced_loss == 3


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
        return Scores(np.eye(2, dtype=np.int64), -1.0, [9, 5, 6][len(seen) - 1])

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
            evaluated=lambda check: Scores(np.eye(2, dtype=np.int64), 1.0, 1.0),
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
    mean = F.cross_entropy(logits, labels, weight=1.0 / torch.bincount(labels).double())
    assert scores.balanced_loss == pytest.approx(mean.item(), rel=1e-5)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
