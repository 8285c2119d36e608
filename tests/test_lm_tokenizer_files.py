"""tokenizer.json from elsewhere: files of other projects read as their library reads them, hostile ones refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykern.lm.tokenizer import KINDS, UNKNOWN_WORD, Tokenizer
from pykern.lm.tokenizer_files import KNOWN_SPLITS
from pykern.lm.tokenizer_kinds import CHUNK

pytestmark = pytest.mark.one_isa

TEXTS = [
    "the cat sat on the mat.\nthe dog sat on the log!\n",
    "def un_able(x):\n    return unable(x)\n",
    "größer, größte नमस्ते नमस्ते\n",
] * 4
SIZES = {"byte": 256, "character": None, "word": None, "wordpiece": 220, "bpe": 300, "unigram": 330}
MADE = {kind: Tokenizer.train(kind, TEXTS, SIZES[kind]) for kind in KINDS}
NEW = ("word", "wordpiece", "unigram")


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
