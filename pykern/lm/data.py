"""A corpus as tokens: what a model trains on, what it is tested on, and the tokenizer between text and tokens."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pykern.lm import corpus, tokenfile
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
        """The corpus of `source` ("stdlib", a file or a folder) under a tokenizer, or a kind of one trained here.

        A file NAME.npy holds tokens, which are mapped (pykern.lm.tokenfile): its tokenizer is given, or is "byte".
        """
        if Path(source).suffix == ".npy" and not Path(source).is_dir():
            if isinstance(tokenizer, str):
                if tokenizer != "byte":
                    raise ValueError(f"{source} holds tokens: give the tokenizer that made them, not {tokenizer!r}")
                tokenizer = Tokenizer.train("byte")
            file = tokenfile.read(source, tokenizer)
            return cls(file.train, file.val, tokenizer, os.fspath(source), file.sha256, file.description)
        text = corpus.load(source)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.train(tokenizer, text.train_texts, vocab_size)
        return cls.encode(text, tokenizer, os.fspath(source))
