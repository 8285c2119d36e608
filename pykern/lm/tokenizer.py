"""Text to token ids and back, stored as a Hugging Face tokenizer.json.

kind          tokens                                    round trip
"byte"        the 256 bytes of UTF-8, id = byte value   exact
"character"   the characters of the training text       exact for those; others become UNKNOWN
"word"        the words of the training text            exact for those; others become UNKNOWN_WORD
"wordpiece"   starts of words and "##" pieces (BERT)    exact for words of known characters
"bpe"         byte pairs merged by frequency (GPT-2)    exact
"unigram"     most probable pieces (SentencePiece)      exact

Byte and character ids are table look-ups, done here with numpy; the rest is done by the `tokenizers` library. What each
kind is made of is in tokenizer_kinds, what is read from a file in tokenizer_files.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from pykern.lm.files import parse_json, read_json, replace_file
from pykern.lm.tokenizer_files import read_document
from pykern.lm.tokenizer_kinds import (
    CONTINUES,
    KINDS,
    MAX_CHARACTERS,
    SMALLEST,
    UNKNOWN,
    UNKNOWN_WORD,
    Parts,
    byte_alphabet,
    chunks,
    train,
)

__all__ = ["KINDS", "MAX_FILE_BYTES", "UNKNOWN", "UNKNOWN_WORD", "Piece", "Tokenizer", "byte_alphabet"]

MAX_FILE_BYTES = 8 << 20  # parsing costs up to 30 bytes of memory per byte of JSON
ENCODE_CHUNKS = 16  # per call: an encoding holds some 100 bytes per token until its ids are copied
MAX_KNOWN = 1 << 18  # words whose ids are kept while a text is encoded


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"Tokenizer: text has a lone surrogate at character {error.start}") from None


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"Tokenizer: text must be str, got {type(text).__name__}")


@dataclass(frozen=True)
class Piece:
    """One token of a text: its id, the bytes of the text that it covers, whether the id says which bytes those are, and
    "##" where a wordpiece goes on with a word."""

    id: int
    data: bytes
    known: bool
    mark: str = ""

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


class Tokenizer:
    """A trained tokenizer of one of KINDS; made by train or load.

    TypeError: not text. ValueError: an unknown kind, a size out of range, a file that is not understood. IndexError: no
    such id.
    """

    def __init__(self, parts: Parts) -> None:
        self.kind = parts.kind
        self._parts = parts
        self._inner = parts.inner

    @classmethod
    def train(cls, kind: str, texts: Iterable[str] = (), vocab_size: int | None = None) -> "Tokenizer":
        """Tokenizer of the given kind for texts (one text or many), with at most vocab_size tokens.

        "byte" needs no texts and has 256 tokens; "bpe" needs vocab_size >= 256, "unigram" >= 260, "wordpiece" >= 8;
        "character" and "word" keep the most frequent, all when vocab_size is None. ValueError for an unknown kind, no
        text, or an impossible size.
        """
        if kind not in KINDS:
            raise ValueError(f"Tokenizer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            _check_text(text)
            _utf8(text)
        if vocab_size is not None and (type(vocab_size) is not int or vocab_size < SMALLEST[kind]):
            raise ValueError(f"Tokenizer: {kind} needs a vocab_size of at least {SMALLEST[kind]}, got {vocab_size}")
        made = cls(train(kind, texts, vocab_size))
        size = len(made.to_json().encode())
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"Tokenizer: {made.vocab_size} tokens take a file of {size} bytes, but at most {MAX_FILE_BYTES} "
                "are read; give a smaller vocab_size"
            )
        return made

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json", *, max_bytes: int = MAX_FILE_BYTES) -> "Tokenizer":
        """Tokenizer from the content of a tokenizer.json; ValueError, starting with name, for what is not supported."""
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > max_bytes:
            raise ValueError(f"{name}: {len(data)} bytes, but at most {max_bytes} are accepted")
        return cls(read_document(parse_json(data, name), name))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> "Tokenizer":
        """Tokenizer from a tokenizer.json, or from the folder that holds one. FileNotFoundError or ValueError.

        Beside its own files it reads byte-level and byte-fallback BPE of other projects; see docs/tokenizers.md.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        return cls(read_document(read_json(path, max_bytes), str(path)))

    def to_json(self) -> str:
        """The content of tokenizer.json; the same tokenizer always gives the same text."""
        if self._parts.document is not None:
            return self._parts.document
        return json.dumps(json.loads(self._inner.to_str()), ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, replacing the file at path at once."""
        data = self.to_json().encode()
        replace_file(path, lambda temporary: temporary.write_bytes(data))

    @property
    def vocab_size(self) -> int:
        return len(self._parts.tokens)

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what has no token, None when every text has tokens."""
        return self._parts.unknown

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the added tokens of another project's file, by name. No text is read as one of them."""
        return dict(self._parts.special)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int64 [vocab_size]; 0 for the unknown and special tokens.

        Summed over the targets of an evaluation it turns nats into bits per byte. Bytes that no id determines are not
        divided by: what a model did not predict is not to its credit.
        """
        lengths = np.array([len(token) for token in self._parts.tokens], np.int64)
        lengths[self._parts.textless] = 0
        return lengths

    @cached_property
    def _character_ids(self) -> np.ndarray:
        table = np.zeros(MAX_CHARACTERS, np.uint32)  # 0 is UNKNOWN
        for token, index in self._inner.get_vocab().items():
            table[ord(token)] = index
        return table

    @property
    def dtype(self) -> np.dtype:
        """uint16 when every id fits, else uint32: what encode_texts and token files use."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Ids of all texts one after the other, uint16 or uint32 [N]; no token crosses from one text to the next."""
        return self.encode_each([texts] if isinstance(texts, str) else texts)[0]

    def encode_each(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """What encode_texts gives, and how many of the ids are those of each text, int64 [texts]."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        data = [_utf8(text) for text in texts]
        if self.kind == "byte":
            return np.frombuffer(b"".join(data), np.uint8).astype(self.dtype), np.array([*map(len, data)], np.int64)
        del data
        if self.kind == "character":
            points = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
            return self._character_ids[points].astype(self.dtype), np.array([*map(len, texts)], np.int64)
        parts_of = [list(chunks(text, self._parts.boundary)) for text in texts]  # one at least
        found = [np.zeros(0, self.dtype), *self._encode_parts(list(chain.from_iterable(parts_of)))]
        ends = np.cumsum([0, *map(len, found)])[1:]  # of the nothing in front and of every part
        lengths = np.diff(ends[np.cumsum([0, *map(len, parts_of)])])
        return np.concatenate(found), lengths

    def _encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        """Ids of each of what chunks() gave."""
        found = []
        known: dict[str, tuple[int, ...]] = {}
        for start in range(0, len(parts), ENCODE_CHUNKS):
            batch = parts[start : start + ENCODE_CHUNKS]
            pattern = self._parts.words
            others = [part for part in batch if pattern is None or not part.isascii()]
            encodings = iter(self._inner.encode_batch_fast(others, add_special_tokens=False))
            for part in batch:
                if pattern is not None and part.isascii():
                    found.append(self._encode_words(part, pattern, known))
                else:
                    found.append(np.array(next(encodings).ids, self.dtype))
        return found

    def _encode_words(self, part: str, pattern: re.Pattern[str], known: dict[str, tuple[int, ...]]) -> np.ndarray:
        """Ids of an ASCII text: each distinct word goes to the library once, and known keeps what came back."""
        words = pattern.findall(part)
        if len(known) > MAX_KNOWN:
            known.clear()
        new = [word for word in set(words) if word not in known]  # a difference would walk through all of known
        if new:
            encodings = self._inner.encode_batch_fast(new, add_special_tokens=False)
            known.update((word, tuple(encoding.ids)) for word, encoding in zip(new, encodings, strict=True))
        return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), self.dtype)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text. TypeError unless str, ValueError for a lone surrogate."""
        _check_text(text)
        return self.encode_texts([text]).tolist()

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of text with the bytes that each covers; for every kind that train makes, joined they are text."""
        ids, tokens, unknown = self.encode(text), self._parts.tokens, self._parts.unknown
        data = [tokens[index] for index in ids]
        if unknown is not None and unknown in ids:
            spans = self._inner.encode(text, add_special_tokens=False).offsets
            data = [text[start:stop].encode() for start, stop in spans]
        marks = ["" for _ in ids]
        if self.kind == "wordpiece":
            names = (self._inner.id_to_token(index) or "" for index in ids)
            marks = [CONTINUES if name.startswith(CONTINUES) else "" for name in names]
        found = zip(ids, data, marks, strict=True)
        return [Piece(index, part, index != unknown, mark) for index, part, mark in found]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for; they may end inside a character. IndexError names an id out of range."""
        tokens, result = self._parts.tokens, []
        for position, index in enumerate(ids):
            index = int(index)
            if not 0 <= index < len(tokens):
                raise IndexError(f"Tokenizer: id {index} at position {position}, but there are {len(tokens)} tokens")
            result.append(tokens[index])
        return b"".join(result)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text[1:] if self._parts.drops_space and text.startswith(" ") else text
