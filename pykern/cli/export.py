"""pykern export: a checkpoint for other programs. pykern import: a Hugging Face folder as a checkpoint."""

import argparse
import sys
from pathlib import Path
from typing import Any

FORMATS = {
    "hf": "a folder for transformers",
    "gguf": "a file for llama.cpp",
    "npz": "a file for numpy",
}


def add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="write a checkpoint for other programs", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint folder")
    text = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("--to", required=True, choices=FORMATS, help=text)
    parser.add_argument("--out", required=True, metavar="PATH", help="a file or folder that does not exist yet")
    parser.set_defaults(run=export)


def add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="read a GPT-2 or Llama folder of transformers", allow_abbrev=False)
    parser.add_argument(
        *("--from",), dest="source", required=True, metavar="FOLDER", help="config.json beside safetensors files"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint goes")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave tokenizer.json unread")
    parser.set_defaults(run=import_folder)


def export(arguments: argparse.Namespace) -> int:
    from pykern.lm import export as files
    from pykern.lm.checkpoint import load_checkpoint
    from pykern.lm.huggingface import save_hf
    from pykern.lm.model import Transformer, expected_tensors

    loaded = load_checkpoint(arguments.model, expected=expected_tensors, training=False)
    model = Transformer.from_checkpoint(loaded)
    save = {"hf": save_hf, "gguf": files.save_gguf, "npz": files.save_npz}[arguments.to]
    save(model, arguments.out, loaded.tokenizer)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        print(f"{arguments.model} has no tokenizer.json, so none was written", file=sys.stderr)
    elif arguments.to == "gguf" and files.gguf_tokenizer(tokenizer, model.config.vocab_size) is None:
        print(f"llama.cpp has no tokenizer like this one ({tokenizer.kind}): the file takes token ids", file=sys.stderr)
    print(f"{arguments.to}: {arguments.out}    {model.config.parameter_count:,} parameters")
    return 0


def import_folder(arguments: argparse.Namespace) -> int:
    from pykern.lm.checkpoint import save_checkpoint
    from pykern.lm.huggingface import load_hf

    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder")
    model, tokenizer = load_hf(arguments.source, tokenizer=not arguments.no_tokenizer)
    save_checkpoint(out, config=model.config, tensors=model.state_dict(), tokenizer=tokenizer)
    if tokenizer is None:
        print(f"{out} has no tokenizer.json: its model reads token ids, not text", file=sys.stderr)
    print(f"checkpoint: {out}    {model.config.parameter_count:,} parameters")
    return 0
