"""The computation graph of an output: its applications, the order in which backward runs, and a picture in SVG.

An application is below everything it uses. An edge that passes other rows bends round their boxes: it is cut into one
piece per row, and rows are ordered so that each box lies near the mean place of its neighbours (Sugiyama, Tagawa and
Toda, "Methods for Visual Understanding of Hierarchical System Structures", 1981).
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from . import inputs
from .engine import Module, Parameter, Tensor, name

WIDTH, HEIGHT, GAP, ROW, MARGIN = 196, 42, 18, 78, 24  # of a box, between boxes, from row to row, around; pixels
SWEEPS = 12


def applications(output: Module) -> list[Module]:
    """Everything that output was computed from, leaves too, inputs before those who use them; output is the last.

    TypeError for what is not a module, ValueError for a module that was not applied.
    """
    if not isinstance(output, Module):
        raise TypeError(f"applications: output is {inputs.describe(output)}, expected a module that was applied")
    found: list[Module] = []
    seen: set[int] = set()
    waiting = [(output.application, False)]
    while waiting:  # depth first, without recursion: a node is listed when its inputs are
        node, listed = waiting.pop()
        if listed:
            found.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            waiting.append((node, True))
            waiting += [(module, False) for module in reversed(inputs_of(node))]
    return found


def inputs_of(node: Module) -> tuple[Module, ...]:
    return () if isinstance(node, Tensor) else node.in_modules


def record_backward(output: Module) -> list[Module]:
    """An empty list that the next tape_bwd fills with the applications behind output as their backward() runs.

    TypeError, ValueError: as pykern.tape.applications.
    """
    order: list[Module] = []

    def recorded(node: Module) -> Any:
        backward = node.backward

        def run(*arguments: Any) -> Any:
            order.append(node)
            return backward(*arguments)

        return run

    for node in applications(output):
        if not isinstance(node, Tensor):
            vars(node)["backward"] = recorded(node)
    return order


def label(node: Module, network: Module | None = None) -> str:
    """ "Linear [4, 3]", and for the parameters of network their names: "Linear [4, 3]  linear1: weight, bias"."""
    shape = f"{name(node)} {list(node.out_tensor.shape)}"
    names = {} if network is None else {id(parameter): path for path, parameter in network.named_parameters()}
    own = [names[id(value)] for value in vars(node).values() if isinstance(value, Parameter) and id(value) in names]
    if not own:
        return shape
    owner = own[0].rpartition(".")[0]
    return f"{shape}  {owner}: {', '.join(path.rpartition('.')[2] for path in own)}"


class Place:
    """A box, or the point where an edge passes a row: row, and x of its middle."""

    def __init__(self, row: int, node: Module | None = None):
        self.row, self.node, self.x = row, node, 0.0
        self.above: list[Place] = []
        self.below: list[Place] = []

    @property
    def half(self) -> float:
        return (WIDTH if self.node else 0) / 2

    @property
    def y(self) -> float:
        return MARGIN + self.row * ROW + HEIGHT / 2


def rows_of(nodes: list[Module]) -> dict[int, int]:
    """The row of each node by its id: one below its lowest input; a leaf is right above its first user."""
    row: dict[int, int] = {}
    for node in nodes:
        row[id(node)] = 1 + max((row[id(module)] for module in inputs_of(node)), default=-1)
    for leaf in nodes:
        if isinstance(leaf, Tensor):
            row[id(leaf)] = min(row[id(user)] for user in nodes if any(leaf is m for m in inputs_of(user))) - 1
    return row


def places(nodes: list[Module]) -> tuple[list[list[Place]], list[list[Place]]]:
    """Rows of places with their x set, and each edge as the places that it runs through."""
    row = rows_of(nodes)
    box = {id(node): Place(row[id(node)], node) for node in nodes}
    rows: list[list[Place]] = [[] for _ in range(1 + max(row.values()))]
    for node in nodes:
        rows[row[id(node)]].append(box[id(node)])
    edges = []
    for node in nodes:
        for module in inputs_of(node):
            start, end = box[id(module)], box[id(node)]
            path = [start, *(Place(r) for r in range(start.row + 1, end.row)), end]
            for place in path[1:-1]:
                rows[place.row].append(place)
            for one, two in pairwise(path):
                one.below.append(two)
                two.above.append(one)
            edges.append(path)
    for line in rows:
        spread(line, [i * (WIDTH + GAP) for i in range(len(line))])
    for sweep in range(SWEEPS):
        for line in rows if sweep % 2 == 0 else rows[::-1]:
            near = [place.above if sweep % 2 == 0 else place.below for place in line]
            wanted = {
                id(place): sum(n.x for n in others) / len(others) if others else place.x
                for place, others in zip(line, near, strict=True)
            }
            line.sort(key=lambda place: wanted[id(place)])
            spread(line, [wanted[id(place)] for place in line])
    left = min(place.x - place.half for line in rows for place in line)
    for line in rows:
        for place in line:
            place.x += MARGIN - left
    return rows, edges


def spread(line: list[Place], wanted: Sequence[float]) -> None:
    """x near `wanted`, in the given order and without overlap: the mean of pushing to the right and to the left."""
    right, left = list(wanted), list(wanted)
    for i in range(1, len(line)):
        right[i] = max(right[i], right[i - 1] + line[i - 1].half + GAP + line[i].half)
    for i in range(len(line) - 2, -1, -1):
        left[i] = min(left[i], left[i + 1] - line[i + 1].half - GAP - line[i].half)
    for place, one, two in zip(line, right, left, strict=True):
        place.x = (one + two) / 2


def curve(path: list[Place]) -> str:
    """From the lower side of the first box to the upper side of the last, straight down past the boxes between."""
    first, *between, last = path
    points = [(first.x, first.y + HEIGHT / 2)]
    for place in between:
        points += [(place.x, place.y - HEIGHT / 2), (place.x, place.y + HEIGHT / 2)]
    points.append((last.x, last.y - HEIGHT / 2))
    drawn = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        drawn += f" C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return drawn


def draw_box(place: Place, node: Module, network: Module | None, forward: str, backward: str) -> str:
    head, _, owned = label(node, network).partition("  ")
    x, y, fill = place.x - WIDTH / 2, place.y - HEIGHT / 2, "#f1f1f1" if isinstance(node, Tensor) else "#dbe9f8"
    line = place.y + (-3 if owned else 4)
    parts = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#555"/>',
        f'<text x="{place.x:.1f}" y="{line:.1f}" text-anchor="middle">{escape(head)}</text>',
    ]
    if owned:
        parts.append(
            f'<text x="{place.x:.1f}" y="{line + 15:.1f}" text-anchor="middle" class="small">{escape(owned)}</text>'
        )
    parts.append(f'<text x="{x + 4:.1f}" y="{y + 11:.1f}" class="forward">{forward}</text>')
    parts.append(f'<text x="{x + WIDTH - 4:.1f}" y="{y + 11:.1f}" class="backward">{backward}</text>')
    return "\n".join(parts)


STYLE = (
    "text{font:12px sans-serif;fill:#111}.small,.forward,.backward{font-size:10px;fill:#444}.forward{fill:#1a5fa8}"
    ".backward{fill:#b3261e;text-anchor:end}path{fill:none;stroke:#777;stroke-width:1.2}.arrow{fill:#777;stroke:none}"
)


def graph_svg(output: Module, *, network: Module | None = None, backward: Sequence[Module] = ()) -> str:
    """The graph of output as an SVG document: a box per application with its shape, grey for leaves.

    Blue: the order of the forward pass. Red: the place in `backward`, what record_backward gave. network: the module
    whose names the parameters have.
    ValueError: output is a leaf.
    """
    nodes = applications(output)
    run = [node for node in nodes if not isinstance(node, Tensor)]
    if not run:
        raise ValueError("graph_svg: output is a leaf, expected an application")
    run.sort(key=lambda node: node.place)
    forward = {id(node): str(i) for i, node in enumerate(run, 1)}
    back = {id(node): str(i) for i, node in enumerate(backward, 1)}
    rows, edges = places(nodes)
    boxes = [(place, place.node) for line in rows for place in line if place.node is not None]
    width = max(place.x + place.half for line in rows for place in line) + MARGIN
    height = MARGIN * 2 + (len(rows) - 1) * ROW + HEIGHT + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="arrow" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        *(f'<path d="{curve(path)}" marker-end="url(#end)"/>' for path in edges),
        *(draw_box(place, node, network, forward.get(id(node), ""), back.get(id(node), "")) for place, node in boxes),
        f'<text x="{MARGIN}" y="{height - 10:.0f}" class="small">blue: order of the forward pass; '
        "red: order of the backward pass</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
