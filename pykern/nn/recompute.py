"""Saving for backward how a tensor was made instead of the tensor itself, where making it again is cheap.

Autograd asks a hook what to keep of each tensor that an op saves (torch.autograd.graph.saved_tensors_hooks). For the
output of a norm the hook keeps the norm's input and weights, which the norm saves anyway; backward runs the norm again.
The norms give the same bits each time, so gradients do not change.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pykern import ops
from pykern.nn.norm import LayerNorm, RMSNorm

Tensors = Sequence[Tensor | None]
Recipe = tuple[Callable[..., Any], Tensors]  # y = function(*tensors)


class Hold(torch.autograd.Function):
    """A node that does nothing but save tensors, as any node does: their versions are checked when they are read back,
    and whoever has hooks of their own, such as torch.utils.checkpoint, is asked what to keep of them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: Tensors) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


def hold(*tensors: Tensor | None) -> Any:
    """A node whose saved_tensors are the tensors. It does not keep the graph that made them."""
    bare = [t if t is None or t.is_leaf else t.detach() for t in tensors]
    with torch.enable_grad():
        return Hold.apply(torch.empty(0, requires_grad=True), bare).grad_fn


def recipe(norm: torch.nn.Module, x: Tensor) -> Recipe | None:
    """How norm(x) is made, from the parameters as they are now. None for a module that may do more than its op."""
    if norm._forward_hooks or norm._forward_pre_hooks:
        return None
    if type(norm) is LayerNorm and norm.normalized_shape == x.shape[-1:]:
        return partial(ops.layer_norm, eps=norm.eps), (x, norm.weight, norm.bias)
    if type(norm) is RMSNorm and norm.normalized_shape == x.shape[-1:] and norm.eps is not None:
        return partial(ops.rms_norm, eps=norm.eps), (x, norm.weight)
    return None


@contextmanager
def saved_as(y: Tensor, how: Recipe) -> Iterator[None]:
    """In the body an op that saves y, or a view of it, for backward keeps the tensors of the recipe instead."""
    make, tensors = how
    kind, dtype = y.device.type, y.dtype
    autocast: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    # y outlives the body: nothing else can have its storage there
    storage, version = y.untyped_storage()._cdata, y._version

    def pack(t: Tensor) -> Any:
        is_y = t.untyped_storage()._cdata == storage and t.dtype == dtype and t._version == version
        hooks.__exit__()  # what becomes of the held tensors is up to the hooks outside
        try:
            return (hold(*tensors), t.size(), t.stride(), t.storage_offset()) if is_y else hold(t)
        finally:
            hooks.__enter__()

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, tuple):
            return packed.saved_tensors[0]
        node, *layout = packed
        with torch.no_grad(), torch.autocast(kind, **autocast):
            return make(*node.saved_tensors).as_strided(*layout)

    hooks = saved_tensors_hooks(pack, unpack)
    try:
        with hooks:
            yield
    finally:
        tensors = ()  # hooks and pack refer to each other: x would stay until the garbage is collected


def norm_into(norm: torch.nn.Module, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    """part(norm(x)), of which norm(x) is not kept for backward but made again there.

    It is kept as usual where that would save nothing or where norm does more than pykern's op: without gradients, for a
    norm with forward hooks or of another class, under torch.compile, which decides itself what it keeps.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return part(norm(x))
    how = recipe(norm, x)
    y = norm(x)
    if how is None or not y.requires_grad:  # a norm that needs no gradient does not save x
        return part(y)
    with saved_as(y, how):
        return part(y)
