"""attention_weights: against the formula, its gradients, rows, what is masked, torch's machinery and every refusal."""

import math

import pytest
import torch
from tools import DTYPES, VIEWS, draw, with_gradients

import pykern
from pykern.ops import attention_formula
from pykern.testing import assert_bitwise, assert_close, ratios, reference

MASK = torch.rand(27, 150, generator=torch.Generator().manual_seed(0)) < 0.6
MASK[::5] = False


def inputs(T=27, S=150, D=20, B=2, H=4, G=2, dtype=torch.float64, bias=None):
    shapes = dict(q=(B, H, T, D), k=(B, G, S, D)) | ({} if bias is None else dict(bias=bias))
    return {name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def lse_of(tensors, **options):
    return pykern.attention(tensors["q"], tensors["k"], tensors["k"], return_lse=True, **options)[1]


def through_lse(q, k, *, rows=None, **options):
    """The weights as a function of q, k, bias and sinks: the softmax."""
    _, lse = pykern.attention(q, k, k, return_lse=True, **options)
    return pykern.attention_weights(q, k, lse, rows=rows, **options)


# name: (shape of bias, options); each with and without rows
OPTIONS = {
    "plain": (None, {}),
    "causal": (None, dict(causal=True)),
    "mask, rows that see nothing": (None, dict(mask=MASK)),
    "bias": ((4, 27, 150), dict(mask=MASK, causal=True)),
    "bias of a key": ((2, 1, 1, 150), {}),
    "window": (None, dict(window=(20, 3))),
    "softcap": (None, dict(softcap=1.5, scale=0.7)),
    "alibi": (None, dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]), causal=True)),
    "alibi of a batch": (None, dict(alibi_slopes=torch.rand(2, 4, generator=torch.Generator().manual_seed(0)))),
    "sinks": (None, dict(sinks=draw(4, seed=7), mask=MASK)),
    "everything": (
        (1, 4, 27, 1),
        dict(mask=MASK, window=(60, 40), softcap=2.0, alibi_slopes=torch.full((4,), 0.1), sinks=draw(4, seed=7)),
    ),
}
ROWS = torch.tensor([26, 0, 5, 5, 13])


