"""attention with options on: torch's machinery (opcheck, compile, autocast, checkpointing)."""

import pytest
import torch
from attention_tools import attend, inputs, named, op_arguments, ragged_inputs
from test_attention_options import bools, optional, slopes
from tools import VIEWS, with_gradients

import pykern
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa


def everything(dtype=torch.float32):
    """q, k, v, bias, sinks; dout; every option but ragged batches."""
    tensors, dout = inputs(5, 9, D=4, E=3, B=2, H=4, G=2, dtype=dtype)
    options = dict(mask=bools(5, 9, share=0.8), window=(6, 1), softcap=1.5, alibi_slopes=slopes(2, 4), scale=0.7)
    return optional(tensors, (4, 1, 9), True), dout, options


def ragged(dtype=torch.float32):
    tensors, dout, offsets = ragged_inputs([5, 0, 3], [4, 2, 7], D=4, E=3, H=4, G=2, dtype=dtype)
    return optional(tensors, None, True), dout, dict(window=(6, 1), alibi_slopes=slopes(3, 4), **offsets)


SCENES = {"dense": everything, "ragged": ragged}
every_scene = pytest.mark.parametrize("scene", SCENES)


def as_op(tensors, options):
    """The arguments of the operator behind pykern.attention."""
    given = {name: x for name, x in options.items() if name not in ("window", "mask")}
    given["left"], given["right"] = options["window"]
    if "mask" in options:
        given["mask"] = options["mask"][None, None]
    for name, x in tensors.items():
        given[name] = x.transpose(0, 1)[None] if x.dim() == 3 and name in "qkv" else x
    if "bias" in given:
        given["bias"] = given["bias"][None]
    return given


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@every_scene
def test_opcheck(scene, dropout):
    tensors, _, options = SCENES[scene]()
    op, backward = torch.ops.pykern.attention.default, torch.ops.pykern.attention_backward.default
    given = as_op(tensors, options) | (dict(dropout_p=0.3, seed=torch.tensor([7])) if dropout else {})
    torch.library.opcheck(op, op_arguments(op, **given))
    leaves = {name: given[name].detach().requires_grad_() for name in tensors}
    torch.library.opcheck(op, op_arguments(op, **(given | leaves)))
    out, lse = op(*op_arguments(op, **given))
    given |= dict(out=out, lse=lse, dout=torch.ones_like(out), dlse=torch.ones_like(lse))
    for want_bias, want_sinks in ((False, True), ("bias" in given, False)):
        wanted = dict(want_bias=want_bias, want_sinks=want_sinks)
        torch.library.opcheck(backward, op_arguments(backward, **given, **wanted))


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "packed"])
def test_opcheck_of_every_layout(view):
    """The fake must give the strides of the real gradients, those of bias and sinks included."""
    tensors, _, options = everything()
    tensors = {name: x if name == "sinks" else VIEWS[view](x) for name, x in tensors.items()}
    column = torch.stack([tensors["sinks"], tensors["sinks"]], 1)[:, 0]
    op = torch.ops.pykern.attention.default
    given = as_op(tensors | dict(sinks=column), options)
    leaves = {name: given[name].detach().requires_grad_() for name in tensors}
    torch.library.opcheck(op, op_arguments(op, **(given | leaves)))


@pytest.fixture
def compiler():
    """Forgets what it compiled: after eight variants of one function it refuses a ninth."""
    torch.compiler.reset()
    yield torch.compile
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@every_scene
def test_compile_fullgraph(scene, dropout, compiler):
    tensors, dout, options = SCENES[scene]()
    options |= dict(dropout_p=0.3, seed=7) if dropout else {}
    eager = attend(tensors, dout, **options)
    compiled = compiler(pykern.attention, fullgraph=True, backend="aot_eager")
    for name, x in with_gradients(named(compiled, **options), tensors, dict(out=dout)).items():
        assert_bitwise(x, eager[name], name=name)


@pytest.mark.slow
def test_compile_draws_a_seed(compiler):
    """In the graph, at each run: not once when it is traced."""
    tensors, dout, _ = everything()
    compiled = compiler(lambda **a: pykern.attention(**a, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    first, second = (compiled(**tensors) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    eager = attend(tensors, dout, dropout_p=0.5)
    torch.manual_seed(3)
    assert_bitwise(compiled(**tensors), eager["out"])


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@every_scene
def test_autocast(scene, dropout):
    """In the autocast dtype, bias and sinks too; slopes stay float32; gradients in the inputs' dtype."""
    tensors, dout, options = SCENES[scene]()
    options |= dict(dropout_p=0.3, seed=7) if dropout else {}
    halves = attend({name: x.bfloat16() for name, x in tensors.items()}, dout.bfloat16(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(tensors, dout, **options)
        doubles = {name: x.double() for name, x in tensors.items()}
        assert pykern.attention(**doubles, **options).dtype == torch.float64
    for name, x in cast.items():
        assert x.dtype == (torch.bfloat16 if name == "out" else torch.float32)
        assert_bitwise(x, halves[name].to(x.dtype), name=name)


@pytest.mark.parametrize("seed", [7, None])
@every_scene
def test_checkpointing_drops_the_same(scene, seed):
    """Recomputed with the generator's state of the first time, so a seed that torch draws is drawn again."""
    from torch.utils.checkpoint import checkpoint

    tensors, dout, options = SCENES[scene]()
    options |= dict(dropout_p=0.5, seed=seed)
    torch.manual_seed(1)
    plain = attend(tensors, dout, **options)

    def again(return_lse, **leaves):
        def f(*args):
            arguments = dict(zip(leaves, args, strict=True))
            return pykern.attention(**arguments, **options, return_lse=return_lse)

        return checkpoint(f, *leaves.values(), use_reentrant=False)

    torch.manual_seed(1)
    for name, x in with_gradients(named(again), tensors, dict(out=dout)).items():
        assert_bitwise(x, plain[name], name=name)


def test_inputs_are_left_alone():
    tensors, dout, options = everything()
    offsets = ragged()[2]
    options |= dict(dropout_p=0.3, seed=torch.tensor([7]))
    before = {name: x.clone() for name, x in (tensors | options | offsets).items() if torch.is_tensor(x)}
    attend(tensors, dout, **options)
    attend(*ragged()[:2], **offsets)
    for name, x in (tensors | options | offsets).items():
        if torch.is_tensor(x):
            assert_bitwise(x, before[name], name=name)
