"""Training on two processes: the curve of one process with twice the batch, whole (DDP) and sharded (FSDP2)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_run import BATCH, STEPS, new_trainer

from pykern.cli import main
from pykern.lm import Data, Trainer, Transformer
from pykern.lm.plot import read_rows

pytestmark = [pytest.mark.one_isa, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]


def torchrun(*command: str, timeout: float = 300) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *command]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    text = folder / "text.txt"
    # lines of 2 to 14 tokens: ranks have as many rows, but not as many targets
    text.write_text("".join(f"{n} and {n + 1} are {2 * n + 1}"[: 1 + n * n % 14] + "\n" for n in range(800)))
    torchrun(str(ROOT / "tests" / "ranks_run.py"), str(text), str(folder))
    new_trainer(Data.load(text), folder / "one", 2 * BATCH).run()
    return folder


def curve(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_rows(folder / "loss.csv")]


@pytest.mark.parametrize("name", ["whole", "shard"])
def test_two_ranks_follow_one_process_with_twice_the_batch(runs, name):
    for column in ("loss", "grad_norm", "tokens"):
        assert curve(runs / name, column) == pytest.approx(curve(runs / "one", column), rel=2e-6)
    assert len(curve(runs / name, "loss")) == STEPS


@pytest.mark.parametrize("batches", ["padded", "packed"])
@pytest.mark.parametrize("name", ["whole", "shard"])
def test_two_ranks_with_texts_follow_one_process_with_twice_the_batch(runs, name, batches, tmp_path):
    """Though the rank with fewer targets weighs less than the other."""
    lines = Data.load(runs / "text.txt", split="lines")
    one = new_trainer(lines, tmp_path / "one", 2 * BATCH, batches=batches)
    one.run()
    steps = [one.batches.at(step) for step in range(STEPS)]
    shares = [batch.part(0, 2).tokens / batch.tokens for batch in steps]
    assert max(abs(share - 0.5) for share in shares) > (0.1 if batches == "padded" else 0.01)
    for column in ("loss", "grad_norm", "tokens"):
        assert curve(runs / f"{name} {batches}", column) == pytest.approx(curve(tmp_path / "one", column), rel=2e-6)
    assert curve(tmp_path / "one", "tokens")[-1] == sum(batch.tokens for batch in steps)


def test_each_rank_holds_its_part(runs):
    for rank in range(2):
        found = json.loads((runs / f"rank{rank}.json").read_text())
        assert found["whole"] == {"rank": rank, "size": 2, "held": 1.0}
        assert found["shard"]["held"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ["whole", "shard"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs, name):
    straight, resumed = (Transformer.load(runs / folder).state_dict() for folder in (name, f"{name} resumed"))
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    assert curve(runs / f"{name} resumed", "loss") == curve(runs / name, "loss")[STEPS // 2 :]


def test_one_process_goes_on_where_sharded_ones_stopped(runs, tmp_path):
    text = Data.load(runs / "text.txt")
    trainer = Trainer.resume(runs / "shard", text)
    assert trainer.step == STEPS and trainer.batches.batch_size == BATCH
    moments = {name: trainer.optimizer.prepare(p)["exp_avg_sq"] for name, p in trainer.model.named_parameters()}
    whole = Trainer.resume(runs / "one", text)
    for name, p in whole.model.named_parameters():
        torch.testing.assert_close(moments[name], whole.optimizer.prepare(p)["exp_avg_sq"], rtol=1e-4, atol=1e-9)


def test_sharded_masters_are_those_of_one_process(runs, tmp_path):
    new_trainer(Data.load(runs / "text.txt"), tmp_path / "one", 2 * BATCH, dtype="bfloat16").run()
    assert curve(runs / "half", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), rel=2e-3)
    assert Transformer.load(runs / "half").dtype == torch.float32


def test_the_command_reports_once(runs, tmp_path):
    shape = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "8", "--steps", "2"]
    out = tmp_path / "out"
    done = torchrun("-m", "pykern.lm.train", "--data", str(runs / "text.txt"), "--out", str(out), "--shard", *shape)
    assert done.stdout.count("held-out loss") == 1 and done.stdout.count("checkpoint:") == 1
    assert len(read_rows(out / "loss.csv")) == 2


def test_shard_needs_torchrun(tmp_path, capsys):
    assert main(["train", "--data", "stdlib", "--out", str(tmp_path / "out"), "--shard"]) == 1
    assert "--shard needs several processes: torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
