"""Which published architecture a Config is, GPT-2 or Llama, and what the files of that architecture call its tensors.

A tensor of ours is one tensor of theirs, or the rows of several: q, k and v of Llama. GPT-2's own files hold matrices
as [inputs, outputs], ours are [outputs, inputs].
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from pykern.lm.config import Config

FAMILIES = {"gpt2": "GPT-2", "llama": "Llama"}
# What a Config must say; GPT-2 has all activations but the gated one.
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {"positions": ("learned",), "norm": ("layernorm",), "activation": ("gelu", "gelu_erf", "relu", "silu")},
    "llama": {"positions": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu",)},
}

Names = Mapping[str, tuple[str, ...]]  # our name, layers as {}: theirs

GPT2_BLOCK = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
HF_NAMES: dict[str, Names] = {
    "gpt2": {
        name: (name,)
        for name in (
            "transformer.wte.weight",
            "transformer.wpe.weight",
            *(f"transformer.h.{{}}.{part}.{kind}" for part in GPT2_BLOCK for kind in ("weight", "bias")),
            "transformer.ln_f.weight",
            "transformer.ln_f.bias",
            "lm_head.weight",
        )
    },
    "llama": {
        "transformer.wte.weight": ("model.embed_tokens.weight",),
        "transformer.h.{}.ln_1.weight": ("model.layers.{}.input_layernorm.weight",),
        "transformer.h.{}.attn.c_attn.weight": tuple(
            f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in ("q", "k", "v")
        ),
        "transformer.h.{}.attn.c_proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
        "transformer.h.{}.ln_2.weight": ("model.layers.{}.post_attention_layernorm.weight",),
        "transformer.h.{}.mlp.c_gate.weight": ("model.layers.{}.mlp.gate_proj.weight",),
        "transformer.h.{}.mlp.c_fc.weight": ("model.layers.{}.mlp.up_proj.weight",),
        "transformer.h.{}.mlp.c_proj.weight": ("model.layers.{}.mlp.down_proj.weight",),
        "transformer.ln_f.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    },
}
GGUF_NAMES: dict[str, Names] = {
    "gpt2": {
        "transformer.wte.weight": ("token_embd.weight",),
        "transformer.wpe.weight": ("position_embd.weight",),
        **{
            f"transformer.h.{{}}.{ours}.{kind}": (f"blk.{{}}.{theirs}.{kind}",)
            for ours, theirs in zip(
                GPT2_BLOCK, ("attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down"), strict=True
            )
            for kind in ("weight", "bias")
        },
        "transformer.ln_f.weight": ("output_norm.weight",),
        "transformer.ln_f.bias": ("output_norm.bias",),
        "lm_head.weight": ("output.weight",),
    },
    "llama": {
        "transformer.wte.weight": ("token_embd.weight",),
        "transformer.h.{}.ln_1.weight": ("blk.{}.attn_norm.weight",),
        "transformer.h.{}.attn.c_attn.weight": ("blk.{}.attn_q.weight", "blk.{}.attn_k.weight", "blk.{}.attn_v.weight"),
        "transformer.h.{}.attn.c_proj.weight": ("blk.{}.attn_output.weight",),
        "transformer.h.{}.ln_2.weight": ("blk.{}.ffn_norm.weight",),
        "transformer.h.{}.mlp.c_gate.weight": ("blk.{}.ffn_gate.weight",),
        "transformer.h.{}.mlp.c_fc.weight": ("blk.{}.ffn_up.weight",),
        "transformer.h.{}.mlp.c_proj.weight": ("blk.{}.ffn_down.weight",),
        "transformer.ln_f.weight": ("output_norm.weight",),
        "lm_head.weight": ("output.weight",),
    },
}


def family_of(config: Config, what: str) -> str:
    """ "gpt2" or "llama"; ValueError, starting with what, names the first field that neither has."""
    family = {"learned": "gpt2", "rope": "llama"}.get(config.positions)
    if family is None:
        raise ValueError(
            f"{what}: positions is {config.positions!r}, but GPT-2 has 'learned' and Llama 'rope': no other kind can "
            "be written"
        )
    title = FAMILIES[family]
    for field, values in FIELDS[family].items():
        if getattr(config, field) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(
                f"{what}: a model with positions {config.positions!r} is written as {title}, whose {field} is "
                f"{expected}, not {getattr(config, field)!r}"
            )
    if config.qk_norm:
        raise ValueError(f"{what}: {title} does not normalise queries and keys, but this model has qk_norm")
    if family == "gpt2" and config.kv_heads != config.n_head:
        raise ValueError(f"{what}: GPT-2 has as many key heads as heads, {config.n_head}, not {config.kv_heads}")
    return family


def names_in(name: str, names: Names) -> tuple[str, ...]:
    """What a file with these names calls our tensor: one name, or those of the parts that its rows are."""
    layer = re.match(r"transformer\.h\.(\d+)\.", name)
    if layer is None:
        return names[name]
    template = f"transformer.h.{{}}.{name[layer.end() :]}"
    return tuple(part.format(layer.group(1)) for part in names[template])


def row_counts(config: Config, parts: int, rows: int) -> list[int]:
    """Rows of each of the parts: all, or those of q, k and v."""
    shared = config.kv_heads * config.head_size
    return [rows] if parts == 1 else [config.n_embd, shared, shared]


def split_rows(config: Config, name: str, tensor: Tensor, names: Names) -> Iterable[tuple[str, Tensor]]:
    """(their name, rows) of each part of our tensor."""
    theirs = names_in(name, names)
    return zip(theirs, tensor.split(row_counts(config, len(theirs), tensor.shape[0])), strict=True)


def is_transposed(family: str, name: str, tensor: Tensor) -> bool:
    """Whether files of transformers hold our tensor as [inputs, outputs]: the matrices in GPT-2's blocks."""
    return family == "gpt2" and ".h." in name and tensor.dim() == 2
