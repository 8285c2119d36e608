"""A corpus as tokens: what a model trains on, what it is tested on, and the tokenizer between text and tokens."""

import os
from dataclasses import dataclass

import numpy as np

from pykern.lm import corpus
from pykern.lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """train, val: token ids [N], uint16 or uint32. source is what load() was given; the rest describes the text."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    source: str
    sha256: str
    description: str

    @classmethod
    def encode(cls, text: corpus.Corpus, tokenizer: Tokenizer, source: str = "") -> "Data":
        """The corpus under a tokenizer."""
        return cls(
            train=tokenizer.encode_texts(text.train_texts),
            val=tokenizer.encode_texts(text.val_texts),
            tokenizer=tokenizer,
            source=source,
            sha256=text.sha256,
            description=text.description,
        )

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], tokenizer: Tokenizer | str = "byte", vocab_size: int | None = None
    ) -> "Data":
        """The corpus of `source` ("stdlib", a file or a folder) under a tokenizer, or a kind of one trained here."""
        text = corpus.load(source)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.train(tokenizer, text.train_texts, vocab_size)
        return cls.encode(text, tokenizer, os.fspath(source))
