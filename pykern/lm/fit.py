"""The loop of fine-tuning: AdamW steps, evaluations, the weights of the best one kept, early stopping."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pykern.lm.evaluation import Evaluation
from pykern.lm.options import TrainOptions
from pykern.lm.progress import Reporter
from pykern.lm.scores import Scores
from pykern.lm.seeding import seeded
from pykern.lm.trainer import Interrupted, interruptible, make_optimizer

Score = TypeVar("Score", Evaluation, Scores)


@dataclass(frozen=True)
class Fit(Generic[Score]):
    """How a run went: `first` evaluation before any step, `best` after best_step of the `step` steps done.

    ended: "steps", "patience" or "interrupted". trained: how many parameters learned. seconds include evaluations.
    """

    first: Score
    best: Score
    best_step: int
    step: int
    steps: int
    seconds: float
    ended: str
    trained: int


def quality(score: Evaluation | Scores) -> float:
    """Larger is better: less loss; of a classifier the class-balanced loss, less noisy than its accuracy."""
    return -score.balanced_loss if isinstance(score, Scores) else -score.loss


def _line(score: Evaluation | Scores) -> str:
    if isinstance(score, Scores):
        return f"held out: {score}"
    return f"held-out loss {score.loss:.4f} | {score.bits_per_byte:.4f} bits per byte"


def fit(
    model: Any,
    options: TrainOptions,
    *,
    batch: Callable[[int], tuple[Tensor, int]],
    evaluated: Callable[[Callable[[], None]], Score],
    patience: int,
    log: Callable[[dict[str, int | float]], None],
    report: Reporter,
) -> Fit[Score]:
    """Trains the parameters of `model` that require a gradient and leaves in it those of the best evaluation.

    batch(step) gives the loss and the number of tokens of a step counted from 0; evaluated(check) evaluates, calling
    check before each batch. Ctrl-C finishes the step. FloatingPointError for a loss or gradient that is not finite.
    """
    assert options.steps is not None
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model, options)
    start = time.perf_counter()
    device = next(iter(learning.values())).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.autocast)

    def evaluate_now(check: Callable[[], None]) -> Score:
        with autocast:
            return evaluated(check)

    with interruptible() as interrupted:

        def check() -> None:
            if interrupted():
                raise Interrupted

        first = evaluate_now(lambda: None)
        report.note(f"step 0/{options.steps} | {_line(first)}")
        best, best_step, step, tokens, waited, ended = first, 0, 0, 0, 0, "steps"
        kept = {name: p.detach().clone() for name, p in learning.items()}
        model.train()
        while step < options.steps:
            if interrupted():
                ended = "interrupted"
                break
            lr = options.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            with seeded((options.seed * 1_000_003 + step) % 2**63, device), autocast:  # of dropout
                loss, count = batch(step)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"finetune: the loss is {loss.item()} at step {step + 1}: try a lower lr")
            loss.backward()
            optimizer.step()
            step, tokens = step + 1, tokens + count
            row: dict[str, int | float] = {"step": step, "tokens": tokens, "loss": loss.item(), "lr": lr}
            row |= {"grad_norm": optimizer.finite_norm()}
            if step % options.eval_every == 0 or step == options.steps:
                try:
                    score = evaluate_now(check)
                except Interrupted:
                    ended = "interrupted"
                else:
                    row |= {"val_loss": score.loss}
                    row |= {"val_bits_per_byte": score.bits_per_byte} if isinstance(score, Evaluation) else {}
                    report.note(f"step {step}/{options.steps} | loss {loss.item():.4f} | {_line(score)}")
                    waited += 1
                    if quality(score) > quality(best):
                        best, best_step, waited = score, step, 0
                        kept = {name: p.detach().clone() for name, p in learning.items()}
                    if patience and waited >= patience and step < options.steps:
                        ended = "patience"
            log(row | {"seconds": time.perf_counter() - start})
            if ended != "steps":
                break
    with torch.no_grad():
        for name, p in learning.items():
            p.copy_(kept[name])
    model.eval()
    trained = sum(p.numel() for p in learning.values())
    return Fit(first, best, best_step, step, options.steps, time.perf_counter() - start, ended, trained)
