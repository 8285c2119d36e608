"""TransformerBlock(recompute=True): the same bits from fewer saved bytes, with whatever else torch does to a block."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from lm_training import changed, make_trainer
from nn_twins import randn, randomise
from torch.utils.checkpoint import checkpoint

from pykern import nn, ops
from pykern.lm import Config, Transformer
from pykern.testing import assert_bitwise
from pykern.testing.memory import activation_bytes

WIDTH, T = 24, 7
BLOCKS = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "qk_norm": True, "n_kv_head": 2},
    "dropout": {"dropout": 0.3},
}
MODES = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
MODE = pytest.mark.parametrize("mode", MODES)
BLOCK = pytest.mark.parametrize("kind", BLOCKS)
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


def make(kind="gpt2", dtype=torch.float32):
    """A block that keeps everything, and its twin that does not."""
    plain = randomise(nn.TransformerBlock(WIDTH, 4, **BLOCKS[kind], dtype=torch.float64)).to(dtype)
    thrifty = copy.deepcopy(plain)
    thrifty.recompute = True
    return plain, thrifty


def sample(dtype=torch.float32):
    return randn(2, T, WIDTH).to(dtype).requires_grad_()


def gradients(block, x, *, run=None, enabled=False):
    """Output and gradients, by name, of x and all parameters; run(block, x) stands for block(x)."""
    block.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    with autocast(enabled=enabled):
        out = block(x) if run is None else run(block, x)
    out.backward(randn(*out.shape, seed=5).to(out.dtype))
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, x in ours.items():
        assert_bitwise(x, theirs[name], name=name)


def output_is_saved(block, x, enabled):
    """Whether a norm's output is what the product after it saves: not if autocast makes a copy in bfloat16 first."""
    with autocast(enabled=enabled):
        return block.ln_1(x).dtype == (torch.bfloat16 if enabled else x.dtype)


@pytest.fixture
def norms_run(monkeypatch):
    """Counts the calls of the norm ops on the blocks' width: on heads, qk_norm is another matter."""
    calls = []
    for name in ("layer_norm", "rms_norm"):
        op = getattr(ops, name)

        def counted(x, *args, op=op, **options):
            if x.shape[-1] == WIDTH:
                calls.append(x)
            return op(x, *args, **options)

        monkeypatch.setattr(ops, name, counted)
    return calls


@MODE
@BLOCK
def test_gradients_have_the_same_bits(kind, mode, norms_run):
    dtype, enabled = MODES[mode]
    plain, thrifty = make(kind, dtype)
    x = sample(dtype)
    expected = gradients(plain, x, enabled=enabled)
    assert len(norms_run) == 2
    assert_same(gradients(thrifty, x, enabled=enabled), expected)
    if output_is_saved(thrifty, x, enabled):
        norms_run.pop()  # the question's own
        assert len(norms_run) >= 6  # 2 + 2 forward, and again in backward


@MODE
@BLOCK
def test_fewer_bytes_by_the_outputs_of_both_norms(kind, mode):
    dtype, enabled = MODES[mode]
    plain, thrifty = make(kind, dtype)
    x = sample(dtype)
    assert output_is_saved(plain, x, enabled), "there is nothing to leave out"
    with autocast(enabled=enabled):
        saved = 2 * plain.ln_1(x).nbytes
        assert activation_bytes(thrifty, x) == activation_bytes(plain, x) - saved


def test_activation_bytes_of_what_is_known():
    x = torch.ones(3, 5)
    linear = torch.nn.Linear(5, 2)
    assert activation_bytes(linear, x) == x.nbytes
    assert activation_bytes(torch.nn.Sequential(linear, torch.nn.Identity()), x) == x.nbytes
    assert activation_bytes(torch.nn.Sigmoid(), x.clone().requires_grad_()) == x.nbytes
    assert activation_bytes(torch.nn.Sequential(linear, torch.nn.Sigmoid()), x) == x.nbytes + 4 * 6
    twice = torch.nn.ModuleList([linear, torch.nn.Linear(5, 2)])
    twice.forward = lambda x: twice[0](x) * twice[1](x)
    assert activation_bytes(twice, x) == x.nbytes + 2 * 4 * 6  # x once, both factors
    with torch.no_grad():
        assert activation_bytes(linear, x) == x.nbytes  # as in training


