"""save_npz and save_gguf read back by numpy, gguf and transformers; the commands export and import."""

import json

import numpy as np
import pytest
import torch
from lm_models import SHAPES, full_logits, make, random_ids

from pykern.cli import main
from pykern.lm import Config, Tokenizer, Transformer, load_hf, save_gguf, save_hf, save_npz
from pykern.lm.checkpoint import load_checkpoint, save_checkpoint
from pykern.lm.huggingface import hf_tensors

pytestmark = pytest.mark.one_isa

TEXT = "the cat sat on the mat, the hat"
MODELS = {
    "gpt2": {},
    "gpt2, untied, narrow": {"tied_head": False, "n_hidden": 37, "norm_eps": 0.1},
    "llama": SHAPES["llama"],
    "llama, tied, rope_theta": {
        **SHAPES["llama"],
        **{"n_kv_head": None, "tied_head": True, "rope_theta": 100.0, "norm_eps": 0.1},
    },
}


def needs(name):
    return pytest.importorskip(name, reason=f"needs {name}: pip install 'pykern[hf]'")


# ---- npz


@pytest.mark.parametrize("shape", [*SHAPES])
def test_npz_holds_every_array_and_the_config(shape, tmp_path):
    model = make(**SHAPES[shape])
    save_npz(model, tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert Config.from_dict(json.loads(bytes(arrays.pop("config.json")))) == model.config
    assert set(arrays) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert arrays[name].dtype == np.float32 and np.array_equal(arrays[name], value.numpy()), name


def test_npz_holds_the_tokenizer_and_overwrites_nothing(tmp_path):
    tokenizer, path = Tokenizer.train("character", TEXT), tmp_path / "new" / "weights"
    save_npz(make(vocab_size=20, dtype=torch.bfloat16), path, tokenizer)
    with np.load(path, allow_pickle=False) as file:
        back = Tokenizer.from_json(bytes(file["tokenizer.json"]).decode())
        assert file["transformer.wte.weight"].dtype == np.float32
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"save_npz: .*weights exists and is not overwritten"):
        save_npz(make(), path)
    with pytest.raises(ValueError, match="save_npz: the tokenizer has 256 tokens, the model a vocabulary of 11"):
        save_npz(make(), tmp_path / "other", Tokenizer.train("byte"))
    assert path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["new"]


# ---- gguf


