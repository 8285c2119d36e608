"""What the commands of the command line share: a parser that refuses in one line, options, threads, a checkpoint."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the long usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flag(group: Any, name: str, kind: Any, text: str, default: Any = None) -> None:
    """An option that is absent from the parsed arguments unless it was given; the default is shown in its help."""
    if kind is bool:  # --name or --no-name
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    shown = text if default is None else f"{text} (default {default})"
    choices = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
    group.add_argument(flag(name), default=argparse.SUPPRESS, help=shown, **choices)


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_threads(parser: Parser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def set_threads(n: int | None) -> None:
    if n is None:
        return
    if not 1 <= n <= 1024:
        raise ValueError(f"--threads is {n} but must be from 1 to 1024")
    import torch

    torch.set_num_threads(n)


def load_model(folder: str) -> tuple[Any, Any]:
    """(Transformer, Tokenizer) of a checkpoint folder."""
    from pykern.lm.checkpoint import load_checkpoint
    from pykern.lm.model import Transformer, expected_tensors

    loaded = load_checkpoint(folder, expected=expected_tensors, training=False)
    if loaded.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json")
    return Transformer.from_checkpoint(loaded), loaded.tokenizer


def require_device(device: str) -> None:
    """ValueError unless torch sees the device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no NVIDIA GPU here")


def plot_path(name: str) -> Path:
    """The file of --plot; one that cannot be written is refused now, not after the work."""
    path = Path(name)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: no such folder: {path.parent}")
    if path.is_dir():
        raise ValueError(f"--plot: {path} is a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'pykern[lm]'")
    return path
