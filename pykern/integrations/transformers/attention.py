"""pykern.attention as an attention implementation of transformers, and the masks that go with it.

transformers calls f(module, query [B, H, T, D], key [B, G, S, D], value [B, G, S, E], attention_mask, **options) in
every layer and expects ([B, T, H, E], weights or None). Masks are those that it makes for "sdpa": bool, True = attend,
or None for the upper left triangle. What a layer passes and this file does not know is refused, never dropped.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pykern.ops.attention import attention

# Options of a layer that have no influence on softmax(q k^T) v: what they say is in q, k, v and the mask, or is about
# other parts of the model.
HARMLESS = frozenset(
    [
        *("position_ids", "cache_position", "use_cache", "max_length_q", "max_length_k", "deterministic"),
        *("return_dict", "output_hidden_states", "output_router_logits", "logits_to_keep", "num_items_in_batch"),
        *("token_type_ids", "mm_token_type_ids"),
    ]
)
REASONS = {
    "output_attentions": "needs the attention weights, which a fused kernel does not have; use 'eager'",
    "head_mask": "scales the attention weights of heads, which a fused kernel does not have; use 'eager'",
    "cache": "is the paged cache of continuous batching, which needs 'sdpa' or 'paged|eager'",
    "block_table": "is the paged cache of continuous batching, which needs 'sdpa' or 'paged|eager'",
    "sinks": "are sinks for each token; pykern knows one for each head (s_aux)",
}
TAKEN = ("eager", "sdpa", "flash", "flex", "paged")  # transformers decides by these parts of a name
RELATIVE = ("relative_key", "relative_key_query")


def refuse(module: torch.nn.Module, words: str) -> ValueError:
    return ValueError(f"pykern: {type(module).__name__}: {words}")


def records_weights() -> bool:
    """Whether transformers 5 is collecting attention weights by hooks, of which a layer is not told."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None or torch.compiler.is_compiling():
        return False
    wanted = capturing._active_collector.get()
    return wanted is not None and any("attentions" in name for name in wanted)


def check_options(module: torch.nn.Module, options: dict[str, Any], ignore: frozenset[str]) -> None:
    """ValueError: an option that is neither known to be without influence nor None or False."""
    for name, value in options.items():
        if value is None or value is False or name in HARMLESS or name in ignore:
            continue
        why = REASONS.get(name, "is not known to pykern; register(ignore=...) names what may be dropped")
        raise refuse(module, f"{name} {why}")
    if records_weights():
        raise refuse(module, f"output_attentions {REASONS['output_attentions']}")


def check_module(module: torch.nn.Module, sinks: Tensor | None) -> None:
    """ValueError: what the layer holds for its own attention function and does not pass."""
    if sinks is None and isinstance(getattr(module, "sinks", None), Tensor):
        raise refuse(module, "has attention sinks that it does not pass as s_aux")
    kind = getattr(module, "position_embedding_type", None)
    if kind in RELATIVE:
        raise refuse(module, f"position_embedding_type {kind!r} is computed by 'eager' alone")


def default_scale(module: Any, head_size: int) -> float:
    """1 / sqrt(D), and what the GPT-2 of transformers 4 makes of it in its own attention function."""
    scale = head_size**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scale /= float(module.layer_idx + 1)
    return scale


def split_mask(module: torch.nn.Module, mask: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) of pykern.attention from a mask of transformers [B or 1, H or 1, T, S and more].

    Numbers are added to the scores; their dtype's lowest, which stands for "do not attend", masks.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        what = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise refuse(module, f"attention_mask has {what}, expected a tensor [B, H or 1, T, S]")
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise refuse(module, f"attention_mask has dtype {mask.dtype}, expected bool or a floating one")
    return mask > torch.finfo(mask.dtype).min, mask


