"""The harness of the benchmarks: interleaved timing on a clock of our own, counts of flops and bytes, a whole run."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_adamw,
    bench_attention,
    bench_cross_entropy,
    bench_decode,
    bench_linear,
    bench_mlp,
    bench_norm,
    bench_train,
    models,
    report,
)
from benchmarks.__main__ import BENCHES
from benchmarks.plain_gpt import PlainGPT
from benchmarks.roofline import Roof, size_text
from benchmarks.timing import LEAST_ROUNDS, MOST_ROUNDS, Timings, in_turn, interleave

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.one_isa


class Clock:
    """Time passes only when a function takes it."""

    def __init__(self):
        self.now, self.calls, self.slowdown = 0.0, [], 1.0

    def __call__(self):
        return self.now

    def takes(self, name, seconds):
        def function():
            self.calls.append(name)
            self.now += seconds * self.slowdown

        return function


def test_interleave_alternates_and_takes_the_median():
    clock = Clock()
    timings = interleave({"a": clock.takes("a", 0.5), "b": clock.takes("b", 1.5)}, 10.0, clock)
    rounds = len(timings.seconds["a"])
    assert rounds == 10 and timings.median("a") == 0.5 and timings.median("b") == 1.5
    assert timings.ratio("b", "a") == 3.0 and timings.spread("a") == 0.0
    measured = "".join(clock.calls[6:])  # two warm-up calls and one for the estimate, each
    assert measured == "abba" * (rounds // 2)


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    clock = Clock()
    a = clock.takes("a", 1.0)

    def b():
        clock.takes("b", 2.0)()
        clock.slowdown *= (
            1.1  # after each b: rounds differ, and within a round the order favours now one, now the other
        )

    timings = interleave({"a": a, "b": b}, 60.0, clock)
    assert timings.median("a") > 2.0
    assert timings.ratio("b", "a") == pytest.approx(2.0, rel=0.1)
    assert timings.spread("a") > 0.1


def test_short_functions_are_repeated_and_rounds_are_bounded():
    clock = Clock()
    timings = interleave({"a": clock.takes("a", 1e-5)}, 1e9, clock)
    assert len(timings.seconds["a"]) == MOST_ROUNDS and len(clock.calls) == 3 + 200 * MOST_ROUNDS
    assert timings.median("a") == pytest.approx(1e-5)
    slow = Clock()
    assert len(interleave({"a": slow.takes("a", 100.0)}, 1.0, slow).seconds["a"]) == LEAST_ROUNDS


def test_a_rest_before_every_sample_is_not_timed():
    clock, rests = Clock(), []

    def sleep(seconds):
        rests.append(len(clock.calls))
        clock.now += seconds

    timings = interleave({"a": clock.takes("a", 0.5), "b": clock.takes("b", 1.5)}, 10.0, clock, 0.25, sleep)
    assert timings.median("a") == 0.5 and timings.median("b") == 1.5
    assert rests == [*range(6, len(clock.calls))] and len(rests) == 2 * len(timings.seconds["a"])


def test_a_function_that_takes_no_time_is_refused_and_collection_goes_on():
    with pytest.raises(RuntimeError, match=r"timing: 1 calls took 0\.0 s"):
        interleave({"a": lambda: None}, 1.0, Clock())
    assert gc.isenabled()

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": fails}, 1.0)
    assert gc.isenabled()


def test_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians():
    timings = Timings({"a": [1.0, 2.0, 10.0], "b": [3.0, 2.0, 30.0]})
    assert timings.ratio("b", "a") == 3.0 and timings.median("b") / timings.median("a") == 1.5
    assert timings.spread("a") == 4.5


def test_in_turn_goes_round():
    function = in_turn([lambda i=i: i for i in range(3)])
    assert [function() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_roof_takes_the_longer_of_arithmetic_and_memory():
    roof = Roof(1, {"float32": 100e9}, {1 << 20: 80e9, 1 << 24: 20e9}, {})
    assert roof.bandwidth(1) == roof.bandwidth(1 << 20) == 80e9
    assert roof.bandwidth(1 << 24) == roof.bandwidth(1 << 40) == 20e9
    assert roof.bandwidth(1 << 22) == pytest.approx(40e9)
    assert roof.seconds(torch.float32, 1e9, 1e6, 1e3) == 0.01
    assert roof.seconds(torch.float32, 0.0, 8e9, 1 << 20) == 0.1
    assert roof.seconds(torch.float32, 0.0, 8e9, 1 << 30) == 0.4


def test_texts():
    assert [size_text(s) for s in (1 << 14, 1 << 20, 3 << 30)] == ["16 KiB", "1 MiB", "3 GiB"]
    assert [report.time_text(s) for s in (1.5, 2e-3, 3.25e-6, 4e-9)] == ["1.5 s", "2 ms", "3.25 us", "4 ns"]
    row = report.Row("norm", "x", "float32", 1, 2e9, 1e9, "torch", 0.5, 0.01, 9, 0.25, 1.5)
    assert report.line(row, first=True).split() == [
        "x",
        "float32",
        "torch",
        "500",
        "ms",
        "4.0",
        "2.0",
        "25%",
        "1.50",
        "1%",
        "-",
    ]
    measured = report.Row("norm", "x", "float32", 1, 2e9, 1e9, "torch", 0.5, 0.01, 9, 0.25, 1.5, {"a": 3 << 20, "b": 7})
    assert report.line(measured, first=True).split()[-2:] == ["3", "MiB"]
    assert len(report.line(row, first=False)) == len(report.HEAD)


def test_attention_counts():
    assert bench_attention.flops(1, 12, 1024, 1024, 64, causal=False, backward=False) == 4 * 12 * 1024 * 1024 * 64
    assert bench_attention.flops(1, 12, 1024, 1024, 64, causal=True, backward=False) == 2 * 12 * 1024 * 1024 * 64
    assert bench_attention.flops(1, 1, 8, 8, 4, causal=True, backward=True) == 3.5 * 2 * 8 * 8 * 4
    assert bench_attention.moved(2, 4, 2, 3, 5, 8, 4, backward=False) == 4 * (2 * 2 * 4 * 3 * 8 + 2 * 2 * 2 * 5 * 8)


def test_linear_counts():
    assert bench_linear.flops(2, 3, 5, backward=False) == 60 and bench_linear.flops(2, 3, 5, backward=True) == 180
    assert bench_linear.moved(2, 3, 5, 4, backward=False) == 4 * (6 + 15 + 5 + 10)


def test_mlp_counts():
    assert bench_mlp.flops(2, 3, 5, "gelu_tanh", backward=False) == 2 * 2 * 2 * 3 * 5
    assert bench_mlp.flops(2, 3, 5, "swiglu", backward=True) == 3 * 3 * 2 * 2 * 3 * 5
    assert bench_mlp.moved(2, 3, 5, "gelu_tanh", 4, backward=False) == 4 * (2 * 2 * 3 + 15 + 5 + 15 + 3)
    assert bench_mlp.moved(2, 3, 5, "swiglu", 2, backward=True) == 3 * 2 * (2 * 2 * 3 + 2 * (15 + 5) + 15 + 3)


def test_adamw_counts():
    """28 as in docs/adamw.md; a master is read and written, its copy written; clipping reads the gradient again."""
    assert bench_adamw.parameter_bytes(torch.float32, clip=False) == bench_train.ADAMW_BYTES == 28
    assert bench_adamw.parameter_bytes(torch.float32, clip=True) == 32
    assert bench_adamw.parameter_bytes(torch.bfloat16, clip=False) == 28
    assert bench_adamw.parameter_bytes(torch.bfloat16, clip=True) == 30
    params = bench_adamw.parameters(models.TINY, torch.float32)
    assert sum(p.numel() for p in params) == models.TINY.parameters
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in params])).item()
    assert norm == pytest.approx(bench_adamw.GRADIENT_NORM, rel=0.05) and norm > 5 * bench_adamw.MAX_NORM


def test_model_counts():
    """124 439 808 is what GPT-2's authors call 117M and everyone else 124M."""
    assert models.GPT2.parameters == 124_439_808
    assert round(models.SMALL.parameters / 1e6, 1) == 23.6
    tiny = models.TINY
    assert tiny.parameters == sum(p.numel() for p in PlainGPT(**tiny.sizes).parameters())
    assert tiny.training_flops(2, 8) == 6 * tiny.matrix_weights * 16 + 3.5 * 2 * 2 * 8 * 8 * 64 * 2
    assert tiny.decode_bytes(1, 9, 2) - tiny.decode_bytes(1, 8, 2) == 2 * 2 * 64 * 2


