"""python -m benchmarks.commands: no command is left out, a row is a measurement, a failure is told."""

import pytest

from benchmarks import commands
from pykern.cli import make_parser

pytestmark = pytest.mark.one_isa


def test_every_command_is_measured():
    (subparsers,) = (action for action in make_parser()._actions if action.dest == "command")
    assert {label.split()[0] for label in commands.COMMANDS} == set(subparsers.choices)
    for label, line in commands.COMMANDS.items():
        assert all(word in line for word in label.split())


def test_a_row_is_a_measurement(tmp_path):
    seconds, megabytes, failure = commands.measure(["--help"], tmp_path)
    assert failure == ""
    assert 0.0 < seconds < 60.0
    assert 5.0 < megabytes < 1000.0


def test_the_peak_is_not_that_of_who_measures(tmp_path):
    """`--help` imports little; the process that measures it holds a gigabyte."""
    held = bytearray(2**30)
    held[::4096] = b"x" * len(held[::4096])  # so that the pages are there
    assert commands.measure(["--help"], tmp_path)[1] < len(held) / 2**20 / 2


def test_a_command_that_fails_is_told(tmp_path):
    *_, failure = commands.measure(["train", "--data", "nowhere.txt", "--out", "model"], tmp_path)
    assert failure.startswith("exit code 1") and "nowhere.txt" in failure


def test_an_unknown_label_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["commands", "--only", "order,nothing"])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert "'nothing' is none of" in capsys.readouterr().err


def test_rows_run_what_they_are_told():
    table = list(commands.rows("stdlib", ["order"]))
    assert len(table) == 3 and table[2].startswith("| `pykern order` |")
