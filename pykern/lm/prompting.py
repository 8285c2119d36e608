"""Zero-, one- and few-shot prompts: a template, filled with a task description, examples and a query; and its answers.

    {{description}}
    {{#examples}}
    Review: {{text}}
    Sentiment: {{label}}
    {{/examples}}
    Review: {{text}}
    Sentiment:

What lies between {{#examples}} and {{/examples}} comes once for each shot, with the names of an example; other names
are those of the query. {{{{ is {{ as text. Values are inserted as they are: braces in them mean nothing.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pykern.lm.files import checked_size, parse_json

if TYPE_CHECKING:
    from pykern.lm.model import Transformer
    from pykern.lm.session import Session
    from pykern.lm.tokenizer import Tokenizer

MAX_TEMPLATE_BYTES = 1 << 20
MAX_EXAMPLES_BYTES = 4 << 20
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPEN, CLOSE = "#examples", "/examples"
ESCAPE = "{{{{"  # for {{
Value = str | int | float


@dataclass(frozen=True)
class Piece:
    """Text, or the placeholder of a name in some line of the template."""

    text: str
    name: str | None = None
    line: int = 0


def _text(record: Mapping[str, Value], piece: Piece, of: str) -> str:
    if piece.name is None:
        return piece.text
    if piece.name == "description" and piece.name not in record:
        raise ValueError(f"template: line {piece.line}: {{{{description}}}} needs a description, but there is none")
    if piece.name not in record:
        known = ", ".join(name[:40] for name in list(record)[:10] if name != "description") or "nothing"
        raise ValueError(f"template: line {piece.line}: {{{{{piece.name}}}}} is not in {of}, which has {known}")
    return _value(record[piece.name], f"{of}: {piece.name}")


def _value(value: object, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"template: {what} must be text or a number, got {type(value).__name__}")
    return str(value)


def _alone(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] stands alone on its line."""
    before, after = text[text.rfind("\n", 0, start) + 1 : start], text[end:].split("\n", 1)
    return not before.strip(" \t") and not after[0].strip(" \t\r") and len(after) == 2


def _pieces(text: str) -> list[Piece]:
    """The template as text and tags, in order; a tag of the block that stands alone takes its line with it."""
    pieces, at, written = [], 0, ""
    while (start := text.find("{{", at)) >= 0:
        line = text.count("\n", 0, start) + 1
        if text.startswith(ESCAPE, start):
            written += text[at:start] + "{{"
            at = start + len(ESCAPE)
            continue
        end = text.find("}}", start)
        if end < 0 or "\n" in text[start:end]:
            raise ValueError(f"template: line {line}: {{{{ is not closed by }}}} ({ESCAPE} is two braces of text)")
        name, stop = text[start + 2 : end].strip(), end + 2
        if name not in (OPEN, CLOSE) and not NAME.fullmatch(name):
            raise ValueError(
                f"template: line {line}: {{{{{name[:40]}}}}} is not a placeholder: a name of letters, digits and _, "
                f"{OPEN} or {CLOSE}"
            )
        written += text[at:start]
        if name in (OPEN, CLOSE) and _alone(text, start, stop):
            written = written.rstrip(" \t")
            stop = text.index("\n", stop) + 1
        pieces += [Piece(written), Piece("", name, line)]
        written, at = "", stop
    return [piece for piece in [*pieces, Piece(written + text[at:])] if piece.name or piece.text]


