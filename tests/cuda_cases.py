"""Every op that has or gets CUDA kernels: inputs, the public function, the formula, and which kernels it runs.

Inputs are drawn on the CPU, so that every device gets the same. Shapes have odd sizes beside those that vectors, warps
and blocks divide, and rows longer than a block reads at once.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from philox import kept
from tools import constant, draw

import pykern
from pykern import _C
from pykern.ops.activation import activation
from pykern.ops.adamw import adamw_, adamw_all_, square_sums
from pykern.testing import reference

ROWS = {"odd": (5, 33), "vectors": (64, 768), "long odd rows": (3, 8197), "many rows": (1025, 40), "3-D": (2, 3, 257)}
FEW_ROWS = {name: ROWS[name] for name in ("odd", "vectors", "3-D")}


@dataclass(frozen=True)
class Op:
    """inputs(dtype, *shape) -> named tensors, the smallest shape first; function and formula: of those, to outputs by
    name. constant: inputs without a gradient. rows: those that may be strided. scale: of the errors of a result."""

    kernels: tuple[str, ...]
    shapes: dict[str, tuple]
    inputs: Callable[..., dict[str, torch.Tensor]]
    function: Callable[..., dict[str, torch.Tensor]]
    formula: Callable[..., dict[str, torch.Tensor]]
    constant: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("x",)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    scale: dict[str, float] = field(default_factory=dict)


def out(function):
    return lambda *args, **inputs: {"out": function(*args, **inputs)}


def two(function):
    """out and sum of a norm with a residual."""
    return lambda **inputs: dict(zip(("out", "sum"), function(**inputs), strict=True))


def both(norm):
    return lambda x, residual, **w: {"out": norm(x, residual=residual, **w), "sum": x + residual}


def norm_inputs(bias, residual):
    def make(dtype, *shape):
        D = shape[-1]
        found = dict(x=draw(*shape, dtype=dtype), weight=draw(D, dtype=dtype, seed=1))
        found |= dict(bias=draw(D, dtype=dtype, seed=2)) if bias else {}
        return found | (dict(residual=draw(*shape, dtype=dtype, seed=3)) if residual else {})

    return make


def norms():
    for name, bias in (("layer_norm", True), ("rms_norm", False)):
        kernels = (f"{name}_forward", f"{name}_backward")
        ours, formula = getattr(pykern, name), getattr(reference, name)
        plain = dict(weight=None, bias=None) if bias else dict(weight=None)
        yield name, Op(kernels, ROWS, norm_inputs(bias, False), out(ours), out(formula))
        yield (
            f"{name} + residual",
            Op(kernels, FEW_ROWS, norm_inputs(bias, True), two(ours), both(formula), rows=("x", "residual")),
        )
        yield (
            f"{name} without weight",
            Op(
                *(kernels, FEW_ROWS, lambda dtype, *shape: dict(x=draw(*shape, dtype=dtype))),
                *(out(ours), out(lambda x, formula=formula, plain=plain: formula(x, **plain))),
            ),
        )


def x_only(dtype, *shape):
    return dict(x=draw(*shape, dtype=dtype, spread=3.0))


def masked(dtype, *shape):
    """Three of four places are seen, of the first row none."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.75
    mask.view(-1, shape[-1])[0] = False
    return dict(x=draw(*shape, dtype=dtype, spread=3.0), mask=mask)


def softmaxes():
    kernels = ("softmax_forward", "softmax_backward")
    for name, inputs in (("softmax", x_only), ("softmax, mask", masked)):
        yield name, Op(kernels, ROWS, inputs, out(pykern.softmax), out(reference.softmax), scale={"dx": 1.0})


