"""Times the cases by priority, within a budget, and goes on where an earlier run stopped."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import FORWARD, OURS, SUSPICIOUS, Case, Source, calls, difference, short
from benchmarks.gpu.document import Document, Row
from benchmarks.gpu.makers import forget_compiled, setup_seconds
from benchmarks.gpu.timer import DeviceLost, Prepared, Timer, interleave, one_line, quartiles, speed_ratio

SECONDS = 0.3  # of samples for each contestant
MOST_SETS = 32
INPUTS, SAMPLES = "inputs", "samples of all"  # what fails where it is no contestant
MATMULS = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32"}


@dataclass
class Budget:
    """Minutes of which the cases may use what is left; an estimate is scaled by what the cases so far have taken."""

    timer: Timer
    seconds: float
    estimated: float = 0.0
    taken: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.timer.now()

    def left(self) -> float:
        return self.seconds - (self.timer.now() - self.started)

    def fits(self, estimate: float) -> bool:
        scale = self.taken / self.estimated if self.estimated else 1.0
        return estimate * scale <= self.left()


def estimate(case: Case, whos: list[str], seconds: float = SECONDS) -> float:
    """Seconds that a case with these contestants takes."""
    return case.extra_seconds + sum(seconds + setup_seconds(who) for who in whos)


def in_order(cases: list[Case]) -> list[Case]:
    """By priority, and the quick ones first."""
    return sorted(cases, key=lambda case: (case.priority, estimate(case, list(case.makers))))


def least_seconds(case: Case, ceilings: dict[str, Any]) -> tuple[float | None, str]:
    """The least time by the ceilings of this GPU, and the name of the ceiling that decides; None: not measured."""
    times = {}
    for name, amount in ((case.traffic, case.moved), (MATMULS[short(case.dtype)], case.flops)):
        if amount:
            if name not in ceilings:
                return None, name
            times[name] = amount / ceilings[name]["rate"]
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def input_sets(case: Case, timer: Timer, device: torch.device) -> list[tuple]:
    """So many sets of inputs that the oldest has left the cache when its turn comes again."""
    count = 1 if case.one_set else min(MOST_SETS, max(1, -int(-timer.cold_bytes // case.moved)))
    return [case.inputs(Source(device, seed, case.mode != FORWARD)) for seed in range(count)]


def kept(result: object) -> object:
    """A copy that a later call does not write to."""
    if isinstance(result, Tensor):
        return result.detach().clone()
    return [x.detach().clone() for x in result if isinstance(x, Tensor)]


def record(document: Document, timer: Timer, case: Case, who: str, error: Exception) -> None:
    """Writes down why a contestant has no time. DeviceLost, after that, when the process cannot go on."""
    lost = error if isinstance(error, DeviceLost) else None
    if lost is None:
        try:
            timer.check()
        except DeviceLost as found:
            lost = found
    document.fail(case.key, who, one_line(error), fatal=lost is not None)
    if lost is not None:
        raise lost


def measure(
    case: Case, whos: list[str], document: Document, timer: Timer, device: torch.device, seconds: float = SECONDS
) -> list[Row]:
    """The rows of a case. What fails is recorded as a failure of its contestant, and the others go on.

    DeviceLost, after recording it, when the process cannot go on.
    """
    document.start(case, INPUTS)
    forget_compiled(whos)
    prepared: dict[str, Prepared] = {}
    peaks: dict[str, int] = {}
    differences: dict[str, float | None] = {}
    expected: object = None
    with timer.context():
        sets = input_sets(case, timer, device)
        for who in whos:
            document.start(case, who)
            try:
                thunks = calls(case.mode, case.makers[who](), sets)
                result = kept(thunks[0]())
                timer.check()
                expected = result if expected is None else expected
                differences[who] = None if result is expected else difference(result, expected)
                del result
                peaks[who] = timer.peak(thunks[0])
                prepared[who] = timer.prepare(who, thunks)
            except Exception as error:  # noqa: BLE001 - whatever a library raises: recorded, and the others go on
                record(document, timer, case, who, error)
        expected = None
        if not prepared:
            return []
        document.start(case, SAMPLES)
        samples = interleave(timer, prepared, seconds)
    return _rows(case, document, prepared, samples, peaks, differences)


def _rows(case, document, prepared, samples, peaks, differences) -> list[Row]:
    least, bound = least_seconds(case, document.ceilings.get(document.gpu, {}))
    medians = {who: quartiles(s)[1] for who, s in samples.items()}
    right = [who for who in medians if who != OURS and (differences[who] or 0.0) <= SUSPICIOUS]
    best = min(right, key=lambda who: medians[who], default=None)
    rows = []
    for who, one in prepared.items():
        low, median, high = quartiles(samples[who])
        rows.append(
            Row(
                case=case.key,
                goal=case.goal,
                priority=case.priority,
                contestant=who,
                dtype=short(case.dtype),
                shape=case.shape,
                what=f"{case.name}, {case.mode}",
                gpu=document.gpu,
                run=len(document.runs) - 1,
                mode=one.mode,
                note=one.note,
                median_us=median * 1e6,
                low_us=low * 1e6,
                high_us=high * 1e6,
                samples=len(samples[who]),
                bytes=case.moved,
                flops=case.flops,
                bound=bound,
                ceiling=None if least is None else least / median,
                ratio=None if best is None else speed_ratio(samples[who], samples[best]),
                difference=differences[who],
                peak_bytes=peaks[who],
            )
        )
    return rows


def run_cases(
    cases: list[Case],
    document: Document,
    timer: Timer,
    device: torch.device,
    budget: Budget,
    kernels: list[str],
    seconds: float = SECONDS,
) -> None:
    """Times what is not finished, by priority. A case that would not fit is left, smaller ones behind it may still run.

    The names of those left are in document.run["left"].
    """
    document.run["left"] = []
    for case in in_order(cases):
        missing = [name for name in case.kernels if name not in kernels]
        with_ours = OURS in case.makers and not missing
        if document.is_finished(case, with_ours):
            continue
        dead = document.fatal(case)
        whos = [who for who in (*case.rivals(), *([OURS] if with_ours else [])) if who not in dead]
        cost = estimate(case, whos, seconds)
        if not budget.fits(cost):
            document.run["left"].append(case.key)
            continue
        if dead & {INPUTS, SAMPLES}:
            document.finish(case, [], with_ours, missing)
            continue
        before = timer.now()
        try:
            rows = measure(case, whos, document, timer, device, seconds)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - of the inputs, or of a sample: this case has no rows
            record(document, timer, case, (document.running or {}).get("contestant", INPUTS), error)
            rows = []
        document.finish(case, rows, with_ours, missing)
        budget.estimated += cost
        budget.taken += timer.now() - before
        if device.type == "cuda":
            torch.cuda.empty_cache()
    document.save()
