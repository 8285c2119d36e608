"""Training: it learns, agrees with plain torch, resumes exactly, and leaves a whole checkpoint when stopped."""

import csv
import math
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from lm_training import OPTIONS, SHAPE, TEXT, assert_same, changed, losses, make_data, make_trainer, weights

import pykern
from pykern.lm import Config, Tokenizer, Trainer, Transformer, evaluate, train
from pykern.lm.checkpoint import load_checkpoint, save_checkpoint
from pykern.lm.plot import COLUMNS, LossLog
from pykern.lm.run_state import read_state
from pykern.lm.seeding import seeded
from pykern.lm.trainer import interruptible, make_model, make_optimizer


def test_it_learns(tmp_path):
    result = make_trainer(tmp_path / "out", changed(steps=120, lr=2e-2, batch_size=8)).run()
    values = losses(tmp_path / "out")
    assert result.step == len(values) == 120 and not result.interrupted
    assert values[0] == pytest.approx(math.log(256), rel=0.05)
    assert result.evaluation.loss < 1.5  # the text repeats itself; a model that ignores its input cannot get below 2.5
    counts = torch.bincount(torch.from_numpy(make_data().val.astype("int64")), minlength=256).double()
    assert -(counts / counts.sum() * (counts / counts.sum()).clamp_min(1e-30).log()).sum() > 2.5


def torch_loss(model, x, y):
    """The same model in plain torch functions: the weights of `model`, none of its kernels."""
    c, p = model.config, dict(model.named_parameters())

    def norm(h, name):
        return F.rms_norm(h, (c.n_embd,), p[name + ".weight"], 1e-6)

    h = p["transformer.wte.weight"][x]
    position = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, c.head_size, 2) / c.head_size)
    for layer in range(c.n_layer):
        b = f"transformer.h.{layer}."
        q, k, v = F.linear(norm(h, b + "ln_1"), p[b + "attn.c_attn.weight"]).unflatten(-1, (3, c.n_head, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = (
            torch.cat([u * position.cos() - w * position.sin(), w * position.cos() + u * position.sin()], -1)
            for u, w in (q.chunk(2, -1), k.chunk(2, -1))
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + F.linear(out.transpose(1, 2).flatten(2), p[b + "attn.c_proj.weight"])
        n = norm(h, b + "ln_2")
        gated = F.silu(F.linear(n, p[b + "mlp.c_gate.weight"])) * F.linear(n, p[b + "mlp.c_fc.weight"])
        h = h + F.linear(gated, p[b + "mlp.c_proj.weight"])
    logits = F.linear(norm(h, "transformer.ln_f"), p["transformer.wte.weight"])
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_20_steps_agree_with_plain_torch(tmp_path):
    """Losses of 20 optimiser steps from the same weights: pykern's kernels and AdamW against torch's, 1e-4 relative."""
    options = changed(steps=20)
    trainer = make_trainer(tmp_path, options, positions="rope", norm="rmsnorm", activation="swiglu")
    twin = make_model(trainer.model.config, options)
    assert_same(dict(twin.state_dict()), dict(trainer.model.state_dict()))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.dim() >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in twin.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(options.beta1, options.beta2),
    )
    for step in range(20):
        ours = trainer.train_step()["loss"]
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate(step)
        optimizer.zero_grad()
        theirs = torch_loss(twin, *trainer.batches.at(step))
        theirs.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), options.clip)
        optimizer.step()
        assert ours == pytest.approx(theirs.item(), rel=1e-4), f"step {step + 1}"
    assert theirs.item() < math.log(256) - 1.0  # the steps were not idle


def test_same_seed_same_run(tmp_path):
    for name in ("a", "b"):
        make_trainer(tmp_path / name).run()
    make_trainer(tmp_path / "c", changed(seed=4)).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_thread_count_changes_nothing(tmp_path):
    """1, 2 and 3 threads, of torch and so of the kernels: the same losses and weights, bit for bit."""
    options = changed(steps=3, batch_size=16, clip=0.1)
    before, trainers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert pykern.get_num_threads() == threads
            trainers.append(make_trainer(tmp_path / str(threads), options, n_embd=128, block_size=32))
            trainers[-1].run()
    finally:
        torch.set_num_threads(before)
    assert losses(tmp_path / "1") == losses(tmp_path / "2") == losses(tmp_path / "3")
    for other in trainers[1:]:
        assert_same(weights(trainers[0]), weights(other))


