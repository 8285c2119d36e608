"""Prompt templates: what is written for 0, 1 and more shots, what is refused and in which words; answers by score."""

import math

import pytest
import torch
from lm_models import make

from pykern.lm import Template, Tokenizer, classify, score
from pykern.lm.prompting import MAX_EXAMPLES_BYTES, MAX_TEMPLATE_BYTES, load_examples

pytestmark = pytest.mark.one_isa
TEXT = """{{description}}

{{#examples}}
Review: {{text}}
Sentiment: {{label}}

{{/examples}}
Review: {{text}}
Sentiment:"""
EXAMPLES = [{"text": "fine", "label": "good"}, {"text": "dull", "label": "bad"}, {"text": "long", "label": "bad"}]
QUERY = {"text": "great"}
ZERO = "Judge.\n\nReview: great\nSentiment:"
ONE = "Judge.\n\nReview: fine\nSentiment: good\n\nReview: great\nSentiment:"
TWO = "Judge.\n\nReview: fine\nSentiment: good\n\nReview: dull\nSentiment: bad\n\nReview: great\nSentiment:"


def render(text=TEXT, **options):
    return Template.parse(text).render(**{"description": "Judge.", "examples": EXAMPLES, "query": QUERY} | options)


# ---- what is written


@pytest.mark.parametrize("shots, expected", [(0, ZERO), (1, ONE), (2, TWO)])
def test_shots(shots, expected):
    assert render(shots=shots) == expected


def test_all_examples_without_shots_and_none_without_examples():
    assert render() == render(shots=3) and render().count("Review:") == 4
    assert render(examples=[]) == ZERO


def test_separator_follows_every_example():
    text = "{{#examples}}{{text}}={{label}}{{/examples}}{{text}}="
    assert render(text, description=None, separator="; ", shots=2) == "fine=good; dull=bad; great="
    assert render(text, description=None, separator="; ", shots=0) == "great="


def test_values_are_inserted_as_they_are():
    """No format language, no second reading: what looks like a tag or an attribute in a value is text."""
    strange = "{{label}} {text.__class__} {0} %s \\n {{#examples}} {{{{"
    assert render("{{text}}!", description=None, shots=0, query={"text": strange}) == strange + "!"
    assert (
        render("{{#examples}}{{text}}|{{/examples}}", description=None, examples=[{"text": strange}]) == strange + "|"
    )
    assert render("{{text}} {{n}}", description=None, shots=0, query={"text": 3, "n": 0.5}) == "3 0.5"


def test_braces_of_the_template():
    assert render('{"a": {{text}}} } }} {', description=None, shots=0) == '{"a": great} } }} {'
    assert render("{{{{text}} {{ text }}", description=None, shots=0) == "{{text}} great"


def test_a_tag_of_the_block_takes_its_line_only_when_it_is_alone_there():
    assert render("a\n  {{#examples}}  \nx\n\t{{/examples}}\nb", description=None, shots=2) == "a\nx\nx\nb"
    assert render("a\n{{#examples}}x\n{{/examples}} b", description=None, shots=2) == "a\nx\nx\n b"
    assert render("a\n{{#examples}}\r\nx{{/examples}}", description=None, shots=2) == "a\nxx"
    assert render("{{text}}\n", description=None, shots=0) == "great\n"


def test_names_that_are_not_used_are_passed_over():
    assert render("{{text}}", description=None, shots=0, query={"text": "a", "label": "b"}) == "a"
    assert Template.parse(TEXT).names == {"text"}
    assert render("{{#examples}}{{label}} {{/examples}}?", description=None, query=None) == "good bad bad ?"


