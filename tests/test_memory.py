"""Where the kernels of attention, linear, mlp, decode and linear_cross_entropy read and write.

Nowhere outside the arrays, and at the right place when strides exceed 2^31 elements.
"""

import math
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention import inputs as attention_inputs
from tools import draw

from pykern import _C
from pykern.testing import assert_bitwise

ROOT = Path(__file__).parent.parent
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # address space without memory; in Python's mmap from 3.13 on


def guard_pages(case):
    command = [sys.executable, "tests/guard_pages.py", case]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize(
    "op", ["attention", "attention_options", "unseen", "linear", "mlp", "decode", "linear_cross_entropy"]
)
def test_no_byte_outside_the_arrays(op):
    run = guard_pages(op)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == [op, "ran", "on", _C.isa()]


@pytest.mark.one_isa
def test_a_byte_outside_is_noticed():
    run = guard_pages("broken")
    assert run.returncode == -signal.SIGSEGV and run.stdout.split() == ["True"], run.stdout + run.stderr


# ---- strides beyond 2^31


FAR = (1 << 31) + 64  # elements


def far(x):
    """x with a stride of more than 2^31 elements in each dimension but the last; the gaps take no memory."""
    strides = [FAR * math.prod(x.shape[i + 1 : -1]) for i in range(x.dim() - 1)]
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, [*strides, 1], strict=True))
    try:
        memory = mmap.mmap(-1, span * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no address space of {span * x.element_size() >> 30} GiB: {error}")
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, [*strides, 1]).copy_(x)


def check_far(kernel, arguments, results, **options):
    """The same bits for arrays far apart; results are made by kernel(**arguments, **results)."""
    near = {name: x.clone() for name, x in results.items()}
    kernel(*(arguments | near).values(), **options)
    distant = {name: x if x is None else far(x) for name, x in (arguments | results).items()}
    kernel(*distant.values(), **options)
    for name, x in near.items():
        assert_bitwise(x, distant[name], name=name)
    return near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_strides_beyond_2_to_31(dtype):
    tensors, dout = attention_inputs(3, 4, D=5, B=1, H=2, dtype=dtype)
    mask, bias = draw(1, 2, 3, 4) > -1, draw(1, 2, 3, 4, dtype=dtype)
    saved = dict(**tensors, mask=mask, bias=bias)
    options = dict(causal=True, scale=0.5)
    out = dict(out=torch.zeros_like(dout), lse=torch.zeros(1, 2, 3))
    saved |= check_far(_C.attention_forward, saved, out, **options) | dict(dout=dout, dlse=draw(1, 2, 3).float())
    gradients = {f"d{name}": torch.zeros_like(saved[name]) for name in ("q", "k", "v", "bias")}
    check_far(_C.attention_backward, saved, gradients, **options)


def test_mask_and_bias_with_key_strides_beyond_2_to_31():
    tensors, dout = attention_inputs(2, 3, D=5, dtype=torch.float32)
    mask, bias = torch.tensor([[True, False, True], [True, True, False]]), draw(2, 3).float()
    results = []
    for place in (lambda x: x, lambda x: far(x.T.contiguous()).T):
        out, lse = torch.zeros_like(dout), torch.zeros(1, 1, 2)
        mask4, bias4 = place(mask)[None, None], place(bias)[None, None]
        _C.attention_forward(*tensors.values(), mask4, bias4, out, lse, causal=False, scale=0.5)
        results.append(out)
    assert_bitwise(*results)


