"""Labelled texts: files of strangers, stratified splits, batches, and scores that the size of a class does not fool."""

import json

import numpy as np
import pytest

from pykern.lm.fit import quality
from pykern.lm.labelled import Labelled, LabelledBatches, balanced_weights, read_labelled, split
from pykern.lm.scores import Scores, balanced_mean, confusion

pytestmark = pytest.mark.one_isa

# ---- scores


def test_scores_by_hand():
    """Truth 0: 8 texts, 6 right. Truth 1: 2 texts, 1 right. Class 2 never occurs and is answered once."""
    truth = np.array([0] * 8 + [1] * 2)
    answers = np.array([0] * 6 + [1, 2] + [1, 0])
    scores = Scores(confusion(truth, answers, 4), 0.5, 0.5)
    assert scores.confusion.tolist() == [[6, 1, 1, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert scores.accuracy == pytest.approx(0.7) and scores.texts == 10
    assert scores.recall[:2] == pytest.approx([0.75, 0.5]) and np.isnan(scores.recall[2:]).all()
    assert scores.balanced_accuracy == pytest.approx(0.625)
    # F1: 2*6/(8+7), 2*1/(2+2), 0/(0+1); class 3 has neither texts nor answers
    assert scores.macro_f1 == pytest.approx((12 / 15 + 0.5 + 0.0) / 3)
    table = scores.table(["one", "two", "three", "four"]).splitlines()
    assert table[1].split() == ["one", "6", "1", "1", "0", "75.0%"] and table[3].split()[-1] == "-"
    assert "441 cells" in Scores(np.eye(21, dtype=np.int64), 0.0, 0.0).table(list("abcdefghijklmnopqrstu"))


def test_balanced_accuracy_is_not_fooled():
    """Always the most frequent of three classes: 98 % right, a third by balanced accuracy."""
    truth = np.array([0] * 98 + [1, 2])
    scores = Scores(confusion(truth, np.zeros(100, np.int64), 3), 0.1, 4.0)
    assert scores.accuracy == 0.98 and scores.balanced_accuracy == pytest.approx(1 / 3)
    less_accurate = Scores(confusion(truth, np.array([0] * 60 + [1] * 38 + [1, 2]), 3), 0.7, 0.3)
    assert less_accurate.balanced_accuracy > 0.8 and quality(less_accurate) > quality(scores)


def test_balanced_loss_by_hand():
    """Class 0: 1, 2, 3; class 2: 10. The mean is 4, that of the classes 6."""
    assert balanced_mean(np.array([1.0, 10.0, 2.0, 3.0]), np.array([0, 2, 0, 0])) == pytest.approx(6.0)


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


def test_balanced_weights():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(labels, 3)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert np.bincount(labels, weights[labels]) == pytest.approx([10 / 3] * 3)  # the same share each
    with pytest.raises(ValueError, match="1 of 4 classes have no text"):
        balanced_weights(labels, 4)
