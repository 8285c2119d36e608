"""A parsed tokenizer.json to the parts of a tokenizer, after everything in it that could do harm has been refused.

Two sorts of files are read: those that pykern writes, and byte-level or byte-fallback BPE as GPT-2 and Llama have it.
Of the latter only the vocabulary and the merges are used, and a split when its pattern is a known one: that of a
stranger could run for ever. Special tokens get their ids and are never looked for in a text.
"""

import json
from dataclasses import replace
from typing import Any

from pykern.lm.tokenizer_kinds import (
    ASCII_GPT2,
    BYTE_LEVEL,
    BYTE_TOKENS,
    CONTINUES,
    LAYOUTS,
    MAX_PIECES_TEXT,
    MAX_WORD,
    SPACE_BOUNDARY,
    UNKNOWN,
    UNKNOWN_WORD,
    Parts,
    assemble,
    byte_alphabet,
    byte_level_text,
    bytes_of_alphabet,
)

MAX_SCORE = 1e4  # of a unigram piece, so that no sum over a text overflows
MAX_ADDED = 1 << 16  # added tokens
# Split patterns of other projects that are known to end, beside GPT-2's, which is the library's own.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_SPLITS = {"Llama 3": _CONTRACTIONS + r"\p{N}{1,3}" + _REST, "Qwen 2": _CONTRACTIONS + r"\p{N}" + _REST}
SPACE = "▁"  # what stands for a space in a Llama 2 vocabulary


def _kind_of(document: dict[str, Any], model: dict[str, Any]) -> str | None:
    """The kind that writes such a file, None when pykern does not."""
    if document.get("added_tokens") or document.get("normalizer") is not None:
        return None
    post = document.get("post_processor")
    if post is not None and post.get("type") != "ByteLevel":
        return None
    decoder = document.get("decoder")
    for kind, layout in LAYOUTS.items():
        wanted = layout["decoder"]
        same = decoder == wanted
        if wanted == "ByteLevel":
            same = isinstance(decoder, dict) and decoder.get("type") == wanted
        right = model.get("type", "BPE") == layout["model"] and document.get("pre_tokenizer") == layout["pre_tokenizer"]
        if right and same:
            return kind
    return None


def _ids(vocabulary: Any, name: str) -> list[str]:
    """The tokens of a {token: id} in the order of their ids, which are exactly 0..n-1."""
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{name}: model.vocab must be an object with at least one token")
    tokens: list[str | None] = [None] * len(vocabulary)
    for token, index in vocabulary.items():
        right = not isinstance(index, bool) and isinstance(index, int) and 0 <= index < len(tokens)
        if not right or tokens[index] is not None:
            raise ValueError(f"{name}: model.vocab must number its {len(tokens)} tokens from 0, not {token[:20]!r} so")
        tokens[index] = token
    return [token for token in tokens if token is not None]


def _check_texts(tokens: list[str], name: str) -> None:
    for token in tokens:
        if not token or any("\ud800" <= character <= "\udfff" for character in token):
            raise ValueError(f"{name}: model.vocab holds {token[:20]!r}, which is no text")


def _merges(model: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """The pairs of model.merges, which a file writes as lists or, formerly, with a space between the halves."""
    vocabulary, merges = model["vocab"], model.get("merges", [])
    if not isinstance(merges, list):
        raise ValueError(f"{name}: model.merges must be a list")
    pairs = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(half, str) for half in pair)):
            raise ValueError(f"{name}: model.merges[{rank}] is not a pair of tokens")
        if any(token not in vocabulary for token in (pair[0], pair[1], pair[0] + pair[1])):
            raise ValueError(f"{name}: model.merges[{rank}] uses a token that is not in model.vocab")
        pairs.append((pair[0], pair[1]))
    return pairs


def _check_byte_level(tokens: list[str], special: dict[str, int], model: dict[str, Any], name: str) -> None:
    """Every byte has a token, and every token but the special ones is made of bytes."""
    alphabet = byte_alphabet()
    missing = sorted(set(range(256)) - {byte for byte, stand_in in enumerate(alphabet) if stand_in in model["vocab"]})
    if missing:
        raise ValueError(f"{name}: model.vocab lacks byte {missing[0]}, so some text could not be encoded")
    allowed = set(alphabet)
    if any(not token or not allowed.issuperset(token) for token in tokens if token not in special):
        raise ValueError(f"{name}: model.vocab holds a token that is not made of bytes")
    if model.get("unk_token") is not None or model.get("byte_fallback"):
        raise ValueError(f"{name}: unk_token and byte_fallback are not supported in a byte-level model")


