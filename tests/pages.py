"""The Markdown pages of the repository as their readers take them: headings, links, and blocks of code.

Anchors are those that GitHub gives to headings; docs/hooks.py tells mkdocs to give the same.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

FENCE = re.compile(r"^(?P<marks>`{3,})(?P<language>\w*)\n(?P<text>.*?)^(?P=marks)$\n?", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}|\t).*$", re.MULTILINE)
INLINE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. printed: the text block right behind it. not_run: the reason in the comment right before it."""

    language: str
    text: str
    printed: str | None
    not_run: str | None
    line: int


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: small letters, hyphens for spaces, no other signs."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def headings(text: str) -> list[tuple[int, str]]:
    """Depth and words of each heading."""
    return [(len(marks), words) for marks, words in HEADING.findall(FENCE.sub("", text))]


def anchors(text: str) -> set[str]:
    """Of all headings; the second of two equal ones gets -1, and so on."""
    found: dict[str, int] = {}
    result = set()
    for _, words in headings(text):
        plain = anchor(words)
        count = found.get(plain, 0)
        found[plain] = count + 1
        result.add(f"{plain}-{count}" if count else plain)
    return result


def links(text: str) -> list[str]:
    """The targets of all links and pictures that stand outside of code."""
    for code in (FENCE, INDENTED):
        text = code.sub("", text)
    return LINK.findall(INLINE.sub("code", text))


def broken(page: Path, text: str) -> list[str]:
    """What is wrong with the links of a page: files and anchors that are not there."""
    wrong = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, place = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file():
            wrong.append(f"{target}: no such file")
        elif ROOT not in file.parents:
            wrong.append(f"{target}: outside of the repository")
        elif place and file.suffix == ".md":
            known = anchors(text if file == page else file.read_text(encoding="utf-8"))
            if place not in known:
                wrong.append(f"{target}: no heading of that name")
    return wrong


def blocks(text: str) -> list[Block]:
    """All fenced blocks but those that say what another one prints."""
    found: list[Block] = []
    matches = list(FENCE.finditer(text))
    for i, match in enumerate(matches):
        if match["language"] == "text" and i > 0 and matches[i - 1].end() == match.start():
            continue
        after = matches[i + 1] if i + 1 < len(matches) else None
        follows = after is not None and after["language"] == "text" and after.start() == match.end()
        reason = NOT_RUN.search(text[: match.start()])
        found.append(
            Block(
                language=match["language"],
                text=match["text"],
                printed=after["text"] if after is not None and follows else None,
                not_run=reason.group(1) if reason else None,
                line=text.count("\n", 0, match.start()) + 2,
            )
        )
    return found


def commands(text: str) -> list[str]:
    """Lines of code that begin with `pykern `, in blocks and in the running text."""
    lines = [line for match in FENCE.finditer(text) for line in match["text"].splitlines()]
    rest = FENCE.sub("", text)
    lines += INDENTED.findall(rest)
    lines += [match.group().strip("`") for match in INLINE.finditer(INDENTED.sub("", rest))]
    lines = [line.partition("  #")[0] for line in lines]
    return [line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?pykern [a-z]", line)]
