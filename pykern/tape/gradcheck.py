"""check_gradients: backward() against central differences, element by element, in float64.

For a fixed random g of the shape of the output, L = sum(g * output) is a number, and its derivative with respect to
one element x is about (L(x + h) - L(x - h)) / 2h, whatever backward() says.
"""

from typing import Any, NamedTuple

import numpy as np

from . import inputs
from .engine import Module, Network, Tensor, name, no_tape, tape, tape_bwd


class GradientError(AssertionError):
    """backward() and the difference quotient disagree."""


class Element(NamedTuple):
    """One element of one gradient: what backward() says and what the differences say."""

    name: str
    backward: float
    difference: float

    def __str__(self) -> str:
        return f"{self.name}: backward gives {self.backward:.8g}, the difference quotient {self.difference:.8g}"


def check_gradients(
    module: Module, *in_arrays: Any, step: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7, rng: Any = 0
) -> Element:
    """Compare the gradient of every element of every float input and parameter, and return the worst one.

    module: a Module or a Network. in_arrays: arrays or Tensors; integers and booleans have no gradient.
    An element is right when |backward - difference| <= atol + rtol |difference|; a wrong one raises GradientError.
    Parameters, their gradients and the tape are left as they were.
    Formula: (L(x + h) - L(x - h)) / 2h for every number of arrays [...] of float64. TypeError: float32. ValueError:
    nothing to check.
    """
    function = type(module).connect if isinstance(module, Network) else type(module).forward
    names = inputs.count(name(module), function, len(in_arrays))
    tensors = [Tensor(value.out_tensor if isinstance(value, Module) else value) for value in in_arrays]
    variables = {key: tensor for key, tensor in zip(names, tensors, strict=True) if tensor.out_tensor.dtype.kind == "f"}
    variables |= dict(module.named_parameters())
    for key, variable in variables.items():
        if variable.out_tensor.dtype != np.float64:
            raise TypeError(f"check_gradients: {key} is {variable.out_tensor.dtype}, expected float64")

    outer, before = tape[:], {key: variable.out_gradient for key, variable in variables.items()}
    tape.clear()
    elements = []
    try:
        g, gradients = backward_gradients(module, tensors, variables, np.random.default_rng(rng))
        for key, variable in variables.items():
            differences = difference_quotients(module, tensors, variable.out_tensor, g, step)
            for index in np.ndindex(differences.shape):
                label = f"{key}{list(index) or ''}"
                elements.append(Element(label, float(gradients[key][index]), float(differences[index])))
    finally:
        tape[:] = outer
        for key, variable in variables.items():
            variable.out_gradient = before[key]
    return judge(name(module), elements, rtol, atol)


def backward_gradients(
    module: Module, tensors: list[Tensor], variables: dict[str, Tensor], rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """g and the gradients of L by the tape. A second pass must double them: backward adds, it never overwrites."""
    for variable in variables.values():
        variable.out_gradient = None
    shape, dtype = output(module, tensors).shape, output(module, tensors).dtype
    if dtype != np.float64:
        raise TypeError(f"check_gradients: the output of {name(module)} is {dtype}, expected float64")
    g = rng.normal(size=shape)

    def run() -> dict[str, np.ndarray]:
        module.apply_fwd(*tensors).out_gradient = g
        tape_bwd()
        none = {key: np.zeros_like(variable.out_tensor) for key, variable in variables.items()}
        return none | {key: v.out_gradient.copy() for key, v in variables.items() if v.out_gradient is not None}

    once, twice = run(), run()
    for key in variables:
        if not np.allclose(twice[key], 2 * once[key], equal_nan=True):
            raise GradientError(f"{name(module)}: a second pass does not double the gradient of {key}; add it with +=")
    return g, once


def difference_quotients(
    module: Module, tensors: list[Tensor], values: np.ndarray, g: np.ndarray, step: float
) -> np.ndarray:
    """(L(x + h) - L(x - h)) / 2h for every element x of values, an array of module or tensors; h grows with |x|."""
    flat, quotients = values.reshape(-1), np.empty(values.size)
    for i, x in enumerate(flat.copy()):
        above, below = x + step * max(1.0, abs(x)), x - step * max(1.0, abs(x))
        try:
            flat[i] = above
            high = output(module, tensors)
            flat[i] = below
            low = output(module, tensors)
        finally:
            flat[i] = x
        quotients[i] = (g * (high - low)).sum() / (above - below)  # first the difference: what x leaves alone is 0
    return quotients.reshape(values.shape)


def output(module: Module, tensors: list[Tensor]) -> np.ndarray:
    with no_tape():
        return module.apply_fwd(*tensors).out_tensor.copy()


def judge(op: str, elements: list[Element], rtol: float, atol: float) -> Element:
    """The element that is worst for its tolerance, if it is within; NaN is worse than anything."""
    if not elements:
        raise ValueError(f"check_gradients: {op} has no float inputs and no parameters, there is nothing to check")
    backward, difference = np.array([element[1:] for element in elements], dtype=np.float64).T
    error = np.abs(backward - difference) / (atol + rtol * np.abs(difference))
    worst = elements[int(np.argmax(error))]  # argmax takes NaN for the largest
    wrong = np.count_nonzero(~(error <= 1))
    if wrong:
        raise GradientError(f"{op}: {wrong} of {len(elements)} gradient elements are wrong, the worst is {worst}")
    return worst
