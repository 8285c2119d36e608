"""The tests' own tools: each must fail on a planted defect."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pykern.testing import assert_bitwise, assert_close, ratios, reference
from pykern.testing.cases import CASES

pytestmark = pytest.mark.one_isa


def test_assert_close_names_the_worst_element():
    expected = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(3, 4, 5)
    actual = expected.float()
    assert_close(actual, expected, name="copy")
    actual[2, 1, 3] += 1e-4
    actual[0, 0, 1] += 1e-5
    with pytest.raises(AssertionError, match=r"x: worst at \[2, 1, 3\]: got .*; 2 of 60 elements are out"):
        assert_close(actual, expected, name="x")


def test_one_zeroed_element_of_a_million_is_found():
    expected = torch.randn(1000, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = expected.float()
    actual[123, 456] = 0
    with pytest.raises(AssertionError, match=r"\[123, 456\]"):
        assert_close(actual, expected, name="x")


@pytest.mark.parametrize(
    "got, want", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (math.inf, -math.inf), (1.0, math.inf)]
)
def test_special_values_must_stand_at_the_same_places(got, want):
    with pytest.raises(AssertionError, match=r"at \[1\] got .* differ in being finite"):
        assert_close(torch.tensor([0.0, got]), torch.tensor([0.0, want]), name="x")
    same = torch.tensor([math.nan, math.inf, -math.inf])
    assert_close(same, same.double(), name="x")


def test_shapes_and_numpy():
    with pytest.raises(AssertionError, match=r"x: shape \[2\], expected \[1, 2\]"):
        assert_close(np.zeros(2), np.zeros((1, 2)), name="x")
    assert_close(np.ones((0, 3), np.float32), np.ones((0, 3)), name="x")


def test_assert_bitwise():
    x = torch.tensor([0.0, math.nan, 1.0])
    assert_bitwise(x, x.clone())
    with pytest.raises(AssertionError, match=r"y: 1 of 3 elements differ in their bits, first at \[0\]: 0.0 and -0.0"):
        assert_bitwise(x, torch.tensor([-0.0, math.nan, 1.0]), name="y")
    with pytest.raises(AssertionError, match="dtypes"):
        assert_bitwise(x, x.double())
    with pytest.raises(AssertionError, match="shapes"):
        assert_bitwise(x, x[None])


# ---- the ratio rule

GELU = next(case for case in CASES if case.op == "gelu")
FORMULA = replace(GELU, pykern=GELU.reference)


def test_every_public_op_has_a_ratio():
    listed = {case.op.split()[0].removesuffix("_tanh") for case in CASES}
    expected = (
        "relu sigmoid silu gelu swiglu linear mlp layer_norm rms_norm softmax rope attention attention_with_kvcache"
    )
    assert listed == {*expected.split(), "embedding", "cross_entropy", "linear_cross_entropy", "adamw"}


def test_the_formula_itself_has_ratio_one():
    for row in ratios.measure(replace(FORMULA, fused=None), torch.float32):
        assert row.passes and row.pykern == row.eager and row.ratio <= 1


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_one_wrong_element_fails(dtype):
    def wrong(x):
        out = GELU.reference(x=x)["out"]
        nudge = torch.zeros_like(out)
        nudge[7, 9] = 0.5
        return dict(out=out + nudge * x)  # one element of out and of dx

    rows = ratios.measure(replace(GELU, pykern=wrong), dtype)
    assert [row.passes for row in rows] == [False, False], ratios.table(rows)


def test_nan_fails():
    rows = ratios.measure(
        replace(GELU, pykern=lambda x: dict(out=GELU.reference(x=x)["out"] * math.nan)), torch.float32
    )
    assert not any(row.passes for row in rows)


def test_worse_than_fused_fails():
    def coarse(x):  # within twice the error of eager bfloat16, but far above one rounding
        return dict(out=GELU.reference(x=x)["out"])

    def exact(x):
        return dict(out=reference.gelu(x).to(x.dtype))

    row = ratios.Row("op", torch.bfloat16, "out", False, pykern=9e-3, eager=8e-3, fused=2e-3, rounding=4e-3)
    assert row.ratio < row.limit and not row.passes
    assert replace(row, fused=5e-3).passes and replace(row, fused=None).passes
    rows = ratios.measure(replace(GELU, pykern=coarse, fused=exact), torch.bfloat16)
    assert all(row.fused <= row.rounding for row in rows if row.tensor == "out")


def test_check_exits_non_zero_when_a_row_fails(monkeypatch, capsys):
    from pykern.testing import cases

    monkeypatch.setattr(cases, "CASES", [FORMULA])
    assert ratios.main(["gelu"]) in (0, 1)
    monkeypatch.setattr(cases, "CASES", [replace(GELU, pykern=lambda x: dict(out=x * 0.99))])
    assert ratios.main([]) == 1
    assert "FAIL" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        ratios.main(["convolution"])
    assert stop.value.code == 2


# ---- the references against independent code: torch's own ops in float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_references_agree_with_torch():
    F = torch.nn.functional
    x, w, b = draw(5, 12), draw(12), draw(12, seed=1)
    pairs = {
        "gelu": (reference.gelu(x), F.gelu(x)),
        "gelu_tanh": (reference.gelu_tanh(x), F.gelu(x, approximate="tanh")),
        "silu": (reference.silu(x), F.silu(x)),
        "layer_norm": (reference.layer_norm(x, w, b), F.layer_norm(x, (12,), w, b)),
        "rms_norm": (reference.rms_norm(x, w), F.rms_norm(x, (12,), w, 1e-6)),
        "linear": (reference.linear(x, draw(3, 12, seed=2), b[:3]), F.linear(x, draw(3, 12, seed=2), b[:3])),
        "linear relu": (
            reference.linear(x, draw(3, 12, seed=2), b[:3], activation="relu", residual=x[:, :3]),
            F.relu(F.linear(x, draw(3, 12, seed=2), b[:3])) + x[:, :3],
        ),
        "mlp": (
            reference.mlp(x, draw(4, 12, seed=2), draw(3, 4, seed=3), b[:4], b[4:7], residual=x[:, :3]),
            F.linear(F.gelu(F.linear(x, draw(4, 12, seed=2), b[:4]), approximate="tanh"), draw(3, 4, seed=3), b[4:7])
            + x[:, :3],
        ),
        "mlp with a gate": (
            reference.mlp(
                *(x, draw(4, 12, seed=2), draw(3, 4, seed=3), b[:4]),
                gate_weight=draw(4, 12, seed=4),
                gate_bias=b[4:8],
                activation="silu",
            ),
            (F.silu(F.linear(x, draw(4, 12, seed=4), b[4:8])) * F.linear(x, draw(4, 12, seed=2), b[:4]))
            @ draw(3, 4, seed=3).T,
        ),
    }
    target = torch.tensor([1, 11, -100, 0, 5])
    for reduction in ("none", "sum", "mean"):
        options = dict(label_smoothing=0.2, reduction=reduction)
        pairs[reduction] = (reference.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options))
    for name, (ours, torchs) in pairs.items():
        assert_close(ours, torchs, name=name)


def test_attention_reference_agrees_with_torch():
    q, k, v, bias = draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 5, seed=2), draw(4, 6, 6, seed=3)
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.8
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert_close(
        reference.attention(q, k, v, causal=True), sdpa(q, k, v, is_causal=True, enable_gqa=True), name="causal"
    )
    both = sdpa(q, k, v, bias.masked_fill(~mask, -math.inf).expand(2, 4, 6, 6), enable_gqa=True, scale=0.3)
    assert_close(reference.attention(q, k, v, mask=mask, bias=bias, scale=0.3), both, name="mask, bias and scale")


def test_attention_reference_on_dead_rows_and_unseen_nans():
    q, k, v = draw(1, 1, 3, 4).requires_grad_(), draw(1, 1, 5, 4, seed=1), draw(1, 1, 5, 4, seed=2)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    mask[:, 3] = False
    clean = reference.attention(q, k, v, mask=mask, return_lse=True)
    k[0, 0, 3], v[0, 0, 3] = math.nan, math.inf
    out, lse = reference.attention(q, k, v, mask=mask, return_lse=True)
    assert_close(out, clean[0], name="out")
    assert (out[0, 0, 1] == 0).all() and lse[0, 0, 1] == -math.inf
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.isfinite().all() and (dq[0, 0, 1] == 0).all()
    empty, lse = reference.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (empty == 0).all() and (lse == -math.inf).all()


def test_cached_reference_is_the_whole_attention():
    q, k, v = draw(1, 2, 7, 6), draw(1, 2, 7, 6, seed=1), draw(1, 2, 7, 6, seed=2)
    angles = draw(20, 2, seed=3)
    cos, sin = angles.cos(), angles.sin()
    rotate = dict(cos=cos, sin=sin)
    whole = reference.attention(reference.rope(q, **rotate), reference.rope(k, **rotate), v, causal=True)
    caches, start, parts = [torch.zeros(1, 2, 9, 6), torch.zeros(1, 2, 9, 6)], 0, []
    for step in (3, 1, 3):
        new = [x[:, :, start : start + step] for x in (q, k, v)]
        out, _, *caches = reference.attention_with_kvcache(
            new[0], *caches, *new[1:], cache_seqlens=torch.tensor([start]), rotary_cos=cos, rotary_sin=sin
        )
        parts.append(out)
        start += step
    assert_close(torch.cat(parts, 2), whole, name="cached")


def test_adamw_reference_agrees_with_torch():
    param = torch.nn.Parameter(draw(4, 5))
    options = dict(lr=0.1, eps=1e-6, weight_decay=0.2)
    adamw = torch.optim.AdamW([param], betas=(0.8, 0.95), **options)
    p, m, v = param.detach().clone(), torch.zeros(4, 5), torch.zeros(4, 5)
    for step in (1, 2, 3):
        param.grad = draw(4, 5, seed=step)
        adamw.step()
        p, m, v = reference.adamw(p, param.grad * 4, m, v, beta1=0.8, beta2=0.95, step=step, grad_scale=0.25, **options)
    assert_close(p, param, name="param")
