"""The contestants of a training step, and the memory that benchmarks measure: bytes kept, peaks in a process each."""

import pytest
import torch

from benchmarks import bench_cross_entropy, bench_train, memory, models, report
from benchmarks.plain_gpt import PlainGPT
from pykern.testing.memory import kept_bytes

pytestmark = pytest.mark.one_isa


def gradients(step):
    """The loss of a contestant and its gradients under pykern's names, those of bench_train.build."""
    loss = step.loss()
    loss.backward()
    found = {name: p.grad.float() for name, p in step.model.named_parameters()}
    if isinstance(step.model, PlainGPT):
        found = {bench_train.pykern_name(name): gradient for name, gradient in found.items()}
    return loss.item(), found


def weights(step):
    """Copies of the parameters, or of the float32 masters: a small step may be less than a rounding of bfloat16."""
    state = step.optimizer.state
    return [state.get(p, {}).get("master", p.detach()).float().clone() for p in step.model.parameters()]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", bench_train.DTYPES, ids=str)
def test_all_contestants_of_a_training_step_have_the_same_gradients(dtype, compiled):
    steps = bench_train.build(*bench_train.QUICK_STEPS[0], dtype, compiled)
    half = dtype == torch.bfloat16
    wanted = {report.OURS, "torch"} | ({"pykern, bf16 weights"} if half else set())
    assert set(steps) == wanted | ({"torch.compile"} if compiled else set())
    assert {p.dtype for who in steps for p in steps[who].model.parameters()} == {torch.float32, dtype}
    bound = 4e-2 if half else 1e-4
    loss, expected = gradients(steps["torch"])
    for who, step in steps.items():
        if who != "torch":
            ours, found = gradients(step)
            assert ours == pytest.approx(loss, rel=1e-3 if half else 1e-5) and found.keys() == expected.keys(), who
            for name, gradient in found.items():
                scale, worst = expected[name].abs().max().item(), (gradient - expected[name]).abs().max().item()
                assert worst <= bound * scale, f"{who} {name}: {worst} of {scale}"
        step.optimizer.zero_grad()
        before = weights(step)
        step()
        assert all(p.grad is None for p in step.model.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, weights(step), strict=True)), who


def test_long_and_quick_steps_are_compiled_only_on_demand(monkeypatch):
    built = []
    monkeypatch.setattr(bench_train, "build", lambda model, B, T, dtype, compiled: built.append((model, T, compiled)))
    for quick, compile_all in ((True, False), (True, True), (False, False), (False, True)):
        for case in bench_train.cases(quick, compile_all):
            case.build()
    tiny, gpt2, small = models.TINY, models.GPT2, models.SMALL
    assert built[::2] == built[1::2]  # both dtypes
    assert built[::2] == [
        *((tiny, 32, False), (tiny, 32, True)),
        *((gpt2, 64, True), (gpt2, 1024, False), (small, 256, True)),
        *((gpt2, 64, True), (gpt2, 1024, True), (small, 256, True)),
    ]


def test_kept_bytes_are_whole_storages_each_once_without_parameters():
    weight = torch.zeros(8, 4, requires_grad=True)
    x = torch.randn(16, 4, requires_grad=True)
    assert kept_bytes(lambda: x * 2.0, []) == 0
    assert kept_bytes(lambda: torch.tanh(x), []) == x.nbytes
    assert kept_bytes(lambda: torch.nn.functional.linear(x, weight), [weight]) == x.nbytes
    assert kept_bytes(lambda: torch.nn.functional.linear(x, weight), []) == x.nbytes + weight.nbytes
    expected = x.nbytes + 2 * 4 * 4  # two views of x, and exp's output, which both backward functions read
    assert kept_bytes(lambda: x[:2].exp() * x[2:4], []) == expected


def test_activation_bytes_of_a_step():
    """torch's in units of B T n_embd floats. A layer: each norm's input and output, q k v, what attention gives,
    4 before GELU and 4 after; then the last norm's two. Besides, log_softmax of the logits: pykern does not keep it.
    """
    tiny = models.TINY
    steps = bench_train.build(tiny, 2, 32, torch.float32, False)
    unit, logits = (4 * 2 * 32 * width for width in (tiny.n_embd, tiny.vocab_size))
    ours, torchs = (steps[who].activation_bytes() for who in (report.OURS, "torch"))
    expected = (16 * tiny.n_layer + 2) * unit + logits
    assert expected <= torchs <= 1.01 * expected  # and statistics of the norms, lse, token ids
    assert 0 < ours < torchs


def test_peak_growth_sees_what_a_call_frees_again():
    size, slack = 64 << 20, 1 << 20  # the system counts some pages per processor and adds them up later
    grown, result = memory.peak_growth(lambda: torch.ones(size // 4).sum().item())
    assert size - slack <= grown <= size + 8 * slack and result == size / 4
    assert memory.peak_growth(lambda: None)[0] <= slack  # the former peak is forgotten


def test_peaks_of_a_head_in_a_process_each():
    """torch has all logits, M V floats, at least twice at once; pykern those of some rows."""
    M, K, V = 2048, 64, 16384
    small, large = ([*shape, "float32"] for shape in (bench_cross_entropy.WARM_UP, (M, K, V)))
    found = {who: memory.peaks_in_child(bench_cross_entropy.heads, who, small, large) for who in (report.OURS, "torch")}
    for peaks in found.values():
        assert peaks["results"] == (M * K + V * K) * 4
        assert peaks["backward"] >= peaks["results"] and 0 < peaks["extra"] <= max(peaks["forward"], peaks["backward"])
    assert found["torch"]["forward"] >= 2 * M * V * 4
    assert found["torch"]["extra"] >= 2 * M * V * 4 > 4 * found[report.OURS]["extra"]


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)memory: the process that measures nobody failed:.*KeyError: 'nobody'"):
        memory.peaks_in_child(bench_cross_entropy.heads, "nobody", [2, 4, 8, "float32"], [2, 4, 8, "float32"])
