"""pykern digits: layer-wise pre-training on scikit-learn's digits against a random start, in percent test error."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def label_counts(text: str) -> tuple[int, ...]:
    """ "100,all" as (100, 1200)."""
    from pykern.course.digits import TRAIN

    try:
        return tuple(TRAIN if part.strip() == "all" else int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--labels is {text!r}, expected numbers or all, as in 100,all") from None


def add_digits(commands: Any) -> None:
    parser = commands.add_parser(
        "digits", help="layer-wise pre-training on 8 x 8 digits, test error over seeds", allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="splits and first weights, at least 2 (default 5)")
    parser.add_argument("--labels", metavar="N,N,...", help="labelled images of 1200, or all (default 100,all)")
    parser.add_argument("--plot", metavar="FILE", help="write the errors as a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quick", action="store_true", help="2 seeds, few steps: to see that it runs")
    parser.set_defaults(run=digits)


def digits(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from pykern.course.digits import QUICK, Settings, compare, differences, plot, table

    settings = QUICK if arguments.quick else Settings()
    if arguments.seeds is not None:
        settings = replace(settings, seeds=arguments.seeds)
    if arguments.labels is not None:
        settings = replace(settings, labels=label_counts(arguments.labels))
    if arguments.plot is not None:
        writable(arguments.plot)
    start = time.perf_counter()
    results = compare(
        settings, each_seed=lambda seed: print(f"seed {seed + 1} of {settings.seeds}", file=sys.stderr, flush=True)
    )
    seconds = time.perf_counter() - start
    if arguments.plot is not None:
        plot(results, arguments.plot)
    if not arguments.json:
        print(table(results))
        print(f"{seconds:.0f} s", file=sys.stderr)
        return 0
    rows: list[dict[str, Any]] = []
    for result in results:
        row = {"labels": result.labels, "network": result.method, "errors": result.errors}
        row |= {"mean": result.interval.mean, "half_width": result.interval.half}
        rows.append(row | {"less": {name: d._asdict() for name, d in differences(results, result).items()}})
    print(json.dumps({"settings": asdict(settings), "results": rows, "seconds": seconds}))
    return 0


def writable(path: str) -> None:
    """Refuse a plot that could not be written, before anything is computed."""
    file = Path(path)
    if not path or file.is_dir():
        raise IsADirectoryError(f"--plot is {path!r}, expected the name of a file")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--plot is {path!r}, but there is no folder {str(file.parent)!r}")