def far_vector(x):
    return far(x[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_attention_options_with_strides_beyond_2_to_31(ragged, dtype):
    """Sinks, slopes and offsets too; two sequences, one after the other or end to end."""
    tensors, dout = attention_inputs(4, 6, D=5, B=1 if ragged else 2, H=2, dtype=dtype)
    slopes, sinks = draw(2, 2).float(), draw(2, dtype=dtype)
    near = dict(alibi_slopes=slopes, sinks=sinks)
    distant = dict(alibi_slopes=far(slopes.T.contiguous()).T, sinks=far_vector(sinks))
    if ragged:
        offsets = dict(cu_seqlens_q=torch.tensor([0, 1, 4]).int(), cu_seqlens_k=torch.tensor([0, 4, 6]).int())
        near, distant = near | offsets, distant | {name: far_vector(x) for name, x in offsets.items()}
    options = dict(causal=True, scale=0.5, window_left=3, softcap=2.0, dropout_p=0.3, seed=torch.tensor([1]))
    out, lse = torch.zeros_like(dout), torch.zeros(*dout.shape[:3], dtype=torch.float64)
    saved = dict(**tensors, mask=None, bias=None)
    _C.attention_forward(*saved.values(), out, lse, **options, **near)
    distant_saved = {name: x if x is None else far(x) for name, x in saved.items()}
    distant_results = [far(torch.zeros_like(x)) for x in (out, lse)]
    _C.attention_forward(*distant_saved.values(), *distant_results, **options, **distant)
    for name, x, y in zip(("out", "lse"), (out, lse), distant_results, strict=True):
        assert_bitwise(x, y, name=name)

    given = [out, lse, dout, draw(*lse.shape)]
    gradients = [torch.zeros_like(x) for x in tensors.values()]
    dsinks = torch.zeros_like(sinks)
    _C.attention_backward(*saved.values(), *given, *gradients, None, dsinks, **options, **near)
    distant_gradients, distant_dsinks = [far(torch.zeros_like(x)) for x in gradients], far_vector(sinks)
    arguments = (*distant_saved.values(), *(far(x) for x in given), *distant_gradients, None, distant_dsinks)
    _C.attention_backward(*arguments, **options, **distant)
    for name, x, y in zip("qkv", gradients, distant_gradients, strict=True):
        assert_bitwise(x, y, name=f"d{name}")
    assert_bitwise(dsinks, distant_dsinks, name="dsinks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_with_strides_beyond_2_to_31(dtype):
    arguments = dict(x=draw(3, 5), weight=draw(4, 5), bias=draw(4), residual=draw(3, 4))
    arguments = {name: x.to(dtype) for name, x in arguments.items()}
    out = dict(out=torch.zeros(3, 4, dtype=dtype), pre=torch.zeros(3, 4, dtype=dtype))
    made = check_far(_C.linear_forward, arguments, out, activation="gelu")
    saved = dict(x=arguments["x"], weight=arguments["weight"], pre=made["pre"], dout=arguments["residual"])
    gradients = {f"d{name}": torch.zeros_like(arguments[name]) for name in ("x", "weight", "bias")}
    check_far(_C.linear_backward, saved, gradients, activation="gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_with_strides_beyond_2_to_31(dtype):
    """In float32, and in half precision beside float32 weights."""
    shapes = dict(x=(3, 5), up_weight=(4, 5), up_bias=(4,), gate_weight=(4, 5), gate_bias=(4,))
    shapes |= dict(down_weight=(6, 4), down_bias=(6,), residual=(3, 6))
    arguments = {name: draw(*shape, seed=i).float() for i, (name, shape) in enumerate(shapes.items())}
    arguments["x"] = arguments["x"].to(dtype)
    out = dict(out=torch.zeros(3, 6), up=torch.zeros(3, 4, dtype=dtype), gate=torch.zeros(3, 4, dtype=dtype))
    made = check_far(_C.mlp_forward, arguments, out, activation="silu")
    saved = {name: arguments[name] for name in ("x", "up_weight", "gate_weight", "down_weight")}
    saved |= dict(up=made["up"], gate=made["gate"], dout=arguments["residual"])
    gradients = {f"d{name}": torch.zeros_like(arguments[name]) for name in [*shapes][:-1]}
    check_far(_C.mlp_backward, saved, gradients, activation="silu")


def test_decode_with_strides_beyond_2_to_31():
    tensors, dout = attention_inputs(2, 4, D=6, H=2, dtype=torch.float32)
    caches = dict(k_cache=tensors["k"], v_cache=tensors["v"])
    new = dict(k=draw(1, 2, 2, 6, seed=5).float(), v=draw(1, 2, 2, 6, seed=6).float())
    tables = dict(cache_seqlens=torch.tensor([1], dtype=torch.int32), cos=draw(3, 2).float(), sin=draw(3, 2).float())
    out = dict(out=torch.zeros_like(dout), lse=torch.zeros(1, 2, 2))
    options = dict(causal=True, scale=0.5, rotary_interleaved=False)
    check_far(_C.attention_with_kvcache, dict(q=tensors["q"], **caches, **new, **tables), out, **options)


def test_linear_cross_entropy_with_strides_beyond_2_to_31():
    options = dict(ignore_index=-100, label_smoothing=0.1, z_loss=0.0)
    arguments = dict(
        x=draw(3, 5).float(), weight=draw(4, 5).float(), bias=draw(4).float(), target=torch.tensor([3, 0, 1])
    )
    results = dict(loss=torch.zeros(3), dloss=torch.ones(3))
    results |= {f"d{name}": torch.zeros_like(arguments[name]) for name in ("x", "weight", "bias")}
    check_far(_C.linear_cross_entropy, arguments, results, **options)
