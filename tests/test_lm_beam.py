"""Beam search: greedy with one beam, exact with all of them, a search without a cache beside it, and the refusals."""

import itertools
import math

import pytest
import torch
from lm_models import SHAPES, full_logits, make, random_ids

from pykern.lm import KVCache, Session, beam_search, score
from pykern.lm import beam as module

pytestmark = pytest.mark.one_isa
PROMPT = torch.tensor([3, 1, 2])


def small(seed=0, vocab=4, **changes):
    return make(seed=seed, vocab_size=vocab, **changes)


def plain_search(model, prompt, beams, n, penalty=0.0, stop=()):
    """[(tokens, log P, score)] of beam search as in a textbook: whole texts, no cache, no early end."""
    live, done = [((), 0.0)], []
    for _ in range(n):
        every = []
        for tokens, total in live:
            row = full_logits(model, torch.tensor([[*prompt, *tokens]]))[0, -1].double().log_softmax(-1).tolist()
            every += [((*tokens, token), total + value) for token, value in enumerate(row)]
        every = sorted(every, key=lambda each: -each[1])[:beams]
        done += [each for each in every if each[0][-1] in stop]
        live = [each for each in every if each[0][-1] not in stop]
    scored = [(tokens, total, total / len(tokens) ** penalty) for tokens, total in done + live]
    return sorted(scored, key=lambda each: -each[2])[:beams]


def texts_of(vocab, n, stop=()):
    """Every text of n tokens, or fewer that end with the first stop token in them."""
    for length in range(1, n + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            if not set(tokens[:-1]) & set(stop) and (length == n or tokens[-1] in stop):
                yield tokens


def enumerated(model, prompt, n, penalty=0.0, stop=()):
    """[(tokens, log P, score)] of all texts there are, the best first."""
    texts = list(texts_of(model.config.vocab_size, n, stop))
    values = score(model, prompt.tolist(), texts, batch_size=512)
    assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)
    scored = [(tokens, value, value / len(tokens) ** penalty) for tokens, value in zip(texts, values, strict=True)]
    return sorted(scored, key=lambda each: -each[2])


def same(found, expected, tolerance):
    assert [beam.tokens for beam in found] == [tokens for tokens, _, _ in expected]
    assert [beam.log_probability for beam in found] == pytest.approx([each[1] for each in expected], abs=tolerance)
    assert [beam.score for beam in found] == pytest.approx([each[2] for each in expected], abs=tolerance)


# ---- one beam


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy(seed, dtype):
    model = make(seed=seed, n_embd=32)
    session, prompt = model.session(dtype), random_ids(1, 4, seed=seed)
    greedy = session.generate(prompt, max_new_tokens=20, temperature=0)[0, 4:].tolist()
    for penalty in (0.0, 1.0):
        found = beam_search(session, prompt, beams=1, max_new_tokens=20, length_penalty=penalty)
        assert list(found.tokens) == greedy and not found.ended
    if dtype == "float32":
        assert beam_search(model, prompt[0], beams=1, max_new_tokens=20).tokens == tuple(greedy)


def test_one_beam_ends_where_greedy_ends():
    model = make()
    greedy = model.session().generate(random_ids(1, 4), max_new_tokens=12, temperature=0)[0, 4:].tolist()
    stop = greedy[5]
    found = beam_search(model, random_ids(4), beams=1, max_new_tokens=12, stop_tokens=[stop])
    assert list(found.tokens) == greedy[: greedy.index(stop) + 1] and found.ended


def test_lowest_ids_among_equals():
    model = make()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # the tied head: all logits are 0
    found = beam_search(model, PROMPT, beams=3, max_new_tokens=2, return_all=True)
    assert [beam.tokens for beam in found] == [(0, 0), (0, 1), (0, 2)]
    assert found[0].log_probability == pytest.approx(-2 * math.log(11))


# ---- all beams


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty, stop", [(0.0, ()), (0.0, (2,)), (1.0, (2,)), (0.5, (0, 3))])
def test_with_all_beams_the_best_text_is_found(seed, penalty, stop):
    """4^3 texts, all of them in order. What ends early is compared with what does not."""
    model = small(seed)
    expected = enumerated(model, PROMPT, 3, penalty, stop)
    options = {"max_new_tokens": 3, "length_penalty": penalty, "stop_tokens": stop}
    best = beam_search(model, PROMPT, beams=64, **options)
    assert best.tokens == expected[0][0] and best.ended == (best.tokens[-1] in stop)
    same(beam_search(model, PROMPT, beams=64, return_all=True, **options), expected, 1e-5)


