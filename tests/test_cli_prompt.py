"""pykern prompt, and pykern generate's --beams, --logprobs and --json: what is printed, and what is refused."""

import json
import math

import pytest
import torch

from pykern.cli import main
from pykern.lm import Config, Tokenizer, Transformer, beam_search, score
from pykern.lm.checkpoint import save_checkpoint

pytestmark = pytest.mark.one_isa
TEMPLATE = "{{description}}\n{{#examples}}\n{{q}} {{a}}\n{{/examples}}\n{{q}}"
PROMPT = "Add.\n1+1 2\n2+2 4\n3+4"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with random weights, larger than the initial ones."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train("byte", [])
    config = Config(n_layer=1, n_head=2, n_embd=32, block_size=48, vocab_size=256, tied_head=False)
    transformer = Transformer(config)
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    folder = tmp_path_factory.mktemp("prompt") / "model"
    save_checkpoint(folder, config=config, tensors=transformer.state_dict(), tokenizer=tokenizer)
    return folder


@pytest.fixture
def files(tmp_path):
    template, examples = tmp_path / "t.txt", tmp_path / "e.jsonl"
    template.write_text(TEMPLATE + "\n")
    examples.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in (("1+1", 2), ("2+2", 4), ("0+9", 9))))
    return ["--template", str(template), "--examples", str(examples), "--description", "Add.", "--query", "q=3+4"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refusal(capsys, command):
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"pykern {command}: ") and len(printed.err.splitlines()) == 1
    return printed.err


# ---- prompt


def test_show_needs_no_model(files, capsys):
    assert run("prompt", *files, "--shots", 2, "--show") == 0
    assert capsys.readouterr().out == PROMPT + "\n"
    assert run("prompt", *files, "--shots", 0, "--show", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "Add.\n3+4", "answers": []}
    assert run("prompt", *files, "--separator", "; ", "--show") == 0
    assert capsys.readouterr().out == "Add.\n1+1 2\n; 2+2 4\n; 0+9 9\n; 3+4\n"


