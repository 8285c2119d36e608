"""What surrounds the steps of a training run: options, the learning rate, what is shown, the picture of loss.csv."""

import math
import os
import select

import pytest
import torch
from lm_training import changed, make_trainer

from pykern.lm import TrainOptions
from pykern.lm.plot import plot, smoothed
from pykern.lm.progress import Lines, Status, duration, peak_gflops, reporter


def test_learning_rate():
    linear = TrainOptions(steps=100, lr=1.0, final_lr=0.0, warmup=9, schedule="linear")
    assert linear.learning_rate(0) == pytest.approx(0.1)
    assert linear.learning_rate(9) == pytest.approx(0.91)
    assert linear.learning_rate(50) == pytest.approx(0.5)
    assert linear.learning_rate(100) == pytest.approx(0.0)
    cosine = TrainOptions(steps=100, lr=2.0, final_lr=0.1, warmup=0)
    assert cosine.learning_rate(0) == pytest.approx(2.0)
    assert cosine.learning_rate(50) == pytest.approx(1.1)
    assert cosine.learning_rate(100) == pytest.approx(0.2)
    assert TrainOptions(steps=10, lr=3.0, warmup=0, schedule="constant").learning_rate(9) == 3.0
    clock = TrainOptions(steps=None, minutes=2.0, lr=1.0, final_lr=0.0, warmup=0, schedule="linear")
    assert clock.learning_rate(7, seconds=90.0) == pytest.approx(0.25)
    both = TrainOptions(steps=10, minutes=1.0)
    assert both.fraction(5, 15.0) == 0.5 and both.fraction(5, 45.0) == 0.75 and both.fraction(20, 0.0) == 1.0


# ---- what is told


def status(**changes):
    values = {
        "step": 250,
        "steps": 1500,
        "fraction": 1 / 6,
        "loss": 2.013,
        "lr": 1e-3,
        "grad_norm": 0.84,
        "tokens_per_second": 25300.0,
        "gflops": 141.0,
        "peak_gflops": 231.0,
        "eta_seconds": 101.0,
    }
    return Status(**values | changes)


def test_status_line():
    assert str(status()) == (
        "step 250/1500 (16.7%) | loss 2.0130 | lr 1.00e-03 | gnorm 0.84 | 25,300 tok/s | "
        "141 GFLOP/s (61% of peak) | eta 1m41s"
    )
    assert str(status(steps=None)).startswith("step 250 (16.7%)")
    assert [duration(s) for s in (9.4, 101, 7380)] == ["9s", "1m41s", "2h03m"]


def test_lines_show_the_first_and_the_last_and_few_between(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert isinstance(reporter(file), Lines)
        lines = Lines(file)
        for step in range(1, 6):
            lines.status(status(step=step))
        lines.note("done")
        lines.close()
    assert [line.split(" ")[1] for line in (tmp_path / "log").read_text().splitlines()[:2]] == ["1/1500", "5/1500"]
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["done"]


def test_bar_on_a_terminal():
    """A pseudo-terminal gets a bar that shows the status, and notes as they are."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        bar = reporter(terminal)
        assert not isinstance(bar, Lines)
        bar.status(status())
        bar.note("a [note] in brackets")
        bar.close()
    shown = b""
    while b"step 250/1500 | loss 2.013" not in shown:  # a terminal hands over its output in pieces
        assert select.select([master], [], [], 10.0)[0], shown
        shown += os.read(master, 1 << 16)
    os.close(master)
    assert b"eta 1m41s" in shown and b"a [note] in brackets" in shown


def test_run_reports(tmp_path):
    class Record:
        def __init__(self):
            self.statuses, self.notes, self.closed = [], [], 0

        def status(self, status):
            self.statuses.append(status)

        def note(self, line):
            self.notes.append(line)

        def close(self):
            self.closed += 1

    record = Record()
    trainer = make_trainer(tmp_path)
    trainer.report = record
    trainer.run()
    assert [s.step for s in record.statuses] == list(range(1, 13)) and record.closed == 1
    assert record.statuses[-1].eta_seconds == 0.0 and record.statuses[-1].fraction == 1.0
    last = record.statuses[-1]
    assert last.gflops == pytest.approx(last.tokens_per_second * trainer.model.config.training_flops_per_token() / 1e9)
    assert any("bits per byte" in line for line in record.notes) and "functions" in record.notes[0]


def test_peak_is_a_rate():
    assert 0.1 < peak_gflops(torch.float32) < 1e6


def test_smoothed_is_a_running_mean():
    values = [float(i) for i in range(120)]
    got = smoothed(values)
    assert got[0] == 0.0 and got[3] == 1.5 and got[119] == sum(values[70:]) / 50


def test_plot_with_a_baseline(tmp_path):
    make_trainer(tmp_path).run()
    plot(tmp_path / "loss.csv", tmp_path / "other.png", title="a title", baselines={"5-gram": 2.0})
    assert (tmp_path / "other.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "loss.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": None}, "nothing would end the run"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"minutes": math.inf}, "minutes is inf"),
        ({"minutes": 0.0}, "minutes must be above 0"),
        ({"beta2": 1.0}, "below 1"),
        ({"final_lr": 2.0}, "final_lr is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"residual_init": "one"}, "residual_init is 'one'"),
        ({"recompute": 1}, "recompute is 1 but must be True or False"),
    ],
)
def test_option_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)
