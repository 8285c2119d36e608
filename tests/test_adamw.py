"""adamw: formula, torch's optimiser, master weights, shapes and strides, threads, torch's machinery, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykern import _C
from pykern.ops.adamw import adamw_, square_sums
from pykern.testing import assert_bitwise, assert_close, ratios, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
PIECE = 4096  # numbers in one task of the kernel, csrc/cpu/pieces.h
OPTIONS = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)

# A scalar, a tail alone, whole vectors, both, several tasks, narrow rows flattened into one, nothing.
SHAPES = [(), (1,), (7,), (16,), (33,), (2 * PIECE + 5,), (3, 5, 17), (2000, 3), (0, 4), (4, 0)]


def stat(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_state(*shape, dtype):
    """param, grad, exp_avg, exp_avg_sq as they are in the middle of a training run."""
    moments = draw(*shape, dtype=stat(dtype), seed=2), draw(*shape, dtype=stat(dtype), seed=3).square()
    return draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), *moments


def copies(tensors):
    return [t if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors]


def bits_equal(a, b, name):
    for what, x, y in zip(("param", "grad", "exp_avg", "exp_avg_sq", "master"), a, b, strict=True):
        if x is not None:
            assert_bitwise(x, y, name=f"{name}: {what}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_is_its_formula(dtype):
    for shape in SHAPES:
        state = draw_state(*shape, dtype=dtype)
        expected = reference.adamw(*state, **OPTIONS, step=7, grad_scale=0.25)
        grad = state[1].clone()
        adamw_(*state, **OPTIONS, step=7, grad_scale=0.25)
        got = state[0], state[2], state[3]
        for name, a, b in zip(("param", "exp_avg", "exp_avg_sq"), got, expected, strict=True):
            assert_close(a, b, name=f"{shape} {name}")
        assert_bitwise(state[1], grad, name="grad is only read")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thirty_steps_are_those_of_torch(dtype, weight_decay):
    """The bound is some roundings per step of numbers near 1, which both sides make in their own order."""
    options = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    theirs = torch.nn.Parameter(draw(50, 21, dtype=dtype))
    torchs = torch.optim.AdamW([theirs], **options)
    ours = theirs.detach().clone()
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 31):
        grad = draw(50, 21, dtype=dtype, seed=step) * 10.0 ** (step % 5 - 2)
        theirs.grad = grad.clone()
        torchs.step()
        beta1, beta2 = options["betas"]
        adamw_(ours, grad, exp_avg, exp_avg_sq, lr=1e-2, beta1=beta1, beta2=beta2, weight_decay=weight_decay, step=step)
    bound = 30 * 4 * torch.finfo(dtype).eps
    assert (ours - theirs.detach()).abs().max() <= bound
    moments = torchs.state[theirs]
    assert_close(exp_avg, moments["exp_avg"].double(), name="exp_avg")
    assert_close(exp_avg_sq, moments["exp_avg_sq"].double(), name="exp_avg_sq")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_parameter_is_its_rounded_master(dtype):
    """The master moves as a float32 parameter with the same gradients does, bit for bit."""
    master = draw(37, 5, dtype=torch.float32)
    param, single = master.to(dtype), master.clone()
    a, b = [torch.zeros(37, 5) for _ in range(2)], [torch.zeros(37, 5) for _ in range(2)]
    for step in range(1, 6):
        grad = draw(37, 5, dtype=dtype, seed=step)
        adamw_(param, grad, *a, master, **OPTIONS, step=step)
        adamw_(single, grad.float(), *b, **OPTIONS, step=step)
        assert_bitwise(master, single, name=f"master after step {step}")
        assert_bitwise(param, master.to(dtype), name=f"param after step {step}")


@pytest.mark.parametrize("dtype", HALVES)
def test_only_a_master_keeps_steps_below_the_rounding(dtype):
    with_master, without = torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype)
    master, grad = torch.ones(5), torch.ones(5, dtype=dtype)
    for param, kept in ((with_master, master), (without, None)):
        moments = torch.zeros(5), torch.zeros(5)
        for step in range(1, 201):
            adamw_(param, grad, *moments, kept, lr=1e-4, weight_decay=0.0, step=step)
    assert (without == 1).all()
    assert_close(master, torch.full((5,), 0.98, dtype=torch.float64), name="master")
    assert_bitwise(with_master, master.to(dtype))


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_error_is_within_the_ratio_of_eager_torch(dtype):
    """One step from one state: the largest error against float64, torch's single-tensor loop beside it."""
    param, grad, exp_avg, exp_avg_sq = draw_state(400, 70, dtype=dtype)
    expected, *_ = reference.adamw(param, grad, exp_avg, exp_avg_sq, **OPTIONS, step=3)
    eager, *_ = reference.in_own_dtype(reference.adamw)(param, grad, exp_avg, exp_avg_sq, **OPTIONS, step=3)
    adamw_(param, grad, exp_avg, exp_avg_sq, **OPTIONS, step=3)
    ours, theirs = ((x.double() - expected).abs().max().item() for x in (param, eager))
    rounding = torch.finfo(dtype).eps / 2 * expected.abs().max().item()
    print(f"adamw {dtype} param: pykern {ours:.2e}, eager torch {theirs:.2e}, ratio {ours / max(theirs, rounding):.2f}")
    assert ours <= ratios.OUTPUT_LIMIT * max(theirs, rounding)