@pytest.mark.parametrize("normalise", ["none", "tokens"])
def test_candidates_with_their_share(model, files, capsys, normalise):
    """The best first, beside softmax over the scores of `score`."""
    candidates = [" 7", " 12", "x"]
    arguments = [*files, "--shots", 2, "--model", model, "--candidates", ",".join(candidates), "--normalise", normalise]
    assert run("prompt", *arguments, "--show") == 0
    lines = capsys.readouterr().out.removeprefix(PROMPT + "\n").splitlines()
    ids = [list(candidate.encode()) for candidate in candidates]
    scores = score(Transformer.load(model), list(PROMPT.encode()), ids, normalise=normalise)
    order = sorted(range(3), key=lambda i: -scores[i])
    shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    assert [json.loads(line.split("\t")[2]) for line in lines] == [candidates[i] for i in order]
    assert [float(line.split("\t")[1]) for line in lines] == pytest.approx([scores[i] for i in order], abs=1e-4)
    assert [float(line.split("\t")[0]) for line in lines] == pytest.approx([shares[i] for i in order], rel=1e-4)
    assert run("prompt", *arguments, "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert set(answers) == {"answers"} and math.fsum(a["share"] for a in answers["answers"]) == pytest.approx(1)
    assert [a["text"] for a in answers["answers"]] == [candidates[i] for i in order]


def test_a_generated_answer_and_its_probability(model, files, capsys):
    """Greedy unless told otherwise: the text of a session, and the product of its tokens' probabilities."""
    prompt = list(PROMPT.encode())
    session = Transformer.load(model).session()
    new = session.generate(torch.tensor([prompt]), max_new_tokens=9, temperature=0)[0, len(prompt) :].tolist()
    (total,) = score(session, prompt, [new])
    arguments = [*files, "--shots", 2, "--model", model, "--max-new-tokens", 9]
    assert run("prompt", *arguments) == 0
    p, log_p, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert json.loads(text) == bytes(new).decode(errors="replace")
    assert float(p) == pytest.approx(math.exp(total), rel=1e-5) and float(log_p) == pytest.approx(total, abs=1e-4)
    assert run("prompt", *arguments, "--temperature", 2, "--seed", 5, "--json") == 0
    (drawn,) = json.loads(capsys.readouterr().out)["answers"]
    ids = session.generate(torch.tensor([prompt]), max_new_tokens=9, temperature=2, seed=5)[0, len(prompt) :].tolist()
    assert drawn["text"] == bytes(ids).decode(errors="replace") != json.loads(text)


def test_stop_ends_the_answer_before_it(model, files, capsys):
    """The probability is that of the tokens up to the one that brought the stop."""
    prompt = list(PROMPT.encode())
    session = Transformer.load(model).session()
    ids = session.generate(torch.tensor([prompt]), max_new_tokens=20, temperature=9.0, seed=3)[
        0, len(prompt) :
    ].tolist()
    at = next(i for i, token in enumerate(ids) if i > 2 and 32 < token < 127 and token not in ids[:i])
    arguments = [
        *files,
        "--shots",
        2,
        "--model",
        model,
        "--max-new-tokens",
        20,
        "--temperature",
        9,
        "--seed",
        3,
        "--json",
    ]
    assert run("prompt", *arguments, "--stop", chr(ids[at])) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["text"] == bytes(ids[:at]).decode(errors="replace")
    assert [answer["score"]] == pytest.approx(score(session, prompt, [ids[: at + 1]]), abs=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give --candidates, --max-new-tokens, or --show to see the prompt only"),
        (["--candidates", "a,b"], "--model is needed to answer"),
        (["--candidates", "a,b", "--max-new-tokens", 3], "--candidates are scored and --max-new-tokens generates"),
        (["--show", "--temperature", 1], "--temperature is for an answer of --max-new-tokens"),
        (["--candidates", "a", "--model", "{model}", "--seed", 1], "--seed is for an answer of --max-new-tokens"),
        (["--candidates", "a", "--model", "{model}", "--stop", "x"], "--stop is for an answer of --max-new-tokens"),
        (["--show", "--normalise", "tokens"], "--normalise is for --candidates"),
        (["--max-new-tokens", 0, "--model", "{model}"], "--max-new-tokens is 0 but must be at least 1"),
        (["--max-new-tokens", 3, "--model", "{model}", "--stop", ""], "--stop is empty"),
        (["--max-new-tokens", 40, "--model", "{model}"], "26 tokens and 40 new ones exceed block_size 48"),
        (
            ["--candidates", "a," + "b" * 40, "--model", "{model}"],
            "26 tokens of prompt and 40 of candidate 1 exceed the 48",
        ),
        (["--candidates", "a,,b", "--model", "{model}"], "candidate '' has no tokens"),
        (["--candidates", "a,a", "--model", "{model}"], "'a' is twice among the candidates"),
        (
            ["--candidates", "a", "--model", "{model}", "--normalise", "words"],
            "normalise is 'words' but must be one of",
        ),
        (["--candidates", "a", "--model", "nowhere"], "nowhere"),
        (["--show", "--shots", 4], "shots is 4 but must be from 0 to the 3 examples"),
        (["--show", "--query", "r=1"], "--query gives 'r', but the names of the template's query are: q"),
        (["--show", "--query", "q=1"], "--query gives q twice"),
        (["--show", "--query", "q"], "--query is 'q' but must be NAME=VALUE"),
    ],
)
def test_prompt_refuses_in_one_line(model, files, arguments, words, capsys):
    arguments = [str(argument).replace("{model}", str(model)) for argument in arguments]
    assert run("prompt", *files, *arguments) == 1
    assert words in refusal(capsys, "prompt")


def test_prompt_refuses_files_and_missing_examples(files, tmp_path, capsys):
    template = files[:2]
    assert run("prompt", *template, "--shots", 2, "--show") == 1
    assert "--shots is 2 but there are no --examples" in refusal(capsys, "prompt")
    assert run("prompt", *template, "--query", "q=1", "--show") == 1
    assert "line 1: {{description}} needs a description, but there is none" in refusal(capsys, "prompt")
    (tmp_path / "t.txt").write_text("a\n{{q")
    assert run("prompt", *template, "--show") == 1
    assert f"{tmp_path}/t.txt: template: line 2: {{{{ is not closed" in refusal(capsys, "prompt")
    with pytest.raises(SystemExit) as end:
        run("prompt", "--show")
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---- generate


