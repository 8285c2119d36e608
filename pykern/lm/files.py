"""Reading files that nobody vouches for, and replacing files so that a crash leaves the old one.

A reader states the most bytes it is ready to hold; size and kind of the file are checked before anything is read.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np


def checked_size(path: Path, max_bytes: int) -> int:
    """Size of a regular file in bytes. FileNotFoundError when missing, ValueError when not a file or too large."""
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:  # a NUL byte in the name
        raise ValueError(f"{str(path)!r}: not a file name ({error})") from None
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path}: not a regular file")
    if info.st_size > max_bytes:
        raise ValueError(f"{path}: {info.st_size} bytes, but at most {max_bytes} are accepted")
    return info.st_size


def map_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped and not read. FileNotFoundError; ValueError when it is none: numpy parses the
    header as Python, so that its other errors are those of a tokenizer, a compiler and an integer."""
    checked_size(path, 1 << 62)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise ValueError(f"not a .npy file ({error})") from None
    if not isinstance(found, np.ndarray):  # of a .npz
        raise ValueError("an archive of arrays, not one")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in data; ValueError, starting with name, for anything else (NaN and repeated keys included)."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(f"{name}: JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most max_bytes. FileNotFoundError or ValueError otherwise."""
    path = Path(path)
    size = checked_size(path, max_bytes)
    with path.open("rb") as file:
        return parse_json(file.read(size), str(path))


def json_bytes(value: dict[str, Any]) -> bytes:
    """Readable JSON; ValueError for NaN, infinity, and for what JSON would give back changed (tuples, integer keys)."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if json.loads(text) != value:
        raise ValueError("JSON would not give the same value back: use lists and string keys")
    return (text + "\n").encode()


def sync(path: Path) -> None:
    """Force a file or the entries of a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let write(temporary) make the new content beside path, then switch: path is the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
