"""Requests in a running batch and speculative decoding: the tokens are those of each text alone."""

import pytest
import torch
from lm_models import SHAPES, make, random_ids

from pykern.lm import generate, sampling, speculate
from pykern.lm.speculative import lookup


def drain(session, limit=200):
    got, done = {}, set()
    for _ in range(limit):
        for progress in session.poll():
            got.setdefault(progress.request, []).extend(progress.tokens)
            assert progress.request not in done
            done |= {progress.request} if progress.done else set()
        if session.pending == 0:
            return got
    raise AssertionError("requests do not end")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
def test_requests_get_the_tokens_that_they_get_alone(shape, dtype):
    """Seven requests of different lengths, options and seeds on three texts; late ones join while others run."""
    model = make(**SHAPES[shape], **({} if dtype != "bfloat16" else {"dtype": torch.bfloat16}))
    prompts = [random_ids(n, seed=n) for n in (5, 1, 9, 3, 12, 2, 7)]
    options = [
        dict(max_new_tokens=4 + i, seed=i, temperature=[0.0, 1.0, 1.3][i % 3], top_k=[None, 4][i % 2])
        | ({"repetition_penalty": 1.4} if i == 5 else {})
        for i in range(7)
    ]
    session = model.session(dtype=dtype, batch=3)
    numbers = [session.submit(p, **o) for p, o in zip(prompts[:4], options[:4], strict=True)]
    early = [progress for _ in range(3) for progress in session.poll()]
    numbers += [session.submit(p, **o) for p, o in zip(prompts[4:], options[4:], strict=True)]
    got = drain(session)
    for progress in reversed(early):
        got.setdefault(progress.request, [])[:0] = progress.tokens
    for number, prompt, option in zip(numbers, prompts, options, strict=True):
        alone = generate(model, prompt, dtype=dtype, **option)
        assert got[number] == alone[len(prompt) :].tolist()


def test_equal_options_are_chosen_in_one_call(monkeypatch):
    """Texts of different lengths under a repetition penalty, one greedy among them."""
    choose, calls = sampling._choose, []
    monkeypatch.setattr(
        sampling, "_choose", lambda options, logits, *rest: calls.append(len(logits)) or choose(options, logits, *rest)
    )
    model = make()
    prompts = [random_ids(n, seed=n) for n in (3, 9, 1, 6)]
    options = [dict(max_new_tokens=5, seed=n, repetition_penalty=1.7) for n in range(3)] + [
        dict(max_new_tokens=5, temperature=0.0)
    ]
    session = model.session(batch=4)
    numbers = [session.submit(p, **o) for p, o in zip(prompts, options, strict=True)]
    got = drain(session)
    assert calls == [3, 1] * 5
    for number, prompt, option in zip(numbers, prompts, options, strict=True):
        assert got[number] == generate(model, prompt, **option)[len(prompt) :].tolist()


def test_common_prefixes_are_read_once_and_change_nothing():
    model, prefix = make(block_size=96), random_ids(40)
    prompts = [torch.cat([prefix, random_ids(5, seed=seed)]) for seed in range(6)]
    session = model.session(batch=2)
    numbers = [session.submit(p, max_new_tokens=3, temperature=0.0) for p in prompts]
    got = drain(session)
    assert session._batcher.reused >= 4 * 40
    for number, prompt in zip(numbers, prompts, strict=True):
        assert got[number] == generate(model, prompt, max_new_tokens=3, temperature=0.0)[45:].tolist()


def test_a_long_prompt_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr("pykern.lm.batching.PREFILL_ROWS", 4)
    model = make(block_size=64)
    session = model.session(batch=2)
    short = session.submit(random_ids(3), max_new_tokens=12, temperature=0.0)
    session.poll()
    long = session.submit(random_ids(40), max_new_tokens=2, temperature=0.0)
    first = [progress.request for _ in range(8) for progress in session.poll()]
    assert first == [short] * 8
    got = drain(session)
    assert got[long] == generate(model, random_ids(40), max_new_tokens=2, temperature=0.0)[40:].tolist()


def test_stop_tokens_end_a_request_and_its_place_is_taken():
    model, prompt = make(), random_ids(4)
    text = generate(model, prompt, max_new_tokens=10, temperature=0.0)[4:].tolist()
    stop = text[3]
    session = model.session()
    numbers = [session.submit(prompt, max_new_tokens=10, temperature=0.0, stop_tokens=(stop,)) for _ in range(3)]
    got = drain(session)
    assert all(got[n] == text[: text.index(stop) + 1] for n in numbers)
    out = generate(model, prompt, max_new_tokens=10, temperature=0.0, stop_tokens=(stop,))
    assert out[4:].tolist() == text[: text.index(stop) + 1]


def test_texts_that_have_ended_repeat_their_stop_token():
    model, ids = make(), random_ids(3, 4)
    plain = generate(model, ids, max_new_tokens=12, temperature=1.0, seed=5)[:, 4:]
    stop = int(plain[0, 2])
    out = generate(model, ids, max_new_tokens=12, temperature=1.0, seed=5, stop_tokens=(stop,))[:, 4:]
    for row, alone in zip(out.tolist(), plain.tolist(), strict=True):
        end = alone.index(stop) + 1 if stop in alone else len(alone)
        assert row == (alone[:end] + [stop] * len(alone))[: len(row)]