WAYS = {"float32": {}, "masters": {"dtype": "bfloat16"}, "autocast": {"dtype": "bfloat16", "autocast": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [0, 1, 5, 8])
def test_resume_is_exact(stop, way, tmp_path):
    """Stopped after any step and resumed, the losses and the final weights are those of a run that went through."""
    options = changed(**WAYS[way])
    whole = make_trainer(tmp_path / "whole", options, dropout=0.1)
    whole.run()
    torch.manual_seed(99)  # the state of torch's own random stream must not matter
    first = make_trainer(tmp_path / "parts", options, dropout=0.1)
    first.out.mkdir()
    log = LossLog(first.out / "loss.csv", 0)
    for _ in range(stop):
        log.add(first.train_step())
    log.close()
    first.save()
    second = Trainer.resume(tmp_path / "parts", make_data())
    assert second.step == stop and second.options == options
    assert_same(weights(second), weights(first))
    result = second.run()
    assert result.step == 12
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same(weights(second), weights(whole))


def test_killed_run_resumes_from_its_last_checkpoint(tmp_path):
    """loss.csv may be ahead of the checkpoint: the rows behind it are dropped and come again, the same."""
    make_trainer(tmp_path / "whole").run()
    trainer = make_trainer(tmp_path / "parts")
    step, count = trainer.train_step, iter(range(100))
    trainer.train_step = lambda: step() if next(count) < 6 else (_ for _ in ()).throw(RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    assert len(losses(tmp_path / "parts")) == 6
    resumed = Trainer.resume(tmp_path / "parts", make_data())
    assert resumed.step == 4
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_longer_run_by_new_options(tmp_path):
    make_trainer(tmp_path).run()
    result = Trainer.resume(tmp_path, make_data(), changed(steps=15)).run()
    assert result.step == 15 and len(losses(tmp_path)) == 15
    again = Trainer.resume(tmp_path, make_data()).run()
    assert again.step == 15 and again.evaluation == result.evaluation


def test_checkpoint_is_loadable_and_holds_what_was_trained(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run()
    assert_same(dict(Transformer.load(tmp_path).state_dict()), weights(trainer))
    assert Tokenizer.load(tmp_path).kind == "byte"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16_checkpoint_holds_the_master_weights(tmp_path):
    trainer = make_trainer(tmp_path, changed(dtype="bfloat16"))
    trainer.run()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    loaded = Transformer.load(tmp_path)
    finer = [not torch.equal(p, p.bfloat16().float()) for p in loaded.parameters()]
    assert any(finer)
    for p, q in zip(loaded.to(torch.bfloat16).parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loss_csv(tmp_path):
    make_trainer(tmp_path).run()
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["val_loss"]] == ["5", "10", "12"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([OPTIONS.learning_rate(i) for i in range(12)])
    assert rows[-1]["tokens"] == str(12 * 4 * 16)
    assert all(float(row["grad_norm"]) > 0 for row in rows)


def test_evaluation_is_the_mean_over_all_tokens_but_the_first():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=256, **SHAPE))
    tokens, tokenizer = make_data().val[:100], Tokenizer.train("byte")
    result = evaluate(model, tokens, tokenizer, batch_size=3)
    nats = 0.0
    for start in range(0, 99, 16):
        window = torch.from_numpy(tokens[start : start + 17].astype("int64"))
        logits = model(window[None, :-1])[0].double()
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert result.tokens == result.bytes == 99
    assert result.loss == pytest.approx(nats / 99, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / 99 / math.log(2), rel=1e-6)
    assert model.training


def test_bits_per_byte_counts_bytes_not_tokens():
    torch.manual_seed(0)
    text = "größer als größer " * 20
    tokenizer = Tokenizer.train("character", [text])
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, **SHAPE))
    result = evaluate(model, tokenizer.encode_texts([text]), tokenizer)
    assert (result.tokens, result.bytes) == (len(text) - 1, len(text.encode()) - 1)
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / result.bytes)


def test_weight_decay_is_for_matrices_only():
    optimizer = make_optimizer(make_model(Config(vocab_size=256, **SHAPE), OPTIONS), OPTIONS)
    for group in optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_seeded_streams_are_left_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(7):
        first = torch.rand(3)
    with seeded(8, enabled=False):
        drawn = torch.rand(1)
    with seeded(7, "cpu"):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.cat([drawn, torch.rand(1)]), expected)


def test_clock_ends_a_run(tmp_path):
    result = make_trainer(tmp_path, changed(steps=None, minutes=0.4 / 60)).run()
    assert result.seconds >= 0.4 and not result.interrupted and result.evaluation is not None


# ---- interruption


