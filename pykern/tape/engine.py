"""Reverse-mode differentiation with modules and a tape.

    forward    b = f(a)                apply_fwd computes b and pushes what it did on the tape
    backward   g_a += (db/da)^T g_b    tape_bwd pops, newest first, and adds into the gradients of the inputs

One module may be applied many times: apply_fwd works on a shallow copy of the module and returns it. The copy, called
an application, shares the parameters and has its own inputs, output, gradient and whatever forward() stored on self.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import inputs

tape: list["Module"] = []  # every application since the last tape_bwd, oldest first


class Module:
    """A function with parameters: subclasses write forward and backward, and check() when their input can be wrong.

    forward(*in_tensors)                            returns out_tensor
    backward(in_tensors, out_tensor, out_gradient)  returns the gradient of each input, None for one that has none,
                                                    and adds into the .grad of the module's own parameters
    Formula: g_a = (db/da)^T g_b for b = f(a). Tensors are numpy arrays [...] of float64, or of float32 where every
    input is; ids and labels are int64. TypeError, ValueError or IndexError for inputs that check() refuses: nothing is
    pushed then.
    """

    integer_inputs: tuple[str, ...] = ()  # the arguments of forward that may be integers; others become float64
    latest: "Module | None" = None  # the latest application; an application has none and speaks for itself

    # what an application has of its own; place is its index on the tape
    in_names: list[str]
    in_modules: tuple["Module", ...]
    in_tensors: tuple[np.ndarray, ...]
    place: int
    _out_tensor: np.ndarray
    _out_gradient: np.ndarray | None

    def apply_fwd(self, *in_modules: Any) -> "Module":
        """Compute out_tensor from the out_tensor of each input, push the application on the tape and return it.

        An input is a Tensor, a Parameter, an application, a module (its latest application) or a numpy array.
        """
        node = copy.copy(self)
        vars(node).pop("latest", None)
        node.take_inputs(in_modules)
        node._out_tensor = inputs.as_output(name(self), node.forward(*node.in_tensors))
        node._out_gradient = None
        node.place = len(tape)
        tape.append(node)
        if not self.is_application:
            self.latest = node
        return node

    def apply_bwd(self) -> None:
        """Add the gradient of each input into its out_gradient; a scalar whose own gradient is not set has 1."""
        node = self.application
        gradients = node.backward(node.in_tensors, node.out_tensor, node.seed())
        shapes = [tensor.shape for tensor in node.in_tensors]
        gradients = inputs.as_gradients(name(self), gradients, node.in_names, shapes)
        for module, gradient in zip(node.in_modules, gradients, strict=True):
            if gradient is not None:
                module.receive(gradient)

    def forward(self, *in_tensors: np.ndarray) -> np.ndarray:
        raise NotImplementedError(f"{name(self)}: forward(*in_tensors) is not written")

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> Any:
        raise NotImplementedError(f"{name(self)}: backward(in_tensors, out_tensor, out_gradient) is not written")

    def check(self, *in_tensors: np.ndarray) -> None:
        """Raise TypeError, ValueError or IndexError when forward cannot take these inputs."""

    def __call__(self, *in_modules: Any) -> "Module":
        return self.apply_fwd(*in_modules)

    def __repr__(self) -> str:
        node = self if self.is_application else self.latest
        return f"<{name(self)}>" if node is None else f"<{name(self)} {list(node.out_tensor.shape)}>"

    # ---- the application: where the tensors of a module are

    def take_inputs(self, in_modules: tuple) -> None:
        """Set in_names, in_modules and in_tensors, or refuse the inputs."""
        self.in_names = inputs.count(name(self), type(self).forward, len(in_modules))
        self.in_modules = as_nodes(name(self), self.in_names, in_modules)
        self.in_tensors = tuple(
            module.out_tensor if argument in self.integer_inputs else inputs.as_number(module.out_tensor)
            for argument, module in zip(self.in_names, self.in_modules, strict=True)
        )
        inputs.one_dtype(name(self), [*zip(self.in_names, self.in_tensors, strict=True), *self.own_parameters()])
        self.check(*self.in_tensors)

    @property
    def is_application(self) -> bool:
        return "_out_tensor" in vars(self)

    @property
    def application(self) -> "Module":
        """The latest application of this module; an application is its own."""
        if self.is_application:
            return self
        if self.latest is None:
            raise ValueError(f"{name(self)}: not applied yet, so it has no out_tensor; call apply_fwd first")
        return self.latest

    @property
    def on_tape(self) -> bool:
        """Whether the next tape_bwd passes here, so that a gradient which arrives is sent on."""
        place = self.application.place
        return place < len(tape) and tape[place] is self.application

    @property
    def out_tensor(self) -> np.ndarray:
        return self.application._out_tensor

    @property
    def out_gradient(self) -> np.ndarray | None:
        """d loss / d out_tensor; None until one arrives. Assign it to say where the backward pass starts."""
        return self.application._out_gradient

    @out_gradient.setter
    def out_gradient(self, gradient: Any) -> None:
        node = self.application
        if gradient is not None and gradient is not node._out_gradient:  # it is after out_gradient += ...
            gradient = np.array(gradient, node.out_tensor.dtype, order="C")
            if gradient.shape != node.out_tensor.shape:
                raise ValueError(
                    f"{name(self)}: out_gradient has shape {gradient.shape}, out_tensor has {node.out_tensor.shape}"
                )
        node._out_gradient = gradient

    def receive(self, gradient: np.ndarray) -> None:
        """Add into out_gradient; always a fresh array, because one gradient may go to several inputs."""
        node = self.application
        if node._out_gradient is not None:
            gradient = node._out_gradient + gradient
        is_float = node.out_tensor.dtype.kind == "f"
        node._out_gradient = np.array(gradient, node.out_tensor.dtype if is_float else np.float64, order="C")

    def seed(self) -> np.ndarray:
        """out_gradient, which is 1 for a scalar that has none yet: d loss / d loss."""
        node = self.application
        if node._out_gradient is None:
            if node.out_tensor.size != 1:
                raise ValueError(
                    f"{name(self)}: out_gradient is not set, and only a scalar has the default 1; "
                    f"out_tensor has shape {node.out_tensor.shape}"
                )
            node._out_gradient = np.ones_like(node.out_tensor)
        return node._out_gradient

    # ---- parameters

    def own_parameters(self) -> list[tuple[str, np.ndarray]]:
        return [(key, child.value) for key, child in vars(self).items() if isinstance(child, Parameter)]

    def named_parameters(self) -> Iterator[tuple[str, "Parameter"]]:
        """("linear.weight", parameter) of this module and the modules in its attributes; a shared one comes once."""
        seen, waiting = set(), [("", self)]
        while waiting:
            path, value = waiting.pop()
            if id(value) in seen:
                continue
            if isinstance(value, Parameter):
                yield path, value
            elif isinstance(value, (Module, list, tuple, dict)):
                waiting += reversed([(f"{path}.{key}".lstrip("."), child) for key, child in children(value)])
            else:
                continue
            seen.add(id(value))

    def parameters(self) -> list["Parameter"]:
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters; they add up until this is called."""
        for parameter in self.parameters():
            parameter.out_gradient = None


