"""pykern attention: a picture of where a model looks."""

import argparse
from pathlib import Path
from typing import Any

from pykern.cli.parts import add_threads, load_model, set_threads


def add_attention(commands: Any) -> None:
    parser = commands.add_parser("attention", help="draw the attention maps of a prompt", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--prompt", required=True, help="the text that the model reads")
    parser.add_argument("--out", required=True, metavar="FILE", help=".png, or .html: a page that answers the pointer")
    parser.add_argument("--layer", type=int, metavar="N", help="of a .png: this layer only, from 0")
    parser.add_argument("--head", type=int, metavar="N", help="of a .png: this head only, from 0")
    add_threads(parser)
    parser.set_defaults(run=attention)


def attention(arguments: argparse.Namespace) -> int:
    kind = Path(arguments.out).suffix.lower()
    if kind not in (".png", ".html"):
        raise ValueError(f"--out is {arguments.out} but must end in .png or .html")
    if kind == ".html" and (arguments.layer is not None or arguments.head is not None):
        raise ValueError("--layer and --head belong to a .png: the page shows all of them")
    set_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    from pykern.lm.attention_maps import attention_maps, plot_attention
    from pykern.lm.attention_page import write_attention_page

    ids = tokenizer.encode(arguments.prompt)
    maps = attention_maps(model, ids)
    tokens = [tokenizer.decode([i]) for i in ids]
    if kind == ".html":
        write_attention_page(maps, tokens, arguments.out, title=f"Attention of {Path(arguments.model).name}")
    else:
        plot_attention(maps, tokens, arguments.out, layer=arguments.layer, head=arguments.head)
    print(f"{arguments.out}: {maps.shape[0]} layers, {maps.shape[1]} heads, {len(ids)} tokens")
    return 0
