"""load_hf and save_hf: the logits of transformers itself, both ways, and what is refused instead of loaded wrongly."""

import json

import pytest
import torch
from lm_models import SHAPES, full_logits, make, random_ids
from safetensors.torch import load_file, save_file

from pykern.lm import Config, Tokenizer, load_hf, save_hf
from pykern.lm.hf_config import config_of, hf_config
from pykern.lm.huggingface import INDEX, MODEL

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'pykern[hf]'")
pytestmark = pytest.mark.one_isa

V = 29
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # logits of size 1 to 10 in float32, sums in another order; measured 1e-6 to 1e-5
GPT2 = {"vocab_size": V, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": V,
    "max_position_embeddings": 24,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CASES = {
    "gpt2": ("GPT2", {}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}),
    "gpt2, narrow relu": ("GPT2", {"n_inner": 37, "activation_function": "relu"}),
    "gpt2, exact gelu": ("GPT2", {"activation_function": "gelu"}),
    "gpt2, silu, epsilon": ("GPT2", {"activation_function": "silu", "layer_norm_epsilon": 0.1}),
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, grouped heads": ("Llama", {"num_key_value_heads": 2}),
    "llama, one key head, tied, epsilon": (
        "Llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
    ),
    "llama, rope_theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
}
SHARED = ("gpt2", "gpt2, narrow relu", "llama, grouped heads", "llama, tied")


def theirs(kind, changes):
    """A model of transformers whose every weight matters: the initial ones leave biases and norms at 0 and 1."""
    torch.manual_seed(0)
    plain = {"bos_token_id": None, "eos_token_id": None}
    if kind == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | plain | changes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | plain | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def their_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def folder(tmp_path):
    """A Llama folder that loads; the refusals change one thing in it."""
    theirs("Llama", {}).save_pretrained(tmp_path)
    return tmp_path


