"""The loss of a classifier, from logits or fused with the linear layer that makes them."""

import torch
from torch import Tensor

from pykern import ops
from pykern.nn.linear import Linear


def check_options(name: str, weight: Tensor | None, reduction: str) -> None:
    if weight is not None:
        raise ValueError(f"{name}: class weights are not supported")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{name}: reduction is {reduction!r} but must be none, mean or sum")


class CrossEntropyLoss(torch.nn.Module):
    """-log softmax(logits)[target] for logits [V], [M, V] or [M, V, d1, ...] and target [], [M] or [M, d1, ...] int64.

    z_loss adds z_loss * logsumexp(logits)^2. A target equal to ignore_index counts for nothing.
    Dtypes and errors: pykern.cross_entropy. ValueError: class weights, shapes.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        check_options("CrossEntropyLoss", weight, reduction)
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        classes_last = logits.movedim(1, -1) if logits.dim() > 2 else logits
        if classes_last.shape[:-1] != target.shape:
            raise ValueError(
                f"CrossEntropyLoss: target has shape {tuple(target.shape)} but logits {tuple(logits.shape)}"
                f" need {tuple(classes_last.shape[:-1])}"
            )
        loss = ops.cross_entropy(
            classes_last.reshape(-1, classes_last.shape[-1]),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """CrossEntropyLoss of linear(x) for x [..., K], target [...] int64, without all logits existing at once.

    Dtypes, errors and formula: pykern.linear_cross_entropy and pykern.cross_entropy.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        check_options("LinearCrossEntropyLoss", weight, reduction)
        super().__init__()
        self.linear = Linear(in_features, num_classes, bias, device, dtype)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if x.shape[:-1] != target.shape:
            raise ValueError(
                f"LinearCrossEntropyLoss: target has shape {tuple(target.shape)} but x {tuple(x.shape)}"
                f" needs {tuple(x.shape[:-1])}"
            )
        loss = ops.linear_cross_entropy(
            x.reshape(-1, x.shape[-1]),
            self.linear.weight,
            target.reshape(-1),
            bias=self.linear.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"
        )
