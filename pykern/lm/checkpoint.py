"""A checkpoint folder that is always whole, and a reader that trusts nothing in it.

    config.json  model.safetensors  tokenizer.json?  training.json?  training.safetensors?

Saving writes the complete new set into .next/, forces it to the disk and renames .next to .commit: that one rename is
the moment at which the new checkpoint exists. Its files are then moved over the old ones. After a crash before the
rename the old set is untouched; after it, the reader takes from .commit what has not been moved yet, and the next save
finishes the move. The files therefore always belong together, whichever moment a process was killed at.

Reading looks at sizes before contents, and at the header of a safetensors file (names, shapes, dtypes, offsets, all
against the size of the file) before a single tensor is allocated.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykern.lm.config import Config
from pykern.lm.files import checked_size, json_bytes, parse_json, read_json, sync
from pykern.lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    Expected = Callable[[Config], Mapping[str, torch.Tensor]]

CONFIG, MODEL, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
STATE, STATE_TENSORS = "training.json", "training.safetensors"
FILES = (CONFIG, MODEL, TOKENIZER, STATE, STATE_TENSORS)
NEXT, COMMIT, MANIFEST = ".next", ".commit", "manifest.json"

MAX_CONFIG_BYTES = 64 << 10
MAX_STATE_BYTES = 4 << 20
MAX_HEADER_BYTES = 4 << 20  # some 40000 tensors; parsing costs up to 30 bytes of memory per byte of JSON
MAX_TENSOR_BYTES = 1 << 50

# Bytes per element and the torch name of each dtype that a safetensors file may hold here.
DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}


@dataclass(frozen=True)
class Checkpoint:
    """What save_checkpoint was given. Tensors are on the CPU, and writing to them leaves the file alone."""

    config: Config
    tensors: "dict[str, torch.Tensor]"
    tokenizer: Tokenizer | None
    state: dict[str, Any] | None
    state_tensors: "dict[str, torch.Tensor] | None"


# ---- reading ----


def _check_entry(entry: Any, where: str, start: int) -> int:
    """End of one tensor's bytes, which must begin at start; ValueError, starting with where, for anything unusual."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {str(dtype)[:20]!r}, expected one of {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not (isinstance(numbers, list) and len(numbers) <= 8 and all(type(number) is int for number in numbers)):
            raise ValueError(f"{where} has a {what} that is not a short list of integers")
        if any(not 0 <= number <= MAX_TENSOR_BYTES for number in numbers):
            raise ValueError(f"{where} has a {what} with a negative or huge number")
    size = prod(shape) * DTYPES[dtype][0]
    if offsets != [start, start + size]:
        raise ValueError(f"{where} of shape {shape} should occupy bytes {start} to {start + size}, not {offsets}")
    return start + size


def _place(item: tuple[str, Any]) -> list[int]:
    """Sorting key of a header entry: its data_offsets; what _check_entry will refuse comes first."""
    entry = item[1]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets if isinstance(offsets, list) and all(type(offset) is int for offset in offsets) else []


def read_header(path: str | os.PathLike[str]) -> dict[str, tuple[list[int], str]]:
    """Shape and torch dtype name of every tensor of a safetensors file, from its header alone.

    FileNotFoundError, or ValueError naming the file and the tensor: truncated or trailing bytes, broken JSON, unknown
    dtypes, offsets that overlap, leave gaps or disagree with the shape.
    """
    path = Path(path)
    size = checked_size(path, MAX_TENSOR_BYTES)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated, {size} bytes cannot hold the header")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: header of {length} bytes, but at most {MAX_HEADER_BYTES} are accepted")
        data = file.read(length)
    if not data.startswith(b"{"):
        raise ValueError(f"{path}: the header is not a JSON object")
    entries = parse_json(data, str(path))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    end, header = 0, {}
    for name, entry in sorted(entries.items(), key=_place):
        end = _check_entry(entry, f"{path}: tensor {name[:100]!r}", end)
        header[name] = (entry["shape"], DTYPES[entry["dtype"]][1])
    if end != size - 8 - length:
        raise ValueError(f"{path}: tensors end at byte {end} of the data, but the file holds {size - 8 - length}")
    return header