def _unigram(model: dict[str, Any], name: str) -> Parts:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, list):
        raise ValueError(f"{name}: model.vocab of a unigram model must be a list")
    pairs: dict[str, float] = {}
    for rank, entry in enumerate(vocabulary):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{name}: model.vocab[{rank}] is not a piece and its score")
        piece, score = entry
        if isinstance(score, bool) or not isinstance(score, int | float) or not -MAX_SCORE <= score <= 0:
            raise ValueError(f"{name}: model.vocab[{rank}] must have a score from -{MAX_SCORE:g} to 0")
        if piece in pairs:
            raise ValueError(f"{name}: model.vocab holds {piece[:20]!r} twice")
        pairs[piece] = float(score)
    if tuple(pairs)[:257] != (UNKNOWN, *BYTE_TOKENS):
        raise ValueError(f"{name}: a unigram vocabulary begins with U+FFFD and the 256 bytes")
    if type(model.get("unk_id")) is not int or model["unk_id"] != 0 or model.get("byte_fallback") is not True:
        raise ValueError(f"{name}: a unigram model has unk_id 0 and byte_fallback")
    _check_texts(list(pairs), name)
    length = sum(map(len, pairs)) - sum(map(len, (UNKNOWN, *BYTE_TOKENS)))
    if length > MAX_PIECES_TEXT:
        raise ValueError(f"{name}: the pieces have {length} characters, but at most {MAX_PIECES_TEXT} are accepted")
    return assemble("unigram", list(pairs.items()))


def _own(kind: str, model: dict[str, Any], name: str) -> Parts:
    """The parts of a file of the sort that pykern writes."""
    if kind == "unigram":
        return _unigram(model, name)
    vocabulary = model.get("vocab")
    tokens = _ids(vocabulary, name)
    if kind in ("word", "wordpiece"):
        _check_texts(tokens, name)
        if model.get("unk_token") != UNKNOWN_WORD or tokens[0] != UNKNOWN_WORD:
            raise ValueError(f"{name}: the unknown token of a {kind} vocabulary is a space and U+FFFD, with id 0")
        limit = model.get("max_input_chars_per_word")
        if kind == "wordpiece" and (
            model.get("continuing_subword_prefix") != CONTINUES or type(limit) is not int or limit != MAX_WORD
        ):
            raise ValueError(f"{name}: a wordpiece model has the prefix {CONTINUES} and words of {MAX_WORD}")
        if kind == "wordpiece" and CONTINUES in tokens:
            raise ValueError(f"{name}: model.vocab holds {CONTINUES!r}, which is no text")
        return assemble(kind, vocabulary)
    merges = _merges(model, name)
    if kind == "character":
        if merges or any(len(token) != 1 or "\ud800" <= token <= "\udfff" for token in tokens):
            raise ValueError(f"{name}: a character vocabulary holds single characters")
        if model.get("unk_token") != UNKNOWN or tokens[0] != UNKNOWN or model.get("fuse_unk"):
            raise ValueError(f"{name}: the unknown token of a character vocabulary is U+FFFD, with id 0")
        return assemble(kind, vocabulary)
    if kind == "byte" and (merges or len(tokens) != 256):
        raise ValueError(f"{name}: a byte vocabulary has 256 tokens and no merges")
    if kind == "byte" and tokens != byte_alphabet():
        raise ValueError(f"{name}: a byte vocabulary numbers each byte by its value")
    _check_byte_level(tokens, {}, model, name)
    return assemble(kind, vocabulary, merges)


# ---- files of other projects


def _special(document: dict[str, Any], tokens: list[str], name: str) -> dict[str, int]:
    """added_tokens as {content: id}: each is in the vocabulary with that id, or follows it without a gap."""
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        raise ValueError(f"{name}: added_tokens must be a list of at most {MAX_ADDED}")
    special: dict[str, int] = {}
    known, size = set(tokens), len(tokens)
    for rank, entry in enumerate(added):
        content, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(content, str) or type(index) is not int:
            raise ValueError(f"{name}: added_tokens[{rank}] must have a content and an id")
        _check_texts([content], name)
        expected = 0 <= index < len(tokens) and tokens[index] == content if content in known else index == size
        if not expected or content in special:
            raise ValueError(f"{name}: added_tokens[{rank}] has id {index}, which is not its place in the vocabulary")
        special[content] = index
        size += content not in known
    return special


def _is_byte_level(part: Any, use_regex: bool) -> bool:
    if not isinstance(part, dict):
        return False
    used = {"use_regex": True, **part, "trim_offsets": True}  # offsets are not used; older files have no use_regex
    return used == {**BYTE_LEVEL, "use_regex": use_regex}


def _split_of(document: dict[str, Any], name: str) -> tuple[str, Any]:
    """("byte", a known pattern or None for GPT-2's) or ("fallback", how a text gets a first space)."""
    pre, normalizer = document.get("pre_tokenizer"), document.get("normalizer")
    parts = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else None
    if normalizer is None or normalizer == {"type": "NFC"}:
        if _is_byte_level(pre, use_regex=True):
            return "byte", None
        if isinstance(parts, list) and len(parts) == 2 and _is_byte_level(parts[1], use_regex=False):
            for pattern in KNOWN_SPLITS.values():
                split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                if parts[0] == split:
                    return "byte", pattern
    if normalizer is None and isinstance(pre, dict) and pre.get("type") == "Metaspace":
        first = pre.get("prepend_scheme")
        wanted = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": first, "split": False}
        if pre == wanted and first in ("always", "first", "never"):
            return "fallback", first
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return "fallback", "normalizer"
    raise ValueError(f"{name}: this combination of normalizer and pre_tokenizer is not supported")


