"""A small Transformer trained under torch.autocast in bfloat16, beside the same training in float32.

    python examples/autocast.py
    python examples/autocast.py --steps 10        a short run, to see that everything works

Weights, gradients and the optimiser's averages stay float32; pykern's ops follow autocast as torch's do: products and
attention take and give bfloat16, the loss is float32. bfloat16 has float32's range, so no loss is scaled. The text is
the source of Python's textwrap module, the task its next character. Whether bfloat16 is faster depends on the
processor: those with AVX-512 BF16 multiply it at twice the speed, others convert it.
"""

import argparse
import textwrap
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import pykern
from pykern.nn import Embedding, LayerNorm, LinearCrossEntropyLoss, TransformerBlock

BATCH, BLOCK, WIDTH, HEADS, LAYERS = 8, 64, 64, 2, 2


class CharacterModel(nn.Module):
    """ids and targets [B, T] to the mean cross entropy; the logits of all characters are never in memory at once."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.positions = Embedding(characters, WIDTH), Embedding(BLOCK, WIDTH)
        self.blocks = nn.ModuleList(TransformerBlock(WIDTH, HEADS) for _ in range(LAYERS))
        self.norm = LayerNorm(WIDTH)
        self.head = LinearCrossEntropyLoss(WIDTH, characters)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x), targets)


def train(ids: Tensor, characters: int, steps: int, *, dtype: torch.dtype) -> tuple[list[float], float, set[str]]:
    """(losses, seconds, dtypes that attention saw) of steps that draw the same batches whatever the dtype."""
    torch.manual_seed(0)
    model, generator = CharacterModel(characters), torch.Generator().manual_seed(1)
    optimizer = pykern.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    seen: set[str] = set()
    model.blocks[0].attn.c_proj.register_forward_pre_hook(lambda _, given: seen.add(str(given[0].dtype)))
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        starts = torch.randint(len(ids) - BLOCK, (BATCH, 1), generator=generator)
        pieces = ids[starts + torch.arange(BLOCK + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(pieces[:, :-1], pieces[:, 1:])
        loss.backward()  # outside autocast, as torch advises: backward runs in the dtypes that forward chose
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise TypeError("a weight is no longer float32")
    return losses, time.perf_counter() - start, seen


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description="Train under torch.autocast, beside float32.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run (default 300)")
    options = parser.parse_args(argv)
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in text])
    losses = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        losses[name], seconds, seen = train(ids, len(letters), options.steps, dtype=dtype)
        last = losses[name][-20:]
        print(
            f"{name}: loss {losses[name][0]:.3f} -> {sum(last) / len(last):.3f} nats per character, "
            f"{1e3 * seconds / options.steps:.1f} ms a step, attention's output is {', '.join(sorted(seen))}"
        )
    return losses


if __name__ == "__main__":
    main()
