"""Two models built from the modules: a classifier of two layers, and a small Transformer language model."""

from typing import Any

import numpy as np

from . import inputs
from .activation import GELU, Sigmoid
from .arithmetic import Add, MergeHeads, SplitHeads
from .attention import Attention
from .cross_entropy import CrossEntropy, SoftmaxCrossEntropy
from .embedding import Embedding
from .engine import Module, Network, no_tape
from .linear import Linear
from .norm import LayerNorm
from .softmax import Softmax


class NeuralNetwork(Network):
    """Linear, Sigmoid, Linear, Softmax: x [..., n_in] to probabilities [..., n_out]; with targets, CrossEntropy too.

    Formula: softmax(w2 sigmoid(w1 x + c1) + c2).
    """

    def __init__(self, n_in: int, n_hidden: int, n_out: int, *, rng: Any = None):
        rng = np.random.default_rng(rng)
        self.linear1 = Linear(n_in, n_hidden, rng=rng)
        self.sigmoid = Sigmoid()
        self.linear2 = Linear(n_hidden, n_out, rng=rng)
        self.softmax = Softmax()
        self.cross_entropy = CrossEntropy()

    def connect(self, x: Module, targets: Module | None = None) -> Module:
        hidden = self.sigmoid(self.linear1(x))
        probabilities = self.softmax(self.linear2(hidden))
        return probabilities if targets is None else self.cross_entropy(probabilities, targets)


class TransformerBlock(Network):
    """x + attention(norm(x)), then x + mlp(norm(x)), for x [B, T, n_embd]."""

    def __init__(self, n_embd: int, n_head: int, *, rng: Any = None):
        inputs.positive("TransformerBlock", n_embd=n_embd, n_head=n_head)
        if n_embd % n_head:
            raise ValueError(f"TransformerBlock: n_embd is {n_embd}, which {n_head} heads do not divide")
        rng = np.random.default_rng(rng)
        self.norm1, self.norm2 = LayerNorm(n_embd), LayerNorm(n_embd)
        self.query, self.key, self.value, self.project = (Linear(n_embd, n_embd, rng=rng) for _ in range(4))
        self.expand, self.contract = Linear(n_embd, 4 * n_embd, rng=rng), Linear(4 * n_embd, n_embd, rng=rng)
        self.split, self.attention, self.merge = SplitHeads(n_head), Attention(causal=True), MergeHeads()
        self.gelu, self.add = GELU(tanh=True), Add()

    def connect(self, x: Module) -> Module:
        h = self.norm1(x)
        q, k, v = (self.split(linear(h)) for linear in (self.query, self.key, self.value))
        x = self.add(x, self.project(self.merge(self.attention(q, k, v))))
        h = self.norm2(x)
        return self.add(x, self.contract(self.gelu(self.expand(h))))


class TransformerLM(Network):
    """ids [B, T], T <= block_size, to logits [B, T, vocab_size] for the next token; with targets, the cross entropy.

    GPT-2's shape: learned positions, blocks that normalise first, and a head that shares the table of the tokens.
    Source: Radford et al. (GPT-2, 2019).
    """

    def __init__(
        self, vocab_size: int, block_size: int, *, n_layer: int = 2, n_head: int = 2, n_embd: int = 32, rng: Any = None
    ):
        inputs.positive("TransformerLM", vocab_size=vocab_size, block_size=block_size, n_layer=n_layer)
        rng = np.random.default_rng(rng)
        self.block_size = block_size
        self.tokens = Embedding(vocab_size, n_embd, rng=rng)
        self.positions = Embedding(block_size, n_embd, rng=rng)
        self.add = Add()
        self.blocks = [TransformerBlock(n_embd, n_head, rng=rng) for _ in range(n_layer)]
        self.norm = LayerNorm(n_embd)
        self.head = Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.cross_entropy = SoftmaxCrossEntropy()

    def connect(self, ids: Module, targets: Module | None = None) -> Module:
        T = self.length(ids.out_tensor)
        x = self.add(self.tokens(ids), self.positions(np.arange(T)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else self.cross_entropy(logits, targets)

    def length(self, ids: np.ndarray) -> int:
        inputs.rank("TransformerLM", "ids", ids, 2, exactly=True)
        if not 1 <= ids.shape[1] <= self.block_size:
            raise ValueError(f"TransformerLM: ids has {ids.shape[1]} positions, expected 1 .. {self.block_size}")
        return ids.shape[1]

    def generate(self, ids: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """ids [B, T] followed by the likeliest tokens, one at a time, each seeing the last block_size."""
        for _ in range(max_new_tokens):
            with no_tape():
                logits = self.apply_fwd(ids[:, -self.block_size :]).out_tensor
            ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
        return ids
