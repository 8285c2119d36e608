"""The language models of the benchmarks, and what a step of them costs at least."""

from dataclasses import dataclass

import torch

MOMENT_BYTES = 16  # of AdamW: two float32 moments, read and written


@dataclass(frozen=True)
class Model:
    """A GPT-2 shaped model with a tied head."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of pykern.lm.Config and of PlainGPT."""
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        return {name: getattr(self, name) for name in names}

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied by: 12 n_embd^2 per layer and the head."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd

    @property
    def parameters(self) -> int:
        """All of them: matrices, 13 n_embd of biases and norms per layer, positions, the last norm."""
        vectors = 13 * self.n_layer * self.n_embd + (self.block_size + 2) * self.n_embd
        return self.matrix_weights + vectors

    def attention_flops(self, B: int, T: int) -> float:
        """Causal self-attention of all layers, forward: 4 T T n_embd, half of it hidden."""
        return 2.0 * B * T * T * self.n_embd * self.n_layer

    def training_flops(self, B: int, T: int) -> float:
        """6 per weight and token, and 3.5 times the forward attention."""
        return 6.0 * self.matrix_weights * B * T + 3.5 * self.attention_flops(B, T)

    def decode_flops(self, B: int, context: int) -> float:
        """One token per text after `context` tokens: 2 per weight, and q k^T, p v over the keys."""
        return B * (2.0 * self.matrix_weights + 4.0 * (context + 1) * self.n_embd * self.n_layer)

    def decode_bytes(self, B: int, context: int, item: int) -> float:
        """Every weight once for all texts, every key and value once, the new ones written."""
        weights = self.matrix_weights + 13 * self.n_layer * self.n_embd + 2 * self.n_embd
        cache = 2 * B * (context + 1) * self.n_embd * self.n_layer
        return float(item * (weights + cache))


GPT2 = Model("gpt2 124M", 12, 12, 768, 1024, 50257)
SMALL = Model("23.6M", 6, 8, 512, 1024, 8192)
MINI = Model("0.9M", 4, 4, 128, 512, 256)
TINY = Model("tiny", 2, 2, 64, 64, 256)


def parameter_bytes(dtype: torch.dtype, clip: bool) -> int:
    """AdamW on one: moments; the weight, or its float32 master and the copy that is only written; the gradient.

    The norm has to be known before the first weight changes, so clipping reads every gradient once more.
    """
    weight = 8 if dtype == torch.float32 else 8 + dtype.itemsize
    return MOMENT_BYTES + weight + dtype.itemsize * (2 if clip else 1)
