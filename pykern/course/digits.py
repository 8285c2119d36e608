"""Does layer-wise pre-training help on the digits? One network from several starts, and a small CNN, over seeds.

Data: scikit-learn's bundled digits, 1797 images of 8 x 8 pixels with 17 grey levels. Each seed draws 1200 images to
train on, 597 to test on, and the first weights. The networks of one seed share them: errors are compared in pairs.
"""

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pykern.tape.autoencoder import Classifier, fit, pretrain_autoencoders, pretrain_supervised

TRAIN = 1200  # images; the other 597 are the test set
CLASSES = 10
RANDOM = "random start"
LONGER = "random start, longer"
AUTOENCODER = "autoencoders"
SUPERVISED = "supervised layers"
CNN = "CNN"
METHODS = (RANDOM, LONGER, AUTOENCODER, SUPERVISED, CNN)


def whole(op: str, argument: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {argument} is {value!r}, expected a whole number")
    if not least <= value <= most:
        raise ValueError(f"{op}: {argument} is {value}, expected {least} .. {most}")


@dataclass(frozen=True)
class Settings:
    """What compare() runs. labels: how many of the training images have a label in each setting.

    pretrain_steps are those of each hidden layer, finetune_steps those of the whole network; "random start, longer"
    gets the sum, as many steps as the pre-trained networks get in all.
    """

    seeds: int = 5
    labels: tuple[int, ...] = (100, TRAIN)
    hidden: tuple[int, ...] = (64, 32)
    activation: str = "sigmoid"
    pretrain_steps: int = 150
    finetune_steps: int = 300
    batch_size: int = 50
    lr: float = 0.01

    def __post_init__(self) -> None:
        bounds = {"seeds": (2, 1000), "batch_size": (1, TRAIN)}
        bounds |= dict.fromkeys(("pretrain_steps", "finetune_steps"), (0, 10**6))
        for field, (least, most) in bounds.items():
            whole("Settings", field, getattr(self, field), least, most)
        if not self.labels:
            raise ValueError("Settings: labels is empty, expected one or more numbers of labelled images")
        for n in self.labels:
            whole("Settings", "labels", n, CLASSES, TRAIN)
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"Settings: labels is {self.labels}, expected different numbers")

    @property
    def all_steps(self) -> int:
        return self.finetune_steps + len(self.hidden) * self.pretrain_steps


QUICK = Settings(seeds=2, pretrain_steps=20, finetune_steps=60)


class Interval(NamedTuple):
    """A mean and the half width of its 95 % confidence interval."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}"


@dataclass(frozen=True)
class Result:
    """errors: percent of the test images that were classified wrongly, one per seed, for `labels` labelled images."""

    method: str
    labels: int
    errors: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        return confidence_interval(self.errors)

    def against(self, other: "Result") -> Interval:
        """The errors less those of another method, seed by seed: negative where this one is better."""
        return confidence_interval([a - b for a, b in zip(self.errors, other.errors, strict=True)])


class Images(NamedTuple):
    """Pixels [N, 64] in 0 .. 1, float64, and labels [N], int64."""

    x: np.ndarray
    labels: np.ndarray

    def rows(self, rows: np.ndarray) -> "Images":
        return Images(self.x[rows], self.labels[rows])


def confidence_interval(values: Sequence[float]) -> Interval:
    """mean ± t s / sqrt(n), with the 97.5 % point t of Student's distribution of n - 1 degrees of freedom.

    s is the standard deviation with n - 1 in its denominator. ValueError for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"confidence_interval: got {n} values, expected two or more")
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError("the confidence intervals need scipy: pip install 'pykern[course]'") from error
    return Interval(float(np.mean(values)), float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n))


