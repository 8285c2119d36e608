"""What torch.func needs of an op: its autograd.Function in the form that grad, vjp and vmap take.

torch.func wants forward and setup_context apart, which makes every call dearer. The ops keep the other form,
forward(ctx, ...): here it runs on a Recording, and what it saved is found again among inputs and outputs, by identity.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack, unwrap_if_dead


def in_transform() -> bool:
    """Whether eager code is inside torch.func.grad, vjp, jvp or vmap."""
    if torch.compiler.is_compiling() or (interpreter := peek_interpreter_stack()) is None:
        return False
    return interpreter.key() != TransformType.Functionalize


class Recording:
    """Stands for ctx in a forward(ctx, ...): remembers what is done to it."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs  # nobody knows yet
        self.saved: tuple[Tensor | None, ...] = ()
        self.constant: tuple[Tensor, ...] = ()
        self.materialize = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


def _places(tensors: tuple, among: tuple) -> list[int | None]:
    """The index of each tensor among others; None for None."""
    by_id = {id(x): i for i, x in enumerate(among) if isinstance(x, Tensor)}
    return [None if x is None else by_id[id(x)] for x in tensors]


class Notes:
    """What a Recording holds, without tensors: the places of what was saved among (*inputs, *outputs), and the rest."""

    def __init__(self, ctx: Recording, inputs: tuple, outputs: tuple) -> None:
        self.saved = _places(ctx.saved, (*inputs, *outputs))
        self.constant = _places(ctx.constant, outputs)
        self.materialize = ctx.materialize
        own = ("needs_input_grad", "saved", "constant", "materialize")
        self.attributes = {name: value for name, value in vars(ctx).items() if name not in own}

    def write(self, ctx: Any, inputs: tuple, outputs: tuple) -> None:
        among = (*inputs, *outputs)
        ctx.save_for_backward(*(None if i is None else among[i] for i in self.saved))
        ctx.mark_non_differentiable(*(outputs[i] for i in self.constant if i is not None))
        ctx.set_materialize_grads(self.materialize)
        for name, value in self.attributes.items():
            setattr(ctx, name, value)


class Ended:
    """ctx in a backward that may run when the transform is over, as vjp's does: saved tensors are wrapped no more."""

    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.saved_tensors = tuple(None if x is None else unwrap_if_dead(x) for x in ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def _row(x: Any, dim: Any, b: int) -> Any:
    return x.select(dim, b) if isinstance(x, Tensor) and dim is not None else x


class Refusal(torch.autograd.Function):
    """Refusal.apply(words, n, *tensors): copies of the first n, which depend on all; their derivative is an error."""

    @staticmethod
    def forward(words: str, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.words = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.words)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, words: str, n: int, *tensors: Tensor) -> Any:
        return Refusal.apply(words, n, *tensors), in_dims[2 : 2 + n]


def transformed(name: str, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """function for torch.func. Its results are a tuple, behind the op's own the Notes."""

    def forward(*args: Any) -> tuple:
        ctx = Recording(len(args))
        results = function.forward(ctx, *args)
        results = results if isinstance(results, tuple) else (results,)
        return *results, Notes(ctx, args, results)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        output[-1].write(ctx, inputs, output[:-1])

    def backward(ctx: Any, *grads: Tensor) -> Any:
        return function.backward(Ended(ctx), *grads[:-1])

    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError(f"pykern::{name} has no forward-mode derivative (torch.func.jvp, forward_ad)")

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
        """A loop, as torch's own for an op without a rule."""
        rows = [
            made.apply(*(_row(x, dim, b) for x, dim in zip(args, in_dims, strict=True))) for b in range(info.batch_size)
        ]
        results = tuple(torch.stack(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*rows, strict=True))
        return results, tuple(0 if isinstance(x, Tensor) else None for x in results)

    members: dict[str, Any] = dict(forward=forward, setup_context=setup_context, backward=backward, jvp=jvp, vmap=vmap)
    made: Any = type(function.__name__, (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})
    return made
