"""Training: batches, AdamW steps, evaluations, and checkpoints from which a run goes on bit for bit."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.lm import checkpoint
from pykern.lm.config import Config
from pykern.lm.data import Data
from pykern.lm.evaluation import Evaluation
from pykern.lm.model import Transformer, expected_tensors
from pykern.lm.objective import make_objective
from pykern.lm.options import TrainOptions
from pykern.lm.plot import LossLog, NoLog, plot
from pykern.lm.progress import Reporter, Silent, Status, peak_gflops
from pykern.lm.ranks import Ranks
from pykern.lm.run_state import CORPUS, read_state
from pykern.lm.seeding import seeded
from pykern.optim import AdamW

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Result:
    """How a run ended. evaluation is of the whole held-out text, None when the run was interrupted."""

    step: int
    seconds: float
    evaluation: Evaluation | None
    interrupted: bool
    out: Path


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into an answer of the function that it yields; a second one interrupts as usual."""
    pressed = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
        yield pressed.is_set
        return

    def press(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def smoothed(mean: float, value: float) -> float:
    """A mean in which older values fade, nan before the first."""
    return value if math.isnan(mean) else 0.9 * mean + 0.1 * value


class Interrupted(Exception):
    """Ctrl-C was pressed during an evaluation."""


def make_model(config: Config, options: TrainOptions) -> Transformer:
    """A model on the CPU whose weights follow from the seed alone; torch's own random stream is left as it was."""
    with seeded(options.seed):
        model = Transformer(config)
        model.init_weights(options.residual_init)
    return model


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        max_norm=options.clip or None,
    )