def activations():
    kernels = ("activation_forward", "activation_backward")
    for kind in ("relu", "gelu", "gelu_tanh", "silu", "sigmoid"):
        formula = out(lambda x, kind=kind: reference.activation(x, kind))
        yield kind, Op(kernels, FEW_ROWS, x_only, out(lambda x, kind=kind: activation(x, kind)), formula)
    yield (
        "swiglu",
        Op(
            *(("swiglu_forward", "swiglu_backward"), ROWS),
            lambda dtype, *shape: dict(gate=draw(*shape, dtype=dtype), up=draw(*shape, dtype=dtype, seed=1)),
            *(out(pykern.swiglu), out(reference.swiglu)),
            rows=("gate", "up"),
        ),
    )


def rope_inputs(positions):
    def make(dtype, B, H, T, D, R):
        angle = torch.arange(T + 9.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(R / 2) / (R / 2))
        found = dict(x=draw(B, H, T, D, dtype=dtype), cos=angle.cos().to(dtype), sin=angle.sin().to(dtype))
        chosen = torch.randint(T + 9, (B, T), generator=torch.Generator().manual_seed(7))
        return found | (dict(positions=chosen) if positions else {})

    return make


def ropes():
    shapes = {"odd": (2, 3, 5, 33, 14), "a head of 64": (2, 4, 65, 64, 64), "half of 128": (1, 2, 129, 128, 64)}
    for name, options in (("rope", {}), ("rope interleaved, positions", dict(interleaved=True))):
        ours = out(lambda options=options, **inputs: pykern.rope(**inputs, **options))
        formula = out(lambda options=options, **inputs: reference.rope(**inputs, **options))
        inputs = rope_inputs(bool(options))
        yield name, Op(("rope",), shapes, inputs, ours, formula, constant=("cos", "sin"))


def embeddings():
    def inputs(dtype, rows, V, D, most):
        ids = torch.randint(most, (rows,), generator=torch.Generator().manual_seed(1))
        return dict(weight=draw(V, D, dtype=dtype), ids=ids)

    shapes = {"odd": (7, 11, 33, 11), "few tokens, many rows": (3000, 100, 64, 3), "vocabulary": (512, 5003, 96, 5003)}
    kernels = ("embedding_forward", "embedding_backward")
    yield "embedding", Op(kernels, shapes, inputs, out(pykern.embedding), out(reference.embedding), rows=("weight",))


def loss_inputs(dtype, M, V):
    target = torch.randint(V, (M,), generator=torch.Generator().manual_seed(1))
    target[0] = -100
    return dict(x=draw(M, V, dtype=dtype, spread=3.0), target=target)


def losses():
    kernels = ("cross_entropy_forward", "cross_entropy_backward")
    shapes = {"odd": (5, 33), "a vocabulary": (9, 50257), "many rows": (700, 64)}
    for name, options in (
        ("cross_entropy", {}),
        ("cross_entropy, smoothed, z-loss, per row", dict(label_smoothing=0.1, z_loss=1e-3, reduction="none")),
    ):
        ours = out(lambda x, target, options=options: pykern.cross_entropy(x, target, **options))
        formula = out(lambda x, target, options=options: reference.cross_entropy(x, target, **options))
        yield name, Op(kernels, shapes, loss_inputs, ours, formula)


def state_inputs(dtype, *shape):
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    found = dict(param=draw(*shape, dtype=dtype), grad=draw(*shape, dtype=dtype, seed=1))
    found |= dict(exp_avg=draw(*shape, dtype=stat, seed=2), exp_avg_sq=draw(*shape, dtype=stat, seed=3).square())
    return found | (dict(master=draw(*shape, dtype=stat, seed=4)) if dtype != stat else {})


STATE = ("param", "grad", "exp_avg", "exp_avg_sq", "master")
HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.5)


def scaled_inputs(dtype, *shape):
    return state_inputs(dtype, *shape) | dict(scale=torch.tensor([0.3], dtype=torch.float64))


@torch.no_grad()
def step_of_ours(**state):
    """On copies: in place."""
    own = {name: x.detach().clone() for name, x in state.items()}
    adamw_(**own, **HYPER)
    return {name: own[name] for name in own if name not in ("grad", "scale")}


