"""The CUDA kernels on a GPU: formula, strided rows, same bits, other streams, graphs. See cuda_cases.py for the ops.

The same checks run on the CPU, where they prove nothing about CUDA but that the checks themselves are sound.
"""

import copy
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import lm_models
import pytest
import torch
from cuda_cases import OPS, tf32_allowed
from cuda_op import results
from lm_training import OPTIONS, SHAPE, changed, losses, make_data
from tools import VIEWS

from pykern import _C
from pykern.config import allows_tf32
from pykern.lm import Config, Trainer
from pykern.lm.trainer import make_model
from pykern.optim import AdamW
from pykern.testing import assert_bitwise, assert_close
from pykern.testing.compare import OUTPUT, Tolerance

pytestmark = pytest.mark.one_isa
REPEATS = {"cuda": 50, "cpu": 3}
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
BITS = (torch.float32, torch.bfloat16)
every_op = pytest.mark.parametrize("name", OPS)
both_devices = pytest.mark.parametrize("device", DEVICES)
SUM_OF_SQUARES = Tolerance(2e-6, 0.0, "float64, but squares of float32")


def cuda_kernels():
    return list(getattr(_C, "cuda_kernels", list)())


def op_of(name, device):
    """The op, skipped where this extension has not all of its CUDA kernels."""
    op = OPS[name]
    missing = [kernel for kernel in op.kernels if kernel not in cuda_kernels()]
    if device == "cuda" and missing:
        pytest.skip(f"no CUDA kernel {', '.join(missing)} yet")
    if op.only_cuda and device == "cpu" and "emulated" not in sys.modules:
        pytest.skip(f"{name} needs a CUDA kernel, and this is the CPU without the emulator")
    return op


def bits_of(op):
    return [dtype for dtype in BITS if dtype in op.dtypes]


def moved(inputs, device):
    return {name: x.to(device) for name, x in inputs.items()}


def some_inputs(op, dtype, device="cpu", which=0):
    shape = list(op.shapes.values())[which]
    return moved(op.inputs(dtype, *shape), device)


def expected(op, inputs, douts):
    """The formula in float64 on the CPU."""
    wide = {name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in inputs.items()}
    return results(op, op.formula, wide, {name: x.cpu().double() for name, x in douts.items()})[0]


def assert_formula(op, inputs, name):
    found, douts = results(op, op.function, inputs)
    wanted = expected(op, inputs, douts)
    assert found.keys() == wanted.keys()
    dtype = next(x.dtype for x in inputs.values() if x.is_floating_point())
    for result, x in found.items():
        tolerance = SUM_OF_SQUARES if "square_sum" in op.kernels and dtype != torch.float64 else None
        assert_close(
            x.cpu(),
            wanted[result],
            name=f"{name} {result}",
            gradient=result.startswith("d"),
            tolerance=tolerance,
            scale=op.scale.get(result),
        )


def assert_same(found, wanted, name):
    for result in wanted:
        assert_bitwise(found[result], wanted[result], name=f"{name} {result}")


def test_every_cuda_kernel_has_a_case():
    of_a_session = {"lm_step", "lm_generate"}  # test_a_session_decodes
    assert set(cuda_kernels()) <= {kernel for op in OPS.values() for kernel in op.kernels} | of_a_session


@both_devices
@every_op
def test_is_its_formula(name, device):
    """Every shape in every dtype, forward and backward, against float64."""
    op = op_of(name, device)
    for dtype in op.dtypes:
        for kind, shape in op.shapes.items():
            assert_formula(op, moved(op.inputs(dtype, *shape), device), f"{name}, {kind}, {dtype}")


@both_devices
@every_op
def test_rows_may_be_strided(name, device):
    """Rows with gaps full of NaN, rows at odd addresses, transposed matrices."""
    op = op_of(name, device)
    for dtype in bits_of(op):
        inputs = some_inputs(op, dtype, device, which=-1)
        for view, make in VIEWS.items():
            strided = {n: make(x) if n in op.rows and x.dim() > 1 else x for n, x in inputs.items()}
            assert_formula(op, strided, f"{name}, {view}, {dtype}")


