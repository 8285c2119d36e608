"""Optimisers: each step moves parameter.value against parameter.grad."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from pykern import _C

from . import inputs
from .engine import Parameter


class Optimizer:
    """Keeps the parameters; subclasses write step()."""

    def __init__(self, parameters: Iterable[Parameter], lr: float):
        op = type(self).__name__
        self.parameters = inputs.unique(op, "parameters", parameters)
        for parameter in self.parameters:
            if not isinstance(parameter, Parameter):
                raise TypeError(f"{op}: parameters holds {inputs.describe(parameter)}, expected module.parameters()")
        if not self.parameters:
            raise ValueError(f"{op}: parameters is empty, there is nothing to learn")
        self.lr = inputs.number(op, "lr", lr, least=0)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> None:
        raise NotImplementedError(f"{type(self).__name__}: step() is not written")


class SGD(Optimizer):
    """m = momentum m + grad;  value -= lr m.

    value, grad and m [...] have the parameter's dtype, float64 unless asked. TypeError: not parameters. ValueError:
    none, options.
    """

    def __init__(self, parameters: Iterable[Parameter], lr: float = 0.1, *, momentum: float = 0.0):
        super().__init__(parameters, lr)
        self.momentum = inputs.number("SGD", "momentum", momentum, least=0)
        self.m = [np.zeros_like(parameter.value) for parameter in self.parameters]

    def step(self) -> None:
        for parameter, m in zip(self.parameters, self.m, strict=True):
            m *= self.momentum
            m += parameter.grad
            parameter.value -= self.lr * m


class AdamW(Optimizer):
    """m = b1 m + (1 - b1) grad,  v = b2 v + (1 - b2) grad^2,  both divided by 1 - b^step to undo their start at 0;

    value -= lr (m / (sqrt(v) + eps) + weight_decay value).
    value, grad and moments [...] have the parameter's dtype, float64 unless asked. TypeError: not parameters.
    ValueError: none, options. Source: Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(parameters, lr)
        beta1, beta2 = (
            inputs.number("AdamW", "betas", b, least=0, below=1) for b in inputs.pair("AdamW", "betas", betas)
        )
        eps = inputs.number("AdamW", "eps", eps, least=0)
        weight_decay = inputs.number("AdamW", "weight_decay", weight_decay, least=0)
        self.options: dict[str, Any] = dict(
            beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, grad_scale=1.0
        )
        self.m = [np.zeros_like(parameter.value) for parameter in self.parameters]
        self.v = [np.zeros_like(parameter.value) for parameter in self.parameters]
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        states = [(p.value, p.grad, m, v, None) for p, m, v in zip(self.parameters, self.m, self.v, strict=True)]
        _C.adamw(states, lr=self.lr, step=self.steps, **self.options)
