"""Weights are never stale: after any change of a parameter, a module computes what a new module of its values computes.

Nothing below may remember a weight, packed or converted: not by address, which an edit keeps, nor by version, which
weight.data.add_() does not raise. Each test calls a module, changes its weights, calls it again and compares, bit for
bit, with a module built from the values that the weights have now. Under autocast all of it is one autocast region.
"""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nn_twins import randn, randomise

from pykern import nn, optim
from pykern.lm import Config, Transformer
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa  # who keeps what is the same code for every ISA

WIDTH, HIDDEN, CLASSES = 24, 40, 30
ROWS = (1, 20)  # one row takes the path that streams the weights, twenty the one that packs them
MODES = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
SIGN = {torch.float32: (torch.int32, -(2**31)), torch.bfloat16: (torch.int16, -(2**15))}


def rows(n, dtype):
    return (randn(1, n, WIDTH, seed=n).to(dtype).requires_grad_(),)


def rows_and_classes(n, dtype):
    return *rows(n, dtype), torch.randint(CLASSES, (1, n), generator=torch.Generator().manual_seed(n))


def tokens(n, dtype):
    ids = torch.randint(CLASSES, (1, n + 1), generator=torch.Generator().manual_seed(n))
    return ids[:, :-1], ids[:, 1:]


def language_model():
    return Transformer(Config(n_layer=1, n_head=2, n_embd=WIDTH, block_size=max(ROWS), vocab_size=CLASSES))


# name: (what builds it, what it is called with for so many rows)
MODULES = {
    "Linear": (lambda: nn.Linear(WIDTH, HIDDEN), rows),
    "Linear gelu": (lambda: nn.Linear(WIDTH, HIDDEN, activation="gelu"), rows),
    "MLP": (lambda: nn.MLP(WIDTH, HIDDEN), rows),
    "MLP swiglu": (lambda: nn.MLP(WIDTH, HIDDEN, "swiglu", bias=False), rows),
    "TransformerBlock": (lambda: nn.TransformerBlock(WIDTH, 2), rows),
    "TransformerBlock recompute": (lambda: nn.TransformerBlock(WIDTH, 2, recompute=True), rows),
    "LinearCrossEntropyLoss": (lambda: nn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True), rows_and_classes),
    "Transformer": (language_model, tokens),
}


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def build(name, dtype):
    return randomise(MODULES[name][0]().double()).to(dtype)


def results(module, inputs, dtype, enabled):
    """Outputs and gradients of everything, by name, for each number of rows."""
    found = {}
    for n in ROWS:
        module.zero_grad()
        arguments = inputs(n, dtype)
        with autocast(enabled):
            out = module(*arguments)
        out.backward(randn(*out.shape, seed=7).to(out.dtype))
        found[f"output of {n} rows"] = out.detach()
        if arguments[0].requires_grad:
            found[f"input's gradient of {n} rows"] = arguments[0].grad
        for name, p in module.named_parameters():
            found[f"gradient of {name} of {n} rows"] = p.grad.clone()
    return found


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fresh(build_new, now):
    """A new module that has never been called, of these values."""
    module = build_new()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(now[name])
    return module


def assert_fresh(module, build_new, inputs, dtype, enabled):
    """The module's results are those of a new module with its values; returns them."""
    ours = results(module, inputs, dtype, enabled)
    theirs = results(fresh(build_new, values(module)), inputs, dtype, enabled)
    assert set(ours) == set(theirs)
    for name, x in ours.items():
        assert_bitwise(x, theirs[name], name=name)
    return ours


def assert_moved(before, now):
    """Every parameter has other values than before, so that results must differ."""
    assert set(before) == set(now)
    for name, p in now.items():
        assert not torch.equal(before[name], p), f"the edit left {name} as it was"


# ---- edits: each takes the module that was called and returns the one to call now, None for the same.
# None of them adds the same number to every weight: a softmax would not notice.


def in_place(module, *_):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(-0.75)


def data_in_place(module, *_):
    for p in module.parameters():
        p.data.mul_(-0.75)  # raises no version


def data_replaced(module, *_):
    for p in module.parameters():
        p.data = p.data * -0.75


def data_swapped(module, *_):
    """The old memory goes back to the allocator, which hands it out again: an address proves nothing."""
    for p in module.parameters():
        new = p.data * -0.75
        p.data = torch.empty(0, dtype=p.dtype)
        p.data = new.clone()


def view_of_the_storage(module, *_):
    for p in module.parameters():
        flat = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
        flat[::2].copy_(flat[::2] * -0.75)


def numpy_alias(module, *_):
    """Behind torch's back: the sign of every number."""
    for p in module.parameters():
        kind, sign = SIGN[p.dtype]
        p.detach().view(kind).numpy()[...] ^= sign


def new_parameters(module, *_):
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(p.detach() * -0.75))


def loaded(module, *_):
    module.load_state_dict({name: p * -0.75 for name, p in module.state_dict().items()})


def loaded_by_assignment(module, *_):
    module.load_state_dict({name: p * -0.75 for name, p in module.state_dict().items()}, assign=True)


def other_dtype_and_back(module, dtype, *_):
    module.to(torch.float64)
    data_in_place(module)
    module.to(dtype)


def shared_memory(module, *_):
    module.share_memory()
    data_in_place(module)


def step_of(make):
    def step(module, *_):
        optimizer = make(module.parameters())
        for p in module.parameters():
            p.grad = p.detach().clone()
        for _ in range(2):
            optimizer.step()

    return step


def deep_copy(module, *_):
    twin = copy.deepcopy(module)
    data_in_place(twin)
    return twin


def original_of_a_deep_copy(module, *_):
    copy.deepcopy(module)
    data_in_place(module)


