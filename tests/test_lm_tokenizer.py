"""Tokenizers of pykern.lm: exact round trips, agreement with the Hugging Face library, hostile files."""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykern.lm.tokenizer import KINDS, MAX_FILE_BYTES, UNKNOWN, Tokenizer, byte_alphabet

TEXTS = [
    "def f(x):\n    return x + 1\r\n",
    "for größe in range(10):\n\tprint(größe)\n",
    "def g(y):\n    return y\n",
] * 5
HARD = [
    "",
    " ",
    "\r\n\r\n",
    "\x00\x01\x7f",
    "naïve 😀👩‍👩‍👧 \u200b\ufeff",
    "\ufffd",
    "<unk><|endoftext|>",
    "  two  spaces",
    "e\u0301é",
]


SIZES = {"byte": 256, "character": None, "word": None, "wordpiece": 160, "bpe": 286, "unigram": 330}


def make(kind):
    return Tokenizer.train(kind, TEXTS, SIZES[kind])


MADE = {kind: make(kind) for kind in KINDS}
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
@settings(max_examples=8 * settings.default.max_examples)
@given(text=ANY_TEXT)
def test_lossless_round_trip_is_exact(kind, text):
    ids = MADE[kind].encode(text)
    assert MADE[kind].decode(ids) == text and MADE[kind].decode_bytes(ids) == text.encode()
    assert int(MADE[kind].bytes_per_token[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_lossless_round_trip_of_hard_texts(kind, text):
    assert MADE[kind].decode(MADE[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8 * settings.default.max_examples)
@given(text=ANY_TEXT)
def test_ids_are_those_of_the_library(kind, text):
    """Another tool that reads our tokenizer.json sees the ids and the text that we do."""
    from tokenizers import Tokenizer as HuggingFace

    other = HuggingFace.from_str(MADE[kind].to_json())
    ids = MADE[kind].encode(text)
    assert other.encode(text, add_special_tokens=False).ids == ids
    assert other.decode(ids) == MADE[kind].decode(ids)
    assert other.get_vocab_size() == MADE[kind].vocab_size


def test_byte_ids_are_byte_values():
    assert MADE["byte"].encode("é\n") == [0xC3, 0xA9, 10] and MADE["byte"].vocab_size == 256
    assert Tokenizer.train("byte").encode("a") == [97]
    assert sorted(byte_alphabet()) == sorted(set(byte_alphabet()))


def test_bpe_learns_merges_and_is_repeatable():
    tokenizer = MADE["bpe"]
    assert tokenizer.vocab_size == 286
    assert len(tokenizer.encode("def f(x):\n    return")) < 12
    code = f"from pykern.lm.tokenizer import Tokenizer; print(Tokenizer.train('bpe', {TEXTS!r}, 286).to_json(), end='')"
    for threads in ("1", "2"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONIOENCODING": "utf-8"}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert run.stdout.decode() == tokenizer.to_json()


def test_bpe_stops_early_when_there_is_nothing_left_to_merge():
    tokenizer = Tokenizer.train("bpe", "ab ab", 1000)
    assert 256 < tokenizer.vocab_size < 262


def test_character_maps_unknown_to_one_token():
    tokenizer = Tokenizer.train("character", ["hello\n"])
    assert tokenizer.vocab_size == 6  # U+FFFD \n e h l o
    assert tokenizer.encode("heyX😀") == [3, 2, 0, 0, 0]
    assert tokenizer.decode([3, 2, 0]) == "he" + UNKNOWN
    assert tokenizer.decode(tokenizer.encode("hello\n")) == "hello\n"
    assert tokenizer.bytes_per_token.tolist() == [0, 1, 1, 1, 1, 1]  # unknown: no bytes
    assert Tokenizer.train("character", "é€😀").bytes_per_token.tolist() == [0, 2, 3, 4]


def test_character_keeps_the_most_frequent():
    tokenizer = Tokenizer.train("character", ["aaabbc", "cccd"], vocab_size=3)
    assert tokenizer.vocab_size == 3 and tokenizer.decode(tokenizer.encode("abcd")) == "a" + UNKNOWN + "c" + UNKNOWN


@pytest.mark.parametrize("kind", KINDS)
def test_encode_texts_joins_texts(kind):
    tokenizer = MADE[kind]
    texts = [*TEXTS, "", "x"] * 20  # more than one call of the library
    ids = tokenizer.encode_texts(texts)
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert ids.tolist() == [index for text in texts for index in tokenizer.encode(text)]
    assert tokenizer.encode_texts([]).shape == (0,) and tokenizer.encode("") == []


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path, kind):
    MADE[kind].save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = Tokenizer.load(path)
        assert (loaded.kind, loaded.vocab_size, loaded.to_json()) == (kind, MADE[kind].vocab_size, MADE[kind].to_json())
        assert loaded.encode("".join(TEXTS)) == MADE[kind].encode("".join(TEXTS))
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_load_accepts_merges_written_with_spaces():
    document = json.loads(MADE["bpe"].to_json())
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    loaded = Tokenizer.from_json(json.dumps(document))
    assert loaded.encode(TEXTS[0]) == MADE["bpe"].encode(TEXTS[0])


def test_refusals():
    with pytest.raises(ValueError, match="kind must be one of byte, character, word, wordpiece, bpe, unigram"):
        Tokenizer.train("sentence", TEXTS)
    with pytest.raises(ValueError, match="bpe needs a vocab_size of at least 256, got 255"):
        Tokenizer.train("bpe", TEXTS, 255)
    with pytest.raises(ValueError, match="bpe needs a vocab_size"):
        Tokenizer.train("bpe", TEXTS)
    with pytest.raises(ValueError, match="needs text"):
        Tokenizer.train("character", [""])
    for kind in KINDS:
        with pytest.raises(TypeError, match="text must be str, got bytes"):
            Tokenizer.train(kind, [b"abc"], 300)
        with pytest.raises(TypeError, match="text must be str, got bytes"):
            MADE[kind].encode(b"abc")
        with pytest.raises(ValueError, match="lone surrogate at character 1"):
            MADE[kind].encode("a\ud800")
        for index in (-1, MADE[kind].vocab_size):
            with pytest.raises(IndexError, match=f"id {index} at position 1"):
                MADE[kind].decode([0, index])


# ---- hostile files ----


def changed(kind, change):
    document = json.loads(MADE[kind].to_json())
    change(document)
    return json.dumps(document)


def put(path, value):
    *folders, last = path.split(".")

    def change(document):
        for name in folders:
            document = document[name]
        document[last] = value

    return change


LOOP = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
HOSTILE = {
    "empty": "",
    "not JSON": "tokenizer",
    "a list": "[]",
    "an empty object": "{}",
    "truncated": make("bpe").to_json()[:-20],
    "deep": '{"model":' + "[" * 1_000_000,
    "deep object": '{"a":' * 1_000_000,
    "NaN": '{"model": NaN}',
    "surrogate token": changed("character", lambda d: d["model"]["vocab"].update({"\ud800": len(d["model"]["vocab"])})),
    "other model": changed("bpe", put("model.type", "Unigram")),
    "model is null": changed("bpe", put("model", None)),
    "pattern that takes for ever": changed("bpe", put("pre_tokenizer", LOOP)),
    "normalizer": changed("bpe", put("normalizer", {"type": "Lowercase"})),
    "padding": changed("bpe", put("padding", {"strategy": {"Fixed": 1 << 40}})),
    "post-processor": changed("bpe", put("post_processor", {"type": "TemplateProcessing"})),
    "added tokens": changed("byte", put("added_tokens", [{"id": 1 << 40, "content": "x"}])),
    "vocabulary is a list": changed("bpe", put("model.vocab", ["a"])),
    "vocabulary is empty": changed("bpe", put("model.vocab", {})),
    "id negative": changed("bpe", put("model.vocab.a", -1)),
    "id huge": changed("bpe", put("model.vocab.a", 1 << 60)),
    "id repeated": changed("bpe", put("model.vocab.a", 0)),
    "id as text": changed("bpe", put("model.vocab.a", "64")),
    "id is a bool": changed("bpe", put("model.vocab.a", True)),
    "a byte is missing": changed("bpe", lambda d: d["model"]["vocab"].update(zz=d["model"]["vocab"].pop("a"))),
    "bytes renumbered": changed("byte", lambda d: d["model"]["vocab"].update(a=98, b=97)),
    "byte with merges": changed("byte", put("model.merges", [["a", "b"]])),
    "a token that is no bytes": changed("bpe", lambda d: d["model"]["vocab"].update({"語": len(d["model"]["vocab"])})),
    "an empty token": changed("bpe", lambda d: d["model"]["vocab"].update({"": len(d["model"]["vocab"])})),
    "merge of unknown tokens": changed("bpe", put("model.merges", [["a", "zzz"]])),
    "merge into an unknown token": changed("bpe", put("model.merges", [["z", "q"]])),
    "merge of three": changed("bpe", put("model.merges", [["a", "b", "c"]])),
    "merge of numbers": changed("bpe", put("model.merges", [[1, 2]])),
    "merges as an object": changed("bpe", put("model.merges", {"a": "b"})),
    "dropout": changed("bpe", put("model.dropout", 0.5)),
    "byte fallback": changed("bpe", put("model.byte_fallback", True)),
    "character of two": changed("character", lambda d: d["model"]["vocab"].update(ab=len(d["model"]["vocab"]))),
    "character without unknown": changed("character", put("model.unk_token", None)),
    "character with another unknown": changed("character", put("model.unk_token", "a")),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as caught:
        Tokenizer.load(path)
    assert len(str(caught.value)) < 400


def test_files_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        Tokenizer.load(tmp_path / "pipe")
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="at most"):
        Tokenizer.load(tmp_path / "big.json")


@settings(max_examples=8 * settings.default.max_examples)
@given(data=st.data())
def test_damaged_file_gives_a_tokenizer_or_a_value_error(data):
    """One byte changed or some cut out, anywhere."""
    content = MADE["bpe"].to_json().encode()
    start = data.draw(st.integers(0, len(content) - 1))
    stop = data.draw(st.integers(start, min(len(content), start + 40)))
    patch = data.draw(st.binary(max_size=4))
    text = (content[:start] + patch + content[stop:]).decode("utf-8", "surrogateescape")
    try:
        tokenizer = Tokenizer.from_json(text)
    except ValueError:
        return
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


FLOODS = {
    "empty lists": b'{"model":[' + b"[]," * (MAX_FILE_BYTES // 3 - 10) + b"0]}",
    "empty objects": b'{"model":[' + b"{}," * (MAX_FILE_BYTES // 3 - 10) + b"0]}",
    "short keys": b'{"model":{"type":"BPE","vocab":{'
    + b",".join(b'"%x":%d' % (i, i % 10) for i in range(800_000))
    + b"}}}",
    "merges": None,
    "words": None,
    "pieces": None,
    "scores": None,
}


@pytest.mark.parametrize("name", FLOODS)
def test_largest_accepted_file_stays_within_time_and_memory(tmp_path, name):
    """In a process of its own, whose memory can be watched."""
    if FLOODS[name] is None:
        kind = {"merges": "bpe", "words": "word", "pieces": "wordpiece", "scores": "unigram"}[name]
        document = json.loads(MADE[kind].to_json())
        model = document["model"]
        if name == "merges":
            model["merges"] *= 16000
        elif name == "scores":
            model["vocab"] += [[f"{i:x}.", -9] for i in range(500_000)]
        else:
            model["vocab"].update({f"{i:x}.": i for i in range(len(model["vocab"]), 420_000)})
        data = json.dumps(document, separators=(",", ":")).encode()
    else:
        data = FLOODS[name]
    assert MAX_FILE_BYTES // 2 < len(data) <= MAX_FILE_BYTES, len(data)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    code = f"""
import re
import tokenizers
from pykern.lm.tokenizer import Tokenizer
def peak():  # of this program: what getrusage reports starts from the program that started it
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
try:
    Tokenizer.load({str(path)!r})
    print("loaded", end=" ")
except ValueError as error:
    print("refused", end=" ")
print(peak() - before)
"""
    start = time.perf_counter()
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, timeout=60)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu.ru_utime
    outcome, kilobytes = run.stdout.split()
    print(f"{name}: {outcome}, {seconds:.1f} s of processor time, {time.perf_counter() - start:.1f} s, {kilobytes} KiB")
    assert seconds < 5 and int(kilobytes) < 300 << 10
    assert outcome == ("loaded" if name in ("merges", "words", "pieces") else "refused")
