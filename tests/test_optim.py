"""pykern.optim.AdamW against torch.optim.AdamW, and what it adds: clipping in the same pass, master weights."""

import copy
import math

import pytest
import torch

from pykern.optim import AdamW, clip_scale, gradient_norm

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},  # 20 steps, a few float32 roundings each
}


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (), (2, 3, 17)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", CLOSE)
def test_same_steps_as_torch(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    run(AdamW(ours, **OPTIONS), ours, 20)
    run(torch.optim.AdamW(theirs, **OPTIONS), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[dtype])


def test_groups_have_their_own_options():
    def make(kind, params):
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 0.01, "betas": (0.5, 0.6)}]
        return kind(groups, **OPTIONS)

    ours, theirs = parameters(), parameters()
    run(make(AdamW, ours), ours, 5)
    run(make(torch.optim.AdamW, theirs), theirs, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float64])


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_max_norm_clips_as_torch_does(scale):
    ours, theirs = parameters(), parameters()
    clipping, plain = AdamW(ours, max_norm=1.5, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(5):
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        kept = [p.grad.clone() for p in ours]
        clipping.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        plain.step()
        torch.testing.assert_close(clipping.grad_norm, norm, rtol=1e-12, atol=0.0)
        assert (norm > 1.5) == (scale == 10.0)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_follow_float32_masters(dtype):
    """The parameter is the rounded master, and the master is what float32 AdamW makes of the same gradients."""
    ours = parameters(dtype)
    full = [p.detach().float().requires_grad_() for p in ours]
    optimizer, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(full, **OPTIONS)
    for step in range(20):
        set_gradients(ours, step)
        for p, q in zip(ours, full, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, full, strict=True):
        master = optimizer.state[p]["master"]
        torch.testing.assert_close(master, q, **CLOSE[torch.float32])
        assert torch.equal(p, master.to(dtype))


def test_steps_too_small_for_bfloat16_add_up():
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (torch.tensor(1.0) - 1e-4).bfloat16() == 1.0  # one step alone is lost
    torch.testing.assert_close(p.float(), torch.full((4,), 0.99), rtol=4e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_exact(dtype):
    ours = parameters(dtype)
    optimizer = AdamW(ours, max_norm=1.0, **OPTIONS)
    run(optimizer, ours, 3)
    twin_params = [p.detach().clone().requires_grad_() for p in ours]
    twin = AdamW(twin_params, max_norm=1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, ours, 3, first=3)
    run(twin, twin_params, 3, first=3)
    assert twin.param_groups[0]["lr"] == OPTIONS["lr"]
    for a, b in zip(ours, twin_params, strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            same = (
                torch.equal(value, twin.state[b][key])
                if isinstance(value, torch.Tensor)
                else value == twin.state[b][key]
            )
            assert same, key


def test_takes_over_from_torch_and_back():
    params, theirs = parameters(), parameters()
    torchs = torch.optim.AdamW(theirs, **OPTIONS)
    run(torchs, theirs, 3)
    with torch.no_grad():
        for p, q in zip(params, theirs, strict=True):
            p.copy_(q)
    ours = AdamW(params)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    run(ours, params, 3, first=3)
    run(torchs, theirs, 3, first=3)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float64])
    back = torch.optim.AdamW(theirs, **OPTIONS)
    back.load_state_dict(copy.deepcopy(torchs.state_dict() | {"state": ours.state_dict()["state"]}))
    run(back, theirs, 1, first=6)
    run(ours, params, 1, first=6)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float64])


def norm_of(grad):
    p = torch.zeros_like(grad, requires_grad=True)
    p.grad = grad
    return gradient_norm([p]).item()


