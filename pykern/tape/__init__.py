"""Reverse-mode differentiation on numpy: modules with forward() and backward(), a tape, compiled kernels inside.

>>> from pykern.tape import Sigmoid, Sum, Tensor, tape_bwd
>>> x = Tensor([[1.0, 2.0]])
>>> y = Sum().apply_fwd(Sigmoid().apply_fwd(x))
>>> tape_bwd()
>>> x.out_gradient.round(4)  # dy/dx = y (1 - y) for each number
array([[0.1966, 0.105 ]])
"""

from .activation import GELU, ReLU, Sigmoid, SiLU
from .adamw import SGD, AdamW
from .arithmetic import Add, MergeHeads, Mul, Reshape, Scale, SplitHeads, Sum, Transpose
from .attention import Attention
from .autoencoder import Autoencoder, Classifier, Encoder, fit, pretrain_autoencoders, pretrain_supervised
from .cross_entropy import CrossEntropy, SoftmaxCrossEntropy
from .embedding import Embedding
from .engine import Module, Network, Parameter, Tensor, no_tape, tape, tape_bwd
from .gradcheck import GradientError, check_gradients
from .graph import applications, graph_svg, record_backward
from .linear import Linear
from .models import NeuralNetwork, TransformerBlock, TransformerLM
from .norm import LayerNorm, RMSNorm
from .softmax import Softmax
from .squared_error import SquaredError

__all__ = [
    "GELU",
    "SGD",
    "AdamW",
    "Add",
    "Attention",
    "Autoencoder",
    "Classifier",
    "CrossEntropy",
    "Embedding",
    "Encoder",
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
    "SquaredError",
    "Sum",
    "Tensor",
    "TransformerBlock",
    "TransformerLM",
    "Transpose",
    "applications",
    "check_gradients",
    "fit",
    "graph_svg",
    "no_tape",
    "pretrain_autoencoders",
    "pretrain_supervised",
    "record_backward",
    "tape",
    "tape_bwd",
]
