"""adamw and square_sum of many tensors in one call: the bits of one at a time; and scale, which the device reads."""

import itertools
import math
import sys

import pytest
import torch
from tools import DTYPES, VIEWS, constant, draw

from pykern.ops.adamw import adamw_, adamw_all_, square_sums
from pykern.testing import assert_bitwise, assert_close, reference

HALVES = (torch.bfloat16, torch.float16)
OPTIONS = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3)
[CHUNK] = constant("cuda/adamw.cu", "kUpdateChunk")
[SQUARES_CHUNK] = constant("cuda/adamw.cu", "kSquaresChunk")
FEWEST = 60  # tensors of a full launch of the CUDA kernels, at least

SHAPES = [(), (1,), (7,), (0, 4), (33, 5), (3, 5, 17)]
LAYOUTS = ("packed", "offset", "transposed", "padded rows")  # the last is not flat, where it has rows


def draw_state(*shape, dtype, seed=0):
    """(param, grad, exp_avg, exp_avg_sq, master), with a master of a 16-bit param where seed is odd."""
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    moments = draw(*shape, dtype=stat, seed=seed + 2), draw(*shape, dtype=stat, seed=seed + 3).square()
    master = draw(*shape, dtype=stat, seed=seed + 4) if dtype in HALVES and seed % 2 else None
    return draw(*shape, dtype=dtype, seed=seed), draw(*shape, dtype=dtype, seed=seed + 1), *moments, master


def laid_out(state, layout):
    """A copy; one dimension has no rows to lay out, but an address."""
    make = VIEWS[layout if state[0].dim() > 1 or layout == "offset" else "packed"]
    return tuple(t if t is None else make(t) for t in state)


def mixed_states():
    """All dtypes, layouts and shapes, and many small ones of one dtype: (states, how many are not flat)."""
    states, rows = [], 0
    for seed, (dtype, layout, shape) in enumerate(itertools.product(DTYPES, LAYOUTS, SHAPES)):
        states.append(laid_out(draw_state(*shape, dtype=dtype, seed=seed), layout))
        rows += layout == "padded rows" and len(shape) > 1 and 0 not in shape
    states += [draw_state(n, dtype=torch.float32, seed=n) for n in range(2 * FEWEST + 20)]
    states += [draw_state(n, dtype=torch.bfloat16, seed=n) for n in (CHUNK - 1, CHUNK, 2 * CHUNK + 5)]
    return states, rows


def counted(call):
    """(launches, blocks) of call() on the emulator of the CUDA kernels; None elsewhere."""
    emulated = sys.modules.get("emulated")
    if emulated is None:
        call()
        return None
    before = emulated.counts()
    call()
    return [b - a for a, b in zip(before, emulated.counts(), strict=True)]


def assert_same(a, b, name):
    for what, x, y in zip(("param", "grad", "exp_avg", "exp_avg_sq", "master"), a, b, strict=True):
        if x is not None:
            assert_bitwise(x.contiguous(), y.contiguous(), name=f"{name}: {what}")


