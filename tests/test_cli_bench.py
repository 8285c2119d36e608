"""pykern bench decode: its JSON, its table, its counts with a roof that is not measured, its refusals."""

import json
import re
import statistics

import pytest
import torch

from benchmarks import models
from pykern.cli import main
from pykern.lm import Config, Transformer, bench, roof

pytestmark = pytest.mark.one_isa


def bench_decode_command(capsys, *arguments):
    assert main(["bench", "decode", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.fixture
def plain_roof(monkeypatch):
    """A roof that is not measured: 1 TB/s, 1 TFLOP/s."""
    flat = {"read": {1 << 20: 1e12}, "flops": {"float32": 1e12, "bfloat16": 1e12}}
    monkeypatch.setattr(bench, "measure", lambda quick: roof.Roof(threads=torch.get_num_threads(), **flat))


def test_json_of_bench_decode(capsys, plain_roof):
    """One document and nothing else; every test of every dtype, batch and thread count, in this order."""
    before = torch.get_num_threads()
    lists = ["-p", "8", "-n", "4", "-d", "0,6", "-b", "1,2", "-t", "1,2", "-r", "3", "--dtype", "float32,int4"]
    found = json.loads(bench_decode_command(capsys, "--quick", *lists, "-o", "json"))
    assert sorted(found) == ["machine", "results", "roof"] and found["machine"]["quick"] is True
    assert [roof["threads"] for roof in found["roof"]] == [1, 2]
    keys = ("dtype", "batch", "n_threads", "test", "n_prompt", "n_gen", "n_depth")
    tests = [("pp8", 8, 0, 0), ("tg4", 0, 4, 0), ("tg4 @ d6", 0, 4, 6)]
    assert [tuple(row[key] for key in keys) for row in found["results"]] == [
        (dtype, batch, threads, *test)
        for dtype in ("float32", "int4")
        for batch in (1, 2)
        for threads in (1, 2)
        for test in tests
    ]
    cache = 2 * 2 * 64 * 4  # of a token: k and v of two layers
    for row in found["results"]:
        samples = row["samples_ts"]
        assert len(samples) == 3 and row["avg_ts"] == pytest.approx(statistics.fmean(samples))
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(samples)) and row["model"] == "tiny"
        if row["n_gen"]:
            read = row["model_size"] + row["batch"] * cache * (row["n_depth"] + 2.5)
            assert row["gb_per_s"] == pytest.approx(row["avg_ts"] / row["batch"] * read / 1e9)
            assert row["roof"] == pytest.approx(row["gb_per_s"] / 1e3)
        else:
            head = 2 * 256 * 64
            flops = 8 * (models.TINY.matrix_weights * 2 - head) + head + 2 * 2 * 64 * 9 * 8
            assert row["roof"] == pytest.approx(row["avg_ts"] / 8 * flops / 1e12)
    sizes = {row["dtype"]: row["model_size"] for row in found["results"]}
    assert sizes["float32"] == 4 * models.TINY.matrix_weights and sizes["int4"] == sizes["float32"] * 5 / 32
    assert torch.get_num_threads() == before


def test_table_of_bench_decode(capsys):
    """A Markdown table of the columns promised, then a line for each roof; here with the roof measured."""
    printed = bench_decode_command(capsys, "--quick", "-p", "0", "-d", "0", "-t", "1", "--dtype", "int8,bfloat16")
    table, roofs = printed.split("\n\n")
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert head == ["model", "size", "threads", "batch", "dtype", "test", "t/s", "GB/s", "roof"]
    assert all(re.fullmatch("-+:?", cell) for cell in rule) and len({len(line) for line in table.splitlines()}) == 1
    assert [(row[0], *row[2:6]) for row in rows] == [("tiny", "1", "1", dtype, "tg8") for dtype in ("int8", "bfloat16")]
    for row in rows:
        assert re.fullmatch(r"[\d.]+ MiB", row[1]) and re.fullmatch(r"[\d.]+ ± [\d.]+", row[6])
        assert float(row[7]) >= 0 and re.fullmatch(r"\d+%", row[8])
    assert re.fullmatch(r"roof of 1 thread: .* GB/s read from 4 MiB, GFLOP/s \d+ in float32, \d+ in bfloat16\n", roofs)


def test_bench_decode_of_a_checkpoint(capsys, plain_roof, tmp_path):
    config = Config(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=50, positions="rope")
    Transformer(config).save(tmp_path / "mine")
    arguments = ["-m", str(tmp_path / "mine"), "-p", "16", "-n", "4", "-d", "12", "-r", "1", "--dtype", "float32"]
    rows = json.loads(bench_decode_command(capsys, *arguments, "-o", "json"))["results"]
    assert [(row["model"], row["test"], row["stddev_ts"]) for row in rows] == [
        ("mine", "pp16", 0.0),
        ("mine", "tg4 @ d12", 0.0),
    ]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["-t", "two"], 2, "'two' is not a list of whole numbers"),
        (["-o", "csv"], 2, "invalid choice: 'csv'"),
        (["--rep", "2"], 2, "--rep"),
        (["-p", "0", "-n", "0"], 1, "-p and -n are both 0"),
        (["-p", "2000"], 1, "-p is 2000 but must be from 0 to 1024"),
        (["-d", "0,1000"], 1, "-d 1000 and -n 128 exceed the model's block_size of 1024"),
        (["-b", "1,0"], 1, "-b is 0 but must be from 1"),
        (["-t", "0"], 1, "-t is 0 but must be from 1 to 1024"),
        (["-r", "0"], 1, "-r is 0"),
        (["--dtype", "float32,int3"], 1, "--dtype is 'int3' but must be one of float32, bfloat16, int8, int4"),
        (["-m", "nowhere"], 1, "no such checkpoint folder"),
    ],
)
def test_bench_decode_refuses(arguments, code, words, capsys):
    try:
        found = main(["bench", "decode", *arguments])
    except SystemExit as end:
        found = end.code
    printed = capsys.readouterr()
    assert found == code and words in printed.err and printed.out == ""
    assert printed.err.startswith("pykern bench") and len(printed.err.splitlines()) == 1
