"""Word, wordpiece and unigram tokenizers: their rules, what is unknown, other projects' files, hostile files."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykern.lm.tokenizer import KINDS, UNKNOWN, UNKNOWN_WORD, Tokenizer
from pykern.lm.tokenizer_compare import compare_tokenizers, plot_comparison, train_kinds, visible
from pykern.lm.tokenizer_files import KNOWN_SPLITS
from pykern.lm.tokenizer_kinds import CHUNK, MAX_WORD, chunks, count_words, training_parts
from pykern.lm.unigram import train_unigram

pytestmark = pytest.mark.one_isa

TEXTS = [
    "the cat sat on the mat.\nthe dog sat on the log!\n",
    "def un_able(x):\n    return unable(x)\n",
    "größer, größte नमस्ते नमस्ते\n",
] * 4
SIZES = {"byte": 256, "character": None, "word": None, "wordpiece": 220, "bpe": 300, "unigram": 330}
MADE = {kind: Tokenizer.train(kind, TEXTS, SIZES[kind]) for kind in KINDS}
NEW = ("word", "wordpiece", "unigram")
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
WORDY = st.lists(st.sampled_from(["the", " cat", " xyz", "\n", "    ", "\t", "!", " 😀", "##", "<0x41>", "▁"])).map(
    "".join
)


# ---- the rules of each kind


def tokens(kind, text):
    return [piece.mark + piece.text for piece in MADE[kind].pieces(text)]


def test_words_and_signs_take_the_space_before_them():
    assert tokens("word", "the cat sat on the mat.\n") == ["the", " cat", " sat", " on", " the", " mat", ".", "\n"]
    assert tokens("word", ":\n    return") == [":", "\n", "   ", " return"]
    assert tokens("word", " नमस्ते") == [" नमस्ते"]  # marks belong to the word


def test_unknown_words_are_one_token_and_say_nothing():
    word = MADE["word"]
    ids = word.encode("the zebra sat??")
    assert ids == [word.encode("the")[0], 0, word.encode(" sat")[0], 0, 0]
    assert word.decode(ids) == "the" + UNKNOWN_WORD + " sat" + UNKNOWN_WORD * 2
    assert word.unknown_id == 0 and word.bytes_per_token[ids].tolist() == [3, 0, 4, 0, 0]
    assert [piece.text for piece in word.pieces("the zebra?")] == ["the", " zebra", "?"]


def test_word_keeps_the_most_frequent():
    tokenizer = Tokenizer.train("word", "b b b a a c", vocab_size=4)  # words: "b" " b" " b" " a" " a" " c"
    assert [piece.text for piece in tokenizer.pieces(" b a b")] == [" b", " a", " b"]
    assert json.loads(tokenizer.to_json())["model"]["vocab"] == {UNKNOWN_WORD: 0, " a": 1, " b": 2, " c": 3}


def longest_match(word, vocabulary):
    """WordPiece as its paper states it: always the longest piece that fits; None when none does."""
    found, start = [], 0
    while start < len(word):
        for stop in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:stop]
            if piece in vocabulary:
                found.append(vocabulary[piece])
                start = stop
                break
        else:
            return [0]
    return found


def test_wordpiece_takes_the_longest_piece():
    vocabulary = json.loads(MADE["wordpiece"].to_json())["model"]["vocab"]
    for word in ("the", " cat", " unable", " tomato", "größer", " नमस्ते", "loggers", " lögs", "xyz"):
        assert MADE["wordpiece"].encode(word) == longest_match(word, vocabulary), word
    first, *others = tokens("wordpiece", " unmatched")
    assert first[:2] == " u" and others and all(token.startswith("##") for token in others)
    assert MADE["wordpiece"].encode(" q😀q the")[0] == 0
    assert MADE["wordpiece"].encode("a" * (MAX_WORD + 1)) == [0] and 0 not in MADE["wordpiece"].encode("a" * MAX_WORD)


def segmentations(word):
    for cuts in itertools.product([False, True], repeat=len(word) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(word)]
        yield [word[start:stop] for start, stop in itertools.pairwise(places)]


def test_unigram_takes_the_most_probable_segmentation():
    model = json.loads(MADE["unigram"].to_json())["model"]
    score = dict(map(tuple, model["vocab"]))
    for word in (" sat", " the", "unable", " return", "größer"):
        best = max(sum(map(score.__getitem__, s)) for s in segmentations(word) if all(piece in score for piece in s))
        assert sum(score[token] for token in tokens("unigram", word)) == pytest.approx(best, abs=1e-9), word


def test_unigram_spells_unknown_characters_in_bytes():
    tokenizer = MADE["unigram"]
    assert tokenizer.encode("😀") == [1 + byte for byte in "😀".encode()] and tokenizer.unknown_id is None
    for text in ("<0x41>", " <0x41>", "▁a▁", UNKNOWN, "x" + UNKNOWN + "😀", "##a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- training


def log_likelihood(words, p):
    return sum(
        count * math.log(sum(math.prod(p.get(piece, 0.0) for piece in s) for s in segmentations(word)))
        for word, count in words.items()
    )


def test_unigram_training_is_em():
    """Another step of EM, written out over all segmentations, changes next to nothing."""
    words = {"abab": 3, "ab": 5, "ba": 2, "a": 1}
    pieces = dict(train_unigram(words, ["a", "b"], 6))
    p = {piece: math.exp(score) for piece, score in pieces.items()}
    assert {"a", "b"} < set(p) and sum(p.values()) == pytest.approx(1, abs=1e-5)
    used = Counter()
    for word, count in words.items():
        weights = [(s, math.prod(p.get(piece, 0.0) for piece in s)) for s in segmentations(word)]
        total = sum(weight for _, weight in weights)
        for s, weight in weights:
            for piece in s:
                used[piece] += count * weight / total
    floor = {piece: max(used[piece], 0.5) if len(piece) == 1 else used[piece] for piece in p}
    again = {piece: value / sum(floor.values()) for piece, value in floor.items()}
    assert log_likelihood(words, again) >= log_likelihood(words, p) - 0.01
    singles = {"a": 14 / 23, "b": 9 / 23}  # how often they occur
    assert log_likelihood(words, p) > log_likelihood(words, singles) + 5


def test_unigram_is_no_worse_than_the_library_s():
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    from pykern.lm import unigram
    from pykern.lm.tokenizer_kinds import WORDS

    with open(unigram.__file__, encoding="utf-8") as file:
        text = file.read()
    ours = Tokenizer.train("unigram", text, 257 + 300)
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    trainer = trainers.UnigramTrainer(vocab_size=301, special_tokens=["?"], unk_token="?", show_progress=False)
    library.train_from_iterator([text], trainer)
    assert len(ours.encode(text)) <= 1.02 * len(library.encode(text).ids)


def test_unigram_refusals_and_rare_characters():
    with pytest.raises(ValueError, match="3 characters, but size is 2"):
        train_unigram({"abc": 1}, "abc", 2)
    with pytest.raises(ValueError, match="none of the characters"):
        train_unigram({"abc": 1}, "x", 2)
    assert [piece for piece, _ in train_unigram({"a\0b": 1, "ab": 3}, "ab", 2)] == ["a", "b"]
    few = Tokenizer.train("unigram", "abcdefghij" * 3, 260)  # 3 pieces, of which 1 is a character
    assert few.vocab_size <= 260 and few.decode(few.encode("abcxyz")) == "abcxyz"
    assert Tokenizer.train("wordpiece", "abcdefghij" * 3, 8).vocab_size <= 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEW)
def test_training_is_repeatable(kind):
    """In other processes, whose hash tables have other seeds, with 1 and 2 threads."""
    size = SIZES[kind]
    train = f"Tokenizer.train({kind!r}, {TEXTS!r}, {size})"
    code = f"from pykern.lm.tokenizer import Tokenizer; print({train}.to_json(), end='')"
    for threads in ("1", "2", "2"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONIOENCODING": "utf-8"}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert run.stdout.decode() == MADE[kind].to_json()


def test_sizes_are_kept_and_refused():
    for kind in ("word", "wordpiece", "unigram"):
        size = {"word": 10, "wordpiece": 100, "unigram": 290}[kind]
        assert Tokenizer.train(kind, TEXTS, size).vocab_size <= size
    for kind, smallest in (("word", 2), ("wordpiece", 8), ("unigram", 260)):
        with pytest.raises(ValueError, match=f"{kind} needs a vocab_size of at least {smallest}, got {smallest - 1}"):
            Tokenizer.train(kind, TEXTS, smallest - 1)
        with pytest.raises(ValueError, match=f"{kind} needs text to train on"):
            Tokenizer.train(kind, [""], 300)
    for kind in ("wordpiece", "unigram"):
        with pytest.raises(ValueError, match=f"{kind} needs a vocab_size$"):
            Tokenizer.train(kind, TEXTS)


def test_vocabulary_that_no_file_may_hold_is_refused(monkeypatch):
    monkeypatch.setattr("pykern.lm.tokenizer_kinds.MAX_PIECES_TEXT", 20)
    with pytest.raises(ValueError, match=r"unigram pieces have .* characters, but at most 20 are read"):
        Tokenizer.train("unigram", TEXTS, 400)
    text = " ".join(f"w{i:060d}" for i in range(120_000))
    with pytest.raises(ValueError, match=r"tokens take a file of \d+ bytes, but at most .* smaller vocab_size"):
        Tokenizer.train("word", text)


# ---- every kind


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANY_TEXT | WORDY)
def test_pieces_are_the_text_and_bytes_are_counted_once(kind, text):
    pieces = MADE[kind].pieces(text)
    ids = [piece.id for piece in pieces]
    assert b"".join(piece.data for piece in pieces) == text.encode() and ids == MADE[kind].encode(text)
    unknown = sum(len(piece.data) for piece in pieces if not piece.known)
    assert int(MADE[kind].bytes_per_token[ids].sum()) == len(text.encode()) - unknown
    if not unknown:
        assert MADE[kind].decode(ids) == text


@pytest.mark.parametrize("kind", NEW)
@given(text=ANY_TEXT | WORDY)
def test_library_reads_the_file_alike(kind, text):
    from tokenizers import Tokenizer as Library

    other, ids = Library.from_str(MADE[kind].to_json()), MADE[kind].encode(text)
    assert other.encode(text, add_special_tokens=False).ids == ids and other.decode(ids) == MADE[kind].decode(ids)


@pytest.mark.parametrize("sign", ["x", "中"])
@pytest.mark.parametrize("kind", ["word", "wordpiece", "bpe", "unigram"])
def test_long_texts_are_cut_where_words_end(kind, sign):
    text = "".join(
        f"{word}{i} 中{i}\n\n  ({word})\t{'  ' * (i % 5)}" for i in range(4000) for word in ("the", "größer")
    )
    assert len(list(chunks(text, MADE[kind]._parts.boundary))) > len(text) // (2 * CHUNK) > 2
    assert MADE[kind].encode(text) == MADE[kind]._inner.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_and_long_lines(kind):
    tokenizer = MADE[kind]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and tokenizer.pieces("") == []
    for line in ("a" * (1 << 18), " " * (1 << 16), "#" * (1 << 16)):
        ids = tokenizer.encode_texts([line])
        assert (tokenizer.unknown_id is not None and tokenizer.unknown_id in ids) or tokenizer.decode(ids) == line


@pytest.mark.parametrize("kind", ["word", "wordpiece", "bpe", "unigram"])
def test_training_on_a_long_line_ends(kind):
    assert Tokenizer.train(kind, "ab" * (1 << 17), 300).encode("abab")


def test_training_parts_cut_only_long_runs():
    long = "a" * 2500 + " b" + "\n" * 1500 + "c d"
    parts = list(training_parts(["x y\n" * 20_000, long]))
    assert "".join(parts) == "x y\n" * 20_000 + long and max(len(part) for part in parts[-9:]) <= 1000
    assert parts[:2] == list(chunks("x y\n" * 20_000, MADE["bpe"]._parts.boundary))[:2]


def test_count_words_is_the_same_for_both_engines():
    text = "def f(x):\n\treturn x_1  + 'don''t'\x1c\x85\n\n  y" + "\x00\x0b\x0c " * 3
    words = count_words(["é " + text])
    words -= Counter({"é": 1})
    ascii_words = count_words([" " + text.replace("\x85", "")])
    assert {w for w in words if w.isascii()} - {" "} <= set(ascii_words) | {"\x1c"}
    from tokenizers import Regex, pre_tokenizers

    from pykern.lm.tokenizer_kinds import WORDS

    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    every = "".join(map(chr, range(128))) + "".join(chr(a) + chr(b) for a in range(128) for b in (32, 10, 65, 9, 33))
    assert count_words([every]) == Counter(word for word, _ in split.pre_tokenize_str(every))


def test_bits_per_byte_gets_no_credit_for_unknown_text():
    """A model that always says "unknown" pays nothing for it, and is not paid for the text."""
    tokenizer = Tokenizer.train("word", "a b", 2)
    ids = tokenizer.encode("x y z")
    assert set(ids) == {0} and tokenizer.bytes_per_token[ids].sum() == 0


# ---- files of other projects


def bpe_model(extra=()):
    model = json.loads(MADE["bpe"].to_json())["model"]
    for token in extra:
        model["vocab"][token] = len(model["vocab"])
    return model


def added(content, index, special=True):
    return {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}  # fmt: skip


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def gpt2():
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = bpe_model(["<|endoftext|>"])
    end = model["vocab"]["<|endoftext|>"]
    document = dict(version="1.0", truncation=None, padding=None, added_tokens=[added("<|endoftext|>", end)])
    return {**document, "normalizer": None, "pre_tokenizer": level, "post_processor": level, "decoder": level,
            "model": {**model, "continuing_subword_prefix": "", "end_of_word_suffix": ""}}  # fmt: skip


def llama3(pattern=KNOWN_SPLITS["Llama 3"], normalizer=None):
    document = gpt2()
    model = bpe_model()
    size = len(model["vocab"])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    template = json.loads(json.dumps(TEMPLATE).replace("[1]", f"[{size}]"))
    return {**document, "model": {**model, "ignore_merges": True}, "normalizer": normalizer,
            "added_tokens": [added("<s>", size), added("</s>", size + 1, special=False)],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": {"type": "Sequence", "processors": [document["post_processor"], template]}}  # fmt: skip


def llama2(first="first"):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    letters = ["▁", *"abcdehlnorstuw", "he", "th", "ll", "▁th", "▁the"]
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *letters]:
        vocabulary[token] = len(vocabulary)
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": first, "split": False}
    normalizer = None
    if first == "normalizer":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        normalizer, pre = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}, None
    if first != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": vocabulary, "merges": ["h e", "t h", "l l", "▁ th", "▁th e"]}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer, "pre_tokenizer": pre,
            "added_tokens": [added(t, i) for i, t in enumerate(("<unk>", "<s>", "</s>"))],
            "post_processor": TEMPLATE, "decoder": {"type": "Sequence", "decoders": steps}, "model": model}  # fmt: skip


FOREIGN = {
    "GPT-2": gpt2(),
    "Llama 3": llama3(),
    "Qwen 2": llama3(KNOWN_SPLITS["Qwen 2"], {"type": "NFC"}),
    "Llama 2": llama2(),
    "Llama 2, older": llama2("normalizer"),
    "Llama 2, no first space": llama2("never"),
}
SAMPLES = [
    "the other\n\ntotal",
    "hello 😀 größer 12345 don't",
    "",
    "a",
    "\n",
    "x  y\t(z)!!\n\n\n",
    "é\u0301",
    "e\u0301",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_has_the_library_s_ids_and_text(name):
    from tokenizers import Tokenizer as Library

    text = json.dumps(FOREIGN[name])
    ours, other = Tokenizer.from_json(text), Library.from_str(text)
    assert ours.kind == "bpe" and ours.vocab_size == other.get_vocab_size()
    for sample in [*SAMPLES, "the total " * (CHUNK // 4)]:
        ids = ours.encode(sample)
        assert ids == other.encode(sample, add_special_tokens=False).ids, sample
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=False), sample
    again = Tokenizer.from_json(ours.to_json())
    assert json.loads(ours.to_json()) == FOREIGN[name] and again.encode(SAMPLES[0]) == ours.encode(SAMPLES[0])


@pytest.mark.parametrize("name", FOREIGN)
def test_special_tokens_have_ids_and_are_not_read_from_text(name):
    tokenizer = Tokenizer.from_json(json.dumps(FOREIGN[name]))
    special = tokenizer.special_tokens
    assert special == {entry["content"]: entry["id"] for entry in FOREIGN[name]["added_tokens"]}
    for content, index in special.items():
        ids = tokenizer.encode("a" + content)
        assert index not in ids and tokenizer.decode(ids) == "a" + content
        assert tokenizer.decode_bytes([index]) == content.encode() and tokenizer.bytes_per_token[index] == 0


@pytest.mark.slow
def test_files_written_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = bpe_model(["<|endoftext|>"])
    merges = [tuple(pair) for pair in model["merges"]]
    letters = {token: i for i, token in enumerate(llama2()["model"]["vocab"])}
    made = {
        "gpt2": transformers.GPT2TokenizerFast(vocab=model["vocab"], merges=merges),
        "qwen2": transformers.Qwen2TokenizerFast(vocab=model["vocab"], merges=merges),
        "llama": transformers.LlamaTokenizerFast(vocab=letters, merges=[("h", "e"), ("l", "l")]),
    }
    for name, other in made.items():
        other.save_pretrained(tmp_path / name)
        ours = Tokenizer.load(tmp_path / name)
        for sample in ("the other total", "größer 😀 1234\n\n x"):
            assert ours.encode(sample) == other.encode(sample, add_special_tokens=False), name
            assert ours.decode(ours.encode(sample)) == sample
        assert set(other.all_special_tokens) <= set(ours.special_tokens)


# ---- hostile files


def changed(document, path, value):
    document = json.loads(document if isinstance(document, str) else json.dumps(document))
    *folders, last = path
    place = document
    for name in folders:
        place = place[name]
    place[last] = value(place[last]) if callable(value) else value
    return json.dumps(document)


WORD, PIECE, UNI = (MADE[kind].to_json() for kind in NEW)
V = ("model", "vocab")
PATTERN = ("pre_tokenizer", "pattern", "Regex")
HOSTILE = {
    "word: pattern": (changed(WORD, PATTERN, "(a+)+$"), "combination|only as pykern"),
    "word: no unknown token": (changed(WORD, ("model", "unk_token"), "[UNK]"), "unknown token of a word"),
    "word: unknown is another": (changed(WORD, V, {"a": 0, UNKNOWN_WORD: 1}), "unknown token of a word"),
    "word: empty token": (changed(WORD, V, lambda v: {**v, "": len(v)}), "is no text"),
    "word: surrogate": (changed(WORD, V, lambda v: {**v, "\ud800": len(v)}), "is no text"),
    "word: ids": (changed(WORD, (*V, "the"), 1 << 60), "must number its"),
    "word: vocabulary is a list": (changed(WORD, V, [["a", 0]]), "must be an object"),
    "wordpiece: prefix": (changed(PIECE, ("model", "continuing_subword_prefix"), "%%"), "prefix ##"),
    "wordpiece: word length": (changed(PIECE, ("model", "max_input_chars_per_word"), 1 << 40), "words of 100"),
    "wordpiece: word length is a bool": (changed(PIECE, ("model", "max_input_chars_per_word"), True), "words of 100"),
    "wordpiece: only a prefix": (changed(PIECE, V, lambda v: {**v, "##": len(v)}), "is no text"),
    "wordpiece: decoder": (changed(PIECE, ("decoder",), {"type": "WordPiece"}), "only as pykern writes"),
    "unigram: vocabulary is an object": (changed(UNI, V, {"a": 0}), "must be a list"),
    "unigram: empty": (changed(UNI, V, []), "begins with U\\+FFFD"),
    "unigram: entry": (changed(UNI, (*V, 300), ["a"]), "not a piece and its score"),
    "unigram: score is text": (changed(UNI, (*V, 300), ["a", "-1"]), "must have a score"),
    "unigram: score is a bool": (changed(UNI, (*V, 300), ["zz", True]), "must have a score"),
    "unigram: positive score": (changed(UNI, (*V, 300), ["zz", 1.0]), "must have a score"),
    "unigram: huge score": (changed(UNI, (*V, 300), ["zz", -1e300]), "must have a score"),
    "unigram: infinite score": (UNI.replace("-5.", "-5e999", 1), "must have a score|not valid JSON"),
    "unigram: integer beyond floats": (changed(UNI, (*V, 300), ["zz", -(10**400)]), "must have a score"),
    "unigram: a piece of 600 000": (changed(UNI, (*V, 300), ["z" * 600_000, -1.0]), "at most 524288 are accepted"),
    "unigram: twice": (changed(UNI, V, lambda v: [*v, v[-1]]), "twice"),
    "unigram: bytes missing": (changed(UNI, V, lambda v: v[:100]), "256 bytes"),
    "unigram: unknown id": (changed(UNI, ("model", "unk_id"), 1 << 40), "unk_id 0"),
    "unigram: no fallback": (changed(UNI, ("model", "byte_fallback"), False), "byte_fallback"),
    "unigram: surrogate": (changed(UNI, (*V, 300), ["\ud800", -1.0]), "is no text"),
    "model type is a list": (changed(WORD, ("model", "type"), []), "only models of type"),
    "foreign unigram": (changed(UNI, ("normalizer",), {"type": "Precompiled", "x": ""}), "only as pykern writes it"),
    "foreign: added token is huge": (changed(gpt2(), ("added_tokens", 0, "id"), 1 << 60), "not its place"),
    "foreign: added token is negative": (changed(gpt2(), ("added_tokens", 0, "id"), -1), "not its place"),
    "foreign: gap": (changed(llama3(), ("added_tokens", 1, "id"), 999), "not its place"),
    "foreign: twice": (changed(gpt2(), ("added_tokens",), lambda a: a * 2), "not its place"),
    "foreign: added is an object": (changed(gpt2(), ("added_tokens",), {"a": 1}), "must be a list"),
    "foreign: added has no content": (changed(gpt2(), ("added_tokens",), [{"id": 1}]), "a content and an id"),
    "foreign: added is a surrogate": (changed(gpt2(), ("added_tokens", 0, "content"), "\ud800"), "is no text"),
    "foreign: pattern": (json.dumps(llama3("(a+)+$")), "combination of normalizer and pre_tokenizer"),
    "foreign: normalizer": (json.dumps(llama3(normalizer={"type": "Lowercase"})), "combination of normalizer"),
    "foreign: splits are numbers": (changed(llama3(), ("pre_tokenizer", "pretokenizers"), [1, 2]), "combination"),
    "foreign: first space": (changed(gpt2(), ("pre_tokenizer", "add_prefix_space"), True), "combination"),
    "foreign: decoder": (changed(gpt2(), ("decoder",), {"type": "Fuse"}), "must be ByteLevel"),
    "foreign: decoder of llama": (changed(llama2(), ("decoder", "decoders", 0, "content"), "x"), "that of a Llama 2"),
    "foreign: a byte is missing": (changed(llama2(), V, lambda v: {k: i for i, k in enumerate(v) if k != "<0x41>"}),
                                   "must number|lacks some"),
    "foreign: no fallback": (changed(llama2(), ("model", "byte_fallback"), False), "must have byte_fallback"),
    "foreign: unknown token": (changed(llama2(), ("model", "unk_token"), "a"), "must be one of added_tokens"),
    "foreign: merges": (changed(llama2(), ("model", "merges"), ["z q"]), "not in model.vocab"),
    "foreign: template": (changed(gpt2(), ("post_processor",), {"type": "TemplateProcessing"}), "post_processor"),
    "foreign: templates without end": (
        changed(gpt2(), ("post_processor",), {"type": "Sequence", "processors": [{"type": "Sequence"}]}),
        "post_processor",
    ),
    "foreign: surrogate elsewhere": (changed(gpt2(), ("version",), "\ud800"), "what a file cannot"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(tmp_path, name):
    text, words = HOSTILE[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*({words})") as caught:
        Tokenizer.load(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", NEW)
@given(data=st.data())
def test_damaged_file_gives_a_tokenizer_or_a_value_error(kind, data):
    content = MADE[kind].to_json().encode()
    start = data.draw(st.integers(0, len(content) - 1))
    stop = data.draw(st.integers(start, min(len(content), start + 40)))
    text = (content[:start] + data.draw(st.binary(max_size=4)) + content[stop:]).decode("utf-8", "surrogateescape")
    try:
        tokenizer = Tokenizer.from_json(text)
    except ValueError:
        return
    assert b"".join(piece.data for piece in tokenizer.pieces(TEXTS[0])) == TEXTS[0].encode()


def test_max_bytes_can_be_raised(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(MADE["bpe"].to_json() + " " * (8 << 20))
    with pytest.raises(ValueError, match="at most 8388608"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, max_bytes=16 << 20).kind == "bpe"


# ---- comparison


def test_comparison_counts():
    found = {item.name: item for item in compare_tokenizers("the zebra ï", MADE)}
    assert tuple(found) == KINDS
    assert (found["byte"].tokens, found["byte"].characters, found["byte"].bytes) == (12, 11, 12)
    assert (found["word"].tokens, found["word"].unknown, found["word"].unknown_bytes) == (3, 2, 9)
    assert found["character"].unknown == 2 and found["unigram"].unknown == 0  # z ï
    assert found["word"].bytes_per_token == 4 and math.isnan(compare_tokenizers("", MADE)[0].bytes_per_token)
    assert set(train_kinds(TEXTS, 300)) == set(KINDS)
    with pytest.raises(ValueError, match="tokenizers is empty"):
        compare_tokenizers("a", {})
    with pytest.raises(TypeError, match="must be str"):
        compare_tokenizers(b"a", MADE)


def test_visible_hides_nothing():
    assert visible("a\n\t\x1b[0m\u202eb".encode() + b"\xe2") == "a⏎⇥<U+001B>[0m<U+202E>b<E2>"


PICTURES = ["a zebra $x$ 😀\n", "", *(pytest.param(t, marks=pytest.mark.slow) for t in ("x" * 500, "the cat " * 200))]


@pytest.mark.parametrize("text", PICTURES)
def test_picture_is_drawn(tmp_path, text, recwarn):
    path = tmp_path / "picture.png"
    plot_comparison(compare_tokenizers(text, {kind: MADE[kind] for kind in ("byte", "word")}), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and os.listdir(tmp_path) == ["picture.png"]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    import matplotlib.image

    pixels = matplotlib.image.imread(path)[..., :3]
    red = (np.abs(pixels - np.array([0xE3, 0x4A, 0x33]) / 255) < 0.02).all(-1).sum()
    assert (red > 100) == bool(compare_tokenizers(text, {"word": MADE["word"]})[0].unknown)
    with pytest.raises(ValueError, match="comparisons is empty"):
        plot_comparison([], path)
