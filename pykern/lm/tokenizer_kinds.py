"""What each kind of tokenizer is made of, and how it is trained: a split into words, a model of a word, a decoder.

kind          word split   tokens                                           unknown
"byte"        none         the 256 bytes of UTF-8, id = byte value          cannot be
"character"   none         the characters of the training text              one token for a character
"bpe"         GPT-2's      byte pairs merged by frequency                   cannot be
"word"        WORDS        the most frequent words                          one token for a word
"wordpiece"   WORDS        starts of words, and "##" pieces that go on      one token for a word
"unigram"     WORDS        the pieces of the most probable segmentation     spelled in 256 byte tokens

Splits lose nothing: the words of a text, spaces included, are the text. The text of ids is that of each id, joined.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "\ufffd"  # REPLACEMENT CHARACTER: decodes to itself and keeps the length of the text
UNKNOWN_WORD = " " + UNKNOWN  # most words begin with a space
CONTINUES = "##"
MAX_WORD = 100  # characters; longer ones are unknown to "word" and "wordpiece", whose search takes their square
MAX_CHARACTERS = 0x110000
MAX_PIECES_TEXT = 1 << 19  # characters of all unigram pieces: the library takes some 300 bytes for each
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SMALLEST = {"byte": 256, "character": 2, "word": 2, "wordpiece": 8, "bpe": 256, "unigram": 260}

# A word and one sign take the space before them; line ends stand alone; the last of several spaces is left to the word.
# No word has more than one sign, so neither "##" nor "<0x41>" in a text can be taken for a token of that name.
WORDS = r" ?\w+| ?[^\w\s]|\n|[^\S\n]+(?!\S)|[^\S\n]+"
ASCII_WORDS = re.compile(WORDS, re.ASCII)
# GPT-2's split, which the library has built in, for ASCII
ASCII_GPT2 = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)

# A space or line end after these begins a new word in every split here, so texts may be cut before it.
_BOUNDARY = re.compile(r"(?<=[!-~\w])[ \n]")
SPACE_BOUNDARY = re.compile(r"(?<=[!-~\w]) ")
CHUNK = 1 << 15  # characters: enough for a call, small enough for all threads to have work

LONG = 1000  # characters: merging takes the square of a word's, so in training longer runs are cut
_LONG_SPACE = re.compile(rf"\s{{{LONG}}}")
_RUNS = re.compile(rf"\S{{1,{LONG}}}|\s{{1,{LONG}}}")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_WORD_SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
_WITHOUT_SIGNS = {"type": "Replace", "pattern": {"Regex": f"^{CONTINUES}"}, "content": ""}
_FUSE = {"type": "Fuse"}
# The model.type, pre_tokenizer and decoder of each kind in a tokenizer.json.
LAYOUTS: dict[str, dict[str, Any]] = {
    "byte": {"model": "BPE", "pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}, "decoder": "ByteLevel"},
    "character": {"model": "BPE", "pre_tokenizer": None, "decoder": _FUSE},
    "word": {"model": "WordLevel", "pre_tokenizer": _WORD_SPLIT, "decoder": _FUSE},
    "wordpiece": {
        "model": "WordPiece",
        "pre_tokenizer": _WORD_SPLIT,
        "decoder": {"type": "Sequence", "decoders": [_WITHOUT_SIGNS, _FUSE]},
    },
    "bpe": {"model": "BPE", "pre_tokenizer": {**BYTE_LEVEL, "use_regex": True}, "decoder": "ByteLevel"},
    "unigram": {
        "model": "Unigram",
        "pre_tokenizer": _WORD_SPLIT,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, _FUSE]},
    },
}
KINDS = tuple(LAYOUTS)


@dataclass(frozen=True)
class Parts:
    """A tokenizer: the library's, the text of each id, and what is special.

    words: finds the words of an ASCII text, None where they are not known;
    textless: ids that stand for no text of their own, the unknown token and special tokens; boundary: where a text may
    be cut, None: nowhere; drops_space: decode leaves out a first space; document: the file to write, if it is not ours.
    """

    kind: str
    inner: "tokenizers.Tokenizer"
    tokens: list[bytes]
    unknown: int | None = None
    special: dict[str, int] = field(default_factory=dict)
    words: re.Pattern[str] | None = None
    boundary: re.Pattern[str] | None = _BOUNDARY
    drops_space: bool = False
    document: str | None = None

    @property
    def textless(self) -> list[int]:
        return [*self.special.values(), *([] if self.unknown is None else [self.unknown])]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself when printable, else 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def byte_level_text(token: str, byte_of: dict[str, int]) -> bytes:
    return bytes(byte_of[character] for character in token)


def bytes_of_alphabet() -> dict[str, int]:
    return {stand_in: byte for byte, stand_in in enumerate(byte_alphabet())}


def chunks(text: str, boundary: re.Pattern[str] | None) -> Iterator[str]:
    """text in parts of about CHUNK characters that have the same words as the whole."""
    start = 0
    while boundary is not None and len(text) - start > CHUNK:
        found = boundary.search(text, start + CHUNK)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:] if start else text


# ---- from a vocabulary to a tokenizer


def _pipeline(model: Any, kind: str) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as HuggingFace

    inner = HuggingFace(model)
    if kind in ("byte", "bpe"):
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        inner.decoder = decoders.ByteLevel()
    elif kind != "character":
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    if kind in ("character", "word"):
        inner.decoder = decoders.Fuse()
    elif kind == "wordpiece":
        inner.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{CONTINUES}"), ""), decoders.Fuse()])
    elif kind == "unigram":
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return inner


def assemble(kind: str, vocabulary: Any, merges: Any = ()) -> Parts:
    """Parts from {token: id}, or for "unigram" a list of (token, score), and for "bpe" the pairs that are merged."""
    from tokenizers import models

    if kind == "unigram":
        tokens = [token.encode() for token, _ in vocabulary]
        tokens[1:257] = [bytes([byte]) for byte in range(256)]
        inner = _pipeline(models.Unigram(vocabulary, unk_id=0, byte_fallback=True), kind)
        return Parts(kind, inner, tokens, words=ASCII_WORDS)
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    model: Any
    if kind in ("byte", "bpe"):
        byte_of = bytes_of_alphabet()
        model = models.BPE(vocab=vocabulary, merges=list(merges))
        tokens = [byte_level_text(token, byte_of) for token in ordered]
        return Parts(kind, _pipeline(model, kind), tokens, words=ASCII_GPT2)
    if kind == "wordpiece":
        model = models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN_WORD, max_input_chars_per_word=MAX_WORD)
        ordered = [token.removeprefix(CONTINUES) for token in ordered]
    elif kind == "word":
        model = models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN_WORD)
    else:
        model = models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False)
    words = None if kind == "character" else ASCII_WORDS
    return Parts(kind, _pipeline(model, kind), [token.encode() for token in ordered], unknown=0, words=words)


# ---- training


def count_characters(texts: Iterable[str]) -> np.ndarray:
    """How often each code point occurs, int64 [MAX_CHARACTERS]."""
    counts = np.zeros(MAX_CHARACTERS, np.int64)
    for text in texts:
        values, found = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_counts=True)
        counts[values] += found
    return counts


def frequent_characters(texts: Iterable[str], most: int | None) -> list[str]:
    """The most frequent characters but UNKNOWN, all when most is None, in code point order."""
    counts = count_characters(texts)
    counts[ord(UNKNOWN)] = 0
    seen = np.flatnonzero(counts)
    if most is not None:
        seen = np.sort(seen[np.argsort(-counts[seen], kind="stable")[:most]])
    return [chr(point) for point in seen.tolist()]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word of the WORDS split occurs."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        for part in chunks(text, _BOUNDARY):
            # on ASCII both engines find the same words, Python's without an object per word
            words = ASCII_WORDS.findall(part) if part.isascii() else (word for word, _ in split.pre_tokenize_str(part))
            counts.update(words)
    return counts


def training_parts(texts: Iterable[str]) -> Iterator[str]:
    """The texts in parts without a word of more than LONG characters; other words are whole."""
    for text in texts:
        for part in chunks(text, _BOUNDARY):
            longest = max(map(len, part.split()), default=0)
            if longest > LONG or _LONG_SPACE.search(part):
                yield from _RUNS.findall(part)
            else:
                yield part


def _train_bpe(texts: list[str], vocab_size: int) -> Parts:
    from tokenizers import models, pre_tokenizers, trainers

    inner = _pipeline(models.BPE(), "bpe")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    inner.train_from_iterator(training_parts(texts), trainer)
    byte_of, vocabulary = bytes_of_alphabet(), inner.get_vocab()
    tokens = [byte_level_text(token, byte_of) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    return Parts("bpe", inner, tokens, words=ASCII_GPT2)


def _train_words(texts: list[str], vocab_size: int | None) -> Parts:
    counts = count_words(texts)
    del counts[UNKNOWN_WORD]
    words = sorted((word for word in counts if len(word) <= MAX_WORD), key=lambda word: (-counts[word], word))
    words = words[: None if vocab_size is None else vocab_size - 1]
    return assemble("word", {UNKNOWN_WORD: 0, **{word: i for i, word in enumerate(words, start=1)}})


def _train_wordpiece(texts: list[str], vocab_size: int) -> Parts:
    """Pieces are merged by frequency, as in BPE, and used by longest match, as in BERT."""
    from tokenizers import models, trainers

    characters = frequent_characters(texts, (vocab_size - 1) // 4)
    inner = _pipeline(models.WordPiece(unk_token=UNKNOWN_WORD), "wordpiece")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        # named here to have ids in this order; otherwise in that of a hash table, which changes from run to run
        special_tokens=[UNKNOWN_WORD, *(CONTINUES + character for character in characters)],
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    inner.train_from_iterator(training_parts(texts), trainer)
    return assemble("wordpiece", inner.get_vocab(with_added_tokens=False))


def _train_unigram(texts: list[str], vocab_size: int) -> Parts:
    from pykern.lm.unigram import train_unigram

    size = vocab_size - 1 - len(BYTE_TOKENS)
    pieces = train_unigram(count_words(texts), frequent_characters(texts, size // 2), size)
    length = sum(len(piece) for piece, _ in pieces)
    if length > MAX_PIECES_TEXT:
        raise ValueError(
            f"Tokenizer: {len(pieces)} unigram pieces have {length} characters, but at most {MAX_PIECES_TEXT} "
            "are read; give a smaller vocab_size"
        )
    least = pieces[-1][1]
    fixed = [(token, least) for token in (UNKNOWN, *BYTE_TOKENS)]
    return assemble("unigram", [*fixed, *pieces])


def train(kind: str, texts: list[str], vocab_size: int | None) -> Parts:
    """Parts of a kind, trained on checked texts; vocab_size is None or at least SMALLEST[kind]."""
    if kind == "byte":
        return assemble(kind, {stand_in: byte for byte, stand_in in enumerate(byte_alphabet())})
    if not any(texts):
        raise ValueError(f"Tokenizer: {kind} needs text to train on")
    if kind == "character":
        seen = frequent_characters(texts, None if vocab_size is None else vocab_size - 1)
        return assemble(kind, {UNKNOWN: 0, **{character: i for i, character in enumerate(seen, start=1)}})
    if kind == "word":
        return _train_words(texts, vocab_size)
    if vocab_size is None:
        raise ValueError(f"Tokenizer: {kind} needs a vocab_size")
    return {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram}[kind](texts, vocab_size)
