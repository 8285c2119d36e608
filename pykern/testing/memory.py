"""How much memory a module keeps between its forward and its backward pass."""

from typing import Any

import torch
from torch import Tensor


def storage(x: Tensor) -> int:
    """Equal for tensors that share memory."""
    return x.untyped_storage()._cdata


def activation_bytes(module: torch.nn.Module, *inputs: Any, **options: Any) -> int:
    """Bytes that module(*inputs, **options) keeps for backward: of each distinct storage, the module's own excepted.

    Inputs count when they are kept. What an op keeps outside save_for_backward is not seen.
    """
    own = {storage(x) for x in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        x = x.detach()
        kept[storage(x)] = x
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(*inputs, **options)
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
