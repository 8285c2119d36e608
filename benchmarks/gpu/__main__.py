"""Everything that a GPU can tell about pykern, in one command.

    python -m benchmarks.gpu --json gpu.json                  # 8 minutes: build, tests, ceilings, timing by priority
    python -m benchmarks.gpu --json gpu.json                  # again, or with --minutes 3: goes on with what is left
    python -m benchmarks.gpu --json gpu.json --steps timing --only G11 --again
    python -m benchmarks.gpu --list                           # the cases by priority
    python -m benchmarks.gpu --rehearse --json rehearsal.json # no GPU: tiny shapes, a clock that makes up its times

The build needs cmake, ninja, pybind11 and nvcc; where these packages are missing and no index can be reached, bring
them in a folder, downloaded for the Python there, and install them first:

    python3 -m pip download --only-binary=:all: --dest wheels cmake ninja pybind11 pytest hypothesis numpy   # elsewhere
    python3 -m pip install --no-index --find-links wheels cmake ninja pybind11 pytest hypothesis             # there

JSON and a Markdown table of the same name are written after every case; what fails is in both. Nothing is uploaded.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import (
    cases_attention,
    cases_decode,
    cases_matmul,
    cases_memory,
    cases_models,
    cases_training,
    ceilings,
    machine,
    makers,
    steps,
    table,
)
from benchmarks.gpu.case import Case
from benchmarks.gpu.document import Document
from benchmarks.gpu.run import Budget, estimate, in_order, run_cases
from benchmarks.gpu.timer import CudaTimer, DeviceLost, FakeTimer, Timer

NEW = (cases_attention, cases_decode, cases_models)  # never timed with pykern's kernels: before the rest
MODULES = (*NEW, cases_memory, cases_training, cases_matmul)
BEHIND = 3  # what is added to the priorities of the rest
STEPS = ("build", "tests", "sanitizer", "ceilings", "timing")
LIMITS = {"build": 240.0, "tests": 120.0, "sanitizer": 75.0}  # seconds; ceilings and timing have the rest
BUILD = "make inplace PYTHON={python} ISAS=v3"  # one ISA of the CPU kernels: they are not what is measured
REHEARSAL_SECONDS = 0.1


def all_cases(tiny: bool) -> list[Case]:
    """In the order in which they run."""
    found = [(case, 0 if module in NEW else BEHIND) for module in MODULES for case in module.cases(tiny)]
    return in_order([replace(case, priority=case.priority + behind) for case, behind in found])


def chosen(cases: list[Case], only: list[str]) -> list[Case]:
    """Those of these goals, or with these words in their names. ValueError: there are none."""
    found = [c for c in cases if not only or any(word == c.goal or word in c.key for word in only)]
    if not found:
        raise ValueError(f"no case is of a goal or has a name with {', '.join(only)}; see --list")
    return found


def limit(text: str) -> tuple[str, float]:
    step, _, seconds = text.partition("=")
    if step not in LIMITS or not seconds.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not STEP=SECONDS with a step of {', '.join(LIMITS)}")
    return step, float(seconds)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; a file of an earlier call is gone on with")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together (default: %(default)g)")
    parser.add_argument("--steps", default=",".join(STEPS), help="of these, separated by commas (default: all)")
    parser.add_argument(
        "--limit",
        action="append",
        type=limit,
        default=[],
        metavar="STEP=SECONDS",
        help=f"for one step (default: {', '.join(f'{k}={v:g}' for k, v in LIMITS.items())})",
    )
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="a goal, or a part of a name")
    parser.add_argument("--again", action="store_true", help="time the chosen cases although the file has them")
    parser.add_argument("--build-command", default=BUILD, help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, on a clock that makes up its times")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # minutes: the process that times
    options = parser.parse_args(argv)
    options.steps = options.steps.split(",")
    unknown = [step for step in options.steps if step not in STEPS]
    if unknown:
        parser.error(f"--steps: {', '.join(unknown)} is not one of {', '.join(STEPS)}")
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes is {options.minutes:g}, expected a number above 0, up to 600")
    if options.json is None and not options.list:
        parser.error("--json FILE is needed: results are written there")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if not (options.list or options.rehearse or torch.cuda.is_available()):
        parser.error("torch sees no NVIDIA GPU here; --rehearse runs without one")
    return options


def worker(options: argparse.Namespace, timer: Timer, device: torch.device) -> None:
    """Ceilings and timing, in this process. DeviceLost: recorded, and another process can go on."""
    document = Document.load(options.json)
    budget = Budget(timer, 60 * options.worker)
    cases = chosen(all_cases(options.rehearse), options.only)
    if options.rehearse:
        makers.BACKEND = "eager"
        kernels, note = sorted({name for case in cases for name in case.kernels}), "a rehearsal: kernels of the CPU"
    else:
        kernels, note = machine.cuda_kernels()
    document.run.update({"kernels": kernels, "kernels note": note})
    document.save()
    if "ceilings" in options.steps and document.gpu not in document.run.setdefault("ceilings", []):
        document.ceilings[document.gpu] = ceilings.measure(timer, device, options.rehearse)
        document.run["ceilings"].append(document.gpu)
        document.save()
    if "timing" in options.steps:
        run_cases(cases, document, timer, device, budget, kernels)


def run_worker(options: argparse.Namespace) -> int:
    if options.rehearse:
        worker(options, FakeTimer(setup=REHEARSAL_SECONDS), torch.device("cpu"))
        return 0
    device = torch.device("cuda")
    try:
        worker(options, CudaTimer(device), device)
    except DeviceLost as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return steps.LOST
    return 0


def say(step: str, found: dict[str, Any]) -> None:
    print(f"{step}: " + ", ".join(f"{k} {v}" for k, v in found.items() if k != "tail"), flush=True)
    if found.get("exit", 0) != 0 and "tail" in found:
        print(found["tail"], flush=True)


def run_steps(options: argparse.Namespace, document: Document) -> None:
    """The steps in their order, each within its limit and what is left; results in document.run["steps"]."""
    start = time.monotonic()
    limits = LIMITS | dict(options.limit)
    path: Path = options.json.resolve()

    def left() -> float:
        return 60 * options.minutes - (time.monotonic() - start)

    actions = {
        "build": lambda seconds, log: steps.build(seconds, log, options.build_command.format(python=sys.executable)),
        "tests": steps.correctness,
        "sanitizer": steps.sanitizer,
    }
    for step, action in actions.items():
        if step not in options.steps:
            continue
        seconds = min(limits[step], left())
        found = action(seconds, path.with_suffix(f".{step}.log")) if seconds > 1 else {"exit": "no time was left"}
        document.run["steps"][step] = found
        document.save()
        say(step, found)
    if {"ceilings", "timing"} & set(options.steps):
        words = [sys.executable, "-m", "benchmarks.gpu", f"--steps={','.join(options.steps)}"]
        words += [*(f"--only={word}" for word in options.only), *(["--rehearse"] if options.rehearse else [])]
        found = steps.timing(path, words, max(0.0, left()) / 60)
        document.__dict__.update(Document.load(document.path).__dict__)
        document.run["steps"]["timing"] = found
        say("timing", found)
    document.save()


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        cases = chosen(all_cases(options.rehearse), options.only)
        document = Document(Path()) if options.list else Document.load(options.json)
    except ValueError as error:
        print(f"python -m benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    if options.list:
        for case in cases:
            print(f"{case.priority} {case.goal:<6} {case.key}: {', '.join(case.makers)}")
        print(f"{len(cases)} cases, about {sum(estimate(case, list(case.makers)) for case in cases) / 60:.0f} minutes")
        return 0
    if options.worker is not None:
        return run_worker(options)
    device = torch.device("cpu" if options.rehearse else "cuda")
    facts = machine.facts(device)
    document.gpu = facts["gpu"]
    document.runs.append({"machine": facts, "minutes": options.minutes, "rehearsal": options.rehearse, "steps": {}})
    if options.again:
        document.forget(cases)
    document.save()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    run_steps(options, document)
    text = table.markdown(document)
    options.json.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.json} and {options.json.with_suffix('.md')}")
    ends = [step["exit"] for name, step in document.run["steps"].items() if name != "sanitizer"]
    return 0 if all(end == 0 for end in ends) else 1


if __name__ == "__main__":
    raise SystemExit(main())
