"""torch's random streams with a seed of their own for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu", enabled: bool = True) -> Iterator[None]:
    """In the body the streams of the CPU and of `device` start from the seed; afterwards they are as they were."""
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(cuda, enabled=enabled):
        if enabled:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the streams of all devices
            for each in cuda:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
        yield