def pickled(module, *_):
    twin = pickle.loads(pickle.dumps(module))
    data_in_place(twin)
    return twin


def saved_and_loaded(module, *_):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    data_in_place(twin)
    return twin


EDITS = {
    "in place": in_place,
    "data in place": data_in_place,
    "data replaced": data_replaced,
    "data swapped": data_swapped,
    "view of the storage": view_of_the_storage,
    "numpy alias": numpy_alias,
    "new parameters": new_parameters,
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": loaded_by_assignment,
    "float64 and back": other_dtype_and_back,
    "shared memory": shared_memory,
    "torch's SGD": step_of(lambda ps: torch.optim.SGD(ps, lr=0.1)),
    "torch's AdamW": step_of(lambda ps: torch.optim.AdamW(ps, lr=0.1)),
    "torch's AdamW, fused": step_of(lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True)),
    "pykern's AdamW": step_of(lambda ps: optim.AdamW(ps, lr=0.1, max_norm=1.0)),
    "deepcopy": deep_copy,
    "deepcopy's original": original_of_a_deep_copy,
    "pickle": pickled,
    "torch.save": saved_and_loaded,
}


def check(build_new, inputs, edit, mode):
    """AssertionError unless a module, called before and after the edit, computes from the weights it has."""
    dtype, enabled = MODES[mode]
    with autocast(enabled):
        module = build_new()
        before = values(module)
        first = results(module, inputs, dtype, enabled)
        edited = edit(module, dtype) or module
        assert_moved(before, values(edited))
        second = assert_fresh(edited, build_new, inputs, dtype, enabled)
        assert any(not torch.equal(first[name], x) for name, x in second.items() if name.startswith("output"))
        if edited is not module:  # a copy was edited: the original has its weights and its results still
            for name, x in results(module, inputs, dtype, enabled).items():
                assert_bitwise(x, first[name], name=f"original's {name}")
            data_in_place(module)
            assert_fresh(module, build_new, inputs, dtype, enabled)
            for name, x in results(edited, inputs, dtype, enabled).items():
                assert_bitwise(x, second[name], name=f"copy's {name}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", MODULES)
def test_results_follow_the_weights(name, edit, mode):
    dtype = MODES[mode][0]
    check(lambda: build(name, dtype), MODULES[name][1], EDITS[edit], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODULES)
def test_two_threads_with_their_own_copies(name, mode):
    """Each edits and calls its own: what one does, the other does not see."""
    dtype, enabled = MODES[mode]
    inputs = MODULES[name][1]
    module = build(name, dtype)
    start = threading.Barrier(2)

    def work(scale):
        mine = copy.deepcopy(module)
        start.wait(timeout=30)
        for _ in range(3):
            for p in mine.parameters():
                p.data.mul_(scale)
            assert_fresh(mine, lambda: build(name, dtype), inputs, dtype, enabled)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, scale) for scale in (0.5, -0.75)]:
            future.result(timeout=60)


# ---- the check itself: it must find a weight that is kept


class Remembering(nn.Linear):
    """Keeps a copy of the weight for as long as key(weight) stays the same. forward and backward say where it is used.

    The memory belongs to the class, as that of a kernel would: a copy of the module has it, too.
    """

    key = staticmethod(lambda w: 0)
    use_forward = use_backward = True
    memory: dict = {}  # noqa: RUF012

    def forward(self, x, residual=None):
        key = (type(self).__name__, self.key(self.weight))
        kept = self.memory.setdefault(key, self.weight.detach().clone())
        now, old = self.weight, kept + 0.0 * self.weight  # old: the gradients of the weight are right
        if self.use_forward and self.use_backward:
            return torch.nn.functional.linear(x, old, self.bias)
        forward, backward = (old, now) if self.use_forward else (now, old)
        straight = torch.nn.functional.linear(x, backward, self.bias)
        return straight + (torch.nn.functional.linear(x, forward, self.bias) - straight).detach()


def by_address(w):
    return w.data_ptr()


def by_version(w):
    return w.data_ptr(), w._version


def by_object(w):
    return id(w), w._version


REMEMBERING = {  # name: (key, where the old weight is used, an edit that must be found)
    "address": (by_address, "both", "in place"),
    "address, in forward": (by_address, "forward", "in place"),
    "address, in backward": (by_address, "backward", "in place"),
    "address, optimiser": (by_address, "both", "pykern's AdamW"),
    "address, load_state_dict": (by_address, "both", "load_state_dict"),
    "version": (by_version, "both", "data in place"),
    "version, numpy": (by_version, "both", "numpy alias"),
    "version, in backward": (by_version, "backward", "data in place"),
    "object": (by_object, "both", "data replaced"),
}


@pytest.mark.parametrize("case", REMEMBERING)
def test_check_finds_a_weight_that_is_kept(case):
    key, where, edit = REMEMBERING[case]

    class Kept(Remembering):
        memory: dict = {}  # noqa: RUF012

    Kept.key = staticmethod(key)
    Kept.use_forward, Kept.use_backward = where in ("both", "forward"), where in ("both", "backward")

    def build_new():
        return randomise(Kept(WIDTH, HIDDEN).double()).float()

    with pytest.raises(AssertionError, match="elements differ in their bits"):
        check(build_new, rows, EDITS[edit], "float32")


def test_check_passes_what_keeps_nothing():
    for edit in EDITS.values():
        check(lambda: randomise(torch.nn.Linear(WIDTH, HIDDEN).double()).float(), rows, edit, "float32")


def test_check_finds_an_edit_that_does_nothing():
    with pytest.raises(AssertionError, match="the edit left weight as it was"):
        check(lambda: build("Linear", torch.float32), rows, lambda module, dtype: None, "float32")
