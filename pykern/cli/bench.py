"""pykern bench decode: tokens per second of a model's session, as a Markdown table or one JSON document."""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykern.cli.parts import Parser

if TYPE_CHECKING:
    from pykern.lm.bench import Plan, Result
    from pykern.lm.roof import Roof

COLUMNS = ("model", "size", "threads", "batch", "dtype", "test", "t/s", "GB/s", "roof")
LEFT = ("model", "dtype", "test")
WIDTHS = dict(zip(COLUMNS, (12, 10, 7, 5, 8, 13, 18, 7, 5), strict=True))
FULL, QUICK = dict(p=(512,), n=(128,), d=(0,), r=5), dict(p=(16,), n=(8,), d=(0, 8), r=2)


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,8") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def make_parser() -> Parser:
    parser = Parser(
        prog="pykern bench decode",
        description="Tokens per second, batch by batch, beside what the machine can read and multiply.",
        epilog="Lists are separated by commas: -b 1,8.",
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--model", metavar="FOLDER", help="a checkpoint folder (default: GPT-2 124M, random)")
    parser.add_argument("-p", "--n-prompt", type=whole_numbers, metavar="LIST", help="tokens to read; 0: none (512)")
    parser.add_argument("-n", "--n-gen", type=whole_numbers, metavar="LIST", help="tokens to generate; 0: none (128)")
    parser.add_argument("-d", "--n-depth", type=whole_numbers, metavar="LIST", help="tokens in the cache before (0)")
    parser.add_argument("-b", "--batch", type=whole_numbers, metavar="LIST", default=(1,), help="texts at a time (1)")
    parser.add_argument("-t", "--threads", type=whole_numbers, metavar="LIST", help="CPU threads (torch's)")
    parser.add_argument("-r", "--repetitions", type=int, metavar="N", help="timed runs of a test (5)")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="what is printed (md)")
    parser.add_argument("--dtype", type=names, metavar="LIST", help="float32,bfloat16,int8,int4 (all four)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short texts: does it run?")
    return parser


def make_plan(options: argparse.Namespace) -> "Plan":
    import pykern
    from pykern.lm.bench import Plan
    from pykern.lm.session import DTYPES

    default: dict[str, Any] = QUICK if options.quick else FULL
    return Plan(
        prompts=options.n_prompt or default["p"],
        new=options.n_gen or default["n"],
        depths=options.n_depth or default["d"],
        batches=options.batch,
        threads=options.threads or (pykern.get_num_threads(),),
        dtypes=options.dtype or DTYPES,
        repetitions=default["r"] if options.repetitions is None else options.repetitions,
    )


def table_line(cells: dict[str, str]) -> str:
    aligned = (cell.ljust(WIDTHS[name]) if name in LEFT else cell.rjust(WIDTHS[name]) for name, cell in cells.items())
    return f"| {' | '.join(aligned)} |"


def head() -> str:
    rule = ("-" * (WIDTHS[name] + 1) + ("-" if name in LEFT else ":") for name in COLUMNS)
    return f"{table_line({name: name for name in COLUMNS})}\n|{'|'.join(rule)}|"


def cells(result: "Result") -> dict[str, str]:
    return {
        "model": result.model,
        "size": f"{result.model_size / 2**20:.2f} MiB",
        "threads": str(result.n_threads),
        "batch": str(result.batch),
        "dtype": result.dtype,
        "test": result.test,
        "t/s": f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}",
        "GB/s": f"{result.gb_per_s:.1f}",
        "roof": f"{100 * result.roof:.0f}%",
    }


def roof_line(roof: "Roof") -> str:
    size, rate = max(roof.read.items())
    rates = ", ".join(f"{flops / 1e9:.0f} in {dtype}" for dtype, flops in roof.flops.items())
    threads = f"{roof.threads} thread{'s' if roof.threads > 1 else ''}"
    return f"roof of {threads}: {rate / 1e9:.1f} GB/s read from {size >> 20} MiB, GFLOP/s {rates}"


def bench_decode(argv: list[str]) -> int:
    """Runs the command line; a refusal is a ValueError or OSError, and nothing has been printed by then."""
    options = make_parser().parse_args(argv)
    import torch

    import pykern
    from pykern import _C
    from pykern.lm import bench
    from pykern.lm.checkpoint import load_checkpoint
    from pykern.lm.model import Transformer, expected_tensors

    plan = make_plan(options)
    if options.model is None:
        name, config = bench.TINY if options.quick else bench.GPT2
        plan.check(config.block_size)
        torch.manual_seed(0)
        model = Transformer(config)
    else:
        loaded = load_checkpoint(options.model, expected=expected_tensors, training=False)
        name, model = Path(options.model).resolve().name, Transformer.from_checkpoint(loaded)
        plan.check(model.config.block_size)
    before = torch.get_num_threads()
    try:
        roofs = bench.measure_roofs(plan.threads, options.quick)
        found = bench.run(name, model, plan, roofs)
        if options.output == "json":
            facts = {"isa": _C.isa(), "pykern": pykern.__version__, "torch": torch.__version__}
            facts |= {"python": platform.python_version(), "quick": options.quick}
            document = {"machine": facts, "roof": [asdict(roof) for roof in roofs.values()]}
            print(json.dumps(document | {"results": [asdict(result) for result in found]}, indent=1))
            return 0
        print(head(), flush=True)
        for result in found:
            print(table_line(cells(result)), flush=True)
        print("\n" + "\n".join(roof_line(roof) for roof in roofs.values()))
        return 0
    finally:
        torch.set_num_threads(before)
        pykern.set_num_threads(0)
