"""N-grams, recurrent networks and the Transformer on one text: held-out bits per byte, parameters, training time.

All read the same training text and predict the same held-out text. The neural models are trained by one loop on the
same batches, with as many parameters as the Transformer, as nearly as a whole number of units allows.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pykern.lm import corpus
from pykern.lm.batches import Batches, validation_batches
from pykern.lm.config import Config
from pykern.lm.corpus import Corpus
from pykern.lm.data import Data
from pykern.lm.evaluation import evaluate
from pykern.lm.files import replace_file
from pykern.lm.model import Transformer
from pykern.lm.ngram import MAX_ORDER, NGram
from pykern.lm.options import TrainOptions
from pykern.lm.progress import LINE_SECONDS
from pykern.lm.rnn import RNNLM, RNNConfig
from pykern.lm.seeding import seeded
from pykern.lm.tokenizer import Tokenizer
from pykern.lm.trainer import make_model, make_optimizer

NEURAL = ("elman", "lstm", "transformer")
LEARNING_RATES = {"elman": 6e-3, "lstm": 2e-2, "transformer": 6e-3}  # best of three each: docs/compare.md
SHAPE: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 128,
    "positions": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
}
Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One model. tokens: how many were trained on, repetitions included; for an n-gram the bytes that were counted.

    parameters: trained values; for an n-gram the different n-grams counted, of its order and below. seconds: training
    or counting alone. lr: the highest learning rate, None for an n-gram.
    """

    name: str
    bits_per_byte: float
    parameters: int
    seconds: float
    tokens: int
    lr: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def _fit(name: str, model: Transformer | RNNLM, data: Data, options: TrainOptions, report: Report) -> tuple[int, float]:
    """Trains to the end that options set; (tokens seen, seconds). FloatingPointError for a NaN loss."""
    block_size = model.config.block_size
    batches = Batches(data.train, block_size, options.batch_size, options.seed)
    optimizer = make_optimizer(model, options)
    model.train()
    step, seconds, shown_at = 0, 0.0, time.monotonic()
    while options.fraction(step, seconds) < 1.0:
        start = time.perf_counter()
        x, y = batches.at(step)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate(step, seconds)
        optimizer.zero_grad(set_to_none=True)
        loss = model(x, y)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"compare: the loss of {name} is {value} at step {step + 1}: try a lower lr")
        loss.backward()
        optimizer.step()
        step += 1
        seconds += time.perf_counter() - start
        if time.monotonic() - shown_at >= LINE_SECONDS:
            rate = step * options.batch_size * block_size / seconds
            done = options.fraction(step, seconds)
            report(f"{name}: step {step} ({done:.0%}) | loss {value:.4f} | {rate:,.0f} tok/s")
            shown_at = time.monotonic()
    return step * options.batch_size * block_size, seconds


def _count(orders: Sequence[int], text: Corpus, report: Report) -> list[Row]:
    rows = []
    for order in sorted(orders):
        start = time.perf_counter()
        model = NGram(text.train_texts, order)
        seconds = time.perf_counter() - start
        bits = float(model.bits_per_byte(text.val_texts)[-1])
        rows.append(Row(f"{order}-gram", bits, model.parameter_count, seconds, text.train_bytes))
        report(f"{order}-gram: {bits:.4f} bits per byte")
    return rows


def _make(name: str, config: Config, rnn_layers: int, options: TrainOptions) -> Transformer | RNNLM:
    """A model of config's size whose weights follow from the seed alone."""
    if name == "transformer":
        return make_model(config, options)
    shape = {"n_layer": rnn_layers, "block_size": config.block_size, "vocab_size": config.vocab_size}
    with seeded(options.seed):
        return RNNLM(RNNConfig.of_size(config.parameter_count, kind=name, **shape))


def _rates(lr: float | Mapping[str, float] | None, models: Sequence[str]) -> dict[str, float]:
    """The learning rate of each model."""
    if lr is None:
        return {name: LEARNING_RATES[name] for name in models}
    if not isinstance(lr, Mapping):
        return dict.fromkeys(models, lr)
    unknown = [str(name) for name in lr if name not in NEURAL]
    if unknown:
        raise ValueError(f"compare: lr names {unknown[0][:40]!r} but the models are {', '.join(NEURAL)}")
    return {name: lr.get(name, LEARNING_RATES[name]) for name in models}