def test_a_plain_step_is_a_row_of_the_plain_forward_pass():
    torch.manual_seed(0)
    model = PlainGPT(**models.TINY.sizes).eval()
    ids = torch.randint(256, (2, 6))
    caches = model.caches(2, torch.float32)
    for t in range(6):
        logits = model.step(ids[:, t], caches, t)
    full = torch.nn.functional.linear(model.hidden(ids)[:, -1], model.wte.weight)
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


def _comparable():
    for module in (bench_attention, bench_linear, bench_mlp, bench_norm, bench_cross_entropy, bench_adamw):
        yield from module.cases(quick=True)
    yield from bench_decode.attention_cases(bench_decode.QUICK_SHAPES)


def test_all_contestants_of_a_case_compute_the_same():
    """Half precision is compared to a few roundings, between functions that round at different places."""
    names = set()
    for case in _comparable():
        results = {who: function() for who, function in case.build().items()}
        ours = results.pop(report.OURS)
        assert bool(results) != ("masters" in case.name)  # of which torch has none
        assert (case.name, case.dtype) not in names
        names.add((case.name, case.dtype))
        if "dropout" in case.name:  # each draws a mask of its own
            continue
        for who, theirs in results.items():
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            for a, b in pairs:
                scale = b.double().abs().max().item()
                bound = (1e-4 if case.dtype == torch.float32 else 4e-2) * max(scale, 1e-30)
                worst = (a.double() - b.double()).abs().max().item()
                assert worst <= bound, f"{case.name} {case.dtype} {who}: {worst} of {scale}"


