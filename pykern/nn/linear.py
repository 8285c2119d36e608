"""Linear layers, with the activation and the residual addition fused into the matrix product."""

import torch
from torch import Tensor

from pykern import ops

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid")


class Linear(torch.nn.Linear):
    """activation(x weight^T + bias) + residual for x [..., K], weight [N, K], bias [N], residual [..., N].

    activation: None, "relu", "gelu", "gelu_tanh", "silu" or "sigmoid".
    Dtypes and errors: pykern.linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        if activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"Linear: activation is {activation!r} but must be None or one of {', '.join(ACTIVATIONS)}"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, activation=self.activation, residual=residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def _untouched(layer: torch.nn.Module) -> bool:
    """Whether calling this layer does nothing but ops.linear: it was not replaced and nobody hooks into it."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer).forward is Linear.forward and "forward" not in vars(layer) and not any(hooks)


class MLP(torch.nn.Module):
    """c_proj(activation(c_fc(x))) + residual for x [..., width]; parameters have GPT-2's names.

    activation "swiglu" is c_proj(silu(c_gate(x)) * c_fc(x)); the others are those of Linear. One op, pykern.mlp, unless
    a layer has hooks (pruning, weight norm) or was replaced: then each layer is called.
    Dtypes, errors and source: pykern.mlp.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in (*ACTIVATIONS, "swiglu"):
            raise ValueError(f"MLP: activation is {activation!r} but must be one of {', '.join(ACTIVATIONS)}, swiglu")
        super().__init__()
        gated = activation == "swiglu"
        self.activation = activation
        self.c_gate = Linear(width, hidden, bias, device, dtype) if gated else None
        self.c_fc = Linear(width, hidden, bias, device, dtype, activation=None if gated else activation)
        self.c_proj = Linear(hidden, width, bias, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        up, gate, down = self.c_fc, self.c_gate, self.c_proj
        if not all(_untouched(layer) for layer in (up, gate, down) if layer is not None):
            out = down(up(x) if gate is None else ops.swiglu(gate(x), up(x)))
            return out if residual is None else out + residual
        return ops.mlp(
            *(x, up.weight, down.weight, up.bias, down.bias),
            gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
            activation=self.activation if gate is None else "silu",
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