def read_gguf(path):
    """(fields, float32 tensors by name) as the gguf package reads them."""
    reader = needs("gguf").GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def neighbours(rows, heads):
    """Row 2i + s of every head is row i + s D / 2."""
    D = len(rows) // heads
    order = [h * D + i + s * (D // 2) for h in range(heads) for i in range(D // 2) for s in (0, 1)]
    return rows[order]


@pytest.mark.parametrize("shape", MODELS)
def test_gguf_holds_every_tensor_under_the_name_that_gguf_gives_it(shape, tmp_path):
    gguf = needs("gguf")
    model = make(**MODELS[shape])
    config, family = model.config, shape[:4].replace("llam", "llama")
    save_gguf(model, tmp_path / "model.gguf")
    _, tensors = read_gguf(tmp_path / "model.gguf")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config.n_layer)
    expected = {}
    for name, value in hf_tensors(model).items():
        value = value.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = neighbours(value, config.n_head if "q_proj" in name else config.kv_heads)
        if family == "gpt2" and ".h." in name and value.ndim == 2:
            value = value.T
        expected[names.get_name(name, (".weight", ".bias"))] = value
    assert set(tensors) == set(expected) and None not in expected
    for name, value in expected.items():
        assert tensors[name].dtype == np.float32 and np.array_equal(tensors[name], value), name


@pytest.mark.parametrize("shape", MODELS)
def test_gguf_metadata(shape, tmp_path):
    model = make(**MODELS[shape])
    config = model.config
    save_gguf(model, tmp_path / "model.gguf")
    fields, _ = read_gguf(tmp_path / "model.gguf")
    common = {
        "context_length": 24,
        "embedding_length": 16,
        "block_count": 2,
        "vocab_size": 11,
        "attention.head_count": 4,
        "feed_forward_length": config.hidden_size,
    }
    eps = np.float32(config.norm_epsilon)
    if shape.startswith("gpt2"):
        arch, own = "gpt2", {"attention.layer_norm_epsilon": eps}
    else:
        arch = "llama"
        own = {
            "attention.layer_norm_rms_epsilon": eps,
            "attention.head_count_kv": config.kv_heads,
            "rope.dimension_count": 4,
            "rope.freq_base": config.rope_theta,
        }
    assert fields == {
        "general.architecture": arch,
        "general.type": "model",
        "general.file_type": 0,
        "tokenizer.ggml.model": "none",
        **{f"{arch}.{key}": value for key, value in (common | own).items()},
    }


def llama_forward(fields, tensors, ids):
    """Logits [T, V] in float64 as llama.cpp computes its llama architecture: neighbours 2i and 2i + 1 are rotated."""
    number = {key.removeprefix("llama."): value for key, value in fields.items()}
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    H, G, D = number["attention.head_count"], number["attention.head_count_kv"], number["rope.dimension_count"]
    T, eps = len(ids), number["attention.layer_norm_rms_epsilon"]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    angle = np.arange(T)[:, None] * number["rope.freq_base"] ** (-np.arange(0, D, 2) / D)
    turn = np.exp(1j * angle)[:, None]  # [T, 1, D / 2]

    def rotated(x):  # a pair of neighbours as one complex number
        pairs = x.reshape(T, -1, D // 2, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([z.real, z.imag], -1).reshape(T, -1, D)

    x = w["token_embd.weight"][ids]
    for layer in range(number["block_count"]):
        b = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"blk.{layer}.")}
        y = norm(x, b["attn_norm.weight"])
        q, k = (rotated(y @ b[f"attn_{part}.weight"].T) for part in "qk")
        v = (y @ b["attn_v.weight"].T).reshape(T, G, D)
        k, v = (np.repeat(z, H // G, 1) for z in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
        scores[:, np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v)
        x = x + heads.reshape(T, -1) @ b["attn_output.weight"].T
        y = norm(x, b["ffn_norm.weight"])
        gate = y @ b["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ b["ffn_up.weight"].T)) @ b["ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


@pytest.mark.parametrize("shape", [name for name in MODELS if name.startswith("llama")])
def test_gguf_with_llama_cpps_rotation_has_the_logits_of_the_model(shape, tmp_path):
    model, ids = make(**MODELS[shape]), random_ids(1, 20)
    save_gguf(model, tmp_path / "model.gguf")
    fields, tensors = read_gguf(tmp_path / "model.gguf")
    expected = full_logits(model, ids)[0].numpy()
    np.testing.assert_allclose(llama_forward(fields, tensors, ids[0].numpy()), expected, rtol=0, atol=1e-4)
    plain = tensors | {"blk.0.attn_q.weight": model.transformer.h[0].attn.c_attn.weight[:16].detach().numpy()}
    assert np.abs(llama_forward(fields, plain, ids[0].numpy()) - expected).max() > 0.01  # our order would be wrong


@pytest.mark.parametrize("shape", MODELS)
def test_gguf_is_loaded_by_transformers(shape, tmp_path):
    """By the part of from_pretrained(gguf_file=…) that reads the file; the rest needs the accelerate package."""
    transformers, _ = needs("transformers"), needs("gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, ids = make(**MODELS[shape]), random_ids(2, 20)
    save_gguf(model, tmp_path / "model.gguf")
    values = load_gguf_checkpoint(tmp_path / "model.gguf")["config"]
    if values["model_type"] == "gpt2":  # whose table in transformers leaves out three sizes
        values |= {"vocab_size": 11, "n_positions": 24, "n_inner": model.config.hidden_size}
    back = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
    tensors = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=back)["tensors"]
    loaded = back.load_state_dict(tensors, strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}  # tied
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, full_logits(model, ids), rtol=0, atol=1e-4)


def test_gguf_tokenizer_of_pairs(tmp_path):
    tokenizer = Tokenizer.train("bpe", [TEXT] * 3, 270)
    save_gguf(make(vocab_size=280), tmp_path / "model.gguf", tokenizer)
    fields, _ = read_gguf(tmp_path / "model.gguf")
    word = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    document = json.loads(tokenizer.to_json())["model"]
    n = tokenizer.vocab_size
    assert (word["model"], word["pre"]) == ("gpt2", "gpt-2")
    assert word["tokens"][:n] == sorted(document["vocab"], key=document["vocab"].get)
    assert word["tokens"][n:] == [f"[PAD{i}]" for i in range(n, 280)]
    assert word["token_type"] == [1] * n + [5] * (280 - n)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in document["merges"]]
    assert pairs and [merge.split(" ") for merge in word["merges"]] == pairs
    zero = tokenizer.encode("\0")
    assert [word["eos_token_id"]] == [word["bos_token_id"]] == zero
    assert word["add_bos_token"] is False and word["add_eos_token"] is False


def test_gguf_tokenizer_with_an_end_of_text(tmp_path):
    document = json.loads(Tokenizer.train("bpe", [TEXT] * 3, 270).to_json())
    n = len(document["model"]["vocab"])
    document["added_tokens"] = [{"id": n, "content": "<|endoftext|>", "special": True}]
    save_gguf(make(vocab_size=n + 1), tmp_path / "model.gguf", Tokenizer.from_json(json.dumps(document)))
    fields, _ = read_gguf(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.tokens"][n:] == ["<|endoftext|>"]
    assert fields["tokenizer.ggml.token_type"] == [1] * n + [3] and fields["tokenizer.ggml.eos_token_id"] == n


def test_gguf_tokenizer_of_bytes_and_of_kinds_that_llama_cpp_lacks(tmp_path):
    save_gguf(make(vocab_size=256), tmp_path / "byte.gguf", Tokenizer.train("byte"))
    fields, _ = read_gguf(tmp_path / "byte.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == 256 and fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.merges"] == ["\u2581 \u2581"]
    assert not set("\u2581") & set("".join(fields["tokenizer.ggml.tokens"]))  # so it merges nothing
    save_gguf(make(vocab_size=20), tmp_path / "character.gguf", Tokenizer.train("character", TEXT))
    fields, _ = read_gguf(tmp_path / "character.gguf")
    assert fields["tokenizer.ggml.model"] == "none" and "tokenizer.ggml.tokens" not in fields


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "relu"}, "llama.cpp computes GPT-2 with activation 'gelu' alone, not 'relu'"),
        ({"positions": "alibi"}, "positions is 'alibi', but GPT-2 has 'learned' and Llama 'rope'"),
        ({"positions": "rope"}, "whose norm is 'rmsnorm', not 'layernorm'"),
        ({**SHAPES["llama"], "qk_norm": True}, "Llama does not normalise queries and keys"),
    ],
)
def test_gguf_refuses_what_llama_cpp_does_not_compute(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^save_gguf: .*{message}"):
        save_gguf(make(**changes), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_overwrites_nothing_and_the_same_model_gives_the_same_bytes(tmp_path):
    needs("gguf")
    for name in ("one", "two"):
        save_gguf(make(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(FileExistsError, match=r"save_gguf: .*one exists and is not overwritten"):
        save_gguf(make(seed=1), tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_without_the_gguf_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"the gguf package is missing: pip install 'pykern\[hf\]'"):
        save_gguf(make(), tmp_path / "model.gguf")


# ---- the commands


@pytest.fixture
def checkpoint(tmp_path):
    model = make(vocab_size=256)
    save_checkpoint(
        tmp_path / "model", config=model.config, tensors=model.state_dict(), tokenizer=Tokenizer.train("byte")
    )
    return tmp_path / "model"


def run(capsys, *argv):
    code = main([*map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_export_and_import_give_the_same_checkpoint(checkpoint, tmp_path, capsys):
    code, out, err = run(capsys, "export", "--model", checkpoint, "--to", "hf", "--out", tmp_path / "hf")
    count = Transformer.load(checkpoint).config.parameter_count
    assert (code, out, err) == (0, f"hf: {tmp_path / 'hf'}    {count:,} parameters\n", "")
    code, out, err = run(capsys, "import", "--from", tmp_path / "hf", "--out", tmp_path / "back")
    assert (code, out, err) == (0, f"checkpoint: {tmp_path / 'back'}    {count:,} parameters\n", "")
    one, two = (load_checkpoint(folder) for folder in (checkpoint, tmp_path / "back"))
    assert one.config == two.config and one.tokenizer.to_json() == two.tokenizer.to_json()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors | two.tensors)
    code, out, _ = run(
        capsys, "generate", "--model", tmp_path / "back", "--prompt", "a", "--max-new-tokens", 2, "--quiet"
    )
    assert code == 0


@pytest.mark.parametrize("to", ["npz", "gguf"])
def test_export_to_a_file(to, checkpoint, tmp_path, capsys):
    needs("gguf")
    path = tmp_path / f"out.{to}"
    code, out, err = run(capsys, "export", "--model", checkpoint, "--to", to, "--out", path)
    assert code == 0 and out.startswith(f"{to}: {path}") and err == ""
    names = np.load(path).files if to == "npz" else read_gguf(path)[0]
    assert ("tokenizer.json" if to == "npz" else "tokenizer.ggml.tokens") in names
    code, out, err = run(capsys, "export", "--model", checkpoint, "--to", to, "--out", path)
    assert (code, out) == (1, "") and err == f"pykern export: save_{to}: {path} exists and is not overwritten\n"


def test_what_an_export_leaves_out_is_said(tmp_path, capsys):
    needs("gguf")
    model = make(vocab_size=20)
    save_checkpoint(
        *(tmp_path / "model",),
        config=model.config,
        tensors=model.state_dict(),
        tokenizer=Tokenizer.train("character", TEXT),
    )
    code, _, err = run(capsys, "export", "--model", tmp_path / "model", "--to", "gguf", "--out", tmp_path / "a")
    assert code == 0 and err == "llama.cpp has no tokenizer like this one (character): the file takes token ids\n"
    model.save(tmp_path / "bare")
    code, _, err = run(capsys, "export", "--model", tmp_path / "bare", "--to", "hf", "--out", tmp_path / "b")
    assert code == 0 and err == f"{tmp_path / 'bare'} has no tokenizer.json, so none was written\n"
    code, _, err = run(capsys, "import", "--from", tmp_path / "b", "--out", tmp_path / "c")
    assert code == 0 and err == f"{tmp_path / 'c'} has no tokenizer.json: its model reads token ids, not text\n"


def test_commands_refuse_in_one_line_and_write_nothing(checkpoint, tmp_path, capsys):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    make(positions="none").save(tmp_path / "none")
    refused = {
        ("export", "--model", tmp_path / "none", "--to", "hf", "--out", tmp_path / "x"): "positions is 'none'",
        ("export", "--model", tmp_path / "absent", "--to", "npz", "--out", tmp_path / "x"): "no such checkpoint folder",
        ("import", "--from", tmp_path / "absent", "--out", tmp_path / "x"): "no such folder",
        ("import", "--from", checkpoint, "--out", tmp_path / "x"): "model_type is 'None', but only gpt2 and llama",
        ("import", "--from", tmp_path / "absent", "--out", checkpoint): "exists and is not an empty folder",
    }
    for argv, message in refused.items():
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1, argv
    with pytest.raises(SystemExit) as caught:
        main(["export", "--model", "m", "--to", "onnx", "--out", "x"])
    assert caught.value.code == 2 and "invalid choice: 'onnx'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and {path: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_import_without_the_tokenizer(tmp_path, capsys):
    save_hf(make(), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    code, _, err = run(capsys, "import", "--from", tmp_path / "hf", "--out", tmp_path / "out")
    assert code == 1 and "leaves the tokenizer unread" in err and not (tmp_path / "out").exists()
    code, _, _ = run(capsys, "import", "--from", tmp_path / "hf", "--out", tmp_path / "out", "--no-tokenizer")
    assert code == 0
    assert Transformer.load(tmp_path / "out").config == load_hf(tmp_path / "hf", tokenizer=False)[0].config
