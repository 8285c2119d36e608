"""The GPU benchmarks without a GPU: order, budget, going on, failures, ratios and table, on a clock of our own."""

import json
from dataclasses import fields, replace

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import case as cases_of
from benchmarks.gpu import cases_attention, ceilings, document, machine, makers, run, table, timer
from benchmarks.gpu.case import BACKWARD, FORWARD, OURS, TRAINING, Case, Source
from benchmarks.gpu.document import Document, Row
from benchmarks.gpu.timer import DeviceLost, FakeTimer
from pykern import _C

pytestmark = pytest.mark.one_isa
CPU = torch.device("cpu")
KERNELS = ["negate"]


def case(name, priority=1, makers=None, kernels=("negate",), **changes):
    """-x for x [4]."""
    makers = makers or {"torch": lambda: torch.neg, "rival": lambda: lambda x: -x, OURS: lambda: lambda x: -x}
    inputs = lambda source: (source.leaf(4, dtype=torch.float32),)  # noqa: E731
    return replace(Case(name, "G11", priority, torch.float32, "M4", 32.0, 0.0, inputs, makers, kernels), **changes)


def new_document(path, gpu="a GPU"):
    found = Document.load(path)
    found.gpu = gpu
    found.runs.append({"machine": {"gpu": gpu}, "steps": {}})
    return found


def timed(cases, path, *, seconds=1e9, clock=None, kernels=KERNELS, gpu="a GPU"):
    """The document after a run, as it is read back from its file."""
    clock = clock or FakeTimer()
    doc = new_document(path, gpu)
    run.run_cases(cases, doc, clock, CPU, run.Budget(clock, seconds), list(kernels), 0.1)
    return Document.load(path)


def whos(doc, name):
    return [row["contestant"] for row in doc.rows if row["case"].startswith(name)]


def names(doc):
    return [f["case"].split(" |")[0] for f in doc.finished]


# ---- order, budget, going on


def test_cases_run_by_priority(tmp_path):
    doc = timed([case("c", 3), case("a", 1), case("d", 3), case("b", 2)], tmp_path / "x.json")
    assert names(doc) == ["a", "b", "c", "d"] and doc.runs[-1]["left"] == [] and doc.running is None
    assert whos(doc, "a") == ["torch", "rival", OURS]  # a rival's result is what the others are compared to


def test_a_case_that_does_not_fit_is_left_and_a_smaller_one_runs(tmp_path):
    big = case("big", 2, {f"torch.compile {i}": lambda: torch.neg for i in range(5)})
    doc = timed([case("first", 1), big, case("small", 3)], tmp_path / "x.json", seconds=20)
    assert names(doc) == ["first", "small"] and doc.runs[-1]["left"] == [big.key]
    doc = timed([case("first", 1), big, case("small", 3)], tmp_path / "x.json", seconds=400)
    assert names(doc) == ["first", "small", "big"] and doc.runs[-1]["left"] == []


def test_estimates_follow_what_cases_took(tmp_path):
    clock = FakeTimer(setup=9.0)  # far more than estimated
    budget = run.Budget(clock, 100.0)
    assert run.estimate(case("a"), ["torch", "rival"], 0.1) == pytest.approx(0.8) and budget.fits(0.8)
    doc = new_document(tmp_path / "x.json")
    run.run_cases([case(str(i)) for i in range(9)], doc, clock, CPU, budget, KERNELS, 0.1)
    taken = clock.now()
    assert 0 < len(doc.runs[-1]["left"]) < 9 and taken <= 100.0 and taken + taken / len(doc.finished) > 100.0


def test_a_second_call_goes_on_with_the_rest(tmp_path):
    cases, path = [case(str(i)) for i in range(6)], tmp_path / "x.json"
    first = timed(cases, path, seconds=8)
    assert 0 < len(first.finished) < 6
    clock = FakeTimer()
    second = timed(cases, path, clock=clock)
    assert names(second) == [str(i) for i in range(6)] and second.rows[: len(first.rows)] == first.rows
    assert [row["run"] for row in second.rows] == [0] * len(first.rows) + [1] * (18 - len(first.rows))
    clock = FakeTimer()
    assert timed(cases, path, clock=clock).rows == second.rows and clock.samples == []


