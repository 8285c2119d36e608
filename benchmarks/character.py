"""python -m benchmarks.character --data FILE: a small character model, trained by pykern and by plain torch in turns.

The recipe is nanoGPT's for a CPU: 4 layers, 4 heads, 128 wide, blocks of 64, batches of 12, 2000 steps of AdamW (1e-3
falling to 1e-4, betas 0.9 and 0.99, decay 0.1, clipping 1), no dropout. Both start from the same weights and see the
same batches; blocks of 50 steps alternate, so that what else runs on the machine hits both.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bench_train import pykern_name
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import machine
from pykern.lm import Config, Data, Trainer, TrainOptions, Transformer
from pykern.lm.batches import validation_batches

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
OPTIONS = {
    "batch_size": 12,
    "lr": 1e-3,
    "final_lr": 0.1,
    "warmup": 100,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "clip": 1.0,
}
BLOCK = 50  # steps before the other's turn


class Plain:
    """The same recipe in torch: fused AdamW, clip_grad_norm_, cross_entropy."""

    def __init__(self, model: PlainGPT, ours: Trainer) -> None:
        self.model, self.ours, self.steps = model, ours, 0
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        options = ours.options
        betas = (options.beta1, options.beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=betas, weight_decay=options.weight_decay, fused=True
        )

    def train_step(self) -> float:
        x, y = self.ours.batches.at(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.ours.options.learning_rate(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.ours.options.clip)
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    @torch.no_grad()
    def held_out(self) -> float:
        nats, tokens = 0.0, 0
        for x, y in validation_batches(self.ours.data.val, self.model.block_size, 32):
            nats += self.model.loss(x, y).item() * y.numel()
            tokens += y.numel()
        return nats / tokens


def timed(step: Any, times: int) -> tuple[float, float]:
    """Seconds of `times` steps, and the loss of the last."""
    start = time.perf_counter()
    for _ in range(times):
        loss = step()
    return time.perf_counter() - start, loss


def sampled(model: Transformer, n: int, batch: int) -> float:
    """Characters per second of `batch` texts together, temperature 1, each n long, in one session."""
    session = model.session(batch=batch)
    start = torch.zeros((batch, 1), dtype=torch.int64)
    session.generate(start, max_new_tokens=n, temperature=1.0, seed=0)
    session.reset()
    began = time.perf_counter()
    session.generate(start, max_new_tokens=n, temperature=1.0, seed=0)
    return batch * n / (time.perf_counter() - began)


def run(data: Data, steps: int) -> dict[str, Any]:
    options = TrainOptions(**OPTIONS, steps=steps, eval_every=0, checkpoint_every=0, seed=1337)
    sizes = SHAPE | {"vocab_size": data.tokenizer.vocab_size}
    torch.manual_seed(options.seed)
    plain = PlainGPT(**sizes)
    model = Transformer(Config(**sizes, positions="learned", norm="layernorm", activation="gelu", tied_head=True))
    model.load_state_dict({pykern_name(name): value for name, value in plain.state_dict().items()})
    with tempfile.TemporaryDirectory() as folder:
        ours = Trainer(model, data, options, Path(folder) / "out")
        theirs = Plain(plain, ours)
        seconds: dict[str, list[float]] = {"pykern": [], "torch": []}
        last = {}
        while theirs.steps < steps:
            n = min(BLOCK, steps - theirs.steps)
            for name, step in (("pykern", lambda: ours.train_step()["loss"]), ("torch", theirs.train_step)):
                took, last[name] = timed(step, n)
                seconds[name].append(took / n)
        evaluation = ours.evaluate()
        assert evaluation is not None
        rates = {f"characters per second, {batch} texts": sampled(model, 63, batch) for batch in (1, 8, 64)}
    ratios = [a / b for a, b in zip(seconds["pykern"], seconds["torch"], strict=True)]
    return {
        "steps": steps,
        "threads": torch.get_num_threads(),
        "held-out loss, pykern": evaluation.loss,
        "held-out loss, torch": theirs.held_out(),
        "bits per character": evaluation.loss / math.log(2),
        "seconds, pykern": sum(seconds["pykern"]) / len(ratios) * steps,
        "seconds, torch": sum(seconds["torch"]) / len(ratios) * steps,
        "time beside torch, median of blocks": median(ratios),
        **rates,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.character", description=__doc__)
    parser.add_argument("--data", required=True, help="a text file; its end is held out")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write all numbers here as well, with the machine")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = machine()
    found = run(Data.load(arguments.data, "character"), arguments.steps)
    for name, value in found.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": facts} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