def in_dtype(options, dtype):
    return {n: x.to(dtype) if n == "sinks" else x for n, x in options.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_formula(name, dtype):
    """Every weight, of all rows and of some; together they are the softmax that attention multiplies v with."""
    bias, options = OPTIONS[name]
    tensors, options = inputs(bias=bias, dtype=dtype), in_dtype(options, dtype)
    lse = lse_of(tensors, **{n: x for n, x in tensors.items() if n == "bias"}, **options)
    weights = pykern.attention_weights(**tensors, lse=lse, **options)
    exact = reference.attention_weights(**tensors, **options)
    assert weights.dtype == dtype and weights.shape == (2, 4, 27, 150)
    assert_close(weights, exact, name=name)
    assert (weights[exact == 0] == 0).all()
    assert_bitwise(pykern.attention_weights(**tensors, lse=lse, rows=ROWS, **options), weights[:, :, ROWS], name=name)


@pytest.mark.parametrize("dtype", ratios.DTYPES)
@pytest.mark.parametrize("name", ["causal", "bias", "softcap"])
def test_ratio_rule(name, dtype):
    """Weights and gradients beside exp(score - lse) in torch, of the same lse: torch.softmax needs none, and none of
    its rounding to float32."""
    bias, options = OPTIONS[name]

    def arguments(generator):
        tensors = {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in inputs(bias=bias).items()}
        lse = lse_of(tensors, **{n: x for n, x in tensors.items() if n == "bias"}, **options)
        return tensors | dict(lse=lse.masked_fill(lse.isneginf(), 0.0))  # of rows that see nothing: any number

    def ours(lse, **tensors):
        return dict(weights=pykern.attention_weights(**tensors, lse=lse.float(), **options))

    def formula(**tensors):
        return dict(weights=reference.in_own_dtype(reference.attention_weights)(**tensors, **options))

    rows = ratios.measure(ratios.Case("attention_weights", arguments, ours, formula), dtype)
    print(ratios.table(rows))
    assert {row.tensor for row in rows} == {"weights", "dq", "dk", "dlse"} | ({"dbias"} if bias else set())
    assert all(row.passes for row in rows), ratios.table(rows)


@pytest.mark.parametrize("kind", ["tensor", "strided", "list", "range", "empty"])
def test_kinds_of_rows(kind):
    tensors = inputs(dtype=torch.float32)
    rows = dict(tensor=ROWS, strided=torch.arange(27)[::5], list=[3, 0, 3], range=range(2, 27, 7), empty=[])[kind]
    lse = lse_of(tensors)
    weights = pykern.attention_weights(**tensors, lse=lse, rows=rows)
    all_rows = pykern.attention_weights(**tensors, lse=lse)
    assert_bitwise(weights, all_rows[:, :, torch.as_tensor(list(rows), dtype=torch.int64)])


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    tensors = inputs(dtype=torch.bfloat16, bias=(4, 27, 150))
    lse = lse_of(tensors, bias=tensors["bias"])
    views = {name: VIEWS[view](x) for name, x in tensors.items()}
    wide = VIEWS[view](lse[..., None].expand(*lse.shape, 2))[..., 0]
    assert_bitwise(pykern.attention_weights(**views, lse=wide), pykern.attention_weights(**tensors, lse=lse))


def test_threads_do_not_show(threads):
    tensors = inputs(dtype=torch.float32)
    lse, douts = lse_of(tensors), dict(weights=draw(2, 4, 27, 150))
    results = with_gradients(lambda **x: dict(weights=pykern.attention_weights(**x)), tensors | dict(lse=lse), douts)
    pykern.set_num_threads(1)
    single = with_gradients(lambda **x: dict(weights=pykern.attention_weights(**x)), tensors | dict(lse=lse), douts)
    for name, x in results.items():
        assert_bitwise(x, single[name], name=f"{name}, {threads} threads")


@pytest.mark.parametrize("T, S, B, H, G", [(0, 5, 1, 2, 1), (3, 0, 1, 2, 1), (3, 5, 0, 2, 1), (3, 5, 1, 0, 0)])
def test_nothing_to_do(T, S, B, H, G):
    tensors = inputs(T, S, 4, B, H, G) | dict(lse=draw(B, H, T))
    results = with_gradients(
        lambda **x: dict(weights=pykern.attention_weights(**x)), tensors, dict(weights=draw(B, H, T, S))
    )
    assert results["weights"].shape == (B, H, T, S)
    for name, x in tensors.items():
        assert results[f"d{name}"].shape == x.shape and (results[f"d{name}"] == 0).all()


# ---- gradients

SMALL = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1]]).bool()
GRADCHECKS = {
    "plain": (None, {}),
    "causal": (None, dict(causal=True)),
    "mask": (None, dict(mask=SMALL)),
    "bias": ((2, 2, 4, 5), dict(mask=SMALL)),
    "bias of a key": ((2, 1, 5), {}),
    "bias of a row": ((4, 1), {}),
    "window": (None, dict(window=(1, 1))),
    "softcap": (None, dict(softcap=0.8)),
    "alibi": (None, dict(alibi_slopes=torch.tensor([0.3, 0.7]))),
    "sinks": (None, dict(sinks=draw(2, seed=7))),
    "everything": (
        (2, 4, 5),
        dict(window=(3, 1), softcap=1.2, alibi_slopes=torch.tensor([0.3, 0.7]), mask=SMALL, sinks=draw(2, seed=7)),
    ),
}


@pytest.mark.parametrize("rows", [None, [2, 0, 2]], ids=["all", "some"])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, rows, monkeypatch):
    """Of q, k, bias and lse as independent arguments, and of the softmax that both ways make, sinks included."""
    monkeypatch.setattr(attention_formula, "BLOCK_SCORES", 1)
    monkeypatch.setattr(attention_formula, "MIN_ROWS", 2)  # more than one block
    bias, options = GRADCHECKS[name]
    tensors = inputs(4, 5, 2, 2, 2, 1, bias=bias)
    lse = lse_of(tensors, **{n: x for n, x in tensors.items() if n == "bias"}, **options)
    lse = lse.masked_fill(lse.isneginf(), 0.3)  # of rows that see nothing: any number
    tensors |= dict(lse=lse)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def f(*args):
        return pykern.attention_weights(**dict(zip(tensors, args, strict=True)), rows=rows, **options)

    assert torch.autograd.gradcheck(f, leaves, atol=1e-7, rtol=1e-6)
    del tensors["lse"]
    if "sinks" in options:
        tensors["sinks"] = options["sinks"].clone()
    rest = {n: x for n, x in options.items() if n != "sinks"}

    def softmax(*args):
        return through_lse(**dict(zip(tensors, args, strict=True)), rows=rows, **rest)

    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(softmax, leaves, atol=1e-7, rtol=1e-6)


def test_the_gradient_is_that_of_a_softmax():
    """Larger than gradcheck's: more than a tile of keys, repeated rows."""
    tensors = inputs(bias=(4, 27, 150))
    options = dict(mask=MASK, causal=True, rows=ROWS)
    dout = dict(weights=draw(2, 4, 5, 150))
    ours = with_gradients(lambda **x: dict(weights=through_lse(**x, **options)), tensors, dout)
    exact = with_gradients(lambda **x: dict(weights=reference.attention_weights(**x, **options)), tensors, dout)
    for name, x in ours.items():
        assert_close(x, exact[name], name=name, gradient=name[0] == "d")


