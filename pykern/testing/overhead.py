"""What one call of an op costs the host, beside torch's own: CPU time at shapes so small that kernels hardly count.

    python -m pykern.testing.overhead [--calls 2000] [--repeats 7] [--backend inductor | aot_eager | none]

Plain calls under no_grad, forward and backward, and under no_grad inside torch.compile. One thread; CPU time of the
process, the median of several repeats; pykern and torch take turns. Prints a table in Markdown, microseconds per call.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pykern
from pykern import _C

Call = Callable[..., Any]
Pair = tuple[Call, Call]  # pykern's and torch's


def cases() -> dict[str, tuple[Pair, tuple[Tensor, ...]]]:
    """name: ((pykern's op, torch's), inputs); the floating inputs get gradients."""
    torch.manual_seed(0)
    x, weight, column = torch.randn(2, 16), torch.randn(16, 16), torch.randn(16)
    q, ids = torch.randn(1, 2, 4, 8), torch.tensor([3, 1])
    return {
        "gelu [2, 16]": ((pykern.gelu, F.gelu), (x,)),
        "softmax [2, 16]": ((pykern.softmax, lambda x: torch.softmax(x, -1)), (x,)),
        "layer_norm [2, 16]": (
            (pykern.layer_norm, lambda x, w, b: F.layer_norm(x, (16,), w, b)),
            (x, column, column.clone()),
        ),
        "rms_norm [2, 16]": ((pykern.rms_norm, lambda x, w: F.rms_norm(x, (16,), w, 1e-6)), (x, column)),
        "linear [2, 16] x [16, 16]": ((pykern.linear, F.linear), (x, weight, column)),
        "embedding [16, 16], 2 ids": ((lambda w: pykern.embedding(w, ids), lambda w: F.embedding(ids, w)), (weight,)),
        "cross_entropy [2, 16]": (
            (lambda x: pykern.cross_entropy(x, ids), lambda x: F.cross_entropy(x, ids)),
            (x,),
        ),
        "attention [1, 2, 4, 8], causal": (
            (
                lambda q, k, v: pykern.attention(q, k, v, causal=True),
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            ),
            (q, q.clone(), q.clone()),
        ),
    }


def cpu_microseconds(call: Callable[[], Any], calls: int) -> float:
    """CPU time of the process for each of several calls."""
    begin = time.process_time_ns()
    for _ in range(calls):
        call()
    return (time.process_time_ns() - begin) / calls / 1e3


def alternating(pair: list[Callable[[], Any]], calls: int, repeats: int) -> list[float]:
    """The median of each of two calls, measured in turns; a first turn of each does not count."""
    for call in pair:
        cpu_microseconds(call, max(1, calls // 10))
    turns = [[cpu_microseconds(call, calls) for call in pair] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def plain(op: Call, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return op(*inputs)

    return call


def with_gradients(op: Call, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    seed = torch.ones_like(op(*inputs))
    return lambda: torch.autograd.grad(op(*leaves), leaves, seed)


def compiled(op: Call, inputs: tuple[Tensor, ...], backend: str) -> Callable[[], Any]:
    return plain(torch.compile(op, fullgraph=True, backend=backend), inputs)


def rows(calls: int, repeats: int, backend: str) -> list[list[str | float]]:
    """[name, pykern and torch plain, with gradients, compiled] for every case."""
    found: list[list[str | float]] = []
    for name, (ops, inputs) in cases().items():
        row: list[str | float] = [name]
        row += alternating([plain(op, inputs) for op in ops], calls, repeats)
        row += alternating([with_gradients(op, inputs) for op in ops], calls, repeats)
        if backend != "none":
            torch.compiler.reset()
            row += alternating([compiled(op, inputs, backend) for op in ops], calls, repeats)
        found.append(row)
    return found


def table(found: list[list[str | float]], backend: str) -> str:
    names = ["no_grad", "forward + backward", f"torch.compile ({backend}), no_grad"][: (len(found[0]) - 1) // 2]
    heads = ["CPU µs per call", *(f"{who}, {name}" for name in names for who in ("pykern", "torch"))]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(x if isinstance(x, str) else f"{x:.1f}" for x in row) + " |" for row in found]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except FileNotFoundError:
        named = []
    return named[0] if named else platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pykern.testing.overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--calls", type=int, default=2000, help="calls in a repeat")
    parser.add_argument("--repeats", type=int, default=7, help="repeats, of which the median counts")
    parser.add_argument("--backend", choices=["inductor", "aot_eager", "none"], default="inductor")
    options = parser.parse_args(arguments)
    if options.calls < 1 or options.repeats < 1:
        parser.error("--calls and --repeats must be 1 or more")
    torch.set_num_threads(1)
    pykern.set_num_threads(1)
    counted = f"median of {options.repeats} times {options.calls} calls"
    print(f"{processor()}, one thread, ISA {_C.isa()}, torch {torch.__version__}, {counted}\n")
    print(table(rows(options.calls, options.repeats, options.backend), options.backend))


if __name__ == "__main__":
    main()
