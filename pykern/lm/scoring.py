"""How likely a model finds given tokens: log P(text) = sum over t of log P(token t | tokens before it), in nats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pykern.lm.session import CHUNK, Session

if TYPE_CHECKING:
    from pykern.lm.model import Transformer
    from pykern.lm.tokenizer import Tokenizer

NORMALISATIONS = ("none", "tokens", "bytes")


def checked_tokens(what: str, tokens: Sequence[int], vocabulary: int) -> list[int]:
    """tokens as a list; TypeError unless they are whole numbers, ValueError if empty, IndexError if not in range."""
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
        raise TypeError(f"{what} must be a sequence of token ids, got {type(tokens).__name__}")
    if len(tokens) == 0:
        raise ValueError(f"{what} is empty, but must hold at least one token")
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{what} holds {token!r} at position {position}, but token ids are int")
        if not 0 <= token < vocabulary:
            raise IndexError(f"{what} holds {token} at position {position}, but the vocabulary has {vocabulary} tokens")
    return list(tokens)


@torch.no_grad()
def log_probabilities(model: "Transformer", ids: Tensor) -> Tensor:
    """log P(ids[b, t + 1] | ids[b, : t + 1]) for ids [B, T] int64, at most block_size + 1 long: float32 [B, T - 1].

    Natural logarithms, without dropout and without gradient; the model keeps its mode. The logits [B, T, V] never
    exist at once. What is behind a token does not change its value, so texts of different lengths may be padded at the
    end with any token. TypeError unless ids are int64, ValueError for their shape, IndexError for their values.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"log_probabilities: ids must be a Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"log_probabilities: ids have dtype {ids.dtype} but must be int64")
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"log_probabilities: ids have shape {tuple(ids.shape)} but must be [B, T] with T at least 1")
    B, T = ids.shape
    V, most = model.config.vocab_size, model.config.block_size
    if most + 1 < T:
        raise ValueError(f"log_probabilities: {T} tokens, of which the last is not read, exceed block_size {most}")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= V):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise IndexError(f"log_probabilities: ids contain {wrong}, but the vocabulary has {V} tokens")
    if B == 0 or T == 1:
        return torch.zeros(B, T - 1, device=model.device)
    training = model.training
    model.eval()
    try:
        return -model(ids[:, :-1].to(model.device), ids[:, 1:].to(model.device), reduction="none").float()
    finally:
        model.train(training)


def read_prompt(session: Session, prompt: Sequence[int]) -> Tensor:
    """Forgets the texts and reads the prompt into the first one: logits [V] after it. RuntimeError amid requests."""
    if session.pending:
        raise RuntimeError("session: requests are running; poll() until they are done, or use another session")
    session.reset()
    pieces = torch.tensor(prompt).split(CHUNK)
    for i, piece in enumerate(pieces):
        logits = session.extend([piece], [0], wanted=i + 1 == len(pieces))
    return logits[0]


def _scored_by_session(session: Session, prompt: list[int], candidates: list[list[int]], rows: int) -> list[float]:
    first = read_prompt(session, prompt).double().cpu().log_softmax(-1)
    rows, scores = min(rows, session.batch), []
    for start in range(0, len(candidates), rows):
        group = candidates[start : start + rows]
        longer = [i for i, candidate in enumerate(group) if len(candidate) > 1]
        later = torch.empty(0, dtype=torch.float64)
        if longer:
            for text in longer:
                session.cache.fork(0, text)
            logits = session.extend([torch.tensor(group[i][:-1]) for i in longer], longer, every=True)
            wanted = torch.tensor([token for i in longer for token in group[i][1:]])
            later = logits.double().cpu().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            for text in longer:
                session.cache.truncate(len(prompt), text)
        parts = later.split([len(candidate) - 1 for candidate in group if len(candidate) > 1])
        sums = {i: float(part.sum()) for i, part in zip(longer, parts, strict=True)}
        scores += [float(first[candidate[0]]) + sums.get(i, 0.0) for i, candidate in enumerate(group)]
    return scores


def _scored_in_batches(model: "Transformer", prompt: list[int], candidates: list[list[int]], rows: int) -> list[float]:
    scores = []
    for start in range(0, len(candidates), rows):
        group = candidates[start : start + rows]
        ids = torch.zeros(len(group), len(prompt) + max(map(len, group)), dtype=torch.int64)
        for row, candidate in zip(ids, group, strict=True):
            row[: len(prompt) + len(candidate)] = torch.tensor(prompt + candidate)
        found = log_probabilities(model, ids)[:, len(prompt) - 1 :].double().cpu()
        scores += [float(row[: len(candidate)].sum()) for row, candidate in zip(found, group, strict=True)]
    return scores


