"""Rows of a table picked by integer ids, differentiable."""

import torch
from torch import Tensor

from pykern.ops._library import _C, define, differentiable, empty_packed, require_tensors, unit_last


def _empty(weight, ids):
    return weight.new_empty((*ids.shape, weight.shape[-1]))


def _forward(weight, ids):
    weight = unit_last(weight)
    out = _empty(weight, ids)
    _C.embedding_forward(weight, ids, out)
    return out


def _empty_grad(ids, dout, rows):
    return dout.new_empty((rows, dout.shape[-1]))


def _backward(ids, dout, rows):
    dout = unit_last(dout)
    dweight = empty_packed(dout, (rows, dout.shape[-1]))
    _C.embedding_backward(ids, dout, dweight)
    return dweight


_embedding = define("embedding(Tensor weight, Tensor ids) -> Tensor", _forward, _empty)
_embedding_grad = define("embedding_backward(Tensor ids, Tensor dout, SymInt rows) -> Tensor", _backward, _empty_grad)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return _embedding.below_autograd(weight, ids)

    @staticmethod
    def backward(ctx, dout):
        (ids,) = ctx.saved_tensors
        return _embedding_grad(ids, dout, ctx.rows), None


differentiable(_embedding, _Embedding)


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids]: for weight [V, D] and ids [...] the rows [..., D].

    weight is float32, float64, bfloat16 or float16, ids int64 or int32 of any shape. The gradient [V, D] adds the rows
    of a token in the order of their places, in float32 or wider; tokens that do not occur get 0.
    TypeError: not tensors, other dtypes. ValueError: weight is not [V, D]. IndexError: an id outside 0..V-1.
    """
    require_tensors("embedding", weight=weight, ids=ids)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must be [V, D], got shape {list(weight.shape)}")
    return _embedding(weight, ids)
