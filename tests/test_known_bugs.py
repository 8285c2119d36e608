"""Defects that users found in other libraries' attention and losses on GPUs, one test each: pykern has none of them.

On the CPU, on the emulator of the CUDA kernels, and on a GPU where there is one.
"""

import pytest
import torch
from tools import draw

import pykern
from pykern.testing import assert_bitwise, assert_close, reference

HALF = torch.bfloat16
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def heads(B, H, G, T, S, D, dtype=HALF):
    """q, k, v and the gradient of out."""
    q, dout = draw(B, H, T, D, dtype=dtype), draw(B, H, T, D, dtype=dtype, seed=3)
    return q, draw(B, G, S, D, dtype=dtype, seed=1), draw(B, G, S, D, dtype=dtype, seed=2), dout


def attend(q, k, v, dout, device="cpu", function=pykern.attention, **options):
    """out, dq, dk and dv, brought back to the CPU."""
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = function(*leaves, **options)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout.to(device)))]


def formula(q, k, v, dout, **options):
    return attend(*(x.double() for x in (q, k, v, dout)), function=reference.attention, **options)


def assert_formula(found, wanted):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert_close(ours, theirs, name=name, gradient=name != "out")


@on_every_device
@pytest.mark.parametrize("keys", [64, 192, 320])  # keys % 128 == 64
def test_a_mask_and_scores_far_below_zero(keys, device):
    """lse < -88.7: cuDNN's backward takes exp(-lse), which overflows (pytorch #196678, trl #7181)."""
    q, k, v, dout = heads(2, 2, 2, 70, keys, 64)
    q[..., 0], k[..., 0] = 40, -40  # every score is some -200
    mask = torch.rand((2, 1, 70, keys), generator=torch.Generator().manual_seed(4)) < 0.6
    mask[:, :, 5] = False
    lse = torch.logsumexp((q.double() @ k.double().mT / 8).masked_fill(~mask, -torch.inf), -1)
    assert (lse[lse.isfinite()] < -88.7).all()
    found = attend(q, k, v, dout, device, mask=mask)
    assert all(x.isfinite().all() for x in found)
    wanted = formula(q, k, v, dout, mask=mask)
    for x in (*found[1:3], *wanted[1:3]):
        x[..., 0] = 0  # in dq 40 times what sums to zero
    assert_formula(found, wanted)


@on_every_device
@pytest.mark.parametrize("hidden", [64, 128, 200])
def test_a_leading_block_of_rows_that_see_nothing(hidden, device):
    """Maxima that are still -infinity after a block: NaN (ik_llama.cpp #2344, aiter #3551)."""
    q, k, v, dout = heads(1, 2, 1, 210, 140, 64)
    mask = torch.ones(1, 1, 210, 140, dtype=torch.bool)
    mask[:, :, :hidden] = False
    mask[:, :, hidden:, :130] = False  # and for the others the first tiles of keys
    found = attend(q, k, v, dout, device, mask=mask)
    assert (found[0][:, :, :hidden] == 0).all() and (found[1][:, :, :hidden] == 0).all()
    assert_formula(found, formula(q, k, v, dout, mask=mask))


@on_every_device
def test_sequences_without_queries_or_keys_end(device):
    """A block that waits for tiles which never come hangs (flash-attention #1254, #2258)."""
    for queries, keys in (([0, 5, 0, 0, 130, 0], [0, 3, 70, 0, 0, 9]), ([0, 0], [0, 0]), ([3, 4], [0, 0])):
        cu = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
        q, dout = draw(sum(queries), 4, 64, dtype=HALF), draw(sum(queries), 4, 64, dtype=HALF, seed=3)
        k, v = (draw(sum(keys), 2, 64, dtype=HALF, seed=seed) for seed in (1, 2))
        offsets = dict(cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])
        assert_formula(attend(q, k, v, dout, device, **offsets), formula(q, k, v, dout, **offsets))


@on_every_device
def test_the_backward_of_a_sequence_does_not_depend_on_its_place(device):
    """Offsets that one kernel pads to its tile and the other does not (flash-attention, padded varlen offsets)."""
    lengths = [1, 63, 64, 65, 127, 129]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, dout = (draw(sum(lengths), heads, 64, dtype=HALF, seed=i) for i, heads in enumerate((4, 2, 2, 4)))
    together = attend(q, k, v, dout, device, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    for i in range(len(lengths)):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        one = [x[rows].transpose(0, 1)[None] for x in (q, k, v, dout)]
        for name, mine, alone in zip(
            ("out", "dq", "dk", "dv"), together, attend(*one, device, causal=True), strict=True
        ):
            assert_bitwise(mine[rows].transpose(0, 1)[None], alone, name=f"sequence {i}: {name}")


@on_every_device
def test_gradients_of_grouped_heads_have_the_same_bits(device):
    """Sums that start in memory nobody cleared, or in an order nobody fixed (flash-attention #1596, #1766, #1678)."""
    tensors = heads(2, 8, 2, 130, 200, 64)
    first = attend(*tensors, device, causal=True)
    for _ in range(5):
        full = torch.full((1 << 20,), torch.nan, device=device)  # what the allocator hands out next
        del full
        for name, ours, before in zip(
            ("out", "dq", "dk", "dv"), attend(*tensors, device, causal=True), first, strict=True
        ):
            assert_bitwise(ours, before, name=name)


@on_every_device
@pytest.mark.parametrize("view", ["expanded", "heads last", "transposed", "odd address"])
def test_the_gradient_of_out_may_have_any_strides(view, device):
    """Asserts about strides in the backward (pytorch #134001, #138581, #176915)."""
    q, k, v, dout = heads(2, 4, 4, 70, 70, 64)
    if view == "expanded":
        dout = dout[:1, :1, :1].expand_as(dout)
    elif view == "heads last":
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    elif view == "transposed":
        dout = dout.mT.contiguous().mT
    else:
        dout = torch.cat([dout.new_zeros(1), dout.flatten()])[1:].view(dout.shape)
    found = attend(q, k, v, dout, device, causal=True)
    for name, ours, packed in zip(
        ("out", "dq", "dk", "dv"), found, attend(q, k, v, dout.contiguous(), device, causal=True), strict=True
    ):
        assert_bitwise(ours, packed, name=name)


@on_every_device
def test_one_query_with_a_mask_and_gradients(device):
    """Wrong gradients of a single query (cudnn-frontend #1072)."""
    q, k, v, dout = heads(3, 4, 2, 1, 300, 64)
    mask = torch.rand((3, 1, 1, 300), generator=torch.Generator().manual_seed(4)) < 0.5
    assert_formula(attend(q, k, v, dout, device, mask=mask), formula(q, k, v, dout, mask=mask))


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gradients_in_place_of_logits_do_not_race(dtype, device):
    """A thread that stores a gradient where another still reads the target's logit (llm.c, fused classifier)."""
    V = 3000
    x, target = draw(V // 10, V, dtype=dtype, spread=3.0), torch.arange(0, V, 10)
    mine, double = (y.detach().requires_grad_() for y in (x.to(device), x.double()))
    pykern.cross_entropy(mine, target.to(device), reduction="sum").backward()
    reference.cross_entropy(double, target, reduction="sum").backward()
    assert_close(mine.grad.cpu(), double.grad, name="dx", gradient=True)
