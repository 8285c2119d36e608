"""What the tests of training on short texts share: the texts, and a run on them."""

from lm_training import changed, make_data, make_trainer

from pykern.lm.plot import column, read_rows

KINDS = ("padded", "packed")
TEXT = "".join("-" * (i * i % 13) + f" {i % 5}\n" for i in range(300))  # lines of 3 to 15 tokens


def data_of(text=TEXT, split="lines"):
    return make_data(text, split=split)


def trainer_of(out, kind, *, data=None, dropout=0.0, **changes):
    options = changed(**{"batches": kind} | changes)
    return make_trainer(out, options, data_of() if data is None else data, dropout=dropout, positions="rope")


def tokens_of(out):
    return column(read_rows(out / "loss.csv"), "tokens")[1]