def generate(model, *arguments, prompt="def "):
    return run("generate", "--model", model, "--prompt", prompt, "--max-new-tokens", 12, *arguments)


def test_generate_beams(model, capsys):
    found = beam_search(
        Transformer.load(model), torch.tensor(list(b"def ")), beams=3, max_new_tokens=12, return_all=True
    )
    text = bytes(found[0].tokens).decode(errors="replace")
    assert generate(model, "--beams", 3) == 0
    printed = capsys.readouterr()
    assert printed.out == f"def {text}\n"
    assert printed.err.startswith("prompt: 4 tokens; new: 12 tokens, beams: 3, ")
    assert printed.err.endswith(f" s; log P {found[0].log_probability:.4f}\n")
    assert generate(model, "--beams", 3, "--length-penalty", 1, "--json", "--quiet") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.err == "" and set(result) == {"prompt", "text", "beams"} and result["text"] == text
    assert [beam["log_probability"] for beam in result["beams"]] == pytest.approx([b.log_probability for b in found])
    assert [beam["score"] for beam in result["beams"]] == pytest.approx([b.log_probability / 12 for b in found])


def test_generate_one_beam_is_temperature_0(model, capsys):
    assert generate(model, "--beams", 1, "--quiet") == 0
    searched = capsys.readouterr().out
    assert generate(model, "--temperature", 0, "--quiet") == 0
    assert capsys.readouterr().out == searched


@pytest.mark.parametrize("how", [["--seed", "1"], ["--beams", "2"]])
def test_generate_logprobs(model, how, capsys):
    """A line per token: text, the model's own probability, rank; the same in JSON, with the sum."""
    assert generate(model, *how, "--quiet") == 0
    text = capsys.readouterr().out
    assert generate(model, *how, "--quiet", "--logprobs") == 0
    out = capsys.readouterr().out
    assert out.startswith(text)
    lines = [line.split("\t") for line in out.removeprefix(text).splitlines()]
    assert generate(model, *how, "--quiet", "--logprobs", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] + result["text"] + "\n" == text and len(lines) == len(result["tokens"]) == 12
    ids = [token["id"] for token in result["tokens"]]
    logits = Transformer.load(model)(torch.tensor([[*b"def ", *ids]]))[0, 3:-1].detach().double()
    for row, token, line in zip(logits, result["tokens"], lines, strict=True):
        assert token["probability"] == pytest.approx(float(row.softmax(0)[token["id"]]))
        assert token["rank"] == 1 + int((row > row[token["id"]]).sum())
        assert [json.loads(line[0]), int(line[2])] == [token["text"], token["rank"]]
        assert float(line[1]) == pytest.approx(token["probability"], rel=1e-5)
    assert result["log_probability"] == pytest.approx(math.fsum(t["log_probability"] for t in result["tokens"]))
    assert ("beams" in result) == ("--beams" in how)


def test_generate_json_of_a_longer_text_than_the_block(model, capsys):
    assert generate(model, "--max-new-tokens", 60, "--seed", 1, "--quiet") == 0
    text = capsys.readouterr().out
    assert generate(model, "--max-new-tokens", 60, "--seed", 1, "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "prompt": "def ",
        "text": text.removeprefix("def ").removesuffix("\n"),
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--beams", 0], "--beams is 0 but must be at least 1"),
        *(
            (["--beams", 2, f"--{name}", 1], f"--beams is a search without chance: leave --{name} out")
            for name in ("temperature", "top-k", "top-p", "min-p", "repetition-penalty", "seed")
        ),
        (["--length-penalty", 1], "--length-penalty ranks what --beams finds: give --beams, too"),
        (["--beams", 2, "--length-penalty", -1], "length_penalty is -1.0 but must be 0 or a positive number"),
        (["--beams", 2, "--max-new-tokens", 45], "4 tokens and 45 new ones exceed max_len 48"),
        (["--logprobs", "--max-new-tokens", 46], "--logprobs: 4 tokens and 46 new ones do not fit into block_size 48"),
    ],
)
def test_generate_refuses_in_one_line(model, arguments, words, capsys):
    assert generate(model, *arguments) == 1
    assert words in refusal(capsys, "generate")