def in_parts(x):
    """Views of 1, 2, 3, ... numbers, at odd addresses."""
    sizes = list(range(1, int((2 * x.numel()) ** 0.5)))
    return x.flatten().split([*sizes, x.numel() - sum(sizes)])


@torch.no_grad()
def step_in_parts(scale, **state):
    own = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in state.items()}
    parts = [in_parts(own[name]) if name in own else itertools.repeat(None) for name in STATE]
    adamw_all_(list(zip(*parts, strict=False)), **HYPER, scale=scale)
    return {name: own[name] for name in own if name != "grad"}


@torch.no_grad()
def step_of_formula(param, grad, exp_avg, exp_avg_sq, master=None, scale=None):
    moving = param if master is None else master
    new, m, v = reference.adamw(moving, grad, exp_avg, exp_avg_sq, **HYPER, scale=scale)
    found = dict(param=new, exp_avg=m, exp_avg_sq=v)
    return found if master is None else found | dict(master=new)


def optimisers():
    shapes = {"odd": (5, 33), "vectors": (64, 768), "one dimension": (100003,)}
    for name, inputs, ours in (
        ("adamw", state_inputs, step_of_ours),
        ("adamw, scale", scaled_inputs, step_of_ours),
        ("adamw, many", scaled_inputs, step_in_parts),
    ):
        constant = (*STATE, "scale")
        yield name, Op(("adamw",), shapes, inputs, ours, step_of_formula, constant=constant, rows=("grad",))
    for name, parts in (("square_sum", lambda x: [x]), ("square_sum, many", in_parts)):
        formula = lambda x, parts=parts: {"out": torch.stack([part.double().square().sum() for part in parts(x)])}  # noqa: E731
        yield (
            name,
            Op(
                *(("square_sum",), shapes, x_only),
                *(lambda x, parts=parts: {"out": square_sums(parts(x.detach()))}, formula),
                constant=("x",),
                scale={"out": 0.0},
            ),
        )


def linear_inputs(residual):
    def make(dtype, M, K, N):
        found = dict(x=draw(M, K, dtype=dtype), weight=draw(N, K, dtype=dtype, seed=1, spread=K**-0.5))
        found |= dict(bias=draw(N, dtype=dtype, seed=2))
        return found | (dict(residual=draw(M, N, dtype=dtype, seed=3)) if residual else {})

    return make


def products():
    kernels = ("linear_forward", "linear_backward")
    shapes = {"odd": (5, 33, 17), "tiles": (128, 256, 384), "odd tiles": (133, 321, 259), "one row": (1, 768, 3072)}
    parts = {"many rows": (2500, 40, 24), "many outputs": (3, 24, 20000)}  # sums over k in parts
    for name, options in (("linear", {}), ("linear, gelu_tanh, residual", dict(activation="gelu_tanh"))):
        ours = out(lambda options=options, **inputs: pykern.linear(**inputs, **options))
        formula = out(lambda options=options, **inputs: reference.linear(**inputs, **options))
        yield name, Op(kernels, shapes | parts, linear_inputs(bool(options)), ours, formula, rows=("x", "weight"))

    def layers(gated):
        def make(dtype, M, K, H):
            found = dict(x=draw(M, K, dtype=dtype))
            found |= dict(
                up_weight=draw(H, K, dtype=dtype, seed=1, spread=K**-0.5), up_bias=draw(H, dtype=dtype, seed=2)
            )
            found |= dict(down_weight=draw(K, H, dtype=dtype, seed=3, spread=H**-0.5))
            return found | (dict(gate_weight=draw(H, K, dtype=dtype, seed=4, spread=K**-0.5)) if gated else {})

        return make

    for name, gated, options in (("mlp", False, {}), ("mlp, gated", True, dict(activation="silu"))):
        ours = out(lambda options=options, **inputs: pykern.mlp(**inputs, **options))
        formula = out(lambda options=options, **inputs: reference.mlp(**inputs, **options))
        yield name, Op(("mlp_forward", "mlp_backward"), shapes, layers(gated), ours, formula)

    def head(dtype, M, K, V):
        target = loss_inputs(dtype, M, V)["target"]
        return dict(x=draw(M, K, dtype=dtype), weight=draw(V, K, dtype=dtype, seed=1, spread=K**-0.5), target=target)

    shapes = {"odd": (5, 33, 71), "tiles": (256, 128, 1024), "odd tiles": (261, 65, 5003)}
    kernels, name = ("linear_cross_entropy",), "linear_cross_entropy"
    ours, formula = pykern.linear_cross_entropy, reference.linear_cross_entropy
    yield name, Op(kernels, shapes, head, out(ours), out(formula), rows=("x", "weight"))
    sums = [out(lambda f=f, **inputs: f(**inputs, reduction="sum")) for f in (ours, formula)]
    dtypes = (torch.float32, torch.bfloat16)  # gradients are too small for float16
    (least,) = constant("cuda/linear_cross_entropy.cu", "kLeastRows")  # of a set, and 32 MB of logits are fewer
    yield f"{name}, two sets of rows", Op(kernels, {"two": (least + 76, 24, 8300)}, head, *sums, dtypes=dtypes)