def check_header(
    path: str | os.PathLike[str],
    header: Mapping[str, tuple[list[int], str]],
    expected: "Mapping[str, torch.Tensor]",
) -> None:
    """ValueError naming the file and the tensor when header differs from expected in a name, a shape or a dtype."""
    for name, tensor in expected.items():
        if name not in header:
            raise ValueError(f"{path}: tensor {name!r} is missing")
        shape, dtype = header[name]
        if shape != list(tensor.shape):
            raise ValueError(f"{path}: tensor {name!r} has shape {shape}, expected {list(tensor.shape)}")
        if dtype != str(tensor.dtype).removeprefix("torch."):
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype}, expected {tensor.dtype}")
    extra = [name for name in header if name not in expected]
    if extra:
        raise ValueError(f"{path}: tensor {extra[0][:100]!r} does not belong to this model")


def read_tensors(
    path: str | os.PathLike[str], expected: "Mapping[str, torch.Tensor] | None" = None
) -> "dict[str, torch.Tensor]":
    """All tensors of a safetensors file, checked by read_header and, when expected is given, by check_header."""
    header = read_header(path)
    if expected is not None:
        check_header(path, header, expected)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in header}
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: more than the address space can map
        raise ValueError(f"{path}: cannot be read as a safetensors file ({error})") from None


def _committed(folder: Path) -> list[str] | None:
    """Names in the set that .commit holds or held before some were moved; None when there is no .commit."""
    path = folder / COMMIT / MANIFEST
    try:
        names = read_json(path, MAX_CONFIG_BYTES).get("files")
    except FileNotFoundError:
        return None
    if not isinstance(names, list) or any(name not in FILES for name in names):
        raise ValueError(f"{path}: files must be a list of names from {', '.join(FILES)}")
    return names


def _locate(folder: Path) -> dict[str, Path]:
    """Path of each file of the current set."""
    names = _committed(folder)
    if names is None:
        return {name: folder / name for name in FILES if (folder / name).exists()}
    return {name: folder / COMMIT / name if (folder / COMMIT / name).exists() else folder / name for name in names}


