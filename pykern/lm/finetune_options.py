"""How a checkpoint is fine-tuned: every choice and number of a run, checked. No torch is imported here."""

import math
from dataclasses import dataclass

from pykern.lm.options import TrainOptions

RATES = {"whole": 1e-3, "frozen": 1e-2, "lora": 2e-3}  # learning rates: a new head and adapters start from nothing
CLASS_WEIGHTS = ("none", "balanced")
EVALUATIONS = 10  # of a run, unless eval_every says otherwise
EPOCHS = 3.0


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """A run of `steps` steps, or of `epochs` passes over the training part (3 when both are None).

    freeze_body trains the head alone; lora is the rank of adapters on a frozen body, alpha lora_alpha (None: the rank).
    lr None: 1e-3, with freeze_body 1e-2, with lora 2e-3. It rises over the first tenth of the steps, then falls to 0.
    dtype "bfloat16" keeps float32 weights and multiplies in bfloat16 (torch.autocast). patience 0: never end early.
    class_weights "balanced" gives every class the same share of the loss. held_out: the share of the labelled texts
    (of a language model's text, pykern.lm.corpus decides). ValueError names the option that is wrong.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    lr: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: str = "float32"
    eval_every: int | None = None
    eval_tokens: int = 100_000
    patience: int = 0
    freeze_body: bool = False
    lora: int | None = None
    lora_alpha: float | None = None
    class_weights: str = "none"
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("finetune: steps and epochs are both given: choose one")
        for name, least in (("eval_every", 1), ("patience", 0), ("lora", 1)):
            value = getattr(self, name)
            if value is None and name != "patience":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise ValueError(f"finetune: {name} is {value!r} but must be an integer of at least {least}")
        for name, most in (("epochs", 1e6), ("lora_alpha", 1e9)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= most:
                raise ValueError(f"finetune: {name} is {value!r} but must be a number above 0, at most {most:g}")
        if not isinstance(self.held_out, float) or not 0.0 < self.held_out < 1.0:
            raise ValueError(f"finetune: held_out is {self.held_out!r} but must be between 0 and 1")
        if not isinstance(self.freeze_body, bool):
            raise ValueError(f"finetune: freeze_body is {self.freeze_body!r} but must be True or False")
        if self.freeze_body and self.lora is not None:
            raise ValueError(
                "finetune: freeze_body trains the head alone, lora trains adapters in the body: choose one"
            )
        if self.lora_alpha is not None and self.lora is None:
            raise ValueError("finetune: lora_alpha needs lora, the rank")
        if self.class_weights not in CLASS_WEIGHTS:
            raise ValueError(
                f"finetune: class_weights is {self.class_weights!r} but must be {' or '.join(CLASS_WEIGHTS)}"
            )
        self.training(1 if self.steps is None else self.steps)  # checks the rest

    @property
    def mode(self) -> str:
        """What is trained: "whole", "frozen" or "lora"."""
        return "frozen" if self.freeze_body else "whole" if self.lora is None else "lora"

    def steps_for(self, blocks: int) -> int:
        """Steps of the run when an epoch has so many texts or blocks of text."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((EPOCHS if self.epochs is None else self.epochs) * blocks / self.batch_size))

    def training(self, steps: int) -> TrainOptions:
        """The same in the terms of pykern.lm.TrainOptions."""
        return TrainOptions(
            steps=steps,
            batch_size=self.batch_size,
            lr=RATES[self.mode] if self.lr is None else self.lr,
            final_lr=0.0,
            warmup=steps // 10,
            schedule="linear",
            weight_decay=self.weight_decay,
            clip=self.clip,
            dtype=self.dtype,
            autocast=self.dtype == "bfloat16",
            eval_every=max(1, steps // EVALUATIONS) if self.eval_every is None else self.eval_every,
            eval_tokens=self.eval_tokens,
            seed=self.seed,
        )
