"""Every op that has or gets CUDA kernels: inputs, the public function, the formula, and which kernels it runs.

Inputs are drawn on the CPU, so that every device gets the same. Shapes have odd sizes beside those that vectors, warps
and blocks divide, and rows longer than a block reads at once.
"""

import importlib
import itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from cuda_cases_attention import attentions
from cuda_op import Op, out
from tools import constant, draw

import pykern
from pykern import _C
from pykern.ops.activation import activation
from pykern.ops.adamw import adamw_, adamw_all_, square_sums
from pykern.testing import reference

ROWS = {"odd": (5, 33), "vectors": (64, 768), "long odd rows": (3, 8197), "many rows": (1025, 40), "3-D": (2, 3, 257)}
FEW_ROWS = {name: ROWS[name] for name in ("odd", "vectors", "3-D")}


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


def tf32(x):
    """x with 10 bits behind the point, halves away from 0, as tensor cores take it."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)


class Tf32Product(torch.autograd.Function):
    """x weight^T of rounded factors, and so its gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return tf32(x) @ tf32(weight).T

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        return tf32(dout) @ tf32(weight), tf32(dout).T @ tf32(x)


@contextmanager
def tf32_allowed():
    """torch's switch asks for a GPU: this one works on the emulator, too."""
    with ExitStack() as stack:
        for room in ("linear", "mlp", "linear_cross_entropy"):
            module = importlib.import_module(f"pykern.ops.{room}")
            stack.enter_context(mock.patch.object(module, "allows_tf32", lambda x: x.dtype == torch.float32))
        yield


def products():
    kernels = ("linear_forward", "linear_backward")
    shapes = {"odd": (5, 33, 17), "tiles": (128, 256, 384), "odd tiles": (133, 321, 259), "one row": (1, 768, 3072)}
    parts = {"many rows": (2500, 40, 24), "many outputs": (3, 24, 20000)}  # sums over k in parts
    for name, options in (("linear", {}), ("linear, gelu_tanh, residual", dict(activation="gelu_tanh"))):
        ours = out(lambda options=options, **inputs: pykern.linear(**inputs, **options))
        formula = out(lambda options=options, **inputs: reference.linear(**inputs, **options))
        yield name, Op(kernels, shapes | parts, linear_inputs(bool(options)), ours, formula, rows=("x", "weight"))

    formula = out(lambda x, weight, bias: Tf32Product.apply(x, weight) + bias)
    which = {name: (shapes | parts)[name] for name in ("odd", "many rows", "odd tiles")}
    yield (
        "linear, tf32",
        Op(
            *(kernels, which, linear_inputs(False), out(pykern.linear), formula),
            *((), ("x", "weight"), (torch.float32,), {}, tf32_allowed, True),
        ),
    )

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


def sampled(**options):
    """ids [B] of logits [B, V], as float64."""
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)

    def tokens(logits, seeds, draws, history, counts):
        ids = torch.empty_like(seeds)
        _C.sample(logits, seeds, draws, history, counts, ids, **plain | options)
        return ids.double()

    return tokens


def samples():
    def inputs(dtype, B, V):
        integers = lambda limit, *shape: torch.randint(limit, shape, generator=torch.Generator().manual_seed(V))  # noqa: E731
        return dict(
            logits=draw(B, V, dtype=dtype, spread=2.0),
            **dict(seeds=integers(2**62, B), draws=integers(2**40, B)),
            **dict(history=integers(V, B, 9), counts=integers(10, B)),
        )

    shapes = {"few tokens": (48, 23), "a vocabulary": (3, 50257)}
    ways = {
        "greedy": dict(temperature=0.0, repetition_penalty=1.3),
        "all tokens": dict(temperature=0.9),
        "cut": dict(temperature=1.3, top_k=19, top_p=0.87, min_p=0.01, repetition_penalty=1.7),
    }
    for name, options in ways.items():
        ours = out(sampled(**options))
        yield f"sample, {name}", Op(("sample",), shapes, inputs, ours, ours, ("logits",), ())


PARTS = (norms, softmaxes, activations, ropes, embeddings, losses, optimisers, products, attentions, samples)
OPS: dict[str, Op] = {name: op for part in PARTS for name, op in part()}
