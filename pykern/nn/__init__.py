"""Torch modules on pykern's kernels. One with a torch.nn twin takes the twin's arguments and state dict."""

from pykern.nn.activation import Sigmoid, Softmax
from pykern.nn.attention import MultiheadAttention
from pykern.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from pykern.nn.embedding import Embedding
from pykern.nn.linear import MLP, Linear
from pykern.nn.norm import LayerNorm, RMSNorm
from pykern.nn.positions import ALiBi, RelativePositionBias
from pykern.nn.transformer import SelfAttention, TransformerBlock

__all__ = [
    "MLP",
    "ALiBi",
    "CrossEntropyLoss",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RelativePositionBias",
    "SelfAttention",
    "Sigmoid",
    "Softmax",
    "TransformerBlock",
]
