# %% [markdown]
# Attention from its formula to a tiny language model, cell by cell.
#
#     python examples/walkthrough.py                 all of it
#     python examples/walkthrough.py --steps 10      a short training at the end
#
# The cells begin with "# %%": editors that know them (VS Code, Spyder, PyCharm; jupytext makes a notebook) run them one
# at a time. Each piece is first written in a few lines of torch and then compared with the kernel that does it at once.

# %%
import argparse
import math
import textwrap
from pathlib import Path

import torch
from torch import Tensor

import pykern
from pykern.lm import Config, Transformer

parser = argparse.ArgumentParser(description="Attention from its formula to a tiny language model.")
parser.add_argument("--steps", type=int, default=300, help="training steps of the language model (default 300)")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
torch.manual_seed(0)


def same(what: str, ours: Tensor, written_out: Tensor, tolerance: float = 1e-12) -> None:
    """Prints the largest difference, and stops the walk where it is more than rounding in float64."""
    worst = (ours - written_out).abs().max().item()
    print(f"{what}: largest difference {worst:.1e}")
    if not worst <= tolerance:
        raise ArithmeticError(f"{what}: the kernel and the formula differ by {worst}, more than {tolerance}")


# %% [markdown]
# ## 1. Scores
#
# T tokens, each with a query, a key and a value of D numbers. Token i asks with its query, and token j answers with the
# product of that query and its key: a score. Divided by sqrt(D), scores of random vectors have a variance of 1,
# whatever D is.

# %%
T, D = 5, 8
q, k, v = (torch.randn(T, D, dtype=torch.float64) for _ in range(3))
scores = q @ k.T / math.sqrt(D)
print("scores [T, T], row i: what token i gives to each token")
print(scores.numpy().round(2))

# %% [markdown]
# ## 2. Softmax
#
# exp() makes scores positive, and their sum makes them weights. Subtracting the largest score changes nothing in the
# quotient and keeps exp() from overflowing.

# %%
exponents = (scores - scores.amax(-1, keepdim=True)).exp()
weights = exponents / exponents.sum(-1, keepdim=True)
same("softmax", pykern.softmax(scores), weights)

# %% [markdown]
# ## 3. The mean of the values
#
# The output of token i is the mean of all values with the weights of row i. `pykern.attention` does the three steps at
# once and never holds all T x T weights. It takes [B, H, T, D]: texts and heads in front.

# %%
same("attention", pykern.attention(q[None, None], k[None, None], v[None, None])[0, 0], weights @ v)

# %% [markdown]
# ## 4. No look at the future
#
# A language model predicts token i + 1 from tokens 0 .. i: scores of later tokens become -inf, their weights 0.

# %%
future = torch.ones(T, T, dtype=torch.bool).triu(1)
causal = scores.masked_fill(future, -math.inf).softmax(-1)
print(causal.numpy().round(2))
same("causal attention", pykern.attention(q[None, None], k[None, None], v[None, None], causal=True)[0, 0], causal @ v)

# %% [markdown]
# ## 5. Several heads, and where they come from
#
# H heads of D numbers each look for different things. All queries, keys and values of a text x [B, T, H * D] come from
# one product with a matrix, and a second matrix mixes the outputs of the heads.

# %%
B, H = 2, 3
x = torch.randn(B, T, H * D, dtype=torch.float64)
W_in = torch.randn(3 * H * D, H * D, dtype=torch.float64) / math.sqrt(H * D)
W_out = torch.randn(H * D, H * D, dtype=torch.float64) / math.sqrt(H * D)


def split(rows: Tensor) -> Tensor:
    """[B, T, H * D] to [B, H, T, D]."""
    return rows.unflatten(-1, (H, D)).transpose(1, 2)


queries, keys, values = (split(part) for part in (x @ W_in.T).chunk(3, dim=-1))
weights = (queries @ keys.mT / math.sqrt(D)).masked_fill(future, -math.inf).softmax(-1)
by_hand = (weights @ values).transpose(1, 2).flatten(2) @ W_out.T

layer = pykern.nn.SelfAttention(H * D, H, bias=False, dtype=torch.float64)
with torch.no_grad():
    layer.c_attn.weight.copy_(W_in)
    layer.c_proj.weight.copy_(W_out)
same("self-attention layer", layer(x), by_hand)

# %% [markdown]
# ## 6. The gradient
#
# torch finds the gradient of the cell above by itself. The kernel has a backward pass of its own, which computes the
# weights once more instead of keeping them.

# %%
leaves = [y.detach().requires_grad_() for y in (queries, keys, values)]
dout = torch.randn(B, H, T, D, dtype=torch.float64)
ours = torch.autograd.grad(pykern.attention(*leaves, causal=True), leaves, dout)
written_out = (leaves[0] @ leaves[1].mT / math.sqrt(D)).masked_fill(future, -math.inf).softmax(-1) @ leaves[2]
for name, a, b in zip("qkv", ours, torch.autograd.grad(written_out, leaves, dout), strict=True):
    same(f"gradient of {name}", a, b)

# %% [markdown]
# ## 7. Reading on with a cache
#
# A generated text grows by a token at a time. Keys and values of the tokens before are kept, and the new query
# attends to them: with the same bits as in the pass over the whole text.

# %%
whole = pykern.attention(queries, keys, values, causal=True)
k_cache, v_cache = (torch.zeros(B, H, T, D, dtype=torch.float64) for _ in range(2))
for t in range(T):
    now = [y[:, :, t : t + 1] for y in (queries, keys, values)]
    lengths = torch.full((B,), t, dtype=torch.int32)
    out = pykern.attention_with_kvcache(now[0], k_cache, v_cache, now[1], now[2], cache_seqlens=lengths)
    same(f"token {t} from the cache", out, whole[:, :, t : t + 1], tolerance=0.0)

# %% [markdown]
# ## 8. A tiny language model
#
# Blocks of attention and small networks, a table of the characters in front, and the same table at the end to score the
# next character. The text is the source of Python's textwrap module; a guess costs log(number of characters).

# %%
text = Path(textwrap.__file__).read_text(encoding="utf-8")
letters = sorted(set(text))
ids = torch.tensor([letters.index(c) for c in text])
BLOCK, BATCH = 64, 8
config = Config(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=len(letters), positions="rope")
model = Transformer(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, a guess costs {math.log(len(letters)):.3f} nats")

# %%
optimizer = pykern.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
losses = []
for step in range(options.steps):
    starts = torch.randint(len(ids) - BLOCK, (BATCH, 1))
    pieces = ids[starts + torch.arange(BLOCK + 1)]
    loss = model(pieces[:, :-1], targets=pieces[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 50 == 0 or step == options.steps - 1:
        recent = losses[-20:]
        print(f"step {step:4}  loss {sum(recent) / len(recent):.3f}", flush=True)

# %% [markdown]
# ## 9. What it writes
#
# A session packs the weights once and keeps keys and values as in cell 7.

# %%
prompt = torch.tensor([[letters.index(c) for c in "    def "]])
session = model.session()
same("the session's logits", session.prefill(prompt), model(prompt)[:, -1].detach(), tolerance=0.0)
session.reset()
written = session.generate(prompt, max_new_tokens=100, temperature=0.5, seed=0)[0]
print("".join(letters[i] for i in written.tolist()))
