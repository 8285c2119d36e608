"""The two ways to train in bfloat16: float32 weights under torch.autocast, or bfloat16 weights with float32 masters."""

import json

import pytest
import torch
from lm_models import SHAPES
from lm_training import OPTIONS, assert_same, changed, losses, make_data, make_trainer, weights

from pykern.lm import Config, Trainer, TrainOptions, Transformer, evaluate
from pykern.lm.checkpoint import load_checkpoint
from pykern.lm.trainer import make_model

AUTOCAST, MASTERS = (changed(dtype="bfloat16", autocast=autocast) for autocast in (True, False))


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def moments(trainer):
    state = trainer.optimizer.state
    return {
        f"{key} {name}": state[p][key].clone()
        for name, p in trainer.model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }


# ---- autocast


def test_autocast_holds_in_training_and_evaluation(tmp_path):
    """Every forward pass of a run, and no backward pass, is under torch.autocast to bfloat16."""
    trainer = make_trainer(tmp_path, AUTOCAST)
    forward, forwards, backwards = trainer.model.forward, [], []

    def seen(*args, **kwargs):
        forwards.append((trainer.model.training, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return forward(*args, **kwargs)

    trainer.model.forward = seen
    trainer.model.transformer.wte.weight.register_hook(lambda _: backwards.append(torch.is_autocast_enabled("cpu")))
    trainer.run()
    assert set(forwards) == {(training, True, torch.bfloat16) for training in (True, False)}
    assert backwards == [False] * OPTIONS.steps
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_keeps_weights_gradients_and_moments_in_float32(tmp_path):
    trainer = make_trainer(tmp_path, AUTOCAST)
    trainer.run()
    for name, p in trainer.model.named_parameters():
        state = trainer.optimizer.state[p]
        assert p.dtype == p.grad.dtype == state["exp_avg"].dtype == torch.float32, name
        assert "master" not in state, name
    assert_same(dict(Transformer.load(tmp_path).state_dict()), dict(trainer.model.state_dict()))


def test_evaluation_is_that_of_the_model_under_autocast(tmp_path):
    trainer = make_trainer(tmp_path, AUTOCAST)
    result = trainer.run().evaluation
    again = evaluate(Transformer.load(tmp_path), make_data().val, make_data().tokenizer, batch_size=4)
    with autocast():
        cast = evaluate(Transformer.load(tmp_path), make_data().val, make_data().tokenizer, batch_size=4)
    assert result == cast != again
    assert result.loss == pytest.approx(again.loss, rel=1e-2)


def test_three_ways_three_runs(tmp_path):
    """float32, autocast and masters differ from the first step on, and from the same weights: only by rounding."""
    runs = {"float32": OPTIONS, "autocast": AUTOCAST, "masters": MASTERS}
    for name, options in runs.items():
        make_trainer(tmp_path / name, options).run()
    first = [losses(tmp_path / name)[0] for name in runs]
    assert len(set(first)) == 3
    assert first == pytest.approx([first[0]] * 3, rel=1e-3)


@pytest.mark.parametrize("options", [OPTIONS, MASTERS, AUTOCAST], ids=["float32", "masters", "autocast"])
def test_autocast_of_the_caller_changes_nothing(options, tmp_path):
    """A run depends on its options alone, so that it can be resumed anywhere."""
    plain = make_trainer(tmp_path / "plain", options)
    plain.run()
    with autocast():
        inside = make_trainer(tmp_path / "inside", options)
        result = inside.run()
    assert losses(tmp_path / "plain") == losses(tmp_path / "inside")
    assert_same(weights(plain), weights(inside))
    assert result.evaluation == plain.evaluate()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_under_autocast(shape, dropout, tmp_path):
    trainer = make_trainer(tmp_path, AUTOCAST, **{"n_head": 4, "dropout": dropout, **SHAPES[shape]})
    rows = [trainer.train_step() for _ in range(12)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    for name, p in trainer.model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name


# ---- masters


def test_masters_start_as_the_weights_that_were_given(tmp_path):
    """Not as their bfloat16 copies: what the optimizer updates, and what a checkpoint holds, has float32 precision."""
    given = make_model(Config(vocab_size=256, n_layer=2, n_head=2, n_embd=16, block_size=16), MASTERS)
    trainer = make_trainer(tmp_path, MASTERS)
    assert_same(weights(trainer), dict(given.state_dict()))
    assert_same(dict(trainer.model.state_dict()), dict(given.to(torch.bfloat16).state_dict()))
    trainer.save()
    assert_same(load_checkpoint(tmp_path).tensors, weights(trainer))


# ---- resuming


@pytest.mark.parametrize("before, after", [(MASTERS, AUTOCAST), (AUTOCAST, MASTERS)], ids=["to autocast", "to masters"])
def test_resuming_the_other_way_loses_no_precision(before, after, tmp_path):
    first = make_trainer(tmp_path, before)
    first.run()
    options = TrainOptions(**after.to_dict() | {"steps": 15})
    second = Trainer.resume(tmp_path, make_data(), options)
    assert_same(weights(second), weights(first))
    assert_same(moments(second), moments(first))
    dtypes = {p.dtype for p in second.model.parameters()}
    assert dtypes == {torch.float32 if options.autocast else torch.bfloat16}
    assert second.run().step == 15
    assert Trainer.resume(tmp_path, make_data()).options == options


def test_checkpoint_from_before_there_was_autocast(tmp_path):
    """Its options do not name it: the run goes on without."""
    make_trainer(tmp_path, MASTERS).run()
    path = tmp_path / "training.json"
    state = json.loads(path.read_text())
    assert state["options"].pop("autocast") is False
    assert TrainOptions.from_dict(state["options"]) == MASTERS


# ---- refusals


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_autocast_is_a_bool(value):
    with pytest.raises(ValueError, match=rf"^train: autocast is {value!r} but must be True or False$"):
        TrainOptions(dtype="bfloat16", autocast=value)


def test_autocast_in_float32_is_refused():
    with pytest.raises(ValueError, match=r"^train: autocast computes in bfloat16 but dtype is 'float32'"):
        TrainOptions(autocast=True)
    with pytest.raises(ValueError, match="choose dtype bfloat16"):
        TrainOptions.from_dict({"dtype": "float32", "autocast": True})
