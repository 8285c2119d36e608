"""Text to train on: Python's own standard library, one file, or a folder, split into training and held-out text.

A folder is split by file, so held-out text is never the rest of a file that was trained on: in the order of the
SHA-256 of their relative names, files are held out while they fit into 5 % of the bytes. A single file gives its last
5 % of characters.
"""

import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pykern.lm.files import checked_size

HELD_OUT = 20  # one byte, or one character, in twenty
MAX_BYTES = 1 << 30  # texts are held in memory as str
SEPARATORS = {"lines": r"(\n)", "paragraphs": r"(\n\s*\n)"}
SPLITS = ("files", *SEPARATORS)

# Tests and generated tables are not the kind of text one wants more of; the rest is not the library itself.
STDLIB_EXCLUDED = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "ensurepip",
        "pydoc_data",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out texts, one per file; sha256 identifies content and split; description is for people."""

    train_texts: tuple[str, ...]
    val_texts: tuple[str, ...]
    sha256: str
    description: str

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train_texts)

    @property
    def val_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.val_texts)


def parts(texts: Sequence[str], split: str) -> list[str]:
    """The texts as they are ("files"), their "lines", or their "paragraphs", which empty lines separate.

    What separates stays at the end of the part in front of it: it tells a model that the part is over. Blank parts are
    left out; nothing else is, or is added.
    """
    if split not in SPLITS:
        raise ValueError(f"corpus: split is {split!r} but must be one of {', '.join(SPLITS)}")
    if split == "files":
        return list(texts)
    found = []
    for text in texts:
        pieces = re.split(SEPARATORS[split], text)  # a part, what follows it, a part, …, a part
        found += [part + end for part, end in zip(pieces[::2], [*pieces[1::2], ""], strict=True) if part.strip()]
    return found


def _text(data: bytes, name: str | Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {name} is not UTF-8 text (byte {error.start})") from None


def _walk(root: Path, excluded: frozenset[str]) -> Iterator[str]:
    """Relative names, with "/", of the regular files under root, sorted; hidden names and excluded folders left out."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                names.append(path.relative_to(root).as_posix())
    return iter(sorted(names))


def _read_folder(root: Path, names: Iterator[str], max_bytes: int) -> dict[str, bytes]:
    """Content of the files that are not empty, by relative name; ValueError when they exceed max_bytes together."""
    contents: dict[str, bytes] = {}
    left = max_bytes
    for name in names:
        size = checked_size(root / name, max_bytes)
        if size > left:
            raise ValueError(f"corpus: the files of {root} hold more than {max_bytes} bytes")
        data = (root / name).read_bytes()
        left -= len(data)
        if data:
            contents[name] = data
    return contents


def _split_text(text: str, name: str | Path) -> tuple[str, str]:
    if len(text) < 2:
        raise ValueError(f"corpus: {name} is too short to split, {len(text)} characters")
    cut = len(text) - max(1, len(text) // HELD_OUT)
    return text[:cut], text[cut:]


def _held_out(contents: dict[str, bytes]) -> set[str]:
    """Names of the files to hold out: at least one, and never all."""
    left = sum(map(len, contents.values())) // HELD_OUT
    chosen = set()
    for name in sorted(contents, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if len(contents[name]) <= left:
            chosen.add(name)
            left -= len(contents[name])
    return chosen or {min(contents, key=lambda name: (len(contents[name]), name))}


def _from_folder(contents: dict[str, bytes], root: Path, label: str) -> Corpus:
    texts = {name: _text(data, root / name) for name, data in contents.items()}
    digest = hashlib.sha256()
    for name, data in contents.items():
        digest.update(os.fsencode(name) + b"\0%d\0" % len(data))
        digest.update(data)
    if len(texts) == 1:
        ((name, text),) = texts.items()
        train, val = _split_text(text, root / name)
        return Corpus((train,), (val,), digest.hexdigest(), f"{label}: one file, its last 5 % held out")
    held_out = _held_out(contents)
    return Corpus(
        train_texts=tuple(text for name, text in texts.items() if name not in held_out),
        val_texts=tuple(text for name, text in texts.items() if name in held_out),
        sha256=digest.hexdigest(),
        description=f"{label}: {len(texts)} files, {len(held_out)} of them held out",
    )


def _load_stdlib(max_bytes: int) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    names = (name for name in _walk(root, STDLIB_EXCLUDED) if name.endswith(".py"))
    contents = _read_folder(root, names, max_bytes)
    if not contents:
        raise ValueError(f"corpus: this Python has no library source files in {root}; give a file or a folder instead")
    return _from_folder(contents, root, f"standard library of Python {platform.python_version()}")


def load(source: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Corpus:
    """Corpus from "stdlib", a UTF-8 text file, or a folder of them (hidden files and __pycache__ left out).

    FileNotFoundError when there is no such path; ValueError, in one sentence, when it holds no text, is not UTF-8, is
    too short to split or exceeds max_bytes. A folder called stdlib is reached as "./stdlib".
    """
    if source == "stdlib":
        return _load_stdlib(max_bytes)
    root = Path(source)
    if root.is_dir():
        contents = _read_folder(root, _walk(root, frozenset({"__pycache__"})), max_bytes)
        if not contents:
            raise ValueError(f"corpus: folder {root} has no text, only empty files or none")
        return _from_folder(contents, root, str(root))
    try:
        size = checked_size(root, max_bytes)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"corpus: {error}") from None
    if size == 0:
        raise ValueError(f"corpus: {root} is empty")
    data = root.read_bytes()
    train, val = _split_text(_text(data, root), root)
    return Corpus((train,), (val,), hashlib.sha256(data).hexdigest(), f"{root}: its last 5 % held out")