def test_decode_counts():
    """A quantised step reads 8.25 or 5 bits a weight of a matrix, and the rest in float32."""
    model, count = models.TINY, models.TINY.matrix_weights
    whole = bench_decode.step_moved(model, 2, 9, "float32")
    assert whole == model.decode_bytes(2, 9, 4)
    assert bench_decode.step_moved(model, 2, 9, "bfloat16") == model.decode_bytes(2, 9, 2)
    assert whole - bench_decode.step_moved(model, 2, 9, "int8") == count * (32 - 8.25) / 8
    assert whole - bench_decode.step_moved(model, 2, 9, "int4") == count * (32 - 5) / 8
    cases = {case.name: case for case in bench_decode.model_cases([(model, 2, 4)], [(model, 2, 4)], [])}
    body = count - model.vocab_size * model.n_embd
    head = 2 * 2 * model.vocab_size * model.n_embd
    assert cases["tiny B2 prefill 4"].flops == 2 * 2 * 4 * body + head + model.attention_flops(2, 4)
    assert cases["tiny B2 generate 4"].flops == sum(model.decode_flops(2, t) for t in range(4))


def benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    run = benchmarks("--quick", "--threads", "1", "--json", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert sorted(found) == ["machine", "results", "roofline"]
    assert {row["bench"] for row in found["results"]} == set(BENCHES)
    for row in found["results"]:
        assert row["seconds"] > 0 and row["moved"] > 0 and row["roof"] > 0 and row["samples"] >= LEAST_ROUNDS
        assert row["who"] != report.OURS or row["ratio"] == 1.0
        kinds = ()
        if row["bench"] == "train":
            kinds = ("activations",)
        elif row["case"].startswith("head") and row["case"].endswith("+backward") and row["dtype"] == "float32":
            kinds = ("extra", "forward", "backward", "results")  # the first three are near 0: see test_benchmarks_train
        assert tuple(row["memory"]) == kinds and all(
            row["memory"][k] > 0 for k in kinds if k in ("activations", "results")
        )
    assert all(rate > 0 for rate in found["roofline"][0]["flops"].values())
    assert [r["threads"] for r in found["roofline"]] == [1]
    assert len(list(tmp_path.iterdir())) == 1
    assert "nothing here is a measurement" in run.stdout


@pytest.mark.slow
def test_only_the_roofline():
    run = benchmarks("--quick", "--threads", "2", "--only", "roofline")
    assert run.returncode == 0, run.stderr
    assert "1 thread" in run.stdout and "2 threads" in run.stdout and "x pykern" not in run.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "everything"], "argument --only: invalid choice: 'everything'"),
        (["--threads", "0"], "--threads is 0, expected 1..1024"),
        (["--seconds", "-1"], "--seconds is -1.0, expected a number between 0 and 3600"),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
    ],
)
def test_refused(arguments, words):
    run = benchmarks(*arguments)
    assert run.returncode == 2 and words in run.stderr and not run.stdout
