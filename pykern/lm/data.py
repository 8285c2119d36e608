"""A corpus as tokens: what a model trains on, what it is tested on, and the tokenizer between text and tokens."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pykern.lm import corpus, tokenfile
from pykern.lm.documents import Documents
from pykern.lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """train, val: token ids [N], uint16 or uint32. source is what load() was given; the rest describes the text.

    split: what the corpus was cut into, "files", "lines" or "paragraphs", when it was; train_texts and val_texts are
    then train and val as texts.
    load raises ValueError for an unknown split, or for one of a file of tokens, whose texts are fixed.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    source: str
    sha256: str
    description: str
    split: str | None = None
    train_texts: Documents | None = None
    val_texts: Documents | None = None

    @classmethod
    def encode(cls, text: corpus.Corpus, tokenizer: Tokenizer, source: str = "", *, split: str | None = None) -> "Data":
        """The corpus under a tokenizer; split: as texts (pykern.lm.corpus.parts)."""
        texts = held_out = None
        if split is None:
            train, val = map(tokenizer.encode_texts, (text.train_texts, text.val_texts))
        else:
            texts, held_out = (
                Documents.encode(corpus.parts(part, split), tokenizer) for part in (text.train_texts, text.val_texts)
            )
            train, val = texts.tokens, held_out.tokens
        return cls(train, val, tokenizer, source, text.sha256, text.description, split, texts, held_out)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        tokenizer: Tokenizer | str = "byte",
        vocab_size: int | None = None,
        *,
        split: str | None = None,
    ) -> "Data":
        """The corpus of `source` ("stdlib", a file or a folder) under a tokenizer, or a kind of one trained here.

        A file NAME.npy holds tokens, which are mapped (pykern.lm.tokenfile): its tokenizer is given, or is "byte".
        split: as texts, "files", "lines" or "paragraphs"; a token file has its own, NAME.documents.npy, named "files".
        """
        if split is not None and split not in corpus.SPLITS:
            raise ValueError(f"split is {split!r} but must be one of {', '.join(corpus.SPLITS)}")
        if Path(source).suffix == ".npy" and not Path(source).is_dir():
            if isinstance(tokenizer, str):
                if tokenizer != "byte":
                    raise ValueError(f"{source} holds tokens: give the tokenizer that made them, not {tokenizer!r}")
                tokenizer = Tokenizer.train("byte")
            if split not in (None, "files"):
                raise ValueError(f"{source} holds tokens, whose texts are fixed: it cannot be split into {split}")
            file = tokenfile.read(source, tokenizer, texts=split is not None)
            about = (os.fspath(source), file.sha256, file.description)
            return cls(file.train, file.val, tokenizer, *about, split, file.train_texts, file.val_texts)
        text = corpus.load(source)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.train(tokenizer, text.train_texts, vocab_size)
        return cls.encode(text, tokenizer, os.fspath(source), split=split)
