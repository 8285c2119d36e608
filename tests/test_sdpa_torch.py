"""scaled_dot_product_attention in torch's place: its signature, models of torch, compile, autocast, every refusal."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_sdpa import X, calls, keep, sdpa, torch_sdpa
from tools import ROOT, draw, with_gradients
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from pykern.testing import assert_bitwise, assert_close

pytestmark = pytest.mark.one_isa
__all__ = ["calls"]  # a fixture


def test_signature_is_that_of_torch():
    """The one its docstring begins with: names, order, defaults. Only torch's `scale` cannot be passed by position."""
    literal = re.match(r"\s*scaled_dot_product_attention\(([^)]*)\) -> Tensor", torch_sdpa.__doc__)[1]
    torchs = inspect.signature(eval(f"lambda {' '.join(literal.split())}: None"))
    ours = inspect.signature(sdpa)
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in torchs.parameters.values()
    ]
    assert list(ours.parameters) == (
        ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    )


class Model(torch.nn.Module):
    """Two layers of torch's own encoder under a causal mask and padding."""

    def __init__(self, dropout=0.0):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout, batch_first=True, dtype=torch.float64)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, **masks):
        return self.encoder(x, **masks)


def trained(model, x, **masks):
    """Output, and the gradient of every parameter."""
    out = model(x, **masks)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out.square().sum(), parameters)
    return dict(out=out.detach()) | dict(zip(names, gradients, strict=True))


def test_as_a_monkeypatch_in_a_model(monkeypatch):
    torch.manual_seed(0)
    model, x = Model(), draw(2, 9, 16)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    reached = []

    def counted(*args, **kwargs):
        reached.append(1)
        return sdpa(*args, **kwargs)

    causal = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    for masks in ({}, dict(src_key_padding_mask=padding), dict(mask=causal), dict(mask=causal, is_causal=True)):
        monkeypatch.setattr(F, "scaled_dot_product_attention", torch_sdpa)
        expected = trained(model, x, **masks)
        reached.clear()
        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
        ours = trained(model, x, **masks)
        assert len(reached) == 2, "the model does not call the function that is replaced"
        for name, x_ in ours.items():
            assert_close(x_, expected[name], name=f"{list(masks)} {name}", gradient=True, scale=1.0)


