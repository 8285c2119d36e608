"""The comparison of n-grams, recurrent networks and the Transformer: each row against its own reference."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pykern.cli import main
from pykern.cli.train import SHAPE as COMMAND_SHAPE
from pykern.lm import Batches, Config, Data, NGram, TrainOptions, Transformer, compare, evaluate
from pykern.lm.compare import LEARNING_RATES, SHAPE, Row, plot, table
from pykern.lm.compare import compare as run
from pykern.lm.corpus import Corpus
from pykern.lm.rnn import RNNLM, RNNConfig

pytestmark = pytest.mark.one_isa

TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i % 5}\n\n\n" for i in range(100))
CORPUS = Corpus((TEXT[:2000], TEXT[2000:2600]), (TEXT[2600:],), "0" * 64, "functions")
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}


def test_ngram_rows_are_those_of_the_counts():
    rows = run(CORPUS, orders=(3, 1), models=())
    assert [row.name for row in rows] == ["1-gram", "3-gram"]
    bits = NGram(TEXT[:2600].encode(), 3).bits_per_byte(TEXT[2600:])
    assert [row.bits_per_byte for row in rows] == [bits[0], bits[2]]
    grams = [{TEXT[i : i + n] for i in range(2600 - n + 1)} for n in (1, 2, 3)]
    assert [row.parameters for row in rows] == [len(grams[0]), sum(map(len, grams))]
    assert all(row.tokens == 2600 and row.seconds > 0 and row.lr is None for row in rows)


def by_hand(name, steps, lr, seed):
    """Held-out bits per byte and parameters of a model trained with torch's own optimizer."""
    config = Config(vocab_size=256, **SHAPE | TINY)
    torch.manual_seed(seed)
    if name == "transformer":
        model = Transformer(config)
        model.init_weights()  # make_model draws a second time
    else:
        model = RNNLM(RNNConfig.of_size(config.parameter_count, kind=name, block_size=8, vocab_size=256))
    data = Data.encode(CORPUS, compare.Tokenizer.train("byte"))
    batches = Batches(data.train, 8, 4, seed)
    options = TrainOptions(steps=steps, lr=lr, warmup=steps // 10)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(steps):
        x, y = batches.at(step)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return evaluate(model, data.val, data.tokenizer).bits_per_byte, sum(p.numel() for p in parameters)


@pytest.mark.parametrize("name", compare.NEURAL)
def test_neural_row_is_that_of_a_loop_by_hand(name):
    (row,) = run(CORPUS, steps=20, batch_size=4, lr=0.02, seed=3, orders=(), models=(name,), **TINY)
    bits, parameters = by_hand(name, 20, 0.02, 3)
    assert row.bits_per_byte == pytest.approx(bits, rel=1e-5) and bits < 6  # 8 before training
    assert (row.name, row.parameters, row.tokens, row.lr) == (name, parameters, 20 * 4 * 8, 0.02)
    assert row.tokens_per_second == row.tokens / row.seconds


def test_models_match_in_parameters_and_tokens():
    rows = run(CORPUS, steps=2, batch_size=2, orders=(), **TINY | {"n_embd": 32})
    assert [row.name for row in rows] == ["elman", "lstm", "transformer"]
    target = Config(vocab_size=256, **SHAPE | TINY | {"n_embd": 32}).parameter_count
    assert rows[2].parameters == target
    # one unit more or less is this share of the parameters
    assert all(abs(row.parameters - target) < 0.025 * target for row in rows)
    assert {row.tokens for row in rows} == {2 * 2 * 8}
    assert [row.lr for row in rows] == list(LEARNING_RATES.values())


def test_same_seed_same_bits():
    def bits(seed):
        return [row.bits_per_byte for row in run(CORPUS, steps=3, batch_size=2, seed=seed, orders=(), **TINY)]

    state = torch.get_rng_state()
    first = bits(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's stream is left alone
    torch.rand(5)
    assert bits(1) == first
    assert all(a != b for a, b in zip(bits(2), first, strict=True))


def test_the_clock_ends_training():
    (row,) = run(CORPUS, minutes=0.005, batch_size=2, orders=(), models=("elman",), **TINY)
    steps, rest = divmod(row.tokens, 2 * 8)
    assert rest == 0 and steps > 1
    assert row.seconds >= 0.3
    (row,) = run(CORPUS, minutes=0.005, steps=2, batch_size=2, orders=(), models=("elman",), **TINY)
    assert row.tokens == 2 * 2 * 8


def test_rate_of_each_model():
    rows = run(CORPUS, steps=1, batch_size=1, lr={"lstm": 0.5}, orders=(), models=("lstm", "elman"), **TINY)
    assert [row.lr for row in rows] == [0.5, LEARNING_RATES["elman"]]


def test_other_tokens_leave_bits_per_byte_comparable():
    """A BPE model with uniform logits costs log2(V) bits per token, spread over the bytes of the tokens."""
    options = {
        "tokenizer": "bpe",
        "vocab_size": 300,
        "steps": 1,
        "batch_size": 1,
        "lr": 0.0,
        "models": ("transformer",),
    }
    count, row = run(CORPUS, orders=(2,), **options, **TINY)
    data = Data.encode(CORPUS, compare.Tokenizer.train("bpe", CORPUS.train_texts, 300))
    V = data.tokenizer.vocab_size
    expected = math.log2(V) * (len(data.val) - 1) / data.tokenizer.bytes_per_token[data.val[1:]].sum()
    assert 256 < V <= 300 and row.bits_per_byte == pytest.approx(expected, rel=0.02)
    assert count == replace(run(CORPUS, orders=(2,), models=())[0], seconds=count.seconds)


def test_rnn_layers():
    (row,) = run(CORPUS, steps=1, batch_size=1, orders=(), models=("elman",), rnn_layers=3, **TINY)
    assert any(
        RNNConfig(kind="elman", n_layer=3, n_embd=n, block_size=8, vocab_size=256).parameter_count == row.parameters
        for n in range(1, 20)
    )


def test_report_names_every_model():
    lines = []
    run(CORPUS, steps=1, batch_size=1, orders=(2,), report=lines.append, **TINY)
    assert [line.split(":")[0] for line in lines] == ["2-gram", *(name for name in compare.NEURAL for _ in "ab")]
    assert "parameters" in lines[1] and "bits per byte" in lines[2]


def test_progress_between(monkeypatch):
    monkeypatch.setattr(compare, "LINE_SECONDS", 0.0)
    lines = []
    run(CORPUS, steps=2, batch_size=1, orders=(), models=("lstm",), report=lines.append, **TINY)
    assert lines[1].startswith("lstm: step 1 (50%) | loss ") and lines[1].endswith(" tok/s")
    assert lines[2].startswith("lstm: step 2 (100%)")


def test_nan_is_refused(monkeypatch):
    def broken(*arguments, real=compare._make):
        model = real(*arguments)
        torch.nn.init.constant_(model.wte.weight, math.nan)
        return model

    monkeypatch.setattr(compare, "_make", broken)
    with pytest.raises(FloatingPointError, match="compare: the loss of elman is nan at step 1: try a lower lr"):
        run(CORPUS, steps=2, orders=(), models=("elman",), **TINY)


BAD = {
    "order": ({"orders": (1, 9)}, "orders hold 9 but must be integers from 1 to 8"),
    "order of another type": ({"orders": (True,)}, "orders hold True"),
    "order twice": ({"orders": (2, 2)}, "orders hold one twice: 2, 2"),
    "model": ({"models": ("gru",)}, "models hold 'gru' but must be of elman, lstm, transformer"),
    "model twice": ({"models": ("lstm", "lstm")}, "models hold one twice"),
    "nothing": ({"models": (), "orders": ()}, "there is nothing to compare"),
    "rate of an unknown model": ({"lr": {"gru": 1.0}}, "lr names 'gru' but the models are"),
    "rate": ({"lr": math.nan}, "lr is nan"),
    "steps": ({"steps": 0}, "steps is 0"),
    "minutes": ({"minutes": 0.0}, "minutes must be above 0"),
    "seed": ({"seed": -1}, "seed is -1"),
    "batch": ({"batch_size": 0}, "batch_size is 0"),
    "dropout": ({"dropout": 0.1}, "dropout is 0.1 but must be 0"),
    "shape": ({"n_embd": 30}, "n_embd 30 is not a multiple of n_head 4"),
    "layers": ({"rnn_layers": 65}, "n_layer must lie between 1 and 64, got 65"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_before_the_text_is_read(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run("no such file", **options)


def test_text_that_is_too_short_is_refused_before_counting():
    lines = []
    with pytest.raises(ValueError, match="block_size 4000 needs at least 4001"):
        run(CORPUS, report=lines.append, **TINY | {"block_size": 4000})
    with pytest.raises(ValueError, match="has 1 tokens, but at least 2 are needed"):
        run(replace(CORPUS, val_texts=("x",)), report=lines.append, **TINY)
    assert lines == []


ROWS = [Row("2-gram", 3.25, 68, 0.5, 4000), Row("lstm", 2.5, 117_872, 60.0, 1_200_000, 0.01)]


def test_table():
    assert table(ROWS).splitlines() == [
        "| model  | bits per byte | parameters | training, s |    tokens | tokens/s |   lr |",
        "| ------ | ------------: | ---------: | ----------: | --------: | -------: | ---: |",
        "| 2-gram |        3.2500 |         68 |         0.5 |     4,000 |    8,000 |      |",
        "| lstm   |        2.5000 |    117,872 |        60.0 | 1,200,000 |   20,000 | 0.01 |",
    ]


def test_plot_draws_a_bar_for_each_row(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []

    def save(figure, *arguments, real=Figure.savefig, **options):
        drawn.append(figure.axes[0])
        real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    plot(ROWS, tmp_path / "bars.png", title="functions")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["bars.png"]
    (axes,) = drawn
    assert [bar.get_width() for bar in axes.patches] == [3.25, 2.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2-gram", "lstm"]
    assert "117,872 parameters, 60.0 s" in [text.get_text() for text in axes.texts][1]
    assert axes.get_title() == "functions" and "bits per byte" in axes.get_xlabel()


# ---- the command

COMMAND = ["--steps", "2", "--batch-size", "2", "--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--block-size", "8"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def test_command_prints_the_table(text, tmp_path, capsys):
    bars = tmp_path / "bars.png"
    assert main(["evaluate", "--compare", "--data", text, "--plot", str(bars), *COMMAND]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[2:] == [*(f"{n}-gram" for n in range(1, 7)), "elman", "lstm", "transformer"]
    assert "its last 5 % held out" in lines[-2] and lines[-1] == f"bars: {bars}"
    assert "lstm: " in printed.err and bars.read_bytes().startswith(b"\x89PNG")


def test_command_gives_what_the_function_gives(text, capsys):
    arguments = ["--seed", "5", "--lr", "0.01", "--rnn-layers", "2", "--json", *COMMAND]
    assert main(["evaluate", "--compare", "models", "--data", text, *arguments]) == 0
    values = json.loads(capsys.readouterr().out)
    rows = run(text, steps=2, batch_size=2, seed=5, lr=0.01, rnn_layers=2, **TINY)
    assert values["corpus"].endswith("its last 5 % held out") and len(values["sha256"]) == 64
    for row, given in zip(rows, values["rows"], strict=True):
        assert given["tokens_per_second"] == given.pop("tokens") / given["seconds"]
        del given["tokens_per_second"], given["seconds"]
        assert given == {name: getattr(row, name) for name in ("name", "bits_per_byte", "parameters", "lr")}


def test_shape_is_that_of_the_train_command():
    assert {name: COMMAND_SHAPE[name][1] for name in SHAPE} == SHAPE


REFUSED = {
    "a model": (["--compare", "--model", "x"], "--model does not go with --compare: it trains its own models"),
    "baseline": (["--compare", "--baseline"], "--baseline does not go with --compare"),
    "another value": (["--compare", "people"], "--compare is 'people' but must be models"),
    "no model": ([], "--model is missing: it may be left out with --compare only"),
    "option without --compare": (["--model", "x", "--lr", "3"], "--lr goes with --compare only"),
    "shape without --compare": (["--model", "x", "--n-layer", "3"], "--n-layer goes with --compare only"),
    "plot in no folder": (["--compare", "--plot", "{tmp}/no/bars.png"], "--plot: no such folder"),
    "plot over a folder": (["--compare", "--plot", "{tmp}"], "is a folder"),
    "steps": (["--compare", "--steps", "-3"], "steps is -3"),
    "threads": (["--compare", "--threads", "0"], "--threads is 0"),
    "tokenizer": (["--compare", "--tokenizer", "runes"], "kind must be one of"),
    "block": (["--compare", "--block-size", "100000"], "needs at least 100001"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_command_refuses_in_one_line(case, text, tmp_path, capsys):
    arguments, message = REFUSED[case]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["evaluate", "--data", text, *(a.format(tmp=tmp_path) for a in arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("pykern evaluate: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
