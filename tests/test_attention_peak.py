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
    q, k, v = (torch.randn(1, 12, T, 64).requires_grad_() for _ in range(3))
    out = pykern.attention(q, k, v, causal=True, **options)
    out.backward(torch.randn_like(out))

options = eval("OPTIONS")
train(64, **options)  # loads what a first call loads
gc.collect()
before = status("VmRSS")
train(8192, **options)
print(status("VmHWM") - before)
"""
TENSOR = 12 * 8192 * 64 * 4  # bytes of q, and of k, v, out, dout, dq, dk, dv


@pytest.mark.parametrize(
    "options", ["dict()", "dict(dropout_p=0.1, seed=1, softcap=30.0, sinks=torch.ones(12), window=(4095, 0))"]
)
def test_forward_and_backward_of_8192_rows(options):
    """Within 1.2 times inputs, outputs and gradients; one matrix of scores would be 4 times all of that."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("OPTIONS", options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout)
    assert 8 * TENSOR <= peak <= 1.2 * 8 * TENSOR, (
        f"{peak / TENSOR:.2f} times q, which is {peak / TENSOR / 8:.2f} of the 8"
    )
