"""How well a model predicts a text: nats per token and bits per byte, the latter comparable between tokenizers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from pykern.lm.batches import validation_batches
from pykern.lm.documents import IGNORED, Documents, PackedBatches
from pykern.lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pykern.lm.model import Transformer


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
    """loss: mean nats per token; tokens: how many were predicted; bytes: the UTF-8 length of their text.

    Formula: bits_per_byte = loss tokens / (bytes ln 2), perplexity = exp(loss).
    """

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
def _evaluate(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]],
    tokenizer: Tokenizer,
    each_batch: Callable[[], None],
) -> Evaluation:
    """Of batches of ids, targets and what else the model is given."""
    nats, predicted, length = 0.0, 0, 0
    bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token)
    training = model.training
    model.train(False)
    try:
        for x, y, layout in batches:
            each_batch()
            layout = {name: value.to(model.device) for name, value in layout.items()}
            nats += float(model(x.to(model.device), y.to(model.device), **layout, reduction="sum"))
            real = y[y != IGNORED]
            predicted += real.numel()
            length += int(bytes_per_token[real].sum())
    finally:
        model.train(training)
    return Evaluation(nats / predicted, predicted, max(1, length))


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
    tokens: uint16, uint32, int32 or int64. Formula: the loss is the mean of -log P(token | those before it in the
    window).
    TypeError: other tokens. ValueError: fewer than two of them.
    """
    windows = validation_batches(tokens, model.config.block_size, batch_size)
    return _evaluate(model, ((x, y, {}) for x, y in windows), tokenizer, each_batch)


def evaluate_texts(
    model: "Transformer",
    texts: Documents,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 32,
    tokens: int | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predicts each text on its own, every token but its first, up to block_size of them; what is behind is left out.

    tokens: only so many, those of the first texts. The model sees the texts packed, batch_size rows at once, which
    changes nothing (pykern.lm.documents). each_batch and the mode are those of evaluate().
    ValueError when no text has two tokens.
    """
    block_size = model.config.block_size
    texts = texts if tokens is None else texts.first(tokens, block_size)
    rows = PackedBatches(texts, block_size, batch_size).once()
    batches = ((batch.ids, batch.targets, batch.layout) for batch in rows)
    return _evaluate(model, batches, tokenizer, each_batch)
