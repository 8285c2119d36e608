"""In-context learning of mapping tasks (icl_tasks.py): a Transformer trained on them, and its accuracy over the shots.

The model never changes while it is evaluated: what it knows of a task it has read in the prompt. icl_finetune.py is
the rival: the same checkpoint, to which the same examples come as gradients.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.lm import checkpoint
from pykern.lm.config import Config
from pykern.lm.icl_tasks import IGNORED, Episodes, MappingTasks, check_whole
from pykern.lm.model import Transformer
from pykern.lm.options import TrainOptions
from pykern.lm.tokenizer import Tokenizer
from pykern.lm.trainer import make_model, make_optimizer
from pykern.optim import AdamW

SHOTS = (0, 1, 2, 4, 8)
EXAMPLES = 16  # in a training row: a block is twice as long
# ALiBi's steepest slope of eight heads is 1/2: a label sees the key before it from the first step on.
SHAPE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 64,
    "positions": "alibi",
    "norm": "rmsnorm",
    "activation": "gelu",
    "tied_head": False,
}
OPTIONS = TrainOptions(steps=4000, batch_size=16, lr=3e-3, warmup=50, weight_decay=0.0, beta2=0.98)
INIT_SCALE = 4.0  # deviation 0.08 in place of 0.02, at which a width of 64 attends to everything alike for long
REPORT_SECONDS = 10.0
Z95 = 1.959963984540054  # the standard normal's 97.5 % point


@dataclass(frozen=True)
class ShotsResult:
    """Accuracy at a number of shots over `queries` tasks, one query of each, and what a task cost.

    low, high: the 95 % Wilson interval. optimal: the best accuracy that is possible. *_task is spent once for a task,
    *_query for each of its queries: seconds of this machine, and FLOPs as Config counts them.
    """

    method: str
    shots: int
    queries: int
    correct: int
    low: float
    high: float
    optimal: float
    seconds_task: float
    seconds_query: float
    flops_task: int
    flops_query: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.queries

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"accuracy": self.accuracy}


def wilson(correct: int, queries: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion: the p with |correct / n - p| <= 1.96 sqrt(p (1 - p) / n)."""
    check_whole("wilson", "queries", queries, 1)
    check_whole("wilson", "correct", correct, 0, queries)
    share, z2 = correct / queries, Z95**2 / queries
    middle, half = share + z2 / 2, math.sqrt(Z95**2 * (share * (1 - share) + z2 / 4) / queries)
    # at the ends one limit is the proportion itself, which rounding would miss
    low = 0.0 if correct == 0 else (middle - half) / (1 + z2)
    high = 1.0 if correct == queries else (middle + half) / (1 + z2)
    return low, high


def checked_shots(function: str, shots: Sequence[int], block_size: int) -> list[int]:
    """shots as a list; TypeError or ValueError unless there are some, all different, and a prompt fits the block."""
    if isinstance(shots, (str, bytes)) or not isinstance(shots, Sequence):
        raise TypeError(f"{function}: shots must be a sequence of integers, got {type(shots).__name__}")
    most = (block_size - 2) // 2
    for value in shots:
        check_whole(function, "shots", value, 0)
        if value > most:
            raise ValueError(f"{function}: {value} shots are {2 * value + 2} tokens but block_size is {block_size}")
    if not shots or len(set(shots)) != len(shots):
        raise ValueError(f"{function}: shots are {list(shots)} but must be one number or more, all different")
    return [int(value) for value in shots]


@torch.no_grad()
def count_correct(model: Transformer, episodes: Episodes, ids: Tensor, first_label: int, batch_size: int) -> int:
    """How many episodes the model answers right; ids [S]: the token of each symbol, labels from first_label on."""
    correct, labels = 0, ids[first_label:]
    for start in range(0, len(episodes.prompts), batch_size):
        rows = slice(start, start + batch_size)
        prompts = ids[torch.from_numpy(episodes.prompts[rows])]
        logits = model.logits(model.hidden(prompts)[:, -1])  # [B, V], after the prompt
        chosen = logits[:, labels].argmax(-1).cpu().numpy()
        correct += int((chosen == episodes.answers[rows]).sum())
    return correct


