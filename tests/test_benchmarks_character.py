"""python -m benchmarks.character: two steps of it, and the machine beside the numbers."""

import json

import pytest
import torch

from benchmarks import character, report

pytestmark = pytest.mark.one_isa


def test_two_steps_and_the_machine_in_the_file(tmp_path, capsys):
    (tmp_path / "text").write_text("the cat sat on the mat, the hat\n" * 200)
    threads = str(torch.get_num_threads())
    arguments = ["--data", str(tmp_path / "text"), "--steps", "2", "--threads", threads]
    character.main([*arguments, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    machine = found.pop("machine")
    assert machine.keys() == report.machine().keys()
    assert machine["isa"] == report.machine()["isa"] and machine["torch"] == torch.__version__
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(found)
    assert found["held-out loss, pykern"] == pytest.approx(found["held-out loss, torch"], rel=1e-4)