# ---- what is masked


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_nobody_sees_has_no_effect(poison):
    tensors = inputs(bias=(4, 27, 150), dtype=torch.float32)
    mask = MASK.clone()
    unseen = torch.tensor([0, 1, 63, 64, 149])
    mask[:, unseen] = False
    options = dict(mask=mask, window=(100, 100))
    exact = reference.attention_weights(**tensors, **options)
    hidden, dout = exact == 0, draw(2, 4, 27, 150, dtype=torch.float32)
    assert hidden.any() and not hidden.all()

    def results(tensors, dout):
        tensors = tensors | dict(lse=lse_of(tensors, bias=tensors["bias"], **options))
        return with_gradients(
            lambda **x: dict(weights=pykern.attention_weights(**x, **options)), tensors, dict(weights=dout)
        )

    clean = results(tensors, dout)
    assert (clean["weights"][hidden] == 0).all()
    bad = {name: x.clone() for name, x in tensors.items()}
    bad["k"][:, :, unseen] = poison
    bad["q"][:, :, ::5] = poison
    bad["bias"][hidden[0]] = poison
    for name, x in results(bad, dout.masked_fill(hidden, poison)).items():
        assert torch.equal(x, clean[name]), name


def test_a_bias_of_minus_infinity_is_a_mask():
    tensors = inputs(bias=(27, 150))
    tensors["bias"] = tensors["bias"].masked_fill(~MASK, -math.inf)
    tensors["lse"] = lse_of(tensors, bias=tensors["bias"])
    results = with_gradients(
        lambda **x: dict(weights=pykern.attention_weights(**x)), tensors, dict(weights=draw(2, 4, 27, 150))
    )
    assert (results["weights"][:, :, ~MASK] == 0).all() and (results["dbias"][~MASK] == 0).all()
    assert (results["dlse"][:, :, ::5] == 0).all() and all(
        x.isfinite().all() for n, x in results.items() if n[0] == "d"
    )


# ---- torch's machinery


@pytest.mark.one_isa
@pytest.mark.parametrize("view", ["packed", "rows before matrices", "transposed"])
def test_opcheck(view):
    tensors = inputs(5, 9, 4, dtype=torch.float32, bias=(1, 4, 1, 9))
    q, k, bias = (VIEWS[view](x).requires_grad_() for x in tensors.values())
    mask, slopes, lse = torch.ones(2, 1, 5, 9).bool(), torch.ones(2, 4), draw(2, 4, 5, dtype=torch.float32)
    options = (mask, bias, slopes, None, None, None, None, 3, 1, 0.5, 1.5, 0.0)
    op = torch.ops.pykern.attention_weights.default
    for rows in (None, torch.tensor([4, 0, 4])):
        torch.library.opcheck(op, (q, k, lse.requires_grad_(), rows, *options))
        constant = [x.detach() if isinstance(x, torch.Tensor) else x for x in (q, k, lse, rows, *options)]
        torch.library.opcheck(op, constant)
        weights = op(*constant)
        arguments = (*constant[:4], weights, torch.ones_like(weights), True, *constant[4:])
        torch.library.opcheck(torch.ops.pykern.attention_weights_backward.default, arguments)


@pytest.mark.one_isa
@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, ROWS, [1, 2]], ids=["all", "tensor", "list"])
def test_compile_fullgraph(rows):
    tensors = inputs(dtype=torch.float32, bias=(4, 27, 150))
    dout = dict(weights=draw(2, 4, 27 if rows is None else len(rows), 150))

    def f(**x):
        return dict(weights=through_lse(**x, rows=rows, mask=MASK, causal=True))

    eager = with_gradients(f, tensors, dout)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for name, x in with_gradients(compiled, tensors, dout).items():
        assert_bitwise(x, eager[name], name=name)


@pytest.mark.one_isa
def test_autocast():
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = through_lse(**tensors)
    assert_bitwise(weights, through_lse(**{name: x.bfloat16() for name, x in tensors.items()}))


@pytest.mark.one_isa
def test_a_second_derivative_is_refused():
    tensors = inputs(3, 5)
    lse, q = lse_of(tensors), tensors["q"].requires_grad_()
    (dq,) = torch.autograd.grad(pykern.attention_weights(q, tensors["k"], lse).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="pykern::attention_weights has no second derivative"):
        dq.sum().backward()