def test_refusals_of_submit_and_of_a_session_with_requests():
    session = make().session()
    for prompt, options, error, words in (
        (random_ids(1, 3), {}, ValueError, "prompt has shape"),
        (random_ids(0), {}, ValueError, "T at least 1"),
        (torch.tensor([11]), {}, IndexError, "contain 11"),
        (torch.tensor([1.0]), {}, TypeError, "must be int64"),
        (random_ids(3), {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        (random_ids(3), {"max_new_tokens": 22}, ValueError, "exceed max_len 24"),
        (random_ids(3), {"top_p": 2.0}, ValueError, "top_p is 2.0"),
    ):
        with pytest.raises(error, match=words):
            session.submit(prompt, **{"max_new_tokens": 2} | options)
    assert session.pending == 0 and session.poll() == []
    session.submit(random_ids(3), max_new_tokens=2)
    with pytest.raises(RuntimeError, match="requests are running"):
        session.prefill(random_ids(1, 3))
    drain(session)
    alone = make().session().prefill(random_ids(1, 3))
    assert torch.equal(session.prefill(random_ids(1, 3)), alone)  # and not behind what a request has left
    session.submit(random_ids(5), max_new_tokens=9, temperature=0.0)
    session.poll()
    session.reset()
    number = session.submit(random_ids(5), max_new_tokens=9, temperature=0.0)
    assert drain(session) == {number: generate(make(), random_ids(5), max_new_tokens=9, temperature=0.0)[5:].tolist()}


# ---- speculative decoding


def test_lookup_takes_what_followed_the_longest_match():
    assert lookup([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 3) == [9, 2, 3]
    assert lookup([5, 6, 5], 4) == [6, 5]
    assert lookup([1, 2, 3], 2) == [] and lookup([4], 2) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("drafted", ["lookup", "the model itself", "another model"])
def test_speculation_equals_plain_greedy_decoding(drafted, dtype):
    model = make(block_size=64, **({} if dtype != "bfloat16" else {"dtype": torch.bfloat16}))
    draft = {
        "lookup": lambda: None,
        "the model itself": lambda: model.session(dtype=dtype),
        "another model": lambda: make(seed=3, block_size=64, n_layer=1).session(),
    }[drafted]()
    for T in (1, 7):
        ids = random_ids(1, T)
        plain = generate(model, ids, max_new_tokens=40, temperature=0.0, dtype=dtype)
        result = speculate(model.session(dtype=dtype), ids, max_new_tokens=40, draft=draft, lookahead=5)
        assert torch.equal(result.ids, plain)
        assert result.passes + result.accepted == 40
        if drafted == "the model itself":
            assert result.passes == 7 and result.accepted == result.guessed
        if drafted == "another model":
            assert result.accepted < result.guessed


def test_speculation_stops_where_plain_decoding_does():
    model, ids = make(), random_ids(1, 4)
    plain = generate(model, ids, max_new_tokens=15, temperature=0.0)
    stop = int(plain[0, 9])
    expected = generate(model, ids, max_new_tokens=15, temperature=0.0, stop_tokens=(stop,))
    result = speculate(model.session(), ids, max_new_tokens=15, draft=model.session(), stop_tokens=(stop,))
    assert torch.equal(result.ids, expected)


def test_speculation_refuses():
    model = make()
    for call, words in (
        (lambda: speculate(model.session(batch=2), random_ids(1, 3), max_new_tokens=2), "batch=1"),
        (lambda: speculate(model.session(), random_ids(1, 3), max_new_tokens=22), "exceed max_len 24"),
        (lambda: speculate(model.session(), random_ids(1, 3), max_new_tokens=2, lookahead=0), "lookahead is 0"),
        (
            lambda: speculate(model.session(), random_ids(1, 3), max_new_tokens=2, draft=make(vocab_size=12).session()),
            "the draft has 12 tokens, the model 11",
        ),
        (lambda: speculate(model.session(), random_ids(2, 3), max_new_tokens=2), r"must be \[1, T\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_request_without_finite_logits_ends_alone():
    """Token 3 is NaN: a prompt that holds it ends with the reason, its neighbour and later ones get their tokens."""
    model = make(tied_head=False)
    with torch.no_grad():
        model.transformer.wte.weight[3] = torch.nan
    healthy = torch.tensor([1, 2, 4])
    session = model.session(batch=2)
    broken = session.submit(torch.tensor([1, 2, 3]), max_new_tokens=4, temperature=0.0)
    number = session.submit(healthy, max_new_tokens=1, temperature=0.0)
    first = {progress.request: progress for progress in session.poll()}
    assert first[broken].error == "sampling: logits have no finite maximum (NaN or infinity)"
    assert first[broken].done and first[broken].tokens == []
    assert first[number].error is None and first[number].done and session.pending == 0
    again = session.submit(healthy, max_new_tokens=1, temperature=0.0)
    alone = generate(model, healthy, max_new_tokens=1, temperature=0.0)[3:].tolist()
    assert first[number].tokens == drain(session)[again] == alone
