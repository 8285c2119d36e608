"""What test_lm_ranks.py starts on two ranks with torchrun: python ranks_run.py DATA OUT."""

import json
import os
import sys
from pathlib import Path

from pykern.lm import Config, Data, Trainer, TrainOptions
from pykern.lm.ranks import Ranks
from pykern.lm.trainer import make_model

STEPS, BATCH = 6, 4  # texts of a rank
OPTIONS = {"steps": STEPS, "warmup": 1, "eval_every": 0, "checkpoint_every": 0, "lr": 3e-3, "seed": 5}


def new_trainer(data: Data, out: Path, batch: int, ranks: Ranks | None = None, **changes) -> Trainer:
    options = TrainOptions(**OPTIONS | {"batch_size": batch} | changes)
    config = Config(vocab_size=256, n_layer=2, n_head=2, n_kv_head=1, n_embd=24, block_size=16, positions="rope")
    return Trainer(make_model(config, options), data, options, out, ranks=ranks)


def main(source: str, out: Path) -> None:
    data, lines = Data.load(source), Data.load(source, split="lines")
    found = {}
    for shard in (False, True):
        ranks = Ranks.join(shard=shard)
        name = "shard" if shard else "whole"
        trainer = new_trainer(data, out / name, BATCH, ranks)
        parameters = list(trainer.model.parameters())
        mine = sum(p.to_local().numel() if shard else p.numel() for p in parameters)
        found[name] = {"rank": ranks.rank, "size": ranks.size, "held": mine / sum(p.numel() for p in parameters)}
        trainer.run()

        stopped = new_trainer(data, out / f"{name} resumed", BATCH, ranks)
        for _ in range(STEPS // 2):
            stopped.train_step()
        stopped.save()
        Trainer.resume(out / f"{name} resumed", data, ranks=ranks).run()

        for batches in ("padded", "packed"):
            new_trainer(lines, out / f"{name} {batches}", BATCH, ranks, batches=batches).run()
    half = new_trainer(data, out / "half", BATCH, ranks, dtype="bfloat16")  # masters are sharded, too
    half.run()
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may ask for the interpreter while it ends, which aborts: seen once in some twenty runs
