"""Folders of Hugging Face transformers: GPT-2 and Llama models, config.json beside safetensors files.

What this package does not compute is refused, a setting of config.json that nobody knows here included: a model that
is loaded gives the logits that transformers gives. Nothing is ever unpickled.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pykern.lm.checkpoint import Checkpoint, read_header, tensor_writer
from pykern.lm.config import Config
from pykern.lm.families import HF_NAMES, family_of, is_transposed, names_in, row_counts, split_rows
from pykern.lm.files import json_bytes, read_json, sync
from pykern.lm.hf_config import config_of, hf_config
from pykern.lm.tokenizer import MAX_FILE_BYTES, Tokenizer

if TYPE_CHECKING:
    from pykern.lm.model import Transformer

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 4096
FLOATS = ("float32", "float16", "bfloat16", "float64")


# ---- reading ----


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. FileNotFoundError without any, ValueError for a pickle or a bad index."""
    if (folder / MODEL).exists():
        return [folder / MODEL]
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise ValueError(f"{folder}: {pickles[0]} is a pickle, which can run any code: only safetensors are read")
        raise FileNotFoundError(f"{folder}: neither {MODEL} nor {INDEX}")
    shards = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map must map tensors to files")
    files = sorted(set(shards.values()))
    if not files or len(files) > MAX_SHARDS:
        raise ValueError(f"{index}: weight_map names {len(files)} files, expected 1 to {MAX_SHARDS}")
    for name in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index}: {name[:60]!r} is not the plain name of a safetensors file")
    return [folder / name for name in files]


