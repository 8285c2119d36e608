"""pykern.nn against the torch.nn twins in float64: same arguments, same state dict, same outputs and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nn_twins import CLOSE, assert_same_gradients, randn, randomise, same_module

from pykern import _C, nn, ops

# name: (pykern module, torch twin, input shape)
TWINS = {
    "Linear": (lambda **kw: nn.Linear(7, 5, **kw), lambda **kw: torch.nn.Linear(7, 5, **kw), (2, 3, 7)),
    "Linear without bias": (
        lambda **kw: nn.Linear(7, 5, bias=False, **kw),
        lambda **kw: torch.nn.Linear(7, 5, bias=False, **kw),
        (7,),
    ),
    "LayerNorm": (lambda **kw: nn.LayerNorm(6, **kw), lambda **kw: torch.nn.LayerNorm(6, **kw), (2, 3, 6)),
    "LayerNorm over two dimensions": (
        lambda **kw: nn.LayerNorm((3, 4), eps=1e-3, **kw),
        lambda **kw: torch.nn.LayerNorm((3, 4), eps=1e-3, **kw),
        (2, 3, 4),
    ),
    "LayerNorm without bias": (
        lambda **kw: nn.LayerNorm(6, bias=False, **kw),
        lambda **kw: torch.nn.LayerNorm(6, bias=False, **kw),
        (2, 6),
    ),
    "LayerNorm without weights": (
        lambda **kw: nn.LayerNorm(6, elementwise_affine=False, **kw),
        lambda **kw: torch.nn.LayerNorm(6, elementwise_affine=False, **kw),
        (2, 6),
    ),
    "RMSNorm": (lambda **kw: nn.RMSNorm(6, **kw), lambda **kw: torch.nn.RMSNorm(6, **kw), (2, 3, 6)),
    "RMSNorm over two dimensions": (
        lambda **kw: nn.RMSNorm((3, 4), eps=1e-3, **kw),
        lambda **kw: torch.nn.RMSNorm((3, 4), eps=1e-3, **kw),
        (2, 3, 4),
    ),
    "Softmax": (lambda **kw: nn.Softmax(), lambda **kw: torch.nn.Softmax(-1), (2, 3, 6)),
    "Softmax over the second dimension": (
        lambda **kw: nn.Softmax(dim=1),
        lambda **kw: torch.nn.Softmax(dim=1),
        (2, 3, 6),
    ),
    "Sigmoid": (lambda **kw: nn.Sigmoid(), lambda **kw: torch.nn.Sigmoid(), (2, 3, 6)),
}


@pytest.mark.parametrize("case", TWINS)
def test_twin(case):
    make_ours, make_theirs, shape = TWINS[case]
    ours, theirs = make_ours(dtype=torch.float64), make_theirs(dtype=torch.float64)
    same_module(ours, theirs)
    assert isinstance(ours, type(theirs))
    assert ours.extra_repr() == theirs.extra_repr()
    x, y = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    assert_same_gradients(ours, theirs, [x], [y], ours(x), theirs(y))


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding(padding_idx):
    ours = nn.Embedding(5, 4, padding_idx, dtype=torch.float64)
    theirs = torch.nn.Embedding(5, 4, padding_idx, dtype=torch.float64)
    same_module(ours, theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    ids = torch.tensor([[0, 2, 4], [2, 2, 1]])
    assert_same_gradients(ours, theirs, [], [], ours(ids), theirs(ids))
    if padding_idx is not None:
        assert ours.weight.grad[padding_idx].eq(0).all() and theirs.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear_with_activation_and_residual(activation, with_residual):
    layer = randomise(nn.Linear(7, 5, dtype=torch.float64, activation=activation))
    x, residual = randn(4, 7), randn(4, 5, seed=3) if with_residual else None
    f = {
        None: lambda t: t,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
    }[activation]
    expected = f(x @ layer.weight.T + layer.bias) + (0 if residual is None else residual)
    torch.testing.assert_close(layer(x, residual), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norm_with_residual_returns_the_sum_too(kind, shape):
    norm = randomise(kind(shape, dtype=torch.float64))
    x, residual = randn(4, *shape), randn(4, *shape, seed=3)
    normed, total = norm(x, residual)
    torch.testing.assert_close(total, x + residual, **CLOSE)
    torch.testing.assert_close(normed, norm(x + residual), **CLOSE)


def test_softmax_mask_leaves_entries_out():
    x = randn(2, 3, 4)
    mask = torch.tensor([True, False, True, True])
    out = nn.Softmax()(x, mask)
    torch.testing.assert_close(out, x.masked_fill(~mask, -torch.inf).softmax(-1), **CLOSE)
    assert nn.Softmax()(x, torch.zeros(4, dtype=torch.bool)).eq(0).all()
    columns = nn.Softmax(dim=1)(x, torch.tensor([True, False, True])[:, None])
    torch.testing.assert_close(columns[:, [0, 2]], x[:, [0, 2]].softmax(1), **CLOSE)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 6, 3), (2, 6, 3, 2)])
def test_cross_entropy(shape, label_smoothing, reduction):
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 1}
    ours, theirs = nn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(2, 6, target_shape, generator=torch.Generator().manual_seed(0))
    if target.dim():
        target.view(-1)[0] = 1
    x, y = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    assert_same_gradients(ours, theirs, [x], [y], ours(x, target), theirs(y, target))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_is_linear_then_cross_entropy(bias, reduction):
    ours = randomise(nn.LinearCrossEntropyLoss(5, 7, bias=bias, reduction=reduction, dtype=torch.float64))
    linear = torch.nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    linear.load_state_dict({k.removeprefix("linear."): v for k, v in ours.state_dict().items()})
    target = torch.tensor([[0, 6, -100], [3, 1, 2]])
    x, y = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5).requires_grad_()
    their_loss = F.cross_entropy(linear(y).flatten(0, 1), target.flatten(), reduction=reduction)
    their_loss = their_loss.view(2, 3) if reduction == "none" else their_loss
    assert_same_gradients(ours, linear, [x], [y], ours(x, target), their_loss)


@pytest.mark.parametrize("loss", ["plain", "linear"])
def test_z_loss_penalises_the_log_of_the_partition_function(loss):
    x, target = randn(4, 5), torch.tensor([0, 1, 2, 3])
    if loss == "plain":
        logits, ours = x, nn.CrossEntropyLoss(z_loss=0.5)
    else:
        ours = randomise(nn.LinearCrossEntropyLoss(5, 6, z_loss=0.5, dtype=torch.float64))
        logits = x @ ours.linear.weight.T
    expected = F.cross_entropy(logits, target) + 0.5 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(ours(x, target), expected, **CLOSE)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_its_formula(activation, bias):
    mlp = randomise(nn.MLP(6, 11, activation, bias, dtype=torch.float64))
    p = {name: value for name, value in mlp.state_dict().items()}
    x, residual = randn(2, 3, 6), randn(2, 3, 6, seed=5)

    def linear(name, t):
        return F.linear(t, p[name + ".weight"], p.get(name + ".bias"))

    if activation == "swiglu":
        h = F.silu(linear("c_gate", x)) * linear("c_fc", x)
    else:
        approximate = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
        h = approximate.get(activation, getattr(F, activation, None))(linear("c_fc", x))
    torch.testing.assert_close(mlp(x), linear("c_proj", h), **CLOSE)
    torch.testing.assert_close(mlp(x, residual), linear("c_proj", h) + residual, **CLOSE)


def causal_mask(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def test_block_is_torchs_pre_norm_encoder_layer():
    block = randomise(nn.TransformerBlock(6, 2, hidden=9, activation="gelu", dtype=torch.float64))
    layer = torch.nn.TransformerEncoderLayer(
        6, 2, 9, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "attn.c_attn.": "self_attn.in_proj_",
        "attn.c_proj.": "self_attn.out_proj.",
        "mlp.c_fc.": "linear1.",
        "mlp.c_proj.": "linear2.",
    }
    ours = block.state_dict()
    layer.load_state_dict(
        {new + k.removeprefix(old): v for old, new in names.items() for k, v in ours.items() if k.startswith(old)}
    )
    x, y = randn(2, 5, 6).requires_grad_(), randn(2, 5, 6).requires_grad_()
    our_out, their_out = block(x), layer(y, src_mask=causal_mask(5))
    torch.testing.assert_close(our_out, their_out, **CLOSE)
    seed = randn(2, 5, 6, seed=9)
    (our_out * seed).sum().backward()
    (their_out * seed).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **CLOSE)
    torch.testing.assert_close(block.attn.c_attn.weight.grad, layer.self_attn.in_proj_weight.grad, **CLOSE)


def test_llama_like_block_is_its_formula():
    """Grouped heads, RMSNorm, swiglu, rotation and normalised q and k, written out."""
    block = randomise(
        nn.TransformerBlock(
            8, 4, 2, hidden=5, norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True, dtype=torch.float64
        )
    )
    assert all("bias" not in name for name in block.state_dict())
    x, angle = randn(2, 5, 8), randn(5, 1, seed=4)
    p = block.state_dict()

    def rms(t, weight=1.0):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotated(t):
        a, b = t.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    qkv = (rms(x, p["ln_1.weight"]) @ p["attn.c_attn.weight"].T).unflatten(-1, (8, 2)).transpose(1, 2)
    q, k, v = rotated(rms(qkv[:, :4])), rotated(rms(qkv[:, 4:6])), qkv[:, 6:]
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = (q @ k.mT / 2**0.5).masked_fill(causal_mask(5), -torch.inf).softmax(-1)
    h = x + (weights @ v).transpose(1, 2).flatten(2) @ p["attn.c_proj.weight"].T
    n = rms(h, p["ln_2.weight"])
    gated = F.silu(n @ p["mlp.c_gate.weight"].T) * (n @ p["mlp.c_fc.weight"].T)
    torch.testing.assert_close(
        block(x, rotary=(angle.cos(), angle.sin())), h + gated @ p["mlp.c_proj.weight"].T, **CLOSE
    )


def test_block_drops_attention_weights_and_what_each_half_adds():
    """The draws in order: the seed of the attention weights, the mask of each half."""
    block, p = randomise(nn.TransformerBlock(6, 2, dropout=0.3, dtype=torch.float64)), 0.3
    twin = copy.deepcopy(block)
    x, y = randn(2, 5, 6).requires_grad_(), randn(2, 5, 6).requires_grad_()
    slopes = torch.tensor([0.5, 0.25])
    torch.manual_seed(0)
    keep = torch.empty(2, 2, 5, 5, dtype=torch.bool)
    _C.attention_dropout(torch.randint(-(2**63), 2**63 - 1, (1,)), keep, dropout_p=p)
    q, k, v = twin.attn.heads(twin.ln_1(y))
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    scores = q @ k.mT / 3**0.5 - slopes.double()[:, None, None] * distance
    weights = scores.masked_fill(causal_mask(5), -torch.inf).softmax(-1) * keep / (1 - p)
    h = y + F.dropout(twin.attn.c_proj((weights @ v).transpose(1, 2).flatten(2)), p)
    expected = h + F.dropout(twin.mlp(twin.ln_2(h)), p)
    assert 0 < keep[:, :, causal_mask(5).logical_not()].sum() < 60
    torch.manual_seed(0)
    assert_same_gradients(block, twin, [x], [y], block(x, alibi_slopes=slopes), expected)


def test_block_with_dropout_drops_in_training_only():
    block = randomise(nn.TransformerBlock(6, 2, dropout=0.5, dtype=torch.float64))
    x = randn(2, 5, 6)
    torch.manual_seed(0)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


MODULES = {
    "Linear": lambda **kw: (nn.Linear(4, 3, **kw), (torch.ones(2, 4),)),
    "LayerNorm": lambda **kw: (nn.LayerNorm(4, **kw), (torch.ones(2, 4),)),
    "RMSNorm": lambda **kw: (nn.RMSNorm(4, **kw), (torch.ones(2, 4),)),
    "Embedding": lambda **kw: (nn.Embedding(4, 3, **kw), (torch.tensor([1, 2]),)),
    "MLP": lambda **kw: (nn.MLP(4, 8, **kw), (torch.ones(2, 4),)),
    "MultiheadAttention": lambda **kw: (nn.MultiheadAttention(4, 2, **kw), (torch.ones(2, 1, 4),) * 3),
    "TransformerBlock": lambda **kw: (nn.TransformerBlock(4, 2, **kw), (torch.ones(1, 2, 4),)),
    "RelativePositionBias": lambda **kw: (nn.RelativePositionBias(2, **kw), (3, 4)),
    "LinearCrossEntropyLoss": lambda **kw: (
        nn.LinearCrossEntropyLoss(4, 3, **kw),
        (torch.ones(2, 4), torch.tensor([0, 1])),
    ),
}
PARAMETERLESS = {
    "CrossEntropyLoss": lambda: (nn.CrossEntropyLoss(), (torch.ones(2, 4), torch.tensor([0, 1]))),
    "Softmax": lambda: (nn.Softmax(), (torch.ones(2, 4),)),
    "Sigmoid": lambda: (nn.Sigmoid(), (torch.ones(2, 4),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_dtype_device_and_deepcopy(name):
    module, _ = MODULES[name](dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    twin = copy.deepcopy(module)
    for (a_name, a), (b_name, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert a_name == b_name and torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert repr(twin) == repr(module)
    meta, _ = MODULES[name](device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("name", [*MODULES, *PARAMETERLESS])
def test_modules_run_on_pykern_alone(name, monkeypatch):
    """With torch's own functions out of the way every module still works, and reaches pykern's."""
    module, inputs = (MODULES | PARAMETERLESS)[name]()
    reached = []

    def refuse(*args, **kwargs):
        raise AssertionError("a torch function was reached")

    for function in ("linear", "layer_norm", "rms_norm", "softmax", "embedding", "cross_entropy", "gelu", "silu"):
        monkeypatch.setattr(torch.nn.functional, function, refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", refuse)
    for function in (
        "linear",
        "mlp",
        "attention",
        "layer_norm",
        "rms_norm",
        "softmax",
        "sigmoid",
        "embedding",
        "cross_entropy",
    ):
        kernel = getattr(ops, function)
        monkeypatch.setattr(ops, function, lambda *a, _f=kernel, _n=function, **kw: reached.append(_n) or _f(*a, **kw))
    if name == "LinearCrossEntropyLoss":
        kernel = ops.linear_cross_entropy
        monkeypatch.setattr(ops, "linear_cross_entropy", lambda *a, **kw: reached.append("head") or kernel(*a, **kw))
    module(*inputs)
    assert reached


REFUSALS = {
    "activation of Linear": (lambda: nn.Linear(2, 2, activation="tanh"), "Linear: activation is 'tanh'"),
    "activation of MLP": (lambda: nn.MLP(2, 2, "tanh"), "MLP: activation is 'tanh'"),
    "max_norm": (lambda: nn.Embedding(2, 2, max_norm=1.0), "max_norm"),
    "padding_idx": (lambda: nn.Embedding(2, 2, padding_idx=2), "padding_idx is 2"),
    "class weights": (lambda: nn.CrossEntropyLoss(torch.ones(3)), "class weights"),
    "reduction": (lambda: nn.CrossEntropyLoss(reduction="max"), "reduction is 'max'"),
    "reduction of the fused loss": (lambda: nn.LinearCrossEntropyLoss(2, 2, reduction="max"), "reduction is 'max'"),
    "target shape": (lambda: nn.CrossEntropyLoss()(torch.ones(2, 3), torch.tensor([0])), r"target has shape \(1,\)"),
    "target shape of the fused loss": (
        lambda: nn.LinearCrossEntropyLoss(3, 2)(torch.ones(2, 3), torch.tensor([0])),
        r"target has shape \(1,\)",
    ),
    "width of a block": (lambda: nn.TransformerBlock(6, 4), "4 heads do not divide width 6"),
    "groups of a block": (lambda: nn.TransformerBlock(8, 4, 3), "3 key/value heads do not divide 4"),
    "dropout of a block": (lambda: nn.TransformerBlock(8, 4, dropout=-0.5), "dropout is -0.5, expected 0..1"),
    "norm of a block": (lambda: nn.TransformerBlock(8, 4, norm="batchnorm"), "norm is 'batchnorm'"),
    "norm of a wrong shape": (lambda: nn.LayerNorm(3)(torch.ones(2, 4)), r"x has shape \(2, 4\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()
