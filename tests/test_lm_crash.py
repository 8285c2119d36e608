"""A process is killed at every file operation of a save; what it leaves is the old checkpoint or the new one."""

import subprocess
import sys

import pytest

KILL = """
import os, sys, torch
from pathlib import Path
from pykern.lm.checkpoint import load_checkpoint, save_checkpoint
from pykern.lm.config import Config
from pykern.lm.tokenizer import Tokenizer
import safetensors.torch

torch.set_num_threads(1)
BASE = dict(n_layer=1, n_head=2, n_embd=8, block_size=4)
SETS = {
    "old": dict(config=Config(**BASE, vocab_size=256), tensors={"a": torch.zeros(2)}, tokenizer=Tokenizer.train("byte"),
                state={"step": 1}, state_tensors={"m": torch.zeros(2)}),
    "new": dict(config=Config(**BASE, vocab_size=300), tensors={"a": torch.ones(3)}, state={"step": 2},
                tokenizer=Tokenizer.train("character", "abc")),
    "last": dict(config=Config(**BASE, vocab_size=301), tensors={"b": torch.ones(1)},
                 state_tensors={"m": torch.ones(4)}),
}


def same(one, other):
    one, other = one or {}, other or {}
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def found(folder):
    loaded = load_checkpoint(folder)
    for name, wanted in SETS.items():
        if (loaded.config == wanted["config"] and same(loaded.tensors, wanted["tensors"])
                and getattr(loaded.tokenizer, "kind", None) == getattr(wanted.get("tokenizer"), "kind", None)
                and loaded.state == wanted.get("state") and same(loaded.state_tensors, wanted.get("state_tensors"))):
            return name
    return f"a mixture: {loaded}"


def save_and_die(folder, name, event_number):
    left = event_number

    def audit(event, arguments):
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            left -= 1
            if left == 0:
                os._exit(9)

    child = os.fork()
    if child == 0:
        sys.addaudithook(audit)
        save_checkpoint(folder, **SETS[name])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


root = Path(sys.argv[1])
again = int(sys.argv[2])  # die a second time, in the save after the first, at this event
for event_number in range(1, 500, 4 if again else 1):
    folder = root / str(event_number)
    save_checkpoint(folder, **SETS["old"])
    status = save_and_die(folder, "new", event_number)
    outcome = found(folder)
    if again:
        save_and_die(folder, "last", again)
        outcome += "+" + found(folder)
    if status == 0 or not again:
        save_checkpoint(folder, **SETS["last"])
        assert found(folder) == "last" and not any(path.name.startswith(".") for path in folder.iterdir())
    print(status, outcome)
    if status == 0:
        break
"""


def killed(folder, again):
    run = subprocess.run(
        [sys.executable, "-c", KILL, str(folder), str(again)], text=True, capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return [line.split(" ", 1) for line in run.stdout.splitlines()]


def test_killed_at_any_moment_the_checkpoint_is_the_old_or_the_new_one(tmp_path):
    lines = killed(tmp_path, 0)
    outcomes = [outcome for _, outcome in lines]
    assert [status for status, _ in lines] == ["9"] * (len(lines) - 1) + ["0"] and len(lines) > 30
    switch = outcomes.index("new")
    assert outcomes == ["old"] * switch + ["new"] * (len(lines) - switch)
    assert switch > 10 and len(lines) - switch > 5  # kills on both sides of the rename


@pytest.mark.parametrize("again", [2, 8, 14, 20, 26])
def test_killed_twice_the_checkpoint_is_still_whole(tmp_path, again):
    for _, outcome in killed(tmp_path, again):
        first, second = outcome.split("+")
        assert first in ("old", "new") and second in (first, "last")