def test_a_case_is_timed_again_once_pykern_has_its_kernels(tmp_path):
    path = tmp_path / "x.json"
    doc = timed([case("a")], path, kernels=[])
    assert whos(doc, "a") == ["torch", "rival"] and doc.finished[0]["missing"] == ["negate"]
    doc = timed([case("a")], path)
    assert whos(doc, "a") == ["torch", "rival", OURS] and len(doc.finished) == 1 and doc.finished[0]["missing"] == []
    assert timed([case("a")], path, kernels=[]).rows == doc.rows  # and not the other way


def test_another_gpu_has_rows_of_its_own(tmp_path):
    path = tmp_path / "x.json"
    timed([case("a")], path, gpu="one")
    doc = timed([case("a")], path, gpu="two")
    assert [row["gpu"] for row in doc.rows] == ["one"] * 3 + ["two"] * 3
    text = table.markdown(doc)
    assert text.index("## one") < text.index("## two")


def test_a_contestant_may_go_backward_in_a_context():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            filled = torch.utils.deterministic.fill_uninitialized_memory
            seen.append(torch.are_deterministic_algorithms_enabled() and not filled)
            return dout

    function = makers.same_bits(lambda: Watched.apply)()
    (call,) = cases_of.calls(BACKWARD, function, [(torch.ones(3, requires_grad=True),)])
    call()
    assert seen == [False, True] and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


# ---- failures


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path):
    def broken():
        raise KeyError("no such\nkernel")

    def wrong(x):
        raise ValueError("that shape")

    contestants = {"torch": lambda: torch.neg, "made": broken, "called": lambda: wrong, OURS: lambda: torch.neg}
    doc = timed([case("a", makers=contestants), case("b")], tmp_path / "x.json")
    assert whos(doc, "a") == ["torch", OURS] and whos(doc, "b") == ["torch", "rival", OURS]
    texts = {f["contestant"]: f["text"] for f in doc.failures}
    assert texts == {"made": "KeyError: 'no such\\nkernel'", "called": "ValueError: that shape"}
    assert "| a GPU | a / M4 / float32 / forward | called | ValueError: that shape |" in table.markdown(doc)


def test_inputs_that_fail_leave_a_case_without_rows(tmp_path):
    def inputs(source):
        raise torch.OutOfMemoryError("too large")

    doc = timed([case("a", inputs=inputs), case("b")], tmp_path / "x.json")
    assert names(doc) == ["a", "b"] and whos(doc, "a") == []
    assert doc.failures[0]["contestant"] == run.INPUTS and "too large" in doc.failures[0]["text"]


class BrokenDevice(FakeTimer):
    """A context that is lost once `who` has run."""

    def __init__(self, who):
        super().__init__()
        self.who, self.lost = who, False

    def prepare(self, who, calls):
        self.lost = who == self.who
        self.check()
        return super().prepare(who, calls)

    def check(self):
        if self.lost:
            raise DeviceLost("an illegal memory access")


