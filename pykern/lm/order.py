"""Can attention tell the order of its inputs? x2 and x3 change places, and the outputs are compared with those before.

    y = softmax(x x^T) x        x [4, 2]: queries, keys and values are the inputs themselves, so it can be done by hand

Output t is a sum over a set of pairs (key, value) with x_t as the query. A sum does not know the order of its terms, so
without positions y2 and y3 change places too and y1, y4 stay: softmax(P x x^T P^T) P x = P y for every permutation P.
A causal mask takes the set from the order, and positions put the order into the terms.
"""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from pykern import ops
from pykern.lm import positions
from pykern.lm.config import POSITIONS
from pykern.lm.files import replace_file
from pykern.nn.positions import RelativePositionBias

INPUTS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -1.0))  # x1 .. x4
SWAP = (0, 2, 1, 3)
ROUNDING = 1e-12  # float64 sums of four terms differ by less when only their order does
# The numbers that a model would learn, chosen for the example: one vector per position, one slope, one bias per bucket.
LEARNED = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
SLOPE = 0.5


def bias_table(buckets: int) -> list[float]:
    return [math.cos(bucket) for bucket in range(buckets)]


def _attention(x: Tensor, kind: str, causal: bool) -> Tensor:
    """y [T, D] of one layer for x [T, D], the positions that act inside attention included."""
    T = len(x)
    q = k = v = x[None, None]
    slopes = bias = None
    if kind == "rope":
        q = k = ops.rope(q, *positions.rotary(0, T, x.shape[1], x))
    elif kind == "alibi":
        slopes = torch.tensor([SLOPE])
    elif kind == "t5":
        relative = RelativePositionBias(1, 32, 128, bidirectional=not causal, dtype=x.dtype)
        with torch.no_grad():
            relative.weight.copy_(torch.tensor(bias_table(32), dtype=x.dtype)[:, None])
            bias = relative(T)
    y = ops.attention(q, k, v, scale=1.0, causal=causal, alibi_slopes=slopes, bias=bias)
    assert isinstance(y, Tensor)  # and not a pair: no lse was asked for
    return y[0, 0]


def outputs(x: Tensor, kind: str, *, causal: bool = False, layers: int = 1) -> Tensor:
    """y [4, 2] for inputs x [4, 2] in this order, float64. A layer that is not the last adds its output to its input.

    kind is one of POSITIONS: "learned" and "sinusoidal" are added to x, the others act inside every layer.
    """
    if kind not in POSITIONS:
        raise ValueError(f"order: kind must be one of {', '.join(POSITIONS)}, got {kind!r}")
    if tuple(x.shape) != (len(INPUTS), len(INPUTS[0])):
        raise ValueError(f"order: x must be [4, 2], got {list(x.shape)}")
    if layers < 1:
        raise ValueError(f"order: layers must be at least 1, got {layers}")
    x = x.to(torch.float64)
    if kind == "learned":
        x = x + torch.tensor(LEARNED, dtype=x.dtype)
    if kind == "sinusoidal":
        x = x + positions.sinusoids(0, x.shape[0], x.shape[1], x)
    for _ in range(layers - 1):
        x = x + _attention(x, kind, causal)
    return _attention(x, kind, causal)


@dataclass(frozen=True)
class Swap:
    """before, after [4, 2]: outputs for x1 x2 x3 x4 and for x1 x3 x2 x4, each in the order of its inputs."""

    kind: str
    causal: bool
    layers: int
    before: Tensor
    after: Tensor

    @property
    def first_change(self) -> float:
        """max |difference| of the output of x1, which stayed where it was."""
        return float((self.after[0] - self.before[0]).abs().max())

    @property
    def last_change(self) -> float:
        """The same of x4: what a model predicts the next token from."""
        return float((self.after[-1] - self.before[-1]).abs().max())

    @property
    def swapped_change(self) -> float:
        """The same of x2 and x3, each output compared with that of the same token at its other place."""
        return float((self.after[list(SWAP)] - self.before)[1:3].abs().max())

    @property
    def tells_order(self) -> bool:
        """Whether any output differs from that of the same token before, by more than rounding."""
        return max(self.first_change, self.last_change, self.swapped_change) > ROUNDING


def swap(kind: str, *, causal: bool = False, layers: int = 1) -> Swap:
    """The example with one kind of positions."""
    x = torch.tensor(INPUTS, dtype=torch.float64)
    before, after = (outputs(y, kind, causal=causal, layers=layers) for y in (x, x[list(SWAP)]))
    return Swap(kind, causal, layers, before, after)


def table() -> list[Swap]:
    """Every kind without a mask, with the causal mask, and with the causal mask in two layers."""
    cases: tuple[tuple[bool, int], ...] = ((False, 1), (True, 1), (True, 2))
    kinds = ("none", *(kind for kind in POSITIONS if kind != "none"))
    return [swap(kind, causal=causal, layers=layers) for causal, layers in cases for kind in kinds]


def _number(x: float) -> str:
    return f"{0.0 if abs(x) <= ROUNDING else x:7.4f}"