def attention_inputs(dtype, B, H, G, T, S, D):
    return dict(
        q=draw(B, H, T, D, dtype=dtype),
        k=draw(B, G, S, D, dtype=dtype, seed=1),
        v=draw(B, G, S, D, dtype=dtype, seed=2),
    )


def attention_masked(dtype, *sizes):
    B, _, _, T, S, _ = sizes
    mask = torch.rand((B, 1, T, S), generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0, 0, 0] = False  # a query that sees nothing
    return attention_inputs(dtype, *sizes) | dict(mask=mask)


def attention_biased(dtype, *sizes):
    _, H, _, T, S, _ = sizes
    return attention_inputs(dtype, *sizes) | dict(bias=draw(1, H, T, S, dtype=dtype, seed=3))


def attention_with_slopes(dtype, *sizes):
    H = sizes[1]
    return attention_inputs(dtype, *sizes) | dict(alibi_slopes=0.5 ** torch.arange(1.0, H + 1))


def attention_with_sinks(dtype, *sizes):
    return attention_masked(dtype, *sizes) | dict(sinks=draw(sizes[1], dtype=dtype, seed=4))


ATTENTION = {
    "attention, full": (attention_inputs, {}),
    "attention, causal": (attention_inputs, dict(causal=True)),
    "attention, window": (attention_inputs, dict(window=(9, 0))),
    "attention, mask": (attention_masked, {}),
    "attention, bias": (attention_biased, dict(causal=True)),
    "attention, softcap and slopes": (attention_with_slopes, dict(softcap=2.0, causal=True)),
    "attention, sinks": (attention_with_sinks, {}),
}
SEED, DROPPED = 7, 0.25
LENGTHS = ((5, 0, 130, 1), (70, 3, 200, 64))  # of queries and keys of a ragged batch


def ragged(dtype, H, G, D):
    rows = [sum(lengths) for lengths in LENGTHS]
    shapes = dict(q=(rows[0], H, D), k=(rows[1], G, D), v=(rows[1], G, D))
    found = {name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    offsets = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in LENGTHS]
    return found | dict(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])


def weights_inputs(dtype, *sizes):
    """q, k and the lse that attention gives them."""
    found = {name: x for name, x in attention_inputs(dtype, *sizes).items() if name != "v"}
    _, lse = reference.attention(found["q"], found["k"], found["k"], return_lse=True)
    return found | dict(lse=lse.to(torch.float64 if dtype == torch.float64 else torch.float32))


def dropout_inputs(dtype, B, H, G, T, S, D):
    return dict(x=draw(B, H, T, S, dtype=dtype))