@MODE
@BLOCK
def test_under_checkpoint(kind, mode):
    """Non-reentrant checkpointing keeps the block's input and nothing of a recipe."""
    dtype, enabled = MODES[mode]
    plain, thrifty = make(kind, dtype)
    x = sample(dtype)
    run = partial(checkpoint, use_reentrant=False)
    assert_same(gradients(thrifty, x, run=run, enabled=enabled), gradients(plain, x, enabled=enabled))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_checkpoint_frees_what_the_recipe_needs(checkpointed):
    """The stream between the halves, which the recipe of ln_2 needs: gone after a checkpointed forward, else kept."""
    _, thrifty = make()
    between = []
    thrifty.attn.register_forward_hook(lambda module, args, out: between.append(weakref.ref(out.untyped_storage())))
    out = checkpoint(thrifty, sample(), use_reentrant=False) if checkpointed else thrifty(sample())
    assert (between[0]() is None) == checkpointed
    out.sum().backward()
    assert len(between) == 1 + checkpointed


def test_under_hooks_of_others():
    """Who has hooks around the block gets what it saves, recipes included, and gives it back."""
    plain, thrifty = make()
    x = sample()
    seen = []

    def run(block, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.detach().clone(), lambda t: t):
            return block(x)

    assert_same(gradients(thrifty, x, run=run), gradients(plain, x))
    assert any(t is thrifty.ln_1.bias for t in seen)  # of the recipe: a norm itself does not save its bias
    assert any(t.grad_fn is None and t.data_ptr() == x.data_ptr() for t in seen)
    seen.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.detach(), lambda t: t):
        thrifty(x)
        after = torch.ones(2, requires_grad=True)
        after.square()
    assert seen[-1] is after  # the block has put the hooks back
    seen.clear()
    thrifty(x)
    assert not seen


def test_autocast_of_the_forward_pass_holds_in_backward():
    """Backward is outside the forward's autocast region, or inside one of its own."""
    plain, thrifty = make()
    x = sample()
    expected = gradients(plain, x, enabled=True)
    with autocast():
        assert_same(gradients(thrifty, x, enabled=True), expected)
        assert_same(gradients(thrifty, x, enabled=False), gradients(plain, x, enabled=False))


def test_backward_twice():
    plain, thrifty = make()
    results = []
    for block in (plain, thrifty):
        x = sample()
        loss = block(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        results.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same(*results)


@pytest.mark.parametrize("name", ["ln_1.weight", "ln_1.bias", "ln_2.weight", "attn.c_attn.weight", "mlp.c_fc.weight"])
def test_edit_between_forward_and_backward_is_an_error(name):
    _, thrifty = make()
    loss = thrifty(sample()).sum()
    with torch.no_grad():
        thrifty.get_parameter(name).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_edit_of_the_input_between_forward_and_backward_is_an_error():
    _, thrifty = make()
    x = sample() * 1.0
    loss = thrifty(x).sum()
    x.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["ln_1", "ln_2"])
def test_new_parameters_between_forward_and_backward_do_not_matter(name):
    plain, thrifty = make()
    results = []
    for block in (plain, thrifty):
        x = sample()
        loss = block(x).square().sum()
        norm = block.get_submodule(name)
        norm.load_state_dict({key: value + 1.0 for key, value in norm.state_dict().items()}, assign=True)
        norm.eps = 1.0
        loss.backward()
        results.append({"x": x.grad, "fc": block.mlp.c_fc.weight.grad, "attn": block.attn.c_attn.weight.grad})
    assert_same(*results)


class Doubled(nn.LayerNorm):
    def forward(self, x, residual=None):
        return 2.0 * super().forward(x, residual)


