"""Reverse-mode differentiation on numpy: modules with forward() and backward(), a tape, compiled kernels inside.

from pykern.tape import Linear, Sigmoid, Tensor, tape_bwd

x = Tensor([[1.0, 2.0]])
y = Sigmoid().apply_fwd(Linear(2, 1).apply_fwd(x))
tape_bwd()
x.out_gradient        # dy/dx
"""

from .activation import GELU, ReLU, Sigmoid, SiLU
from .adamw import SGD, AdamW
from .arithmetic import Add, MergeHeads, Mul, Reshape, Scale, SplitHeads, Sum, Transpose
from .attention import Attention
from .cross_entropy import CrossEntropy, SoftmaxCrossEntropy
from .embedding import Embedding
from .engine import Module, Network, Parameter, Tensor, no_tape, tape, tape_bwd
from .gradcheck import GradientError, check_gradients
from .linear import Linear
from .models import NeuralNetwork, TransformerBlock, TransformerLM
from .norm import LayerNorm, RMSNorm
from .softmax import Softmax

__all__ = [
    "GELU",
    "SGD",
    "AdamW",
    "Add",
    "Attention",
    "CrossEntropy",
    "Embedding",
    "GradientError",
    "LayerNorm",
    "Linear",
    "MergeHeads",
    "Module",
    "Mul",
    "Network",
    "NeuralNetwork",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Reshape",
    "Scale",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SoftmaxCrossEntropy",
    "SplitHeads",
    "Sum",
    "Tensor",
    "TransformerBlock",
    "TransformerLM",
    "Transpose",
    "check_gradients",
    "no_tape",
    "tape",
    "tape_bwd",
]
