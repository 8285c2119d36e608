"""pykern.nn on two processes, whole (DDP) and sharded (FSDP2): the gradients of one process with both inputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from nn_cases import CASES

pytestmark = [pytest.mark.one_isa, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]
WITHOUT_PARAMETERS = {"CrossEntropyLoss", "Sigmoid", "Softmax"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run = [sys.executable, str(ROOT / "tests/nn_ranks_run.py"), str(folder)]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    both = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            both.append(subprocess.Popen([*run, str(rank)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2 in bfloat16"])
def test_two_ranks_are_one_process_with_both_inputs(found, way):
    for rank in range(2):
        assert set(found[rank][way]) == set(CASES) - WITHOUT_PARAMETERS
        for name, seen in found[rank][way].items():
            # bfloat16: some products, each rounded by 2^-9 of its size, in sums that partly cancel
            limit = 0.06 if "bfloat16" in way else 2e-6  # float32: the mean of two, in another order
            assert seen["gradients"] < limit < seen["alone"], (name, seen)
            if "bfloat16" not in way:  # Adam's first step is the sign of the gradient: roundings turn small ones
                assert seen["parameters"] < limit, (name, seen)


def test_each_rank_holds_its_part(found):
    for name in found[0]["DDP"]:
        assert all(rank["DDP"][name]["held"] == 1.0 for rank in found)
        shares = [rank["FSDP2"][name]["held"] for rank in found]
        assert sum(shares) == pytest.approx(1.0) and max(shares) <= 0.6  # five rows are dealt as three and two
