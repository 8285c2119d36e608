"""Contestants: pykern, torch eager and compiled, SDPA with a backend pinned, and libraries where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.case import Maker, Within

COMPILED, TUNED = "torch.compile", "torch.compile max-autotune"
BACKENDS = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION", "sdpa efficient": "EFFICIENT_ATTENTION"}
LIBRARIES = ("triton", "flash_attn", "liger_kernel", "quack", "transformer_engine")
BACKEND = "inductor"  # of torch.compile; a rehearsal sets "eager", which compiles nothing
SETUP_SECONDS = {TUNED: 25.0, COMPILED: 6.0, "flex attention": 12.0, "": 0.3}  # before the first sample, by first words


def ours(name: str, **options: Any) -> Maker:
    """pykern.<name>(*inputs, **options), imported when its turn comes: without an extension only it fails."""

    def make() -> Callable[..., Any]:
        import pykern

        function = getattr(pykern, name)
        return lambda *inputs: function(*inputs, **options)

    return make


def eager(function: Callable[..., Any]) -> Maker:
    return lambda: function


def compiled(function: Callable[..., Any], mode: str | None = None) -> Maker:
    """torch.compile for these shapes alone."""

    def make() -> Callable[..., Any]:
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # a backward pass is called many times after one forward
        if BACKEND != "inductor":
            return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    return make


def forget_compiled(whos: list[str]) -> None:
    """Before a case: what torch.compile remembers of other shapes would make it general, and slower.

    Not between its contestants: graphs of the first ones still run what was compiled.
    """
    if any(setup_seconds(who) > 1.0 for who in whos):
        torch.compiler.reset()


def rivals(function: Callable[..., Any], *, tuned: bool = False) -> dict[str, Maker]:
    """torch eager and compiled; tuned: with templates timed against cuBLAS, too."""
    found = {"torch": eager(function), COMPILED: compiled(function)}
    return found | ({TUNED: compiled(function, "max-autotune-no-cudagraphs")} if tuned else {})


def pinned(backend: str, attend: Callable[..., Any]) -> Maker:
    """attend(*inputs) with one backend of F.scaled_dot_product_attention; RuntimeError where that one refuses."""

    def make() -> Callable[..., Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, BACKENDS[backend])

        def attend_pinned(*inputs: Any) -> Any:
            with sdpa_kernel(chosen):
                return attend(*inputs)

        return attend_pinned

    return make


def sdpa(attend: Callable[..., Any] = F.scaled_dot_product_attention, names: tuple[str, ...] = ()) -> dict[str, Maker]:
    """Every backend, or those named, pinned."""
    return {name: pinned(name, attend) for name in names or BACKENDS}


@contextmanager
def deterministic() -> Iterator[None]:
    """Algorithms that give the same bits each time, where torch has one; it would fill new memory with NaN, too."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def same_bits(make: Maker) -> Maker:
    """The contestant with a deterministic backward pass, which pykern's is: without atomic additions."""
    return lambda: Within(make(), deterministic)


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def library(name: str, who: str, make: Maker) -> dict[str, Maker]:
    """The contestant, where its library is installed."""
    return {who: make} if installed(name) else {}


def setup_seconds(who: str) -> float:
    """An estimate, put right as a run goes on."""
    return next(seconds for start, seconds in SETUP_SECONDS.items() if who.startswith(start))


def versions() -> dict[str, str | None]:
    """Of the libraries that could be rivals; None: not installed."""
    return {name: _version(name) if installed(name) else None for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))
