"""Scoring: log probabilities against log_softmax in float64, through a session and in batches, and the refusals."""

import math

import pytest
import torch
from lm_models import SHAPES, full_logits, make, random_ids

from pykern.lm import Sampler, Session, Tokenizer, log_probabilities, score
from pykern.lm import scoring as module
from pykern.lm.scoring import token_probabilities

pytestmark = pytest.mark.one_isa
TOLERANCE = 1e-5  # float32 rounding of a loss of a few nats: 24 bits of about 8, and a sum of 11 exponentials

PROMPT = [3, 1, 4, 1, 5]
CANDIDATES = [[2], [9, 10], [6, 5, 3, 5, 8], [0], [7, 9, 3, 2], [10, 10, 10]]


def direct(model, text, start):
    """log P of each of text[start:], by log_softmax in float64 of the logits of the whole text."""
    logits = full_logits(model, torch.tensor([text]))[0].double()
    return [float(logits[t - 1].log_softmax(-1)[text[t]]) for t in range(start, len(text))]


def direct_scores(model, prompt=PROMPT, candidates=CANDIDATES):
    return [sum(direct(model, [*prompt, *candidate], len(prompt))) for candidate in candidates]


@pytest.fixture(scope="module")
def model():
    return make()


# ---- log_probabilities


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_are_log_softmax_in_float64(shape):
    model, ids = make(**SHAPES[shape]), random_ids(3, 20)
    got = log_probabilities(model, ids)
    assert got.dtype == torch.float32 and got.shape == (3, 19) and not got.requires_grad
    expected = torch.tensor([direct(model, text, 1) for text in ids.tolist()])
    assert (got - expected).abs().max() < TOLERANCE
    assert got.std() > 0.1  # not a constant that any computation would give


def test_log_probabilities_of_a_block_and_its_next_token(model):
    ids = random_ids(2, 25)
    got = log_probabilities(model, ids)
    last = full_logits(model, ids[:, :24])[:, -1].double().log_softmax(-1).gather(1, ids[:, 24:])[:, 0]
    assert (got[:, -1] - last).abs().max() < TOLERANCE


def test_padding_at_the_end_changes_nothing(model):
    ids = random_ids(2, 16)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], 1)
    assert torch.equal(log_probabilities(model, padded)[:, :15], log_probabilities(model, ids))


def test_dropout_is_off_and_the_mode_stays():
    model, ids = make(dropout=0.5).train(), random_ids(2, 9)
    first = log_probabilities(model, ids)
    assert model.training and torch.equal(first, log_probabilities(model, ids))
    assert torch.equal(first, log_probabilities(model.eval(), ids)) and not model.training


@pytest.mark.parametrize("shape", [(0, 5), (3, 1)])
def test_log_probabilities_of_nothing(model, shape):
    got = log_probabilities(model, torch.zeros(shape, dtype=torch.int64))
    assert got.shape == (shape[0], shape[1] - 1) and got.dtype == torch.float32


@pytest.mark.parametrize(
    "ids, error, words",
    [
        ([[1, 2]], TypeError, "ids must be a Tensor, got list"),
        (torch.zeros(1, 3), TypeError, "ids have dtype torch.float32 but must be int64"),
        (torch.zeros(3).long(), ValueError, r"ids have shape \(3,\) but must be \[B, T\]"),
        (torch.zeros(2, 0).long(), ValueError, r"ids have shape \(2, 0\) but must be \[B, T\] with T at least 1"),
        (torch.zeros(1, 26).long(), ValueError, "26 tokens, of which the last is not read, exceed block_size 24"),
        (torch.tensor([[0, 11]]), IndexError, "ids contain 11, but the vocabulary has 11 tokens"),
        (torch.tensor([[-100, 1]]), IndexError, "ids contain -100, but the vocabulary has 11 tokens"),
    ],
)
def test_log_probabilities_refuses(model, ids, error, words):
    with pytest.raises(error, match="^log_probabilities: " + words):
        log_probabilities(model, ids)