def test_who_breaks_the_device_is_recorded_and_does_not_run_again(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(DeviceLost):
        timed([case("a"), case("b")], path, clock=BrokenDevice("rival"))
    doc = Document.load(path)
    assert doc.finished == [] and doc.running is None
    assert [(f["contestant"], f["fatal"]) for f in doc.failures] == [("rival", True)]
    doc = timed([case("a"), case("b")], path)
    assert whos(doc, "a") == ["torch", OURS] and whos(doc, "b") == ["torch", "rival", OURS]
    assert [(f["contestant"], f["fatal"]) for f in doc.failures] == [("rival", True)]


def test_a_wrong_result_is_marked(tmp_path):
    contestants = {"torch": lambda: torch.neg, "wrong": lambda: lambda x: x, "nan": lambda: lambda x: x * torch.nan}
    doc = timed([case("a", makers=contestants)], tmp_path / "x.json")
    found = {row["contestant"]: row["difference"] for row in doc.rows}
    assert found["torch"] is None and found["wrong"] == 2.0 and found["nan"] == cases_of.NOT_FINITE
    assert [row["ratio"] for row in doc.rows] == pytest.approx([1.0] * 3, rel=0.03)
    assert doc.rows[0]["ratio"] == 1.0  # the only one that is right is the best
    text = table.markdown(doc)
    assert "wrong (result differs by 2)" in text and "nan (result is not finite)" in text


# ---- numbers


def test_ratios_and_ceilings(tmp_path):
    clock = FakeTimer({"torch": 4e-3, "rival": 2e-3, OURS: 1e-3})
    doc = new_document(tmp_path / "x.json")
    doc.ceilings = {"a GPU": {"copy": {"rate": 64e3, "best": 65e3, "unit": "B/s"}}}  # 32 bytes take 0.5 ms
    run.run_cases([case("a")], doc, clock, CPU, run.Budget(clock, 1e9), KERNELS, 0.1)
    rows = {row["contestant"]: row for row in doc.rows}
    assert [rows[who]["ratio"] for who in ("torch", "rival", OURS)] == pytest.approx([0.5, 1.0, 2.0], rel=0.03)
    assert rows[OURS]["ceiling"] == pytest.approx(0.5, rel=0.02) and rows[OURS]["bound"] == "copy"
    assert rows[OURS]["low_us"] <= rows[OURS]["median_us"] <= rows[OURS]["high_us"]
    text = table.markdown(doc)
    assert ("| G11 | 1 | 1 | 2.0" in text and "50% copy" in text) or "49% copy" in text


def test_which_ceiling_bounds_a_case():
    rates = {"copy": {"rate": 1e3}, "read": {"rate": 2e3}, "bf16": {"rate": 1e6}}
    one = case("a", dtype=torch.bfloat16, moved=1e3, flops=5e5)
    assert run.least_seconds(one, rates) == (1.0, "copy")
    assert run.least_seconds(replace(one, traffic="read"), rates) == (0.5, "read")
    assert run.least_seconds(replace(one, flops=3e6), rates) == (3.0, "bf16")
    assert run.least_seconds(replace(one, dtype=torch.float16), rates) == (None, "fp16")


def test_contestants_take_turns():
    clock = FakeTimer()
    ready = {who: clock.prepare(who, [lambda: None]) for who in "ab"}
    samples = timer.interleave(clock, ready, 0.0)
    assert "".join(clock.samples) == "abba" * 4 + "ab" and len(samples["a"]) == timer.LEAST_ROUNDS
    assert timer.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timer.speed_ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == 1.0


def test_sets_of_inputs_are_larger_than_the_caches():
    clock = FakeTimer()
    clock.cold_bytes = 100.0
    sets = run.input_sets(case("a"), clock, CPU)
    assert len(sets) == 4 and len({x[0].item() for (x,) in sets}) == 4
    assert len(run.input_sets(case("a", one_set=True), clock, CPU)) == 1
    clock.cold_bytes = 1e9
    assert len(run.input_sets(case("a"), clock, CPU)) == run.MOST_SETS


def test_ceilings_are_rates_of_the_work():
    clock = FakeTimer({name: 1e-3 for name in ceilings.NAMES})
    found = ceilings.measure(clock, CPU, tiny=True)
    assert list(found) == ["copy", "read", "bf16", "fp16", "tf32", "fp32"]
    assert found["copy"]["rate"] == pytest.approx(2e3 * ceilings.TINY_BYTES, rel=0.02)
    assert found["bf16"]["best"] == pytest.approx(2e3 * ceilings.TINY_N**3)
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_a_call_does():
    """Forward, backward alone, both; the same dout in each call and for each contestant."""
    (x,) = case("a").inputs(Source(CPU, 0, True))
    assert x.requires_grad and not case("a").inputs(Source(CPU, 0, False))[0].requires_grad
    square = lambda x: x * x  # noqa: E731
    (dout,) = cases_of.douts([square(x)])
    (forward,), (backward,), (both,) = (cases_of.calls(m, square, [(x,)]) for m in (FORWARD, BACKWARD, TRAINING))
    assert torch.equal(forward(), x * x)
    for call in (backward, backward, both, both):
        torch.testing.assert_close(call()[0], 2 * x.detach() * dout)
    with pytest.raises(ValueError, match="no mode 'sideways'"):
        cases_of.calls("sideways", square, [])


# ---- the file


def test_the_file(tmp_path):
    path = tmp_path / "x.json"
    timed([case("a")], path)
    content = json.loads(path.read_text())
    assert sorted(content) == ["ceilings", "failures", "finished", "gpu", "rows", "running", "runs", "schema"]
    assert content["schema"] == document.SCHEMA
    assert [sorted(row) for row in content["rows"]] == [sorted(f.name for f in fields(Row))] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    for text, words in (("{", "is not JSON"), ('{"schema": 0}', "not a file of schema 1"), ("[]", "not a file of")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            Document.load(path)


# ---- the cases


def test_the_real_cases():
    found = program.all_cases(False)
    keys = [c.key for c in found]
    assert len(set(keys)) == len(keys) and [c.priority for c in found] == sorted(c.priority for c in found)
    assert {f"G{i}" for i in range(1, 17)} <= {c.goal for c in found}
    kernels = {name for name in dir(_C) if not name.startswith("_")}
    kernels |= {f"lm_{name}" for name in dir(_C.LmModel) if not name.startswith("_")}
    for one in found:
        assert one.rivals() and one.moved > 0 and set(one.kernels) <= kernels and one.traffic in ceilings.NAMES
        assert bool(one.kernels) == (OURS in one.makers)
    first = [c for c in found if c.priority <= 2]  # attention and decoding, never timed with pykern's kernels before
    assert sum(run.estimate(c, list(c.makers)) for c in first) < 240  # what a first call of 8 minutes has time for
    assert {c.goal for c in first} == {f"G{i}" for i in (4, 5, 6, 7, 8, 9, 10)}
    quick = [c for c in found if c.priority == 1]
    assert sum(run.estimate(c, list(c.makers)) for c in quick) < 60
    assert {c.goal for c in quick} >= {f"G{i}" for i in (4, 5, 6, 9, 10)}


# Which contestants do not exist on the CPU, and what they say.
NOT_HERE = {"sdpa cudnn": "No viable backend", "sdpa efficient": "No viable backend", "cublas": "aten::mm.dtype"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_contestants_of_a_case_compute_the_same(tmp_path, monkeypatch):
    """In half precision to a few roundings. torch.compile compiles nothing here, and Flex has no backward on CPUs."""
    for module in (makers, cases_attention):
        monkeypatch.setattr(module, "compiled", lambda function, mode=None: lambda: function)
    found = program.all_cases(True)
    kernels = sorted({kernel for c in found for kernel in c.kernels})
    doc = timed(found, tmp_path / "x.json", kernels=kernels)
    assert len(doc.finished) == len(found) and doc.runs[-1]["left"] == []
    for row in doc.rows:
        assert row["difference"] is None or row["difference"] < 0.03, row
    reached = {(row["case"], row["contestant"]) for row in doc.rows}
    assert {(c.key, OURS) for c in found if OURS in c.makers} <= reached
    for failure in doc.failures:
        who, text = failure["contestant"], failure["text"]
        if who == "flex attention":
            assert failure["case"].endswith(BACKWARD) and "NotImplementedError" in text, failure
        else:
            assert any(who.startswith(start) and words in text for start, words in NOT_HERE.items()), failure


# ---- the machine


def test_kernels_of_an_extension(monkeypatch):
    monkeypatch.delattr(_C, "cuda_kernels", raising=False)
    kernels, note = machine.cuda_kernels()
    assert kernels == [] and "its extension has no cuda_kernels(), taken as no kernels" in note
    monkeypatch.setattr(_C, "cuda_kernels", lambda: ["rope"], raising=False)
    assert machine.cuda_kernels() == (["rope"], "")
    monkeypatch.setattr(_C, "cuda_kernels", list, raising=False)
    assert "has no CUDA kernels (" in machine.cuda_kernels()[1]


def test_facts_and_libraries():
    facts = machine.facts(CPU)
    assert facts["gpu"] == "no GPU" and facts["torch"] == torch.__version__
    assert set(makers.LIBRARIES) <= set(facts)
    assert makers.library("no_such_library", "who", lambda: None) == {}
