"""A corpus as token files: NAME.npy, mapped and not read, NAME.documents.npy, and NAME.json which says what they are.

The texts to train on come first, the held-out texts after them. With NAME.json a run on the token file is the run on
the text: same split, same hash, same losses. Any other .npy of tokens can be trained on too: its last 5 % are held out.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pykern.lm import corpus
from pykern.lm.batches import load_tokens
from pykern.lm.documents import CHUNK, Documents
from pykern.lm.files import json_bytes, read_json, replace_file
from pykern.lm.tokenizer import Tokenizer

MAX_JSON_BYTES = 1 << 16
FIELDS = {"tokens": int, "held_out": int, "sha256": str, "tokenizer_sha256": str, "description": str}


@dataclass(frozen=True)
class TokenFile:
    """train, val: token ids, mapped. sha256 is that of the corpus, or of the file when nothing says what it is."""

    train: np.ndarray
    val: np.ndarray
    sha256: str
    description: str


def about_path(path: str | os.PathLike[str]) -> Path:
    """Where the description of a token file is: NAME.json for NAME.npy."""
    return Path(path).with_suffix(".json")


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def prepare(source: str | os.PathLike[str], tokenizer: Tokenizer, path: str | os.PathLike[str]) -> TokenFile:
    """Writes the corpus of `source` ("stdlib", a file or a folder) as the token file `path`, NAME.npy, and reads it."""
    if Path(path).suffix != ".npy":
        raise ValueError(f"prepare: a token file is named NAME.npy, not {Path(path).name}")
    text = corpus.load(source)
    documents = Documents.encode([*text.train_texts, *text.val_texts], tokenizer)
    about = {
        "tokens": len(documents.tokens),
        "held_out": int(documents.lengths[len(text.train_texts) :].sum()),
        "sha256": text.sha256,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "description": text.description,
    }
    about_path(path).unlink(missing_ok=True)  # goes first and comes last: it never describes another file's tokens
    documents.save(path)
    replace_file(about_path(path), lambda temporary: temporary.write_bytes(json_bytes(about)))
    return read(path, tokenizer)


def read(path: str | os.PathLike[str], tokenizer: Tokenizer) -> TokenFile:
    """The token file `path`. FileNotFoundError; ValueError when it is none, when it was made with another tokenizer,
    when a token is not one of the tokenizer's, or when it is too short to split. Every token is looked at once."""
    path = Path(path)
    tokens = np.asarray(load_tokens(path))
    if about_path(path).exists():
        about = read_json(about_path(path), MAX_JSON_BYTES)
        for name, kind in FIELDS.items():
            if type(about.get(name)) is not kind:
                raise ValueError(f"{about_path(path)}: {name} must be {kind.__name__}")
        if about["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
            raise ValueError(f"{path} was made with another tokenizer than the {tokenizer.kind} one given")
        if about["tokens"] != len(tokens) or not 0 <= about["held_out"] <= len(tokens):
            raise ValueError(f"{about_path(path)}: describes {about['tokens']} tokens, but {path} has {len(tokens)}")
        held_out, sha256, description = about["held_out"], about["sha256"], about["description"]
    else:
        held_out = max(2, len(tokens) // corpus.HELD_OUT)
        sha256 = file_sha256(path)
        description = f"{path}: its last 5 % of tokens held out"
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        if part.min() < 0 or part.max() >= tokenizer.vocab_size:
            bad = int(part.min() if part.min() < 0 else part.max())
            raise ValueError(f"{path}: token {bad}, but the tokenizer has {tokenizer.vocab_size} tokens")
    cut = len(tokens) - held_out
    if cut < 1:
        raise ValueError(f"{path}: too short to split, {len(tokens)} tokens")
    return TokenFile(tokens[:cut], tokens[cut:], sha256, description)
