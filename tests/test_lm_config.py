"""Config of pykern.lm: what it refuses, its JSON form, and what it counts."""

import json
import math

import pytest

from pykern.lm.config import Config

GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=256)

REFUSED_FIELDS = {
    "zero": ("n_layer", 0),
    "negative": ("n_head", -1),
    "bool is not a count": ("n_embd", True),
    "float": ("block_size", 16.0),
    "NaN": ("n_layer", math.nan),
    "huge integer": ("vocab_size", 10**5000),
    "string": ("n_layer", "2"),
    "None": ("n_embd", None),
    "heads do not divide the width": ("n_embd", 33),
    "kv heads do not divide the heads": ("n_kv_head", 3),
    "zero kv heads": ("n_kv_head", 0),
    "unknown positions": ("positions", "relative"),
    "positions of another type": ("positions", ["rope"]),
    "unknown norm": ("norm", "batchnorm"),
    "unknown activation": ("activation", "gelu_tanh"),
    "tied head as integer": ("tied_head", 1),
    "qk_norm as text": ("qk_norm", "yes"),
    "dropout of one": ("dropout", 1.0),
    "dropout NaN": ("dropout", math.nan),
    "dropout negative": ("dropout", -0.1),
    "dropout as text": ("dropout", "0.1"),
    "dropout huge": ("dropout", 10**400),
    "dropout bool": ("dropout", False),
}


@pytest.mark.parametrize("field, value", REFUSED_FIELDS.values(), ids=REFUSED_FIELDS)
def test_config_refuses_and_names_the_field(field, value):
    for build in (lambda values: Config(**values), Config.from_dict):
        with pytest.raises(ValueError, match=rf"^Config: .*{field}") as caught:
            build({**SMALL, field: value})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("positions, n_embd", [("rope", 12), ("sinusoidal", 15)])
def test_config_refuses_odd_sizes_where_pairs_are_needed(positions, n_embd):
    heads = {"n_head": 4 if positions == "rope" else 3}
    with pytest.raises(ValueError, match="even"):
        Config(**{**SMALL, **heads, "n_embd": n_embd, "positions": positions})


def test_config_from_dict_refuses_unknown_and_missing_fields():
    with pytest.raises(ValueError, match="unknown field 'n_heads'"):
        Config.from_dict({**SMALL, "n_heads": 4})
    with pytest.raises(ValueError, match="n_embd is missing"):
        Config.from_dict({name: value for name, value in SMALL.items() if name != "n_embd"})
    with pytest.raises(ValueError, match="mapping"):
        Config.from_dict([1, 2])


def test_config_round_trip_and_frozen():
    config = Config(
        **SMALL, n_kv_head=2, positions="rope", norm="rmsnorm", activation="swiglu", tied_head=False, dropout=0.1
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.n_layer = 3


def test_config_counts_gpt2():
    config = Config(**GPT2)
    assert config.parameter_count == 124_439_808  # the published figure
    assert (config.head_size, config.hidden_size, config.kv_heads) == (64, 3072, 12)
    # Matrices: 12 x 12 x 768^2 and the head; attention: 12 layers x 4 x 768 x 1025 / 2 visible keys.
    assert config.forward_flops_per_token() == 2 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 4 * 768 * 1025 // 2
    assert config.training_flops_per_token(1) == 3 * config.forward_flops_per_token(1)


@pytest.mark.parametrize("n_embd, hidden", [(768, 2048), (4096, 10928), (8, 24), (3, 8), (384, 1024)])
def test_config_swiglu_hidden_size(n_embd, hidden):
    config = Config(**{**SMALL, "n_head": 1, "n_embd": n_embd, "activation": "swiglu"})
    assert config.hidden_size == hidden == math.ceil(8 * n_embd / 3 / 8) * 8


def test_config_counts_llama_shape():
    config = Config(**SMALL, n_kv_head=2, positions="rope", norm="rmsnorm", activation="swiglu", tied_head=False)
    block = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 88 + 2 * 32
    assert config.parameter_count == 2 * 256 * 32 + 2 * block + 32