def _byte_level(
    document: dict[str, Any], pattern: str | None, merges: Any, tokens: Any, special: Any, name: str
) -> Parts:
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as HuggingFace

    model = document["model"]
    decoder = document.get("decoder")  # None: transformers keeps what it was given, and bytes have one reading
    if decoder is not None and (not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel"):
        raise ValueError(f"{name}: the decoder of a byte-level model must be ByteLevel")
    _check_byte_level(tokens, special, model, name)
    ignore = model.get("ignore_merges") is True
    inner = HuggingFace(models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=ignore))
    split: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), split])
    inner.pre_tokenizer = split
    if document.get("normalizer") is not None:
        inner.normalizer = normalizers.NFC()
    byte_of = bytes_of_alphabet()
    texts = [token.encode() if token in special else byte_level_text(token, byte_of) for token in tokens]
    return Parts("bpe", inner, texts, words=ASCII_GPT2 if pattern is None else None, boundary=SPACE_BOUNDARY)


def _fallback(document: dict[str, Any], first: str, merges: Any, tokens: Any, special: Any, name: str) -> Parts:
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, normalizers, pre_tokenizers

    model = document["model"]
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    drops = document.get("decoder") == {"type": "Sequence", "decoders": [*steps, strip]}
    if not drops and document.get("decoder") != {"type": "Sequence", "decoders": steps}:
        raise ValueError(f"{name}: the decoder must be that of a Llama 2 tokenizer")
    if model.get("byte_fallback") is not True or model.get("ignore_merges"):
        raise ValueError(f"{name}: a model with {SPACE} for spaces must have byte_fallback, and no ignore_merges")
    if any(token not in model["vocab"] for token in BYTE_TOKENS):
        raise ValueError(f"{name}: model.vocab lacks some of <0x00> to <0xFF>, so some text could not be encoded")
    _check_texts(tokens, name)
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in special:
        raise ValueError(f"{name}: model.unk_token must be one of added_tokens")
    inner = HuggingFace(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    if first == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=first, split=False)
    byte_of = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}
    texts = [
        token.encode() if token in special else byte_of.get(token, token.replace(SPACE, " ").encode())
        for token in tokens
    ]
    return Parts("bpe", inner, texts, boundary=None, drops_space=drops)


def _foreign(document: dict[str, Any], model: dict[str, Any], name: str) -> Parts:
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{name}: a {str(model.get('type'))[:20]} model is supported only as pykern writes it")
    style, option = _split_of(document, name)
    tokens = _ids(model.get("vocab"), name)
    special = _special(document, tokens, name)
    make = _byte_level if style == "byte" else _fallback
    parts = make(document, option, _merges(model, name), tokens, special, name)
    beyond = [token.encode() for token, index in special.items() if index >= len(tokens)]
    try:
        text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        text.encode()
    except ValueError as error:
        raise ValueError(f"{name}: holds what a file cannot ({error})") from None
    return replace(parts, tokens=[*parts.tokens, *beyond], special=special, document=text)


def _is_post_processor(post: Any) -> bool:
    """Is it one that may be kept in the file? It is never run: text gets no tokens that it does not hold."""
    if post is None or (isinstance(post, dict) and post.get("type") == "ByteLevel"):
        return True
    if not isinstance(post, dict):
        return False
    steps = post.get("processors")
    if post.get("type") == "Sequence" and isinstance(steps, list) and len(steps) <= 4:
        return all(
            isinstance(step, dict) and step.get("type") != "Sequence" and _is_post_processor(step) for step in steps
        )
    templates = isinstance(post.get("single"), list) and isinstance(post.get("pair"), list)
    return post.get("type") == "TemplateProcessing" and templates and isinstance(post.get("special_tokens"), dict)


def read_document(document: dict[str, Any], name: str) -> Parts:
    """The parts of a parsed tokenizer.json; ValueError, starting with name, for what is not supported."""
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") not in [layout["model"] for layout in LAYOUTS.values()]:
        raise ValueError(f"{name}: only models of type BPE, WordLevel, WordPiece and Unigram are supported")
    for part in ("truncation", "padding"):
        if document.get(part) is not None:
            raise ValueError(f"{name}: {part} is not supported")
    if not _is_post_processor(document.get("post_processor")):
        raise ValueError(f"{name}: post_processor must be ByteLevel, TemplateProcessing or a Sequence of them")
    options = ["dropout", "end_of_word_suffix"]
    if model.get("type", "BPE") == "BPE":
        options.append("continuing_subword_prefix")
    for option in options:
        if model.get(option):
            raise ValueError(f"{name}: model.{option} is not supported")
    kind = _kind_of(document, model)
    if kind is None or model.get("ignore_merges"):
        return _foreign(document, model, name)
    return _own(kind, model, name)