def _locate(files: list[Path], family: str) -> dict[str, tuple[Path, str, list[int]]]:
    """File, name there and shape of every tensor, under the name of a complete model; ValueError for an odd dtype."""
    found: dict[str, tuple[Path, str, list[int]]] = {}
    headers = {path: read_header(path) for path in files}
    bare = family == "gpt2" and not any(name.startswith("transformer.") for names in headers.values() for name in names)
    # Tables and masks that older versions stored beside the weights.
    buffer = re.compile(r".*\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
    for path, header in headers.items():
        for name, (shape, dtype) in header.items():
            if buffer.fullmatch(name):
                continue
            if dtype not in FLOATS:
                raise ValueError(f"{path}: tensor {name[:100]!r} is {dtype}, expected {' or '.join(FLOATS)}")
            full = f"transformer.{name}" if bare and not name.startswith("lm_head.") else name
            if full in found:
                raise ValueError(f"{path}: tensor {name[:100]!r} is also in {found[full][0].name}")
            found[full] = (path, name, shape)
    return found


def _check_shapes(
    config: Config, family: str, expected: Mapping[str, Tensor], found: Mapping[str, tuple[Path, str, list[int]]]
) -> None:
    """ValueError naming the first tensor that is missing, of another shape, or of no model like this."""
    known = set()
    folder = next(iter(found.values()))[0].parent if found else "the folder"
    for name, tensor in expected.items():
        theirs = names_in(name, HF_NAMES[family])
        rows = row_counts(config, len(theirs), tensor.shape[0])
        for part, count in zip(theirs, rows, strict=True):
            shape = [count, *tensor.shape[1:]]
            shape = shape[::-1] if is_transposed(family, name, tensor) else shape
            if part not in found:
                raise ValueError(f"{folder}: tensor {part!r} is missing")
            if found[part][2] != shape:
                raise ValueError(f"{found[part][0]}: tensor {part!r} has shape {found[part][2]}, expected {shape}")
            known.add(part)
    tied = {"lm_head.weight"} if config.tied_head else set()
    extra = [name for name in found if name not in known | tied]
    if extra:
        raise ValueError(f"{found[extra[0]][0]}: tensor {extra[0][:100]!r} does not belong to this model")


def _read(found: Mapping[str, tuple[Path, str, list[int]]]) -> dict[str, Tensor]:
    """Every located tensor in float32."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in dict.fromkeys(path for path, _, _ in found.values()):
        try:
            with safe_open(path, framework="pt") as file:
                for name, (where, stored, _) in found.items():
                    if where == path:
                        tensors[name] = file.get_tensor(stored).float()
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: cannot be read as a safetensors file ({error})") from None
    return tensors


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{path}: {tokenizer.vocab_size} tokens, but {CONFIG} has vocab_size {vocab_size}")
        if len(tokenizer.to_json().encode()) > MAX_FILE_BYTES:
            raise ValueError(f"{path}: too large to be written again, at most {MAX_FILE_BYTES} bytes are read")
    except ValueError as error:
        raise ValueError(f"{error}; load_hf(folder, tokenizer=False) leaves the tokenizer unread") from None
    return tokenizer


def load_hf(folder: str | os.PathLike[str], *, tokenizer: bool = True) -> "tuple[Transformer, Tokenizer | None]":
    """The GPT-2 or Llama model, in float32, of a folder that transformers wrote, and its tokenizer if there is one.

    Reads config.json, model.safetensors or the files of model.safetensors.index.json, and tokenizer.json. Dropout is an
    option of training: the model has none. tokenizer=False leaves tokenizer.json unread. FileNotFoundError names a
    missing file; ValueError names the file and the setting, the tensor or the part that is not supported.
    """
    from pykern.lm.model import Transformer, expected_tensors

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    values = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    config = config_of(values, str(folder / CONFIG))
    family = values["model_type"]
    expected = expected_tensors(config)
    found = _locate(_weight_files(folder), family)
    _check_shapes(config, family, expected, found)
    read = (
        _read_tokenizer(folder / TOKENIZER, config.vocab_size) if tokenizer and (folder / TOKENIZER).exists() else None
    )
    parts = _read(found)
    if config.tied_head and "lm_head.weight" in parts:
        embedding = parts[names_in("transformer.wte.weight", HF_NAMES[family])[0]]
        if not torch.equal(parts["lm_head.weight"], embedding):
            raise ValueError(f"{folder}: lm_head.weight differs from the embedding, but tie_word_embeddings is true")
    tensors = {}
    for name, tensor in expected.items():
        rows = [parts.pop(part) for part in names_in(name, HF_NAMES[family])]
        rows = [part.T for part in rows] if is_transposed(family, name, tensor) else rows
        tensors[name] = torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
    return Transformer.from_checkpoint(Checkpoint(config, tensors, None, None, None)), read


# ---- writing ----


def hf_tensors(model: "Transformer") -> dict[str, Tensor]:
    """The model's weights under the names, and in the shapes, of transformers: float32, on the CPU."""
    config, family = model.config, family_of(model.config, "save_hf")
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.detach().float().cpu()
        for part, rows in split_rows(config, name, value, HF_NAMES[family]):
            tensors[part] = (rows.T if is_transposed(family, name, value) else rows).contiguous()
    return tensors


def check_vocabulary(what: str, model: "Transformer", tokenizer: Tokenizer | None) -> None:
    """ValueError when the tokenizer has tokens that the model has no vector for."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{what}: the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of "
            f"{model.config.vocab_size}"
        )


def save_hf(model: "Transformer", folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Makes `folder`, which must not exist or be empty, one that transformers' AutoModelForCausalLM loads, in float32.

    A model with learned positions, LayerNorm and an MLP without a gate is written as GPT-2; one with RoPE, RMSNorm and
    SwiGLU as Llama. ValueError names the first field of any other Config. FileExistsError when something is there.
    tokenizer becomes a tokenizer.json that AutoTokenizer loads. The folder appears complete or not at all.
    """
    folder = Path(folder).resolve()
    check_vocabulary("save_hf", model, tokenizer)
    config = json_bytes(hf_config(model.config))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save_hf: {folder} exists and is not an empty folder")
    write = tensor_writer(hf_tensors(model), "tensors")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staging.mkdir()
    try:
        (staging / CONFIG).write_bytes(config)
        write(staging / MODEL)
        if tokenizer is not None:
            (staging / TOKENIZER).write_bytes(tokenizer.to_json().encode())
            names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
            (staging / TOKENIZER_CONFIG).write_bytes(json_bytes(names | {"clean_up_tokenization_spaces": False}))
        for path in staging.iterdir():
            sync(path)
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync(folder.parent)
