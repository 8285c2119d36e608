"""Small language models that the tests share."""

import torch

from pykern.lm import Config, Transformer

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "t5", "none")

# name: what differs from the GPT-2-like default
SHAPES = {
    "gpt2": {},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "tied_head": False},
    "relu": {"activation": "relu", "positions": "none"},
    "sinusoidal": {"positions": "sinusoidal", "n_kv_head": 1},
    "alibi": {"positions": "alibi", "norm": "rmsnorm"},
    "t5": {"positions": "t5"},
    "qk_norm": {"positions": "rope", "qk_norm": True, "n_kv_head": 2},
}


def make(seed=0, dtype=None, **changes):
    torch.manual_seed(seed)
    fields = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 24, "vocab_size": 11} | changes
    model = Transformer(Config(**fields), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():  # larger than the initial weights, so that every part matters
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def random_ids(*shape, vocab=11, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def full_logits(model, ids):
    """The logits of the forward pass without a cache."""
    with torch.no_grad():
        return model(ids)