def test_interrupt_finishes_the_step_and_leaves_a_checkpoint(tmp_path):
    """SIGINT in the middle of step 3: the run ends after it, and resumed it is the run that went through."""
    make_trainer(tmp_path / "whole").run()
    trainer = make_trainer(tmp_path / "parts")
    step = trainer.train_step

    def train_step():
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    before = signal.getsignal(signal.SIGINT)
    trainer.train_step = train_step
    result = trainer.run()
    assert result.interrupted and result.evaluation is None and result.step == 3
    assert signal.getsignal(signal.SIGINT) is before
    Trainer.resume(tmp_path / "parts", make_data()).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_interrupt_during_the_last_evaluation(tmp_path):
    trainer = make_trainer(tmp_path)
    model_forward, finished = trainer.model.forward, OPTIONS.steps

    def forward(*args, **kwargs):
        if trainer.step == finished and "reduction" in kwargs:
            os.kill(os.getpid(), signal.SIGINT)
        return model_forward(*args, **kwargs)

    trainer.model.forward = forward
    result = trainer.run()
    assert result.interrupted and result.step == 12
    assert Trainer.resume(tmp_path, make_data()).run().evaluation is not None


def test_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(make_trainer(tmp_path).run()))
    thread.start()
    thread.join()
    assert results[0].step == 12


# ---- the whole in one call


def test_train_function(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    result = train(tmp_path / "text.txt", tmp_path / "out", tokenizer="character", options=OPTIONS, **SHAPE)
    assert result.step == 12 and Tokenizer.load(tmp_path / "out").kind == "character"


# ---- refusals


def folder_with(tmp_path, change):
    """A checkpoint whose training state went through `change`."""
    make_trainer(tmp_path).run()
    loaded = load_checkpoint(tmp_path)
    values = {
        "config": loaded.config,
        "tensors": loaded.tensors,
        "tokenizer": loaded.tokenizer,
        "state": loaded.state,
        "state_tensors": loaded.state_tensors,
    }
    change(values)
    save_checkpoint(tmp_path, **values)


STATES = {
    "no state": (lambda v: v.update(state=None), "no training state"),
    "no moments": (lambda v: v.update(state_tensors=None), "no usable exp_avg"),
    "a moment of another shape": (
        lambda v: v["state_tensors"].update({"exp_avg.transformer.wte.weight": torch.zeros(2, 2)}),
        "no usable exp_avg of transformer.wte.weight",
    ),
    "a moment of another dtype": (
        lambda v: v["state_tensors"].update({"exp_avg_sq.transformer.wte.weight": torch.zeros(256, 16).double()}),
        "no usable exp_avg_sq of transformer.wte.weight",
    ),
    "negative step": (lambda v: v["state"].update(step=-1), "makes no sense"),
    "step of another type": (lambda v: v["state"].update(step="1"), "makes no sense"),
    "no corpus": (lambda v: v["state"].pop("corpus"), "makes no sense"),
    "unknown option": (lambda v: v["state"]["options"].update(speed=1), "unknown option 'speed'"),
    "bad option": (lambda v: v["state"]["options"].update(lr=-1.0), "lr is -1.0"),
    "another text": (lambda v: v["state"]["corpus"].update(sha256="1" * 64), "trained on another text"),
}


@pytest.mark.parametrize("case", STATES)
def test_unusable_training_state(case, tmp_path):
    change, message = STATES[case]
    folder_with(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Trainer.resume(tmp_path, make_data())


def test_state_is_checked_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="makes no sense"):
        read_state({"step": True}, tmp_path)
    with pytest.raises(FileNotFoundError):
        Trainer.resume(tmp_path / "nowhere", make_data())


def test_existing_checkpoint_is_not_overwritten(tmp_path):
    make_trainer(tmp_path).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        make_trainer(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is not a folder"):
        make_trainer(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_text_shorter_than_the_block(tmp_path):
    with pytest.raises(ValueError, match="block_size 16 needs at least 17"):
        make_trainer(tmp_path / "out", data=make_data("x = 1\ny = 2\n"))
    assert not (tmp_path / "out").exists()


def test_vocabulary_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="256 tokens but the model has vocab_size 8"):
        Trainer(make_model(Config(vocab_size=8, **SHAPE), OPTIONS), make_data(), OPTIONS, tmp_path / "out")


def test_nan_loss_stops_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight[0] = math.nan
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1: try a lower lr"):
        trainer.train_step()
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_norm_that_the_optimizer_left_is_looked_at(tmp_path):
    """On CUDA step() raises nothing."""
    trainer = make_trainer(tmp_path)
    trainer.optimizer.step = lambda: setattr(trainer.optimizer, "grad_norm", torch.tensor(math.inf))
    with pytest.raises(FloatingPointError, match="the norm of the gradients is inf"):
        trainer.train_step()
    assert trainer.step == 0