def load_config(folder: str | os.PathLike[str]) -> Config:
    """The Config of a checkpoint folder, without its tensors. FileNotFoundError, or ValueError naming the file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    return _read_config(_locate(folder).get(CONFIG, folder / CONFIG))


def _read_config(path: Path) -> Config:
    values = read_json(path, MAX_CONFIG_BYTES)
    try:
        return Config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load(folder: Path, expected: "Expected | None", training: bool) -> Checkpoint:
    config = load_config(folder)
    paths = _locate(folder)
    model = paths.get(MODEL, folder / MODEL)
    read_header(model)  # a broken file is refused before a model is built to compare it with
    tokenizer = Tokenizer.load(paths[TOKENIZER]) if TOKENIZER in paths else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{paths[TOKENIZER]}: {tokenizer.vocab_size} tokens, but {CONFIG} has vocab_size {config.vocab_size}"
        )
    state = read_json(paths[STATE], MAX_STATE_BYTES) if training and STATE in paths else None
    state_tensors = read_tensors(paths[STATE_TENSORS]) if training and STATE_TENSORS in paths else None
    tensors = read_tensors(model, None if expected is None else expected(config))
    return Checkpoint(config, tensors, tokenizer, state, state_tensors)


def load_checkpoint(
    folder: str | os.PathLike[str], *, expected: "Expected | None" = None, training: bool = True
) -> Checkpoint:
    """The checkpoint in folder; with training=False its state and state_tensors are left on the disk, as None.

    expected(config) gives a tensor, on any device ("meta" costs nothing), for every name that the model must hold.
    FileNotFoundError names a missing folder or file; ValueError names the file, and the tensor, that is wrong.
    """
    try:
        return _load(Path(folder), expected, training)
    except FileNotFoundError:  # a running save may have moved a file after it was located: look once more
        return _load(Path(folder), expected, training)


# ---- writing ----


def tensor_writer(tensors: "Mapping[str, torch.Tensor]", argument: str) -> Callable[[Path], None]:
    import torch

    for name, tensor in tensors.items():
        where = f"save_checkpoint: {argument}[{name!r}]"
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"{where} is not a name that a tensor can have")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{where} must be a torch tensor, got {type(tensor).__name__}")
        if str(tensor.dtype).removeprefix("torch.") not in {dtype for _, dtype in DTYPES.values()}:
            raise TypeError(f"{where} has dtype {tensor.dtype}, which is not supported")
    values, storages = {}, set()
    for name, tensor in tensors.items():
        values[name] = tensor.detach().cpu().contiguous()
        storage = values[name].untyped_storage().data_ptr()
        if storage in storages:  # the library refuses aliases; a file holds values, not their sharing
            values[name] = values[name].clone()
        storages.add(storage)

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        path.touch()
        mode = path.stat().st_mode  # the library would leave a file that only its owner can read
        save_file(values, path, metadata={"format": "pt"})
        path.chmod(mode)

    return write


def _roll_forward(folder: Path) -> None:
    """Move the files of a committed set to their places and remove those of the older set; safe to repeat."""
    names = _committed(folder)
    if names is None:
        return
    commit = folder / COMMIT
    for name in FILES:
        if name not in names:
            (folder / name).unlink(missing_ok=True)
        elif (commit / name).exists():
            os.replace(commit / name, folder / name)
    sync(folder)
    shutil.rmtree(commit)


def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config: Config,
    tensors: "Mapping[str, torch.Tensor]",
    tokenizer: Tokenizer | None = None,
    state: dict[str, Any] | None = None,
    state_tensors: "Mapping[str, torch.Tensor] | None" = None,
) -> None:
    """Replace the checkpoint in folder, which is made when missing, by this one; other files there are left alone.

    Everything is checked before anything is written: TypeError or ValueError names the argument. state must survive
    JSON unchanged (no NaN, no tuples, string keys only).
    """
    if not isinstance(config, Config):
        raise TypeError(f"save_checkpoint: config must be a Config, got {type(config).__name__}")
    config_data = json_bytes(config.to_dict())
    writers: dict[str, Callable[[Path], object]] = {
        CONFIG: lambda path: path.write_bytes(config_data),
        MODEL: tensor_writer(tensors, "tensors"),
    }
    if tokenizer is not None:
        tokenizer_data = tokenizer.to_json().encode()
        writers[TOKENIZER] = lambda path: path.write_bytes(tokenizer_data)
    if state is not None:
        try:
            state_data = json_bytes(state)
        except ValueError as error:
            raise ValueError(f"save_checkpoint: state is not JSON ({error})") from None
        if len(state_data) > MAX_STATE_BYTES:
            raise ValueError(f"save_checkpoint: state is {len(state_data)} bytes of JSON, more than {MAX_STATE_BYTES}")
        writers[STATE] = lambda path: path.write_bytes(state_data)
    if state_tensors is not None:
        writers[STATE_TENSORS] = tensor_writer(state_tensors, "state_tensors")
    manifest = json_bytes({"files": list(writers)})
    writers[MANIFEST] = lambda path: path.write_bytes(manifest)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _roll_forward(folder)
    for leftover in (folder / NEXT, folder / COMMIT):  # from a save that was killed before its commit, or after its end
        shutil.rmtree(leftover, ignore_errors=True)
    staging = folder / NEXT
    staging.mkdir()
    try:
        for name, write in writers.items():
            write(staging / name)
            sync(staging / name)
        sync(staging)
        os.rename(staging, folder / COMMIT)
    except BaseException:  # a full disk or Ctrl-C: take back what is half written, and let the caller know
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(folder)
    _roll_forward(folder)