def evaluate_icl(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    shots: Sequence[int] = SHOTS,
    episodes: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
    tasks: MappingTasks | None = None,
) -> list[ShotsResult]:
    """In-context accuracy at each number of shots: `episodes` new tasks each, the same ones for the same seed.

    An answer is the likeliest of the labels, after one forward pass over the prompt. Any model will do whose tokenizer
    has a token for each symbol and whose block holds the prompts; ValueError otherwise, before anything is computed.
    seconds_query is that of a query in batches of batch_size. The model keeps its mode and its weights.
    """
    tasks = MappingTasks() if tasks is None else tasks
    numbers = checked_shots("evaluate_icl", shots, model.config.block_size)
    check_whole("evaluate_icl", "episodes", episodes, 1)
    check_whole("evaluate_icl", "batch_size", batch_size, 1)
    check_whole("evaluate_icl", "seed", seed, 0, 2**63 - 1)
    ids = torch.from_numpy(tasks.token_ids(tokenizer)).to(model.device)
    training, results = model.training, []
    model.eval()
    try:
        for k in numbers:
            drawn = tasks.sample(k, episodes, seed)
            start = time.perf_counter()
            correct = count_correct(model, drawn, ids, tasks.first_label, batch_size)
            seconds = (time.perf_counter() - start) / episodes
            tokens = 2 * k + 2
            low, high = wilson(correct, episodes)
            results.append(
                ShotsResult(
                    method="in context",
                    shots=k,
                    queries=episodes,
                    correct=correct,
                    low=low,
                    high=high,
                    optimal=float(tasks.optimal_accuracy(k)),
                    seconds_task=0.0,
                    seconds_query=seconds,
                    flops_task=0,
                    flops_query=tokens * model.config.forward_flops_per_token(tokens),
                )
            )
    finally:
        model.train(training)
    return results


def make_icl_model(tasks: MappingTasks, options: TrainOptions, **shape: Any) -> tuple[Transformer, Tokenizer]:
    """A fresh model for the tasks, with a character tokenizer of their symbols. shape: fields of Config."""
    tokenizer = Tokenizer.train("character", [tasks.alphabet])
    fields = {**SHAPE, "block_size": 2 * EXAMPLES, **shape}
    model = make_model(Config(vocab_size=tokenizer.vocab_size, **fields), options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(INIT_SCALE)
    return model, tokenizer


def train_step(
    model: Transformer,
    optimizer: AdamW,
    ids: Tensor,
    tasks: MappingTasks,
    options: TrainOptions,
    step: int,
) -> float:
    """One batch, one update; the loss in nats per label. FloatingPointError, before any weight changes, for NaN."""
    symbols, wanted = tasks.training_rows(
        model.config.block_size // 2, options.batch_size, seed=options.seed, step=step
    )
    x = ids[torch.from_numpy(symbols)]
    targets = torch.from_numpy(wanted).to(ids.device)
    y = torch.where(targets == IGNORED, IGNORED, ids[targets.clamp(min=0)])
    for group in optimizer.param_groups:
        group["lr"] = options.learning_rate(step)
    optimizer.zero_grad(set_to_none=True)
    loss = model(x, y)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"train_icl: the loss is {loss.item()} at step {step + 1}: try a lower lr")
    loss.backward()
    optimizer.step()
    optimizer.finite_norm()  # on a GPU the step does not raise itself
    return loss.item()


def train_icl(
    out: str | os.PathLike[str],
    *,
    options: TrainOptions = OPTIONS,
    tasks: MappingTasks | None = None,
    report: Callable[[str], object] = lambda line: None,
    **shape: Any,
) -> tuple[Transformer, Tokenizer]:
    """Trains a model on mapping tasks for options.steps and makes `out` its checkpoint folder; model and tokenizer.

    Only labels are predicted: keys are random. shape: fields of Config that differ from SHAPE. From options count
    steps, batch_size, lr and its schedule, weight_decay, betas, clip and seed. ValueError when out holds a checkpoint
    or is no folder, before anything is computed. Same arguments, same weights. report is called with a line of text
    now and then. The folder has no training.json: a run is not resumed.
    """
    tasks = MappingTasks() if tasks is None else tasks
    out = Path(out)
    if options.steps is None:
        raise ValueError("train_icl: options.steps is None: the run ends by steps")
    if options.dtype != "float32" or options.autocast:
        raise ValueError(f"train_icl: dtype {options.dtype} with autocast {options.autocast}: it trains in float32")
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise ValueError(f"train_icl: {out} is not a folder")
    if (out / checkpoint.CONFIG).exists() or (out / checkpoint.COMMIT).exists():
        raise ValueError(f"train_icl: {out} already holds a checkpoint: choose another folder")
    model, tokenizer = make_icl_model(tasks, options, **shape)
    if model.config.block_size < 4:
        raise ValueError(f"train_icl: block_size is {model.config.block_size} but two examples take 4 tokens")
    ids = torch.from_numpy(tasks.token_ids(tokenizer))
    optimizer = make_optimizer(model, options)
    model.train()
    start = shown = time.perf_counter()
    loss = math.nan
    for step in range(options.steps):
        loss = train_step(model, optimizer, ids, tasks, options, step)
        now, last = time.perf_counter(), step + 1 == options.steps
        if last or now - shown >= REPORT_SECONDS:
            shown = now
            report(f"step {step + 1}/{options.steps} | loss {loss:.4f} nats per label | {now - start:.0f} s")
    model.eval()
    checkpoint.save_checkpoint(out, config=model.config, tensors=model.state_dict(), tokenizer=tokenizer)
    return model, tokenizer
