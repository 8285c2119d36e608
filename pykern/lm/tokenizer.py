"""Text to token ids and back, stored as a Hugging Face tokenizer.json.

kind          tokens                                    round trip
"byte"        the 256 bytes of UTF-8, id = byte value   exact
"bpe"         byte pairs merged by frequency (GPT-2)    exact
"character"   the characters of the training text       exact for those; others become UNKNOWN

Byte and character ids are table look-ups, done here with numpy; merging is done by the `tokenizers` library, which also
reads the file, after everything in it that we do not write ourselves has been refused.
"""

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pykern.lm.files import parse_json, read_json, replace_file

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "\ufffd"  # REPLACEMENT CHARACTER: decodes to itself and keeps the length of the text
MAX_FILE_BYTES = 8 << 20  # parsing costs up to 30 bytes of memory per byte of JSON
MAX_CHARACTERS = 0x110000
ENCODE_CHUNK = 64  # texts per call: an encoding holds some 100 bytes per token until its ids are copied

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# What a tokenizer.json may contain beside its model, by kind. A pattern of a stranger could run for ever.
_PIPELINES: dict[str, dict[str, Any]] = {
    "byte": {"pre_tokenizer": {**_BYTE_LEVEL, "use_regex": False}, "decoder": "ByteLevel"},
    "bpe": {"pre_tokenizer": {**_BYTE_LEVEL, "use_regex": True}, "decoder": "ByteLevel"},
    "character": {"pre_tokenizer": None, "decoder": "Fuse"},
}
KINDS = tuple(_PIPELINES)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself when printable, else 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"Tokenizer: text has a lone surrogate at character {error.start}") from None


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"Tokenizer: text must be str, got {type(text).__name__}")


def _pipeline(model: Any, kind: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, pre_tokenizers

    inner = HuggingFace(model)
    if kind == "character":
        inner.decoder = decoders.Fuse()
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        inner.decoder = decoders.ByteLevel()
    return inner


def _train_bpe(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    from tokenizers import models, pre_tokenizers, trainers

    inner = _pipeline(models.BPE(), "bpe")
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        ),
    )
    return inner


def _train_characters(texts: Iterable[str], vocab_size: int | None) -> "tokenizers.Tokenizer":
    """The most frequent characters (all when vocab_size is None), in code point order, after UNKNOWN."""
    from tokenizers import models

    counts = np.zeros(MAX_CHARACTERS, np.int64)
    for text in texts:
        values, found = np.unique(_code_points(text), return_counts=True)
        counts[values] += found
    counts[ord(UNKNOWN)] = 0
    seen = np.flatnonzero(counts)
    if vocab_size is not None:
        seen = np.sort(seen[np.argsort(-counts[seen], kind="stable")[: vocab_size - 1]])
    vocabulary = {UNKNOWN: 0, **{chr(point): i for i, point in enumerate(seen.tolist(), start=1)}}
    return _pipeline(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False), "character")


def _code_points(text: str) -> np.ndarray:
    _check_text(text)
    _utf8(text)
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _kind_of(document: dict[str, Any], name: str) -> str:
    """Which kind a parsed tokenizer.json is; ValueError for anything that KINDS does not cover."""
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError(f"{name}: only models of type BPE are supported")
    for part in ("normalizer", "truncation", "padding"):
        if document.get(part) is not None:
            raise ValueError(f"{name}: {part} is not supported")
    post = document.get("post_processor")
    if post is not None and (not isinstance(post, dict) or post.get("type") != "ByteLevel"):
        raise ValueError(f"{name}: post_processor is not supported, except ByteLevel")
    if document.get("added_tokens"):
        raise ValueError(f"{name}: added_tokens are not supported")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{name}: model.{option} is not supported")
    pre, decoder = document.get("pre_tokenizer"), document.get("decoder")
    decoder = decoder.get("type") if isinstance(decoder, dict) else decoder
    for kind, parts in _PIPELINES.items():
        if pre == parts["pre_tokenizer"] and decoder == parts["decoder"]:
            return kind
    raise ValueError(f"{name}: this combination of pre_tokenizer and decoder is not supported")


def _halves(merge: Any) -> Any:
    """The two tokens of a merge, which a file writes as a list or, formerly, with a space between them."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _check_vocabulary(model: dict[str, Any], kind: str, name: str) -> None:
    """Ids are exactly 0..n-1, each merge joins two tokens into a third, and the kind's own alphabet is there."""
    vocabulary, merges = model.get("vocab"), model.get("merges", [])
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{name}: model.vocab must be an object with at least one token")
    seen = bytearray(len(vocabulary))
    for token, index in vocabulary.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(seen) or seen[index]:
            raise ValueError(f"{name}: model.vocab must number its {len(seen)} tokens from 0, not {token[:20]!r} so")
        seen[index] = 1
    if not isinstance(merges, list):
        raise ValueError(f"{name}: model.merges must be a list")
    for rank, merge in enumerate(merges):
        pair = _halves(merge)
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(half, str) for half in pair)):
            raise ValueError(f"{name}: model.merges[{rank}] is not a pair of tokens")
        if any(token not in vocabulary for token in (pair[0], pair[1], pair[0] + pair[1])):
            raise ValueError(f"{name}: model.merges[{rank}] uses a token that is not in model.vocab")
    if kind == "character":
        if merges or any(len(token) != 1 or "\ud800" <= token <= "\udfff" for token in vocabulary):
            raise ValueError(f"{name}: a character vocabulary holds single characters")
        if model.get("unk_token") != UNKNOWN or vocabulary.get(UNKNOWN) != 0 or model.get("fuse_unk"):
            raise ValueError(f"{name}: the unknown token of a character vocabulary is U+FFFD, with id 0")
        return
    alphabet = byte_alphabet()
    if kind == "byte" and (merges or len(vocabulary) != 256):
        raise ValueError(f"{name}: a byte vocabulary has 256 tokens and no merges")
    if kind == "byte" and [vocabulary.get(stand_in) for stand_in in alphabet] != list(range(256)):
        raise ValueError(f"{name}: a byte vocabulary numbers each byte by its value")
    missing = [byte for byte, stand_in in enumerate(alphabet) if stand_in not in vocabulary]
    if missing:
        raise ValueError(f"{name}: model.vocab lacks byte {missing[0]}, so some text could not be encoded")
    allowed = set(alphabet)
    if any(not token or not allowed.issuperset(token) for token in vocabulary):
        raise ValueError(f"{name}: model.vocab holds a token that is not made of bytes")
    if model.get("unk_token") is not None or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ValueError(f"{name}: unk_token, byte_fallback and ignore_merges are not supported in a byte-level model")


