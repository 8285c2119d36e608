"""The digits: intervals against Student's table, the split, who learns from what, the table and the command."""

import json
import struct
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn (extra course) is not installed, and the digits come with it")

import pykern
from pykern.cli import main
from pykern.course import cnn, digits
from pykern.course.digits import (
    AUTOENCODER,
    CNN,
    LONGER,
    METHODS,
    QUICK,
    RANDOM,
    SUPERVISED,
    Result,
    Settings,
    compare,
    confidence_interval,
    load_images,
    percent_error,
    split,
    table,
    verdict,
)

pytestmark = pytest.mark.one_isa
TINY = Settings(seeds=2, labels=(20, 50), hidden=(8, 6), pretrain_steps=2, finetune_steps=4)


@pytest.fixture(scope="module")
def images():
    return load_images()


@pytest.mark.parametrize(
    "values, mean, half",
    [
        ([1, 2, 3, 4, 5], 3.0, 2.776445 * 1.5811388 / 5**0.5),  # t of 4 degrees of freedom, from the table
        ([10.0, 14.0], 12.0, 12.706205 * 2.8284271 / 2**0.5),  # 1 degree
        ([7.0, 7.0, 7.0], 7.0, 0.0),
    ],
)
def test_interval_is_students(values, mean, half):
    interval = confidence_interval(values)
    assert interval.mean == mean and interval.half == pytest.approx(half, rel=1e-6)


def test_interval_of_one_value_is_refused():
    with pytest.raises(ValueError, match="confidence_interval: got 1 values, expected two or more"):
        confidence_interval([1.0])


def test_the_interval_holds_the_mean_19_times_out_of_20():
    rng = np.random.default_rng(0)
    held = [abs(i.mean - 3) <= i.half for i in (confidence_interval(rng.normal(3, 2, 5)) for _ in range(2000))]
    assert abs(np.mean(held) - 0.95) < 3 * (0.95 * 0.05 / 2000) ** 0.5


def test_images(images):
    assert images.x.shape == (1797, 64) and images.x.dtype == np.float64
    assert images.x.min() == 0 and images.x.max() == 1 and len(np.unique(images.x)) == 17
    assert sorted(np.unique(images.labels)) == list(range(10))


def test_split_is_disjoint_and_its_beginning_balanced(images):
    numbered = digits.Images(np.arange(1797.0)[:, None], images.labels)
    train, test = split(numbered, np.random.default_rng(0))
    assert (len(train.x), len(test.x)) == (1200, 597)
    assert sorted(np.concatenate([train.x, test.x]).ravel()) == list(range(1797))
    for part in (train, test):  # rows and labels moved together
        np.testing.assert_array_equal(part.labels, images.labels[part.x.ravel().astype(int)])
    for n in (10, 100, 500):
        assert np.bincount(train.labels[:n]).tolist() == [n // 10] * 10
    assert np.ptp(np.bincount(train.labels[:57])) == 1
    other, _ = split(numbered, np.random.default_rng(1))
    assert (other.x != train.x).any()


def test_percent_error():
    assert percent_error(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0])) == 25


def test_who_learns_from_what(images, monkeypatch):
    """The autoencoders see all images without labels, the others the labelled ones; all have the same first weights."""
    calls = []

    def spy(name):
        original = getattr(digits, name)

        def run(classifier, *arrays, **options):
            weights = [parameter.value.copy() for parameter in classifier.parameters()]
            calls.append((name, [array.shape for array in arrays], options["steps"], weights))
            return original(classifier, *arrays, **options)

        monkeypatch.setattr(digits, name, run)

    for name in ("fit", "pretrain_autoencoders", "pretrain_supervised"):
        spy(name)
    trained_cnn = cnn.train_cnn

    def train_cnn(x, labels, **options):
        calls.append(("cnn", [x.shape, labels.shape], options["steps"], None))
        return trained_cnn(x, labels, **options)

    monkeypatch.setattr(cnn, "train_cnn", train_cnn)
    settings = Settings(seeds=2, labels=(30,), hidden=(8, 6), pretrain_steps=2, finetune_steps=4)
    errors = digits.one_seed(images, settings, 0)
    labelled = [(30, 64), (30,)]
    assert [call[:3] for call in calls] == [
        ("pretrain_autoencoders", [(1200, 64)], 2),
        ("pretrain_supervised", labelled, 2),
        ("fit", labelled, 4),
        ("fit", labelled, 8),  # longer: 4 and twice 2
        ("fit", labelled, 4),
        ("fit", labelled, 4),
        ("cnn", labelled, 4),
    ]
    first = calls[0][3]
    same = [all(np.array_equal(a, b) for a, b in zip(first, weights, strict=True)) for *_, weights in calls[:6]]
    assert same == [True, True, True, True, False, False]  # all from one start; the last two after pre-training
    heads = [weights[-2:] for *_, weights in calls[:6]]
    assert all(np.array_equal(head[0], heads[0][0]) for head in heads)
    assert set(errors) == {(30, method) for method in METHODS}