def test_special_values_stay_where_they_are():
    """A NaN or infinite gradient reaches its own element only; a zero one leaves weight decay alone to act."""
    grad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-30, 1e30] + [1.0] * 30)
    param, moments = torch.ones(36), (torch.zeros(36), torch.zeros(36))
    adamw_(param, grad, *moments, lr=0.1, weight_decay=0.5, step=1)
    assert param[:3].isnan().all()
    assert param[3] == torch.tensor(1 - 0.1 * 0.5)
    assert param[4:].isfinite().all()
    assert (param[6:] == param[6]).all()


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    view=st.sampled_from(["packed", "row gaps", "transposed", "expanded gradient", "grad of another layout"]),
    master=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(shape, dtype, view, master, seed):
    """The same bits as on packed copies, and nothing written beside the views."""
    packed = list(draw_state(*shape, dtype=dtype))
    packed.append(draw(*shape, dtype=torch.float32, seed=5) if master and dtype in HALVES else None)
    views, guards = copies(packed), []
    if view == "row gaps" and shape:
        for i, t in enumerate(packed):
            if t is not None:
                buffer = torch.full([*(n + 2 for n in shape)], 7.0, dtype=t.dtype)
                inside = buffer[tuple(slice(1, n + 1) for n in shape)]
                inside.copy_(t)
                views[i] = inside
                guards.append((buffer, inside))
    if view == "transposed":
        views = [t if t is None else t.permute(*reversed(range(len(shape)))).contiguous() for t in packed]
        views = [t if t is None else t.permute(*reversed(range(len(shape)))) for t in views]
    if view == "expanded gradient":
        views[1] = torch.tensor(0.5, dtype=dtype).expand(shape)
        packed[1] = views[1].contiguous()
    if view == "grad of another layout" and len(shape) > 1:
        views[1] = packed[1].transpose(0, 1).contiguous().transpose(0, 1)
    adamw_(*views, **OPTIONS, step=seed + 1)
    adamw_(*packed, **OPTIONS, step=seed + 1)
    bits_equal([t if t is None else t.contiguous() for t in views], packed, view)
    for buffer, inside in guards:
        inside.fill_(7.0)
        assert (buffer == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_neighbours(dtype, with_threads):
    state = [*draw_state(5 * PIECE + 3, dtype=dtype), None]

    def step(tensors):
        adamw_(*tensors, **OPTIONS, step=2)
        return tensors

    first = with_threads(1, lambda: step(copies(state)))
    for n in (2, 3):
        bits_equal(with_threads(n, lambda: step(copies(state))), first, f"{n} threads")
    piece = slice(PIECE - 5, PIECE + 40)
    alone = step([t if t is None else t[piece].clone() for t in state])
    bits_equal(alone, [t if t is None else t[piece] for t in first], "a piece alone")


def test_numpy_arrays_and_a_step_in_place():
    rng = np.random.default_rng(0)
    param, grad, exp_avg = (rng.standard_normal((6, 7)) for _ in range(3))
    exp_avg_sq = exp_avg**2
    tensors = [torch.from_numpy(a.copy()) for a in (param, grad, exp_avg, exp_avg_sq)]
    _C.adamw([(param, grad, exp_avg, exp_avg_sq, None)], **OPTIONS, step=1, grad_scale=1.0)
    adamw_(*tensors, **OPTIONS, step=1)
    for a, b in zip((param, grad, exp_avg, exp_avg_sq), tensors, strict=True):
        assert_bitwise(a, b)


@pytest.mark.one_isa
def test_version_counters_of_all_that_changed():
    param, grad, exp_avg, exp_avg_sq = draw_state(4, dtype=torch.bfloat16)
    master = param.float()
    adamw_(param, grad, exp_avg, exp_avg_sq, master, **OPTIONS, step=1)
    assert [t._version for t in (param, grad, exp_avg, exp_avg_sq, master)] == [1, 0, 1, 1, 1]
    weight = torch.nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    with torch.no_grad():
        adamw_(weight, torch.ones(3), torch.zeros(3), torch.zeros(3), **OPTIONS, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.one_isa
def test_under_inference_mode():
    with torch.inference_mode():
        state = draw_state(4, dtype=torch.float32)
        expected = reference.adamw(*state, **OPTIONS, step=1)[0]
        adamw_(*state, **OPTIONS, step=1)
        assert_close(state[0], expected, name="param")


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    options = dict(**OPTIONS, step=3, grad_scale=0.5)
    torch.library.opcheck(torch.ops.pykern.adamw_.default, (*draw_state(3, 4, dtype=dtype), None), options)
    if dtype in HALVES:
        state = (*draw_state(3, 4, dtype=dtype), draw(3, 4, dtype=torch.float32))
        torch.library.opcheck(torch.ops.pykern.adamw_.default, state, options)
    options |= dict(scale=torch.tensor([0.5], dtype=torch.float64))
    torch.library.opcheck(torch.ops.pykern.adamw_.default, (*draw_state(3, 4, dtype=dtype), None), options)


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*state):
        adamw_(*state, **OPTIONS, step=3)
        return state[0].sum()

    state = [*draw_state(5, 7, dtype=torch.bfloat16), draw(5, 7, dtype=torch.float32)]
    eager = copies(state)
    compiled(*state)
    adamw_(*eager, **OPTIONS, step=3)
    bits_equal(state, eager, "compiled")


def _refused():
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    good = dict(param=ones, grad=torch.ones(2, 3), exp_avg=zeros, exp_avg_sq=torch.zeros(2, 3), lr=0.1, step=1)
    half = dict(
        param=torch.ones(2, 3, dtype=torch.bfloat16),
        grad=torch.ones(2, 3, dtype=torch.bfloat16),
        master=torch.ones(2, 3),
    )
    cases = {
        "not a tensor": (dict(param=[1.0]), TypeError, "adamw: param must be a torch.Tensor, got list"),
        "no gradient": (dict(grad=None), TypeError, "adamw: grad must be a torch.Tensor, got NoneType"),
        "master a number": (dict(half, master=1.0), TypeError, "adamw: master must be a torch.Tensor, got float"),
        "integers": (
            dict(param=torch.ones(2, 3, dtype=torch.int64)),
            TypeError,
            "adamw: param has dtype int64, expected",
        ),
        "gradient dtype": (dict(grad=ones.double()), TypeError, "adamw: grad has dtype float64 but param has float32"),
        "half moments": (
            dict(half, exp_avg=zeros.bfloat16()),
            TypeError,
            "adamw: exp_avg has dtype bfloat16, expected float32",
        ),
        "half master": (
            dict(half, master=half["param"].clone()),
            TypeError,
            "adamw: master has dtype bfloat16, expected",
        ),
        "master of float32": (dict(master=torch.ones(2, 3)), ValueError, "adamw: master is for bfloat16 and float16"),
        "gradient shape": (
            dict(grad=torch.ones(3, 2)),
            ValueError,
            r"adamw: grad has shape \[3, 2\] but param has \[2, 3\]",
        ),
        "moment shape": (
            dict(exp_avg_sq=torch.zeros(6)),
            ValueError,
            r"adamw: exp_avg_sq has shape \[6\] but param has",
        ),
        "expanded parameter": (
            dict(param=torch.ones(3).expand(2, 3)),
            ValueError,
            "adamw: elements of param share memory",
        ),
        "moments the same": (dict(exp_avg_sq=zeros), ValueError, "adamw: exp_avg_sq shares memory with exp_avg"),
        "gradient is the parameter": (dict(grad=ones), ValueError, "adamw: param shares memory with grad"),
        "other layout": (dict(exp_avg=torch.zeros(3, 2).T), ValueError, "adamw: exp_avg must have stride 1"),
        "step 0": (dict(step=0), ValueError, "adamw: step is 0, expected 1 for the first step"),
        "lr": (dict(lr=-1.0), ValueError, "adamw: lr is -1, expected a finite number >= 0"),
        "infinite lr": (dict(lr=math.inf), ValueError, "adamw: lr is inf"),
        "beta1": (dict(beta1=1.0), ValueError, "adamw: beta1 is 1, expected 0 <= beta1 < 1"),
        "beta2": (dict(beta2=math.nan), ValueError, "adamw: beta2 is nan, expected 0 <= beta2 < 1"),
        "eps": (dict(eps=-1e-8), ValueError, "adamw: eps is -1e-08"),
        "decay": (dict(weight_decay=math.nan), ValueError, "adamw: weight_decay is nan"),
        "scale a number": (dict(scale=0.5), TypeError, "adamw: scale must be a torch.Tensor, got float"),
        "float32 scale": (dict(scale=torch.ones(1)), TypeError, "adamw: scale has dtype float32, expected float64"),
        "scale without dimension": (
            dict(scale=torch.tensor(1.0, dtype=torch.float64)),
            ValueError,
            r"adamw: scale must be \[1\], got shape \[\]",
        ),
        "two scales": (
            dict(scale=torch.ones(2, dtype=torch.float64)),
            ValueError,
            "adamw: scale has shape .*, expected one factor = 1",
        ),
        "NaN norm": (dict(grad_scale=math.nan), ValueError, "adamw: grad_scale is nan, expected a finite number"),
    }
    return good, cases


@pytest.mark.one_isa
@pytest.mark.parametrize("case", _refused()[1])
def test_refused_before_any_write(case):
    good, cases = _refused()
    changes, error, words = cases[case]
    arguments = good | changes
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error, match=words):
        adamw_(**arguments)
    for name, t in before.items():
        assert_bitwise(arguments[name], t, name=name)