@both_devices
@every_op
def test_repeats_have_the_same_bits(name, device):
    """Also where memory that was full of NaN is handed out again."""
    op = op_of(name, device)
    for dtype in bits_of(op):
        for which in range(len(op.shapes)):
            inputs = some_inputs(op, dtype, device, which)
            first, douts = results(op, op.function, inputs)
            kept = {result: x.clone() for result, x in first.items()}
            given = {x.data_ptr() for x in (*inputs.values(), *douts.values())}  # the gradient of a residual is dout
            for _ in range(REPEATS[device]):
                while first:
                    _, x = first.popitem()
                    if x.data_ptr() not in given:
                        x.fill_(torch.nan)
                del x
                first, _ = results(op, op.function, inputs, douts)
                assert_same(first, kept, f"{name} {dtype}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_thousand_products_have_the_same_bits(dtype):
    op_of("linear", "cuda")
    op = OPS["linear"]
    inputs = moved(op.inputs(dtype, 1000, 768, 520), "cuda")
    first, douts = results(op, op.function, inputs)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again, _ = results(op, op.function, inputs, douts)
        for name, x in first.items():
            different += (x.view(torch.uint8) != again[name].view(torch.uint8)).sum()
    assert different.item() == 0


def side_stream(device):
    """A stream other than the default one, and a context in which it is current."""
    if device == "cpu":
        return None, nullcontext()
    stream = torch.cuda.Stream()
    return stream, torch.cuda.stream(stream)


TF32 = {  # results of products, and of what follows them
    "mlp": ("out", "dx", "dup_weight", "ddown_weight", "dup_bias"),
    "mlp, gated": ("out", "dx", "dup_weight", "dgate_weight", "ddown_weight"),
    "linear_cross_entropy": ("out", "dx", "dweight"),
}


@both_devices
@pytest.mark.parametrize("name", TF32)
def test_tf32_is_of_every_product(name, device):
    """Each result differs from that of float32, whose bits repeat, and by no more than a few 2^-11 of the largest."""
    op = op_of(name, device)
    if device == "cpu" and "emulated" not in sys.modules:
        pytest.skip("the CPU has no tf32")
    inputs = some_inputs(op, torch.float32, device)
    exact, douts = results(op, op.function, inputs)
    rounded, _ = results(replace(op, context=tf32_allowed), op.function, inputs, douts)
    for result in TF32[name]:
        difference = float((rounded[result] - exact[result]).abs().max() / exact[result].abs().max())
        assert 0 < difference < 2**-7, (result, difference)


def test_tf32_is_asked_of_torch():
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert allows_tf32(x)
        assert not allows_tf32(SimpleNamespace(is_cuda=True, dtype=torch.float64))
        assert not allows_tf32(torch.ones(1))
        torch.set_float32_matmul_precision("highest")
        assert not allows_tf32(x)
    finally:
        torch.set_float32_matmul_precision(before)


@both_devices
@every_op
def test_runs_on_the_current_stream(name, device):
    """The inputs are written on that stream after a long wait: a kernel on another stream would read what was there."""
    op = op_of(name, device)
    for dtype in bits_of(op):
        inputs = some_inputs(op, dtype, device)
        wanted, douts = results(op, op.function, inputs)
        late = {n: torch.zeros_like(x) if x.is_floating_point() else x.clone() for n, x in inputs.items()}
        stream, context = side_stream(device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with context:
            if stream is not None:
                torch.cuda._sleep(20_000_000)  # some 10 ms
            for n, x in late.items():
                x.copy_(inputs[n])
            found, _ = results(op, op.function, late, douts)
        if stream is not None:
            stream.synchronize()
        assert_same(found, wanted, f"{name} {dtype}")


def captured(device, compute):
    """(what compute() returns, replay): replaying fills the same tensors anew from what the inputs hold then."""
    if device == "cpu":
        found = compute()

        def again():
            for name, x in compute().items():
                found[name].copy_(x)

        return found, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = compute()
    return found, graph.replay


@both_devices
@every_op
def test_can_be_captured_in_a_graph(name, device):
    """A replay computes on what the inputs hold at that time."""
    op = op_of(name, device)
    for dtype in bits_of(op):
        inputs = some_inputs(op, dtype, device)
        _, douts = results(op, op.function, inputs)
        static = {n: x.clone() for n, x in inputs.items()}
        found, replay = captured(device, lambda static=static, douts=douts: results(op, op.function, static, douts)[0])
        for part in (0.5, 1.0):
            changed = {n: x * part if x.is_floating_point() else x for n, x in inputs.items()}
            for n, x in static.items():
                x.copy_(changed[n])
            replay()
            if device == "cuda":
                torch.cuda.synchronize()
            assert_same(found, results(op, op.function, changed, douts)[0], f"{name} {dtype}, inputs times {part}")


@both_devices
@every_op
def test_small_for_the_sanitizer(name, device):
    """A process under compute-sanitizer runs this alone: the smallest shape, forward and backward."""
    op = op_of(name, device)
    for dtype in bits_of(op):
        found, _ = results(op, op.function, some_inputs(op, dtype, device))
        assert all(x.cpu().isfinite().all() for x in found.values())


# ---- whole models


def training_losses(model, ids, targets):
    """Of three steps, the weights after each being what AdamW made of them."""
    optimizer = AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    found = []
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.finite_norm()
        found.append(loss.detach().cpu())
    return torch.stack(found)


@both_devices
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", lm_models.SHAPES)
def test_a_language_model_trains(shape, dtype, device):
    """From the same weights its losses are those of the CPU."""
    model = lm_models.make(n_embd=64, block_size=72, vocab_size=101, dtype=dtype, **lm_models.SHAPES[shape])
    ids = lm_models.random_ids(3, 72, vocab=101)
    targets = ids.roll(-1, 1).masked_fill(ids % 9 == 0, -100)
    given = copy.deepcopy(model).to(device), ids.to(device), targets.to(device)
    expected = training_losses(model, ids, targets)
    found = training_losses(*given)
    assert expected[2] < expected[0]
    assert_close(found, expected, name=f"losses of {shape}", tolerance=OUTPUT[dtype])


@both_devices
@pytest.mark.parametrize("batches", ["blocks", "padded", "packed"])
def test_a_run_trains_and_resumes(batches, device, tmp_path):
    """pykern.lm.Trainer where its model is: the losses of the CPU, exact resuming, streams that are put back."""
    data = make_data(split=None if batches == "blocks" else "lines")
    options = changed(batches=batches, steps=4, checkpoint_every=2)

    def run(name, place, dropout=0.0, options=options):
        model = make_model(Config(vocab_size=256, dropout=dropout, **SHAPE), OPTIONS).to(place)
        return Trainer(model, data, options, tmp_path / name).run()

    run("cpu", "cpu")
    run("found", device)
    expected, found = (torch.tensor(losses(tmp_path / name)) for name in ("cpu", "found"))
    assert_close(found.float(), expected.double(), name=f"losses of {batches}")
    before = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    run("whole", device, 0.1)
    run("part", device, 0.1, changed(batches=batches, steps=2))
    Trainer.resume(tmp_path / "part", data, options, device=device).run()
    assert torch.equal(before, torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state())
    assert len(losses(tmp_path / "whole")) == 4


SESSIONS = [shape for shape, changes in lm_models.SHAPES.items() if changes.get("positions") != "t5"]


@both_devices
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", SESSIONS)
def test_a_session_decodes(shape, dtype, device):
    """Logits by the formula; texts have the bits and tokens that they have alone, and end where a token says so."""
    model = lm_models.make(n_embd=64, block_size=72, vocab_size=101, **lm_models.SHAPES[shape])
    rounded = copy.deepcopy(model).to(dtype)
    ids = lm_models.random_ids(3, 72, vocab=101)
    model.to(device)
    name = str(dtype).removeprefix("torch.")
    session, alone = model.session(dtype=name, batch=3), model.session(dtype=name)

    def logits(session, ids):
        session.reset()
        found = [session.prefill(ids[:, :40]), *(session.step(ids[:, i]) for i in range(40, 60))]
        return torch.stack(found, 1).cpu()

    found = logits(session, ids)
    usual = lm_models.full_logits(rounded, ids)[:, 39:60].double()
    wanted = lm_models.full_logits(rounded.double(), ids)[:, 39:60]
    assert (found - wanted).square().mean().sqrt() <= 2 * (usual - wanted).square().mean().sqrt() + 1e-6
    assert_bitwise(logits(alone, ids[1:2]), found[1:2], name="alone")
    options = dict(max_new_tokens=30, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)
    drawn = session.generate(ids[:, :8], seed=7, **options)
    for b in range(3):
        assert torch.equal(alone.generate(ids[b : b + 1, :8], seed=7 + b, **options), drawn[b : b + 1])
    stop = int(drawn[1, 20])
    first = int((drawn[1, 8:] == stop).nonzero()[0])
    ended = alone.generate(ids[1:2, :8], seed=8, stop_tokens=(stop,), **options)
    assert torch.equal(ended, drawn[1:2, : 8 + first + 1])