@dataclass(frozen=True)
class Template:
    """A prompt with places for a description, examples and a query; made by parse or load.

    before and after are what surrounds the block of examples, which is None if there is no such block.
    TypeError: not text. ValueError names the line and the placeholder that is wrong, missing or left over.
    """

    before: tuple[Piece, ...]
    block: tuple[Piece, ...] | None
    after: tuple[Piece, ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """The template in text. TypeError unless str; ValueError naming the line for tags that are wrong."""
        if not isinstance(text, str):
            raise TypeError(f"template: text must be str, got {type(text).__name__}")
        before, block, after = list[Piece](), list[Piece](), list[Piece]()
        part, opened, closed = before, 0, False
        for piece in _pieces(text):
            if piece.name == OPEN:
                if opened:
                    raise ValueError(
                        f"template: line {piece.line}: a second {{{{{OPEN}}}}}: there is one block at most"
                    )
                part, opened = block, piece.line
            elif piece.name == CLOSE:
                if not opened or closed:
                    raise ValueError(f"template: line {piece.line}: {{{{{CLOSE}}}}} without {{{{{OPEN}}}}}")
                part, closed = after, True
            elif piece.name == "description" and part is block:
                raise ValueError(f"template: line {piece.line}: {{{{description}}}} belongs outside of the examples")
            else:
                part.append(piece)
        if opened and not closed:
            raise ValueError(f"template: line {opened}: {{{{{OPEN}}}}} is not closed by {{{{{CLOSE}}}}}")
        return cls(tuple(before), tuple(block) if opened else None, tuple(after))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Template":
        """The template in a UTF-8 file of at most 1 MiB; the line end that an editor puts at its end is not part of it.

        FileNotFoundError, or ValueError naming the file.
        """
        try:
            return cls.parse(_read(Path(path), MAX_TEMPLATE_BYTES).removesuffix("\n"))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None

    @property
    def names(self) -> set[str]:
        """The names that the query must have."""
        return {piece.name for piece in self.before + self.after if piece.name} - {"description"}

    def render(
        self,
        *,
        description: str | None = None,
        examples: Sequence[Mapping[str, Value]] = (),
        query: Mapping[str, Value] | None = None,
        shots: int | None = None,
        separator: str = "",
    ) -> str:
        """The prompt with the first `shots` of the examples (all, when None), and the separator after each of them.

        Values are text or numbers. Names that the template does not use are passed over in the query and in examples,
        which may hold answers or numbers of their own. ValueError: a name without a value, fewer examples than shots,
        shots without a block for them, or a description without a place.
        """
        shots = len(examples) if shots is None else shots
        if not 0 <= shots <= len(examples):
            raise ValueError(f"template: shots is {shots} but must be from 0 to the {len(examples)} examples")
        if shots and self.block is None:
            raise ValueError(f"template: shots is {shots} but there is no {{{{{OPEN}}}}} block to write them in")
        outside = self.before + self.after
        if description is not None and not any(piece.name == "description" for piece in outside):
            raise ValueError("template: a description was given, but there is no {{description}}")
        given: dict[str, Value] = {**(query or {})}
        if "description" in given:
            raise ValueError("template: description is an argument of its own, and no name of a query")
        if description is not None:
            given["description"] = description
        parts = [_text(given, piece, "the query") for piece in self.before]
        for number, example in enumerate(examples[:shots], start=1):
            parts += [_text(example, piece, f"example {number}") for piece in self.block or ()]
            parts.append(separator)
        return "".join(parts + [_text(given, piece, "the query") for piece in self.after])


def _read(path: Path, most: int) -> str:
    size = checked_size(path, most)
    with path.open("rb") as file:
        data = file.read(size)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def load_examples(path: str | os.PathLike[str]) -> list[dict[str, Value]]:
    """The examples in a .jsonl file of at most 4 MiB: per line a JSON object of texts and numbers, at least one.

    FileNotFoundError, or ValueError naming the file and the line.
    """
    examples = []
    for number, line in enumerate(_read(Path(path), MAX_EXAMPLES_BYTES).removesuffix("\n").split("\n"), start=1):
        example = parse_json(line.encode(), f"{path}: line {number}")
        if not example:
            raise ValueError(f"{path}: line {number}: the object is empty")
        for name, value in example.items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(
                    f"{path}: line {number}: {name[:40]} must be text or a number, got {type(value).__name__}"
                )
        examples.append(example)
    return examples


def classify(
    model: "Transformer | Session",
    tokenizer: "Tokenizer",
    prompt: str,
    candidates: Sequence[str],
    *,
    normalise: str = "none",
) -> tuple[str, list[float]]:
    """(the likeliest of the candidates after the prompt, log P(candidate | prompt) of each in nats).

    Exact: every candidate is scored (pykern.lm.scoring.score, which says what normalise is); of equals the first wins.
    Prompt and candidates are turned into tokens apart from each other: the space between them belongs to the candidate
    where the tokenizer learned words with the space before them. ValueError: no candidates, two alike, one that has no
    tokens, a prompt that has none, or a score that is not a number.
    """
    from pykern.lm.scoring import score

    if isinstance(candidates, str) or not all(isinstance(candidate, str) for candidate in candidates):
        raise TypeError("classify: candidates must be a sequence of str")
    if not candidates:
        raise ValueError("classify: there are no candidates")
    alike = next((candidate for i, candidate in enumerate(candidates) if candidate in candidates[:i]), None)
    if alike is not None:
        raise ValueError(f"classify: {alike!r} is twice among the candidates")
    start, ends = tokenizer.encode(prompt), [tokenizer.encode(candidate) for candidate in candidates]
    if not start:
        raise ValueError("classify: the prompt has no tokens")
    for candidate, end in zip(candidates, ends, strict=True):
        if not end:
            raise ValueError(f"classify: candidate {candidate!r} has no tokens")
    scores = score(model, start, ends, normalise=normalise, tokenizer=tokenizer)
    if any(math.isnan(value) for value in scores):
        raise ValueError("classify: log P of a candidate is not a number: the model's logits are not finite")
    return candidates[scores.index(max(scores))], scores
