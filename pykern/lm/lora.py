"""LoRA: a frozen matrix W [N, K] becomes W + (alpha / r) B A, with only A [r, K] and B [N, r] trained.

"LoRA: Low-Rank Adaptation of Large Language Models", Hu et al., 2021 (arXiv 2106.09685), section 4.1: A starts normal,
B zero, so the model starts as it was. The layers see one weight, the sum, so fused ops stay fused and a merged model is
an ordinary one. What is saved is memory of the optimizer, not time: the gradient of the sum is computed whole.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pykern import nn, ops
from pykern.lm.checkpoint import read_tensors
from pykern.lm.files import json_bytes, read_json, replace_file

TARGETS = ("c_attn", "c_proj", "c_fc", "c_gate")
ADAPTER, ADAPTER_TENSORS = "adapter.json", "adapter.safetensors"
FORMAT = "pykern-lora-1"
MAX_ADAPTER_BYTES = 64 << 10


class LowRank(torch.nn.Module):
    """weight [N, K] -> weight + scale * B A, for the parameters A [rank, K] and B [N, rank]."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator | None) -> None:
        super().__init__()
        N, K = weight.shape
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        noise = torch.randn(rank, K, generator=generator, dtype=torch.float32) / math.sqrt(K)
        self.A = torch.nn.Parameter(noise.to(weight.device, weight.dtype))
        self.B = torch.nn.Parameter(weight.new_zeros(N, rank))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is exact; whoever multiplies by it may round
            return ops.linear(self.scale * self.B, self.A.mT, residual=weight)


def _check_rank(rank: object, alpha: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"add_lora: rank must be an integer, got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"add_lora: rank is {rank} but must be at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"add_lora: alpha must be a number, got {type(alpha).__name__}")
    if not 0.0 < alpha <= 1e9:
        raise ValueError(f"add_lora: alpha is {alpha} but must be above 0 and at most 1e9")


def _layers(model: torch.nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The Linear layers of the blocks with these names, by their full names."""
    if isinstance(targets, str):
        raise TypeError("add_lora: targets must be a sequence of names, got str")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        raise ValueError(f"add_lora: targets has {unknown[0]!r} but the names are {', '.join(TARGETS)}")
    pattern = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.(" + "|".join(targets) + ")$")
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.search(name)
    }
    if not targets or not found:
        raise ValueError(f"add_lora: the blocks have no layer named {' or '.join(targets) or 'by an empty targets'}")
    return found


def adapters(model: torch.nn.Module) -> dict[str, LowRank]:
    """The LowRank of every layer that has one, by the name of the layer."""
    return {
        name: module.parametrizations["weight"][0]  # type: ignore[index,misc]
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], LowRank)  # type: ignore[index]
    }


def add_lora(
    model: torch.nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    *,
    seed: int = 0,
) -> None:
    """Gives the layers `targets` of every block a LowRank of their own, and freezes all else in `model`.

    alpha None: rank, a scale of 1. A is normal with variance 1 / K, drawn from seed; B is zero. TypeError or ValueError
    for a rank that is not from 1 to the smaller side of every matrix, an alpha that is not a positive number, an
    unknown target, or a model that has LoRA already: then the model is unchanged.
    """
    alpha = rank if alpha is None else alpha
    _check_rank(rank, alpha)
    layers = _layers(model, targets)
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise ValueError(f"add_lora: {name} has a parametrization already: merge_lora first")
        if rank > min(layer.weight.shape):
            raise ValueError(f"add_lora: rank is {rank} but {name} has shape {list(layer.weight.shape)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, float(alpha), generator))


def merge_lora(model: torch.nn.Module) -> None:
    """Replaces every W and its A and B by the one weight W + (alpha / r) B A, bit for bit what the layer used before.

    All parameters can be trained again. ValueError when the model has no LoRA.
    """
    names = list(adapters(model))
    if not names:
        raise ValueError("merge_lora: the model has no LoRA")
    for name in names:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)
    model.requires_grad_(True)


def lora_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trained tensors, NAME.lora_A [r, K] and NAME.lora_B [N, r] for every layer NAME; views, not copies."""
    return {
        f"{name}.lora_{letter}": getattr(adapter, letter).detach()
        for name, adapter in adapters(model).items()
        for letter in ("A", "B")
    }


def plain_state(model: torch.nn.Module, *, merged: bool = True) -> dict[str, Tensor]:
    """The parameters under their usual names: with merged the sums, else the frozen W."""
    state = {name: p.detach() for name, p in model.named_parameters() if ".parametrizations." not in name}
    for name in adapters(model):
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            state[f"{name}.weight"] = layer.weight if merged else layer.parametrizations.weight.original
    return {name: value.detach() for name, value in state.items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and float32 values: whether an adapter or a head belongs to these weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of these tensors in float32, complete or not there."""
    from safetensors.torch import save

    data = save({name: value.detach().float().cpu().clone() for name, value in tensors.items()})
    replace_file(path, lambda temporary: temporary.write_bytes(data))


def save_adapter(model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes adapter.safetensors (lora_state, float32) and adapter.json (rank, alpha, targets, SHA-256 of the base)."""
    found = adapters(model)
    if not found:
        raise ValueError("save_adapter: the model has no LoRA")
    one = next(iter(found.values()))
    used = {name.rpartition(".")[2] for name in found}
    description = {
        "format": FORMAT,
        "rank": one.rank,
        "alpha": one.alpha,
        "targets": [name for name in TARGETS if name in used],
        "base": fingerprint(plain_state(model, merged=False)),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER_TENSORS, lora_state(model))
    replace_file(folder / ADAPTER, lambda temporary: temporary.write_bytes(json_bytes(description)))


def load_adapter(model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """add_lora with the A and B that save_adapter wrote. The model must hold the weights they were trained on.

    FileNotFoundError, or ValueError naming the file: not an adapter, another base, a tensor missing or of another
    shape. The model is changed only when everything fits.
    """
    path, tensors_path = Path(folder, ADAPTER), Path(folder, ADAPTER_TENSORS)
    values = read_json(path, MAX_ADAPTER_BYTES)
    rank, alpha, targets, base = (values.get(key) for key in ("rank", "alpha", "targets", "base"))
    if values.get("format") != FORMAT or not isinstance(base, str):
        raise ValueError(f"{path}: not a {FORMAT} file")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{path}: targets must be a list of names, got {json.dumps(targets)[:60]}")
    try:
        _check_rank(rank, alpha)
        layers = _layers(model, targets)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if adapters(model):
        raise ValueError("load_adapter: the model has LoRA already: merge_lora first")
    if base != fingerprint(plain_state(model)):
        raise ValueError(f"{path}: the adapter was trained on other weights than those of this model")
    expected: dict[str, Tensor] = {}
    for name, layer in layers.items():
        N, K = layer.weight.shape
        if rank > min(N, K):  # type: ignore[operator]
            raise ValueError(f"{path}: rank is {rank} but {name} has shape {[N, K]}")
        expected[f"{name}.lora_A"] = torch.empty(rank, K, device="meta")  # type: ignore[arg-type]
        expected[f"{name}.lora_B"] = torch.empty(N, rank, device="meta")  # type: ignore[arg-type]
    tensors = read_tensors(tensors_path, expected)
    add_lora(model, rank, alpha, targets)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in lora_state(model).items():
            value.copy_(tensors[name])