def same_sequence(cu_seqlens: Tensor, length: int) -> Tensor:
    """Bool [length, length]: whether two tokens are of one of the sequences that cu_seqlens lays end to end."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return sequence[:, None] == sequence[None, :]


def window_of(module: torch.nn.Module, sliding_window: int | None, T: int, S: int, causal: bool) -> tuple | None:
    """window of pykern.attention where no mask holds it already: a token sees itself and sliding_window - 1 before."""
    if sliding_window is None or sliding_window >= S:
        return None
    if not causal and T > 1:
        raise refuse(module, f"sliding_window {sliding_window} without a mask is defined for causal layers only")
    return sliding_window - 1, 0


def packed(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Sequences end to end in a batch of one, as cu_seqlens_q and cu_seqlens_k say: [1, T, H, E]."""
    if q.shape[0] != 1 or k.shape[0] != 1:
        raise refuse(module, f"cu_seq_lens_q needs a batch of 1 when there is no mask, got {q.shape[0]}")
    if options.pop("bias") is not None:
        raise refuse(module, "position_bias and cu_seq_lens_q do not go together without a mask")
    del options["mask"]
    out = attention(*(x[0].transpose(0, 1) for x in (q, k, v)), **options)
    assert isinstance(out, Tensor)
    return out[None].contiguous()


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    *,
    ignore: frozenset[str] = frozenset(),
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, E] of q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] of any strides; see docs/transformers.md."""
    check_options(module, options, ignore)
    check_module(module, s_aux)
    T, S = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and T > 1
    ragged = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if causal and S > T and not ragged:  # an empty static cache: what stands behind key T is not written yet
        key, value, S = key[:, :, :T], value[:, :, :T], T
    if position_bias is not None:
        position_bias = position_bias[..., :S]
    mask, bias = split_mask(module, attention_mask, S)
    if bias is None:
        bias = position_bias
    elif position_bias is not None:
        bias = bias + position_bias
    dtype = query.dtype
    if bias is not None and bias.dtype != dtype and bias.dtype == torch.float32:
        query, key, value = query.float(), key.float(), value.float()  # rounding the bias would be seen in the weights
    arguments: dict[str, Any] = dict(
        mask=mask,
        bias=bias,
        causal=causal,
        window=window_of(module, sliding_window, T, S, causal) if mask is None else None,
        scale=default_scale(module, query.shape[3]) if scaling is None else float(scaling),
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        dropout_p=dropout if module.training else 0.0,
    )
    if ragged:
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            raise refuse(module, "cu_seq_lens_q and cu_seq_lens_k come together or not at all")
        if mask is None:
            cu_seqlens = dict(cu_seqlens_q=cu_seq_lens_q.int(), cu_seqlens_k=cu_seq_lens_k.int())
            return packed(module, query, key, value, arguments | cu_seqlens), None
        if T != S:
            raise refuse(module, f"cu_seq_lens_q with a mask needs as many keys as queries, got {S} and {T}")
        arguments["mask"] = mask & same_sequence(cu_seq_lens_k, S)
    out = attention(query, key, value, **arguments)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous().to(dtype), None


def names_in(kind: type) -> set[str]:
    """What the methods of a class refer to."""
    functions = (inspect.unwrap(value) for value in vars(kind).values() if callable(value))
    return {name for f in functions if hasattr(f, "__code__") for name in f.__code__.co_names}


def calls_interface(config: type) -> bool:
    """Whether the models of this class of configs leave all attention to the registered function, as far as their
    modules tell, or else are made for the masks of "sdpa".

    A layer with a softmax of its own would add a bool mask to its scores as if it were numbers.
    """
    package, _, name = config.__module__.rpartition(".")
    if not name.startswith("configuration_"):
        return True
    files = [module for path, module in list(sys.modules.items()) if path.startswith(f"{package}.modeling_")]
    kinds = [x for file in files for x in vars(file).values() if isinstance(x, type) and x.__module__ == file.__name__]
    layers = [names_in(kind) for kind in kinds if "Attention" in kind.__name__ and issubclass(kind, torch.nn.Module)]
    if not any("softmax" in names and "ALL_ATTENTION_FUNCTIONS" not in names for names in layers):
        return True
    models = [kind for kind in kinds if getattr(kind, "config_class", None) is config]
    interface = any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)
    return interface and any(getattr(model, "_supports_sdpa", False) for model in models)


_known: dict[type, bool] = {}  # not functools.cache, of which torch.compile warns


def _mask_function(sdpa_mask: Callable[..., Any]) -> Callable[..., Any]:
    def pykern_mask(*args: Any, config: Any = None, **options: Any) -> Any:
        kind = type(config)
        if kind not in _known:
            _known[kind] = calls_interface(kind)
        if not _known[kind]:
            raise ValueError(
                f"pykern: the models of {kind.__name__} compute attention by themselves, or some of it, and "
                "take no other implementation; patch(model) replaces their other modules"
            )
        return sdpa_mask(*args, config=config, **options)

    return pykern_mask


def is_registered(name: str) -> bool:
    """Whether register() made this attention implementation."""
    from transformers import AttentionInterface

    return getattr(AttentionInterface().get(name), "registered_by_pykern", False)


def register(name: str = "pykern", *, ignore: Iterable[str] = ()) -> str:
    """Makes `name` an attention implementation of transformers: attn_implementation=name. Returns the name.

    ignore: options that layers pass and that may be dropped; any other that is not known is refused when it comes.
    ImportError: no transformers, or one before 4.57. ValueError: the name belongs to somebody else.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError("pykern: transformers 4.57 or later is missing: pip install 'pykern[hf]'") from error
    others = AttentionInterface().get(name) is not None and not is_registered(name)
    if not name.isidentifier() or any(part in name for part in TAKEN) or others:
        raise ValueError(
            f"register: name is {name!r}, expected one that no other attention has, an identifier without any of "
            f"{', '.join(TAKEN)}"
        )
    dropped = frozenset([ignore] if isinstance(ignore, str) else ignore)

    def pykern_attention(*args: Any, **options: Any) -> tuple[Tensor, None]:
        return forward(*args, ignore=dropped, **options)

    pykern_attention.registered_by_pykern = True  # type: ignore[attr-defined]
    AttentionInterface.register(name, pykern_attention)
    AttentionMaskInterface.register(name, _mask_function(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]))
    return name
