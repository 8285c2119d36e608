"""One text under several tokenizers: the pieces, the counts, and a picture of both."""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykern.lm.files import replace_file
from pykern.lm.tokenizer import KINDS, Piece, Tokenizer

MAX_DRAWN = 300  # characters of a text in a picture
ROW = 78  # of them in a line
COLOURS = ("#a6cee3", "#fdd49e", "#b8e0b0", "#d9c3e8")  # neighbours differ
UNKNOWN_COLOUR = "#e34a33"
NAMES = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Comparison:
    """What one tokenizer makes of a text of so many characters and bytes."""

    name: str
    kind: str
    vocab_size: int
    characters: int
    bytes: int
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return len(self.pieces)

    @property
    def unknown(self) -> int:
        """Tokens that do not say which text they stand for."""
        return sum(not piece.known for piece in self.pieces)

    @property
    def unknown_bytes(self) -> int:
        """UTF-8 bytes of that text."""
        return sum(len(piece.data) for piece in self.pieces if not piece.known)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the text for each token; nan for an empty text."""
        return self.bytes / self.tokens if self.tokens else float("nan")


def train_kinds(texts: Iterable[str], vocab_size: int = 1000, kinds: Iterable[str] = KINDS) -> dict[str, Tokenizer]:
    """A tokenizer of each kind, of at most vocab_size tokens ("byte" has 256), by kind. Errors of Tokenizer.train."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    return {kind: Tokenizer.train(kind, texts, vocab_size) for kind in kinds}


def compare_tokenizers(text: str, tokenizers: Mapping[str, Tokenizer]) -> list[Comparison]:
    """A Comparison for each of the tokenizers, by their names. Errors of Tokenizer.encode; ValueError for none."""
    if not tokenizers:
        raise ValueError("compare_tokenizers: tokenizers is empty")
    found = []
    for name, tokenizer in tokenizers.items():
        pieces = tuple(tokenizer.pieces(text))
        found.append(Comparison(name, tokenizer.kind, tokenizer.vocab_size, len(text), len(text.encode()), pieces))
    return found


def visible(data: bytes) -> str:
    """data for people: line ends and other control characters by a sign, bytes that are no characters as <E2>."""
    shown = []
    for character in data.decode("utf-8", "surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            shown.append(f"<{ord(character) - 0xDC00:02X}>")
        elif character in NAMES:
            shown.append(NAMES[character])
        elif unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
            shown.append(f"<U+{ord(character):04X}>")
        else:
            shown.append(character)
    return "".join(shown)


def _drawn(data: bytes, glyphs: Mapping[int, int]) -> str:
    """visible, with a raised dot for a space and the number of a character that the font lacks."""
    text = visible(data).replace(" ", "·")
    return "".join(character if ord(character) in glyphs else f"<{ord(character):X}>" for character in text)


def _lines(pieces: list[tuple[str, bool]]) -> list[list[tuple[int, str, bool, int]]]:
    """(column, text, known, number of the token) of every box; a piece longer than a line goes on in the next."""
    lines: list[list[tuple[int, str, bool, int]]] = [[]]
    column = 0
    for number, (text, known) in enumerate(pieces):
        if column and column + len(text) > ROW:
            lines.append([])
            column = 0
        for start in range(0, len(text), ROW):
            part = text[start : start + ROW]
            if start:
                lines.append([])
            lines[-1].append((column, part, known, number))
            column = len(part) if start else column + len(part)
    return lines


def _draw_boxes(axes: Any, comparisons: list[Comparison], glyphs: Mapping[int, int], font: dict[str, Any]) -> None:
    from matplotlib.patches import FancyBboxPatch

    row = 0.0
    for item in comparisons:
        drawn, left = [], MAX_DRAWN
        for piece in item.pieces:
            text = piece.mark + _drawn(piece.data, glyphs)
            left -= len(text)
            if left < 0:
                break
            drawn.append((text, piece.known))
        rest = item.tokens - len(drawn)
        title = item.name if not rest else f"{item.name}   (the first {len(drawn)} of {item.tokens} tokens)"
        axes.text(0, row + 0.62, title, weight="bold", size=9.5, va="center", parse_math=False)
        row += 1.0
        for line in _lines(drawn):
            for column, text, known, number in line:
                colour = COLOURS[number % len(COLOURS)] if known else UNKNOWN_COLOUR
                box = FancyBboxPatch(
                    (column + 0.08, row + 0.1),
                    len(text) - 0.16,
                    0.8,
                    boxstyle="round,pad=0,rounding_size=0.18",
                    mutation_aspect=1 / 2,
                    linewidth=0,
                    facecolor=colour,
                )
                axes.add_patch(box)
                for i, character in enumerate(text):
                    ink = "white" if not known else "#777777" if character == "·" else "#1a1a1a"
                    axes.text(column + i + 0.5, row + 0.52, character, color=ink, ha="center", va="center", **font)
            row += 1.0
        row += 0.35
    axes.set(xlim=(0, ROW), ylim=(row, 0))
    axes.axis("off")


def plot_comparison(comparisons: list[Comparison], path: str | os.PathLike[str], *, title: str = "") -> None:
    """A PNG: the text as each tokenizer splits it, a box per token, unknown ones red, and the number of tokens as bars.

    Long texts are drawn up to MAX_DRAWN characters; the bars count all tokens. ValueError when comparisons is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    if not comparisons:
        raise ValueError("plot_comparison: comparisons is empty")
    font = {"family": "DejaVu Sans Mono", "size": 9, "parse_math": False}
    glyphs = FT2Font(findfont(FontProperties(family="DejaVu Sans Mono"))).get_charmap()
    rows = sum(
        1.35 + max(1, -(-min(MAX_DRAWN, sum(len(_drawn(piece.data, glyphs)) for piece in item.pieces)) // ROW))
        for item in comparisons
    )
    figure = Figure(figsize=(13, 1.3 + 0.24 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3.4, 1))
    _draw_boxes(left, comparisons, glyphs, font)

    places = np.arange(len(comparisons))
    known = [item.tokens - item.unknown for item in comparisons]
    unknown = [item.unknown for item in comparisons]
    right.barh(places, known, color="#4c8ab5", height=0.62)
    if any(unknown):
        right.barh(places, unknown, left=known, color=UNKNOWN_COLOUR, height=0.62, label="unknown")
        right.legend(frameon=False, loc="lower right")
    for place, item in zip(places, comparisons, strict=True):
        text = f" {item.tokens}" + (f" ({item.unknown} unknown)" if item.unknown else "")
        right.text(item.tokens, place, text, va="center", size=9)
    right.set_yticks(places, [f"{item.name}\n{item.vocab_size} ids" for item in comparisons], size=9, parse_math=False)
    right.set(xlabel="tokens", xlim=(0, 1.3 * max([1, *(item.tokens for item in comparisons)])))
    right.invert_yaxis()
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    first = comparisons[0]
    figure.suptitle(title or f"{first.characters} characters, {first.bytes} bytes", parse_math=False, size=11)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