def rewrite(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


# ---- the same logits


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_has_the_logits_of_transformers(case, tmp_path):
    model = theirs(*CASES[case])
    model.save_pretrained(tmp_path)
    ours, tokenizer = load_hf(tmp_path)
    ids = random_ids(2, 24, vocab=V)
    expected = their_logits(model, ids)
    assert tokenizer is None and expected.abs().max() > 1
    torch.testing.assert_close(full_logits(ours, ids), expected, **TOLERANCE)
    other = {"n_layer": 1} if case.startswith("gpt2") else {"num_hidden_layers": 1}
    assert not torch.allclose(their_logits(theirs(CASES[case][0], other), ids), expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_is_loaded_by_transformers(case, tmp_path):
    theirs(*CASES[case]).save_pretrained(tmp_path / "first")
    ours, _ = load_hf(tmp_path / "first")
    save_hf(ours, tmp_path / "second")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values()), info  # no tensor is missing, left over or of another shape
    ids = random_ids(2, 24, vocab=V)
    torch.testing.assert_close(their_logits(back.eval(), ids), full_logits(ours, ids), **TOLERANCE)
    assert (back.config.eos_token_id, back.config.bos_token_id) == (None, None)  # 2 would end a text by default
    again, _ = load_hf(tmp_path / "second")
    assert again.config == ours.config
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_model_of_ours_is_loaded_by_transformers(shape, tmp_path):
    model = make(**SHAPES[shape])
    save_hf(model, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_ids(2, 24)
    torch.testing.assert_close(their_logits(back, ids), full_logits(model, ids), **TOLERANCE)


def test_greedy_texts_agree_with_transformers(tmp_path):
    model = make(**SHAPES["llama"])
    save_hf(model, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_ids(1, 5)
    expected = back.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=0)
    text = model.session().generate(ids, max_new_tokens=15, temperature=0.0)
    assert expected[0, -15:].tolist() == text[0, -15:].tolist()


# ---- forms of the files


@pytest.mark.parametrize("case", SHARED)
def test_shards_give_the_weights_of_one_file(case, tmp_path):
    model = theirs(*CASES[case])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert (tmp_path / "many" / INDEX).exists() and not (tmp_path / "many" / MODEL).exists()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_hf(tmp_path / "one")[0], load_hf(tmp_path / "many")[0]
    for name, value in one.state_dict().items():
        assert torch.equal(many.state_dict()[name], value), name


def test_half_precision_becomes_float32(tmp_path):
    model = theirs(*CASES["llama, grouped heads"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours, _ = load_hf(tmp_path)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.transformer.wte.weight, model.model.embed_tokens.weight.float())


def test_gpt2_in_its_original_names_with_the_stored_masks(tmp_path):
    """The published GPT-2: no `transformer.` in front, a mask in every layer, and a tied head written out."""
    model = theirs(*CASES["gpt2"])
    model.save_pretrained(tmp_path)
    expected, _ = load_hf(tmp_path)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(tmp_path / MODEL).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(tensors | masks | {"lm_head.weight": tensors["wte.weight"].clone()}, tmp_path / MODEL)
    rewrite(tmp_path / "config.json", n_ctx=24, task_specific_params={"text-generation": {"do_sample": True}})
    ours, _ = load_hf(tmp_path)
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_configs_of_both_generations_of_transformers():
    """transformers 4 wrote rope_theta beside the sizes and null for what is not scaled."""
    values = {**LLAMA, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "float16"}
    older = config_of(values | {"rope_theta": 5e5, "rope_scaling": None, "pretraining_tp": 1})
    newer = config_of(values | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert older == newer and older.rope_theta == 5e5 and older.norm_eps == 1e-5 and not older.tied_head
    assert config_of({**GPT2, "model_type": "gpt2"}) == Config(
        vocab_size=V, block_size=24, n_embd=24, n_layer=2, n_head=4
    )


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_config_json_round_trip(shape):
    config = make(**SHAPES[shape]).config
    back = config_of(hf_config(config))
    assert (back.hidden_size, back.norm_epsilon, back.kv_heads) == (
        config.hidden_size,
        config.norm_epsilon,
        config.kv_heads,
    )
    assert back == config


# ---- tokenizers


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_auto_tokenizer_reads_ours(kind, tmp_path):
    text = "the cat sat on the mat, the hat; naïve 猫"
    tokenizer = Tokenizer.train(kind, [text] * 3, None if kind == "byte" else 280)
    save_hf(make(vocab_size=280), tmp_path / "out", tokenizer)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(text)
    assert back(text)["input_ids"] == ids and back.decode(ids) == text
    _, read = load_hf(tmp_path / "out")
    assert read.encode(text) == ids


def test_a_gpt2_tokenizer_of_transformers_with_its_end_of_text(tmp_path):
    text = "the cat sat on the mat"
    trained = json.loads(Tokenizer.train("bpe", [text] * 3, 270).to_json())["model"]
    vocab = trained["vocab"] | {"<|endoftext|>": len(trained["vocab"])}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    special = transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)
    theirs("GPT2", {"vocab_size": len(vocab)}).save_pretrained(tmp_path)
    special.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    _, read = load_hf(tmp_path)
    assert read.special_tokens == {"<|endoftext|>": len(vocab) - 1}
    assert read.vocab_size == len(vocab) and read.encode(text) == special(text)["input_ids"]


def test_a_tokenizer_that_is_not_supported_is_refused_or_left_out(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match=r"tokenizer.json: .*load_hf\(folder, tokenizer=False\) leaves"):
        load_hf(folder)
    assert load_hf(folder, tokenizer=False)[1] is None


def test_a_tokenizer_larger_than_the_vocabulary(folder, tmp_path):
    Tokenizer.train("byte").save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"256 tokens, but config.json has vocab_size 29"):
        load_hf(folder)
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model a vocabulary of 11"):
        save_hf(make(), tmp_path / "out", Tokenizer.train("byte"))
    assert not (tmp_path / "out").exists()


# ---- refusals

SETTINGS = {
    "another family": ({"model_type": "mistral"}, "model_type is 'mistral', but only gpt2 and llama are read"),
    "no family": ({"model_type": "absent"}, "model_type is 'None'"),
    "rope scaling of transformers 4": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling is .*llama3.*, but scaled rotary positions are not computed",
    ),
    "rope scaling of transformers 5": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "rope_parameters has rope_type 'yarn', but scaled",
    ),
    "part of a head rotated": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters has partial_rotary_factor '0.5'",
    ),
    "two bases": ({"rope_theta": 5e5}, "rope_theta is 500000 but 10000 in rope_parameters"),
    "biases in the attention": ({"attention_bias": True}, "attention_bias is True, but biases"),
    "biases in the MLP": ({"mlp_bias": True}, "mlp_bias is True, but biases"),
    "sliding window": ({"sliding_window": 8}, "sliding_window is 8, but attention to a sliding window"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
    "wide heads": ({"head_dim": 8}, "head_dim is 8, but only hidden_size / num_attention_heads, 6,"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is .*, but quantised files"),
    "a setting of a later version": ({"logit_softcapping": 30.0}, "logit_softcapping is '30.0', a setting that is not"),
    "a size missing": ({"hidden_size": "absent"}, "hidden_size is missing"),
    "a size of another type": ({"num_hidden_layers": 2.5}, "n_layer must be an integer, got 2.5"),
    "a huge size": ({"num_hidden_layers": 10**400}, "n_layer must lie between 1 and 1024, got an integer of"),
    "an epsilon as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
    "tied as text": ({"tie_word_embeddings": "no"}, "tied_head must be true or false"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
    "more layers than tensors": ({"num_hidden_layers": 3}, r"'model.layers.2.input_layernorm.weight' is missing"),
    "fewer layers than tensors": ({"num_hidden_layers": 1}, r"'model.layers.1.\S+' does not belong to this model"),
    "another width": (
        {"intermediate_size": 48},
        r"(up|gate)_proj.weight' has shape \[40, 24\], expected \[48, 24\]",
    ),
    "a head that should be tied": ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_computed_are_refused(case, folder):
    changes, message = SETTINGS[case]
    rewrite(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_hf(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 400


GPT2_SETTINGS = {
    "another activation": ({"activation_function": "tanh"}, "activation_function is 'tanh', expected one of gelu_new"),
    "unscaled scores": ({"scale_attn_weights": False}, "scale_attn_weights is 'False', but only True"),
    "scores by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scores divided by the layer's number"),
    "an encoder": ({"add_cross_attention": True}, "attention to an encoder"),
}


@pytest.mark.parametrize("case", GPT2_SETTINGS)
def test_settings_of_gpt2_that_are_not_computed_are_refused(case):
    changes, message = GPT2_SETTINGS[case]
    with pytest.raises(ValueError, match=rf"^config.json: .*{message}"):
        config_of({**GPT2, "model_type": "gpt2"} | changes)


HOSTILE = (None, True, -1, 0, 2.5, 10**400, -1e308, "x", "", [], [[]], {}, {"rope_theta": []}, {"a": {}}, "x" * 10**5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hostile_values_of_every_setting_give_a_config_or_a_short_refusal(kind):
    plain = {**(GPT2 if kind == "gpt2" else LLAMA), "model_type": kind}
    written = hf_config(make(**SHAPES[kind]).config)
    assert isinstance(config_of(plain), Config)
    refused = 0
    for key in {*plain, *written, "rope_scaling", "rope_parameters", "sliding_window", "activation_function", "new"}:
        for value in HOSTILE:
            try:
                assert isinstance(config_of(plain | {key: value}), Config)
            except ValueError as error:
                assert str(error).startswith("config.json: ") and len(str(error)) < 300
                refused += 1
    assert refused > 100


def test_pickles_are_refused_and_not_opened(folder):
    (folder / MODEL).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which can run any code: only safetensors"):
        load_hf(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_hf(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_hf(folder / "none")


@pytest.mark.parametrize(
    "shards, message",
    [
        ({"a": "../model.safetensors"}, "is not the plain name of a safetensors file"),
        ({"a": "/etc/passwd"}, "is not the plain name"),
        ({"a": "model.bin"}, "is not the plain name"),
        ({"a": 3}, "weight_map must map tensors to files"),
        ({}, "weight_map names 0 files"),
        ("model.safetensors", "weight_map must map"),
    ],
)
def test_an_index_that_leads_elsewhere(shards, message, folder):
    (folder / MODEL).rename(folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=message):
        load_hf(folder)


def test_a_missing_shard_and_a_tensor_in_two_shards(folder):
    (folder / MODEL).rename(folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"two.safetensors"):
        load_hf(folder)
    save_file({"model.norm.weight": torch.ones(24)}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"'model.norm.weight' is also in one.safetensors"):
        load_hf(folder)


def test_damaged_and_foreign_tensors(folder):
    tensors = load_file(folder / MODEL)
    whole = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="tensors end at byte"):
        load_hf(folder)
    save_file(tensors | {"model.norm.weight": torch.ones(24, dtype=torch.int64)}, folder / MODEL)
    with pytest.raises(ValueError, match=r"'model.norm.weight' is int64, expected float32 or"):
        load_hf(folder)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}, folder / MODEL)
    with pytest.raises(ValueError, match=r"q_proj.bias' does not belong to this model"):
        load_hf(folder)
