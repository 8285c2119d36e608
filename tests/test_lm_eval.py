"""The adapter for lm-evaluation-harness: its arithmetic by hand, and the harness itself on a tiny local task."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_models import full_logits, make

from pykern.integrations.lm_eval import Scorer, end_scores, load_scorer, main, register, windows
from pykern.lm import Tokenizer
from pykern.lm.checkpoint import save_checkpoint

pytestmark = pytest.mark.one_isa

CLOSE = {"abs": 1e-5}  # float32 logits of rows padded differently; sums of some ten log-probabilities of size 10
REASON = "needs lm-evaluation-harness: pip install lm_eval"


def model_of(**changes):
    return make(vocab_size=256, **changes)


@pytest.fixture
def scorer():
    return Scorer(model_of(), Tokenizer.train("byte"), batch_size=2)


@pytest.fixture
def folder(tmp_path):
    model = model_of(seed=1, block_size=48)
    save_checkpoint(
        *(tmp_path / "model",), config=model.config, tensors=model.state_dict(), tokenizer=Tokenizer.train("byte")
    )
    return tmp_path / "model"


def by_hand(model, tokens, n):
    """log P of the last n tokens, one forward pass per token."""
    total, greedy = 0.0, True
    for t in range(len(tokens) - n, len(tokens)):
        logits = full_logits(model, torch.tensor([tokens[:t]]))[0, -1].double()
        total += float(logits[tokens[t]] - torch.logsumexp(logits, 0))
        greedy &= int(logits.argmax()) == tokens[t]
    return total, greedy


# ---- arithmetic


def test_end_scores_of_rows_of_different_lengths():
    model = model_of()
    rows = [(list(range(5)), 2), (list(range(40, 65)), 24), ([3, 9], 1), (list(range(20)), 1)]
    for batch_size in (1, 3, 8):
        for (total, greedy), (tokens, n) in zip(end_scores(model, rows, batch_size), rows, strict=True):
            expected, likely = by_hand(model, tokens, n)
            assert total == pytest.approx(expected, **CLOSE) and greedy == likely


def test_end_scores_knows_a_greedy_text():
    model = model_of()
    text = model.session().generate(torch.tensor([[7, 8]]), max_new_tokens=6, temperature=0.0)[0].tolist()
    other = [*text[:-1], (text[-1] + 1) % 256]
    half = [*text[:2], (text[2] + 1) % 256, *text[3:]]
    assert [greedy for _, greedy in end_scores(model, [(text, 6), (other, 6), (half, 6)])] == [True, False, False]


def test_probabilities_of_all_continuations_sum_to_one(scorer):
    characters = [chr(i) for i in range(128)]
    scores = scorer.loglikelihood([("ab", c) for c in characters])
    logits = full_logits(scorer.model, torch.tensor([list(b"ab")]))[0, -1].double()
    share = float(logits.softmax(0)[:128].sum())  # the other bytes are no text alone
    assert sum(math.exp(total) for total, _ in scores) == pytest.approx(share, rel=1e-6)


def test_windows_predict_every_token_once():
    """The harness's own example: ten tokens, four at once."""
    tokens = list(range(10))
    assert windows(tokens, -1, 4) == [([-1, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)]
    assert windows(tokens[:4], -1, 4) == [([-1, 0, 1, 2, 3], 4)]
    assert windows(tokens[:3], -1, 4) == [([-1, 0, 1, 2], 3)]
    assert windows([], -1, 4) == []
    assert windows(tokens[:3], -1, 1) == [([-1, 0], 1), ([0, 1], 1), ([1, 2], 1)]
    for n in range(30):
        for longest in (1, 3, 7):
            rows = windows(list(range(n)), -1, longest)
            assert [token for row, count in rows for token in row[-count:]] == list(range(n))
            assert all(len(row) <= longest + 1 for row, _ in rows)


def test_rolling_is_the_sum_over_the_windows(scorer):
    text = "the quick brown fox jumps over the lazy dog, twice"
    found = scorer.loglikelihood_rolling([text, "", "ab"])
    expected = sum(by_hand(scorer.model, row, n)[0] for row, n in windows(list(text.encode()), 10, 24))
    assert found == [pytest.approx(expected, abs=1e-4), 0.0, pytest.approx(by_hand(scorer.model, [10, 97, 98], 2)[0])]


def test_loglikelihood_takes_spaces_truncates_and_begins(scorer):
    long = "x" * 40
    pairs = [("ab ", "cd"), ("ab", " cd"), ("", "cd"), (long, "cd"), ("ab", ""), ("  ", "c")]
    found = scorer.loglikelihood(pairs)
    rows = [
        (list(b"ab cd"), 3),
        (list(b"ab cd"), 3),
        (list(b"\ncd"), 2),  # a line break stands for the empty context
        (list(long.encode() + b"cd")[-25:], 2),
        None,
        (list(b"\n  c"), 3),
    ]
    for (total, greedy), row in zip(found, rows, strict=True):
        expected, likely = (0.0, True) if row is None else by_hand(scorer.model, *row)
        assert total == pytest.approx(expected, **CLOSE) and greedy == likely
    with pytest.raises(ValueError, match="continuation 1 has 25 tokens, but the model reads 24 at once"):
        scorer.loglikelihood([("a", "b"), ("a", "c" * 25)])


def test_pairs_of_merged_tokens_are_split_as_the_harness_splits_them():
    tokenizer = Tokenizer.train("bpe", ["the cat sat on the mat"] * 4, 275)
    scorer = Scorer(make(vocab_size=275), tokenizer)
    context, continuation = "the cat", " sat on"
    whole = tokenizer.encode(context + continuation)
    assert len(whole) < len(context + continuation)
    before, after = scorer.split(context, continuation)
    assert before + after == whole and tokenizer.decode(after) == continuation
    assert scorer.split("the cat ", "sat on") == (before, after)
    merged = scorer.split("th", "e")  # one token for the pair: what is left of it is spelt alone
    assert merged[1] and tokenizer.decode(merged[1]) == "e"


def test_prefix_and_beginning_tokens():
    document = json.loads(Tokenizer.train("bpe", ["aab"], 257).to_json())
    n = len(document["model"]["vocab"])
    document["added_tokens"] = [{"id": n, "content": "<|endoftext|>", "special": True}]
    tokenizer = Tokenizer.from_json(json.dumps(document))
    model = make(vocab_size=n + 1)
    assert Scorer(model, tokenizer).split("", "b")[0] == [n]
    assert Scorer(model, tokenizer, prefix="b").split("", "a")[0] == tokenizer.encode("b")
    assert Scorer(model, tokenizer, add_bos_token=True).split("b", "a")[0] == [n, *tokenizer.encode("b")]
    with pytest.raises(ValueError, match="prefix is empty"):
        Scorer(model, tokenizer, prefix="")
    with pytest.raises(ValueError, match="batch_size 0 and max_gen_toks 256 must be at least 1"):
        Scorer(model, tokenizer, batch_size=0)


# ---- generation


def greedy_text(model, context, n):
    ids = model.session().generate(torch.tensor([list(context)]), max_new_tokens=n, temperature=0.0)[0]
    return Tokenizer.train("byte").decode(ids[len(context) :])


def test_generation_is_greedy_and_ends_before_a_stop_string(scorer):
    text = greedy_text(scorer.model, b"ab", 12)
    assert scorer.generate_until([("ab", {"max_gen_toks": 12})]) == [text]
    stop = text[4:6]
    assert scorer.generate_until([("ab", {"max_gen_toks": 12, "until": [text[7:], stop]})]) == [
        text[: text.index(stop)]
    ]
    assert scorer.generate_until([("ab", {"until": text[0], "do_sample": False, "temperature": 0.9})]) == [""]


def test_generation_keeps_the_end_of_a_long_context_and_outgrows_the_block(scorer):
    long = bytes(range(65, 115))
    expected = greedy_text(scorer.model, long[-14:], 10)
    assert scorer.generate_until([(long.decode(), {"max_gen_toks": 10})]) == [expected]
    assert scorer.generate_until([(long.decode(), {"max_new_tokens": 60})]) == [
        greedy_text(scorer.model, long[-12:], 60)  # half of the block is left
    ]


def test_generation_samples_by_seed_and_request(scorer):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "top_k": 50}
    one, two = scorer.generate_until([("ab", options), ("ab", options)])
    assert [one, two] == scorer.generate_until([("ab", options), ("ab", options)]) and one != two
    assert scorer.options({"temperature": 0.5})[2]["temperature"] == 0.5  # as the harness: a temperature means sampling
    assert scorer.options({"do_sample": False, "temperature": 0.5})[2]["temperature"] == 0.0
    assert scorer.options({"until": None, "num_beams": 1}) == ([], 256, {"temperature": 0.0, "seed": 0})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 4}, "generation argument num_beams is not supported"),
        ({"until": [""]}, r"until is \[''\], expected texts that are not empty"),
        ({"until": [3]}, r"until is \[3\], expected texts"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_generation_refuses_what_it_would_ignore(options, message, scorer):
    with pytest.raises(ValueError, match=message):
        scorer.generate_until([("ab", options)])


# ---- the folder and the harness


def test_a_folder_without_a_tokenizer_or_without_a_checkpoint(tmp_path):
    make().save(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no tokenizer.json"):
        load_scorer(str(tmp_path / "bare"))
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        load_scorer(str(tmp_path / "absent"))


def test_without_the_harness(monkeypatch):
    register.cache_clear()
    for name in ("lm_eval", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="the lm_eval package is missing: pip install lm_eval"):
        main()


def test_windows_and_pairs_agree_with_the_harness(scorer):
    utils = pytest.importorskip("lm_eval.utils", reason=REASON)
    for n in (0, 1, 4, 5, 23, 24, 25, 100):
        tokens = list(range(n))
        theirs = utils.get_rolling_token_windows(tokens, -1, 24, 1)
        assert windows(tokens, -1, 24) == [([*given, wanted[-1]], len(wanted)) for given, wanted in theirs]


def test_the_model_is_registered_under_its_name(folder):
    registry = pytest.importorskip("lm_eval.api.registry", reason=REASON)
    register.cache_clear()
    cls = register()
    assert registry.get_model("pykern") is cls and register() is cls
    model = cls.create_from_arg_string(f"pretrained={folder},max_gen_toks=5", {"batch_size": 1, "device": None})
    assert (model.scorer.max_gen_toks, model.scorer.batch_size) == (5, 1)
    assert cls(str(folder), device="cuda:0", batch_size="auto").scorer.batch_size == 8  # what the command line passes


TASK = """
task: pykern_tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
{lines}
"""
KINDS = {
    "choice": (
        "multiple_choice",
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list: [{metric: acc}]",
    ),
    "rolling": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\nmetric_list: [{metric: bits_per_byte}]',
    ),
    "until": (
        "generate_until",
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]',
    ),
}


