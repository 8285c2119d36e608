"""Fine-tuning a checkpoint: on new text as a language model, or with a new head as a classifier of labelled texts.

What is trained: all weights; with freeze_body the head alone; with lora the adapters (and a classifier's head). After
every eval_every steps the held-out part is evaluated. The weights of the best evaluation are the result, and `patience`
evaluations in a row that are no better end the run. The evaluation before the first step counts: fine-tuning that
makes a language model worse leaves it as it was.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.lm.batches import Batches
from pykern.lm.checkpoint import save_checkpoint
from pykern.lm.classifier import Classifier, Encoded, evaluate_classifier, refuse_taken
from pykern.lm.data import Data
from pykern.lm.evaluation import Evaluation, evaluate
from pykern.lm.files import json_bytes, replace_file
from pykern.lm.finetune_options import FineTuneOptions
from pykern.lm.fit import Fit, Score, fit
from pykern.lm.labelled import Labelled, LabelledBatches, balanced_weights, split
from pykern.lm.lora import adapters, add_lora, merge_lora, plain_state, save_adapter
from pykern.lm.model import Transformer
from pykern.lm.options import TrainOptions
from pykern.lm.plot import LossLog, plot
from pykern.lm.progress import Reporter, Silent
from pykern.lm.scores import Scores
from pykern.lm.tokenizer import Tokenizer

RECORD = "finetune.json"


def _untie(model: Transformer) -> Transformer:
    """The same model with a head of its own, that starts as a copy of the embedding; model itself when it has one."""
    if model.lm_head is not None:
        return model
    untied = Transformer(replace(model.config, tied_head=False), device="meta")
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    untied.load_state_dict(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, assign=True)
    return untied


def _prepare(body: Transformer, options: FineTuneOptions) -> None:
    """Says which parameters of the body learn."""
    if adapters(body):
        raise ValueError("finetune: the model has LoRA already: merge_lora first")
    body.requires_grad_(not options.freeze_body)
    if options.lora is not None:
        add_lora(body, options.lora, options.lora_alpha, seed=options.seed)


def _record(out: Path, task: str, options: FineTuneOptions, result: Fit[Any], about: dict[str, Any]) -> None:
    """finetune.json: how the folder was made."""
    values = {"task": task, "options": asdict(options), **about}
    values |= {name: getattr(result, name) for name in ("best_step", "step", "steps", "ended", "trained")}
    replace_file(out / RECORD, lambda temporary: temporary.write_bytes(json_bytes(values)))


def _finish(body: Transformer, out: Path, options: FineTuneOptions) -> None:
    if options.lora is not None:
        save_adapter(body, out)
        merge_lora(body)


def _logged(
    out: Path,
    options: FineTuneOptions,
    report: Reporter,
    model: torch.nn.Module,
    training: TrainOptions,
    *,
    batch: Callable[[int], tuple[Tensor, int]],
    evaluated: Callable[[Callable[[], None]], Score],
) -> Fit[Score]:
    """fit(), with a row per step in loss.csv."""
    log = LossLog(out / "loss.csv", 0)
    try:
        patience = options.patience
        return fit(model, training, batch=batch, evaluated=evaluated, patience=patience, log=log.add, report=report)
    finally:
        log.close()


def finetune_lm(
    model: Transformer,
    data: Data,
    out: str | os.PathLike[str],
    options: FineTuneOptions | None = None,
    *,
    report: Reporter | None = None,
) -> tuple[Transformer, Fit[Evaluation]]:
    """Goes on training a language model on `data`, encoded with its tokenizer; (model, how it went).

    With freeze_body only the head learns; a tied one is first copied from the embedding, which stays as it is. `out`
    becomes an ordinary checkpoint folder with loss.csv, loss.png and finetune.json; with lora also the adapter, whose
    sums the checkpoint holds. `model` is used up: it is trained itself. ValueError before anything is written or
    trained when out holds a checkpoint, the tokenizer does not fit or the text is too short.
    """
    options, out = FineTuneOptions() if options is None else options, Path(out)
    report = Silent() if report is None else report
    refuse_taken(out, "finetune")
    if options.class_weights != "none":
        raise ValueError("finetune: class_weights are for a classifier, not for a language model")
    if data.tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"finetune: {data.tokenizer.vocab_size} tokens but the model has vocab_size {model.config.vocab_size}"
        )
    if len(data.val) < 2:
        raise ValueError(f"finetune: the held-out text has {len(data.val)} tokens but evaluation needs at least 2")
    batches = Batches(data.train, model.config.block_size, options.batch_size, options.seed)
    training = options.training(options.steps_for(batches.blocks_per_epoch))
    model = (_untie(model) if options.freeze_body else model).float()
    if options.freeze_body:
        assert model.lm_head is not None
        _prepare(model, options)
        model.lm_head.requires_grad_(True)
    else:
        _prepare(model, options)
    out.mkdir(parents=True, exist_ok=True)

    def evaluated(check: Callable[[], None], tokens: int | None = options.eval_tokens) -> Evaluation:
        val = data.val if tokens is None else data.val[: tokens + 1]
        return evaluate(model, val, data.tokenizer, batch_size=options.batch_size, each_batch=check)

    def batch(step: int) -> tuple[Tensor, int]:
        x, y = batches.at(step)
        return model(x.to(model.device), y.to(model.device)), y.numel()

    report.note(f"{data.description}; {len(data.train):,} tokens to train on, {len(data.val):,} held out")
    result = _logged(out, options, report, model, training, batch=batch, evaluated=evaluated)
    _finish(model, out, options)
    tensors = {name: value.float() for name, value in plain_state(model).items()}
    _record(out, "lm", options, result, {"source": data.source, "sha256": data.sha256})
    save_checkpoint(out, config=model.config, tensors=tensors, tokenizer=data.tokenizer)
    plot(out / "loss.csv", out / "loss.png", title=data.description)
    return model, result


def finetune_classifier(
    body: Transformer,
    tokenizer: Tokenizer,
    data: Labelled,
    out: str | os.PathLike[str],
    options: FineTuneOptions | None = None,
    *,
    report: Reporter | None = None,
) -> tuple[Classifier, Fit[Scores]]:
    """Trains a Classifier on `body` to tell the classes of `data`; (classifier, how it went).

    A stratified part of the texts (options.held_out) is held out, to choose the best weights and to end early. `out`
    becomes a folder that Classifier.load reads, with loss.csv and finetune.json; with lora also the adapter of the
    body, whose sums the checkpoint holds. `body` is trained itself, unless frozen. ValueError before anything is
    written or trained when out holds a checkpoint, or a class has fewer than two different texts.
    """
    options, out = FineTuneOptions() if options is None else options, Path(out)
    report = Silent() if report is None else report
    refuse_taken(out, "finetune")
    train, val = split(data, options.held_out, options.seed)
    limit = body.config.block_size
    x, x_val = (Encoded.of(part.texts, tokenizer, limit) for part in (train, val))
    batches = LabelledBatches(len(train), options.batch_size, options.seed)
    training = options.training(options.steps_for(len(train)))
    model = Classifier(body.float(), data.classes, seed=options.seed)
    _prepare(body, options)
    out.mkdir(parents=True, exist_ok=True)
    balanced = options.class_weights == "balanced"
    weights = torch.from_numpy(balanced_weights(train.labels, len(train.classes))).float() if balanced else None

    def evaluated(check: Callable[[], None]) -> Scores:
        return evaluate_classifier(model, x_val, val.labels, batch_size=2 * options.batch_size, each_batch=check)

    def batch(step: int) -> tuple[Tensor, int]:
        rows = batches.rows(step)
        ids, lengths = x.batch(rows, body.device)
        labels = torch.from_numpy(train.labels[rows]).to(body.device)
        return model.loss(ids, lengths, labels, weights), int(lengths.sum())

    report.note(f"{len(train):,} texts to train on, {len(val):,} held out; {len(data.classes)} classes")
    cut = x.truncated + x_val.truncated
    if cut:
        report.note(f"{cut:,} texts are longer than the model sees: their first {limit} tokens count")
    result = _logged(out, options, report, model, training, batch=batch, evaluated=evaluated)
    _finish(body, out, options)
    _record(out, "classify", options, result, {"texts": len(train), "held_out": len(val)})
    model.save(out, tokenizer)
    return model, result
