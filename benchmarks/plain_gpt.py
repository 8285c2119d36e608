"""A GPT in plain torch, the rival of pykern.lm: the calls one would write without pykern, none slow on purpose."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x)) for x [B, T, n_embd]."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.c_out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.c_fc, self.c_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, past: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, past : past + T] = new
            k, v = (kept[:, :, : past + T] for kept in cache)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.c_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 with learned positions and a tied head."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.n_head, self.block_size = n_head, block_size
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def hidden(self, ids: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None, past: int = 0) -> Tensor:
        """[B, T, n_embd] for ids [B, T] at positions past, past + 1, ..."""
        x = self.wte(ids) + self.wpe(torch.arange(past, past + ids.shape[1], device=ids.device))
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i], past)
        return self.ln_f(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.hidden(ids), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def caches(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Room for block_size keys and values per layer, random: zeros would be a gift."""
        head = self.wte.weight.shape[1] // self.n_head
        shape = (batch, self.n_head, self.block_size, head)
        device = self.wte.weight.device
        return [tuple(torch.randn(shape, device=device).to(dtype) for _ in "kv") for _ in self.h]

    @torch.no_grad()
    def step(self, ids: Tensor, caches: list[tuple[Tensor, Tensor]], past: int) -> Tensor:
        """Logits [B, V] after one more token per text, ids [B]."""
        return F.linear(self.hidden(ids[:, None], caches, past)[:, -1], self.wte.weight)