def keep_of_ours(x):
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    _C.attention_dropout(torch.tensor([SEED], device=x.device), keep, dropout_p=DROPPED)
    return keep.to(x.dtype)


def attentions():
    kernels = ("attention_forward", "attention_backward")
    shapes = {
        "odd": (1, 2, 1, 5, 13, 24),
        "tiles": (2, 4, 4, 128, 128, 64),
        "groups, odd tiles": (1, 8, 2, 133, 261, 128),
        "one query": (2, 4, 2, 1, 129, 64),
        "wide heads": (1, 2, 1, 70, 130, 200),
    }
    for name, (inputs, options) in ATTENTION.items():
        ours = out(lambda options=options, **inputs: pykern.attention(**inputs, **options))
        formula = out(lambda options=options, **inputs: reference.attention(**inputs, **options))
        yield name, Op(kernels, shapes, inputs, ours, formula, ("alibi_slopes",), rows=("q", "k", "v"))
    drop = dict(dropout_p=DROPPED)
    keep = lambda q, k: kept(SEED, *q.shape[:3], k.shape[2], DROPPED)  # noqa: E731
    dropped = out(lambda **inputs: pykern.attention(**inputs, seed=SEED, **drop))
    formula = out(lambda q, k, v: reference.attention(q, k, v, keep=keep(q, k), **drop))
    yield "attention, dropout", Op(kernels, shapes, attention_inputs, dropped, formula, rows=("q", "k", "v"))
    ours, formula = (
        out(lambda f=f, **inputs: f(**inputs, causal=True)) for f in (pykern.attention, reference.attention)
    )
    offsets = ("cu_seqlens_q", "cu_seqlens_k")
    heads = {"odd": (2, 1, 24), "a head of 64": (4, 4, 64), "groups of 128": (8, 2, 128)}
    yield "attention, ragged", Op(kernels, heads, ragged, ours, formula, offsets, rows=("q", "k", "v"))
    formula = out(lambda q, k, lse: reference.attention_weights(q, k))
    constant = ("q", "k", "lse")
    yield (
        "attention_weights",
        Op(
            ("attention_weights",), shapes, weights_inputs, out(pykern.attention_weights), formula, constant, ("q", "k")
        ),
    )
    formula = out(lambda x: kept(SEED, *x.shape, DROPPED).to(x.dtype))
    yield (
        "attention_dropout",
        Op(("attention_dropout",), shapes, dropout_inputs, out(keep_of_ours), formula, ("x",), ()),
    )

    def cached(dtype, B, H, G, T, S, D):
        found = attention_inputs(dtype, B, H, G, T, S, D)
        caches = {f"{name}_cache": found.pop(name) for name in "kv"}
        new = {name: draw(B, G, T, D, dtype=dtype, seed=4 + i) for i, name in enumerate("kv")}
        return found | caches | new | dict(cache_seqlens=torch.arange(S - T, S - T - B, -1, dtype=torch.int32))

    def append(k_cache, v_cache, **rest):
        caches = k_cache.clone(), v_cache.clone()
        result = pykern.attention_with_kvcache(rest.pop("q"), *caches, **rest)
        return dict(out=result, k_cache=caches[0], v_cache=caches[1])

    def append_by_formula(**inputs):
        result, _, k_cache, v_cache = reference.attention_with_kvcache(**inputs)
        return dict(out=result, k_cache=k_cache, v_cache=v_cache)

    shapes = {"odd": (2, 2, 1, 1, 13, 24), "one query": (3, 8, 2, 1, 300, 64), "few queries": (2, 8, 2, 5, 261, 128)}
    constant = ("q", "k", "v", "k_cache", "v_cache")
    yield (
        "attention_with_kvcache",
        Op(("attention_with_kvcache",), shapes, cached, append, append_by_formula, constant, ("q", "k", "v")),
    )


PARTS = (norms, softmaxes, activations, ropes, embeddings, losses, optimisers, products, attentions)
OPS: dict[str, Op] = {name: op for part in PARTS for name, op in part()}
