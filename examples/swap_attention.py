"""An existing torch model gets pykern's attention in two ways, keeps its weights, and gives the same numbers.

    python examples/swap_attention.py
    python examples/swap_attention.py --length 64 --seconds 0.1       smaller and shorter

The model below is plain torch: a classifier of texts of different lengths with torch.nn.MultiheadAttention inside.

1. Its attention modules are replaced by pykern.nn.MultiheadAttention, which takes the twin's weights as they are.
2. Code that calls F.scaled_dot_product_attention is left alone, and the function is replaced.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykern

TOLERANCE = 1e-4  # float32: two summation orders over a few hundred keys, and two layers


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), as many have written it."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_head, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """ids [B, T] and padding [B, T], True where there is no token, to logits [B, classes]."""

    def __init__(self, vocab_size: int, width: int, n_head: int, n_layer: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, padding)
        real = ~padding[..., None]
        return self.head((x * real).sum(1) / real.sum(1))


def swap(model: nn.Module) -> int:
    """Replace each torch.nn.MultiheadAttention in the model by pykern's, with its weights; how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.MultiheadAttention:
                twin = pykern.nn.MultiheadAttention(
                    child.embed_dim, child.num_heads, child.dropout, batch_first=child.batch_first
                )
                twin.load_state_dict(child.state_dict())
                setattr(parent, name, twin.train(child.training))
                count += 1
    return count


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """The least of the times of calls made one after another for so long."""
    call()
    best, stop = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < stop:
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def swap_modules(length: int, seconds: float) -> None:
    torch.manual_seed(0)
    B, classes = 4, 5
    theirs = Classifier(vocab_size=100, width=128, n_head=4, n_layer=2, classes=classes)
    ours = copy.deepcopy(theirs)
    print(f"{swap(ours)} attention modules replaced, the others left")
    ids, labels = torch.randint(100, (B, length)), torch.randint(classes, (B,))
    padding = torch.arange(length) >= torch.tensor([[length], [length * 3 // 4], [length // 2], [1]])

    losses = {}
    for name, model in (("torch", theirs), ("pykern", ours)):
        losses[name] = F.cross_entropy(model(ids, padding), labels)
        losses[name].backward()
    difference = max(worst(a.grad, b.grad) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    print(f"loss {losses['torch']:.6f} and {losses['pykern']:.6f}, gradients differ by {difference:.1e} at most")
    if worst(losses["torch"], losses["pykern"]) > TOLERANCE or difference > TOLERANCE:
        raise ArithmeticError(f"pykern's attention gives other numbers, off by more than {TOLERANCE}")

    for name, model in (("torch", theirs), ("pykern", ours)):
        taken = milliseconds(lambda model=model: F.cross_entropy(model(ids, padding), labels).backward(), seconds)
        print(f"forward and backward of the whole model with {name}'s attention: {taken:.1f} ms")


def swap_function(length: int) -> None:
    q, k, v = (torch.randn(2, 4, length, 32) for _ in range(3))
    theirs = F.scaled_dot_product_attention
    expected = theirs(q, k, v, is_causal=True)
    F.scaled_dot_product_attention = pykern.scaled_dot_product_attention
    try:
        difference = worst(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)
    finally:
        F.scaled_dot_product_attention = theirs  # a program that means it leaves this out
    print(f"F.scaled_dot_product_attention replaced: outputs differ by {difference:.1e} at most")
    if difference > TOLERANCE:
        raise ArithmeticError(f"pykern's attention gives other numbers, off by more than {TOLERANCE}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Replace the attention of an existing torch model.")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest text (default 256)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each timing (default 2)")
    options = parser.parse_args(argv)
    swap_modules(options.length, options.seconds)
    swap_function(options.length)
    print(pykern.explain("scaled_dot_product_attention", torch.randn(2, 4, options.length, 32)))


if __name__ == "__main__":
    main()
