"""Padded against packed: the same texts, the same number of targets per step, tokens per second and held-out loss.

    python -m pykern.lm.compare_batching [--data SOURCE] [--split lines|paragraphs] [--steps N] …

Texts are the lines, or the paragraphs, of a corpus. Both ways train on the same texts, with batches of equally many
targets on average, so the losses are those of two shuffles of the same training; what differs is how much is padding.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pykern.lm import corpus
from pykern.lm.config import Config
from pykern.lm.documents import Documents, PackedBatches, PaddedBatches
from pykern.lm.model import Transformer
from pykern.lm.options import TrainOptions
from pykern.lm.tokenizer import Tokenizer
from pykern.lm.trainer import make_model, make_optimizer

WARMUP_STEPS = 3  # not timed


@dataclass(frozen=True)
class Way:
    """name "padded" or "packed"; padding: share of the slots that hold none; tokens_per_second counts targets only;
    loss: nats per target of the held-out texts after `tokens` targets."""

    name: str
    padding: float
    tokens: int
    tokens_per_second: float
    loss: float


@torch.no_grad()
def held_out_loss(model: Transformer, batches: PaddedBatches | PackedBatches) -> float:
    """Nats per target, every text once."""
    nats = count = 0.0
    for batch in batches.once():
        nats += float(batch.loss(model, "sum"))
        count += batch.tokens
    return nats / count


def train_way(
    name: str,
    batches: PaddedBatches | PackedBatches,
    held_out: PaddedBatches | PackedBatches,
    config: Config,
    options: TrainOptions,
    clock: Callable[[], float] = time.perf_counter,
) -> Way:
    """options.steps steps of training from the weights of options.seed; the optimizer's settings are options'."""
    model = make_model(config, options)
    optimizer = make_optimizer(model, options)
    tokens = timed = slots = 0
    seconds = 0.0
    for step in range(options.steps or 0):
        start = clock()
        batch = batches.at(step)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate(step, 0.0)
        optimizer.zero_grad(set_to_none=True)
        batch.loss(model).backward()
        optimizer.step()
        if step >= WARMUP_STEPS:
            seconds += clock() - start
            timed += batch.tokens
        tokens += batch.tokens
        slots += batch.ids.numel()
    rate = timed / seconds if seconds else float("nan")
    return Way(name, 1.0 - tokens / slots, tokens, rate, held_out_loss(model, held_out))


def compare(
    texts: Documents,
    held_out: Documents,
    config: Config,
    options: TrainOptions,
    *,
    targets: int = 2000,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Way]:
    """Both ways, with as many rows a batch as hold `targets` targets on average; options.batch_size is not used."""
    ways = []
    for name, kind in (("padded", PaddedBatches), ("packed", PackedBatches)):
        whole = kind(texts, config.block_size, 1, options.seed)
        rows = max(1, round(targets * whole.rows_per_epoch / int(whole.lengths.sum())))
        batches = kind(texts, config.block_size, rows, options.seed)
        val = PaddedBatches(held_out, config.block_size, 16, 0)  # the same for both
        ways.append(train_way(name, batches, val, config, options, clock))
    return ways


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Padded against packed batches of the lines of a text.")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--split", choices=("lines", "paragraphs"), default="lines")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--targets", type=int, default=2000, help="per step, on average")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--val-texts", type=int, default=250, help="held-out texts, evenly spread over all")
    parser.add_argument("--processor-time", action="store_true", help="not wall time: for a machine that is busy")
    arguments = parser.parse_args(argv)
    text, tokenizer = corpus.load(arguments.data), Tokenizer.train("byte")
    texts = Documents.encode(corpus.parts(text.train_texts, arguments.split), tokenizer)
    val = corpus.parts(text.val_texts, arguments.split)
    held_out = Documents.encode(val[:: max(1, len(val) // max(1, arguments.val_texts))], tokenizer)
    config = Config(
        n_layer=2, n_head=2, n_embd=64, block_size=arguments.block_size, vocab_size=256, positions="rope",
        norm="rmsnorm", activation="swiglu",
    )  # fmt: skip
    print(f"{len(texts)} texts, {len(texts.tokens) / len(texts):.0f} tokens each on average")
    print(f"{'seed':4} {'batches':8} {'padding':>8} {'tokens':>9} {'tokens/s':>9} {'held-out loss':>14}")
    clock = time.process_time if arguments.processor_time else time.perf_counter
    for seed in range(arguments.seeds):
        options = TrainOptions(steps=arguments.steps, lr=2e-3, warmup=20, seed=seed)
        for way in compare(texts, held_out, config, options, targets=arguments.targets, clock=clock):
            print(
                f"{seed:4} {way.name:8} {way.padding:8.1%} {way.tokens:9} {way.tokens_per_second:9.0f} {way.loss:14.4f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
