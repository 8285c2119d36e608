"""How much memory is kept between a forward and a backward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def storage(x: Tensor) -> int:
    """Equal for tensors that share memory."""
    return x.untyped_storage()._cdata


def kept_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that forward() saves for the backward pass: whole storages, each once, without those of the tensors `own`.

    Weights cast to another dtype count, and so do inputs: they cannot be freed. What an op keeps outside
    save_for_backward is not seen: pykern.linear_cross_entropy's gradients, made in the forward pass.
    """
    left_out = {storage(x) for x in own}
    kept: dict[int, Tensor] = {}  # held, so that no storage is taken for another

    def pack(x: Tensor) -> Tensor:
        x = x.detach()
        kept[storage(x)] = x
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in left_out)


def activation_bytes(module: torch.nn.Module, *inputs: Any, **options: Any) -> int:
    """kept_bytes of module(*inputs, **options), the module's parameters and buffers left out."""
    return kept_bytes(lambda: module(*inputs, **options), [*module.parameters(), *module.buffers()])
