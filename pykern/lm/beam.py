"""Beam search for a likely continuation: keep the `beams` likeliest texts, extend each by every token, keep again.

Texts that begin alike share the pages of the cache (KVCache.fork), and all of them step in one compiled call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from pykern.lm.scoring import read_prompt
from pykern.lm.session import Session

if TYPE_CHECKING:
    from pykern.lm.kvcache import KVCache
    from pykern.lm.model import Transformer


@dataclass(frozen=True)
class Beam:
    """A continuation: its n tokens (the stop token included), log P(tokens | prompt) in nats, and by what it is ranked.

    score = log_probability / n^length_penalty. ended: with a stop token, not by max_new_tokens.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    ended: bool


def _likeliest(total: Tensor, count: int) -> list[tuple[float, int, int]]:
    """(value, row, column) of the count largest numbers of total [L, V] above -inf; among equals the first come first.

    torch.topk promises no order among equals, so it only gives the smallest value that is kept.
    """
    flat = total.flatten()
    count = min(count, int((flat > -math.inf).sum()))
    kept = (flat >= flat.topk(count).values[-1]).nonzero()[:, 0]
    chosen = kept[flat[kept].sort(descending=True, stable=True).indices[:count]].tolist()
    return [(float(flat[at]), *divmod(at, total.shape[1])) for at in chosen]


def _branch(cache: "KVCache", slots: list[int], parents: list[int], beams: int) -> list[int]:
    """The cache's text for each child of texts[slots[parent]]: the first child goes on in place, others fork."""
    free = [slot for slot in range(beams) if slot not in {slots[parent] for parent in parents}]
    children, used = [], set()
    for parent in parents:
        slot = slots[parent]
        if slot in used:
            slot = free.pop()
            cache.fork(slots[parent], slot)
        used.add(slot)
        children.append(slot)
    return children


def _checked(ids: Tensor, stop_tokens: Sequence[int], vocabulary: int) -> list[int]:
    if not isinstance(ids, Tensor):
        raise TypeError(f"beam_search: ids must be a Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"beam_search: ids have dtype {ids.dtype} but must be int64")
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1) or ids.numel() == 0:
        raise ValueError(f"beam_search: ids have shape {tuple(ids.shape)} but must be [T] or [1, T] with T at least 1")
    prompt = ids.flatten().tolist()
    for what, tokens in (("ids", prompt), ("stop_tokens", stop_tokens)):
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise IndexError(f"beam_search: {what} contain {wrong}, but the vocabulary has {vocabulary} tokens")
    return prompt


@overload
def beam_search(
    model: "Transformer | Session",
    ids: Tensor,
    *,
    beams: int = ...,
    max_new_tokens: int,
    length_penalty: float = ...,
    stop_tokens: Sequence[int] = ...,
    return_all: Literal[False] = ...,
) -> Beam: ...


@overload
def beam_search(
    model: "Transformer | Session",
    ids: Tensor,
    *,
    beams: int = ...,
    max_new_tokens: int,
    length_penalty: float = ...,
    stop_tokens: Sequence[int] = ...,
    return_all: Literal[True],
) -> list[Beam]: ...


def beam_search(
    model: "Transformer | Session",
    ids: Tensor,
    *,
    beams: int = 4,
    max_new_tokens: int,
    length_penalty: float = 0.0,
    stop_tokens: Sequence[int] = (),
    return_all: bool = False,
) -> Beam | list[Beam]:
    """The likeliest continuation of ids [T] or [1, T] int64 that the search meets: a Beam, or with return_all up to
    `beams` of them, the best first.

    A heuristic search: a text whose beginning is not among the `beams` likeliest of its length is never seen. One beam
    is greedy decoding; with at least V^max_new_tokens beams nothing is dropped and the best text is found. Texts of
    different lengths compete by log P / n^length_penalty, n new tokens: 0 prefers short texts, 1 takes the mean per
    token. Without stop tokens all texts have max_new_tokens, and the penalty changes nothing.
    A Transformer makes a float32 session of its own; a Session needs batch >= beams, and forgets its texts. There is no
    chance in it. ValueError for the options, too long a text, or logits without a finite maximum; IndexError for ids.
    Formula: log P(y | x) is the sum over t of log P(y_t | x, y_1 .. y_(t-1)).
    """
    if not isinstance(beams, int) or isinstance(beams, bool) or beams < 1:
        raise ValueError(f"beam_search: beams is {beams} but must be a whole number of at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"beam_search: max_new_tokens is {max_new_tokens} but must not be negative")
    if not 0.0 <= length_penalty < math.inf:
        raise ValueError(f"beam_search: length_penalty is {length_penalty} but must be 0 or a positive number")
    prompt, stop = _checked(ids, stop_tokens, model.config.vocab_size), set(stop_tokens)
    longest = model.max_len if isinstance(model, Session) else model.config.block_size
    if len(prompt) + max_new_tokens > longest:
        raise ValueError(f"beam_search: {len(prompt)} tokens and {max_new_tokens} new ones exceed max_len {longest}")
    if isinstance(model, Session) and model.batch < beams:
        raise ValueError(f"beam_search: {beams} beams need a session of as many texts, but its batch is {model.batch}")
    needed = len(prompt) + max_new_tokens
    session = model if isinstance(model, Session) else model.session(max_len=needed, batch=beams)

    def grown(beam: Beam, token: int, total: float) -> Beam:
        n = len(beam.tokens) + 1
        return Beam((*beam.tokens, token), total, total / n**length_penalty, token in stop)

    live, slots, finished = [Beam((), 0.0, 0.0, False)], [0], list[Beam]()
    for step in range(max_new_tokens):
        if step == 0:
            logits = read_prompt(session, prompt)[None]
        else:
            logits = session.extend([torch.tensor(beam.tokens[-1:]) for beam in live], slots)
        logits = logits.cpu()
        if not logits.amax(-1).isfinite().all():
            raise ValueError("beam_search: logits have no finite maximum (NaN or infinity)")
        so_far = torch.tensor([[beam.log_probability] for beam in live], dtype=torch.float64)
        chosen = _likeliest(so_far + logits.double().log_softmax(-1), beams)
        grew = [(parent, grown(live[parent], token, total)) for total, parent, token in chosen]
        finished += [beam for _, beam in grew if beam.ended]
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        parents, live = (
            [parent for parent, beam in grew if not beam.ended],
            [beam for _, beam in grew if not beam.ended],
        )
        if not live or step + 1 == max_new_tokens:
            break
        # log P only falls, and a longer text divides it by more: no descendant of a live text scores above this
        bound = max(beam.log_probability for beam in live) / max_new_tokens**length_penalty
        if len(finished) == beams and finished[-1].score >= bound:
            live = []
            break
        slots = _branch(session.cache, slots, parents, beams)
    found = sorted(finished + live, key=lambda beam: -beam.score)[:beams]
    return found if return_all else found[0]