@pytest.mark.one_isa
def test_read_only_array_is_refused():
    param, grad, m, v = (np.ones((2, 3), dtype=np.float32) for _ in range(4))
    param.flags.writeable = False
    with pytest.raises(ValueError, match="adamw: param is read-only"):
        _C.adamw([(param, grad, m, v, None)], **OPTIONS, step=1, grad_scale=1.0)
    assert (m == 1).all()


@pytest.mark.one_isa
def test_one_bad_state_of_many_and_nothing_is_written():
    states = [tuple(np.ones((2, 3), dtype=np.float32) for _ in range(4)) for _ in range(3)]
    states[2] = (*states[2][:3], np.ones((3, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="adamw: exp_avg_sq has shape"):
        _C.adamw([(*state, None) for state in states], **OPTIONS, step=1, grad_scale=1.0)
    assert all((t == 1).all() for state in states for t in state)
    for malformed in ([states[0]], [1.0]):  # four arrays, and no tuple at all
        with pytest.raises((IndexError, TypeError)):
            _C.adamw(malformed, **OPTIONS, step=1, grad_scale=1.0)


# ---- square_sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sums_are_those_of_float64(dtype, with_threads):
    wide = draw(40, 300, dtype=dtype)
    tensors = [draw(*shape, dtype=dtype) for shape in SHAPES] + [wide[:, ::3], wide.t(), wide[:, 5:100]]
    expected = torch.stack([t.double().square().sum() for t in tensors])
    sums = with_threads(1, lambda: square_sums(tensors))
    torch.testing.assert_close(sums, expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0.0)
    for n in (2, 3):
        assert_bitwise(with_threads(n, lambda: square_sums(tensors)), sums, name=f"{n} threads")
    for bad in (math.nan, math.inf):
        x = draw(5000, dtype=dtype)
        x[4567] = bad
        assert not torch.isfinite(square_sums([x])).any()


@pytest.mark.one_isa
def test_square_sum_refuses():
    x, out = np.ones((2, 3), dtype=np.float32), np.zeros(1)
    for arguments, error, words in (
        (([x, x.astype(np.int64)], np.zeros(2)), TypeError, "square_sum: x"),
        (([x[:, ::2]], out), ValueError, "square_sum: x"),
        (([x], out.astype(np.float32)), TypeError, "square_sum: out"),
        (([x], np.zeros(2)), ValueError, "expected tensors = 1"),
        (([x, x], np.zeros(4)[::2]), ValueError, "square_sum: out"),
        (([x], np.zeros((1, 1))), ValueError, r"square_sum: out must be \[tensors\]"),
        (([out], out), ValueError, "square_sum: out"),
        ((x, out), TypeError, "incompatible function arguments"),
    ):
        with pytest.raises(error, match=words):
            _C.square_sum(*arguments)
    assert out == 0


@pytest.mark.one_isa
def test_not_differentiable_and_says_so():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"adamw: not differentiable; call it under torch\.no_grad\(\)"):
        adamw_(weight, torch.ones(3), torch.zeros(3), torch.zeros(3), **OPTIONS, step=1)
    assert (weight == 1).all()
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="adamw: not differentiable"):
        adamw_(torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3), **OPTIONS, step=1, scale=scale)
