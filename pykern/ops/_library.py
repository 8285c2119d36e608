"""How an op is registered with torch: a schema, a kernel per device, a fake, and a rule for autograd.

`define(schema, kernel, fake)` makes torch.ops.pykern.<name> and the Operator that calls it;
`differentiable(op, function)` puts an autograd.Function in front of it, used only when some input requires grad. The
function's forward calls `op.below_autograd(...)`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.dlpack import from_dlpack

from pykern.config import _C as _C  # with the ImportError that explains a missing extension
from pykern.config import allows_tf32 as allows_tf32
from pykern.ops._transforms import Refusal, in_transform, transformed

_library = torch.library.Library("pykern", "DEF")
below_autograd_guard = torch._C._AutoDispatchBelowAutograd


# Asking isinstance(x, Tensor) of each takes longer than most kernels' checks: torch answers it in Python.
_NOT_TENSORS = frozenset((type(None), bool, int, float, str, list, tuple))


def is_plain(args: Sequence) -> bool:
    """Whether torch's dispatcher would do nothing with these arguments but call autograd and then the kernel.

    So it is in eager code, for plain tensors and parameters, while nobody records, traces or transforms.
    """
    if torch.compiler.is_compiling():
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if not (x.is_cpu or x.is_cuda) or x.is_neg():
                return False
        elif kind not in _NOT_TENSORS and isinstance(x, Tensor):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def wants_grad(args: Sequence) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in args:
        kind = type(x)
        tensor = kind is Tensor or kind is Parameter or (kind not in _NOT_TENSORS and isinstance(x, Tensor))
        if tensor and x.requires_grad:
            return True
    return False


class Operator:
    """Calls torch.ops.pykern.<name>, or, for plain arguments, what that would call in the end.

    The dispatcher's way back to Python, twice where there is a gradient, takes as long as a small kernel.
    The kernel may return None for a tensor that is not wanted, torch.ops then returns an empty one.
    """

    def __init__(self, name: str, kernel: Callable):
        self.name, self.kernel = name, kernel
        self.dispatched = getattr(torch.ops.pykern, name).default
        self.function: type[torch.autograd.Function] | None = None  # what records it for autograd
        self.transformed: type[torch.autograd.Function] | None = None  # and in torch.func.grad, vjp, vmap

    def __call__(self, *args):
        if not is_plain(args):
            if self.transformed is not None and in_transform():
                *results, _ = self.transformed.apply(*args)
                return _without_none(tuple(results), args) if len(results) > 1 else results[0]
            return self.dispatched(*args)
        if self.function is not None and wants_grad(args):
            return self.function.apply(*args)
        return self.kernel(*args)

    def below_autograd(self, *args):
        """Calls the kernel without recording it."""
        if is_plain(args):
            return self.kernel(*args)
        with below_autograd_guard():
            return self.dispatched(*args)


def _without_none(results, args: Sequence):
    """The results of an op as torch.ops returns them: an empty tensor for None."""
    if not isinstance(results, tuple) or all(x is not None for x in results):
        return results
    like = next(x for x in args if isinstance(x, Tensor))
    return tuple(like.new_empty(0) if x is None else x for x in results)


operators: dict[str, Operator] = {}


def given(*tensors: Tensor | None) -> list[Tensor]:
    """Those that are not None."""
    return [t for t in tensors if t is not None]


def define(schema: str, kernel: Callable, fake: Callable) -> Operator:
    """Registers an operator for CPU and CUDA (the kernel dispatches on the tensor's device) and returns it."""
    name = schema.split("(")[0]

    def without_none(*args, **options):
        return _without_none(kernel(*args, **options), args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, without_none, device)
    torch.library.register_fake(f"pykern::{name}", fake, lib=_library)
    operators[name] = Operator(name, kernel)
    return operators[name]


def _differentiable_once(refusal: str, backward):
    """backward, whose results raise a RuntimeError when they are differentiated in turn: never a silently cut graph."""

    def once(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # the usual case: no create_graph=True
            return results
        results = results if isinstance(results, tuple) else (results,)
        if in_transform():
            made = given(*results)
            copies = iter(Refusal.apply(refusal, len(made), *made, *given(*ctx.saved_tensors, *grads)))
            return tuple(None if x is None else next(copies) for x in results)
        refuse = torch._C._functions.DelayedError(refusal, len(results))
        return refuse(*(None if x is None else x.detach().requires_grad_() for x in results))

    return staticmethod(once)


def refuse_tangents(name: str, args: Sequence) -> None:
    """NotImplementedError in forward mode: the tangent would be dropped, and taken for zero."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(f"pykern::{name} has no forward-mode derivative (torch.func.jvp, forward_ad)")


def differentiable(
    op: Operator, function: type[torch.autograd.Function], *, twice: bool = False, refusal: str | None = None
) -> None:
    """Routes calls that need a gradient through function.apply, all others straight to the kernel.

    Results of function.backward are not differentiable, a RuntimeError with the words of refusal says so; unless twice:
    what it calls is.
    """
    if not twice:
        refusal = refusal or f"pykern::{op.name} has no second derivative"
        function.backward = _differentiable_once(refusal, function.backward)  # type: ignore[method-assign]
    op.function = function
    op.transformed = transformed(op.name, function)

    def with_autograd(*args):
        refuse_tangents(op.name, args)
        if wants_grad(args):
            if peek_interpreter_stack() is not None:
                raise NotImplementedError(
                    f"pykern::{op.name}: torch.func.grad and vjp take pykern's functions in eager code, neither "
                    "torch.ops.pykern nor torch.compile around them"
                )
            return _without_none(function.apply(*args), args)
        with below_autograd_guard():
            return op.dispatched(*args)

    _library.impl(op.name, with_autograd, "Autograd")


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

    Fresh memory costs a page fault every 4 KiB, and clearing it takes longer than many kernels. A large CPU result's
    memory is therefore kept for the next one when it is freed (csrc/core/memory.h).
    """
    shape, dtype = x.shape if shape is None else shape, dtype or x.dtype
    if x.device.type == "cpu" and type(x) in (Tensor, Parameter) and math.prod(shape) * dtype.itemsize > _LARGE:
        return from_dlpack(_C.large_result(list(shape), str(dtype).removeprefix("torch.")))
    return x.new_empty(shape, dtype=dtype)


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