# ---- score


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_score_is_the_sum_over_the_candidate(shape, batch_size):
    model = make(**SHAPES[shape])
    expected = direct_scores(model)
    for reader in (model, model.session(batch=3), model.session(batch=8)):
        assert score(reader, PROMPT, CANDIDATES, batch_size=batch_size) == pytest.approx(expected, abs=TOLERANCE)


def test_all_continuations_of_three_tokens_share_a_probability_of_1():
    model = make(vocab_size=4)
    every = [[a, b, c] for a in range(4) for b in range(4) for c in range(4)]
    for reader in (model, model.session(batch=5)):
        assert math.fsum(map(math.exp, score(reader, [1, 2], every))) == pytest.approx(1, abs=1e-6)


def test_a_session_reads_the_prompt_once_and_forks_its_pages(monkeypatch):
    """A prompt over a page long: the rows that the session computes are the prompt's and the candidates'."""
    model = make(block_size=160)
    prompt = random_ids(130).tolist()
    session, rows, free = model.session(batch=3), [], []
    extend = Session.extend

    def counted(self, pieces, texts, **options):
        rows.append([len(piece) for piece in pieces])
        out = extend(self, pieces, texts, **options)
        free.append(self.cache.free_pages)
        return out

    monkeypatch.setattr(Session, "extend", counted)
    got = score(session, prompt, CANDIDATES)
    assert rows == [[130], [1, 4], [3, 2]]
    assert free == [6, 4, 4]  # of 9: three hold the prompt, and both texts have a copy of the last of them
    assert got == pytest.approx(direct_scores(model, prompt), abs=TOLERANCE)


def test_a_long_prompt_is_read_in_pieces(monkeypatch, model):
    monkeypatch.setattr(module, "CHUNK", 2)
    assert score(model.session(batch=2), PROMPT, CANDIDATES) == pytest.approx(direct_scores(model), abs=TOLERANCE)


def test_score_forgets_what_the_session_held(model):
    session = model.session(batch=2)
    session.prefill(random_ids(2, 7))
    assert score(session, PROMPT, CANDIDATES) == score(model.session(batch=2), PROMPT, CANDIDATES)


def test_int8_scores_are_those_of_its_own_weights():
    """Not those of the float32 model, and those that its steps give."""
    model = make(n_embd=32)
    session = model.session("int8", batch=2)
    got = score(session, PROMPT, [[9, 10]])
    session.reset()
    first = session.prefill(torch.tensor([PROMPT, PROMPT]))[0].double().log_softmax(-1)[9]
    second = session.step(torch.tensor([9, 9]))[0].double().log_softmax(-1)[10]
    assert got == [pytest.approx(float(first + second), abs=1e-12)]
    assert got != pytest.approx(score(model, PROMPT, [[9, 10]]), abs=1e-4)


def test_bfloat16_in_both_ways():
    model = make().to(torch.bfloat16)
    by_session = score(model.session("bfloat16", batch=4), PROMPT, CANDIDATES)
    expected = direct_scores(model)
    assert by_session == pytest.approx(expected, abs=1e-12)  # the logits have the same bits
    # the loss never rounds a logit to bfloat16, 8 bits, which full logits do
    assert score(model, PROMPT, CANDIDATES) == pytest.approx(expected, abs=0.2)


def test_normalise():
    tokenizer = Tokenizer.train("character", "aä€")  # ids 1, 2, 3 of 1, 2 and 3 bytes
    model = make(vocab_size=tokenizer.vocab_size)
    candidates = [[1, 2, 3], [3, 3], [1]]
    plain = score(model, [1], candidates)
    for reader in (model, model.session(batch=2)):
        by_token = score(reader, [1], candidates, normalise="tokens")
        by_byte = score(reader, [1], candidates, normalise="bytes", tokenizer=tokenizer)
        assert by_token == pytest.approx([plain[0] / 3, plain[1] / 2, plain[2]], abs=TOLERANCE)
        assert by_byte == pytest.approx([plain[0] / 6, plain[1] / 6, plain[2]], abs=TOLERANCE)


