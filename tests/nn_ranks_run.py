"""What test_nn_ranks.py starts twice: python nn_ranks_run.py OUT RANK. The two meet in a file: a port may be taken.

Every module of nn_cases.py whole (DDP) and sharded (FSDP2): each rank has inputs of its own, the gradients and one step
of AdamW are those of one process with both. OUT/rank<r>.json says how far they are apart: {way: {module: distances}}.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nn_cases import CASES, make, outputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pykern import optim


def of_rank(inputs, rank):
    """Other numbers for rank 1: another gradient."""

    def other(x):
        if isinstance(x, int):
            return x + 1
        return 0.5 - x if x.is_floating_point() else torch.where(x >= 0, (x + 1) % 4, x)

    return inputs if rank == 0 else tuple(other(x) for x in inputs)


def loss_of(module, inputs):
    return sum(x.float().square().mean() for x in outputs(module, inputs))


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def distance(ours, theirs):
    """The largest difference of two lists of tensors, each relative to its largest number."""
    return max(((whole(a) - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def grads(module):
    return [p.grad for p in module.parameters()]


def distances(wrapped, module, plain, inputs, rank):
    """From one process: of the gradients, of the parameters after a step; and of this rank's own gradient, alone."""
    alone = copy.deepcopy(plain)
    loss_of(alone, of_rank(inputs, rank)).backward()
    for r in range(2):
        (loss_of(plain, of_rank(inputs, r)) / 2).backward()
    loss_of(wrapped, of_rank(inputs, rank)).backward()
    found = {"alone": distance(grads(alone), grads(plain)), "gradients": distance(grads(module), grads(plain))}
    for m in (module, plain):
        optim.AdamW(m.parameters(), lr=0.1, max_norm=0.5).step()
    assert all(p.dtype == torch.float32 for p in module.parameters())
    return found | {"parameters": distance((p.data for p in module.parameters()), (p.data for p in plain.parameters()))}


def main(out: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ways = {
        "DDP": lambda module: DistributedDataParallel(module),
        "FSDP2": lambda module: fully_shard(module, mesh=mesh),
        "FSDP2 in bfloat16": lambda module: fully_shard(module, mesh=mesh, mp_policy=half),
    }
    found = {way: {} for way in ways}
    for way, wrap in ways.items():
        for name in CASES:
            module, inputs, _ = make(name)
            if not any(True for _ in module.parameters()):
                continue
            plain = copy.deepcopy(module)
            wrapped = wrap(module)
            held = sum(p.to_local().numel() if way != "DDP" else p.numel() for p in module.parameters())
            share = held / sum(p.numel() for p in plain.parameters())
            found[way][name] = distances(wrapped, module, plain, inputs, rank) | {"held": share}
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may ask for the interpreter while it ends, which aborts: seen once in some twenty runs
