"""patch(model): modules of a transformers model computed by pykern, in place and reversibly.

torch.nn.Linear, LayerNorm, root-mean-square norms, MLPs, and the language-model loss. Attention is register()'s.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pykern.integrations.transformers.attention import is_registered
from pykern.integrations.transformers.loss import replacement as loss_replacement
from pykern.integrations.transformers.modules import EXACT, mlp_names, mlp_replacement, rms_replacement

KINDS = ("linear", "norm", "mlp", "loss")


class Patch:
    """What patch() did: replaced and left, {module's name: by what, or why not}; report, the same as a text; undo().

    As a context manager it undoes itself at the end.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._classes: dict[str, str] = {}
        self._steps: list[Callable[[], None]] = []

    def _note(self, found: dict[str, str], name: str, kind: str, words: str) -> None:
        found[name] = words
        self._classes[name] = kind

    def _swap(self, name: str, module: torch.nn.Module, new: type, words: str) -> None:
        old = type(module)

        def back() -> None:
            if type(module) is not new:
                raise RuntimeError(
                    f"Patch.undo: {name} is a {type(module).__name__} that somebody else made after patch(); "
                    "take that away first"
                )
            module.__class__ = old

        module.__class__ = new
        self._steps.append(back)
        self._note(self.replaced, name, old.__name__, words)

    def _set_loss(self, name: str, model: Any, new: Callable[..., Any], words: str) -> None:
        before = vars(model).get("_loss_function")

        def back() -> None:
            if before is None:
                del model._loss_function
            else:
                model.loss_function = before

        model.loss_function = new
        self._steps.append(back)
        self._note(self.replaced, name, words, "pykern.cross_entropy")

    @property
    def report(self) -> str:
        """One line for each class of modules and what became of it, with their number and the first one's name."""
        lines = []
        for title, found in (("replaced", self.replaced), ("left", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for name, words in found.items():
                groups.setdefault((self._classes[name], words), []).append(name)
            lines.append(f"{title}: {len(found)}")
            for (kind, words), names in groups.items():
                lines.append(f"  {len(names)} x {kind}, {names[0]}{' ...' if len(names) > 1 else ''}: {words}")
        return "\n".join(lines)

    def undo(self) -> None:
        """The model as it was. A second call does nothing."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _candidate(module: torch.nn.Module, kinds: frozenset[str]) -> tuple[type | None, str] | None:
    """(the class that takes this one's place or None, a word on it); None for modules that pykern has nothing for."""
    kind = type(module)
    name = kind.__name__
    if kind in EXACT and ("linear" if kind is torch.nn.Linear else "norm") in kinds:
        return EXACT[kind]
    if kind in EXACT:
        return None
    if kind in [new for new, _ in EXACT.values()] or hasattr(kind, "pykern_op"):
        return None, "is pykern's already"
    if "linear" in kinds and isinstance(module, torch.nn.Linear):
        return None, "has a class of its own that may compute something else than torch.nn.Linear"
    if "linear" in kinds and name == "Conv1D":
        return None, "keeps its weight as [K, N]; pykern.linear reads [N, K] and would copy it in each call"
    if "norm" in kinds and ("RMSNorm" in name or name.endswith("LayerNorm")):
        return rms_replacement(module)
    names = mlp_names(module) if "mlp" in kinds else None
    return None if names is None else mlp_replacement(module, names)


def _losses(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The model and its submodels that have a head: those of transformers with a loss of their own."""
    for name, module in model.named_modules():
        if hasattr(type(module), "loss_function") and module.get_output_embeddings() is not None:
            yield f"{name}.loss" if name else "loss", module


def patch(
    model: torch.nn.Module, *, linear: bool = True, norm: bool = True, mlp: bool = True, loss: bool = True
) -> Patch:
    """Replaces what pykern computes in this model; print(patch(model).report) says what, and what not and why.

    Parameters stay the same tensors under the same names. linear, norm, mlp and loss choose kinds. Results and
    gradients are those of the model before, up to rounding.
    """
    kinds = frozenset(kind for kind, on in zip(KINDS, (linear, norm, mlp, loss), strict=True) if on)
    done = Patch()
    found = []
    for name, module in model.named_modules():  # all of them before any changes: an MLP looks at its layers
        candidate = _candidate(module, kinds)
        if candidate is not None and "forward" in vars(module):
            candidate = None, "has a forward of its own, set on the instance"
        if candidate is not None:
            found.append((name, module, *candidate))
    for name, module, new, words in found:
        if new is None:
            done._note(done.left, name, type(module).__name__, words)
        else:
            done._swap(name, module, new, words)
    for name, module in _losses(model) if loss else ():
        function, words = loss_replacement(module)
        if function is None:
            done._note(done.left, name, "loss", words)
        else:
            done._set_loss(name, module, function, words)
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation is not None and is_registered(implementation):
        done._note(done.replaced, "attention", implementation, "pykern.attention, by its attn_implementation")
    elif implementation is not None:
        done._note(done.left, "attention", implementation, "is chosen by register() and attn_implementation")
    return done
