"""A small training run that the tests share: 12 steps on made-up functions."""

import torch

from pykern.lm import Config, Data, Tokenizer, Trainer, TrainOptions
from pykern.lm.corpus import Corpus
from pykern.lm.plot import column, read_rows
from pykern.lm.trainer import make_model

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
OPTIONS = TrainOptions(
    steps=12,
    batch_size=4,
    lr=1e-2,
    warmup=2,
    schedule="linear",
    eval_every=5,
    eval_tokens=200,
    checkpoint_every=4,
    seed=3,
)
TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i % 5}\n\n\n" for i in range(150))


def make_data(text=TEXT, sha256="0" * 64, split=None):
    cut = len(text) * 9 // 10
    corpus = Corpus(train_texts=(text[:cut],), val_texts=(text[cut:],), sha256=sha256, description="functions")
    return Data.encode(corpus, Tokenizer.train("byte"), split=split)


def make_trainer(out, options=OPTIONS, data=None, **shape):
    config = Config(vocab_size=256, **SHAPE | shape)
    return Trainer(make_model(config, options), make_data() if data is None else data, options, out)


def changed(**changes):
    return TrainOptions(**OPTIONS.to_dict() | changes)


def losses(out):
    return column(read_rows(out / "loss.csv"), "loss")[1]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.weights().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