def _check(orders: Sequence[int], models: Sequence[str], shape: Mapping[str, Any]) -> None:
    for order in orders:
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
            raise ValueError(f"compare: orders hold {order!r} but must be integers from 1 to {MAX_ORDER}")
    for name in models:
        if name not in NEURAL:
            raise ValueError(f"compare: models hold {str(name)[:40]!r} but must be of {', '.join(NEURAL)}")
    for what, values in (("orders", orders), ("models", models)):
        if len(set(values)) != len(values):
            raise ValueError(f"compare: {what} hold one twice: {', '.join(map(str, values))}")
    if not orders and not models:
        raise ValueError("compare: orders and models are both empty: there is nothing to compare")
    if shape.get("dropout"):
        raise ValueError(f"compare: dropout is {shape['dropout']!r} but must be 0: the recurrent models have none")


def compare(
    source: str | os.PathLike[str] | Corpus,
    *,
    tokenizer: Tokenizer | str = "byte",
    vocab_size: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 32,
    lr: float | Mapping[str, float] | None = None,
    seed: int = 0,
    orders: Sequence[int] = (1, 2, 3, 4, 5, 6),
    models: Sequence[str] = NEURAL,
    rnn_layers: int = 1,
    report: Report | None = None,
    **shape: Any,
) -> list[Row]:
    """n-grams of the orders, then the models, on "stdlib", a text file, a folder or a Corpus.

    Each neural model trains for `steps` updates of batch_size blocks, the same blocks for all, or for `minutes`,
    whichever is first; 1500 steps when neither is given. shape: fields of Config; without them SHAPE. lr: of all
    models, or by name; otherwise LEARNING_RATES. n-grams count bytes, the others read the tokens of `tokenizer`, a
    kind trained here with vocab_size or a trained one. Same seed, steps and threads: same bits per byte. report is
    called with a line now and then.

    ValueError names the argument that is wrong, before any text is read. FloatingPointError: a loss is not finite.
    """
    _check(orders, models, shape)
    rates = _rates(lr, models)
    if steps is None and minutes is None:
        steps = 1500
    shape = SHAPE | shape
    Config(vocab_size=256, **shape)  # a bad shape is refused before any text is read
    RNNConfig(kind="elman", n_layer=rnn_layers, n_embd=1, block_size=shape["block_size"], vocab_size=256)
    options = {
        name: TrainOptions(steps=steps, minutes=minutes, batch_size=batch_size, lr=rate, seed=seed)
        for name, rate in rates.items()
    }
    if steps is not None:
        options = {name: replace(o, warmup=min(o.warmup, steps // 10)) for name, o in options.items()}
    report = report or (lambda line: None)
    text = source if isinstance(source, Corpus) else corpus.load(source)
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer.train(tokenizer, text.train_texts, vocab_size)
    data = Data.encode(text, tokenizer)
    config = Config(vocab_size=tokenizer.vocab_size, **shape)
    if models:  # refuses a text that is too short before the work begins
        Batches(data.train, config.block_size, batch_size)
        validation_batches(data.val, config.block_size, batch_size)
    rows = _count(orders, text, report)
    for name in models:
        model = _make(name, config, rnn_layers, options[name])
        report(f"{name}: {model.config.n_embd} wide, {model.config.parameter_count:,} parameters")
        tokens, seconds = _fit(name, model, data, options[name], report)
        bits = evaluate(model, data.val, data.tokenizer, batch_size=batch_size).bits_per_byte
        rows.append(Row(name, bits, model.config.parameter_count, seconds, tokens, rates[name]))
        report(f"{name}: {bits:.4f} bits per byte")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [["model", "bits per byte", "parameters", "training, s", "tokens", "tokens/s", "lr"]]
    for row in rows:
        rate = "" if row.lr is None else f"{row.lr:g}"
        numbers = [f"{row.bits_per_byte:.4f}", f"{row.parameters:,}", f"{row.seconds:.1f}", f"{row.tokens:,}"]
        lines.append([row.name, *numbers, f"{row.tokens_per_second:,.0f}", rate])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def plot(rows: Sequence[Row], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Held-out bits per byte as bars, n-grams grey, with parameters and training time: a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'pykern[lm]'") from error
    figure = Figure(figsize=(8.5, 0.9 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    colors = ["tab:gray" if row.lr is None else "tab:blue" for row in rows]
    bars = axes.barh(places, [row.bits_per_byte for row in rows], color=colors)
    labels = [f"{row.bits_per_byte:.3f}   {row.parameters:,} parameters, {row.seconds:.1f} s" for row in rows]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.7 * max(row.bits_per_byte for row in rows))  # room for the labels
    axes.set(xlabel="held-out bits per byte: less is better", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
