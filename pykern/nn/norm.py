"""Layer and root-mean-square normalisation, with the residual addition fused in.

With a residual, forward returns (norm(x + residual), x + residual): the pre-norm block needs both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pykern import ops

Normed = Tensor | tuple[Tensor, ...]


def flat_norm(norm: Callable[..., Normed], x: Tensor, shape: tuple[int, ...], residual: Tensor | None) -> Normed:
    """Applies a norm of the last dimension to the last len(shape) dimensions of x, whose sizes must be `shape`."""
    n = len(shape)
    if tuple(x.shape[x.dim() - n :]) != tuple(shape):
        raise ValueError(f"norm: x has shape {tuple(x.shape)} but its last dimensions must be {tuple(shape)}")
    out = norm(x.flatten(-n), residual=None if residual is None else residual.flatten(-n))
    if n == 1:
        return out
    return tuple(part.view_as(x) for part in out) if isinstance(out, tuple) else out.view_as(x)


class LayerNorm(torch.nn.LayerNorm):
    """(h - mean(h)) / sqrt(var(h) + eps) * weight + bias, h = x + residual, over the last dimensions.

    Dtypes and errors: pykern.layer_norm. ValueError where the last dimensions of x [..., *normalized_shape] differ.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:  # type: ignore[override]
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()

        def norm(h: Tensor, residual: Tensor | None) -> Normed:
            return ops.layer_norm(h, weight, bias, self.eps, residual=residual)

        return flat_norm(norm, x, self.normalized_shape, residual)


class RMSNorm(torch.nn.RMSNorm):
    """h / sqrt(mean(h^2) + eps) * weight, h = x + residual, over the last dimensions `normalized_shape`.

    eps None, the default as in torch, is the machine epsilon of x's dtype.
    Dtypes and errors: pykern.rms_norm and pykern.layer_norm. ValueError where the last dimensions of x
    [..., *normalized_shape] differ.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:  # type: ignore[override]
        weight = None if self.weight is None else self.weight.flatten()
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps

        def norm(h: Tensor, residual: Tensor | None) -> Normed:
            return ops.rms_norm(h, weight, eps, residual=residual)

        return flat_norm(norm, x, self.normalized_shape, residual)
