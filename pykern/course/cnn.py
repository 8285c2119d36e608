"""A small convolutional network for the digits, in torch: two 3x3 convolutions with max pooling, and a softmax head.

images [N, 8, 8] -> conv 16 -> ReLU -> pool [4, 4] -> conv 32 -> ReLU -> pool [2, 2] -> Linear -> logits [N, 10]
"""

import numpy as np
import torch
from torch import nn


class DigitsCNN(nn.Module):
    """images [N, 8, 8] in 0 .. 1 to logits [N, 10]."""

    def __init__(self, *, channels: tuple[int, int] = (16, 32), n_classes: int = 10) -> None:
        super().__init__()
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(4 * second, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 3 or images.shape[1:] != (8, 8):
            raise ValueError(f"DigitsCNN: images has shape {tuple(images.shape)}, expected [N, 8, 8]")
        return self.head(self.features(images[:, None]).flatten(1))


def train_cnn(
    images: np.ndarray, labels: np.ndarray, *, steps: int, batch_size: int, lr: float, seed: int
) -> DigitsCNN:
    """A DigitsCNN after `steps` AdamW steps in float32 on images [N, 64] and labels [N]; torch's own seed is kept.

    FloatingPointError for a loss that is not finite.
    """
    from pykern.tape.autoencoder import batches

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsCNN()
    x, y = torch.from_numpy(images).float().unflatten(1, (8, 8)), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    for step, rows in enumerate(batches(len(x), batch_size, steps, np.random.default_rng(seed))):
        loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
        if not torch.isfinite(loss):
            raise FloatingPointError(f"train_cnn: the loss of step {step + 1} is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def predict(network: DigitsCNN, images: np.ndarray) -> np.ndarray:
    """The most likely class of each row of images [N, 64]: int64 [N]."""
    return network(torch.from_numpy(images).float().unflatten(1, (8, 8))).argmax(1).numpy()
