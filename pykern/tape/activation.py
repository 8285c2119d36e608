"""Functions of one element: sigmoid, ReLU, SiLU, GELU."""

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module


class Activation(Module):
    """b = f(a), element by element;  g_a = g_b f'(a)."""

    kind: str

    def check(self, a: np.ndarray) -> None:
        inputs.floats(type(self).__name__, a=a)

    def forward(self, a: np.ndarray) -> np.ndarray:
        b = np.empty_like(a)
        _C.activation_forward(a, b, kind=self.kind)
        return b

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> np.ndarray:
        (a,) = in_tensors
        g_a = np.empty_like(a)
        _C.activation_backward(a, out_gradient, g_a, kind=self.kind)
        return g_a


class Sigmoid(Activation):
    """b = 1 / (1 + exp(-a)) for a [...];  g_a = g_b b (1 - b)."""

    kind = "sigmoid"


class ReLU(Activation):
    """b = max(a, 0) for a [...];  g_a = g_b where a > 0, else 0."""

    kind = "relu"


class SiLU(Activation):
    """b = a s with s = sigmoid(a) for a [...];  g_a = g_b s (1 + a (1 - s))."""

    kind = "silu"


class GELU(Activation):
    """b = a Phi(a) for a [...];  g_a = g_b (Phi(a) + a phi(a)), with the normal distribution Phi and its density phi.

    tanh=True: b = 0.5 a (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3))), as in GPT-2.
    """

    def __init__(self, *, tanh: bool = False):
        self.kind = "gelu_tanh" if tanh else "gelu"
