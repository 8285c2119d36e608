"""How a model is trained: every number that shapes the run, checked, and the learning rate that follows from them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

BATCHES = ("blocks", "padded", "packed")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")
RESIDUAL_INITS = ("scaled", "zero")
CHOICES = {"schedule": SCHEDULES, "dtype": DTYPES, "residual_init": RESIDUAL_INITS, "batches": BATCHES}
# the least value of each integer, the largest of each number
INTEGERS = {
    "steps": 1,
    "batch_size": 1,
    "warmup": 0,
    "eval_every": 0,
    "eval_tokens": 2,
    "checkpoint_every": 0,
    "seed": 0,
}
NUMBERS = {"minutes": 1e9, "lr": 1e9, "final_lr": 1.0, "weight_decay": 1e9, "beta1": 1.0, "beta2": 1.0, "clip": 1e9}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """A run ends after `steps` steps or `minutes` minutes of training, whichever is first; one of them may be None.

    batches: "blocks" of one long text, or short texts, "padded" (one a row) or "packed" (as many a row as fit).
    recompute keeps less for backward and makes it again there (pykern.nn.TransformerBlock); all bits stay the same.

    The learning rate rises over `warmup` steps to lr, then falls along `schedule` to final_lr * lr at the end.
    Gradients are clipped to the joint norm `clip` (0: not). dtype "bfloat16" trains bfloat16 weights, with float32
    masters in the optimizer; with autocast the weights are float32 and torch.autocast computes in bfloat16. Evaluation
    and checkpoints come every so many steps (0: at the end only); eval_tokens bounds the evaluations on the way.
    ValueError names the option that is wrong. The step: AdamW, Loshchilov and Hutter, arXiv 1711.05101.
    """

    steps: int | None = 1500
    minutes: float | None = None
    batch_size: int = 16
    lr: float = 1e-3
    final_lr: float = 0.1
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    residual_init: str = "scaled"
    dtype: str = "float32"
    autocast: bool = False
    eval_every: int = 250
    eval_tokens: int = 100_000
    checkpoint_every: int = 500
    seed: int = 0
    recompute: bool = False
    batches: str = "blocks"

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("train: steps and minutes are both None: nothing would end the run")
        for name, least in INTEGERS.items():
            value = getattr(self, name)
            if value is None and name == "steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(f"train: {name} is {value!r} but must be an integer of at least {least}")
        for name, most in NUMBERS.items():
            value = getattr(self, name)
            if value is None and name == "minutes":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= most:
                raise ValueError(f"train: {name} is {value!r} but must be a number from 0 to {most:g}")
        if self.minutes == 0 or self.beta1 == 1.0 or self.beta2 == 1.0:
            raise ValueError("train: minutes must be above 0, beta1 and beta2 below 1")
        if not isinstance(self.recompute, bool):
            raise ValueError(f"train: recompute is {self.recompute!r} but must be True or False")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"train: {name} is {getattr(self, name)!r} but must be one of {', '.join(choices)}")
        if not isinstance(self.autocast, bool):
            raise ValueError(f"train: autocast is {self.autocast!r} but must be True or False")
        if self.autocast and self.dtype == "float32":
            raise ValueError("train: autocast computes in bfloat16 but dtype is 'float32': choose dtype bfloat16")

    def split(self, wanted: str | None) -> str | None:
        """What the corpus is to be split into for these batches, "files" unless wanted says otherwise; None for blocks.

        ValueError when something is wanted for blocks, which are cut from the whole text.
        """
        if self.batches != "blocks":
            return "files" if wanted is None else wanted
        if wanted is not None:
            raise ValueError(f"train: split {wanted} is for texts, but batches is 'blocks': choose padded or packed")
        return None

    def fraction(self, step: int, seconds: float) -> float:
        """How much of the run lies behind, 0 to 1, after so many steps and seconds of training."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_clock = 0.0 if self.minutes is None else seconds / (60.0 * self.minutes)
        return min(1.0, max(by_steps, by_clock))

    def learning_rate(self, step: int, seconds: float = 0.0) -> float:
        """The rate of the step that follows `step` finished ones."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        fraction = self.fraction(step, seconds)
        fall = {"cosine": 0.5 - 0.5 * math.cos(math.pi * fraction), "linear": fraction, "constant": 0.0}[self.schedule]
        return self.lr * rising * (1.0 - (1.0 - self.final_lr) * fall)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; from_dict gives equal options back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainOptions":
        """ValueError names a field that is unknown or unusable."""
        known = {field.name for field in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"train: unknown option {str(unknown[0])[:40]!r}")
        return cls(**values)
