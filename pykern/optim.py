"""AdamW in one pass over memory, with gradient clipping folded in and float32 masters of 16-bit parameters."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykern.ops.adamw import adamw_all_, square_sums

MOMENTS = ("exp_avg", "exp_avg_sq", "master")


def local(x: Any) -> Any:
    """x, or this process's shard of it, in the same memory, when it is a DTensor (as under FSDP2)."""
    return x.to_local() if hasattr(x, "to_local") else x


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, shards of other processes included, on the first one's device.

    float32, or float64 where a gradient is; in the same bits for any number of threads.
    """
    grads: list[Any] = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    square = square_sums([local(grad) for grad in grads]).sum()
    if any(hasattr(grad, "device_mesh") for grad in grads):
        torch.distributed.all_reduce(square, group=grads[0].device_mesh.get_group())
    wide = any(grad.dtype == torch.float64 for grad in grads)
    return square.sqrt().to(torch.float64 if wide else torch.float32)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), float64 [1] on the device of norm, NaN unless norm is finite: nobody waits."""
    wide = norm.detach().double().view(1)
    return (torch.full_like(wide, max_norm) / (wide + 1e-6)).clamp(max=1.0) + 0.0 * wide  # 0 * inf is NaN


class AdamW(torch.optim.Optimizer):
    """p -= lr * (m / (sqrt(v) + eps) + weight_decay * p), with m and v the bias-corrected moments of the gradient.

    float32, float64, bfloat16 or float16 parameters. The moments are float32 (float64 for float64); a 16-bit parameter
    is the rounded copy of a float32 master weight, so that steps too small for 16 bits still add up. max_norm scales
    all gradients so that their joint norm is at most max_norm; `grad_norm` is the norm, before scaling, that the last
    step saw; when it is not finite, step() raises FloatingPointError and changes nothing. Parameters may be DTensors
    sharded over one mesh (FSDP2): each process updates its shard, and the norm is that of all shards.

    On CUDA step() never waits for the device and raises nothing: a step whose norm is not finite changes neither
    parameters nor moments there, though it is counted; grad_norm is the tensor to look at, finite_norm() does. Steps
    are counted on the host: those of a CUDA graph have the bias correction of the step that was captured.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
    ) -> None:
        if not lr >= 0.0 or not eps >= 0.0 or not weight_decay >= 0.0:
            raise ValueError(f"AdamW: lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"AdamW: betas are {betas} but must be two numbers from 0 up to, not including, 1")
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"AdamW: max_norm is {max_norm} but must be positive")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.max_norm = max_norm
        self.grad_norm: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the base class would forget what it does not know."""
        return super().__getstate__() | {"max_norm": self.max_norm, "grad_norm": self.grad_norm}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise TypeError(f"AdamW: a parameter has dtype {p.dtype} but must be floating point")

    def prepare(self, p: Tensor) -> dict[str, Any]:
        """The state of p, made if there is none yet: step, exp_avg, exp_avg_sq and, for a 16-bit p, master."""
        state = self.state[p]
        if not state:
            stat = torch.float64 if p.dtype == torch.float64 else torch.float32
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=stat)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=stat)
            if p.dtype != stat:
                state["master"] = p.detach().to(stat, copy=True)
        return state

    def finite_norm(self) -> float:
        """grad_norm as a number, which waits for its device; NaN without max_norm. FloatingPointError: not finite."""
        if self.grad_norm is None:
            return math.nan
        norm = float(self.grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"AdamW: the norm of the gradients is {norm}")
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in with_grad):
            raise RuntimeError("AdamW: sparse gradients are not supported")
        scale = None
        if self.max_norm is not None:
            self.grad_norm = gradient_norm(with_grad)
            if not self.grad_norm.is_cuda:
                self.finite_norm()
            scale = clip_scale(self.grad_norm, self.max_norm)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            states: dict[tuple[int, torch.device], list[tuple]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.prepare(p)
                state["step"] = int(state["step"]) + 1
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state.get("master"))
                states.setdefault((state["step"], p.device), []).append(tuple(map(local, tensors)))
            for (step, _), together in states.items():
                adamw_all_(
                    together,
                    lr=float(group["lr"]),
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    grad_scale=1.0,
                    scale=scale,
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state_dict(), or that of torch.optim.AdamW. The base class would round moments to 16 bits."""
        super().load_state_dict(state_dict)
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(names, params, strict=True):
            saved = state_dict["state"].get(name, {})
            stat = torch.float64 if p.dtype == torch.float64 else torch.float32
            for key in MOMENTS:
                if key in saved:
                    self.state[p][key] = saved[key].detach().to(device=p.device, dtype=stat, copy=True)
            if saved and p.dtype != stat and "master" not in saved:
                self.state[p]["master"] = p.detach().to(stat, copy=True)