def test_a_model_with_dropout_trains_repeatably(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    model, x = Model(dropout=0.2).train(), draw(2, 9, 16)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(trained(model, x))
    for name, gradient in runs[0].items():
        assert_bitwise(gradient, runs[1][name], name=name)


def test_the_example_of_the_docs(monkeypatch):
    """docs/drop_in.md: its code runs."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", torch_sdpa)  # puts torch's back afterwards
    page = (ROOT / "docs" / "drop_in.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(code, "docs/drop_in.md", "exec"), names)
    assert F.scaled_dot_product_attention is sdpa and names["out"].shape == (2, 10, 4, 16)


def test_causal_biases_of_torch(calls):
    """torch.nn.attention.bias stands for a mask; here it stays one."""
    for L, S in ((5, 7), (7, 7)):
        q, k, v = draw(2, 4, L, 3), draw(2, 4, S, 3), draw(2, 4, S, 3)
        for bias in (causal_upper_left(L, S), causal_lower_right(L, S)):
            expected = torch_sdpa(q, k, v, bias)
            calls.clear()
            assert_close(sdpa(q, k, v, bias), expected, name=f"{bias.variant} {L} {S}")
            assert len(calls) == 1 and calls[0][3]["mask"] is None
    with pytest.raises(ValueError, match="attn_mask is a CausalBias of 5 queries and 6 keys, but there are 7 and 7"):
        sdpa(q, k, v, causal_upper_left(5, 6))


@pytest.mark.slow
def test_compile_fullgraph():
    tensors = dict(query=draw(2, 4, 5, 3), key=draw(2, 2, 7, 3), value=draw(2, 2, 7, 3))
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    for options in (dict(is_causal=True), dict(attn_mask=keep(5, 7)), dict(attn_mask=draw(4, 5, 7), scale=0.5)):
        run = [
            with_gradients(
                lambda f=f, **t: dict(out=f(**t, enable_gqa=True, **options)),  # noqa: B023
                tensors,
                dict(out=torch.ones(2, 4, 5, 3)),
            )
            for f in (compiled, sdpa)
        ]
        for name, x in run[0].items():
            assert_bitwise(x, run[1][name], name=name)


def test_autocast():
    """The dtype of torch's results; a float mask is cast with the rest."""
    q, k, v = (draw(2, 4, 5, 3, seed=i).float() for i in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mask in (None, keep(5, 5), draw(5, 5).float()):
            ours, expected = sdpa(q, k.bfloat16(), v, mask), torch_sdpa(q, k.bfloat16(), v, mask)
            assert ours.dtype == expected.dtype == torch.bfloat16
            assert_close(ours, expected, name="autocast")
        assert sdpa(q.double(), k.double(), v.double()).dtype == torch.float64


# ---- refusals


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refusals():
    q, k, v, ones = torch.ones(2, 4, 5, 3), torch.ones(2, 4, 7, 3), torch.ones(2, 4, 7, 6), torch.ones
    jagged = torch.nested.nested_tensor([ones(3, 4), ones(5, 4)], layout=torch.jagged)
    strided = torch.nested.nested_tensor([ones(3, 4), ones(5, 4)])
    types = [
        (lambda: sdpa([1.0], k, v), "query must be a torch.Tensor, got list"),
        (lambda: sdpa(q, None, v), "key must be a torch.Tensor, got NoneType"),
        (lambda: sdpa(q, k, v, [True]), "attn_mask must be a torch.Tensor, got list"),
        (lambda: sdpa(jagged, jagged, jagged), "query must be a dense tensor, got a nested one"),
        (lambda: sdpa(strided, strided, strided), "query must be a dense tensor, got a nested one"),
        (lambda: sdpa(q.to_sparse(), k, v), "query must be a dense tensor, got a sparse_coo one"),
        (lambda: sdpa(q, k.double(), v), "key has dtype torch.float64 but query has torch.float32"),
        (lambda: sdpa(q, k, v.half()), "value has dtype torch.float16 but query has torch.float32"),
        (lambda: sdpa(q.int(), k.int(), v.int()), "query has dtype torch.int32, expected a floating one"),
        (lambda: sdpa(q.cfloat(), k, v), "query has dtype torch.complex64, expected a floating one"),
        (lambda: sdpa(q, k, v, ones(5, 7).int()), "attn_mask has dtype torch.int32, expected bool, float32 or query's"),
        (lambda: sdpa(q, k, v, ones(5, 7).double()), "attn_mask has dtype torch.float64, expected bool, float32 or"),
        (lambda: sdpa(q, k, v, ones(5, 7).half()), "attn_mask has dtype torch.float16, expected bool, float32 or"),
        (lambda: sdpa(q, k, v, None, 0.0, 0.125), "is_causal must be a bool, got float"),
    ]
    values = [
        (lambda: sdpa(ones(3), k, v), r"query must be \[..., L, E\], got shape \[3\]"),
        (lambda: sdpa(q, k, ones(7)), r"value must be \[..., S, Ev\], got shape \[7\]"),
        (lambda: sdpa(q, v, v), "key has head size 6 but query has 3"),
        (lambda: sdpa(q, k, v[:, :, :6]), "value has 6 keys but key has 7"),
        (
            lambda: sdpa(q, k[:, :2], v[:, :2]),
            r"\[4, 2, 2\] heads of query, key and value do not broadcast \(is e",
        ),
        (
            lambda: sdpa(ones(3, 4, 5, 3), k, v),
            r"shapes \[\[3, 4, 5, 3\], \[2, 4, 7, 3\], \[2, 4, 7, 6\]\] of query, ",
        ),
        (lambda: sdpa(q, k[:, :3], v[:, :3], enable_gqa=True), "query has 4 heads, which is not a multiple of the 3 h"),
        (lambda: sdpa(q, k[:, :2], v[:, :3], enable_gqa=True), "query has 4 heads, which is not a multiple of the 3 h"),
        (lambda: sdpa(q, k[:, :0], v[:, :0], enable_gqa=True), "query has 4 heads, which is not a multiple of the 0 h"),
        (lambda: sdpa(q[:, :2], k, v, enable_gqa=True), "query has 2 heads, which is not a multiple of the 4 heads of"),
        (lambda: sdpa(q, k[0, 0], v, enable_gqa=True), r"enable_gqa needs a dimension of heads, but key has shape \[7"),
        (lambda: sdpa(q, k, v, ones(5, 6)), r"attn_mask of shape \[5, 6\] does not broadcast to the scores' \[2, 4, 5"),
        (lambda: sdpa(q, k, v, ones(3, 1, 5, 7)), r"attn_mask of shape \[3, 1, 5, 7\] does not broadcast to the score"),
        (lambda: sdpa(q, k, v, ones(1, 2, 4, 5, 7)), r"attn_mask of shape \[1, 2, 4, 5, 7\] does not broadcast to the"),
        (lambda: sdpa(q[0], k[0], v[0], ones(1, 4, 5, 7)), r"attn_mask of shape \[1, 4, 5, 7\] does not broadcast to "),
        (lambda: sdpa(q[..., :0], k[..., :0], v, scale=1.0), "head sizes 0 and 6 must be 1..1024"),
        (lambda: sdpa(ones(5, 1025), ones(7, 1025), ones(7, 3)), "head sizes 1025 and 3 must be 1..1024"),
        (lambda: sdpa(q, k, v, dropout_p=-0.1), "dropout_p is -0.1, expected 0..1"),
        (lambda: sdpa(q, k, v, dropout_p=1.5), "dropout_p is 1.5, expected 0..1"),
        (lambda: sdpa(q, k, v, scale=math.nan), "scale is nan, expected a finite number"),
    ]
    both = "Explicit attn_mask should not be set when is_causal=True"
    with pytest.raises(RuntimeError, match=both):
        torch_sdpa(q, k, v, ones(5, 7), is_causal=True)  # where torch looks: with v as wide as k its kernel does not
    errors = [
        (lambda: sdpa(q, k, v, ones(5, 7), is_causal=True), both),
        (lambda: sdpa(q, k, k, X, is_causal=True), both),
        (lambda: sdpa(q, k, v, causal_upper_left(5, 7), is_causal=True), both),
    ]
    for error, cases in ((TypeError, types), (ValueError, values), (RuntimeError, errors)):
        for call, words in cases:
            with pytest.raises(error, match=f"^scaled_dot_product_attention: {words}"):
                call()
