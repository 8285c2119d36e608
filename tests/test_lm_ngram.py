"""The n-gram baseline of pykern.lm against the recursion that it implements."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykern.lm import corpus, ngram


class SlowWittenBell:
    """The recursion as it is written, with dictionaries."""

    def __init__(self, data, order):
        self.after = defaultdict(Counter)
        for n in range(1, order + 1):
            for end in range(n, len(data) + 1):
                self.after[data[end - n : end - 1], n][data[end - 1]] += 1

    def probability(self, history, byte, n):
        if n == 0:
            return 1 / 256
        if len(history) < n - 1:
            return self.probability(history, byte, n - 1)
        seen = self.after.get((history[len(history) - n + 1 :], n), {})
        lower = self.probability(history, byte, n - 1)
        total, types = sum(seen.values()), len(seen)
        return (seen.get(byte, 0) + types * lower) / (total + types) if total else lower


def sample(length, seed, letters=b"ab\x00\xff"):
    draw = random.Random(seed)
    return bytes(draw.choice(letters) for _ in range(length))


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_ngram_equals_the_recursion(order):
    train, held_out = sample(300, 1), sample(60, 2, b"abc\x00\xff")
    model, slow = ngram.NGram(train, order), SlowWittenBell(train, order)
    bits = model.bits_per_byte(held_out)
    for n in range(1, order + 1):
        expected = [slow.probability(held_out[:i], held_out[i], n) for i in range(len(held_out))]
        np.testing.assert_allclose(bits[n - 1], np.mean(-np.log2(expected)), rtol=1e-12)
    for history in (b"", b"a", held_out[:20], b"zzzzzzzz", train[-7:]):
        expected = [slow.probability(history, byte, order) for byte in range(256)]
        np.testing.assert_allclose(model.probabilities(history), expected, rtol=1e-12)


@given(train=st.binary(min_size=1, max_size=80), history=st.binary(max_size=12), order=st.integers(1, 8))
def test_ngram_probabilities_sum_to_one(train, history, order):
    probabilities = ngram.NGram(train, order).probabilities(history)
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-12)


def test_ngram_texts_shorter_than_the_order():
    model = ngram.NGram(b"ab", 6)
    np.testing.assert_allclose(model.bits_per_byte(b"a"), -np.log2((1 + 2 / 256) / 4))
    assert model.bits_per_byte(["aé"]).shape == (6,)


def test_ngram_refusals():
    for texts in (b"", [], [""]):
        with pytest.raises(ValueError, match="no text to count"):
            ngram.NGram(texts)
    with pytest.raises(ValueError, match="no text to evaluate"):
        ngram.NGram(b"a").bits_per_byte(b"")
    for order in (0, 9, 2.0, True):
        with pytest.raises(ValueError, match="order must be an integer from 1 to 8"):
            ngram.NGram(b"a", order)
    with pytest.raises(ValueError, match="between 1 and 3"):
        ngram.NGram(b"a", 3).probabilities(b"", 4)


@pytest.mark.slow
def test_ngram_baseline_on_the_standard_library():
    """Over several ways to draw the held-out files, orders 4 to 6 gave 1.79 to 2.24 bits per byte."""
    text = corpus.load("stdlib")
    bits = ngram.baseline(text.train_texts, text.val_texts)
    assert set(bits) == {4, 5, 6} and all(1.7 < value < 2.3 for value in bits.values())
