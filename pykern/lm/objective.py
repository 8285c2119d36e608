"""What a run minimises and is tested on: the loss of a step, and the held-out evaluation in the same terms.

Blocks are cut from one long text, each step the same number of targets. Texts are padded or packed, and their steps
differ in targets, as the parts of a step on several ranks do. The loss is the mean over all targets of the step, so a
rank gives what makes the average over ranks that mean: its sum * ranks / targets of the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pykern.lm.batches import Batches
from pykern.lm.data import Data
from pykern.lm.documents import Documents, PackedBatches, PaddedBatches
from pykern.lm.evaluation import Evaluation, evaluate, evaluate_texts
from pykern.lm.options import TrainOptions
from pykern.lm.ranks import Ranks

CPU = torch.device("cpu")
Rows = TypeVar("Rows", Batches, PaddedBatches | PackedBatches)


class Objective(ABC, Generic[Rows]):
    """batches: of all ranks together. length: tokens of a text or block, for its FLOPs."""

    batches: Rows
    length: int

    @abstractmethod
    def loss(self, network: Callable[..., Tensor], step: int, device: torch.device = CPU) -> tuple[Tensor, int]:
        """This rank's share of the loss of a step, whose average over ranks is the loss, and the targets of all.

        device: of the network.
        """

    @abstractmethod
    def evaluate(self, model: Any, tokens: int | None, each_batch: Callable[[], None]) -> Evaluation:
        """Of the held-out text, or of its first `tokens` targets."""

    @abstractmethod
    def __str__(self) -> str:
        """What there is to train on and to test on, for people."""


class Blocks(Objective[Batches]):
    """Blocks of one long text; ValueError when it is shorter than one, or the held-out text shorter than two tokens."""

    def __init__(self, data: Data, block_size: int, options: TrainOptions, ranks: Ranks) -> None:
        if len(data.val) < 2:
            raise ValueError(f"train: the held-out text has {len(data.val)} tokens but evaluation needs at least 2")
        self.batches = Batches(data.train, block_size, options.batch_size * ranks.size, options.seed)
        self.length, self.data, self.ranks, self.rows = block_size, data, ranks, options.batch_size

    def loss(self, network: Callable[..., Tensor], step: int, device: torch.device = CPU) -> tuple[Tensor, int]:
        x, y = self.batches.at(step)
        return network(*(self.ranks.rows(ids).to(device) for ids in (x, y))), y.numel()

    def evaluate(self, model: Any, tokens: int | None, each_batch: Callable[[], None]) -> Evaluation:
        val = self.data.val if tokens is None else self.data.val[: tokens + 1]
        return evaluate(model, val, self.data.tokenizer, batch_size=self.rows, each_batch=each_batch)

    def __str__(self) -> str:
        return f"{len(self.data.train):,} tokens to train on, {len(self.data.val):,} held out"


KINDS: dict[str, type[PaddedBatches] | type[PackedBatches]] = {"padded": PaddedBatches, "packed": PackedBatches}


class Texts(Objective[PaddedBatches | PackedBatches]):
    """Padded or packed texts; ValueError when none, or no held-out one, has two tokens."""

    def __init__(self, data: Data, block_size: int, options: TrainOptions, ranks: Ranks) -> None:
        if data.train_texts is None or data.val_texts is None:
            raise ValueError(f"train: batches is {options.batches!r} but the data are not split into texts")
        kind, rows = KINDS[options.batches], options.batch_size
        for name, texts in (("", data.train_texts), ("held-out ", data.val_texts)):
            if not (texts.lengths >= 2).any():
                raise ValueError(f"train: none of the {len(texts)} {name}texts has 2 tokens or more")
        self.batches = kind(data.train_texts, block_size, rows * ranks.size, options.seed)
        lengths = self.batches.lengths
        self.length = round(float(np.square(lengths).sum() / lengths.sum()))  # attention's work is quadratic in it
        self.data, self.ranks, self.rows, self.val = data, ranks, rows, data.val_texts

    def loss(self, network: Callable[..., Tensor], step: int, device: torch.device = CPU) -> tuple[Tensor, int]:
        batch = self.batches.at(step)
        if self.ranks.size == 1:
            return batch.to(device).loss(network), batch.tokens
        part = batch.part(self.ranks.rank, self.ranks.size).to(device)
        return part.loss(network, "sum") * (self.ranks.size / batch.tokens), batch.tokens

    def evaluate(self, model: Any, tokens: int | None, each_batch: Callable[[], None]) -> Evaluation:
        tokenizer, rows = self.data.tokenizer, self.rows
        return evaluate_texts(model, self.val, tokenizer, batch_size=rows, tokens=tokens, each_batch=each_batch)

    def __str__(self) -> str:
        most = self.batches.block_size + 1
        return (
            f"{self._counted(self.batches.texts, most)} to train on, {self._counted(self.val, most)} held out, "
            f"split by {self.data.split}; {self.batches.rows_per_epoch:,} rows an epoch"
        )

    @staticmethod
    def _counted(texts: Documents, most: int) -> str:
        """How many texts there are, and what of them is not used."""
        lengths = texts.lengths
        long, short = int((lengths > most).sum()), int((lengths < 2).sum())
        left = int(np.maximum(lengths - most, 0).sum())
        unused = [f"{long:,} of them cut to {most} tokens, {left:,} tokens less" if long else ""]
        unused += [f"{short:,} too short" if short else ""]
        said = "; ".join(filter(None, unused))
        return f"{len(texts):,} texts of {len(texts.tokens):,} tokens" + (f" ({said})" if said else "")


def make_objective(data: Data, block_size: int, options: TrainOptions, ranks: Ranks) -> Objective[Any]:
    """What options.batches says. ValueError when the data do not fit it or are too short."""
    if options.batches != "blocks":
        return Texts(data, block_size, options, ranks)
    if data.split is not None:
        raise ValueError(f"train: batches is 'blocks' but the data are split by {data.split}: choose padded or packed")
    return Blocks(data, block_size, options, ranks)
