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
    "zero hidden width": ("n_hidden", 0),
    "hidden width as a float": ("n_hidden", 64.0),
    "huge hidden width": ("n_hidden", 10**400),
    "norm_eps of zero": ("norm_eps", 0.0),
    "norm_eps NaN": ("norm_eps", math.nan),
    "norm_eps bool": ("norm_eps", True),
    "norm_eps as text": ("norm_eps", "1e-5"),
    "rope_theta below 1": ("rope_theta", 0.5),
    "rope_theta infinite": ("rope_theta", math.inf),
    "rope_theta huge": ("rope_theta", 10**400),
    "rope_theta without rope": ("rope_theta", 5e5),
    "rope_theta None": ("rope_theta", None),
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


def test_config_of_an_older_file_means_what_it_meant():
    """The fields that a file may lack, and the widths and epsilons that were fixed before there were fields."""
    older = {**SMALL, "n_kv_head": None, "positions": "learned", "norm": "layernorm", "activation": "gelu"}
    config = Config.from_dict({**older, "tied_head": True, "qk_norm": False, "dropout": 0.0})
    assert (config.hidden_size, config.norm_epsilon, config.rope_theta) == (128, 1e-5, 10000.0)
    assert Config(**{**SMALL, "norm": "rmsnorm"}).norm_epsilon == 1e-6


def test_config_counts_the_hidden_width_and_keeps_the_given_numbers():
    config = Config(**SMALL, n_hidden=40, norm_eps=1e-3, positions="rope", rope_theta=5e5)
    assert (config.hidden_size, config.norm_epsilon) == (40, 1e-3)
    default = Config(**SMALL, positions="rope")
    narrower = 2 * (128 - 40)  # columns of two layers, each with two rows of 32 and an entry of the bias
    assert default.parameter_count - config.parameter_count == narrower * (2 * 32 + 1)
    assert default.forward_flops_per_token() - config.forward_flops_per_token() == 2 * narrower * 2 * 32
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "relu", "silu", "swiglu"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_config_counts_the_parameters_that_a_model_has(activation, norm):
    model = pytest.importorskip("pykern.lm.model")
    config = Config(**SMALL, n_hidden=40, activation=activation, norm=norm, tied_head=False)
    tensors = model.expected_tensors(config)
    assert sum(tensor.numel() for tensor in tensors.values()) == config.parameter_count