UNUSUAL = {
    "frozen norms": lambda b: [n.requires_grad_(False) for n in (b.ln_1, b.ln_2)],
    "frozen products": lambda b: [p.requires_grad_(False) for p in (b.attn, b.mlp)],
    "forward hook": lambda b: b.ln_1.register_forward_hook(lambda m, args, out: 2.0 * out),
    "forward pre-hook": lambda b: b.ln_2.register_forward_pre_hook(lambda m, args: 2.0 * args[0]),
    "subclass": lambda b: setattr(b, "ln_1", randomise(Doubled(WIDTH))),
    "torch's norm": lambda b: setattr(b, "ln_2", randomise(torch.nn.LayerNorm(WIDTH))),
    "identity": lambda b: setattr(b, "ln_1", torch.nn.Identity()),
    "no affine": lambda b: setattr(b, "ln_1", nn.LayerNorm(WIDTH, elementwise_affine=False)),
    "rms norm's own eps": lambda b: setattr(b, "ln_1", randomise(nn.RMSNorm(WIDTH))),
    "in-place edit of the norm's output": lambda b: b.ln_1.register_forward_hook(lambda m, args, out: out.mul_(2.0)),
    "in-place activation": lambda b: b.attn.register_forward_pre_hook(lambda m, args: (args[0].mul_(2.0), *args[1:])),
}


@pytest.mark.parametrize("case", UNUSUAL)
@pytest.mark.parametrize("input_grad", [True, False])
def test_unusual_blocks(case, input_grad):
    blocks = make()
    results = []
    for block in blocks:
        UNUSUAL[case](block)
        x = sample().detach().requires_grad_(input_grad)
        results.append({k: v for k, v in gradients(block, x).items() if v is not None})
    assert_same(*results)


def test_a_norm_that_saves_nothing_is_not_run_again(norms_run):
    """Frozen norms of an input without gradient do not save it: to keep it instead of the output would gain nothing."""
    _, thrifty = make()
    thrifty.ln_1.requires_grad_(False)
    gradients(thrifty, sample().detach())
    assert len(norms_run) == 3  # ln_2 alone is run again


def test_nothing_is_left_behind():
    """No reference cycle: the graph goes with its last user, not with the garbage collector."""
    _, thrifty = make("dropout")
    gc.collect()
    gc.disable()
    try:
        for use in (lambda y: None, lambda y: y.sum().backward()):
            x = sample() * 1.0
            alive = weakref.ref(x)
            y = thrifty(x)
            use(y)
            del x, y
            assert alive() is None
    finally:
        gc.enable()


def test_without_gradients_nothing_is_recorded(norms_run):
    plain, thrifty = make()
    x = sample()
    with torch.no_grad():
        assert_bitwise(thrifty(x), plain(x))
    with torch.inference_mode():
        assert_bitwise(thrifty(x), plain(x))
    assert len(norms_run) == 8


def test_compiled():
    plain, thrifty = make()
    x = sample()
    torch.compiler.reset()
    compiled = torch.compile(thrifty, fullgraph=True, backend="aot_eager")
    assert_same(gradients(thrifty, x, run=lambda block, x: compiled(x)), gradients(plain, x))
    torch.compiler.reset()


def test_of_a_language_model():
    torch.manual_seed(0)
    config = Config(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=11, positions="rope")
    plain = Transformer(config)
    thrifty = copy.deepcopy(plain)
    assert thrifty.recompute() is thrifty and all(block.recompute for block in thrifty.transformer.h)
    ids = torch.randint(11, (2, 12))
    assert activation_bytes(thrifty, ids, ids) == activation_bytes(plain, ids, ids) - 3 * 2 * (2 * 12 * 16 * 4)
    results = []
    for model in (plain, thrifty):
        model(ids, ids).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*results)
    thrifty.recompute(False)
    assert activation_bytes(thrifty, ids, ids) == activation_bytes(plain, ids, ids)


def test_training_with_recompute_has_the_same_losses(tmp_path):
    losses = []
    for on in (False, True):
        trainer = make_trainer(tmp_path / str(on), changed(steps=3, recompute=on), dropout=0.1)
        assert all(block.recompute == on for block in trainer.model.transformer.h)
        losses.append([trainer.train_step()["loss"] for _ in range(3)])
    assert losses[0] == losses[1]
