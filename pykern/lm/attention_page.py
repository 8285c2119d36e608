"""Attention maps as one HTML file that needs nothing else: choose layer and head, point at a token or a cell.

Weights are bytes, 255 for a weight of 1, in base64: what the page shows is within 0.2 % of the weight.
"""

import base64
import json
import os
from collections.abc import Sequence
from importlib import resources

from torch import Tensor

from pykern.lm.attention_maps import check_maps
from pykern.lm.files import replace_file


def attention_page(maps: Tensor, tokens: Sequence[str], *, title: str = "Attention") -> str:
    """The page of maps [layers, heads, T, T], weights from 0 to 1, for T tokens. ValueError: shapes, weights."""
    check_maps("attention_page", maps, tokens)
    if not bool(((maps >= 0) & (maps <= 1.001)).all()):
        raise ValueError("attention_page: maps must hold weights from 0 to 1")
    weights = (maps.clamp(0, 1) * 255).round().byte().contiguous().numpy().tobytes()
    data = json.dumps(
        {
            "title": title,
            "layers": maps.shape[0],
            "heads": maps.shape[1],
            "tokens": list(tokens),
            "weights": base64.b64encode(weights).decode(),
        }
    )
    page = resources.files("pykern.lm").joinpath("attention_page.html").read_text("utf-8")
    for character in "<>&\u2028\u2029":  # nothing in the data may end the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    return page.replace("DATA_OF_THE_PAGE", data)


def write_attention_page(
    maps: Tensor, tokens: Sequence[str], path: str | os.PathLike[str], *, title: str = "Attention"
) -> None:
    """attention_page, as the file `path`."""
    page = attention_page(maps, tokens, title=title)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