@pytest.mark.parametrize("n", [1, 4096, 4097, 1_000_003])
def test_norm_has_the_same_bits_for_any_thread_count(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        norms = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.append(norm_of(x))
    finally:
        torch.set_num_threads(before)
    assert norms[0] == norms[1] == norms[2] == pytest.approx(x.double().norm().item(), rel=1e-6)
    exact = math.sqrt(math.fsum(v * v for v in x.tolist()))
    assert norm_of(x.double()) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_that_is_not_finite_changes_nothing(bad):
    params = parameters()
    optimizer = AdamW(params, max_norm=1.0, **OPTIONS)
    run(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 2)
    params[1].grad[0] = bad
    with pytest.raises(FloatingPointError, match=f"norm of the gradients is {bad}"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {state["step"] for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.7, 1.5, 1.5000001, 40.0, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_that_of_the_formula(norm, dtype):
    """The bits of the same numbers in Python: what a GPU computes is what the host would."""
    given = torch.tensor(norm, dtype=dtype)
    scale = clip_scale(given, 1.5)
    assert (scale.dtype, scale.shape) == (torch.float64, (1,))
    assert scale.item() == min(1.0, 1.5 / (given.item() + 1e-6))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scale_of_a_norm_that_is_not_finite_is_nan(bad):
    assert clip_scale(torch.tensor(bad), 1.5).isnan().all()


def test_finite_norm():
    params = parameters()
    optimizer = AdamW(params, max_norm=1.0, **OPTIONS)
    assert math.isnan(optimizer.finite_norm())  # no step yet
    run(optimizer, params, 1)
    assert optimizer.finite_norm() == optimizer.grad_norm.item() > 0
    optimizer.grad_norm = torch.tensor(math.inf)
    with pytest.raises(FloatingPointError, match="AdamW: the norm of the gradients is inf"):
        optimizer.finite_norm()


def moved(params, device):
    return [p.detach().to(device).requires_grad_() for p in params]


def set_on(params, device, step, scale=1.0):
    """set_gradients, drawn on the CPU."""
    twins = parameters(params[0].dtype)
    set_gradients(twins, step, scale)
    for p, twin in zip(params, twins, strict=True):
        p.grad = twin.grad.to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_on_cuda_does_not_wait(dtype):
    """The steps of the CPU, with every call that would wait for the device an error."""
    ours, theirs = moved(parameters(dtype), "cuda"), parameters(dtype)
    clipping, plain = (AdamW(params, max_norm=1.5, **OPTIONS) for params in (ours, theirs))
    for step in range(3):
        set_on(ours, "cuda", step)
        set_gradients(theirs, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            clipping.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain.step()
    assert clipping.finite_norm() == pytest.approx(plain.finite_norm(), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        a, b = (o.state[x].get("master", x) for o, x in ((clipping, p), (plain, q)))
        torch.testing.assert_close(a.cpu(), b, **CLOSE[a.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_that_is_not_finite_changes_nothing_on_cuda(bad):
    params = moved(parameters(torch.bfloat16), "cuda")
    optimizer = AdamW(params, max_norm=1.0, **OPTIONS)
    set_on(params, "cuda", 0)
    optimizer.step()
    before = [t.clone() for p in params for t in (p, *optimizer.state[p].values()) if isinstance(t, torch.Tensor)]
    set_on(params, "cuda", 1)
    params[1].grad[0] = bad
    optimizer.step()
    after = [t for p in params for t in (p, *optimizer.state[p].values()) if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert {state["step"] for state in optimizer.state.values()} == {2}
    with pytest.raises(FloatingPointError, match=f"norm of the gradients is {bad}"):
        optimizer.finite_norm()


@pytest.mark.gpu
def test_a_clipped_step_can_be_captured_in_a_graph():
    params = moved(parameters(torch.float32), "cuda")
    optimizer = AdamW(params, max_norm=1.0, **OPTIONS)
    set_on(params, "cuda", 0, scale=10.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    before = params[0].detach().clone()
    graph.replay()
    torch.cuda.synchronize()
    norm = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt()
    assert optimizer.finite_norm() == pytest.approx(norm.item(), rel=1e-6)
    assert not torch.equal(params[0], before)


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    before = params[1].detach().clone()
    optimizer = AdamW(params, max_norm=1.0, **OPTIONS)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    for p in params:
        p.grad = None
    optimizer.step()
    assert optimizer.grad_norm == 0


def test_closure_and_scheduler():
    p = torch.tensor([1.0], requires_grad=True)
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = (p * 3).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(p.detach(), torch.tensor([0.9]))  # the first step of Adam has size lr
    scheduler.step()
    optimizer.step(closure)
    torch.testing.assert_close(p.detach(), torch.tensor([0.85]))


def test_update_is_seen_by_autograd():
    """A step between forward and backward would silently use new weights: torch must notice."""
    p = torch.tensor([2.0], requires_grad=True)
    loss = (p * p).sum()
    p.grad = torch.ones(1)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


REFUSALS = {
    "lr": ({"lr": -1.0}, "must not be negative"),
    "lr nan": ({"lr": float("nan")}, "must not be negative"),
    "eps": ({"eps": -1.0}, "must not be negative"),
    "weight decay": ({"weight_decay": -1.0}, "must not be negative"),
    "beta 1": ({"betas": (1.0, 0.9)}, "betas are"),
    "beta 2": ({"betas": (0.9, -0.1)}, "betas are"),
    "max_norm": ({"max_norm": 0.0}, "max_norm is 0.0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    options, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **options)


def test_other_refusals():
    with pytest.raises(TypeError, match="must be floating point"):
        AdamW([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    p = torch.zeros(4, 2, requires_grad=True)
    p.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        AdamW([p]).step()
