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
from pykern.lm.documents import CHUNK, Documents, bounds_path
from pykern.lm.files import json_bytes, read_json, replace_file
from pykern.lm.tokenizer import Tokenizer

MAX_JSON_BYTES = 1 << 16
FIELDS = {"tokens": int, "held_out": int, "sha256": str, "tokenizer_sha256": str, "description": str}


@dataclass(frozen=True)
class TokenFile:
    """train, val: token ids, mapped; train_texts, val_texts: the same as texts, when read() was asked for them.

    sha256 is that of the corpus, or of what was read when nothing says what it is.
    """

    train: np.ndarray
    val: np.ndarray
    sha256: str
    description: str
    train_texts: Documents | None = None
    val_texts: Documents | None = None


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


def _bounds(path: Path) -> np.ndarray:
    """Where the texts of a token file begin, and the last one ends, int64 [texts + 1]."""
    if not bounds_path(path).exists():
        raise FileNotFoundError(f"{bounds_path(path)}: no such file; without it the texts of {path} are not known")
    return np.asarray(Documents.load(path).bounds)


def _whole_texts(bounds: np.ndarray, tokens: int) -> int:
    """Tokens of the last texts that fit into so many tokens; of the last one when it does not."""
    end = int(bounds[-1])
    before = bounds[bounds < end]  # where texts begin, but for empty ones at the end
    fitting = before[before >= end - tokens]
    return end - int(fitting[0] if len(fitting) else before[-1]) if len(before) else 0


def read(path: str | os.PathLike[str], tokenizer: Tokenizer, *, texts: bool = False) -> TokenFile:
    """The token file `path`; texts: with the bounds in NAME.documents.npy, and then whole texts are held out.

    FileNotFoundError; ValueError when it is none, when it was made with another tokenizer, when a token is not one of
    the tokenizer's, or when it is too short to split. Every token is looked at once.
    """
    path = Path(path)
    tokens = np.asarray(load_tokens(path))
    bounds = _bounds(path) if texts else None
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
        if bounds is not None:
            held_out = _whole_texts(bounds, held_out)
            sha256 = hashlib.sha256(f"{sha256} {file_sha256(bounds_path(path))}".encode()).hexdigest()
            description = f"{path}: its last texts, 5 % of its tokens, held out"
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        if part.min() < 0 or part.max() >= tokenizer.vocab_size:
            bad = int(part.min() if part.min() < 0 else part.max())
            raise ValueError(f"{path}: token {bad}, but the tokenizer has {tokenizer.vocab_size} tokens")
    cut = len(tokens) - held_out
    if cut < 1:
        texts_of = "" if bounds is None else f" in {len(bounds) - 1} texts"
        raise ValueError(f"{path}: too short to split, {len(tokens)} tokens{texts_of}")
    train, val = tokens[:cut], tokens[cut:]
    if bounds is None:
        return TokenFile(train, val, sha256, description)
    first = int(np.searchsorted(bounds, cut))  # the first text that is held out
    if bounds[first] != cut:
        raise ValueError(f"{bounds_path(path)}: no text begins at token {cut}, where the held-out texts of {path} do")
    held_out_texts = Documents(val, bounds[first:] - cut)
    return TokenFile(train, val, sha256, description, Documents(train, bounds[: first + 1]), held_out_texts)
