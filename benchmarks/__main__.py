"""python -m benchmarks [--only NAME] [--case TEXT] [--dtype NAME] [--threads N] [--quick] [--json FILE], and more"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

import pykern
from benchmarks import report, rivals_decode, roofline

BENCHES = ("attention", "linear", "mlp", "norm", "cross_entropy", "adamw", "decode", "train")
DTYPES = tuple(roofline.short(dtype) for dtype in roofline.DTYPES)
SECONDS, QUICK_SECONDS = 2.0, 0.01  # for each contestant of a case
BUSY = 0.5  # load average above which a warning is printed


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__import__("benchmarks").__doc__)
    parser.add_argument(
        "--only", action="append", choices=("roofline", *BENCHES), help="this part only; may be repeated"
    )
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases named so; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only cases of this dtype; may be repeated")
    parser.add_argument(
        "--threads", type=int, default=pykern.get_num_threads(), help="of torch and pykern (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few samples: does everything run?")
    parser.add_argument(
        "--compile-all", action="store_true", help="torch.compile in every training step, also the long and quick ones"
    )
    parser.add_argument("--seconds", type=float, help=f"for each contestant of a case (default: {SECONDS:g})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here as well")
    options = parser.parse_args(argv)
    if not 1 <= options.threads <= 1024:
        parser.error(f"--threads is {options.threads}, expected 1..1024")
    if options.seconds is not None and not 0 < options.seconds < 3600:
        parser.error(f"--seconds is {options.seconds}, expected a number between 0 and 3600")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    return options


def wanted(case: report.Case, options: argparse.Namespace) -> bool:
    """Whether a case is one that --case and --dtype leave."""
    named = options.case is None or any(text in case.name for text in options.case)
    return named and (options.dtype is None or roofline.short(case.dtype) in options.dtype)


def measure_roofs(options: argparse.Namespace) -> list[roofline.Roof]:
    """The roof at one thread and at --threads, the latter last. A single other part needs only its own thread count."""
    counts = {1, options.threads} if not options.only or "roofline" in options.only else {options.threads}
    return [roofline.measure(n, options.quick) for n in sorted(counts)]


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(options.threads)
    pykern.set_num_threads(options.threads)
    facts = report.machine()
    if not options.only or "decode" in options.only:
        facts |= {name: version for name, version in rivals_decode.versions().items() if version}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if float(str(facts["load before"])) > BUSY:
        print("warning: other programs are running; ratios are better than times, and neither is worth publishing")
    if options.quick:
        print("--quick: small shapes and few samples; nothing here is a measurement")
    roofs = measure_roofs(options)
    print("\n" + roofline.tables(roofs))
    rows: list[report.Row] = []
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    for bench in BENCHES:
        if options.only and bench not in options.only:
            continue
        module = importlib.import_module(f"benchmarks.bench_{bench}")
        print(f"\n{bench}: {module.__doc__.splitlines()[0]}")
        for note in getattr(module, "notes", list)():
            print(note)
        print(report.HEAD)
        choices = {"compile_all": options.compile_all} if bench == "train" else {}
        for case in module.cases(options.quick, **choices):
            if not wanted(case, options):
                continue
            found = report.run(bench, case, roofs[-1], seconds)
            rows += found
            for i, row in enumerate(found):
                print(report.line(row, first=i == 0), flush=True)
            if options.json is not None:
                report.write_json(options.json, facts, roofs, rows)
    if options.json is not None:
        report.write_json(options.json, facts, roofs, rows)
        print(f"\n{len(rows)} rows written to {options.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
