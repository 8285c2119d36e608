"""Modules of transformers that pykern computes, recognised by what they compute, and the classes that take their place.

A module changes its class, not its parameters: names, hooks and state stay. Root-mean-square norms and MLPs differ
between families in details that no name tells, so each is tried with small random weights against pykern's op first.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pykern import ops
from pykern.nn.linear import ACTIVATIONS
from pykern.nn.linear import Linear as FusedLinear
from pykern.nn.norm import LayerNorm as FusedLayerNorm
from pykern.nn.norm import RMSNorm as FusedRMSNorm

MLP_NAMES: tuple[tuple[str | None, str, str], ...] = (  # gate, up, down
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    (None, "wi", "wo"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "c_fc", "c_proj"),
    (None, "up_proj", "down_proj"),
)
EPSILONS = ("variance_epsilon", "eps", "epsilon")
CLOSE = 1e-5  # results of size 1 in float32, sums of some numbers in another order: 1e-6 measured
CLOSE_DOUBLE = 1e-9  # the same in float64; the two forms of gelu differ by 1e-4


class Linear(FusedLinear):
    """torch.nn.Linear whose forward is pykern.linear."""

    activation = None  # an attribute of each instance in FusedLinear, whose constructor does not run here


EXACT: Mapping[type, tuple[type, str]] = {
    torch.nn.Linear: (Linear, "pykern.linear"),
    torch.nn.LayerNorm: (FusedLayerNorm, "pykern.layer_norm"),
    torch.nn.RMSNorm: (FusedRMSNorm, "pykern.rms_norm"),
}


def plain(layer: torch.nn.Module) -> bool:
    """Whether calling this linear layer does nothing but x weight^T + bias: nobody replaced it or hooks into it."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    known = getattr(type(layer), "forward", None) in (torch.nn.Linear.forward, FusedLinear.forward)
    return known and "forward" not in vars(layer) and not any(hooks)


def twin(module: torch.nn.Module, children: dict[str, torch.nn.Module], parameters: dict[str, Tensor]) -> Any:
    """A module of the same class and settings with other children and parameters, without hooks."""
    other = torch.nn.Module.__new__(type(module))
    torch.nn.Module.__init__(other)
    state = {name: value for name, value in vars(module).items() if name not in vars(other)}
    vars(other).update(state)
    for name, tensor in parameters.items():
        other.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    for name, child in children.items():
        other.add_module(name, child)
    return other


def agrees(module: torch.nn.Module, x: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether module(x) is expected, in training too. A module that fails on x computes something else."""
    for module.training in (True, False):
        try:
            out = module(x)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
            return False
        if not isinstance(out, Tensor) or out.shape != expected.shape or out.dtype != expected.dtype:
            return False
        if not bool(((out - expected).abs() <= tolerance).all()):
            return False
    return True


def subclass(base: type, forward: Callable[..., Any], op: str) -> type:
    """A class of the same name, which hooks and wrapping policies of others may look for, with another forward."""
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "pykern_op": op})


# ---- root-mean-square norms


@cache
def rms_class(base: Any, eps_name: str, offset: float) -> type:
    """The class `base` whose forward is pykern.rms_norm with the weight offset + weight."""

    def forward(self: Any, x: Tensor) -> Any:
        weight = self.weight
        if weight.dtype != x.dtype:  # families differ in the dtype that comes out
            return base.forward(self, x)
        if offset:
            weight = offset + (weight if weight.dtype == torch.float64 else weight.float())
        return ops.rms_norm(x, weight, getattr(self, eps_name))

    return type(
        base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "pykern_op": "pykern.rms_norm"}
    )


@torch.no_grad()
def rms_replacement(module: torch.nn.Module) -> tuple[type | None, str]:
    """(class, op) when this module is x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight); else (None, why not)."""
    names = [name for name in EPSILONS if isinstance(getattr(module, name, None), float)]
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or len(names) != 1:
        return None, "is not a norm with one weight [D] and one epsilon"
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, generator=generator) for n in ((3, 8), (8,)))
    eps = getattr(module, names[0])
    for offset in (0.0, 1.0):
        trial = twin(module, {}, {"weight": weight})
        if all(  # epsilon does not matter in the first input, and does in the second
            agrees(trial, y, ops.rms_norm(y, offset + weight, eps), CLOSE)  # type: ignore[arg-type]
            for y in (x, x * eps**0.5)
        ):
            base: Any = type(module)
            return rms_class(base, names[0], offset), "pykern.rms_norm"
    return None, "computes something else than a root-mean-square norm"


# ---- MLPs


def mlp_names(module: torch.nn.Module) -> tuple[str | None, str, str] | None:
    """The names of the gate, up and down layers among the children, if they are an MLP's."""
    children = dict(module.named_children())
    for names in MLP_NAMES:
        if all(name is None or name in children for name in names):
            return names
    return None


@cache
def mlp_class(base: Any, names: tuple[str | None, str, str], activation: str) -> type:
    """The class `base` whose forward is pykern.mlp while layers are plain, of x's dtype, and dropouts do nothing."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate = getattr(self, names[0]) if names[0] else None
        up, down = getattr(self, names[1]), getattr(self, names[2])
        layers = [layer for layer in (gate, up, down) if layer is not None]
        dropouts = (child for child in self.children() if isinstance(child, torch.nn.Dropout))
        fused = all(plain(layer) for layer in layers) and not any(d.training and d.p > 0.0 for d in dropouts)
        if not torch.is_autocast_enabled(x.device.type):
            fused = fused and all(layer.weight.dtype == x.dtype for layer in layers)
        if not fused:
            return base.forward(self, x)
        return ops.mlp(
            *(x, up.weight, down.weight, up.bias, down.bias),
            gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
            activation=activation,
        )

    return subclass(base, forward, "pykern.mlp")


def small_linear(inputs: int, outputs: int, bias: bool, generator: torch.Generator) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, bias, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@torch.no_grad()
def mlp_replacement(module: torch.nn.Module, names: tuple[str | None, str, str]) -> tuple[type | None, str]:
    """(class, op) when this module is down(f(up(x))) or down(f(gate(x)) * up(x)); else (None, why not)."""
    children = dict(module.named_children())
    for name in names:
        if name is not None and not plain(children[name]):
            return None, f"its {name} is a {type(children[name]).__name__}, not a plain torch.nn.Linear"
    others = {name: child for name, child in children.items() if name not in names}
    odd = [name for name, child in others.items() if any(True for _ in child.parameters())]
    if odd or any(True for _ in module.parameters(recurse=False)):
        return None, f"has parts that an MLP has not: {', '.join(odd) or 'parameters of its own'}"
    generator = torch.Generator().manual_seed(0)
    sizes = {names[0]: (5, 7), names[1]: (5, 7), names[2]: (7, 5)}
    small: dict[str, Any] = {
        name: small_linear(*sizes[name], children[name].bias is not None, generator) for name in names if name
    }
    for name, child in others.items():
        small[name] = torch.nn.Dropout(0.0) if isinstance(child, torch.nn.Dropout) else child
    trial = twin(module, small, {})
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    gate, up, down = small.get(names[0] or ""), small[names[1]], small[names[2]]
    for activation in ACTIVATIONS:
        expected = ops.mlp(
            *(x, up.weight, down.weight, up.bias, down.bias),
            gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
            activation=activation,
        )
        if agrees(trial, x, expected, CLOSE_DOUBLE * float(expected.abs().max())):
            base: Any = type(module)
            return mlp_class(base, names, activation), f"pykern.mlp, {activation}"
    return None, f"computes something else than an MLP of {', '.join(ACTIVATIONS)}"
