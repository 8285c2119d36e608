"""save_gguf read by llama.cpp itself, where llama-cpp-python is installed: its logits and its tokens are ours."""

import json

import pytest
import torch
from lm_models import SHAPES, full_logits, make, random_ids

from benchmarks.rivals_decode import LlamaCpp
from pykern.lm import Tokenizer, save_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python, which compiles it")
pytest.importorskip("gguf", reason="needs gguf: pip install 'pykern[hf]'")
pytestmark = pytest.mark.one_isa

LLAMA = SHAPES["llama"]
MODELS = {
    "llama, grouped heads": LLAMA,
    "llama, as many key heads": {**LLAMA, "n_kv_head": None},
    "llama, one key head": {**LLAMA, "n_kv_head": 1},
    "llama, tied": {**LLAMA, "tied_head": True},
    "llama, another base": {**LLAMA, "rope_theta": 100.0},
    "llama, epsilon": {**LLAMA, "norm_eps": 0.1},
    "llama, another hidden width": {**LLAMA, "n_hidden": 37},
    "llama, larger": {**LLAMA, "n_layer": 4, "n_head": 8, "n_embd": 128, "block_size": 96, "vocab_size": 300},
    "llama, one layer, one head": {**LLAMA, "n_layer": 1, "n_head": 1, "n_kv_head": None},
    "gpt2": {},
    "gpt2, untied, narrow, epsilon": {"tied_head": False, "n_hidden": 37, "norm_eps": 0.1},
}
TEXTS = ["the cat sat on the mat, the hat", "  naïve 猫\n\nI'll 1234 'tis", "a"]


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    """A prefill, then one token at a time, two texts at once; against the forward pass without a cache."""
    model = make(**MODELS[name])
    n = model.config.block_size
    ids = random_ids(2, n, vocab=model.config.vocab_size)
    expected = full_logits(model, ids)
    rival = LlamaCpp(None, model, 2, "float32")
    half = n // 2
    found = [rival.prefill(ids[:, :half]).clone()]
    found += [rival.step(ids[:, t], t).clone() for t in range(half, n)]
    # Its GELU is looked up in a table of float16; sums of float32 elsewhere, in another order.
    bound = 2e-3 if name.startswith("gpt2") else 1e-4
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.stack(found, 1), expected[:, half - 1 :], rtol=0, atol=bound * scale)


@pytest.fixture
def vocabulary(tmp_path):
    """vocabulary(tokenizer): llama.cpp's, of the file that holds it; freed after the test."""
    models = []

    def load(tokenizer):
        path = tmp_path / "model.gguf"
        save_gguf(make(vocab_size=tokenizer.vocab_size), path, tokenizer)
        models.append(llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params()))
        assert models[0]
        return llama_cpp.llama_model_get_vocab(models[0])

    yield load
    for model in models:
        llama_cpp.llama_model_free(model)


def tokens(vocabulary, text, special=False):
    """What llama.cpp makes of a text. The tokens that a file adds to the ends of a text are asked for, too."""
    data = text.encode()
    room = (llama_cpp.llama_token * (len(data) + 2))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), True, special)
    assert count >= 0
    return [*room[:count]]


@pytest.mark.parametrize("kind, size", [("byte", None), ("bpe", 290)])
def test_tokens(kind, size, vocabulary):
    tokenizer = Tokenizer.train(kind, TEXTS * 3, size)
    theirs = vocabulary(tokenizer)
    assert llama_cpp.llama_vocab_n_tokens(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        assert tokens(theirs, text) == tokenizer.encode(text), text
    zero = tokenizer.encode("\0")
    assert [llama_cpp.llama_vocab_eos(theirs)] == zero


def test_an_end_of_text_is_one_token(vocabulary):
    document = json.loads(Tokenizer.train("bpe", TEXTS * 3, 290).to_json())
    n = len(document["model"]["vocab"])
    document["added_tokens"] = [{"id": n, "content": "<|endoftext|>", "special": True}]
    tokenizer = Tokenizer.from_json(json.dumps(document))
    theirs = vocabulary(tokenizer)
    assert llama_cpp.llama_vocab_eos(theirs) == n and llama_cpp.llama_vocab_is_eog(theirs, n)
    text = "the cat<|endoftext|>the hat"
    assert tokens(theirs, text, special=True) == [
        *tokenizer.encode("the cat"),
        n,
        *tokenizer.encode("the hat"),
    ]
