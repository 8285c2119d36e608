"""How fast a session reads and writes text: tokens per second, and how near that is to what the machine can do.

The tests are llama-bench's. pp512: 512 tokens per text into an empty cache. tg128: 128 tokens per text generated
greedily from an empty cache, tg128 @ d512: after 512 tokens, whose reading is not timed. Tokens of all texts count.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pykern
from pykern.lm.config import Config
from pykern.lm.model import Transformer
from pykern.lm.roof import Roof, measure
from pykern.lm.session import CHUNK, DTYPES, Session

GPT2 = ("gpt2 124M", Config(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257))
TINY = ("tiny", Config(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=256))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: every combination of dtype, batch and thread count; a length of 0 leaves its test out."""

    prompts: tuple[int, ...]
    new: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    dtypes: tuple[str, ...]
    repetitions: int

    def check(self, block_size: int) -> None:
        """ValueError in the words of the command line, before anything is measured."""
        for name, values, least, most in (
            ("-p", self.prompts, 0, block_size),
            ("-n", self.new, 0, block_size),
            ("-d", self.depths, 0, block_size),
            ("-b", self.batches, 1, 1024),
            ("-t", self.threads, 1, 1024),
            ("-r", (self.repetitions,), 1, 1000),
        ):
            for value in values:
                if not least <= value <= most:
                    raise ValueError(f"{name} is {value} but must be from {least} to {most}")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"--dtype is {dtype!r} but must be one of {', '.join(DTYPES)}")
        if not any(self.prompts) and not any(self.new):
            raise ValueError("-p and -n are both 0: nothing to measure")
        if any(self.new) and max(self.new) + max(self.depths) > block_size:
            raise ValueError(
                f"-d {max(self.depths)} and -n {max(self.new)} exceed the model's block_size of {block_size}"
            )

    @property
    def max_len(self) -> int:
        return max(*self.prompts, max(self.depths) + max(self.new))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table. roof: of reading for tg, of multiply-adds for pp, as a fraction of what was measured."""

    model: str
    model_size: int
    dtype: str
    batch: int
    n_threads: int
    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]
    gb_per_s: float
    roof: float


def cache_bytes(session: Session) -> int:
    """Of the keys and values of one token in every text and layer."""
    config = session.config
    numbers = 2 * config.n_layer * config.kv_heads * config.head_size
    return session.batch * numbers * session.cache.k.itemsize


def prompt_bytes(session: Session, p: int) -> int:
    """Read by a prefill: the weights once for each of its chunks, and the keys and values that its tokens look at."""
    chunk = max(1, CHUNK // session.batch)
    ends = [min(p, start + chunk) for start in range(0, p, chunk)]
    return len(ends) * session.weight_bytes + sum(ends) * cache_bytes(session)


def prompt_flops(config: Config, batch: int, p: int) -> int:
    """Of a prefill, whose head sees the last token of each text only."""
    head = 2 * config.vocab_size * config.n_embd
    return batch * (p * (config.forward_flops_per_token(p) - head) + head)


def step_bytes(session: Session, n: int, depth: int) -> float:
    """Read by one of n steps after `depth` tokens, in the mean: all weights, all keys and values."""
    return session.weight_bytes + (depth + (n + 1) / 2) * cache_bytes(session)


def prompt_seconds(session: Session, ids: Tensor) -> float:
    session.reset()
    start = time.perf_counter()
    session.prefill(ids)
    return time.perf_counter() - start


def step_seconds(session: Session, ids: Tensor, n: int, depth: int) -> float:
    """n steps after the first `depth` of ids: what comes before the cache holds them is not timed."""
    marks = [time.perf_counter()]
    session.generate(
        ids[:, : max(1, depth)],
        max_new_tokens=n + (depth > 0),  # the first new token comes with the last of the text, on its own
        temperature=0,
        callback=lambda token: marks.append(time.perf_counter()),
    )
    return marks[-1] - marks[1 if depth else 0]


def run(name: str, model: Transformer, plan: Plan, roofs: dict[int, Roof]) -> Iterator[Result]:
    """The results, as they come. roofs: measure() of every thread count of the plan."""
    generator = torch.Generator().manual_seed(0)
    for dtype in plan.dtypes:
        for batch in plan.batches:
            session = Session(model, dtype, plan.max_len, batch)
            ids = torch.randint(model.config.vocab_size, (batch, plan.max_len), generator=generator)
            for threads in plan.threads:
                set_threads(threads)
                yield from _tests(name, session, ids, plan, roofs[threads])


def _tests(name: str, session: Session, ids: Tensor, plan: Plan, roof: Roof) -> Iterator[Result]:
    def result(test: str, p: int, n: int, d: int, samples: list[float], read: float, share: float) -> Result:
        return Result(
            model=name,
            model_size=session.weight_bytes,
            dtype=session.dtype,
            batch=session.batch,
            n_threads=roof.threads,
            test=test,
            n_prompt=p,
            n_gen=n,
            n_depth=d,
            avg_ts=statistics.fmean(samples),
            stddev_ts=statistics.stdev(samples) if len(samples) > 1 else 0.0,
            samples_ts=samples,
            gb_per_s=read / 1e9,
            roof=share,
        )

    B, repetitions = session.batch, range(plan.repetitions)
    computed = "bfloat16" if session.dtype == "bfloat16" else "float32"
    for p in filter(None, plan.prompts):
        prompt_seconds(session, ids[:, :p])  # warm-up
        samples = [B * p / prompt_seconds(session, ids[:, :p]) for _ in repetitions]
        per_second = statistics.fmean(samples) / (B * p)
        share = per_second * prompt_flops(session.config, B, p) / roof.flops[computed]
        yield result(f"pp{p}", p, 0, 0, samples, per_second * prompt_bytes(session, p), share)
    for n in filter(None, plan.new):
        for d in plan.depths:
            step_seconds(session, ids, min(n, 2), d)
            samples = [B * n / step_seconds(session, ids, n, d) for _ in repetitions]
            moved = step_bytes(session, n, d)
            rate = statistics.fmean(samples) / B * moved
            yield result(f"tg{n} @ d{d}" if d else f"tg{n}", 0, n, d, samples, rate, rate / roof.bandwidth(moved))


def set_threads(n: int) -> None:
    """Of torch and of the kernels."""
    torch.set_num_threads(n)
    pykern.set_num_threads(n)


def measure_roofs(threads: tuple[int, ...], quick: bool) -> dict[int, Roof]:
    roofs = {}
    for n in threads:
        set_threads(n)
        roofs[n] = measure(quick)
    return roofs
