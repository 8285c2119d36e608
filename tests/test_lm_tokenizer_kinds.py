"""Word, wordpiece and unigram tokenizers: their rules, what is unknown, and the comparison."""

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
