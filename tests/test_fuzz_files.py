"""What tests/fuzz_files.py found once, and a short run of it; docs/reliability.md has the long ones."""

import random

import fuzz_files
import numpy as np
import pytest

from pykern.lm.batches import load_tokens
from pykern.lm.options import TrainOptions
from pykern.lm.run_state import read_state

pytestmark = pytest.mark.one_isa


def test_no_mutated_file_is_a_defect(tmp_path):
    counts = fuzz_files.fuzz(600, 7, tmp_path, tmp_path / "defects")
    assert [kind for kind, found in counts.items() if found["defects"]] == []
    assert all(found["refused"] > 20 for found in counts.values())
    assert sum(found["read"] for found in counts.values()) > 20  # mutations are not all refused at the first byte


def test_a_defect_is_seen_and_kept(tmp_path, monkeypatch):
    def fails(data):
        raise OverflowError("too large")

    monkeypatch.setattr(fuzz_files, "readers", lambda folder: dict.fromkeys(fuzz_files.seeds(folder), fails))
    counts = fuzz_files.fuzz(12, 0, tmp_path, tmp_path / "defects")
    assert sum(found["defects"] for found in counts.values()) == 12 == len(list((tmp_path / "defects").iterdir()))


def test_a_mutation_repeats():
    data = b'{"a": [1, 2, {"b": 3}], "c": "text"}'
    first, second = (
        [fuzz_files.mutation(data, draw) for _ in range(50)] for draw in (random.Random(3), random.Random(3))
    )
    assert first == second and len(set(first)) > 40


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u2', 'fortran_order': False, 'shape': (",
        f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**63},), }}",
    ],
)
def test_headers_that_numpy_trips_over(header, tmp_path):
    """Python that does not end, a length beyond int64: they were a TokenError and an OverflowError."""
    text = header.encode().ljust(117) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))
    with pytest.raises(ValueError, match=r"x\.npy: not a token file"):
        load_tokens(tmp_path / "x.npy")


def test_an_archive_is_no_token_file(tmp_path):
    np.savez(tmp_path / "x.npz", tokens=np.zeros(3, np.uint16))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy: not a token file"):
        load_tokens(tmp_path / "x.npy")


def test_seconds_beyond_every_float(tmp_path):
    corpus = {"source": "x", "sha256": "", "description": "", "split": None}
    values = {"step": 1, "tokens": 1, "seconds": 10**400, "options": TrainOptions().to_dict(), "corpus": corpus}
    with pytest.raises(ValueError, match="makes no sense"):
        read_state(values, tmp_path)
    assert read_state(values | {"seconds": 3}, tmp_path).seconds == 3.0
