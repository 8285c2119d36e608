"""pykern evaluate --task icl: in-context accuracy over the number of shots, beside fine-tuning on the same examples."""

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pykern.cli.compare import NAMES as COMPARE_NAMES
from pykern.cli.parts import add_flag, flag, given, load_model, plot_path, set_threads

if TYPE_CHECKING:
    from pykern.lm.icl import ShotsResult

OPTIONS = {  # (type, help)
    "shots": (str, "numbers of examples in the prompt (default 0,1,2,4,8)"),
    "episodes": (int, "tasks for each number of shots (default 1000; 100 with --compare finetune)"),
    "out": (str, "without --model: the folder in which a model is trained first (4000 --steps)"),
}
SHARED = ("steps", "seed", "plot")  # options of --compare models that --task icl has too
EPISODES, EPISODES_COMPARED = 1000, 100


def add_icl_options(parser: Any) -> None:
    """What `evaluate --task icl` takes; absent from the parsed arguments unless given."""
    group = parser.add_argument_group("--task icl: a mapping shown by examples (takes --steps, --seed, --plot too)")
    group.add_argument(
        "--task", choices=("icl",), default=argparse.SUPPRESS, help="icl: in-context learning; --compare finetune"
    )
    for name, (kind, text) in OPTIONS.items():
        add_flag(group, name, kind, text)


def refuse_without_task(arguments: argparse.Namespace) -> None:
    """ValueError when an option of --task icl was given without it."""
    for name in given(arguments, list(OPTIONS)):
        raise ValueError(f"{flag(name)} goes with --task icl only")
    if arguments.compare == "finetune":
        raise ValueError("--compare finetune goes with --task icl only")


def parsed_shots(text: str) -> list[int]:
    """The numbers of "0,1,2"; ValueError for anything but digits and commas."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) <= 6 for part in parts):
        raise ValueError(f"--shots is {text[:40]!r} but must be whole numbers with commas between, such as 0,1,2,4,8")
    return [int(part) for part in parts]


def short(value: float) -> str:
    """Three digits, without an exponent: 0.00123, 4.57, 1,230; "-" for nothing."""
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.3g}'):g}"


def break_even(fine_tuned: "ShotsResult", in_context: "ShotsResult") -> str:
    """From how many queries of one task on fine-tuning takes fewer FLOPs than reading the examples every time."""
    saved = in_context.flops_query - fine_tuned.flops_query
    return f"{fine_tuned.flops_task // saved + 1:,}" if fine_tuned.flops_task and saved > 0 else "-"


def table(results: "list[ShotsResult]") -> str:
    """Rows by number of shots; ms and MFLOP are for a task, once, and for each query of it."""
    head = ["shots", "method", "accuracy", "95 % interval", "best possible", "ms/task", "ms/query"]
    head += ["MFLOP/task", "MFLOP/query", "cheaper from queries"]
    in_context = {row.shots: row for row in results if row.method == "in context"}
    rows = [head] + [
        [
            str(row.shots),
            row.method,
            f"{row.accuracy:.1%}",
            f"{row.low:.1%} to {row.high:.1%}",
            f"{row.optimal:.2%}",
            short(1e3 * row.seconds_task),
            short(1e3 * row.seconds_query),
            short(row.flops_task / 1e6),
            short(row.flops_query / 1e6),
            break_even(row, in_context[row.shots]),
        ]
        for row in sorted(results, key=lambda row: row.shots)
    ]
    if len(in_context) == len(results):
        kept = [0, 2, 3, 4, 6, 8]
        rows = [[row[i] for i in kept] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def checked_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """shots, episodes, seed, plot, steps and out, everything checked that can be before a model is there."""
    from pykern.lm.icl import EXAMPLES, SHOTS, checked_shots
    from pykern.lm.icl import OPTIONS as RECIPE
    from pykern.lm.icl_tasks import check_whole

    for name in given(arguments, [name for name in COMPARE_NAMES if name not in SHARED]):
        raise ValueError(f"{flag(name)} does not go with --task icl")
    if arguments.data is not None or arguments.baseline:
        raise ValueError(f"--{'baseline' if arguments.data is None else 'data'} does not go with --task icl")
    if arguments.compare not in (None, "finetune"):
        raise ValueError(f"--compare is {arguments.compare!r} but must be finetune with --task icl")
    shots = parsed_shots(arguments.shots) if hasattr(arguments, "shots") else list(SHOTS)
    episodes = getattr(arguments, "episodes", EPISODES if arguments.compare is None else EPISODES_COMPARED)
    seed = getattr(arguments, "seed", 0)
    check_whole("evaluate", "--episodes", episodes, 1, 10**6)
    check_whole("evaluate", "--seed", seed, 0, 2**63 - 1)
    check_whole("evaluate", "--batch-size", arguments.batch_size, 1)
    out = getattr(arguments, "out", None)
    if (arguments.model is None) == (out is None):
        given_both = "not both" if out is not None else "or --out, where a model is trained first"
        raise ValueError(f"--task icl needs --model, {given_both}")
    if out is None and hasattr(arguments, "steps"):
        raise ValueError("--steps does not go with --model: it is not trained")
    if out is not None:
        checked_shots("evaluate", shots, 2 * EXAMPLES)
    path = plot_path(arguments.plot) if hasattr(arguments, "plot") else None
    recipe = replace(RECIPE, seed=seed, steps=getattr(arguments, "steps", RECIPE.steps))
    return {"shots": shots, "episodes": episodes, "seed": seed, "plot": path, "out": out, "recipe": recipe}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def icl(arguments: argparse.Namespace) -> int:
    options = checked_options(arguments)
    set_threads(arguments.threads)
    from pykern.lm.icl import evaluate_icl, train_icl
    from pykern.lm.icl_finetune import finetune
    from pykern.lm.icl_tasks import MappingTasks

    tasks, training = MappingTasks(), None
    if arguments.model is not None:
        model, tokenizer = load_model(arguments.model)
    else:
        say(f"no --model: training one on mapping tasks, into {options['out']}")
        start = time.perf_counter()
        model, tokenizer = train_icl(options["out"], options=options["recipe"], tasks=tasks, report=say)
        training = time.perf_counter() - start
        say(f"checkpoint: {options['out']}")
    drawn = {name: options[name] for name in ("shots", "episodes", "seed")}
    compared = arguments.compare is not None
    # both methods one query at a time, so that their times compare
    batch_size = 1 if compared else arguments.batch_size
    results = evaluate_icl(model, tokenizer, batch_size=batch_size, tasks=tasks, **drawn)
    if compared:
        results += finetune(model, tokenizer, tasks=tasks, report=say, **drawn)
    title = f"{tasks.used} of {len(tasks.keys)} keys to {len(tasks.labels)} labels, {tasks.count:,} tasks"
    if options["plot"] is not None:
        from pykern.lm.icl_plot import plot_shots

        plot_shots(results, options["plot"], chance=float(tasks.chance), title=title)
    if arguments.json:
        values = {"chance": float(tasks.chance), "tasks": tasks.count, "training_seconds": training}
        print(json.dumps(values | {"rows": [row.to_dict() for row in results]}))
        return 0
    print(table(results))
    print(f"\n{title}; chance {float(tasks.chance):.0%}; {options['episodes']} tasks for each number of shots")
    if options["plot"] is not None:
        print(f"curves: {options['plot']}")
    return 0
