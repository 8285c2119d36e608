"""Where a model looks: the attention weights of every layer and head for one text, as numbers and as a picture.

weights[layer, head, t, s] = exp(score(t, s) - lse(t)),   s <= t, a row sums to 1
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern import ops
from pykern.lm.files import replace_file
from pykern.lm.model import Transformer

MOST_TOKENS = 512  # of a text: the weights of 12 layers of 12 heads are 150 MB then


class _Recorder:
    """Stands in for the cache of one block: attends as the block would, and keeps the weights."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out, lse = ops.attention(q, k, v, causal=True, return_lse=True, **options)
        self.weights = ops.attention_weights(q, k, lse, causal=True, **options)
        return out


@torch.no_grad()
def attention_maps(model: Transformer, ids: Sequence[int] | Tensor) -> Tensor:
    """The weights float32 [n_layer, n_head, T, T] for ids [T], by the kernel that decodes them (attention_weights).

    They are on the CPU wherever the model is.

    TypeError: model is no Transformer. ValueError: no ids, more than block_size or 512. IndexError: an id out of range.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"attention_maps: model must be a Transformer, got {type(model).__name__}")
    row = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    most = min(model.config.block_size, MOST_TOKENS)
    if row.dim() != 1 or not 1 <= len(row) <= most:
        raise ValueError(f"attention_maps: ids have shape {tuple(row.shape)} but must be [T] with T from 1 to {most}")
    if int(row.min()) < 0 or int(row.max()) >= model.config.vocab_size:
        raise IndexError(f"attention_maps: ids must lie from 0 to {model.config.vocab_size - 1}")
    training = model.training
    model.eval()
    try:
        x = model.embed(row[None], 0)
        place = model.position_arguments(0, len(row), x)
        maps = []
        for block in model.transformer.h:
            recorder = _Recorder()
            x = block(x, **place, cache=recorder)
            assert recorder.weights is not None
            maps.append(recorder.weights[0].float().cpu())
    finally:
        model.train(training)
    return torch.stack(maps)


def shown(token: str) -> str:
    """A token as one short visible word."""
    visible = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    visible = "".join(c if c.isprintable() else "�" for c in visible) or "∅"
    return visible if len(visible) <= 12 else visible[:11] + "…"


def check_maps(function: str, maps: Tensor, tokens: Sequence[str]) -> None:
    """ValueError unless maps [layers, heads, T, T] belong to T tokens."""
    if maps.dim() != 4 or maps.shape[2:] != (len(tokens), len(tokens)):
        raise ValueError(
            f"{function}: maps have shape {tuple(maps.shape)}, expected [layers, heads, T, T] for {len(tokens)} tokens"
        )


def chosen(maps: Tensor, layer: int | None, head: int | None) -> tuple[list[int], list[int]]:
    """The layers and heads to draw, from 0; None: all. IndexError names one that is not there."""
    picked = []
    for name, number, count in (("layer", layer, maps.shape[0]), ("head", head, maps.shape[1])):
        if number is not None and not 0 <= number < count:
            raise IndexError(f"attention maps: {name} is {number}, but the model has {count}, counted from 0")
        picked.append(list(range(count)) if number is None else [number])
    return picked[0], picked[1]


def plot_attention(
    maps: Tensor,
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    layer: int | None = None,
    head: int | None = None,
) -> None:
    """A PNG: a square per layer (row) and head (column), query tokens down, key tokens across; darker is more.

    Tokens are written at the axes of a single square of at most 60. ValueError, IndexError: maps, layer, head.
    """
    check_maps("plot_attention", maps, tokens)
    layers, heads = chosen(maps, layer, head)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    single = len(layers) == len(heads) == 1
    T = len(tokens)
    side = min(14.0, max(5.0, 0.24 * T + 1.5)) if single else 1.9
    figure = Figure(figsize=(side * len(heads) + 0.6, side * len(layers) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    image: Any = None
    for axes_row, i in zip(grid, layers, strict=True):
        for axes, j in zip(axes_row, heads, strict=True):
            image = axes.imshow(maps[i, j].numpy(), cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set_title(f"layer {i}, head {j}", fontsize=9)
            if single and T <= 60:
                axes.set_xticks(range(T), [shown(t) for t in tokens], rotation=90, fontsize=8)
                axes.set_yticks(range(T), [shown(t) for t in tokens], fontsize=8)
                axes.set(xlabel="looks at", ylabel="token")
            else:
                axes.set_xticks([])
                axes.set_yticks([])
    figure.colorbar(image, ax=grid, shrink=0.8 if single else 0.5, label="attention weight")
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
