"""Mutated files into every reader of files that nobody vouches for: each is read, or refused with a sentence.

    PYTHONPATH=.:tests python tests/fuzz_files.py --runs 1000000 --seed 0

Seeds are files that pykern writes, and small ones of other programs. A mutation flips bits, cuts, repeats, swaps or
removes pieces, puts in numbers on the border of what fits, or words that the format knows. What is not a ValueError (or
a subclass, or FileNotFoundError), takes more than SECONDS or lets the process grow by more than GROWTH is a defect: the
file is kept in the folder that --keep names.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pykern.lm import Config, Tokenizer, Transformer
from pykern.lm.batches import load_tokens
from pykern.lm.checkpoint import read_header, read_tensors, save_checkpoint
from pykern.lm.files import parse_json
from pykern.lm.hf_config import config_of
from pykern.lm.options import TrainOptions
from pykern.lm.run_state import read_state
from pykern.lm.tokenizer_kinds import KINDS

SECONDS, GROWTH = 5.0, 512 << 20
NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, 1e308, -0.0, 0.5)
WORDS = (
    "null",
    "true",
    "NaN",
    "Infinity",
    "[]",
    "{}",
    '""',
    '"\\u0000"',
    '"../../x"',
    "[[[[[[[[[[",
    "1e999",
    "-",
    "\\",
)

VALUES = (*NUMBERS, None, True, "", "x" * 300, [], {}, [[]], "\ud800")

Reader = Callable[[bytes], object]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        to = min(len(out), at + draw.choice((1, 2, 4, 8, 16, 64, 256)))
        kind = draw.randrange(8)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:to]
        elif kind == 2:
            out[at:at] = out[at:to] * draw.choice((1, 2, 50))
        elif kind == 3:
            out[at:to] = draw.choice(WORDS).encode()
        elif kind == 4:
            out[at:to] = str(draw.choice(NUMBERS)).encode()
        elif kind == 5:
            out[at:to] = draw.randbytes(to - at)
        elif kind == 6 and len(out) > 8:  # the length in front of a header
            out[:8] = (draw.choice((0, 1, len(out) - 8, 2**32, 2**63, 2**64 - 1))).to_bytes(8, "little")
        else:
            digits = [i for i, byte in enumerate(out) if 48 <= byte <= 57]
            if digits:
                i = draw.choice(digits)
                out[i : i + 1] = str(draw.choice(NUMBERS)).encode()
    return bytes(out)


def changed_json(value: object, draw: random.Random) -> object:
    """One leaf, item or name of a document is another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        rest = {k: v for k, v in value.items() if k != name}
        kind = draw.randrange(8)
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {f"{name}_": value[name]}
        return value | {name: changed_json(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        i = draw.randrange(len(value))
        new = [changed_json(value[i], draw)] if draw.random() < 0.7 else draw.choice(([], [value[i], value[i]]))
        return [*value[:i], *new, *value[i + 1 :]]
    return draw.choice(VALUES)


def mutation(data: bytes, draw: random.Random) -> bytes:
    """Of the bytes or, of a document in every other run, of its values."""
    if data[:1] != b"{" or draw.random() < 0.5:
        return mutated(data, draw)
    return json.dumps(changed_json(json.loads(data), draw)).encode("utf-8", "surrogatepass")


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Files of each kind."""
    torch.manual_seed(0)
    texts = ["the cat sat on the mat, the dog did not", "def f(x): return x + 1"]
    tokenizers = {
        kind: Tokenizer.train(kind, texts, None if kind in ("byte", "char") else 300) for kind in sorted(KINDS)
    }
    config = Config(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=tokenizers["byte"].vocab_size)
    save_checkpoint(folder / "c", config=config, tensors=Transformer(config).state_dict(), tokenizer=tokenizers["byte"])
    np.save(folder / "tokens.npy", np.arange(50, dtype=np.uint16), allow_pickle=False)
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": 50}
    llama = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    llama |= {"intermediate_size": 16, "max_position_embeddings": 8, "vocab_size": 50, "rms_norm_eps": 1e-5}
    corpus = {"source": "x", "sha256": "0" * 64, "description": "a text", "split": "lines"}
    state = {"step": 3, "tokens": 5, "seconds": 1.5, "options": TrainOptions().to_dict(), "corpus": corpus}
    return {
        "safetensors": [(folder / "c/model.safetensors").read_bytes()],
        "config": [(folder / "c/config.json").read_bytes()],
        "tokenizer": [tokenizer.to_json().encode() for tokenizer in tokenizers.values()],
        "tokens": [(folder / "tokens.npy").read_bytes()],
        "hf config": [json.dumps(gpt2).encode(), json.dumps(llama).encode()],
        "state": [json.dumps(state).encode()],
    }


def readers(folder: Path) -> dict[str, Reader]:
    path = folder / "mutated"

    def file_of(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    def tensors(data: bytes) -> None:
        file = file_of(data)
        read_header(file)
        read_tensors(file)

    def tokenizer(data: bytes) -> None:
        found = Tokenizer.load(file_of(data))
        found.decode(found.encode("the cat sat"))

    return {
        "safetensors": tensors,
        "config": lambda data: Config.from_dict(parse_json(data, "config.json")),
        "tokenizer": tokenizer,
        "tokens": lambda data: load_tokens(file_of(data)),
        "hf config": lambda data: config_of(parse_json(data, "config.json")),
        "state": lambda data: read_state(parse_json(data, "training.json"), folder),
    }


def fuzz(runs: int, seed: int, folder: Path, keep: Path | None = None) -> dict[str, dict[str, int]]:
    """Per kind of file: how many were read, refused, and what was a defect. `runs` of all kinds together."""
    draw, of_kind, read = random.Random(seed), seeds(folder), readers(folder)
    counts = {kind: {"read": 0, "refused": 0, "defects": 0} for kind in of_kind}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for run in range(runs):
        kind = list(of_kind)[run % len(of_kind)]
        data = mutation(draw.choice(of_kind[kind]), draw)
        started, defect = time.perf_counter(), None
        try:
            read[kind](data)
            counts[kind]["read"] += 1
        except (ValueError, FileNotFoundError) as refusal:
            counts[kind]["refused"] += 1
            if not str(refusal).strip():
                defect = "a refusal without words"
        except Exception as error:  # noqa: BLE001 - any other kind is what is looked for
            defect = f"{type(error).__name__}: {error}"
        if time.perf_counter() - started > SECONDS:
            defect = f"{time.perf_counter() - started:.1f} s"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
        if grown > GROWTH:
            defect, memory = f"{grown >> 20} MB", memory + grown // 1024
        if defect:
            counts[kind]["defects"] += 1
            print(f"run {run}, {kind}: {defect}", file=sys.stderr)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind.replace(' ', '_')}_{seed}_{run}").write_bytes(data)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for files that show a defect")
    options = parser.parse_args()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        counts = fuzz(options.runs, options.seed, Path(folder), options.keep)
    for kind, found in counts.items():
        print(f"{kind:12} {found}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{options.runs} files in {time.perf_counter() - started:.0f} s, at most {peak} MB")
    return 1 if any(found["defects"] for found in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
