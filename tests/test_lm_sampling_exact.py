"""Ancestral sampling draws whole texts with the model's probability: chi-square against the enumeration of all paths.

P(text | prompt) = product over t of softmax(logits_t / temperature)[token t], of full forward passes in float64. Seeds
are fixed, so a test passes always or never; a right sampler fails a new seed once in 1 / LIMIT times.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from lm_models import full_logits, make

from pykern.lm import Sampler

pytestmark = pytest.mark.one_isa
LIMIT = 1e-3  # the p-value under which frequencies are not those of the probabilities
WRONG = 1e-9  # what a wrong distribution must stay under, so that it is no accident that it is found
V, BATCH, DRAWS = 4, 500, 3000
PROMPTS = ([3, 1, 2], [0], [2, 2, 2, 2, 2, 2, 2])


def model_of(seed=2, **changes):
    return make(seed=seed, vocab_size=V, tied_head=False, **changes)


def path_probabilities(model, prompt, n, temperature=1.0, top_k=V, stop=()):
    """{tokens: probability} of every text of n tokens after the prompt, or of fewer up to the first stop token."""
    ended, live = {}, {(): 1.0}
    for _ in range(n):
        logits = full_logits(model, torch.tensor([[*prompt, *path] for path in live]))[:, -1].double()
        longer = {}
        for (path, before), row in zip(live.items(), logits, strict=True):
            kept = row.topk(top_k).indices
            for token, p in zip(kept.tolist(), (row[kept] / temperature).softmax(0).tolist(), strict=True):
                (ended if token in stop else longer)[(*path, token)] = before * p
        live = longer
    return ended | live


def drawn(session, prompt, n, draws, seed=0, stop=(), **options):
    """How often each text came in that many draws; a text that has ended is counted up to its stop token."""
    counts = Counter()
    for start in range(0, draws, session.batch):
        ids = torch.tensor([prompt] * session.batch)
        new = session.generate(ids, max_new_tokens=n, seed=seed + start, stop_tokens=stop, **options)[:, len(prompt) :]
        for text in new.tolist():
            end = next((i + 1 for i, token in enumerate(text) if token in stop), n)
            counts[tuple(text[:end])] += 1
    return counts


def p_value(counts, probabilities):
    """Of Pearson's chi-square: that frequencies lie this far from the probabilities or further, if those are right.

    Texts that are expected less than five times are one cell; one that is impossible makes it 0.
    """
    draws = sum(counts.values())
    if any(probabilities.get(text, 0.0) == 0.0 for text in counts):
        return 0.0
    cells, rare = [], [0, 0.0]
    for text, p in probabilities.items():
        if p * draws >= 5:
            cells.append((counts.get(text, 0), p * draws))
        else:
            rare = [rare[0] + counts.get(text, 0), rare[1] + p * draws]
    if rare[1] >= 5:
        cells.append(tuple(rare))
    statistic = math.fsum((seen - expected) ** 2 / expected for seen, expected in cells)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


# ---- the test of the test


def test_p_value_by_hand():
    """Quantiles of chi-square from a table: 10.828 with 1 degree of freedom, 16.266 with 3, are exceeded at 0.001."""
    half = math.sqrt(10.828 * 1000 / 4)  # (d^2 / 500) twice
    counts = {(0,): 500 + half, (1,): 500 - half}
    assert p_value(counts, {(0,): 0.5, (1,): 0.5}) == pytest.approx(0.001, rel=1e-3)
    off = math.sqrt(16.266 * 250 / 4)
    counts = {(0,): 250 + off, (1,): 250 - off, (2,): 250 + off, (3,): 250 - off}
    assert p_value(counts, dict.fromkeys(counts, 0.25)) == pytest.approx(0.001, rel=1e-3)
    assert p_value({(0,): 1000}, {(1,): 1.0}) == 0.0


def test_paths_are_all_there_are():
    model = model_of()
    paths = path_probabilities(model, PROMPTS[0], 3)
    assert set(paths) == set(itertools.product(range(V), repeat=3))
    assert math.fsum(paths.values()) == pytest.approx(1)
    text = (1, 0, 3)
    logits = full_logits(model, torch.tensor([[*PROMPTS[0], *text]]))[0].double()
    by_hand = math.prod(float(logits[2 + t].softmax(0)[token]) for t, token in enumerate(text))
    assert paths[text] == pytest.approx(by_hand)
    ended = path_probabilities(model, PROMPTS[0], 3, stop=(1,))
    assert math.fsum(ended.values()) == pytest.approx(1) and (1,) in ended and (0, 1) in ended
    assert not any(1 in path[:-1] for path in ended)


@pytest.fixture(scope="module")
def plain():
    """3000 texts of three tokens after the first prompt, shared by tests that change what they are held against."""
    return drawn(model_of().session(batch=BATCH, max_len=8), PROMPTS[0], 3, DRAWS)


# ---- texts


@pytest.mark.parametrize("prompt, n", [(PROMPTS[0], 4), (PROMPTS[1], 3), (PROMPTS[2], 3)])
def test_sampled_texts_have_the_probability_of_their_path(prompt, n):
    """3000 draws of 64 or 256 texts, after each of three prompts."""
    model = model_of()
    counts = drawn(model.session(batch=BATCH, max_len=len(prompt) + n), prompt, n, DRAWS)
    assert len(counts) > V**n / 3
    assert p_value(counts, path_probabilities(model, prompt, n)) > LIMIT


def test_a_shared_draw(plain):
    assert sum(plain.values()) == DRAWS
    assert p_value(plain, path_probabilities(model_of(), PROMPTS[0], 3)) > LIMIT


@pytest.mark.parametrize("positions", ["alibi", "rope"])
def test_in_other_models(positions):
    model = model_of(seed=5, positions=positions)
    counts = drawn(model.session(batch=BATCH, max_len=8), PROMPTS[0], 3, DRAWS)
    assert p_value(counts, path_probabilities(model, PROMPTS[0], 3)) > LIMIT


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_temperature(temperature):
    model = model_of()
    counts = drawn(model.session(batch=BATCH, max_len=8), PROMPTS[0], 3, DRAWS, temperature=temperature)
    assert p_value(counts, path_probabilities(model, PROMPTS[0], 3, temperature)) > LIMIT


def test_top_k_renormalises_at_every_step():
    model = model_of()
    counts = drawn(model.session(batch=BATCH, max_len=8), PROMPTS[0], 3, DRAWS, top_k=2)
    paths = path_probabilities(model, PROMPTS[0], 3, top_k=2)
    assert len(paths) == 8 and p_value(counts, paths) > LIMIT


def test_texts_that_end_at_a_stop_token():
    model = model_of()
    counts = drawn(model.session(batch=BATCH, max_len=8), PROMPTS[0], 4, DRAWS, stop=(1,))
    assert p_value(counts, path_probabilities(model, PROMPTS[0], 4, stop=(1,))) > LIMIT
    assert {len(text) for text in counts} == {1, 2, 3, 4}


def test_requests_that_join_and_leave():
    """submit() and poll(): three prompts take turns in a session of 16 texts."""
    model = model_of()
    session = model.session(batch=16, max_len=10)
    counts, texts, of = [Counter() for _ in PROMPTS], {}, {}
    for i in range(3 * 500):
        of[session.submit(torch.tensor(PROMPTS[i % 3]), max_new_tokens=2, seed=i)] = i % 3
    while session.pending:
        for progress in session.poll():
            texts.setdefault(progress.request, []).extend(progress.tokens)
            if progress.done:
                counts[of[progress.request]][tuple(texts.pop(progress.request))] += 1
    for prompt, seen in zip(PROMPTS, counts, strict=True):
        assert sum(seen.values()) == 500
        assert p_value(seen, path_probabilities(model, prompt, 2)) > LIMIT


def test_step_and_sampler():
    """The two by hand, as a program of one's own would use them."""
    model = model_of()
    session, counts = model.session(batch=BATCH, max_len=8), Counter()
    for start in range(0, DRAWS, BATCH):
        session.reset()
        sampler, text = Sampler(seed=start, batch=BATCH), []
        logits = session.prefill(torch.tensor([PROMPTS[0]] * BATCH))
        for _ in range(3):
            text.append(sampler(logits))
            logits = session.step(text[-1])
        counts.update(map(tuple, torch.stack(text, 1).tolist()))
    assert p_value(counts, path_probabilities(model, PROMPTS[0], 3)) > LIMIT


# ---- what must be found


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"temperature": 1.2}, {"top_p": 0.9}])
def test_another_distribution_is_found(options):
    model = model_of()
    counts = drawn(model.session(batch=BATCH, max_len=8), PROMPTS[0], 3, DRAWS, **options)
    assert p_value(counts, path_probabilities(model, PROMPTS[0], 3)) < WRONG


def test_another_prompt_and_other_weights_are_found(plain):
    assert p_value(plain, path_probabilities(model_of(), PROMPTS[0][::-1], 3)) < WRONG
    assert p_value(plain, path_probabilities(model_of(seed=3), PROMPTS[0], 3)) < WRONG


def test_draws_that_repeat_are_found(plain):
    """Had every text come four times, it would have its probability, but the frequencies would vary too much."""
    repeated = {text: 4 * count for text, count in plain.items()}
    assert p_value(repeated, path_probabilities(model_of(), PROMPTS[0], 3)) < LIMIT


def test_greedy_is_a_search_and_no_sampling():
    model = model_of()
    counts = drawn(model.session(batch=BATCH, max_len=8), PROMPTS[0], 3, 1000, temperature=0.0)
    assert len(counts) == 1
    assert p_value(counts, path_probabilities(model, PROMPTS[0], 3)) < WRONG
