"""roofline: the loops do all the work that they report, and what they read and copy is all that they were given."""

import time

import numpy as np
import pytest
import torch

from pykern import _C

LANES = {"v4_bf16": 16, "v4": 16, "v3": 8, "base": 4}  # numbers of float32 in a register
CHAINS = 12
NOT_FASTER = 2e12  # operations per second and thread: no processor does it, a loop that the compiler removed would


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_multiply_adds_are_counted_and_made(dtype, threads):
    sink = torch.zeros(threads, dtype=dtype)
    start = time.perf_counter()
    flops = _C.roofline_fma(sink, repeats=50_000)
    elapsed = time.perf_counter() - start
    width = 4 * LANES[_C.isa()] // max(4, dtype.itemsize)  # half precision is computed in float32 ...
    pairs = 2 if dtype == torch.bfloat16 and _C.isa() == "v4_bf16" else 1  # ... or in pairs
    assert flops == 2 * width * pairs * CHAINS * 50_000 * threads
    assert flops / elapsed / threads < NOT_FASTER
    assert sink.isfinite().all() and (sink == sink[0]).all() and sink[0] >= CHAINS * width


@pytest.mark.parametrize("n", [1, 2, 129, 5003])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_every_number_is_read_as_often_as_asked(n, tasks):
    source = (np.arange(n) % 7 + 1).astype(np.float32)
    sink = np.zeros(tasks, np.float32)
    _C.roofline_read(source, sink, repeats=5)
    assert sink.sum() == 5 * source.sum()
    part = n // tasks
    assert sink[0] == 5 * source[: part if tasks > 1 else n].sum()


def test_reading_takes_its_time():
    source, sink = np.ones(1 << 14, np.float32), np.zeros(1, np.float32)
    start = time.perf_counter()
    _C.roofline_read(source, sink, repeats=2000)
    assert source.nbytes * 2000 / (time.perf_counter() - start) < NOT_FASTER


@pytest.mark.parametrize("n", [1, 2, 129, 5003])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_every_number_is_copied(n, tasks):
    source, buffer = np.arange(n, dtype=np.float32), np.full(n + 2, -1, np.float32)
    _C.roofline_copy(source, buffer[1 : n + 1], tasks=tasks, repeats=2)
    np.testing.assert_array_equal(buffer, np.concatenate([[-1], source, [-1]]))


@pytest.mark.one_isa
def test_refusals():
    x, y, s = np.ones(4, np.float32), np.ones(4, np.float32), np.ones(1, np.float32)
    cases = [
        (lambda: _C.roofline_fma(s, repeats=0), ValueError, "repeats is 0, expected at least 1"),
        (lambda: _C.roofline_fma(np.ones(2, int), repeats=1), TypeError, "sink has dtype int64, expected float32"),
        (lambda: _C.roofline_fma(np.ones((2, 2)), repeats=1), ValueError, r"sink must be \[n\], got shape \[2, 2\]"),
        (lambda: _C.roofline_read(x[:0], s, repeats=1), ValueError, "source is empty"),
        (lambda: _C.roofline_read(x[::2], s, repeats=1), ValueError, r"source of shape \[2\] must be contiguous"),
        (lambda: _C.roofline_read(x, x[:1], repeats=1), ValueError, "sink shares memory with source"),
        (
            lambda: _C.roofline_read(x.astype(float), s, repeats=1),
            TypeError,
            "source has dtype float64, expected float32",
        ),
        (
            lambda: _C.roofline_copy(x, y[:3], tasks=1, repeats=1),
            ValueError,
            r"target has shape \[3\] but source has \[4\]",
        ),
        (lambda: _C.roofline_copy(x, x, tasks=1, repeats=1), ValueError, "target shares memory with source"),
        (lambda: _C.roofline_copy(x, y, tasks=0, repeats=1), ValueError, "tasks is 0, expected at least 1"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=f"roofline: {words}"):
            call()
