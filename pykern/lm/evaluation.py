"""How well a model predicts a text: nats per token and bits per byte, the latter comparable between tokenizers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pykern.lm.batches import validation_batches
from pykern.lm.tokenizer import Tokenizer


class Sized(Protocol):
    @property
    def block_size(self) -> int: ...


class LanguageModel(Protocol):
    """What evaluate() asks of a model; Transformer and RNNLM give it."""

    training: bool

    @property
    def config(self) -> Sized: ...

    @property
    def device(self) -> torch.device: ...

    def train(self, mode: bool = True) -> Any: ...

    def __call__(self, ids: torch.Tensor, targets: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
        """The loss of targets [B, T] int64 (-100: none), reduced by "mean" or "sum"."""


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per token; tokens: how many were predicted; bytes: the UTF-8 length of their text."""

    loss: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / (self.bytes * math.log(2))

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 32,
    each_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predicts every token [N] but the first, in windows of block_size that do not overlap.

    each_batch is called before each batch; what it raises ends the evaluation. The model keeps its mode, training or
    not.
    """
    nats, predicted, length = 0.0, 0, 0
    bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token)
    training = model.training
    model.train(False)
    try:
        for x, y in validation_batches(tokens, model.config.block_size, batch_size):
            each_batch()
            nats += float(model(x.to(model.device), y.to(model.device), reduction="sum"))
            predicted += y.numel()
            length += int(bytes_per_token[y].sum())
    finally:
        model.train(training)
    return Evaluation(nats / predicted, predicted, max(1, length))
