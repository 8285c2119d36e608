"""lm-evaluation-harness over a checkpoint folder, as its model "pykern".

    python -m pykern.integrations.lm_eval run --model pykern --model_args pretrained=FOLDER --tasks …

The harness asks for log P(continuation | context), for log P(text) in windows, and for text up to a stop string.
Scorer answers in plain Python; register() makes of it the class that the harness knows.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pykern.lm.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from pykern.lm.model import Transformer
    from pykern.lm.tokenizer import Tokenizer

ROWS = 256  # of logits at a time, in float64
BEGINNINGS = ("<|endoftext|>", "<s>", "<|begin_of_text|>")  # special tokens that other projects put before a text
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's names for one thing
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@torch.no_grad()
def end_scores(
    model: "Transformer", rows: Sequence[tuple[Sequence[int], int]], batch_size: int = 8
) -> list[tuple[float, bool]]:
    """For each (tokens, n): log P of the last n tokens after those before them, in nats, and whether each was the
    likeliest one.

    At most block_size + 1 tokens, 1 <= n < len(tokens). Rows are padded at their end, where causal attention does not
    look, and sorted by length.
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        ids = torch.zeros(len(group), len(rows[group[0]][0]) - 1, dtype=torch.int64)
        for row, i in zip(ids, group, strict=True):
            tokens = rows[i][0]
            row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
        hidden = model.hidden(ids)
        for states, i in zip(hidden, group, strict=True):
            tokens, n = rows[i]
            wanted = torch.tensor(tokens[-n:])
            total, greedy = 0.0, True
            ends = states[len(tokens) - 1 - n : len(tokens) - 1]
            for part, target in zip(ends.split(ROWS), wanted.split(ROWS), strict=True):
                logits = model.logits(part).double()
                total += float(logits.log_softmax(-1).gather(1, target[:, None]).sum())
                greedy = greedy and bool((logits.max(-1).indices == target).all())
            results[i] = (total, greedy)
    return results


def windows(tokens: Sequence[int], prefix: int, longest: int) -> list[tuple[list[int], int]]:
    """(tokens, n) for end_scores that predict each token once, at most `longest` after one another.

    The first window begins with prefix. The last one reads as much as the others, and predicts only what is left.
    """
    text = [prefix, *tokens]
    rows = []
    for begin in range(0, len(tokens), longest):
        end = min(begin + longest, len(tokens))
        rows.append((text[max(0, end - longest) : end + 1], end - begin))
    return rows


