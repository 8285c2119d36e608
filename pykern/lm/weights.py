"""A model's weights as the compiled step takes them: packed matrices, tables of positions, the cache of each layer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pykern.config import _C
from pykern.lm import positions
from pykern.lm.config import T5_BUCKETS, T5_MAX_DISTANCE
from pykern.lm.kvcache import KVCache
from pykern.lm.packing import GROUPS, pack
from pykern.nn.positions import alibi_slopes, relative_buckets

if TYPE_CHECKING:
    from pykern.lm.model import Transformer

QK_NORM_EPS = 1e-6


def step_dtype(dtype: str) -> torch.dtype:
    """What a session of this dtype computes in: float32 for quantised weights."""
    return torch.float32 if dtype in GROUPS else getattr(torch, dtype)


def position_tables(model: "Transformer", max_len: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the step is told about positions 0 .. max_len - 1, in the numbers of the model's forward pass."""
    config = model.config
    body: Any = model.transformer
    like = torch.empty(0, dtype=dtype, device=model.device)
    if config.positions == "learned":
        return {"positions": body.wpe.weight[:max_len].to(dtype).contiguous().clone()}
    if config.positions == "sinusoidal":
        table = positions.sinusoids(0, max_len, config.n_embd, like)
        return {"positions": table.contiguous(), "embedding_scale": config.n_embd**0.5}
    if config.positions == "rope":
        cos, sin = positions.rotary(0, max_len, config.head_size, like, config.rope_theta)
        return {"rotary_cos": cos, "rotary_sin": sin}
    if config.positions == "alibi":
        return {"alibi_slopes": alibi_slopes(config.n_head).to(model.device, torch.float32).contiguous()}
    if config.positions == "t5":  # of key s and query p at s - p + max_len - 1
        distances = torch.arange(1 - max_len, max_len, device=model.device)
        buckets = relative_buckets(distances, T5_BUCKETS, T5_MAX_DISTANCE, False)
        return {"distance_bias": body.relative_bias.weight.to(dtype)[buckets].T.contiguous()}
    return {}


def compiled_model(model: "Transformer", dtype: str, max_len: int, cache: KVCache) -> tuple[Any, int]:
    """(_C.LmModel, bytes of weights that a step reads), with the model's weights copied into their packed form."""
    config, computed = model.config, step_dtype(dtype)
    body: Any = model.transformer
    read = 0

    def matrix(weight: Tensor | None) -> Any:
        nonlocal read
        if weight is None:
            return None
        packed = pack(weight.detach(), dtype)
        read += packed[0].nbytes + (0 if packed[1] is None else packed[1].nbytes)
        return packed

    def vector(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(computed, copy=True).contiguous()

    layers = []
    for i, block in enumerate(body.h):
        gate = block.mlp.c_gate
        layers.append(
            {
                "ln_1_weight": vector(block.ln_1.weight),
                "ln_1_bias": vector(getattr(block.ln_1, "bias", None)),
                "ln_2_weight": vector(block.ln_2.weight),
                "ln_2_bias": vector(getattr(block.ln_2, "bias", None)),
                "attn": matrix(block.attn.c_attn.weight),
                "attn_bias": vector(block.attn.c_attn.bias),
                "proj": matrix(block.attn.c_proj.weight),
                "proj_bias": vector(block.attn.c_proj.bias),
                "up": matrix(block.mlp.c_fc.weight),
                "up_bias": vector(block.mlp.c_fc.bias),
                "gate": None if gate is None else matrix(gate.weight),
                "gate_bias": None if gate is None else vector(gate.bias),
                "down": matrix(block.mlp.c_proj.weight),
                "down_bias": vector(block.mlp.c_proj.bias),
                "k_cache": cache.k[i],
                "v_cache": cache.v[i],
                "k_scale": None if cache.k_scale is None else cache.k_scale[i],
                "v_scale": None if cache.v_scale is None else cache.v_scale[i],
            }
        )
    activation = body.h[0].mlp.activation
    whole: dict[str, Any] = {
        "n_head": config.n_head,
        "n_kv_head": config.kv_heads,
        "head_size": config.head_size,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "max_len": max_len,
        "layer_norm": config.norm == "layernorm",
        "norm_eps": body.ln_f.eps,
        "qk_norm": config.qk_norm,
        "qk_norm_eps": QK_NORM_EPS,
        "scale": config.head_size**-0.5,
        "embedding_scale": 1.0,
        "activation": "silu" if activation == "swiglu" else activation,
        "embedding": body.wte.weight.detach().to(computed, copy=True).contiguous(),
        "ln_f_weight": vector(body.ln_f.weight),
        "ln_f_bias": vector(getattr(body.ln_f, "bias", None)),
        "head": matrix(model.head_weight),
        **position_tables(model, max_len, computed),
    }
    return _C.LmModel(whole, layers), read