def load_images() -> Images:
    """All 1797 digits. ImportError, naming the extra, when scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits are bundled with scikit-learn: pip install 'pykern[course]'") from error
    x, labels = load_digits(return_X_y=True)
    return Images(x / 16, labels.astype(np.int64))


def split(images: Images, rng: np.random.Generator) -> tuple[Images, Images]:
    """(training, test) images in random order; the first n training images hold each class equally often, or nearly."""
    order = rng.permutation(len(images.x))
    train, test = order[:TRAIN], order[TRAIN:]
    classes = images.labels[train]
    rank = np.empty(TRAIN, np.int64)  # how many images of the same class come before
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        rank[members] = np.arange(len(members))
    return images.rows(train[np.argsort(rank, kind="stable")]), images.rows(test)


def percent_error(predicted: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(predicted != labels))


def one_seed(images: Images, settings: Settings, seed: int) -> dict[tuple[int, str], float]:
    """The percent test error of each (labels, method) for the split and the first weights of one seed."""
    from pykern.course.cnn import predict, train_cnn

    train, test = split(images, np.random.default_rng(seed))
    sizes = (train.x.shape[1], *settings.hidden, CLASSES)
    options: dict[str, Any] = dict(batch_size=settings.batch_size, lr=settings.lr)
    start = Classifier(sizes, activation=settings.activation, rng=seed)
    encoded = copy.deepcopy(start)
    pretrain_autoencoders(encoded, train.x, steps=settings.pretrain_steps, rng=seed, **options)

    errors = {}
    for n in settings.labels:
        x, labels = train.x[:n], train.labels[:n]
        supervised = copy.deepcopy(start)
        pretrain_supervised(supervised, x, labels, steps=settings.pretrain_steps, rng=seed, **options)
        starts = {
            RANDOM: (start, settings.finetune_steps),
            LONGER: (start, settings.all_steps),
            AUTOENCODER: (encoded, settings.finetune_steps),
            SUPERVISED: (supervised, settings.finetune_steps),
        }
        for method, (network, steps) in starts.items():
            tuned = copy.deepcopy(network)
            fit(tuned, x, labels, steps=steps, rng=seed, **options)
            errors[n, method] = percent_error(tuned.predict(test.x), test.labels)
        cnn = train_cnn(x, labels, steps=settings.finetune_steps, seed=seed, **options)
        errors[n, CNN] = percent_error(predict(cnn, test.x), test.labels)
    return errors


def compare(
    settings: Settings | None = None, *, each_seed: Callable[[int], object] = lambda seed: None
) -> list[Result]:
    """The errors of every method in METHODS for every number of labels, seeds 0 .. settings.seeds - 1.

    The same settings give the same errors. The matrices are small, so torch's thread count, which the kernels follow,
    is 1 meanwhile. each_seed(seed) is called after each seed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("the CNN needs torch: pip install 'pykern[torch]'") from error
    settings, images = settings or Settings(), load_images()
    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in range(settings.seeds):
            found.append(one_seed(images, settings, seed))
            each_seed(seed)
    finally:
        torch.set_num_threads(threads)
    return [
        Result(method, n, tuple(errors[n, method] for errors in found)) for n in settings.labels for method in METHODS
    ]


def verdict(difference: Interval) -> str:
    """What the difference to another network says about the error."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "lower" if difference.mean < 0 else "higher"


def differences(results: Sequence[Result], result: Result) -> dict[str, Interval]:
    """result less each random start, short and longer, that is not itself: with as many labels, seed by seed."""
    starts = [r for r in results if r.labels == result.labels and r.method in (RANDOM, LONGER)]
    return {start.method: result.against(start) for start in starts if start.method != result.method}


def table(results: Sequence[Result]) -> str:
    """A Markdown table: percent test error with its 95 % interval, and what remains less that of each random start."""
    lines = [
        f"| labelled images | network | test error, % | less that of {RANDOM} | less that of {LONGER} |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        less = differences(results, result)
        cells = [str(result.labels), result.method, str(result.interval)]
        for start in (RANDOM, LONGER):
            d = less.get(start)
            cells.append("" if d is None else f"{d.mean:+.2f} ± {d.half:.2f}: {verdict(d)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """A PNG with a panel per number of labels: a dot per seed, the mean and its 95 % interval of each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pykern.lm.files import replace_file

    settings = list(dict.fromkeys(result.labels for result in results))
    figure = Figure(figsize=(1.8 + 4.6 * len(settings), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, n in zip(panels, settings, strict=True):
        rows = [result for result in results if result.labels == n]
        for y, result in enumerate(rows):
            colour = "tab:gray" if result.method in (RANDOM, LONGER) else f"C{y - 2}"
            axes.plot(result.errors, [y + 0.22] * len(result.errors), "o", color=colour, alpha=0.35, markersize=4)
            axes.errorbar(*[result.interval.mean], [y], xerr=result.interval.half, fmt="D", color=colour, capsize=4)
        axes.axvline(rows[0].interval.mean, color="tab:gray", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [result.method for result in rows])
        axes.set(title=f"{n} labelled images", xlabel="test error, %", xlim=(0, None), ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    seeds = len(results[0].errors)
    figure.suptitle(f"digits: mean of {seeds} seeds, 95 % confidence interval, a dot per seed")
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
