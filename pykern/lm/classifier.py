"""A classifier on a language model: logits = head(state of the last token of the text), classes instead of tokens.

Texts are padded on the right. Attention is causal, so what follows the last token of a text changes nothing at it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykern import nn, ops
from pykern.lm.checkpoint import load_checkpoint, load_config, read_tensors, save_checkpoint
from pykern.lm.files import json_bytes, read_json, replace_file
from pykern.lm.labelled import MAX_CLASSES, Labelled, check_label, check_text
from pykern.lm.lora import fingerprint, plain_state, write_tensors
from pykern.lm.model import Transformer, expected_tensors
from pykern.lm.scores import Scores, balanced_mean, confusion
from pykern.lm.tokenizer import Tokenizer

CLASSES, HEAD = "classes.json", "head.safetensors"
FORMAT = "pykern-classifier-1"
MAX_CLASSES_BYTES = 4 << 20


class Classifier(torch.nn.Module):
    """Logits [B, C] for ids [B, T] int64 of lengths [B] int64; a new head over the states of `body`.

    classes names the C of them. The body's own head, for tokens, is kept but not used.
    """

    def __init__(self, body: Transformer, classes: Sequence[str], *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(body, Transformer):
            raise TypeError(f"Classifier: body must be a Transformer, got {type(body).__name__}")
        if isinstance(classes, str) or not 2 <= len(classes) <= MAX_CLASSES:
            raise ValueError(f"Classifier: classes must be 2 to {MAX_CLASSES} names, got {str(classes)[:60]!r}")
        self.classes = tuple(check_label(name, "Classifier") for name in classes)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("Classifier: a name occurs twice in classes")
        self.body = body
        with torch.random.fork_rng(devices=[]):  # what Linear itself draws is replaced right below
            self.head = nn.Linear(body.config.n_embd, len(self.classes), device=body.device, dtype=body.dtype)
        noise = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(0.02 * noise)
            self.head.bias.zero_()

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        if lengths.shape != ids.shape[:1] or ids.dim() != 2:
            raise ValueError(
                f"Classifier: lengths have shape {list(lengths.shape)} but ids {list(ids.shape)}: expected [B], [B, T]"
            )
        if lengths.numel() and not (int(lengths.min()) >= 1 and int(lengths.max()) <= ids.shape[1]):
            raise IndexError(
                f"Classifier: lengths run from {int(lengths.min())} to {int(lengths.max())} but ids have "
                f"{ids.shape[1]} tokens"
            )
        states = self.body.hidden(ids)
        last = states[torch.arange(ids.shape[0], device=ids.device), lengths - 1]
        return self.head(last)

    def loss(self, ids: Tensor, lengths: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the batch of -log softmax(logits)[label], of which class c counts weights[c] (None: 1) times.

        labels int64 [B], weights [C]. The mean is over texts, not over weights: balanced weights average to 1 over
        the data, and a batch of rare classes has the larger gradient.
        """
        nats = ops.cross_entropy(self(ids, lengths).float(), labels, reduction="none")
        return nats.mean() if weights is None else (nats * weights.to(nats)[labels]).mean()

    def save(self, folder: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
        """Makes `folder`, which must not hold a checkpoint, one of the body, with classes.json and head.safetensors.

        Float32, LoRA merged. The checkpoint comes last and at once: a crash leaves a folder without one.
        """
        folder = Path(folder)
        refuse_taken(folder, "Classifier.save")
        tensors = plain_state(self.body)
        description = {"format": FORMAT, "classes": list(self.classes), "body": fingerprint(tensors)}
        data = json_bytes(description)
        if len(data) > MAX_CLASSES_BYTES:
            raise ValueError(f"Classifier.save: {len(data)} bytes of class names, more than {MAX_CLASSES_BYTES}")
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / HEAD, {"head.weight": self.head.weight, "head.bias": self.head.bias})
        replace_file(folder / CLASSES, lambda temporary: temporary.write_bytes(data))
        tensors = {name: value.float() for name, value in tensors.items()}
        save_checkpoint(folder, config=self.body.config, tensors=tensors, tokenizer=tokenizer)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> tuple["Classifier", Tokenizer]:
        """The classifier in a folder that save wrote, in float32, and its tokenizer.

        FileNotFoundError, or ValueError naming the file: not a classifier, a faulty tensor, a head of another body.
        """
        folder = Path(folder)
        load_config(folder)  # a folder that is no checkpoint is named as such
        path = folder / CLASSES
        if not path.exists():
            raise ValueError(f"{folder}: not a classifier, it has no {CLASSES}")
        values = read_json(path, MAX_CLASSES_BYTES)
        classes = values.get("classes")
        if values.get("format") != FORMAT or not isinstance(classes, list) or not isinstance(values.get("body"), str):
            raise ValueError(f"{path}: not a {FORMAT} file")
        loaded = load_checkpoint(folder, expected=expected_tensors, training=False)
        if loaded.tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer.json")
        if values["body"] != fingerprint(loaded.tensors):
            raise ValueError(f"{path}: the head was trained on other weights than those of model.safetensors")
        try:
            model = cls(Transformer.from_checkpoint(loaded), classes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        head = read_tensors(
            folder / HEAD, {"head.weight": model.head.weight.detach(), "head.bias": model.head.bias.detach()}
        )
        with torch.no_grad():
            model.head.weight.copy_(head["head.weight"])
            model.head.bias.copy_(head["head.bias"])
        return model.eval(), loaded.tokenizer


def refuse_taken(folder: Path, function: str) -> None:
    """ValueError when folder is a file or holds a checkpoint."""
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise ValueError(f"{function}: {folder} is not a folder")
    try:
        load_config(folder)
    except FileNotFoundError:
        return
    raise ValueError(f"{function}: {folder} already holds a checkpoint: choose another folder")


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts, uint16 or uint32 each, cut to their first `limit` tokens; truncated: how many were longer."""

    ids: tuple[np.ndarray, ...]
    truncated: int

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer, limit: int) -> "Encoded":
        ids = [tokenizer.encode_texts([check_text(text, f"text {i + 1}")]) for i, text in enumerate(texts)]
        empty = next((i for i, one in enumerate(ids) if not len(one)), None)
        if empty is not None:
            raise ValueError(f"text {empty + 1}: the tokenizer makes no token of {texts[empty][:40]!r}")
        return cls(tuple(one[:limit] for one in ids), sum(len(one) > limit for one in ids))

    def batch(self, rows: Sequence[int] | np.ndarray, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """ids [B, T] int64, padded on the right with 0 up to the longest, and lengths [B]."""
        chosen = [self.ids[i] for i in rows]
        lengths = np.array([len(one) for one in chosen], np.int64)
        padded = np.zeros((len(chosen), int(lengths.max())), np.int64)
        for row, one in zip(padded, chosen, strict=True):
            row[: len(one)] = one
        return torch.from_numpy(padded).to(device), torch.from_numpy(lengths).to(device)


@torch.no_grad()
def logits_of(
    model: Classifier, encoded: Encoded, *, batch_size: int = 32, each_batch: Callable[[], None] = lambda: None
) -> Tensor:
    """Logits [N, C] float32 of all texts, dropout off; similar lengths share a batch. FloatingPointError for a NaN.

    each_batch is called before each batch; what it raises ends the evaluation. The model keeps its mode.
    """
    order = np.argsort([len(one) for one in encoded.ids], kind="stable")
    result = torch.empty(len(order), len(model.classes))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            each_batch()
            rows = order[start : start + batch_size]
            result[torch.from_numpy(rows)] = model(*encoded.batch(rows, model.body.device)).float().cpu()
    finally:
        model.train(training)
    if not torch.isfinite(result).all():
        raise FloatingPointError("classify: the model gives NaN or infinite logits")
    return result


def evaluate_classifier(
    model: Classifier,
    encoded: Encoded,
    labels: np.ndarray,
    *,
    batch_size: int = 32,
    each_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """The Scores of a model on texts with labels int64 [N]."""
    logits = logits_of(model, encoded, batch_size=batch_size, each_batch=each_batch)
    truth = torch.from_numpy(labels)
    nats = torch.nn.functional.cross_entropy(logits.double(), truth, reduction="none").numpy()
    table = confusion(labels, logits.argmax(1).numpy(), len(model.classes))
    return Scores(table, float(nats.mean()), balanced_mean(nats, labels))


def score_texts(model: Classifier, tokenizer: Tokenizer, data: Labelled, *, batch_size: int = 32) -> Scores:
    """The Scores on labelled texts, whose classes must be the model's. ValueError otherwise."""
    if data.classes != model.classes:
        raise ValueError(f"score_texts: the data have classes {data.classes[:8]}, the model {model.classes[:8]}")
    encoded = Encoded.of(data.texts, tokenizer, model.body.config.block_size)
    return evaluate_classifier(model, encoded, data.labels, batch_size=batch_size)


def probabilities(model: Classifier, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
    """Probabilities float64 [N, C] of the classes of texts, of which the first block_size tokens are read.

    ValueError names an empty text; FloatingPointError when the model gives a NaN.
    """
    if isinstance(texts, str):
        raise TypeError("probabilities: texts must be a sequence of str, got str")
    encoded = Encoded.of(texts, tokenizer, model.body.config.block_size)
    logits = logits_of(model, encoded, batch_size=batch_size)
    return torch.softmax(logits.double(), 1).numpy()