def _vector(y: Tensor) -> str:
    return "(" + ", ".join(_number(n) for n in y.tolist()) + ")"


def _sum(order: tuple[int, ...]) -> list[str]:
    """The output of x4 term by term, with the keys in the given order."""
    query = INPUTS[3]
    scores = [sum(a * b for a, b in zip(query, INPUTS[i], strict=True)) for i in order]
    total = sum(math.exp(s) for s in scores)
    lines = [f"  {'key':>5} {'score':>7} {'e^score':>8} {'weight':>8}   weight * key"]
    sums = [0.0, 0.0]
    for i, score in zip(order, scores, strict=True):
        weight = math.exp(score) / total
        terms = [weight * n for n in INPUTS[i]]
        sums = [a + b for a, b in zip(sums, terms, strict=True)]
        shown = ", ".join(_number(n) for n in terms)
        lines.append(f"  {f'x{i + 1}':>5} {score:7.1f} {math.exp(score):8.4f} {weight:8.4f}   ({shown})")
    lines.append(f"  {'sum':>5} {'':7} {total:8.4f} {1:8.4f}   ({', '.join(_number(n) for n in sums)})")
    return lines


def worked() -> str:
    """The example in words and numbers: the sum behind y4 in both orders, all outputs, and the table of kinds."""
    named = "  ".join(f"x{i} = ({a:g}, {b:g})" for i, (a, b) in enumerate(INPUTS, 1))
    lines = [f"y = softmax(x x^T) x for {named}", ""]
    lines += ["y4, the output of x4, without positions and without a mask:", *_sum((0, 1, 2, 3)), ""]
    lines += ["and after x2 and x3 have changed places, the same terms in another order:", *_sum(SWAP), ""]
    plain, masked = swap("none"), swap("none", causal=True)
    lines.append(
        f"{'output of':>11} {'x1 x2 x3 x4':>19} {'x1 x3 x2 x4':>19}   causal: {'x1 x2 x3 x4':>11} {'x1 x3 x2 x4':>19}"
    )
    for i in range(4):
        now = SWAP[i]
        cells = [_vector(y) for y in (plain.before[i], plain.after[now], masked.before[i], masked.after[now])]
        lines.append(f"{f'x{i + 1}':>11} " + " ".join(f"{cell:>19}" for cell in cells))
    lines += ["", "largest change of the output of a token when x2 and x3 change places:"]
    lines.append(f"{'positions':>11} {'mask':>7} {'layers':>6} {'x1':>8} {'x2, x3':>8} {'x4':>8}   tells order")
    for case in table():
        mask, tells = "causal" if case.causal else "none", "yes" if case.tells_order else "no"
        changes = (case.first_change, case.swapped_change, case.last_change)
        shown = " ".join(f"{_number(n):>8}" for n in changes)
        lines.append(f"{case.kind:>11} {mask:>7} {case.layers:6} {shown}   {tells}")
    return "\n".join(lines)


def plot(path: str | os.PathLike[str]) -> None:
    """Draws a PNG: outputs before and after in the plane, for no positions and for RoPE, and the table as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    planes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    colors = ("tab:blue", "tab:orange", "tab:green", "tab:red")
    for axes, kind in zip(planes[:2], ("none", "rope"), strict=True):
        case = swap(kind)
        for i, color in enumerate(colors):
            (a, b), (c, d) = case.before[i].tolist(), case.after[SWAP[i]].tolist()
            axes.plot(a, b, "o", color=color, markersize=11, fillstyle="none", markeredgewidth=1.8)
            axes.plot(c, d, "x", color=color, markersize=8, markeredgewidth=1.8)
            axes.plot([a, c], [b, d], "-", color=color, alpha=0.5, label=f"output of x{i + 1}")
        axes.set(xlabel="first number", ylabel="second number", xlim=(0.3, 1.05), ylim=(-0.6, 0.8))
        axes.set_title(f"positions: {kind}, no mask\no: order x1 x2 x3 x4    x: order x1 x3 x2 x4", fontsize=10)
        axes.grid(alpha=0.3)
    planes[1].legend(fontsize=8)
    bars, cases = planes[2], table()
    kinds = list(dict.fromkeys(case.kind for case in cases))
    for j, (causal, layers, name) in enumerate(
        ((False, 1, "no mask"), (True, 1, "causal mask"), (True, 2, "causal mask, 2 layers"))
    ):
        heights = [case.last_change for case in cases if (case.causal, case.layers) == (causal, layers)]
        places = [i + 0.27 * (j - 1) for i in range(len(kinds))]
        bars.bar(places, heights, 0.25, label=name)
        for place, height in zip(places, heights, strict=True):
            if height <= ROUNDING:
                bars.text(place, 0.0012, "0", ha="center", va="bottom", fontsize=9)
    bars.set_xticks(range(len(kinds)), kinds)
    bars.set(ylabel="largest change of y4", yscale="log", ylim=(1e-3, 2.0))
    bars.set_title("change of the last output when x2 and x3 change places", fontsize=10)
    bars.legend(fontsize=8)
    bars.grid(axis="y", alpha=0.3)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
