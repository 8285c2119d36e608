"""Softmax over any one dimension (the kernel's is the last) and the logistic function."""

import torch
from torch import Tensor

from pykern import ops


class Sigmoid(torch.nn.Sigmoid):
    """1 / (1 + exp(-x)) for x [...]. Dtypes and errors: pykern.sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.sigmoid(x)


class Softmax(torch.nn.Softmax):
    """exp(x) / sum(exp(x)) over `dim` of x [...]; mask (bool, broadcastable to x, True = take part) leaves entries out.

    A row whose entries are all left out is 0. Unlike torch.nn.Softmax, `dim` is the last dimension unless said
    otherwise.
    Dtypes and errors: pykern.softmax.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__(dim)
        self.dim: int

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = torch.broadcast_to(mask, x.shape).transpose(self.dim, -1)
        return ops.softmax(x.transpose(self.dim, -1), mask).transpose(self.dim, -1)