@pytest.mark.slow
def test_the_harness_evaluates_a_tiny_local_task(folder, tmp_path):
    """All three kinds of requests, by the harness's command line; every figure against the one computed here."""
    pytest.importorskip("lm_eval", reason=REASON)
    scorer = load_scorer(str(folder))
    questions = ["the cat", "a dog barks", "one two three"]
    documents = []
    for i, question in enumerate(questions):
        answer = scorer.generate_until([(question, {"until": ["\n"], "max_gen_toks": 8})])[0] if i else "another text"
        documents.append({"question": question, "choices": [" sat", " ran off", " x"], "label": i, "answer": answer})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "tasks").mkdir()
    for kind, (output, lines) in KINDS.items():
        text = TASK.format(kind=kind, data=tmp_path / "test.jsonl", output=output, lines=lines)
        (tmp_path / "tasks" / f"{kind}.yaml").write_text(text)
    names = ",".join(f"pykern_tiny_{kind}" for kind in KINDS)
    argv = [sys.executable, "-m", "pykern.integrations.lm_eval", "run", "--model", "pykern", "--tasks", names]
    argv += ["--model_args", f"pretrained={folder}", "--include_path", str(tmp_path / "tasks")]
    argv += ["--output_path", str(tmp_path / "results.json")]
    offline = {name: "1" for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        argv, env=os.environ | offline | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": root}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    results = json.loads(next(tmp_path.glob("**/results*.json")).read_text())["results"]

    scores = [scorer.loglikelihood([(d["question"], c) for c in d["choices"]]) for d in documents]
    likeliest = [max(range(3), key=lambda c, row=row: row[c][0]) for row in scores]
    accuracy = sum(best == d["label"] for best, d in zip(likeliest, documents, strict=True)) / 3
    assert results["pykern_tiny_choice"]["acc,none"] == pytest.approx(accuracy)
    nats = sum(scorer.loglikelihood_rolling(questions))
    bits = -nats / sum(map(len, questions)) / math.log(2)
    assert results["pykern_tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits)
    assert results["pykern_tiny_until"]["exact_match,none"] == pytest.approx(2 / 3)
