"""pykern evaluate --task icl: the table and the picture of its results, the command, and what it refuses."""

import json

import pytest

from pykern.cli import main
from pykern.cli.icl import break_even, parsed_shots, short, table
from pykern.lm.icl import ShotsResult
from pykern.lm.icl_plot import plot_shots

pytestmark = pytest.mark.one_isa


def row(**changes):
    values = dict(method="in context", shots=8, queries=100, correct=90, low=0.8, high=0.95, optimal=1.0)
    values |= dict(seconds_task=0.0, seconds_query=0.002, flops_task=0, flops_query=180)
    return ShotsResult(**(values | changes))


def test_break_even_is_the_first_query_that_saves():
    assert break_even(row(flops_task=1600, flops_query=20), row()) == "11"  # 11 * 180 = 1980 > 1600 + 220, 10: equal
    assert break_even(row(), row()) == "-"


def test_the_table_has_a_row_for_each_result():
    both = table([row(shots=0), row(shots=8), row(method="fine-tuned", flops_task=1600, flops_query=20)]).splitlines()
    assert len(both) == 4 and "cheaper from queries" in both[0] and both[3].endswith("11")
    one = table([row()])
    assert "MFLOP/task" not in one and "90.0%" in one and "80.0% to 95.0%" in one
    assert [short(x) for x in (0, 0.0012345, 4.567, 123.4, 12345.6)] == ["-", "0.00123", "4.57", "123", "12,346"]


def test_the_picture_is_written_whole(tmp_path):
    plot_shots([row(), row(shots=0), row(method="fine-tuned", flops_task=9)], tmp_path / "a.png", chance=0.25)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no results"):
        plot_shots([], tmp_path / "b.png", chance=0.25)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_the_command_trains_compares_and_draws(tmp_path, capsys):
    out, png = tmp_path / "m", tmp_path / "shots.png"
    trained = ["evaluate", "--task", "icl", "--out", str(out), "--steps", "2", "--shots", "0,2", "--episodes", "8"]
    assert main([*trained, "--seed", "3"]) == 0
    printed = capsys.readouterr()
    assert "no --model: training one" in printed.err and "step 2/2" in printed.err and "62.50%" in printed.out
    assert "chance 25%" in printed.out and (out / "model.safetensors").exists()
    compared = ["evaluate", "--task", "icl", "--model", str(out), "--shots", "0,1", "--compare", "finetune"]
    assert main([*compared, "--episodes", "3", "--plot", str(png), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["shots"], r["queries"]) for r in values["rows"]] == [
        ("in context", 0, 3),
        ("in context", 1, 3),
        ("fine-tuned", 0, 3),
        ("fine-tuned", 1, 3),
    ]
    assert values["chance"] == 0.25 and values["training_seconds"] is None
    assert png.read_bytes().startswith(b"\x89PNG")


def test_shots_on_the_command_line():
    assert parsed_shots("0,1,16") == [0, 1, 16]
    for text in ("", "1,", "1;2", "-1", "1.5", "²", "9999999"):
        with pytest.raises(ValueError, match=r"--shots is .* whole numbers with commas"):
            parsed_shots(text)


ICL = ["evaluate", "--task", "icl"]
REFUSALS = {
    "no model": (ICL, "needs --model, or --out"),
    "model and out": ([*ICL, "--model", "m", "--out", "{new}"], "not both"),
    "shots": ([*ICL, "--out", "{new}", "--shots", "0,x"], "--shots is '0,x'"),
    "shots beyond the block": (
        [*ICL, "--out", "{new}", "--shots", "16"],
        "16 shots are 34 tokens but block_size is 32",
    ),
    "repeated shots": ([*ICL, "--out", "{new}", "--shots", "1,1"], "all different"),
    "episodes": ([*ICL, "--out", "{new}", "--episodes", "0"], "--episodes is 0"),
    "seed": ([*ICL, "--out", "{new}", "--seed", "-1"], "--seed is -1"),
    "batch size": ([*ICL, "--out", "{new}", "--batch-size", "0"], "--batch-size is 0"),
    "steps": ([*ICL, "--out", "{new}", "--steps", "0"], "steps is 0"),
    "steps of a model": ([*ICL, "--model", "m", "--steps", "3"], "--steps does not go with --model"),
    "data": ([*ICL, "--out", "{new}", "--data", "stdlib"], "--data does not go with --task icl"),
    "baseline": ([*ICL, "--out", "{new}", "--baseline"], "--baseline does not go with --task icl"),
    "an option of models": ([*ICL, "--out", "{new}", "--minutes", "1"], "--minutes does not go with --task icl"),
    "another comparison": ([*ICL, "--out", "{new}", "--compare"], "--compare is 'models' but must be finetune"),
    "folder of the picture": ([*ICL, "--out", "{new}", "--plot", "{new}/x.png"], "--plot: no such folder"),
    "a folder that is a file": ([*ICL, "--out", "{file}"], "is not a folder"),
    "no such model": ([*ICL, "--model", "{new}"], "no such checkpoint folder"),
    "shots without the task": (["evaluate", "--model", "m", "--data", "d", "--shots", "1"], "--shots goes with --task"),
    "finetune without the task": (
        ["evaluate", "--model", "m", "--data", "d", "--compare", "finetune"],
        "--compare finetune goes with --task icl only",
    ),
    "no data": (["evaluate", "--model", "m"], "--data is missing"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_command_refuses_in_one_line(case, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    arguments, words = REFUSALS[case]
    places = {"new": str(tmp_path / "new"), "file": str(tmp_path / "file")}
    assert main([argument.format(**places) for argument in arguments]) == 1
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert line.startswith("pykern evaluate: ") and words in line and printed.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_task_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--task", "sums"])
    assert stopped.value.code == 2 and "invalid choice: 'sums'" in capsys.readouterr().err
