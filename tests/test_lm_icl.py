"""Mapping tasks against brute force, what training and evaluation promise, and fine-tuning."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from pykern.lm import Tokenizer, Transformer, generate, icl_finetune
from pykern.lm.icl import (
    OPTIONS,
    checked_shots,
    evaluate_icl,
    make_icl_model,
    train_icl,
    wilson,
)
from pykern.lm.icl_finetune import finetune
from pykern.lm.icl_tasks import IGNORED, MappingTasks
from pykern.lm.scoring import score

pytestmark = pytest.mark.one_isa

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16}
SMALL_TASKS = MappingTasks(keys="abc", labels="01", used=2)


def tokens_of(tasks):
    return Tokenizer.train("character", [tasks.alphabet])


class Lookup(torch.nn.Module):
    """Answers as the best predictor does: the label of the example with the same key, else the first label."""

    def __init__(self, tasks):
        super().__init__()
        self.tasks, self.config = tasks, make_icl_model(tasks, OPTIONS, **TINY)[0].config
        self.device = torch.device("cpu")
        self.modes = []
        ids = tasks.token_ids(tokens_of(tasks))
        self.first = int(ids[tasks.first_label])

    def hidden(self, ids):
        self.modes.append(self.training)
        answers = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, out in zip(ids.tolist(), answers, strict=True):
            known = dict(zip(row[1:-1:2], row[2::2], strict=True))
            out[-1, known.get(row[-1], self.first)] = 1.0
        return answers

    def logits(self, hidden):
        return hidden


# ---- the tasks


@pytest.mark.parametrize(
    ("tasks", "shots"),
    [(SMALL_TASKS, k) for k in (0, 1, 2, 3)] + [(MappingTasks(keys="abc", labels="012", used=3), k) for k in (1, 2, 4)],
)
def test_optimal_accuracy_is_that_of_enumeration(tasks, shots):
    """Every choice of keys, function, order of every round and query; the best guess for each prompt that results."""
    K, L, U = len(tasks.keys), len(tasks.labels), tasks.used
    weights = defaultdict(Fraction)
    rounds = -(-shots // U)
    for keys in itertools.combinations(range(K), U):
        for labels in itertools.product(range(L), repeat=U):
            function = dict(zip(keys, labels, strict=True))
            for orders in itertools.product(itertools.permutations(keys), repeat=rounds):
                shown = [key for order in orders for key in order][:shots]
                for asked in keys:
                    prompt = (*((key, function[key]) for key in shown), asked)
                    weights[prompt, function[asked]] += Fraction(1)
    best, total = defaultdict(Fraction), sum(weights.values())
    for (prompt, _), weight in weights.items():
        best[prompt] = max(best[prompt], weight)
    assert tasks.optimal_accuracy(shots) == sum(best.values()) / total


def test_optimal_accuracy_of_the_defaults():
    tasks = MappingTasks()
    found = [tasks.optimal_accuracy(k) for k in (0, 1, 2, 4, 8)]
    assert found == [Fraction(1, 4), Fraction(7, 16), Fraction(5, 8), 1, 1]
    assert tasks.chance == Fraction(1, 4) and tasks.count == 70 * 256


@pytest.mark.parametrize("shots", [0, 1, 3, 4, 8, 11])
def test_prompts_are_functions_and_the_answer_is_the_functions(shots):
    tasks = MappingTasks()
    drawn = tasks.sample(shots, 200, seed=3)
    assert (
        drawn.prompts.shape == (200, 2 * shots + 2) and drawn.shots == shots and drawn.examples.shape[1:] == (shots, 2)
    )
    keys, labels = range(1, 9), range(9, 13)
    for prompt, examples, answer in zip(drawn.prompts.tolist(), drawn.examples.tolist(), drawn.answers, strict=True):
        assert prompt[0] == 0 and prompt[-1] in keys, "a prompt ends with the key, not with its label"
        assert all(key in keys and label in labels for key, label in examples)
        function = dict(map(tuple, examples))
        assert all(function[key] == label for key, label in examples)
        assert len(function) == min(shots, 4), "a round shows every key of the task"
        assert function.get(prompt[-1], 9 + answer) == 9 + answer
    if shots >= 4:
        assert all(prompt[-1] in prompt[1:-1:2] for prompt in drawn.prompts.tolist())


def test_samples_are_uniform():
    """Chi-square at 0.1 %: keys asked for, labels, place of the key asked for among the examples of one round."""
    drawn = MappingTasks().sample(4, 8000, seed=1)
    place = (drawn.examples[:, :, 0] == drawn.prompts[:, -1:]).argmax(1)
    for values, bound in ((drawn.prompts[:, -1] - 1, 24.32), (drawn.answers, 16.27), (place, 16.27)):
        counts = np.bincount(values)
        expected = len(values) / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < bound
    assert len(np.bincount(drawn.prompts[:, -1] - 1)) == 8


def test_samples_follow_from_the_seed_and_are_not_those_of_training():
    tasks = MappingTasks()
    first, again, other = (tasks.sample(4, 50, seed) for seed in (0, 0, 1))
    assert (first.prompts == again.prompts).all() and (first.answers == again.answers).all()
    assert (first.prompts != other.prompts).any()
    rows = [tasks.training_rows(4, 50, seed=0, step=step)[0] for step in (0, 0, 4)]
    assert (rows[0] == rows[1]).all() and (rows[0] != rows[2]).any()
    assert (rows[2][:, 1:] != first.prompts[:, 1:8]).any(), "stream (seed 0, shots 4) is not (seed 0, step 4)"


def test_training_rows_ask_for_every_label_and_for_nothing_else():
    tasks = MappingTasks()
    symbols, targets = tasks.training_rows(16, 300, seed=0, step=0)
    assert symbols.shape == targets.shape == (300, 32)
    assert (targets[:, ::2] == IGNORED).all() and (targets[:, 1::2] >= tasks.first_label).all()
    assert (symbols[:, 0] == 0).all() and (symbols[:, 2::2] == targets[:, 1:-1:2]).all()
    used = set()
    for keys, labels in zip(symbols[:, 1::2].tolist(), targets[:, 1::2].tolist(), strict=True):
        function = dict(zip(keys, labels, strict=True))
        assert [function[key] for key in keys] == labels
        used.add(len(function))
    assert used == {3, 4}


def test_the_text_of_a_prompt():
    tasks = MappingTasks(keys="xyz", labels="01", used=3)
    drawn = tasks.sample(2, 1, seed=0)
    text = tasks.text(drawn.prompts[0])
    assert len(text) == 6 and text[0] == "\n" and text[5] in "xyz"
    assert [text[1] in "xyz", text[2] in "01", text[3] in "xyz", text[4] in "01"] == [True] * 4
    assert tokens_of(tasks).encode(text) == tasks.token_ids(tokens_of(tasks))[drawn.prompts[0]].tolist()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"keys": ["a", "b"]}, TypeError, "keys must be str, got list"),
        ({"keys": ""}, ValueError, "keys is '' but must have at least 1"),
        ({"labels": "0"}, ValueError, "labels is '0' but must have at least 2"),
        ({"keys": "abca"}, ValueError, "different characters"),
        ({"keys": "ab0d"}, ValueError, "different characters"),
        ({"keys": "abc\n"}, ValueError, "different characters"),
        ({"used": 9}, ValueError, "used is 9 but must be from 1 to 8"),
        ({"used": 2.0}, TypeError, "used must be an integer, got float"),
    ],
)
def test_tasks_refuse(fields, error, words):
    with pytest.raises(error, match=rf"^MappingTasks: .*{words}"):
        MappingTasks(**fields)


def test_sampling_refuses():
    tasks = MappingTasks()
    with pytest.raises(ValueError, match=r"^sample: shots is -1"):
        tasks.sample(-1, 3)
    with pytest.raises(ValueError, match=r"^sample: episodes is 0"):
        tasks.sample(1, 0)
    with pytest.raises(TypeError, match=r"^sample: seed must be an integer, got NoneType"):
        tasks.sample(1, 1, None)
    with pytest.raises(ValueError, match=r"^optimal_accuracy: shots is -2"):
        tasks.optimal_accuracy(-2)
    with pytest.raises(ValueError, match="no token for 'b'"):
        tasks.token_ids(Tokenizer.train("character", ["\na0123"]))


# ---- evaluation


def test_wilson():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson 1927, as tabulated
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    for p in wilson(37, 120):  # the limits solve the equation that defines them
        assert abs(37 / 120 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 120), rel=1e-6)
    with pytest.raises(ValueError, match="correct is 4 but must be from 0 to 3"):
        wilson(4, 3)


def test_the_best_predictor_reaches_the_optimal_accuracy():
    tasks = MappingTasks()
    for row in evaluate_icl(Lookup(tasks), tokens_of(tasks), episodes=2000, seed=5):
        sigma = math.sqrt(row.optimal * (1 - row.optimal) / row.queries)
        assert abs(row.accuracy - row.optimal) <= 3.3 * sigma, row
        assert row.low <= row.accuracy <= row.high and row.method == "in context"


def test_evaluation_is_deterministic_and_keeps_mode_and_weights():
    tasks = MappingTasks()
    model, tokenizer = make_icl_model(tasks, OPTIONS, **TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    first, again, single = (
        evaluate_icl(model, tokenizer, shots=[3, 0], episodes=40, seed=2, batch_size=size) for size in (256, 256, 7)
    )
    assert [(row.shots, row.correct) for row in first] == [(row.shots, row.correct) for row in again]
    assert [row.correct for row in first] == [row.correct for row in single]
    assert [row.shots for row in first] == [3, 0] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lookup = Lookup(tasks).train()
    evaluate_icl(lookup, tokenizer, shots=[1], episodes=5)
    assert lookup.modes == [False] and lookup.training


def test_answers_are_the_likeliest_labels_by_score():
    tasks = MappingTasks()
    model, tokenizer = make_icl_model(tasks, OPTIONS, **TINY)
    ids, drawn = tasks.token_ids(tokenizer), tasks.sample(3, 30, seed=4)
    labels = [[int(token)] for token in ids[tasks.first_label :]]
    correct = 0
    for prompt, answer in zip(drawn.prompts, drawn.answers, strict=True):
        scores = score(model, ids[prompt].tolist(), labels)
        correct += scores.index(max(scores)) == answer
    assert evaluate_icl(model, tokenizer, shots=[3], episodes=30, seed=4)[0].correct == correct


def test_flops_are_those_of_config():
    tasks = MappingTasks()
    model, tokenizer = make_icl_model(tasks, OPTIONS, **TINY)
    row = evaluate_icl(model, tokenizer, shots=[3], episodes=2)[0]
    assert (row.flops_task, row.flops_query) == (0, 8 * model.config.forward_flops_per_token(8))
    row = finetune(model, tokenizer, shots=[3], episodes=2, steps=5)[0]
    assert row.flops_task == 5 * 3 * 2 * 3 * model.config.forward_flops_per_token(2)
    assert row.flops_query == 2 * model.config.forward_flops_per_token(2)


@pytest.mark.parametrize(
    ("shots", "error", "words"),
    [
        ("0,1", TypeError, "shots must be a sequence of integers, got str"),
        (4, TypeError, "shots must be a sequence of integers, got int"),
        ([1.0], TypeError, "shots must be an integer, got float"),
        ([True], TypeError, "shots must be an integer, got bool"),
        ([-1], ValueError, "shots is -1"),
        ([], ValueError, "one number or more"),
        ([1, 2, 1], ValueError, "all different"),
        ([15, 16], ValueError, "16 shots are 34 tokens but block_size is 32"),
    ],
)
def test_shots_refuse(shots, error, words):
    model, tokenizer = make_icl_model(MappingTasks(), OPTIONS, **TINY)
    for function in (evaluate_icl, finetune):
        with pytest.raises(error, match=rf"^{function.__name__}: .*{words}"):
            function(model, tokenizer, shots=shots, episodes=1)


def test_15_shots_fit_the_block_to_the_token():
    model, tokenizer = make_icl_model(MappingTasks(), OPTIONS, **TINY)
    assert evaluate_icl(model, tokenizer, shots=[15], episodes=2)[0].shots == 15
    assert checked_shots("f", (15,), 32) == [15]


# ---- training


def trained_and_fresh(folder, tasks, steps, **shape):
    """Results at 0 and 4 shots after training, and before; the lines that training reported."""
    lines, options = [], replace(OPTIONS, steps=steps, warmup=10)
    model, tokenizer = train_icl(folder, options=options, tasks=tasks, report=lines.append, **shape)
    fresh = make_icl_model(tasks, options, **shape)[0]
    return *(evaluate_icl(m, tokenizer, shots=[0, 4], episodes=500, tasks=tasks) for m in (model, fresh)), lines


def test_a_few_steps_teach_to_copy_the_only_label_shown(tmp_path):
    tasks = MappingTasks(keys="abc", labels="01", used=1)
    after, before, lines = trained_and_fresh(tmp_path / "m", tasks, 40, n_layer=1, block_size=16)
    assert after[1].low > 0.9 > before[1].high, (after[1], before[1])
    assert after[0].low < 0.5 < after[0].high, after[0]
    assert lines[-1].startswith("step 40/40 | loss ")


@pytest.mark.slow
def test_a_short_training_teaches_to_find_the_key(tmp_path):
    """Two keys: who does not look at the key is right in three of four queries."""
    after, before, _ = trained_and_fresh(tmp_path / "m", SMALL_TASKS, 400, n_embd=32, block_size=16)
    assert after[1].low > 0.9 > before[1].high, (after[1], before[1])
    assert after[0].low < 0.5 < after[0].high, after[0]


def test_the_folder_is_an_ordinary_checkpoint(tmp_path):
    options = replace(OPTIONS, steps=2, batch_size=2)
    model, tokenizer = train_icl(tmp_path / "a", options=options, **TINY)
    again, _ = train_icl(tmp_path / "b", options=options, **TINY)
    other, _ = train_icl(tmp_path / "c", options=replace(options, seed=1), **TINY)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = Transformer.load(tmp_path / "a")
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]) and torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(v, other.state_dict()[name]) for name, v in model.state_dict().items())
    assert Tokenizer.load(tmp_path / "a").to_json() == tokenizer.to_json()
    ids = torch.tensor(tokenizer.encode("\na1b2a"))
    assert len(generate(loaded, ids, max_new_tokens=3, seed=0)) == len(ids) + 3
    fresh = make_icl_model(MappingTasks(), options, **TINY)[0]
    assert not torch.equal(fresh.transformer.wte.weight, model.transformer.wte.weight), "training changes the weights"


def test_training_refuses(tmp_path):
    options = replace(OPTIONS, steps=1)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    cases = [
        (tmp_path / "file", {"options": options}, "is not a folder"),
        (tmp_path / "full", {"options": options}, "already holds a checkpoint"),
        (tmp_path / "new", {"options": replace(options, steps=None, minutes=1.0)}, "options.steps is None"),
        (tmp_path / "new", {"options": replace(options, dtype="bfloat16")}, "dtype bfloat16"),
        (tmp_path / "new", {"options": options, "block_size": 3}, "block_size is 3"),
    ]
    for out, arguments, words in cases:
        with pytest.raises(ValueError, match=rf"^train_icl: .*{words}"):
            train_icl(out, **arguments)
    assert not (tmp_path / "new").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


# ---- fine-tuning


def test_fine_tuning_learns_its_examples_and_leaves_the_model_alone():
    """Once all keys are shown, memory of the examples answers every query; without examples it is the model's guess."""
    model, tokenizer = make_icl_model(SMALL_TASKS, OPTIONS, **TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines, arguments = [], {"episodes": 8, "seed": 1, "tasks": SMALL_TASKS}
    rows = finetune(model, tokenizer, shots=[0, 2], steps=20, lr=2e-2, report=lines.append, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rows[1].correct == 8 and rows[0].correct < 8
    assert rows[0].flops_task == rows[0].seconds_task == 0 < rows[1].seconds_task
    in_context = evaluate_icl(model, tokenizer, shots=[0], **arguments)[0]
    assert rows[0].correct == in_context.correct, "no examples, no steps: the same guesses"
    assert len(lines) == 2 and "2 shots | 100.0% of 8" in lines[1]


def test_every_task_is_learned_from_the_given_weights_and_its_own_examples(monkeypatch):
    model, tokenizer = make_icl_model(SMALL_TASKS, OPTIONS, **TINY)
    ids, drawn, seen = SMALL_TASKS.token_ids(tokenizer), SMALL_TASKS.sample(2, 4, seed=1), []
    real = icl_finetune.learn

    def learn(learner, x, y, steps, lr):
        assert learner is not model and learner.training
        given = model.state_dict()
        assert all(torch.equal(value, given[name]) for name, value in learner.state_dict().items())
        real(learner, x, y, steps, lr)
        assert any(not torch.equal(value, given[name]) for name, value in learner.state_dict().items())
        seen.append((x.tolist(), y.tolist(), steps, lr))

    monkeypatch.setattr(icl_finetune, "learn", learn)
    first = finetune(model, tokenizer, shots=[2], episodes=4, seed=1, steps=2, lr=0.05, tasks=SMALL_TASKS)[0]
    wanted = [
        ([[int(ids[0]), int(ids[x])] for x, _ in shown], [[IGNORED, int(ids[y])] for _, y in shown], 2, 0.05)
        for shown in drawn.examples
    ]
    assert seen == wanted
    again = finetune(model, tokenizer, shots=[2], episodes=4, seed=1, steps=2, lr=0.05, tasks=SMALL_TASKS)[0]
    assert first.correct == again.correct


def test_fine_tuning_refuses():
    model, tokenizer = make_icl_model(MappingTasks(), OPTIONS, **TINY)
    for arguments, error, words in [
        ({"lr": 0.0}, ValueError, "lr is 0.0"),
        ({"lr": math.nan}, ValueError, "lr is nan"),
        ({"lr": "1"}, TypeError, "lr must be a number, got str"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"episodes": 0}, ValueError, "episodes is 0"),
    ]:
        with pytest.raises(error, match=rf"^finetune: {words}"):
            finetune(model, tokenizer, **arguments)