class Tensor(Module):
    """A leaf of the graph: a copy of an array [...] of floats, integers or booleans.

    Floats are float64, unless dtype says float32. Its out_gradient adds up over backward passes, like that of a
    parameter, until zero_grad().
    """

    def __init__(self, array: Any, *, dtype: Any = None):
        self._out_tensor = inputs.as_array(name(self), "array", array, dtype)
        self._out_gradient = None

    @property
    def on_tape(self) -> bool:
        return True  # a leaf keeps its gradient: nothing has to pass it on

    def zero_grad(self) -> None:
        self.out_gradient = None


class Parameter(Tensor):
    """A tensor [...] to be learnt: .value and .grad are its out_tensor and out_gradient, and .grad starts as zeros."""

    def __init__(self, value: Any, *, dtype: Any = None):
        super().__init__(value, dtype=np.float64 if dtype is None else dtype)

    @property
    def value(self) -> np.ndarray:
        return self._out_tensor

    @value.setter
    def value(self, value: Any) -> None:
        if value is not self._out_tensor:  # it is after value -= ...
            array = inputs.as_array("Parameter", "value", value, self.value.dtype)
            if array.shape != self.value.shape:
                raise ValueError(f"Parameter: value has shape {array.shape}, expected {self.value.shape}")
            self._out_tensor = array

    @property
    def grad(self) -> np.ndarray:
        if self._out_gradient is None:
            self._out_gradient = np.zeros_like(self.value)
        return self._out_gradient

    @grad.setter
    def grad(self, gradient: Any) -> None:
        self.out_gradient = gradient


class Network(Module):
    """Modules wired together: subclasses write connect(*in_modules), which returns the last application."""

    def apply_fwd(self, *in_modules: Any) -> Module:
        names = inputs.count(name(self), type(self).connect, len(in_modules))
        self.latest = self.connect(*as_nodes(name(self), names, in_modules))
        return self.latest

    def apply_bwd(self) -> None:
        raise ValueError(f"{name(self)}: a network is many applications on the tape; call tape_bwd()")

    def connect(self, *in_modules: Module) -> Module:
        raise NotImplementedError(f"{name(self)}: connect(*in_modules) is not written")


def tape_bwd() -> None:
    """Pop every application, newest first, and send its gradient to its inputs; the tape is empty afterwards.

    The pass starts where out_gradient was set. When it was set nowhere, the newest output must be a scalar and gets 1.
    Applications that the loss does not depend on are dropped.
    Formula: g_a += (db/da)^T g_b for each input a of each application b. ValueError: no scalar to begin with.
    """
    if tape and all(node.out_gradient is None for node in tape):
        tape[-1].seed()
    try:
        while tape:
            node = tape.pop()
            if node.out_gradient is not None:
                node.apply_bwd()
    finally:
        tape.clear()  # after an error half a pass is worth nothing


@contextmanager
def no_tape() -> Iterator[None]:
    """Forget what is applied inside: for evaluation and sampling, where no backward pass will come."""
    length = len(tape)
    try:
        yield
    finally:
        del tape[length:]


def name(module: Module) -> str:
    return type(module).__name__


def as_nodes(op: str, names: list[str], in_modules: tuple) -> tuple[Module, ...]:
    """Each input as a leaf or an application: something whose out_tensor no later application can change."""
    nodes = []
    for argument, value in zip(names, in_modules, strict=True):
        if isinstance(value, np.ndarray):
            value = Tensor(value)
        if not isinstance(value, Module):
            raise TypeError(
                f"{op}: {argument} is {inputs.describe(value)}, expected a Tensor, a module or a numpy array"
            )
        if not value.on_tape:
            raise ValueError(
                f"{op}: {argument} ({name(value)}) has left the tape, its gradient would be lost; "
                "apply it again, or pass a Tensor of its out_tensor for a constant"
            )
        nodes.append(value.application)
    return tuple(nodes)


def children(value: Any) -> list[tuple[str, Any]]:
    """The attributes or elements in which parameters are looked for; a module does not own its neighbours."""
    if isinstance(value, Module):
        return [(key, child) for key, child in vars(value).items() if key not in ("latest", "in_modules", "in_tensors")]
    if isinstance(value, dict):
        return [(str(key), child) for key, child in value.items()]
    return [(str(key), child) for key, child in enumerate(value)]