def test_random_values_come_back():
    """A template of n names renders to its values with the text between them, whatever they hold."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        picks = torch.randint(0, 8, (3, 6), generator=generator).tolist()
        a, b, c = ("".join("{}#/\n ax"[i] for i in row) for row in picks)
        assert (
            render("<{{a}}|{{b}}|{{c}}>", description=None, shots=0, query={"a": a, "b": b, "c": c}) == f"<{a}|{b}|{c}>"
        )


# ---- refusals


@pytest.mark.parametrize(
    "text, words",
    [
        ("a\n{{text", r"line 2: \{\{ is not closed by \}\}"),
        ("{{text\n}}", r"line 1: \{\{ is not closed by \}\}"),
        ("a\n\n{{a b}}", r"line 3: \{\{a b\}\} is not a placeholder: a name of letters, digits and _"),
        ("{{}}", r"line 1: \{\{\}\} is not a placeholder"),
        ("{{text.__class__}}", r"line 1: \{\{text.__class__\}\} is not a placeholder"),
        ("{{#example}}", r"line 1: \{\{#example\}\} is not a placeholder"),
        ("{{tëxt}}", r"line 1: \{\{tëxt\}\} is not a placeholder"),
        ("x\n{{#examples}}\ny", r"line 2: \{\{#examples\}\} is not closed by \{\{/examples\}\}"),
        ("x\n\n{{/examples}}", r"line 3: \{\{/examples\}\} without \{\{#examples\}\}"),
        (
            "{{#examples}}\n{{#examples}}\n{{/examples}}",
            r"line 2: a second \{\{#examples\}\}: there is one block at most",
        ),
        ("{{#examples}}\n{{/examples}}\n{{/examples}}", r"line 3: \{\{/examples\}\} without"),
        ("{{#examples}}{{/examples}}\n{{#examples}}{{/examples}}", r"line 2: a second \{\{#examples\}\}"),
        ("{{#examples}}\n{{description}}{{/examples}}", r"line 2: \{\{description\}\} belongs outside of the examples"),
    ],
)
def test_templates_that_are_refused(text, words):
    with pytest.raises(ValueError, match="^template: " + words):
        Template.parse(text)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"query": {"x": 1}}, ValueError, r"line 8: \{\{text\}\} is not in the query, which has x$"),
        ({"query": {}}, ValueError, r"line 8: \{\{text\}\} is not in the query, which has nothing$"),
        (
            {"query": None, "description": None},
            ValueError,
            r"line 1: \{\{description\}\} needs a description, but there is none",
        ),
        (
            {"examples": [EXAMPLES[0], {"text": "x", "tag": "y"}]},
            ValueError,
            r"line 5: \{\{label\}\} is not in example 2, which has text, tag",
        ),
        ({"shots": 4}, ValueError, "shots is 4 but must be from 0 to the 3 examples"),
        ({"shots": -1}, ValueError, "shots is -1 but must be from 0 to the 3 examples"),
        ({"query": {"text": None}}, TypeError, "the query: text must be text or a number, got NoneType"),
        ({"query": {"text": True}}, TypeError, "the query: text must be text or a number, got bool"),
        ({"query": QUERY | {"description": "x"}}, ValueError, "description is an argument of its own"),
        ({"text": "{{text}}"}, ValueError, r"shots is 3 but there is no \{\{#examples\}\} block"),
        ({"text": "{{text}}", "shots": 0}, ValueError, r"a description was given, but there is no \{\{description\}\}"),
    ],
)
def test_render_refuses(options, error, words):
    with pytest.raises(error, match="^template: " + words):
        render(**options)


def test_only_text_is_a_template():
    with pytest.raises(TypeError, match="template: text must be str, got bytes"):
        Template.parse(b"{{text}}")


# ---- files


def test_a_file_is_its_text_without_the_last_line_end(tmp_path):
    path = tmp_path / "t.txt"
    for data in (TEXT.encode(), (TEXT + "\n").encode(), b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()):
        path.write_bytes(data)
        assert Template.load(path) == Template.parse(TEXT)
    path.write_text("{{text}}\n\n")
    assert Template.load(path).render(query=QUERY) == "great\n"


@pytest.mark.parametrize("data, words", [(b"a\n{{", "template: line 2:"), (b"caf\xe9", "not UTF-8 at byte 3")])
def test_files_that_are_refused_by_name(tmp_path, data, words):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        Template.load(path)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_missing_and_huge_files(tmp_path):
    for load, most in ((Template.load, MAX_TEMPLATE_BYTES), (load_examples, MAX_EXAMPLES_BYTES)):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(tmp_path / "none")
        with pytest.raises(ValueError, match="not a regular file"):
            load(tmp_path)
        with (tmp_path / "huge").open("wb") as file:
            file.truncate(most + 1)
        with pytest.raises(ValueError, match=f"{most + 1} bytes, but at most {most} are accepted"):
            load(tmp_path / "huge")


def test_examples_of_a_file(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text('{"text": "a\\u2028b", "n": 3}\n{"text": "é", "n": 0.5}\n', encoding="utf-8")
    assert load_examples(path) == [{"text": "a\u2028b", "n": 3}, {"text": "é", "n": 0.5}]


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "the object is empty"),
        ('{"text": NaN}', "NaN is not JSON"),
        ('{"text": 1, "text": 2}', "a key appears twice"),
        ('{"text": null}', "text must be text or a number, got NoneType"),
        ('{"text": ["a"]}', "text must be text or a number, got list"),
        ("[" * 100000, "JSON nested too deeply"),
    ],
)
def test_examples_that_are_refused_by_line(tmp_path, line, words):
    path = tmp_path / "e.jsonl"
    path.write_text('{"text": "a"}\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=f"line 2: .*{words}"):
        load_examples(path)


# ---- answers


@pytest.fixture(scope="module")
def reader():
    tokenizer = Tokenizer.train("character", "abcdé")
    return make(vocab_size=tokenizer.vocab_size), tokenizer


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_classify_takes_the_best_of_the_scores(reader, normalise):
    model, tokenizer = reader
    candidates = ["d", "ab", "é", "cab", "b"]
    ids = [tokenizer.encode(candidate) for candidate in candidates]
    expected = score(model, tokenizer.encode("bad"), ids, normalise=normalise, tokenizer=tokenizer)
    for way in (model, model.session(batch=2)):
        best, scores = classify(way, tokenizer, "bad", candidates, normalise=normalise)
        assert scores == pytest.approx(expected, abs=1e-5)
        assert best == candidates[expected.index(max(expected))]


def test_classify_follows_the_prompt(reader):
    """Which candidate wins depends on what was asked."""
    model, tokenizer = reader
    assert len({classify(model, tokenizer, prompt, list("abcd"))[0] for prompt in ("a", "ab", "dd", "cdc", "b")}) > 1


def test_first_of_equals():
    tokenizer = Tokenizer.train("character", "abc")
    model = make(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # the tied head: all logits are 0
    assert classify(model, tokenizer, "a", ["c", "a", "b"])[0] == "c"


@pytest.mark.parametrize(
    "prompt, candidates, error, words",
    [
        ("a", [], ValueError, "there are no candidates"),
        ("a", ["b", "c", "b"], ValueError, "'b' is twice among the candidates"),
        ("a", ["b", ""], ValueError, "candidate '' has no tokens"),
        ("", ["b"], ValueError, "the prompt has no tokens"),
        ("a", "bc", TypeError, "candidates must be a sequence of str"),
        ("a", [1], TypeError, "candidates must be a sequence of str"),
    ],
)
def test_classify_refuses(reader, prompt, candidates, error, words):
    with pytest.raises(error, match="^classify: " + words):
        classify(*reader, prompt, candidates)


def test_classify_refuses_broken_logits(reader):
    model = make(vocab_size=reader[1].vocab_size)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    for way in (model, model.session(batch=2)):
        with pytest.raises(ValueError, match="classify: log P of a candidate is not a number"):
            classify(way, reader[1], "ab", ["a", "b"])