@pytest.mark.parametrize("scaled", [False, True], ids=["grad_scale", "scale"])
def test_many_states_are_one_at_a_time(scaled):
    scale = dict(scale=torch.tensor([0.3], dtype=torch.float64)) if scaled else {}
    together, rows = mixed_states()
    alone, _ = mixed_states()
    seen = counted(lambda: adamw_all_(together, **OPTIONS, grad_scale=0.5, **scale))
    for state in alone:
        adamw_(*state, **OPTIONS, grad_scale=0.5, **scale)
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert_same(a, b, f"state {i}, {a[0].dtype} {list(a[0].shape)} {a[0].stride()}")
    if seen is not None:  # the states that are not flat alone, more than one launch of the others in float32
        assert rows + len(DTYPES) < seen[0] <= rows + len(DTYPES) + len(together) / FEWEST
        assert len(together) > 3 * FEWEST


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_of_several_chunks(dtype):
    """The formula at the seams of chunks, at an odd address too."""
    for layout, n in itertools.product(("packed", "offset"), (CHUNK, CHUNK + 1, 2 * CHUNK + 5)):
        state = laid_out(draw_state(n, dtype=dtype), layout)
        expected = reference.adamw(*state[:4], **OPTIONS, grad_scale=0.5)
        seen = counted(lambda state=state: adamw_(*state, **OPTIONS, grad_scale=0.5))
        for name, a, b in zip(("param", "exp_avg", "exp_avg_sq"), (state[0], *state[2:4]), expected, strict=True):
            assert_close(a, b, name=f"{layout} {n} {name}")
        assert seen in (None, [1, math.ceil(n / CHUNK)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_multiplies_grad_scale(layout, dtype):
    for grad_scale, factor, shape in ((1.0, 0.3, (33, 5)), (0.7, 0.3, (3, 5, 17)), (1.0, 1.0, (7,))):
        scale = torch.tensor([factor], dtype=torch.float64)
        ours, theirs, formula = (laid_out(draw_state(*shape, dtype=dtype, seed=1), layout) for _ in range(3))
        adamw_(*ours, **OPTIONS, grad_scale=grad_scale, scale=scale)
        adamw_(*theirs, **OPTIONS, grad_scale=grad_scale * factor)
        assert_same(ours, theirs, f"{grad_scale} {factor}")
        param, *rest = formula[:4]
        moving = param if formula[4] is None else formula[4]
        new, *_ = reference.adamw(moving, *rest, **OPTIONS, grad_scale=grad_scale, scale=scale)
        assert_close(ours[0] if formula[4] is None else ours[4], new, name="formula")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_changes_nothing(bad):
    scale = torch.tensor([bad], dtype=torch.float64)
    states, _ = mixed_states()
    before, _ = mixed_states()
    adamw_all_(states, **OPTIONS, grad_scale=0.0, scale=scale)
    for a, b in zip(states, before, strict=True):
        assert_same(a, b, f"{bad}")
    param, grad, m, v, _ = states[4]
    unchanged = reference.adamw(param, grad, m, v, **OPTIONS, scale=scale)
    assert_bitwise(unchanged[0], param.double(), name="formula")
    with torch.no_grad():  # a finite one changes them: the test would see it
        adamw_(*states[4], **OPTIONS, grad_scale=0.0, scale=torch.ones(1, dtype=torch.float64))
    assert not torch.equal(states[4][0], before[4][0])


def test_square_sums_in_company_are_those_alone():
    tensors = [state[1] for state in mixed_states()[0]]
    tensors += [draw(n, dtype=dtype) for dtype in DTYPES for n in (SQUARES_CHUNK, 2 * SQUARES_CHUNK + 5)]
    tensors += [draw(2, dtype=torch.float32, seed=i) for i in range(1000)]  # more sums than one launch adds
    sums = square_sums(tensors)
    for i in (*range(300), len(tensors) - 1):
        assert_bitwise(sums[i : i + 1], square_sums([tensors[i]]), name=f"sum {i} of {list(tensors[i].shape)}")
    assert_bitwise(square_sums(tensors[::-1]), sums.flip(0), name="in another order")
    exact = torch.stack([x.double().square().sum() for x in tensors])
    torch.testing.assert_close(sums, exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sums_are_few_launches(dtype):
    """Of flat tensors, one launch makes the partial sums of many and one adds them; an odd address changes no bit."""
    tensors = [draw(n, dtype=dtype, seed=n) for n in (0, 1, 7, SQUARES_CHUNK, SQUARES_CHUNK + 1, 2 * SQUARES_CHUNK + 5)]
    seen = counted(lambda: square_sums(tensors))
    assert seen in (None, [2, (0 + 1 + 1 + 1 + 2 + 3) + len(tensors)])
    strided = draw(20, 300, dtype=dtype)[:, :70]
    seen = counted(lambda: square_sums([strided, *tensors]))
    assert seen is None or seen[0] == 3
    odd = [VIEWS["offset"](x) for x in tensors]
    assert_bitwise(square_sums(odd), square_sums(tensors), name="odd addresses")


def test_no_tensors_at_all():
    adamw_all_([], **OPTIONS, grad_scale=1.0)
    assert square_sums([]).shape == (0,)