@pytest.mark.one_isa
def test_refusals():
    q, k, lse = torch.ones(2, 4, 5, 3), torch.ones(2, 2, 7, 3), torch.ones(2, 4, 5)
    f, ones, at = pykern.attention_weights, torch.ones, torch.tensor
    slopes = r"\[3\], expected \[4\] or \[2, 4\]"
    cases = {
        TypeError: [
            (lambda: f([1.0], k, lse), "q must be a torch.Tensor, got list"),
            (lambda: f(q, k, None), "lse must be a torch.Tensor, got NoneType"),
            (lambda: f(q, k, lse, mask=[True]), "mask must be a torch.Tensor, got list"),
            (lambda: f(q, k, lse, sinks=1.0), "sinks must be a torch.Tensor, got float"),
            (lambda: f(q, k.double(), lse), "k has dtype float64 but q has float32"),
            (lambda: f(q.int(), k.int(), lse), "q has dtype int32, expected float32, float64"),
            (lambda: f(q, k, lse.bfloat16()), "lse has dtype bfloat16, expected float32"),
            (lambda: f(q.double(), k.double(), lse), "lse has dtype float32, expected float64"),
            (lambda: f(q, k, lse, bias=ones(7).half()), "bias has dtype float16 but q has float32"),
            (lambda: f(q, k, lse, mask=ones(7)), "mask has dtype float32, expected bool"),
            (lambda: f(q, k, lse, alibi_slopes=ones(4).double()), "alibi_slopes has dtype float64, expected float32"),
            (lambda: f(q, k, lse, rows=at([1.0])), "rows has dtype float32, expected int64"),
            (lambda: f(q, k, lse, rows=at([1]).int()), "rows has dtype int32, expected int64"),
            (
                lambda: f(q, k, lse, rows=[0, 1.0]),
                r"rows must be an int64 tensor or a sequence of ints, got \[0, 1.0\]",
            ),
            (lambda: f(q, k, lse, rows=3), "rows must be an int64 tensor or a sequence of ints, got 3"),
            (lambda: f(q, k, lse, rows=[True]), "rows must be an int64 tensor or a sequence of ints"),
            (lambda: f(q, k, lse, window=(1.0, 2)), r"window is \(1.0, 2\), expected int or None"),
        ],
        ValueError: [
            (lambda: f(q[0], k, lse), r"q must be \[B, H, T, D\], got shape \[4, 5, 3\]"),
            (lambda: f(q, k[0], lse), r"k must be \[B, G, S, D\], got shape \[2, 7, 3\]"),
            (lambda: f(q, k, lse[0]), r"lse must be \[B, H, T\], got shape \[4, 5\]"),
            (lambda: f(q, k, lse[:, :, :4]), r"lse has shape \[2, 4, 4\], expected that of q without its last"),
            (lambda: f(q, k[..., :2], lse), "k has head size 2 but q has 3"),
            (lambda: f(q[:, :3], k, lse[:, :3]), "q has 3 heads, which is not a multiple of the 2 heads of k"),
            (lambda: f(q, k, lse, mask=ones(6).bool()), r"mask of shape \[6\] does not broadcast to \[B, H, T, S\]"),
            (lambda: f(q, k, lse, bias=ones(7, 5)), r"bias of shape \[7, 5\] does not broadcast to \[B, H, T, S\]"),
            (lambda: f(q, k, lse, sinks=ones(3)), r"sinks has shape \[3\], expected \[4\]"),
            (lambda: f(q, k, lse, alibi_slopes=ones(3)), f"alibi_slopes has shape {slopes}"),
            (lambda: f(q, k, lse, alibi_slopes=ones(4).requires_grad_()), "alibi_slopes takes no gradient"),
            (lambda: f(q, k, lse, window=3), r"window is 3, expected \(left, right\)"),
            (lambda: f(q, k, lse, scale=math.nan), "scale is nan, expected a finite number"),
            (lambda: f(q, k, lse, softcap=-1.0), "softcap is -1, expected a positive number"),
            (lambda: f(q, k, lse, rows=at([[1]])), r"rows has shape \[1, 1\], expected \[n\]"),
            (lambda: f(q, k, lse, rows=at(1)), r"rows has shape \[\], expected \[n\]"),
        ],
        IndexError: [
            (lambda: f(q, k, lse, rows=[0, 5]), "rows contains 5, but q has 5 rows"),
            (lambda: f(q, k, lse, rows=[-1]), "rows contains -1, but q has 5 rows"),
            (lambda: f(q, k, lse, rows=at([0, 5])), "rows contains 5, but q has 5 rows"),
            (lambda: f(q, k, lse, rows=at([-1])), "rows contains -1, but q has 5 rows"),
        ],
    }
    for error, calls in cases.items():
        for call, words in calls:
            with pytest.raises(error, match="^attention_weights: " + words):
                call()
