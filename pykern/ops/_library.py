"""How an op is registered with torch: a schema, a kernel per device, a fake, and a rule for autograd.

`define(schema, kernel, fake)` makes torch.ops.pykern.<name>; `differentiable(op, function)` puts an autograd.Function
in front of it, used only when some input requires grad. The function's forward calls `below_autograd(op, ...)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pykern.config import _C as _C  # with the ImportError that explains a missing extension

_library = torch.library.Library("pykern", "DEF")
below_autograd_guard = torch._C._AutoDispatchBelowAutograd


def define(schema: str, kernel, fake):
    """Registers an operator for CPU and CUDA (the kernel dispatches on the tensor's device) and returns it."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"pykern::{name}", fake, lib=_library)
    return getattr(torch.ops.pykern, name).default


def below_autograd(op, *args):
    """Calls the op's kernel without recording it."""
    with below_autograd_guard():
        return op(*args)


def _differentiable_once(refusal: str, backward):
    """backward, whose results raise a RuntimeError when they are differentiated in turn: never a silently cut graph."""

    def once(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # the usual case: no create_graph=True
            return results
        results = results if isinstance(results, tuple) else (results,)
        refuse = torch._C._functions.DelayedError(refusal, len(results))
        return refuse(*(None if x is None else x.detach().requires_grad_() for x in results))

    return staticmethod(once)


def differentiable(
    op, function: type[torch.autograd.Function], *, twice: bool = False, refusal: str | None = None
) -> None:
    """Routes calls that need a gradient through function.apply, all others straight to the kernel.

    Results of function.backward are not differentiable, a RuntimeError with the words of refusal says so; unless twice:
    what it calls is.
    """
    name = op.name().split(".")[0]
    if not twice:
        refusal = refusal or f"{name} has no second derivative"
        function.backward = _differentiable_once(refusal, function.backward)  # type: ignore[method-assign]

    def with_autograd(*args):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with below_autograd_guard():
            return op(*args)

    _library.impl(name.split("::")[1], with_autograd, "Autograd")


def passes_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether torch would do nothing but call the kernel: plain tensors, and nobody who records, traces or transforms.

    A kernel that is then called by itself saves the dispatcher's 10 us, as much as a small call takes.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor or (grad and tensor.requires_grad) or tensor.is_neg():
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
    )


def require_tensors(op: str, **tensors: Tensor) -> None:
    """TypeError unless every argument is a dense torch.Tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind.removeprefix('torch.')} one")


def optional_tensors(op: str, **tensors: Tensor | None) -> None:
    """As require_tensors, but None passes."""
    require_tensors(op, **{name: tensor for name, tensor in tensors.items() if tensor is not None})


def unit_last(x: Tensor) -> Tensor:
    """x itself when its last stride is 1, else a contiguous copy: kernels read any strides but the last."""
    return x if x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


_LARGE = 4 << 20  # bytes: two huge pages


def empty_packed(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on x's device, of x's shape and dtype unless given; large: on huge pages.

    Fresh memory costs a page fault every 4 KiB, which takes longer than many kernels; huge pages take 512 times fewer.
    """
    out = x.new_empty(x.shape if shape is None else shape, dtype=dtype)
    if out.nbytes > _LARGE and out.device.type == "cpu" and type(out) is Tensor:
        _C.huge_pages(out)
    return out


def autocast(op: str, *tensors: Tensor | None) -> tuple:
    """Under torch.autocast, floating tensors in the autocast dtype; otherwise unchanged."""
    present = next(t for t in tensors if t is not None)
    kind = present.device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def mixed_autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """Under torch.autocast x in the autocast dtype, the others in it or in float32; float64 and otherwise unchanged.

    The kernels round a float32 weight while they read it and write its gradient in float32: no copies.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    stay = (dtype, torch.float32, torch.float64)

    def cast(t: Tensor | None, stay: tuple[torch.dtype, ...]):
        return t if t is None or not t.is_floating_point() or t.dtype in stay else t.to(dtype)

    return cast(x, (dtype, torch.float64)), *(cast(t, stay) for t in others)