def test_fewer_beams_are_a_heuristic():
    """Over 40 models: greedy misses the best text of some, two beams of fewer, 64 of none."""
    missed = {1: 0, 2: 0, 64: 0}
    for seed in range(40):
        model = small(seed, n_layer=1, positions="rope", tied_head=False)
        best = enumerated(model, PROMPT, 3)[0]
        for beams in missed:
            found = beam_search(model, PROMPT, beams=beams, max_new_tokens=3)
            assert found.log_probability <= best[1] + 1e-5
            missed[beams] += found.tokens != best[0]
    assert missed[1] > missed[2] > missed[64] == 0


# ---- the same search without a cache


@pytest.mark.parametrize("beams", [2, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_search_is_the_plain_one(shape, beams):
    model, prompt = make(**SHAPES[shape]), random_ids(5, seed=beams)
    found = beam_search(model, prompt, beams=beams, max_new_tokens=6, return_all=True)
    same(found, plain_search(model, prompt.tolist(), beams, 6), 1e-9)  # the logits have the same bits
    assert len({beam.tokens for beam in found}) == beams


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_search_with_stop_tokens_is_the_plain_one(penalty):
    """The plain search never ends early: so ending early drops nothing that would have won.

    With models 15 and 20 a text that is still live when the best has ended comes in among the four.
    """
    ended, stop = 0, (1, 5, 7)
    options = {"length_penalty": penalty, "stop_tokens": stop, "max_new_tokens": 8}
    for seed in (0, 1, 2, 4, 15, 20):
        model, prompt = make(seed, tied_head=False), random_ids(4, seed=seed)
        found = beam_search(model, prompt, beams=4, return_all=True, **options)
        same(found, plain_search(model, prompt.tolist(), 4, 8, penalty, stop), 1e-9)
        assert beam_search(model, prompt, beams=4, **options) == found[0]
        ended += sum(beam.ended for beam in found)
    assert 2 <= ended < 24


def test_search_ends_when_nothing_better_can_come(monkeypatch):
    """All four beams have ended by the third token, and no live text is as likely."""
    model, calls, extend = make(1, tied_head=False), [], Session.extend
    monkeypatch.setattr(Session, "extend", lambda *a, **options: (calls.append(0), extend(*a, **options))[1])
    options = {"beams": 4, "max_new_tokens": 8, "return_all": True}
    found = beam_search(model, random_ids(4, seed=1), stop_tokens=(1, 5, 7), **options)
    assert [len(beam.tokens) for beam in found] == [1, 2, 2, 3] and all(beam.ended for beam in found)
    assert len(calls) < 8
    calls.clear()
    beam_search(model, random_ids(4, seed=1), **options)
    assert len(calls) == 8


def test_the_penalty_chooses_longer_texts():
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        found = [
            beam_search(
                make(seed), PROMPT, beams=6, max_new_tokens=8, length_penalty=penalty, stop_tokens=(0, 1, 2, 3, 4)
            )
            for seed in range(6)
        ]
        lengths.append(sum(len(beam.tokens) for beam in found))
    assert lengths[0] < lengths[1] < lengths[2]


def test_scores_are_those_of_score():
    model = make()
    found = beam_search(model, PROMPT, beams=5, max_new_tokens=9, length_penalty=1.0, stop_tokens=(1,), return_all=True)
    tokens = [beam.tokens for beam in found]
    session = model.session(batch=5)
    assert [b.log_probability for b in found] == pytest.approx(score(session, PROMPT.tolist(), tokens), abs=1e-9)
    by_token = score(session, PROMPT.tolist(), tokens, normalise="tokens")
    assert [beam.score for beam in found] == pytest.approx(by_token, abs=1e-9)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)


# ---- the cache


def test_beams_fork_pages_and_write_into_copies(monkeypatch):
    """A prompt that ends inside its second page, 30 new tokens over its end: forks happen, and change no bit."""
    model, prompt, forks = make(block_size=192), random_ids(115), []
    fork = KVCache.fork
    monkeypatch.setattr(KVCache, "fork", lambda self, *pair: (forks.append(pair), fork(self, *pair))[1])
    found = beam_search(model, prompt, beams=3, max_new_tokens=30, return_all=True)
    same(found, plain_search(model, prompt.tolist(), 3, 30), 1e-8)
    assert len(forks) >= 5 and all(source != target for source, target in forks)


def test_one_compiled_call_a_step_and_the_first_page_is_stored_once(monkeypatch):
    session, calls = make(block_size=192).session(batch=4), []
    extend = Session.extend

    def counted(self, rows, texts, **options):
        out = extend(self, rows, texts, **options)
        calls.append((len(texts), len(set(texts)), len(set(self.cache.table[texts, 0].tolist()))))
        return out

    monkeypatch.setattr(Session, "extend", counted)
    beam_search(session, random_ids(70), beams=4, max_new_tokens=6)
    assert calls == [(1, 1, 1)] + [(4, 4, 1)] * 5


def test_branch_keeps_every_parent_until_it_is_forked():
    """All ways to choose 4 parents among 4 texts: a child holds its parent's length."""
    for parents in itertools.product(range(4), repeat=4):
        cache = KVCache(1, 4, 1, 8, 1, page=2)
        for text in range(4):
            cache.reserve(text + 1, [text])
            cache.advance(text + 1, [text])
        slots = module._branch(cache, [3, 1, 0, 2], list(parents), 4)
        assert sorted(slots) == [0, 1, 2, 3]
        assert [int(cache.lengths[slot]) - 1 for slot in slots] == [[3, 1, 0, 2][parent] for parent in parents]


def test_texts_of_a_session_are_forgotten_and_spare_ones_left_alone():
    model = make()
    session = model.session(batch=6)
    session.prefill(random_ids(6, 5))
    options = {"beams": 3, "max_new_tokens": 7, "return_all": True}
    assert beam_search(session, PROMPT, **options) == beam_search(model, PROMPT, **options)
    assert session.cache.lengths[3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("beams", [1, 4])
def test_no_new_tokens_and_the_longest_text(beams):
    model = make()
    assert beam_search(model, PROMPT, beams=beams, max_new_tokens=0).tokens == ()
    assert len(beam_search(model, PROMPT, beams=beams, max_new_tokens=21).tokens) == 21


# ---- refusals


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"ids": [1, 2]}, TypeError, "ids must be a Tensor, got list"),
        ({"ids": torch.ones(3)}, TypeError, "ids have dtype torch.float32 but must be int64"),
        ({"ids": torch.ones(2, 3).long()}, ValueError, r"ids have shape \(2, 3\) but must be \[T\] or \[1, T\]"),
        ({"ids": torch.ones(0).long()}, ValueError, r"ids have shape \(0,\) but must be"),
        ({"ids": torch.tensor([11])}, IndexError, "ids contain 11, but the vocabulary has 11 tokens"),
        ({"stop_tokens": (1, -1)}, IndexError, "stop_tokens contain -1, but the vocabulary has 11 tokens"),
        ({"beams": 0}, ValueError, "beams is 0 but must be a whole number of at least 1"),
        ({"beams": 2.0}, ValueError, "beams is 2.0 but must be a whole number of at least 1"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1 but must not be negative"),
        ({"max_new_tokens": 22}, ValueError, "3 tokens and 22 new ones exceed max_len 24"),
        ({"length_penalty": -1.0}, ValueError, "length_penalty is -1.0 but must be 0 or a positive number"),
        ({"length_penalty": math.nan}, ValueError, "length_penalty is nan but must be 0 or a positive number"),
    ],
)
def test_refused(changes, error, words):
    arguments = {"ids": PROMPT, "max_new_tokens": 2} | changes
    for reader in (make(), make().session(batch=4)):
        with pytest.raises(error, match="^beam_search: " + words):
            beam_search(reader, arguments["ids"], **{k: v for k, v in arguments.items() if k != "ids"})


def test_refused_by_the_session():
    with pytest.raises(ValueError, match="4 beams need a session of as many texts, but its batch is 2"):
        beam_search(make().session(batch=2), PROMPT, max_new_tokens=2)
    session = make().session(batch=4)
    session.submit(PROMPT, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="requests are running"):
        beam_search(session, PROMPT, max_new_tokens=2)


def test_broken_logits_are_refused():
    model = make()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"beam_search: logits have no finite maximum \(NaN or infinity\)"):
        beam_search(model, PROMPT, max_new_tokens=2)
