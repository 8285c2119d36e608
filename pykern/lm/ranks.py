"""The processes that train one model together: what a rank does for itself, and what all must agree on.

Alone, a rank is the first of one and every method gives back what it was given. Under torchrun the gradients are
averaged over all ranks, by DistributedDataParallel where each holds the whole model, or by FSDP2 where each holds a
shard of every parameter, gradient and moment. gloo connects CPUs, nccl GPUs.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """rank: the number of this process, of `size`; shard: FSDP2 instead of DistributedDataParallel."""

    rank: int = 0
    size: int = 1
    shard: bool = False

    @classmethod
    def join(cls, *, shard: bool = False, device: str = "cpu") -> "Ranks":
        """The group that torchrun started this process for; without torchrun one process of one.

        ValueError: shard without torchrun.
        """
        if not torch.distributed.is_torchelastic_launched():
            if shard:
                raise ValueError("--shard needs several processes: torchrun --nproc-per-node 2 -m pykern.lm.train ...")
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return cls(rank, size, shard)

    def leave(self) -> None:
        """Ends what join() began."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def wrap(self, model: Any) -> Any:
        """What is called instead of the model, so that backward averages the gradients. shard: parameters change."""
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            for block in model.transformer.h:
                fully_shard(block)
            return fully_shard(model)
        return model if self.size == 1 else torch.nn.parallel.DistributedDataParallel(model)

    def parameters(self, model: Any) -> list[tuple[str, Any]]:
        """The named parameters that the optimizer knows: after a forward without backward FSDP2 still shows others."""
        if self.shard:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return list(model.named_parameters())

    def rows(self, x: Tensor) -> Tensor:
        """This rank's part of a batch [size * B, ...]."""
        return x if self.size == 1 else x.chunk(self.size)[self.rank]

    def _sum(self, value: float) -> float:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return total.item()

    def mean(self, value: float) -> float:
        """The mean over all ranks, the same number on each."""
        return value if self.size == 1 else self._sum(value) / self.size

    def any(self, flag: bool) -> bool:
        """Whether some rank says so."""
        return flag if self.size == 1 else self._sum(float(flag)) > 0.0

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def whole(self, x: Any) -> Tensor:
        """x itself, or all of it when this rank holds a shard: every rank must ask."""
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    @torch.no_grad()
    def fill(self, target: Any, values: Tensor) -> None:
        """target = values [its whole shape]; a shard takes its part."""
        if hasattr(target, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            values = distribute_tensor(values.to(target.dtype), target.device_mesh, target.placements)
        target.copy_(values)
