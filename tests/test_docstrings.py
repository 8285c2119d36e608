"""Every public name says what goes in and comes out: shapes, dtypes, errors, and the source of its mathematics.

A docstring counts together with that of forward or __call__. "pykern.name" in it refers the reader to that name, whose
dtypes, errors and source then count too, shapes never. Every part is asked of every name, but for what the tables at
the end of this file except, each with its reason; an exception that is not needed fails.
"""

import importlib
import inspect
import re

import pytest

import pykern.tape

pytestmark = pytest.mark.one_isa

PARTS = {
    "shapes": re.compile(r"\[(?:\.\.\.|[A-Za-z_]|\d|\])[^\[\]]*\]?"),
    "dtypes": re.compile(r"\b(?:b?float(?:16|32|64)|u?int(?:8|16|32|64)|bool)\b"),
    "errors": re.compile(r"\b[A-Z]\w*Error\b"),
    "source": re.compile(r"arXiv\s+\d{4}\.\d{4,5}|Source:|Formula:|\b(?:19|20)\d\d\)"),
}
# A formula is a source, too, where it stands: in the first line.
FORMULA = re.compile(r" = | / | \+ |\^|\bmax\(|\bexp\(|\blog P|\w\[\w|\bsoftmax\(|\bsigmoid\(")
MODULES = ("pykern", "pykern.nn", "pykern.lm", "pykern.tape")


def public_names():
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            yield f"{module}.{name}"


def resolve(path):
    """The object of a dotted public name, or None."""
    module, _, name = path.rpartition(".")
    if module not in MODULES or name not in importlib.import_module(module).__all__:
        return None
    return getattr(importlib.import_module(module), name)


def own_words(thing):
    """The docstrings of a name; for a class those of what one calls as well, where it has them itself."""
    words = [inspect.cleandoc(thing.__doc__ or "")]
    if inspect.isclass(thing):
        words += [vars(thing)[call].__doc__ or "" for call in ("forward", "__call__") if call in vars(thing)]
    return "\n".join(words)


def referred(words):
    """The docstrings of the public names that the words refer to."""
    found = [resolve(path) for path in re.findall(r"\bpykern(?:\.\w+)+", words)]
    return [own_words(thing) for thing in found if thing is not None and not inspect.ismodule(thing)]


def parts_of(words):
    parts = {part for part, pattern in PARTS.items() if pattern.search(words)}
    return parts | {"source"} if FORMULA.search(words.partition("\n")[0]) else parts


def missing(words, elsewhere=()):
    """The parts that neither the words nor, but for shapes, the docstrings that they refer to have."""
    found = parts_of(words).union(*(parts_of(other) - {"shapes"} for other in elsewhere))
    return PARTS.keys() - found


def excepted(path):
    parts = set()
    for names, without, _ in EXCEPTIONS:
        if path in names.split():
            parts |= set(without.split())
    return parts


def lacking(path):
    thing = resolve(path)
    words = own_words(thing)
    elsewhere = referred(words)
    if path.startswith("pykern.tape.") and inspect.isclass(thing) and issubclass(thing, pykern.tape.Module):
        elsewhere.append(own_words(pykern.tape.Module).replace("Formula:", ""))  # but each has a formula of its own
    return missing(words, elsewhere)


@pytest.mark.parametrize("path", list(public_names()))
def test_docstring_says_what_goes_in_and_comes_out(path):
    thing = resolve(path)
    if inspect.ismodule(thing):
        assert thing.__doc__ and thing.__doc__.strip(), path
        return
    if path == "pykern.tape.tape":  # a list, whose docstring is Python's
        assert type(thing) is list
        return
    assert thing.__doc__, f"{path} has no docstring"
    assert lacking(path) == excepted(path), f"{path}\n{own_words(thing)}"


def test_every_exception_names_something_public_and_a_reason():
    known = set(public_names())
    for names, parts, reason in EXCEPTIONS:
        assert set(names.split()) <= known and set(parts.split()) <= set(PARTS) and len(reason) > 20


def test_a_docstring_that_lacks_a_part_is_caught():
    good = "max(x, 0) for x [...], float32. TypeError: not a tensor."
    assert missing(good) == set()
    for part, worse in {
        "shapes": good.replace("[...]", ""),
        "dtypes": good.replace("float32", "real"),
        "errors": good.replace("TypeError: n", "N"),
        "source": good.replace("max(x, 0)", "the ramp"),
    }.items():
        assert missing(worse) == {part}
    assert missing("For x: as pykern.relu.", referred("as pykern.relu.")) == {"shapes"}
    assert "TypeError" in referred("as pykern.relu")[0] and referred("as pykern.nothing, pykern.lm") == []


# names, the parts that do not apply, why
EXCEPTIONS = [
    (
        "pykern.show_config pykern.get_num_threads",
        "shapes dtypes errors source",
        "they take nothing, and say something about the process",
    ),
    (
        "pykern.set_num_threads pykern.explain",
        "shapes dtypes source",
        "a count and the name of an op: no tensors of their own",
    ),
    (
        "pykern.lm.Config pykern.lm.RNNConfig",
        "shapes dtypes source",
        "whole numbers and names; the mathematics is with Transformer and RNNLM",
    ),
    (
        "pykern.lm.Sampling pykern.lm.NGram pykern.lm.classify pykern.lm.score",
        "shapes dtypes",
        "options, texts and lists of ids",
    ),
    ("pykern.lm.TrainOptions pykern.lm.Trainer pykern.lm.train", "shapes", "options, a model, data and a folder"),
    (
        "pykern.lm.Template pykern.lm.Tokenizer",
        "shapes dtypes source",
        "text goes in; the page of tokenizers has their formulas",
    ),
    (
        "pykern.lm.Corpus pykern.lm.Progress",
        "shapes dtypes errors source",
        "records of texts and numbers, which others make and check",
    ),
    ("pykern.lm.Evaluation", "shapes dtypes errors", "a record of three numbers"),
    (
        "pykern.lm.Batches pykern.lm.Data pykern.lm.PackedBatches pykern.lm.PaddedBatches pykern.lm.validation_batches",
        "source",
        "tokens are cut and dealt, nothing is computed",
    ),
    ("pykern.lm.load_hf pykern.lm.save_gguf pykern.lm.save_hf", "shapes source", "a model and files, whole"),
    ("pykern.lm.save_npz", "source", "weights as they are, to a file"),
    ("pykern.tape.GradientError", "shapes dtypes errors source", "it is an error itself"),
    ("pykern.tape.MergeHeads pykern.tape.SplitHeads", "source", "they move numbers, and change none"),
    ("pykern.tape.Parameter pykern.tape.Tensor", "source", "leaves: numbers that nothing is computed from"),
    ("pykern.tape.Network", "shapes source", "what it computes is what its modules do"),
    (
        "pykern.tape.applications pykern.tape.graph_svg pykern.tape.record_backward",
        "shapes dtypes source",
        "about the graph, not its numbers",
    ),
    ("pykern.tape.no_tape", "shapes dtypes errors source", "about the tape; it computes and checks nothing"),
    ("pykern.tape.tape_bwd", "shapes dtypes", "it takes and returns nothing"),
]
