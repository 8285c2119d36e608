"""Tokens with their probabilities, as lines and as JSON."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykern.lm.scoring import TokenProbability
    from pykern.lm.tokenizer import Tokenizer


def token_lines(tokenizer: "Tokenizer", tokens: Sequence["TokenProbability"]) -> list[str]:
    """Per token its text as a JSON string, probability and rank, with tabs between them."""
    return [
        f"{json.dumps(tokenizer.decode([each.token]), ensure_ascii=False)}\t{each.probability:.6g}\t{each.rank}"
        for each in tokens
    ]


def token_records(tokenizer: "Tokenizer", tokens: Sequence["TokenProbability"]) -> list[dict[str, Any]]:
    return [
        {
            "id": each.token,
            "text": tokenizer.decode([each.token]),
            "probability": each.probability,
            "log_probability": each.log_probability,
            "rank": each.rank,
        }
        for each in tokens
    ]
