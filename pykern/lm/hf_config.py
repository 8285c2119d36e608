"""The config.json of Hugging Face transformers, for GPT-2 and Llama, as a Config and back.

A setting that is on and that this package does not compute, or has never heard of, is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from pykern.lm.config import ROPE_THETA, Config
from pykern.lm.families import family_of

ACTIVATIONS = {  # their name: ours. The first of each of ours is what is written.
    "gelu_new": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu",
    "swish": "silu",
}
# their name: ours; all must be there
SIZES = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
    },
    "llama": {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_hidden",
    },
}
# What must be so, or be absent: anything else is computed differently from what is computed here.
REQUIRED: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True},
    "llama": {"hidden_act": "silu"},
}
REFUSED: dict[str, str] = {
    "rope_scaling": "scaled rotary positions are not computed here",
    "attention_bias": "biases in the attention of a Llama model are not computed here",
    "mlp_bias": "biases in the MLP of a Llama model are not computed here",
    "sliding_window": "attention to a sliding window is not computed here",
    "scale_attn_by_inverse_layer_idx": "scores divided by the layer's number are not computed here",
    "add_cross_attention": "attention to an encoder is not computed here",
    "quantization_config": "quantised files are not read here",
}
READ = (
    *("model_type", "tie_word_embeddings", "activation_function", "layer_norm_epsilon", "n_inner"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters"),
)
# Settings that change no logit: of training, of generation, of the program that wrote the file.
HARMLESS = re.compile(
    "_name_or_path|architectures|transformers_version|torch_dtype|dtype|use_cache|tokenizer_class|n_ctx|pretraining_tp|"
    "_attn_implementation|_attn_implementation_autoset|reorder_and_upcast_attn|initializer_range|gradient_checkpointing|"
    "(bos|eos|pad|unk|sep|decoder_start|forced_bos|forced_eos)_token_id|(attn|resid|embd)_pdrop|attention_dropout|"
    "summary_.*|task_specific_params|id2label|label2id|problem_type|finetuning_task|return_dict|return_dict_in_generate|"
    "output_attentions|output_hidden_states|output_scores|chunk_size_feed_forward|max_length|min_length|do_sample|"
    "early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|"
    "length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|prefix|"
    "exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|remove_invalid_values|is_encoder_decoder"
)


def _number(values: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e12:
        raise ValueError(f"{where}: {name} must be a number from 0 to 1e12, got {str(value)[:60]}")
    return float(value)


def _rope_theta(values: Mapping[str, Any], where: str) -> float:
    """The base of the rotation; transformers 5 writes it inside rope_parameters, earlier versions beside the others."""
    inner = values.get("rope_parameters")
    inner = {} if inner is None else inner
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: rope_parameters must be an object, got {type(inner).__name__}")
    for key, value in inner.items():
        usual = {"rope_theta": value, "rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        if value is not None and (key not in usual or value != usual[key]):
            raise ValueError(f"{where}: rope_parameters has {key} {str(value)[:60]!r}, but {REFUSED['rope_scaling']}")
    outer = _number(values, "rope_theta", ROPE_THETA, where)
    found = _number(inner, "rope_theta", outer, where)
    if "rope_theta" in values and found != outer:
        raise ValueError(f"{where}: rope_theta is {outer:g} but {found:g} in rope_parameters")
    return found


def _refuse_unknown(values: Mapping[str, Any], family: str, where: str) -> None:
    """ValueError for the first setting that is on and that this package does not compute, or has never heard of."""
    for key, value in values.items():
        if key in REFUSED:
            plain = (
                key == "rope_scaling" and isinstance(value, dict) and all(kind == "default" for kind in value.values())
            )
            if value and not plain:
                raise ValueError(f"{where}: {key} is {str(value)[:60]}, but {REFUSED[key]}")
        elif key in REQUIRED[family]:
            if value != REQUIRED[family][key]:
                raise ValueError(
                    f"{where}: {key} is {str(value)[:60]!r}, but only {REQUIRED[family][key]!r} is computed here"
                )
        elif value and key not in (*READ, *SIZES[family]) and not HARMLESS.fullmatch(key):
            raise ValueError(f"{where}: {key[:60]} is {str(value)[:60]!r}, a setting that is not known here")


def config_of(values: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a transformers config.json. ValueError, starting with where, names what is not computed here."""
    family = values.get("model_type")
    if family not in ("gpt2", "llama"):
        raise ValueError(f"{where}: model_type is {str(family)[:60]!r}, but only gpt2 and llama are read")
    _refuse_unknown(values, family, where)
    missing = [name for name in SIZES[family] if values.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    fields: dict[str, Any] = {ours: values[theirs] for theirs, ours in SIZES[family].items()}
    if family == "gpt2":
        activation = values.get("activation_function", "gelu_new")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(
                f"{where}: activation_function is {str(activation)[:60]!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        fields |= {
            "n_hidden": values.get("n_inner"),
            "activation": ACTIVATIONS[activation],
            "norm_eps": _number(values, "layer_norm_epsilon", 1e-5, where),
            "tied_head": values.get("tie_word_embeddings", True),
        }
    else:
        fields |= {
            "n_kv_head": values.get("num_key_value_heads"),
            "positions": "rope",
            "rope_theta": _rope_theta(values, where),
            "norm": "rmsnorm",
            "norm_eps": _number(values, "rms_norm_eps", 1e-6, where),
            "activation": "swiglu",
            "tied_head": values.get("tie_word_embeddings", False),
        }
    try:
        config = Config(**fields)
        simple = Config(**{**fields, "n_hidden": None, "norm_eps": None, "n_kv_head": None})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    head_dim = values.get("head_dim")
    if head_dim is not None and head_dim != config.head_size:
        raise ValueError(
            f"{where}: head_dim is {str(head_dim)[:20]}, but only hidden_size / num_attention_heads, "
            f"{config.head_size}, is computed here"
        )
    for name, effective in {"n_hidden": "hidden_size", "norm_eps": "norm_epsilon", "n_kv_head": "kv_heads"}.items():
        if getattr(config, effective) == getattr(simple, effective):  # the number that None stands for
            fields[name] = None
    return Config(**fields)


def hf_config(config: Config) -> dict[str, Any]:
    """The config.json of transformers for this Config. ValueError when it is neither a GPT-2 nor a Llama."""
    family = family_of(config, "save_hf")
    values: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel" if family == "gpt2" else "LlamaForCausalLM"],
        "model_type": family,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES[family].items()},
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    if family == "gpt2":
        name = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
        return values | {
            "activation_function": name,
            "n_inner": config.hidden_size,
            "layer_norm_epsilon": config.norm_epsilon,
            **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")},
        }
    return values | {
        "intermediate_size": config.hidden_size,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
    }