def score(
    model: "Transformer | Session",
    prompt: Sequence[int],
    candidates: Sequence[Sequence[int]],
    *,
    normalise: str = "none",
    tokenizer: "Tokenizer | None" = None,
    batch_size: int = 32,
) -> list[float]:
    """log P(candidate | prompt) of each of the candidates, in nats: the sum over the candidate's tokens.

    normalise "tokens" divides by the candidate's number of tokens, "bytes" by the UTF-8 bytes that `tokenizer` says its
    tokens stand for: without either, a longer candidate is the less likely one.
    A Session reads the prompt once, and then up to min(batch_size, session.batch) candidates in a compiled call, each
    on a fork of the prompt's pages; its texts are forgotten. A Transformer reads prompt and candidate, batch_size of
    them at a time, on its own device. Both give the same numbers but for rounding, whatever batch_size is.
    ValueError: no prompt, an empty candidate, or more tokens than the model can read. IndexError: not a token.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"score: normalise is {normalise!r} but must be one of {', '.join(NORMALISATIONS)}")
    if normalise == "bytes" and tokenizer is None:
        raise ValueError("score: normalise='bytes' needs the tokenizer that knows the bytes of a token")
    if batch_size < 1:
        raise ValueError(f"score: batch_size is {batch_size} but must be at least 1")
    V = model.config.vocab_size
    start = checked_tokens("score: the prompt", prompt, V)
    ends = [checked_tokens(f"score: candidate {i}", candidate, V) for i, candidate in enumerate(candidates)]
    most = model.max_len if isinstance(model, Session) else model.config.block_size
    for i, end in enumerate(ends):
        if len(start) + len(end) - 1 > most:
            raise ValueError(
                f"score: {len(start)} tokens of prompt and {len(end)} of candidate {i} exceed the {most} that are read"
            )
    if not ends:
        return []
    if isinstance(model, Session):
        scores = _scored_by_session(model, start, ends, batch_size)
    else:
        scores = _scored_in_batches(model, start, ends, batch_size)
    if normalise == "tokens":
        return [total / len(end) for total, end in zip(scores, ends, strict=True)]
    if normalise == "bytes" and tokenizer is not None:
        lengths = [int(tokenizer.bytes_per_token[end].sum()) for end in ends]
        if min(lengths) < 1:
            raise ValueError(f"score: candidate {lengths.index(min(lengths))} stands for no bytes")
        return [total / length for total, length in zip(scores, lengths, strict=True)]
    return scores


@dataclass(frozen=True)
class TokenProbability:
    """A token of a text: log P(token | tokens before it) in nats, and its rank, 1 for the most likely token."""

    token: int
    log_probability: float
    rank: int

    @property
    def probability(self) -> float:
        return math.exp(self.log_probability)


def token_probabilities(session: Session, prompt: Sequence[int], new: Sequence[int]) -> list[TokenProbability]:
    """What the model thought of each token of `new` after the prompt, before temperature and what cuts the tail.

    In float32 and bfloat16 the logits have the bits of those that a generation of these tokens drew from. Among equally
    likely tokens the lower id has the lower rank. The session's texts are forgotten. Errors as in score.
    """
    start = checked_tokens("token_probabilities: the prompt", prompt, session.config.vocab_size)
    if len(new) == 0:
        return []
    end = checked_tokens("token_probabilities: new", new, session.config.vocab_size)
    if len(start) + len(end) - 1 > session.max_len:
        raise ValueError(
            f"token_probabilities: {len(start)} tokens and {len(end)} new ones exceed max_len {session.max_len}"
        )
    rows, found = read_prompt(session, start)[None], []
    for at in range(0, len(end), CHUNK):
        if at > 0:
            rows = session.extend([torch.tensor(end[at - 1 : at])], [0])
        piece = end[at : at + CHUNK]
        if len(piece) > 1:
            rows = torch.cat([rows, session.extend([torch.tensor(piece[:-1])], [0], every=True)])
        ids = torch.tensor(piece)[:, None]
        logits = rows.double().cpu()
        own = logits.gather(1, ids)
        ahead = (logits > own).sum(1) + ((logits == own) & (torch.arange(logits.shape[1]) < ids)).sum(1)
        values = logits.log_softmax(-1).gather(1, ids)[:, 0]
        found += [TokenProbability(*each) for each in zip(piece, values.tolist(), (ahead + 1).tolist(), strict=True)]
    return found
