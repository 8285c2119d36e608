"""Peak memory of attention: nothing of size T x S, forward and backward."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.one_isa, pytest.mark.slow]

SCRIPT = """
import gc, torch, pykern

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def train(T, **options):
    q, k, v = (torch.randn(1, 4, T, 64).requires_grad_() for _ in range(3))
    out = pykern.attention(q, k, v, causal=True, **options)
    out.backward(torch.randn_like(out))

options = eval("OPTIONS")
train(64, **options)  # loads what a first call loads
gc.collect()
before = status("VmRSS")
train(8192, **options)
print(status("VmHWM") - before)
"""
TENSOR = 4 * 8192 * 64 * 4  # bytes of q, and of k, v, out, dout, dq, dk, dv
SCRATCH = 40 << 20  # of the threads; the scores of one head would be 256 MiB


@pytest.mark.parametrize(
    "options", ["dict()", "dict(dropout_p=0.1, seed=1, softcap=30.0, sinks=torch.ones(4), window=(4095, 0))"]
)
def test_forward_and_backward_of_8192_rows(options):
    """Inputs, outputs and gradients, and scratch memory that is small beside one head's matrix of scores."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("OPTIONS", options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout)
    assert 8 * TENSOR <= peak <= 8 * TENSOR + SCRATCH, f"{(peak - 8 * TENSOR) / 2**20:.1f} MiB beside the 8 tensors"