def test_compare_gives_the_same_errors_again_and_keeps_the_threads():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        results = compare(TINY, each_seed=lambda seed: seen.append((seed, pykern.get_num_threads())))
        assert seen == [(0, 1), (1, 1)] and torch.get_num_threads() == pykern.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert results == compare(TINY)
    assert [(r.labels, r.method) for r in results] == [(n, method) for n in (20, 50) for method in METHODS]
    wrong = np.array([r.errors for r in results]) * 597 / 100
    np.testing.assert_allclose(wrong, wrong.round(), atol=1e-9)  # whole images out of 597


@pytest.mark.slow
def test_every_network_learns_from_all_labels(images):
    errors = digits.one_seed(images, Settings(labels=(1200,), pretrain_steps=60, finetune_steps=250), 0)
    assert {method for _, method in errors} == set(METHODS)
    for key, error in errors.items():
        assert error < 12, key  # a guess: 90


def test_cnn_has_the_shape_it_says_and_its_own_seed(images):
    state = torch.random.get_rng_state()
    options = dict(steps=3, batch_size=50, lr=0.01)
    one, two, other = (cnn.train_cnn(images.x[:200], images.labels[:200], seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    assert sum(p.numel() for p in one.parameters()) == (16 * 9 + 16) + (32 * 16 * 9 + 32) + (10 * 128 + 10)
    assert cnn.predict(one, images.x[:7]).shape == (7,)
    with pytest.raises(ValueError, match=r"DigitsCNN: images has shape \(2, 64\), expected \[N, 8, 8\]"):
        one(torch.zeros(2, 64))
    with pytest.raises(FloatingPointError, match="train_cnn: the loss of step 1 is nan"):
        cnn.train_cnn(images.x[:200] * np.nan, images.labels[:200], seed=0, **options)


RESULTS = [
    Result(RANDOM, 100, (10.0, 12.0, 14.0)),
    Result(LONGER, 100, (9.0, 11.1, 12.9)),
    Result(AUTOENCODER, 100, (8.0, 10.0, 12.0)),
    Result(SUPERVISED, 100, (9.5, 12.0, 14.5)),
    Result(CNN, 100, (11.0, 13.0, 15.0)),
]


def test_table_compares_seed_by_seed():
    """Half widths by hand, 4.302653 s / sqrt(3): s is 2 for the errors (10, 12, 14), and 0.1 for the differences
    (-1, -0.9, -1.1) between the random starts, which are shown although the intervals of the errors overlap."""
    lines = table(RESULTS).splitlines()[2:]
    assert lines == [
        "| 100 | random start | 12.00 ± 4.97 |  | +1.00 ± 0.25: higher |",
        "| 100 | random start, longer | 11.00 ± 4.85 | -1.00 ± 0.25: lower |  |",
        "| 100 | autoencoders | 10.00 ± 4.97 | -2.00 ± 0.00: lower | -1.00 ± 0.25: lower |",
        "| 100 | supervised layers | 12.00 ± 6.21 | +0.00 ± 1.24: no difference shown "
        "| +1.00 ± 1.38: no difference shown |",
        "| 100 | CNN | 13.00 ± 4.97 | +1.00 ± 0.00: higher | +2.00 ± 0.25: higher |",
    ]


def test_verdict_at_the_edge():
    assert verdict(digits.Interval(-1.0, 1.0)) == "no difference shown"
    assert verdict(digits.Interval(-1.0, 0.99)) == "lower" and verdict(digits.Interval(1.0, 0.99)) == "higher"


def test_plot(tmp_path):
    more = [Result(r.method, 1200, tuple(e / 3 for e in r.errors)) for r in RESULTS]
    sizes = []
    for name, results in (("one", RESULTS), ("two", RESULTS + more)):
        digits.plot(results, tmp_path / f"{name}.png")
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[1][0] > 1.5 * sizes[0][0] and sizes[0][1] == sizes[1][1]  # a panel each
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(seeds=1), ValueError, "Settings: seeds is 1, expected 2 .. 1000"),
        (dict(seeds=2.0), TypeError, "Settings: seeds is 2.0, expected a whole number"),
        (dict(labels=()), ValueError, "Settings: labels is empty"),
        (dict(labels=(9,)), ValueError, "Settings: labels is 9, expected 10 .. 1200"),
        (dict(labels=(1201,)), ValueError, "Settings: labels is 1201, expected 10 .. 1200"),
        (dict(labels=(50, 50)), ValueError, r"Settings: labels is \(50, 50\), expected different numbers"),
        (dict(pretrain_steps=-1), ValueError, "Settings: pretrain_steps is -1"),
        (dict(batch_size=True), TypeError, "Settings: batch_size is True"),
    ],
)
def test_settings_refuse(options, error, message):
    with pytest.raises(error, match=message):
        Settings(**options)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(digits, "QUICK", TINY)