def test_no_candidates_and_the_longest_that_fit(model):
    assert score(model, PROMPT, []) == [] == score(model.session(), PROMPT, [])
    longest = random_ids(20).tolist()
    expected = score(model, PROMPT, [longest])
    assert score(model.session(), PROMPT, [longest]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"prompt": []}, ValueError, "the prompt is empty, but must hold at least one token"),
        ({"prompt": "abc"}, TypeError, "the prompt must be a sequence of token ids, got str"),
        ({"prompt": torch.tensor([1])}, TypeError, "the prompt must be a sequence of token ids, got Tensor"),
        ({"prompt": [1, 11]}, IndexError, "the prompt holds 11 at position 1, but the vocabulary has 11 tokens"),
        ({"prompt": [1.0]}, TypeError, "the prompt holds 1.0 at position 0, but token ids are int"),
        ({"prompt": [True]}, TypeError, "the prompt holds True at position 0, but token ids are int"),
        ({"candidates": [[1], []]}, ValueError, "candidate 1 is empty"),
        ({"candidates": [[-1]]}, IndexError, "candidate 0 holds -1 at position 0"),
        ({"candidates": [[1], [2] * 23]}, ValueError, "3 tokens of prompt and 23 of candidate 1 exceed the 24 that"),
        ({"normalise": "words"}, ValueError, "normalise is 'words' but must be one of none, tokens, bytes"),
        ({"normalise": "bytes"}, ValueError, "normalise='bytes' needs the tokenizer"),
        ({"batch_size": 0}, ValueError, "batch_size is 0 but must be at least 1"),
    ],
)
def test_score_refuses_in_both_ways(model, changes, error, words):
    for reader in (model, model.session()):
        with pytest.raises(error, match="^score: " + words):
            score(reader, **{"prompt": [1, 2, 3], "candidates": [[1]]} | changes)


def test_score_refuses_while_requests_run(model):
    session = model.session(batch=2)
    session.submit(torch.tensor([1, 2]), max_new_tokens=3)
    with pytest.raises(RuntimeError, match=r"session: requests are running; poll\(\) until they are done"):
        score(session, PROMPT, CANDIDATES)
    assert session.pending == 1


# ---- token_probabilities


@pytest.mark.parametrize("chunk", [512, 3])
def test_token_probabilities_and_ranks(model, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    new = random_ids(11, seed=5).tolist()
    got = token_probabilities(model.session(), PROMPT, new)
    logits = full_logits(model, torch.tensor([[*PROMPT, *new]]))[0, len(PROMPT) - 1 : -1].double()
    assert [each.token for each in got] == new
    for row, each in zip(logits, got, strict=True):
        assert each.log_probability == pytest.approx(float(row.log_softmax(-1)[each.token]), abs=1e-12)
        assert each.probability == pytest.approx(float(row.softmax(-1)[each.token]), abs=1e-12)
        assert each.rank == 1 + row.argsort(descending=True, stable=True).tolist().index(each.token)
    assert len({each.rank for each in got}) > 2


def test_greedy_tokens_have_rank_1_among_equals_too(model):
    ids = model.session().generate(torch.tensor([PROMPT]), max_new_tokens=8, temperature=0)[0].tolist()
    assert [each.rank for each in token_probabilities(model.session(), PROMPT, ids[5:])] == [1] * 8
    flat = make()
    with torch.no_grad():
        flat.transformer.wte.weight.zero_()  # the tied head: all logits are 0
    got = token_probabilities(flat.session(), PROMPT, [0, 1, 10])
    assert [each.rank for each in got] == [1, 2, 11]
    assert Sampler(0.0)(flat.session().prefill(torch.tensor([PROMPT]))).tolist() == [0]


def test_token_probabilities_refuses(model):
    assert token_probabilities(model.session(), PROMPT, []) == []
    with pytest.raises(ValueError, match=r"^token_probabilities: 5 tokens and 21 new ones exceed max_len 24"):
        token_probabilities(model.session(), PROMPT, [1] * 21)
    with pytest.raises(IndexError, match=r"^token_probabilities: new holds 11 at position 0"):
        token_probabilities(model.session(), PROMPT, [11])
