"""The training state of a checkpoint, training.json: where a run stands, and on what it was started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pykern.lm.corpus import SPLITS
from pykern.lm.options import TrainOptions

CORPUS = ("source", "sha256", "description")  # what is remembered of the text


@dataclass(frozen=True)
class State:
    """What training.json holds. tokens: the targets so far, None in files from before they were counted.

    split: what the corpus was cut into, "files", "lines" or "paragraphs"; None: blocks.
    """

    step: int
    tokens: int | None
    seconds: float
    options: TrainOptions
    source: str
    sha256: str
    description: str
    split: str | None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def read_state(values: dict[str, Any] | None, out: Path) -> State:
    """The training state of the checkpoint in `out`; ValueError when there is none or it makes no sense."""
    if values is None:
        raise ValueError(f"train: {out} has no training state, so it cannot be resumed")
    step, tokens, seconds, options, text = (
        values.get(name) for name in ("step", "tokens", "seconds", "options", "corpus")
    )
    if (
        _is_count(step)
        and (_is_count(tokens) or (tokens is None and isinstance(text, dict) and text.get("split") is None))
        and isinstance(seconds, int | float)
        and 0.0 <= seconds < 2**62
        and isinstance(options, dict)
        and isinstance(text, dict)
        and all(isinstance(text.get(name), str) for name in CORPUS)
        and text.get("split") in (None, *SPLITS)
    ):
        corpus = (*(text[name] for name in CORPUS), text.get("split"))
        return State(step, tokens, float(seconds), TrainOptions.from_dict(options), *corpus)
    raise ValueError(f"train: the training state in {out} makes no sense, so it cannot be resumed")
