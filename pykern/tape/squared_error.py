"""Squared error between predictions and targets of one shape [..., D], one loss per row."""

import numpy as np

from . import inputs
from .cross_entropy import Loss


class SquaredError(Loss):
    """loss = ||a - y||^2 = sum((a - y)^2) for predictions y and targets a [..., n];  g_y = 2 g (y - a), g_a = -g_y.

    The sum is over the last dimension, `reduction` over the rows: "mean", "sum" or "none".
    """

    integer_inputs = ()

    def check(self, predictions: np.ndarray, targets: np.ndarray) -> None:
        inputs.floats("SquaredError", predictions=predictions, targets=targets)
        inputs.rank("SquaredError", "predictions", predictions, 1)
        if targets.shape != predictions.shape:
            raise ValueError(
                f"SquaredError: targets has shape {targets.shape}, expected that of predictions, {predictions.shape}"
            )

    def forward(self, predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        self.difference = predictions - targets
        losses = np.square(self.difference).sum(-1)
        return self.reduce(losses, losses.size)

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> tuple:
        g = self.row_gradients(out_gradient, self.difference.shape[:-1])[..., None]
        g_y = 2 * g * self.difference
        return g_y, -g_y
