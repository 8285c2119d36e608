"""pykern prompt: a zero-, one- or few-shot prompt from a template, and the model's answers with their probabilities.

An answer is a line: its share or probability, its log P in nats, and its text as a JSON string, with tabs between them.
"""

import argparse
import json
import math
from typing import Any

from pykern.cli.parts import add_threads, load_model, set_threads


def add_prompt(commands: Any) -> None:
    parser = commands.add_parser("prompt", help="ask a model with a description and examples", allow_abbrev=False)
    parser.add_argument("--template", required=True, metavar="FILE", help="text with {{name}} and {{#examples}}")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint folder; not needed to only --show")
    parser.add_argument("--description", metavar="TEXT", help="what {{description}} stands for")
    parser.add_argument("--examples", metavar="FILE.jsonl", help="a JSON object per line")
    parser.add_argument("--shots", type=int, metavar="K", help="the first K examples (default: all)")
    parser.add_argument("--separator", metavar="TEXT", default="", help="after each example (default: nothing)")
    parser.add_argument("--query", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--candidates", metavar="A,B,C", help="answers to choose from, spaces included")
    parser.add_argument("--normalise", metavar="HOW", help="of candidates: none (default), tokens or bytes")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="let the model answer in N tokens")
    parser.add_argument("--temperature", type=float, help="of that answer (default 0: the most likely token)")
    parser.add_argument("--seed", type=int, help="same seed, same answer")
    parser.add_argument("--stop", metavar="TEXT", help="the answer ends before this text")
    parser.add_argument("--show", action="store_true", help="print the prompt, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_threads(parser)
    parser.set_defaults(run=prompt)


def check(arguments: argparse.Namespace) -> None:
    """Options that exclude or need each other, before anything is read."""
    candidates, generated = arguments.candidates is not None, arguments.max_new_tokens is not None
    if candidates and generated:
        raise ValueError("--candidates are scored and --max-new-tokens generates: give one of them")
    if not (candidates or generated or arguments.show):
        raise ValueError("give --candidates, --max-new-tokens, or --show to see the prompt only")
    if (candidates or generated) and arguments.model is None:
        raise ValueError("--model is needed to answer")
    for name in ("temperature", "seed", "stop"):
        if getattr(arguments, name) is not None and not generated:
            raise ValueError(f"--{name} is for an answer of --max-new-tokens")
    if arguments.normalise is not None and not candidates:
        raise ValueError("--normalise is for --candidates")
    if arguments.shots is not None and arguments.shots > 0 and arguments.examples is None:
        raise ValueError(f"--shots is {arguments.shots} but there are no --examples")
    if generated and arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens} but must be at least 1")
    if arguments.stop == "":
        raise ValueError("--stop is empty")


def query_of(words: list[str], names: set[str]) -> dict[str, str]:
    query: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--query is {word!r} but must be NAME=VALUE")
        if name in query:
            raise ValueError(f"--query gives {name} twice")
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise ValueError(f"--query gives {name!r}, but the names of the template's query are: {known}")
        query[name] = value
    return query


def rendered(arguments: argparse.Namespace) -> str:
    from pykern.lm.prompting import Template, load_examples

    template = Template.load(arguments.template)
    return template.render(
        description=arguments.description,
        examples=[] if arguments.examples is None else load_examples(arguments.examples),
        query=query_of(arguments.query, template.names),
        shots=arguments.shots,
        separator=arguments.separator,
    )


def chosen(arguments: argparse.Namespace, text: str) -> list[dict[str, Any]]:
    """The candidates, the best first."""
    from pykern.lm.prompting import classify

    model, tokenizer = load_model(arguments.model)
    candidates = arguments.candidates.split(",")
    session = model.session(batch=min(len(candidates), 32))
    _, scores = classify(session, tokenizer, text, candidates, normalise=arguments.normalise or "none")
    most = max(scores)
    if most == -math.inf:
        raise ValueError("no candidate is possible: all have probability 0")
    total = math.fsum(math.exp(value - most) for value in scores)
    answers = [
        {"text": candidate, "share": math.exp(value - most) / total, "score": value}
        for candidate, value in zip(candidates, scores, strict=True)
    ]
    return sorted(answers, key=lambda answer: -float(answer["score"]))


def generated(arguments: argparse.Namespace, text: str) -> list[dict[str, Any]]:
    """The one answer that the model gives."""
    import torch

    from pykern.lm.scoring import token_probabilities

    model, tokenizer = load_model(arguments.model)
    ids, session = tokenizer.encode(text), model.session()
    if not ids:
        raise ValueError("the prompt is empty")
    if len(ids) + arguments.max_new_tokens - 1 > session.max_len:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {arguments.max_new_tokens} new ones exceed block_size {session.max_len}"
        )
    options = {"temperature": arguments.temperature or 0.0, "seed": arguments.seed}
    new, answer = list[int](), ""
    for token in session.stream(torch.tensor([ids]), max_new_tokens=arguments.max_new_tokens, **options):
        new += token.tolist()
        answer = tokenizer.decode(new)
        if arguments.stop is not None and arguments.stop in answer:
            answer = answer[: answer.index(arguments.stop)]
            break
    total = math.fsum(each.log_probability for each in token_probabilities(session, ids, new))
    return [{"text": answer, "probability": math.exp(total), "score": total}]


def prompt(arguments: argparse.Namespace) -> int:
    check(arguments)
    set_threads(arguments.threads)
    text = rendered(arguments)
    if arguments.candidates is not None:
        answers = chosen(arguments, text)
    elif arguments.max_new_tokens is not None:
        answers = generated(arguments, text)
    else:
        answers = []
    if arguments.json:
        print(json.dumps(({"prompt": text} if arguments.show else {}) | {"answers": answers}))
        return 0
    if arguments.show:
        print(text)
    for answer in answers:
        share = answer["share"] if "share" in answer else answer["probability"]
        print(f"{share:.6g}\t{answer['score']:.4f}\t{json.dumps(answer['text'], ensure_ascii=False)}")
    return 0