class Tokenizer:
    """A trained tokenizer of one of KINDS; made by train or load."""

    def __init__(self, kind: str, inner: "tokenizers.Tokenizer") -> None:
        self.kind = kind
        self._inner = inner

    @classmethod
    def train(cls, kind: str, texts: Iterable[str] = (), vocab_size: int | None = None) -> "Tokenizer":
        """Tokenizer of the given kind for texts (one text or many), with at most vocab_size tokens.

        "byte" needs no texts and has 256 tokens; "bpe" needs vocab_size >= 256; "character" keeps the most frequent
        characters, all when vocab_size is None. ValueError for an unknown kind, no text, or an impossible size.
        """
        if kind not in KINDS:
            raise ValueError(f"Tokenizer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            _check_text(text)
            _utf8(text)
        smallest = 2 if kind == "character" else 256
        if vocab_size is not None and (type(vocab_size) is not int or vocab_size < smallest):
            raise ValueError(f"Tokenizer: {kind} needs a vocab_size of at least {smallest}, got {vocab_size}")
        if kind == "byte":
            from tokenizers import models

            alphabet = {stand_in: byte for byte, stand_in in enumerate(byte_alphabet())}
            return cls(kind, _pipeline(models.BPE(vocab=alphabet, merges=[]), kind))
        if not any(texts):
            raise ValueError(f"Tokenizer: {kind} needs text to train on")
        if kind == "character":
            return cls(kind, _train_characters(texts, vocab_size))
        if vocab_size is None:
            raise ValueError("Tokenizer: bpe needs a vocab_size")
        return cls(kind, _train_bpe(texts, vocab_size))

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> "Tokenizer":
        """Tokenizer from the content of a tokenizer.json; ValueError, starting with name, for what is not supported."""
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"{name}: {len(data)} bytes, but at most {MAX_FILE_BYTES} are accepted")
        return cls._from_document(parse_json(data, name), name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Tokenizer from a tokenizer.json, or from the folder that holds one. FileNotFoundError or ValueError."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        return cls._from_document(read_json(path, MAX_FILE_BYTES), str(path))

    @classmethod
    def _from_document(cls, document: dict[str, Any], name: str) -> "Tokenizer":
        from tokenizers import models

        kind = _kind_of(document, name)
        model = document["model"]
        _check_vocabulary(model, kind, name)
        merges = [(first, second) for first, second in map(_halves, model.get("merges", []))]
        unknown = UNKNOWN if kind == "character" else None
        return cls(kind, _pipeline(models.BPE(vocab=model["vocab"], merges=merges, unk_token=unknown), kind))

    def to_json(self) -> str:
        """The content of tokenizer.json; the same tokenizer always gives the same text."""
        return json.dumps(json.loads(self._inner.to_str()), ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, replacing the file at path at once."""
        data = self.to_json().encode()
        replace_file(path, lambda temporary: temporary.write_bytes(data))

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        tokens = [token for token, _ in sorted(self._inner.get_vocab().items(), key=lambda item: item[1])]
        if self.kind == "character":
            return [token.encode() for token in tokens]
        byte_of = {stand_in: byte for byte, stand_in in enumerate(byte_alphabet())}
        return [bytes(byte_of[character] for character in token) for token in tokens]

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int64 [vocab_size]. Summed over the targets of an evaluation it turns
        nats into bits per byte. UNKNOWN counts 1, the fewest that it can stand for, so the figure never flatters."""
        lengths = np.array([len(token) for token in self._token_bytes], np.int64)
        if self.kind == "character":
            lengths[0] = 1
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
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            _check_text(text)
        if self.kind == "byte":
            return np.frombuffer(b"".join(map(_utf8, texts)), np.uint8).astype(self.dtype)
        if self.kind == "character":
            parts = [self._character_ids[_code_points(text)].astype(self.dtype) for text in texts]
        else:
            for text in texts:
                _utf8(text)
            parts = []
            for start in range(0, len(texts), ENCODE_CHUNK):
                encodings = self._inner.encode_batch_fast(texts[start : start + ENCODE_CHUNK], add_special_tokens=False)
                parts += [np.array(encoding.ids, self.dtype) for encoding in encodings]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text. TypeError unless str, ValueError for a lone surrogate."""
        _check_text(text)
        return self.encode_texts([text]).tolist()

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for; they may end inside a character. IndexError names an id out of range."""
        tokens, result = self._token_bytes, []
        for position, index in enumerate(ids):
            index = int(index)
            if not 0 <= index < len(tokens):
                raise IndexError(f"Tokenizer: id {index} at position {position}, but there are {len(tokens)} tokens")
            result.append(tokens[index])
        return b"".join(result)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")
