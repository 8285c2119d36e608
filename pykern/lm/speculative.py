"""Speculative greedy decoding: guess some tokens cheaply, check them all in one pass, keep those that are right.

Leviathan et al., arXiv 2211.17192, for temperature 0. The rows of a pass have the bits of single steps, so the text is
that of plain greedy decoding, token for token, however bad the guesses are.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pykern.lm.sampling import Sampler

if TYPE_CHECKING:
    from pykern.lm.session import Session


@dataclass
class Speculation:
    """ids [1, T + n], and how the guesses went: passes of the model, tokens guessed, guesses that were right."""

    ids: Tensor
    passes: int = 0
    guessed: int = 0
    accepted: int = 0


def lookup(text: list[int], count: int, longest: int = 3) -> list[int]:
    """Up to count tokens that followed the latest earlier place where the end of the text, at most `longest` tokens of
    it, stands already; none where even its last token is new."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        end = text[-n:]
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == end:
                return text[start + n : start + n + count]
    return []


def guesses(draft: "Session | None", text: list[int], count: int) -> list[int]:
    """count tokens that may follow: the greedy text of the draft model, or of n-gram lookup without one."""
    if draft is None:
        return lookup(text, count)
    count = min(count, draft.max_len - len(text) + 1)
    if count < 1:
        return []
    known = min(draft.length, len(text) - 1)  # what was guessed wrong is behind
    draft.cache.truncate(known)
    if known < len(text) - 1:
        draft.extend([torch.tensor(text[known:-1])], [0], wanted=False)
    return draft.continue_greedily(text[-1], count)


def speculate(
    session: "Session",
    ids: Tensor,
    *,
    max_new_tokens: int,
    draft: "Session | None" = None,
    lookahead: int = 4,
    stop_tokens: tuple[int, ...] = (),
) -> Speculation:
    """ids [1, T] int64 and the greedy tokens that follow, up to max_new_tokens or the first of stop_tokens.

    lookahead tokens are guessed at a time, by the session `draft` of a smaller model with the same vocabulary, or
    without one by looking up what followed the last tokens earlier in the text.
    ValueError: a batch, too long a text, another vocabulary.
    Source: Leviathan et al., arXiv 2211.17192, for greedy decoding.
    """
    if session.batch != 1 or (draft is not None and draft.batch != 1):
        raise ValueError("speculate: a session of one text is needed, batch=1")
    if lookahead < 1 or max_new_tokens < 0:
        raise ValueError(f"speculate: lookahead is {lookahead}, max_new_tokens {max_new_tokens}: 1 and 0 are the least")
    if draft is not None and draft.config.vocab_size != session.config.vocab_size:
        raise ValueError(
            f"speculate: the draft has {draft.config.vocab_size} tokens, the model {session.config.vocab_size}"
        )
    if ids.dim() == 2 and ids.shape[1] + max_new_tokens > session.max_len:
        raise ValueError(
            f"speculate: {ids.shape[1]} tokens and {max_new_tokens} new ones exceed max_len {session.max_len}"
        )
    session.reset()
    if draft is not None:
        draft.reset()
    if ids.shape[1] > 1:
        session.read(ids[:, :-1])
    else:
        session.check_ids("speculate: ids", ids)
    text, end = ids[0].tolist(), ids.shape[1] + max_new_tokens
    result = Speculation(ids)
    while len(text) < end and (len(text) == ids.shape[1] or text[-1] not in stop_tokens):
        guessed = guesses(draft, text, min(lookahead, end - len(text) - 1))
        before = session.length
        rows = session.extend([torch.tensor([text[-1], *guessed])], [0], every=True)
        best = Sampler(0.0, batch=len(rows))(rows).tolist()
        right = next((i for i, token in enumerate(guessed) if token != best[i]), len(guessed))
        new = best[: right + 1]
        stop = next((i + 1 for i, token in enumerate(new) if token in stop_tokens), len(new))
        text += new[:stop]
        session.cache.truncate(before + stop)
        result.passes += 1
        result.guessed += len(guessed)
        result.accepted += min(right, stop)
    result.ids = torch.tensor([text])
    return result