def test_command_prints_the_table_and_writes_the_picture(tiny, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    assert main(["digits", "--quick", "--labels", "30,all", "--seeds", "3", "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "seed 3 of 3" in err and picture.read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    assert lines[0].startswith("| labelled images | network | test error, % |") and len(lines) == 2 + 2 * len(METHODS)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 30"] * 5 + ["| 1200"] * 5


def test_command_prints_json(tiny, capsys):
    assert main(["digits", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["labels"] == [20, 50] and found["seconds"] > 0
    expected = {(r.labels, r.method): r for r in compare(TINY)}
    for row in found["results"]:
        result = expected[row["labels"], row["network"]]
        assert tuple(row["errors"]) == result.errors and row["mean"] == result.interval.mean
        assert set(row["less"]) == {RANDOM, LONGER} - {row["network"]}
        for name, less in row["less"].items():
            assert less == result.against(expected[row["labels"], name])._asdict()
    assert len(found["results"]) == len(expected)


def test_quick_is_smaller_than_the_default():
    assert QUICK.seeds < Settings().seeds and QUICK.all_steps < Settings().all_steps / 4


@pytest.mark.parametrize(
    "options, message",
    [
        (["--labels", "few"], "--labels is 'few', expected numbers or all, as in 100,all"),
        (["--labels", ""], "--labels is '', expected numbers or all, as in 100,all"),
        (["--labels", "5"], "Settings: labels is 5, expected 10 .. 1200"),
        (["--labels", "9" * 5000], "--labels is"),
        (["--labels", "all,1200"], "Settings: labels is (1200, 1200), expected different numbers"),
        (["--seeds", "1"], "Settings: seeds is 1, expected 2 .. 1000"),
        (["--plot", "missing/digits.png"], "--plot is 'missing/digits.png', but there is no folder 'missing'"),
        (["--plot", "."], "--plot is '.', expected the name of a file"),
    ],
)
def test_command_refuses_in_one_line(options, message, tiny, capsys):
    assert main(["digits", "--quick", *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("pykern digits: ") and message in err


@pytest.mark.parametrize("missing, extra", [("sklearn.datasets", "course"), ("torch", "torch")])
def test_a_missing_package_is_named_with_its_extra(missing, extra, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["digits", "--quick"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"pip install 'pykern[{extra}]'" in err
