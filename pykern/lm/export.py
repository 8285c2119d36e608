"""Files for other programs: numpy's npz, and GGUF as llama.cpp reads it.

GGUF: llama.cpp rotates neighbours (2i, 2i + 1) of a head in its llama architecture, we rotate (i, i + D / 2). So the
rows of q and k are written in another order, as llama.cpp's own converter does: row 2i + s of a head is our row
i + s D / 2. Scores are sums over a head, which that leaves as they are.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pykern.lm.config import Config
from pykern.lm.families import GGUF_NAMES, family_of, split_rows
from pykern.lm.files import json_bytes, replace_file
from pykern.lm.huggingface import check_vocabulary
from pykern.lm.tokenizer import Tokenizer, byte_alphabet

if TYPE_CHECKING:
    from pykern.lm.model import Transformer

GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens
NO_MERGE = ["\u2581 \u2581"]  # llama.cpp wants a list that is not empty; no text has this sign once it is bytes


def _check_free(what: str, path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{what}: {path} exists and is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().contiguous().numpy()


def save_npz(model: "Transformer", path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """The weights as float32 arrays under their own names, in a file that np.load(path, allow_pickle=False) reads.

    "config.json", and "tokenizer.json" when one is given, are the bytes of those files, uint8 [N]: json.loads(bytes(x))
    gives their content. A tied head is in the file once, as transformer.wte.weight. FileExistsError for an old file.
    """
    path = Path(path)
    check_vocabulary("save_npz", model, tokenizer)
    arrays: dict[str, Any] = {name: _values(tensor) for name, tensor in model.state_dict().items()}
    arrays["config.json"] = np.frombuffer(json_bytes(model.config.to_dict()), np.uint8)
    if tokenizer is not None:
        arrays["tokenizer.json"] = np.frombuffer(tokenizer.to_json().encode(), np.uint8)
    _check_free("save_npz", path)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a path without .npz would get it
            np.savez(file, **arrays)

    replace_file(path, write)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """rows [heads * D, E] with rows i and i + D / 2 of every head as neighbours 2i and 2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_tensors(model: "Transformer", family: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) of every tensor of the file. numpy shapes; the file lists them in reverse."""
    config = model.config
    heads = {"attn_q": config.n_head, "attn_k": config.kv_heads}
    for name, tensor in model.state_dict().items():
        for part, rows in split_rows(config, name, tensor, GGUF_NAMES[family]):
            kind = part.split(".")[-2]
            yield part, _values(interleaved(rows, heads[kind]) if kind in heads else rows)


def gguf_tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any] | None:
    """tokens, types, merges and the token that ends a text, for llama.cpp's "gpt2" tokenizer.

    None for a tokenizer that llama.cpp does not have: all but bytes, and pairs of them with GPT-2's split. Without an
    <|endoftext|> the zero byte ends a text: llama.cpp would take token 11 for that, a comma in many vocabularies.
    """
    if tokenizer is None:
        return None
    document = json.loads(tokenizer.to_json())
    model, before = document["model"], document.get("pre_tokenizer") or {}
    split = {key: value for key, value in before.items() if key != "trim_offsets"}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    whole = {**GPT2_SPLIT, "use_regex": False}
    if model.get("type") != "BPE" or document.get("normalizer") or model.get("ignore_merges"):
        return None
    if split != GPT2_SPLIT and (split != whole or merges):  # without merges, how a text is split changes nothing
        return None
    special = tokenizer.special_tokens
    vocabulary: dict[str, int] = model["vocab"] | special
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    padding = [f"[PAD{i}]" for i in range(len(vocabulary), vocab_size)]
    return {
        "tokens": words + padding,
        "types": [CONTROL if word in special else NORMAL for word in words] + [UNUSED] * len(padding),
        "merges": merges or NO_MERGE,
        "end": special.get("<|endoftext|>", vocabulary[byte_alphabet()[0]]),
    }


def _check_config(config: Config) -> str:
    family = family_of(config, "save_gguf")
    if family == "gpt2" and config.activation != "gelu":
        raise ValueError(f"save_gguf: llama.cpp computes GPT-2 with activation 'gelu' alone, not {config.activation!r}")
    return family


def save_gguf(model: "Transformer", path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """A GGUF file of float32 tensors, architecture gpt2 or llama, for llama.cpp.

    Models as for save_hf, GPT-2 with activation "gelu" only: ValueError names the first field that llama.cpp's
    architectures do not have. Tokenizers of kinds byte and bpe are written; with another one, or none, the file says so
    (tokenizer.ggml.model none) and is given token ids. FileExistsError for an old file; ImportError without the gguf
    package.
    """
    path = Path(path)
    family = _check_config(model.config)
    check_vocabulary("save_gguf", model, tokenizer)
    try:
        import gguf
    except ImportError:
        raise ImportError("save_gguf: the gguf package is missing: pip install 'pykern[hf]'") from None
    config = model.config
    words = gguf_tokenizer(tokenizer, config.vocab_size)
    _check_free("save_gguf", path)

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, family)
        writer.add_type("model")
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(config.hidden_size)
        writer.add_head_count(config.n_head)
        if family == "gpt2":
            writer.add_layer_norm_eps(config.norm_epsilon)
        else:
            writer.add_head_count_kv(config.kv_heads)
            writer.add_layer_norm_rms_eps(config.norm_epsilon)
            writer.add_rope_dimension_count(config.head_size)
            writer.add_rope_freq_base(config.rope_theta)
        if words is None:
            writer.add_tokenizer_model("none")
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(words["tokens"])
            writer.add_token_types(words["types"])
            writer.add_token_merges(words["merges"])
            writer.add_bos_token_id(words["end"])
            writer.add_eos_token_id(words["end"])
            writer.add_add_bos_token(False)
            writer.add_add_eos_token(False)
        for name, values in gguf_tensors(model, family):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    replace_file(path, write)