class Scorer:
    """The answers to the harness's three questions, for a model and its tokenizer.

    prefix, a special token's name or a text, is what an empty context is taken to be: by default the special token that
    begins a text, else a line break. add_bos_token puts it before every context.
    """

    def __init__(
        self,
        model: "Transformer",
        tokenizer: "Tokenizer",
        *,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        prefix: str | None = None,
        add_bos_token: bool = False,
    ) -> None:
        if batch_size < 1 or max_gen_toks < 1:
            raise ValueError(f"pykern: batch_size {batch_size} and max_gen_toks {max_gen_toks} must be at least 1")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.max_gen_toks, self.add_bos_token = batch_size, max_gen_toks, add_bos_token
        self.longest = model.config.block_size
        special = tokenizer.special_tokens
        if prefix is None:
            prefix = next((name for name in BEGINNINGS if name in special), "\n")
        ids = [special[prefix]] if prefix in special else tokenizer.encode(prefix)
        if not ids:
            raise ValueError("pykern: prefix is empty, but an empty context needs a token to begin with")
        self.prefix = ids[-1]
        self.session = model.session()

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, as the harness splits them: spaces at the end of the context belong to the continuation, and
        the continuation is what the tokens of the whole have beyond the number of those of the context."""
        kept = context.rstrip()
        before = self.tokenizer.encode(kept)
        after = self.tokenizer.encode(context + continuation)[len(before) :]
        if not after:  # the pair is no longer than its context: a merge goes across the border
            after = self.tokenizer.encode(context[len(kept) :] + continuation)
        if self.add_bos_token or not before:
            before = [self.prefix, *before]
        return before, after

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log P(continuation | context) in nats, whether greedy decoding writes the continuation) of each pair.

        A context too long for the block loses its beginning; a continuation of more than block_size tokens is a
        ValueError.
        """
        rows: list[tuple[list[int], int]] = []
        empty = []
        for i, (context, continuation) in enumerate(pairs):
            before, after = self.split(context, continuation)
            if not after:
                empty.append(i)
                continue
            if len(after) > self.longest:
                raise ValueError(
                    f"pykern: continuation {i} has {len(after)} tokens, but the model reads {self.longest} at once"
                )
            rows.append(([*before, *after][-self.longest - 1 :], len(after)))
        scores = end_scores(self.model, rows, self.batch_size)
        for i in empty:
            scores.insert(i, (0.0, True))
        return scores

    def loglikelihood_rolling(self, texts: Iterable[str]) -> list[float]:
        """log P(text) in nats of each text, its first token after the prefix, in windows of block_size tokens."""
        parts = [windows(self.tokenizer.encode(text), self.prefix, self.longest) for text in texts]
        scores = iter(end_scores(self.model, [row for rows in parts for row in rows], self.batch_size))
        return [sum((next(scores)[0] for _ in rows), 0.0) for rows in parts]

    def options(self, given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """(stop strings, most tokens, options of Session.stream) of the harness's arguments; ValueError: unknown."""
        values = dict(given)
        until = values.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(stop, str) and stop for stop in until):
            raise ValueError(f"pykern: until is {until!r}, expected texts that are not empty")
        lengths = [values.pop(name) for name in LENGTHS if values.get(name) is not None]
        most = int(lengths[0]) if lengths else self.max_gen_toks
        sample, temperature = values.pop("do_sample", None), values.pop("temperature", None)
        if sample is None:
            sample = bool(temperature)
        temperature = 1.0 if temperature is None else float(temperature)
        options: dict[str, Any] = {"temperature": temperature if sample else 0.0, "seed": values.pop("seed", 0)}
        options |= {name: values.pop(name) for name in SAMPLING if name in values}
        if values.get("num_beams") == 1:
            del values["num_beams"]
        unknown = [name for name, value in values.items() if value not in (None, False)]
        if unknown:
            raise ValueError(f"pykern: generation argument {unknown[0]} is not supported")
        return until, most, options

    def generate_until(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each context, up to the first stop string, which is left out, or the most tokens.

        A context keeps its last block_size - max_gen_toks tokens, but at least half of the block. Request i draws with
        seed + i, and the seed is 0 unless given: the same request twice gives two texts.
        """
        texts = []
        for i, (context, arguments) in enumerate(requests):
            until, most, options = self.options(arguments)
            options["seed"] += i
            before = self.tokenizer.encode(context)
            before = [self.prefix, *before] if self.add_bos_token or not before else before
            room = max(self.longest - most, self.longest // 2, 1)
            ids = torch.tensor([before[-room:]])
            new: list[int] = []
            text = ""
            for token in self.session.stream(ids, max_new_tokens=most, **options):
                new.append(int(token))
                text = self.tokenizer.decode(new)
                if any(stop in text for stop in until):
                    break
            ends = [text.index(stop) for stop in until if stop in text]
            texts.append(text[: min(ends)] if ends else text)
        return texts


def load_scorer(pretrained: str, **options: Any) -> Scorer:
    """The Scorer of a checkpoint folder. FileNotFoundError or ValueError, as load_checkpoint's."""
    from pykern.lm.model import Transformer, expected_tensors

    loaded = load_checkpoint(Path(pretrained), expected=expected_tensors, training=False)
    if loaded.tokenizer is None:
        raise ValueError(f"{pretrained} has no tokenizer.json")
    return Scorer(Transformer.from_checkpoint(loaded), loaded.tokenizer, **options)


@cache
def register() -> Any:
    """The harness's model class over Scorer, known to it as "pykern". ImportError without the lm_eval package.

    Its arguments are pretrained, the checkpoint folder, and those of Scorer; batch_size "auto" is 8. The model runs on
    the CPU: a device is accepted, because the harness's command line says cuda:0 unless told otherwise, and not used.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise ImportError("pykern: the lm_eval package is missing: pip install lm_eval") from None

    @register_model("pykern")
    class PykernLM(LM):
        """A pykern checkpoint folder as a model of the harness."""

        def __init__(
            self,
            pretrained: str,
            batch_size: int | str = 8,
            max_batch_size: int | None = None,
            device: str | None = None,
            **options: Any,
        ) -> None:
            super().__init__()
            if str(batch_size) == "auto":
                batch_size = 8
            self.scorer = load_scorer(pretrained, batch_size=int(batch_size), **options)

        def _answered(self, what: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(what, request.args, answer)
            return answers

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            answers = self.scorer.loglikelihood(request.args for request in requests)
            return self._answered("loglikelihood", requests, answers)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            answers = self.scorer.loglikelihood_rolling(request.args[0] for request in requests)
            return self._answered("loglikelihood_rolling", requests, answers)

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = self.scorer.generate_until(request.args for request in requests)
            return self._answered("generate_until", requests, answers)

    return PykernLM


def main() -> None:
    """The harness's own command line, which then knows the model "pykern"."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
