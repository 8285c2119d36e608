"""Tiny models of transformers with random weights, for the tests of pykern.integrations.transformers."""

import inspect

import torch
import transformers

from pykern import _C

V5 = int(transformers.__version__.split(".")[0]) >= 5
VOCABULARY = 31
PLAIN = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
WINDOW = 4  # shorter than every text of these tests

# name -> (class of the model, options of its config)
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, other scales": ("GPT2LMHeadModel", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, no scale": ("GPT2LMHeadModel", GPT2 | {"scale_attn_weights": False}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "gpt_oss": ("GptOssForCausalLM", GEMMA | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
OTHERS = {
    "bert": ("BertForMaskedLM", SIZES),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
}
OWN_ATTENTION = {  # families that take no other attention function
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
}
FAMILIES = DECODERS | OTHERS | OWN_ATTENTION
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


def make(family, attention="eager", **options):
    """The family's model in float32 and evaluation mode. The same weights whatever the attention."""
    name, sizes = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**PLAIN | sizes | options)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = kind(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the initial weights leave scores near 0, biases 0 and norms 1
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model.eval()


def tokens(rows=2, length=9, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights_like(logits, seed=1):
    """A factor for each logit, so that their weighted sum has a gradient in all that they depend on."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))


def counted(monkeypatch, *names):
    """{name: number of calls} of these functions of the extension from now on."""
    calls = dict.fromkeys(names, 0)

    def count(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(_C, name, count(name, getattr(_C, name)))
    return calls