class Trainer:
    """Trains `model` on `data`; `out` becomes its checkpoint folder, with loss.csv and loss.png beside.

    ranks: the processes that share the work, batch_size rows each; the first of them writes `out`.
    ValueError when out already holds a checkpoint, or the data are too short for the block size or do not fit
    options.batches: before anything is written.
    Options: pykern.lm.TrainOptions. FloatingPointError: a loss or norm that is not a number.
    """

    def __init__(
        self,
        model: Transformer,
        data: Data,
        options: TrainOptions,
        out: str | os.PathLike[str],
        *,
        report: Reporter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._set_up(model, data, options, out, report, ranks)
        if not self.out.is_dir() and (self.out.exists() or self.out.is_symlink()):
            raise ValueError(f"train: {self.out} is not a folder")
        if self._has_checkpoint():
            raise ValueError(f"train: {self.out} already holds a checkpoint: resume it, or choose another folder")
        self.ranks.wait()

    def _set_up(self, model, data, options, out, report, ranks) -> None:
        config = model.config
        self.ranks = Ranks() if ranks is None else ranks
        if data.tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"train: {data.tokenizer.vocab_size} tokens but the model has vocab_size {config.vocab_size}"
            )
        self.objective = make_objective(data, config.block_size, options, self.ranks)
        self.batches = self.objective.batches
        given = {name: p.detach() for name, p in model.named_parameters()}
        self.model = model.to(torch.float32 if options.autocast else DTYPES[options.dtype]).train()
        self.network = self.ranks.wrap(self.model)
        self.data, self.options, self.out = data, options, Path(out)
        self.report = report if report is not None and self.ranks.first else Silent()
        self.optimizer = make_optimizer(self.model, options)
        for name, p in self.model.named_parameters():
            state = self.optimizer.prepare(p)
            if "master" in state:  # starts as the weight that was given, not as its bfloat16 copy
                self.ranks.fill(state["master"], given[name])
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._seconds_per_step = self._tokens_per_step = math.nan
        if options.recompute:
            self.model.recompute()

    def _has_checkpoint(self) -> bool:
        try:
            checkpoint.load_config(self.out)
        except FileNotFoundError:
            return False
        return True

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        data: Data,
        options: TrainOptions | None = None,
        *,
        report: Reporter | None = None,
        ranks: Ranks | None = None,
        device: torch.device | str = "cpu",
    ) -> "Trainer":
        """The run in folder `out`, ready to go on from its checkpoint; options None: those it was started with.

        With the same data and options the losses are, bit for bit, those of a run that was never interrupted (a run
        that ends by the clock excepted). FileNotFoundError or ValueError says what is missing or does not fit.
        """
        loaded = checkpoint.load_checkpoint(out, expected=expected_tensors)
        state = read_state(loaded.state, Path(out))
        if state.sha256 != data.sha256:
            raise ValueError(f"train: {out} was trained on another text: {state.description}, not {data.description}")
        options = state.options if options is None else options
        if state.split is None and options.batches != "blocks":
            raise ValueError(f"train: {out} was trained on blocks, so it cannot go on with {options.batches} batches")
        if state.split is not None and options.batches == "blocks":
            raise ValueError(f"train: {out} was trained on texts, so it cannot go on with blocks")
        if state.split != data.split:
            raise ValueError(f"train: {out} was trained on a text split by {state.split}, the data by {data.split}")
        trainer = cls.__new__(cls)
        trainer._set_up(Transformer.from_checkpoint(loaded).to(device), data, options, out, report, ranks)
        trainer.step, trainer.seconds = state.step, state.seconds
        blocks = trainer.batches.batch_size * trainer.batches.block_size  # a checkpoint without tokens is of blocks
        trainer.tokens = state.step * blocks if state.tokens is None else state.tokens
        trainer._restore_moments(loaded.state_tensors or {})
        trainer.ranks.wait()
        return trainer

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            state = self.optimizer.prepare(p)
            state["step"] = self.step
            for key in MOMENTS:
                saved = moments.get(f"{key}.{name}")
                if saved is None or saved.shape != p.shape or saved.dtype != state[key].dtype:
                    raise ValueError(f"{self.out}: the training state has no usable {key} of {name}")
                self.ranks.fill(state[key], saved)

    @property
    def fraction(self) -> float:
        """How much of the run lies behind, 0 to 1."""
        return self.options.fraction(self.step, self.seconds)

    def train_step(self) -> dict[str, int | float]:
        """One batch, one update; its row of loss.csv. FloatingPointError, before any weight changes, for a NaN loss."""
        start = time.perf_counter()
        lr = self.options.learning_rate(self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = self._loss()
        value = self.ranks.mean(loss.item())
        if not math.isfinite(value):
            raise FloatingPointError(f"train: the loss is {value} at step {self.step + 1}: try a lower lr")
        loss.backward()
        self.optimizer.step()
        norm = self.optimizer.finite_norm()
        seconds = self.ranks.mean(time.perf_counter() - start)
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self._seconds_per_step = smoothed(self._seconds_per_step, seconds)
        self._tokens_per_step = smoothed(self._tokens_per_step, tokens)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "loss": value,
            "lr": lr,
            "grad_norm": norm,
        }

    def _autocast(self) -> torch.autocast:
        """What options.autocast says, whatever the caller's own autocast: a run depends on its options alone."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.options.autocast)

    def _loss(self) -> tuple[Tensor, int]:
        device, dropout = self.model.device, bool(self.model.config.dropout)
        # what is dropped follows from seed and step, so that resuming is exact
        seed = (self.options.seed * 1_000_003 + self.step + self.ranks.rank * 10_000_019) % 2**63
        with self._autocast(), seeded(seed, device, dropout):
            return self.objective.loss(self.network, self.step, device)

    def evaluate(self, tokens: int | None = None, interrupted: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Of the first `tokens` held-out targets, or of all; None when interrupted() cut it short."""

        def check() -> None:
            if interrupted():
                raise Interrupted

        try:
            with self._autocast():
                return self.objective.evaluate(self.model, tokens, check)
        except Interrupted:
            return None

    def weights(self) -> dict[str, Tensor]:
        """The parameters in float32: the optimizer's master weights where there are some, as in pure bfloat16."""
        state = self.optimizer.state
        masters = {name: state.get(p, {}).get("master", p).detach() for name, p in self.ranks.parameters(self.model)}
        return {name: self.ranks.whole(master) for name, master in masters.items()}

    def save(self) -> None:
        """Writes the checkpoint, atomically, with all that resume() needs."""
        moments = {
            f"{key}.{name}": self.ranks.whole(self.optimizer.prepare(p)[key])
            for name, p in self.ranks.parameters(self.model)
            for key in MOMENTS
        }
        weights = self.weights()
        if self.ranks.first:
            self._write(weights, moments)
        self.ranks.wait()

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        checkpoint.save_checkpoint(
            self.out,
            config=self.model.config,
            tensors=weights,
            tokenizer=self.data.tokenizer,
            state={
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "options": self.options.to_dict(),
                "corpus": {name: getattr(self.data, name) for name in (*CORPUS, "split")},
            },
            state_tensors=moments,
        )

    def _status(self, row: dict[str, int | float], peak: float) -> Status:
        tokens_per_second = self._tokens_per_step / self._seconds_per_step
        flops_per_token = self.model.config.training_flops_per_token(self.objective.length)
        return Status(
            step=self.step,
            steps=self.options.steps,
            fraction=self.fraction,
            loss=row["loss"],
            lr=row["lr"],
            grad_norm=row["grad_norm"],
            tokens_per_second=tokens_per_second,
            gflops=tokens_per_second * flops_per_token / 1e9,
            peak_gflops=peak,
            eta_seconds=self.seconds * (1.0 / self.fraction - 1.0),
        )

    def run(self) -> Result:
        """Trains to the end, or to Ctrl-C: then the step that runs is finished and a checkpoint written."""
        options, config = self.options, self.model.config
        self.out.mkdir(parents=True, exist_ok=True)
        if self.ranks.any(not self._has_checkpoint()):
            self.save()  # from here on there is always one to load
        unknown = isinstance(self.report, Silent) or self.model.device.type != "cpu"
        peak = math.nan if unknown else peak_gflops(DTYPES[options.dtype])
        log = LossLog(self.out / "loss.csv", self.step) if self.ranks.first else NoLog()
        evaluation = None
        try:
            self.report.note(
                f"{self.data.description}; {self.objective}; {config.parameter_count:,} parameters"
                + ("" if unknown else f"; peak {peak:.0f} GFLOP/s")
            )
            with interruptible() as pressed:

                def interrupted() -> bool:
                    return self.ranks.any(pressed())

                while self.fraction < 1.0 and not interrupted():
                    row = self.train_step()
                    done = self.fraction >= 1.0
                    if done or (options.eval_every and self.step % options.eval_every == 0):
                        evaluation = self.evaluate(None if done else options.eval_tokens, interrupted)
                        if evaluation is not None:
                            row |= {"val_loss": evaluation.loss, "val_bits_per_byte": evaluation.bits_per_byte}
                            self._note(evaluation)
                    log.add(row)
                    self.report.status(self._status(row, peak))
                    if options.checkpoint_every and self.step % options.checkpoint_every == 0 and not done:
                        log.flush()
                        self.save()
                finished = self.fraction >= 1.0
                if finished and evaluation is None and not interrupted():  # a finished run, resumed
                    evaluation = self.evaluate(None, interrupted)
                log.flush()
                self.save()
        finally:
            log.close()
            self.report.close()
        if self.ranks.first:
            plot(self.out / "loss.csv", self.out / "loss.png", title=self.data.description)
        complete = finished and evaluation is not None
        return Result(self.step, self.seconds, evaluation if complete else None, not complete, self.out)

    def _note(self, evaluation: Evaluation) -> None:
        self.report.note(
            f"step {self.step} | held-out loss {evaluation.loss:.4f} | {evaluation.bits_per_byte:.4f} bits per byte"
        )


def train(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "byte",
    vocab_size: int | None = None,
    split: str | None = None,
    options: TrainOptions | None = None,
    report: Reporter | None = None,
    device: torch.device | str = "cpu",
    **shape: Any,
) -> Result:
    """Trains a new model on "stdlib", a text file or a folder. shape: the fields of Config but vocab_size.

    split: with padded or packed batches the texts are "files" (also when None), "lines" or "paragraphs".
    Options: pykern.lm.TrainOptions. Errors: pykern.lm.Trainer; ValueError also for the text and for shape.
    """
    options = TrainOptions() if options is None else options
    data = Data.load(source, tokenizer, vocab_size, split=options.split(split))
    config = Config(vocab_size=data.tokenizer.vocab_size, **shape)
    return Trainer(make_model(config, options).to(device), data, options, out, report=report).run()
