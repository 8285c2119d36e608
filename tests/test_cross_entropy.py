"""cross_entropy: formula, gradients, excluded classes, ignored rows, far-off logits, bits, torch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tools import of_the_cpu

import pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024  # numbers between two looks at the maximum, csrc/cpu/cross_entropy_rows.h
INF = math.inf

# A tail alone, four accumulators and a tail, a block and one more number, rows that share a task, no rows.
SHAPES = [(1,), (1, 1), (3, 7), (5, 131), (2, 3, BLOCK + 1), (3, 2 * BLOCK + 77), (700, 51), (0, 5), (2, 0, 5)]
OPTIONS = {
    "plain": {},
    "label smoothing": dict(label_smoothing=0.1),
    "uniform labels": dict(label_smoothing=1.0),
    "z loss": dict(z_loss=1e-2),
    "both": dict(label_smoothing=0.2, z_loss=1e-3),
}


def draw(*shape, dtype=torch.float64, seed=0, spread=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (offset + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels(shape, classes, seed=0, ignored=None):
    """Labels of which, with `ignored`, every third is that."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, shape, generator=generator)
    if ignored is not None:
        target.view(-1)[::3] = ignored
    return target


def gradient(function, x, dout=None):
    """Output and gradient of x."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(x)
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


def compare(logits, target, dout=None, name="", **options):
    out, dx = gradient(lambda x: pykern.cross_entropy(x, target, **options), logits, dout)
    expected, dexpected = gradient(lambda x: reference.cross_entropy(x, target, **options), logits.double(), dout)
    assert out.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert dx.dtype == logits.dtype
    # The terms of a loss are as large as the logits, those of a gradient as its row's weight; both may cancel.
    weight = 1.0 if dout is None or not dout.numel() else dout.abs().max().item()
    if options.get("reduction", "mean") == "mean":
        weight /= (target != -100).sum().item()
    largest = logits.double().abs().max().item() if logits.numel() else 0.0
    assert_close(out, expected, name=f"loss {name}", scale=largest)
    assert_close(dx, dexpected, name=f"dlogits {name}", gradient=True, scale=weight)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_is_its_formula(dtype, options):
    for shape in SHAPES:
        logits, target = draw(*shape, dtype=dtype), labels(shape[:-1], shape[-1])
        compare(logits, target, draw(*shape[:-1], seed=2), f"{shape} none", reduction="none", **OPTIONS[options])
        compare(logits, target, None, f"{shape} sum", reduction="sum", **OPTIONS[options])
        if target.numel():
            compare(logits, target, None, f"{shape} mean", **OPTIONS[options])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_means_the_same_as_torch(reduction, label_smoothing):
    logits, target = draw(40, 33), labels((40,), 33, ignored=-100)
    options = dict(reduction=reduction, label_smoothing=label_smoothing)
    out, dx = gradient(lambda x: pykern.cross_entropy(x, target, **options), logits)
    expected, dexpected = gradient(lambda x: F.cross_entropy(x, target, **options), logits)
    assert_close(out, expected, name="loss")
    assert_close(dx, dexpected, name="dlogits", gradient=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, options):
    logits, target = draw(4, 11).requires_grad_(), torch.tensor([0, 10, -100, 5])
    f = lambda x: pykern.cross_entropy(x, target, reduction=reduction, **OPTIONS[options])  # noqa: E731
    assert torch.autograd.gradcheck(f, (logits,), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("cross_entropy", dtype)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
@pytest.mark.parametrize("offset", [-1000.0, 30.0, 1000.0])
def test_far_off_logits_keep_their_accuracy(dtype, offset):
    """All logits near `offset`: lse is rounded to float nowhere on the way to the gradient. Beside torch's fused op."""
    logits, target = draw(20, 200, dtype=dtype, offset=offset), labels((20,), 200)
    expected = gradient(lambda x: reference.cross_entropy(x, target), logits.double())

    def errors(f):
        got = gradient(lambda x: f(x, target), logits)
        return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)]

    ours, fused = errors(pykern.cross_entropy), errors(F.cross_entropy)
    print(f"{dtype} offset {offset}: pykern {ours}, F.cross_entropy {fused}")
    roundings = [torch.finfo(d).eps / 2 for d in (torch.float32, dtype)]
    for error, theirs, rounding, limit in zip(ours, fused, roundings, (2.0, 3.0), strict=True):
        assert error <= limit * max(theirs, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_classes_are_as_if_absent(dtype):
    """-inf in columns: the loss of the other columns, gradient 0 in these, no NaN anywhere."""
    full, target = draw(6, 300, dtype=dtype), torch.tensor([0, 2, 4, 298, 100, 150])
    keep = torch.arange(0, 300, 2)
    masked = torch.full_like(full, -INF)
    masked[:, keep] = full[:, keep]
    loss, dx = gradient(lambda x: pykern.cross_entropy(x, target, z_loss=0.01), masked)
    expected, dexpected = gradient(lambda x: pykern.cross_entropy(x, target // 2, z_loss=0.01), full[:, keep].clone())
    assert_close(loss, expected, name="loss")
    assert_close(dx[:, keep], dexpected, name="dlogits", gradient=True)
    assert (dx[:, 1::2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_excluded_label_costs_infinity(dtype):
    logits, target = draw(3, 50, dtype=dtype), torch.tensor([7, 8, 9])
    logits[0, 7] = -INF
    logits[1, :] = -INF
    loss, dx = gradient(lambda x: pykern.cross_entropy(x, target, reduction="none", z_loss=0.1), logits)
    assert loss[:2].tolist() == [INF, INF] and loss[2].isfinite()
    assert dx.isfinite().all()
    assert (dx[1] == 0).all()
    assert dx[0, 7] == -1
    others = torch.arange(50) != 7
    expected = torch.softmax(logits[0, others].double(), -1) * (
        1 + 0.2 * torch.logsumexp(logits[0, others].double(), -1)
    )
    assert_close(dx[0, others], expected, name="dlogits", gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_smoothing_over_an_excluded_class_is_infinite_with_a_finite_gradient(dtype):
    logits, target = draw(1, 50, dtype=dtype), torch.tensor([7])
    logits[0, 3] = -INF
    loss, dx = gradient(lambda x: pykern.cross_entropy(x, target, label_smoothing=0.5), logits)
    theirs, dtheirs = gradient(lambda x: F.cross_entropy(x, target, label_smoothing=0.5), logits.double())
    assert loss == theirs == INF
    assert_close(dx, dtheirs, name="dlogits", gradient=True)


@pytest.mark.parametrize("at", [0, 5, 16, BLOCK + 3])
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_spoil_their_own_row(dtype, bad, at):
    logits, target = draw(3, BLOCK + 9, dtype=dtype), torch.tensor([1, 2, 3])
    good, dgood = gradient(lambda x: pykern.cross_entropy(x, target, reduction="none"), logits)
    logits[1, at] = bad
    loss, dx = gradient(lambda x: pykern.cross_entropy(x, target, reduction="none"), logits)
    assert loss[1].isnan() and dx[1].isnan().all()
    for row in (0, 2):
        assert_bitwise(loss[row], good[row])
        assert_bitwise(dx[row], dgood[row])


@pytest.mark.parametrize("ignore_index", [-100, 0, 4, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_not_read(dtype, ignore_index):
    logits = draw(9, 70, dtype=dtype)
    target = labels((9,), 70, seed=3, ignored=ignore_index)
    kept = target != ignore_index
    logits[~kept] = math.nan
    for options in (dict(), dict(label_smoothing=0.1, z_loss=0.1)):
        f = lambda x, o=options: pykern.cross_entropy(x, target, ignore_index=ignore_index, **o)  # noqa: E731
        loss, dx = gradient(f, logits)
        alone, dalone = gradient(lambda x, o=options: pykern.cross_entropy(x, target[kept], **o), logits[kept])
        assert_close(loss, alone, name="mean")
        assert_bitwise(dx[kept], dalone)
        assert_bitwise(dx[~kept], torch.zeros_like(dx[~kept]))
    rows = pykern.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    assert (rows[~kept] == 0).all()
    assert_bitwise(rows[kept], pykern.cross_entropy(logits[kept], target[kept], reduction="none"))


def test_nothing_but_ignored_rows_is_nan_as_in_torch():
    logits, target = draw(3, 5), torch.full((3,), -100)
    for f in (pykern.cross_entropy, F.cross_entropy):
        mean, dx = gradient(lambda x, f=f: f(x, target), logits)
        assert mean.isnan() and (dx == 0).all()
        assert f(logits, target, reduction="sum") == 0
    empty = pykern.cross_entropy(draw(0, 5), target[:0])
    assert empty.isnan() and F.cross_entropy(draw(0, 5), target[:0]).isnan()


@given(
    rows=st.integers(0, 5),
    classes=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(list(OPTIONS)),
    view=st.sampled_from(["packed", "shifted", "transposed", "column steps", "expanded"]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides(rows, classes, dtype, options, view, seed):
    make = dict(
        packed=lambda: draw(2, rows, classes, dtype=dtype, seed=seed),
        shifted=lambda: draw(2, rows + 1, classes + 3, dtype=dtype, seed=seed)[:, :-1, 2:-1],
        transposed=lambda: draw(classes, rows, 2, dtype=dtype, seed=seed).permute(2, 1, 0),
        expanded=lambda: draw(1, rows, classes, dtype=dtype, seed=seed).expand(2, rows, classes),
    )
    make["column steps"] = lambda: draw(2, rows, 2 * classes, dtype=dtype, seed=seed)[..., ::2]
    logits = make[view]()
    target = labels((rows, 2), classes, seed=seed, ignored=-100).T
    f = lambda x: pykern.cross_entropy(x, target, reduction="none", **OPTIONS[options])  # noqa: E731
    dout = draw(2, rows, seed=seed)
    out, dx = gradient(f, logits, dout)
    packed, dpacked = gradient(f, logits.clone(memory_format=torch.contiguous_format), dout)
    assert_bitwise(out, packed, name=view)
    assert_bitwise(dx, dpacked, name=view)
    compare(logits, target, dout, view, reduction="none", **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_neighbours(dtype, with_threads):
    logits, target = draw(70, 2 * BLOCK + 5, dtype=dtype), labels((70,), 2 * BLOCK + 5, ignored=-100)
    f = lambda x: pykern.cross_entropy(x, target, label_smoothing=0.1, reduction="none")  # noqa: E731
    first = with_threads(1, lambda: gradient(f, logits))
    for n in (2, 3):
        again = with_threads(n, lambda: gradient(f, logits))
        assert_bitwise(again[0], first[0], name=f"{n} threads, loss")
        assert_bitwise(again[1], first[1], name=f"{n} threads, dlogits")
    rows = slice(31, 33)
    alone = gradient(
        lambda x: pykern.cross_entropy(x, target[rows], label_smoothing=0.1, reduction="none"), logits[rows]
    )
    assert_bitwise(alone[0], first[0][rows], name="two rows alone")
    assert_bitwise(alone[1], first[1][rows], name="two rows alone, dlogits")


@pytest.mark.one_isa  # the rows are added in Python
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_over_many_rows_depends_on_no_thread_count(reduction):
    """More rows than torch adds on one thread; in float64, where the order shows for about every second seed."""
    before = torch.get_num_threads()
    for seed in range(4):
        logits, target = draw(400_003, 3, seed=seed), labels((400_003,), 3)
        results = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(pykern.cross_entropy(logits, target, reduction=reduction))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert_bitwise(other, results[0])
        assert_close(results[0], reference.cross_entropy(logits, target, reduction=reduction), name=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_over_its_logits(dtype):
    """In place on packed and on strided rows: the same bits as into other memory, nothing written beside them."""
    buffer, target = draw(6, 90, dtype=dtype), labels((6,), 75, ignored=-100)
    buffer[:, :5] = buffer[:, 80:] = 7.0
    logits = buffer[:, 5:80]
    loss, lse = torch.empty(6, dtype=torch.float64), torch.empty(6, dtype=torch.float64)
    loss = loss if dtype == torch.float64 else loss.float()
    options = dict(ignore_index=-100, label_smoothing=0.1, z_loss=0.1)
    _C.cross_entropy_forward(logits, target, loss, lse, **options)
    elsewhere = torch.empty(6, 75, dtype=dtype)
    _C.cross_entropy_backward(logits, target, lse, torch.ones_like(loss), elsewhere, **options)
    _C.cross_entropy_backward(logits, target, lse, torch.ones_like(loss), logits, **options)
    assert_bitwise(logits, elsewhere)
    assert (buffer[:, :5] == 7).all() and (buffer[:, 80:] == 7).all()


@of_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_long_rows_are_stored_past_the_caches(dtype):
    """From 32 KiB a row on, unless the gradient takes the place of the logits: rows of odd length, so each begins
    elsewhere between two vectors, with guards around; the bits are those of the ordinary way, which goes in place."""
    V, shift = 17003, 5
    logits, target = draw(4, V, dtype=dtype), labels((4,), V)
    options = dict(ignore_index=-100, label_smoothing=0.1, z_loss=0.01)
    loss = torch.empty(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    lse = torch.empty(4, dtype=torch.float64)
    _C.cross_entropy_forward(logits, target, loss, lse, **options)
    buffer = torch.full((4 * V + 2 * shift,), 7.0, dtype=dtype)
    streamed = buffer[shift:-shift].view(4, V)
    _C.cross_entropy_backward(logits, target, lse, torch.ones_like(loss), streamed, **options)
    _C.cross_entropy_backward(logits, target, lse, torch.ones_like(loss), logits, **options)
    assert_bitwise(streamed, logits)
    assert (buffer[:shift] == 7).all() and (buffer[-shift:] == 7).all()


def test_numpy_arrays_and_lse_in_both_dtypes():
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    target = np.array([0, 39, 7, -1, 20])
    options = dict(ignore_index=-1, label_smoothing=0.0, z_loss=0.0)
    loss, lse, exact = np.empty(5, np.float32), np.empty(5, np.float32), np.empty(5)
    _C.cross_entropy_forward(logits, target, loss, lse, **options)
    _C.cross_entropy_forward(logits, target, loss, exact, **options)
    np.testing.assert_array_equal(lse, exact.astype(np.float32))
    kept = target != -1
    np.testing.assert_allclose(exact[kept], np.log(np.exp(logits[kept].astype(float)).sum(1)), rtol=1e-7)
    assert exact[3] == loss[3] == 0


@pytest.mark.one_isa
def test_large_logits_have_the_gradients_of_their_rows():
    """In memory that is kept for the next result. Its values are those of the rows alone."""
    logits, target = draw(1, 300, dtype=torch.float32).expand(40000, 300), labels((40000,), 300)
    _, dx = gradient(lambda x: pykern.cross_entropy(x, target, reduction="sum"), logits)
    assert dx.nbytes > 32 << 20 and dx.is_contiguous()
    for row in (0, 20000, 39999):
        one = slice(row, row + 1)
        _, alone = gradient(lambda x, one=one: pykern.cross_entropy(x, target[one], reduction="sum"), logits[one])
        assert_bitwise(dx[one], alone)


@pytest.mark.one_isa
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(reduction):
    logits, target = draw(2, 3, 5, dtype=torch.float32), labels((2, 3), 5)
    op = torch.ops.pykern.cross_entropy.default
    torch.library.opcheck(op, (logits, target, -100, 0.1, 0.1, reduction))
    torch.library.opcheck(op, (logits.clone().requires_grad_(), target, -100, 0.1, 0.1, reduction))


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    target = labels((4,), 6)

    def f(x):
        return pykern.cross_entropy(2 * x, target, label_smoothing=0.1)

    logits = draw(4, 6, dtype=torch.float32)
    eager = gradient(f, logits)
    compiled = gradient(torch.compile(f, fullgraph=True, backend="aot_eager"), logits)
    assert_bitwise(compiled[0], eager[0], name="loss")
    assert_bitwise(compiled[1], eager[1], name="dlogits")


@pytest.mark.one_isa
def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    logits, target = draw(4, 9, dtype=torch.float32), labels((4,), 9)
    plain = gradient(lambda x: pykern.cross_entropy(x, target), logits)
    again = gradient(lambda x: checkpoint(pykern.cross_entropy, x, target, use_reentrant=False), logits)
    assert_bitwise(again[0], plain[0])
    assert_bitwise(again[1], plain[1])


@pytest.mark.one_isa
def test_autocast_leaves_the_logits_as_they_are():
    logits, target = draw(4, 9, dtype=torch.float32), labels((4,), 9)
    plain = gradient(lambda x: pykern.cross_entropy(x, target), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradient(lambda x: pykern.cross_entropy(x, target), logits)
        assert pykern.cross_entropy(logits.bfloat16(), target).dtype == torch.float32
    assert_bitwise(cast[0], plain[0])
    assert_bitwise(cast[1], plain[1])


@pytest.mark.one_isa
def test_a_second_derivative_is_refused():
    logits = draw(4, 9).requires_grad_()
    (dx,) = torch.autograd.grad((pykern.cross_entropy(logits, labels((4,), 9)) * 2).square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy has no second derivative"):
        dx.sum().backward()
