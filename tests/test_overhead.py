"""python -m pykern.testing.overhead: what it measures and how, on a clock of our own, and its table."""

import pytest
import torch

from pykern.testing import overhead

pytestmark = pytest.mark.one_isa


def test_both_sides_of_a_row_compute_the_same():
    for name, ((ours, theirs), inputs) in overhead.cases().items():
        # float32, sums of 16 numbers in another order
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-5, atol=1e-6, msg=name)


def test_the_median_of_turns_without_the_first(monkeypatch):
    clock = {"now": 0}
    monkeypatch.setattr(overhead.time, "process_time_ns", lambda: clock["now"])
    order = []
    costs = {"a": iter([9000] + [1000] * 10 + [5000] * 10 + [2000] * 10), "b": iter([9000] + [3000] * 30)}

    def call(name):
        order.append(name)
        clock["now"] += next(costs[name])

    found = overhead.alternating([lambda: call("a"), lambda: call("b")], calls=10, repeats=3)
    assert found == [2.0, 3.0]  # microseconds
    assert "".join(order) == "ab" + ("a" * 10 + "b" * 10) * 3


def test_the_command(capsys, monkeypatch):
    one = {"gelu": overhead.cases()["gelu [2, 16]"]}
    monkeypatch.setattr(overhead, "cases", lambda: one)
    threads = torch.get_num_threads()
    try:
        overhead.main(["--calls", "2", "--repeats", "1", "--backend", "aot_eager"])
    finally:
        torch.set_num_threads(threads)
        overhead.pykern.set_num_threads(0)
    first, _, head, rule, row = capsys.readouterr().out.splitlines()
    assert "one thread" in first and "median of 1 times 2 calls" in first
    assert head.count("|") == rule.count("|") == row.count("|") == 8
    assert "pykern, torch.compile (aot_eager), no_grad" in head
    assert all(float(number) > 0 for number in row.split("|")[2:-1])


def test_refusals(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--calls", "0"])
    assert "--calls and --repeats must be 1 or more" in capsys.readouterr().err
