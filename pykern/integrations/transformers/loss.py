"""The language-model losses of transformers on pykern.cross_entropy: which loss a model uses, and what takes its place.

loss = sum over the labels that count of -log softmax(logits)[label], divided by their number or by num_items_in_batch.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykern.ops.cross_entropy import cross_entropy


def _mean(logits: Tensor, labels: Tensor, vocab_size: int, items: Tensor | int | None, ignore_index: int) -> Tensor:
    rows, target = logits.reshape(-1, vocab_size), labels.reshape(-1).to(logits.device)
    if items is None:
        return cross_entropy(rows, target, ignore_index=ignore_index)
    total = cross_entropy(rows, target, ignore_index=ignore_index, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def causal_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss of logits [..., T, V] where token t predicts label t + 1, or shift_labels, which are moved already."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _mean(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    """The loss of logits [..., T, V] where token t predicts label t."""
    return _mean(logits, labels, vocab_size, num_items_in_batch, ignore_index)


OURS: dict[str, Callable[..., Tensor]] = {"ForCausalLMLoss": causal_loss, "ForMaskedLMLoss": masked_loss}


def replacement(model: torch.nn.Module) -> tuple[Callable[..., Tensor] | None, str]:
    """(the loss that takes the place of model.loss_function, or None, and a word on why)."""
    try:
        uses = "loss_function" in inspect.getsource(type(model).forward)
    except OSError:
        return None, "the source of forward() is not at hand, so its loss is not known"
    if not uses:
        return None, "forward() computes its loss, if any, by itself"
    theirs = model.loss_function
    if theirs in OURS.values():
        return None, "is pykern's already"
    name = getattr(theirs, "__name__", type(theirs).__name__)
    if getattr(theirs, "__module__", "") != "transformers.loss.loss_utils" or name not in OURS:
        return None, f"{name} is none of {', '.join(OURS)}"
    return OURS[name], name
