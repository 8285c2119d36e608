"""Sessions beside other processes, threads and Ctrl-C; quantised ones on text that a model has learned."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_models import SHAPES, make, random_ids
from lm_training import OPTIONS, TEXT, make_trainer

from pykern.lm import Transformer, generate

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent


def test_a_forked_child_generates():
    model, ids = make(), random_ids(1, 4)
    session = model.session()
    expected = session.generate(ids, max_new_tokens=10, temperature=1.0, seed=1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            out = session.generate(ids, max_new_tokens=10, temperature=1.0, seed=1)
            os.write(write, b"same" if torch.equal(out, expected) else b"other")
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("the child hangs")
    assert os.read(read, 100) == b"same" and done[1] == 0
    os.close(read)


def test_two_threads_with_two_sessions():
    shapes = [SHAPES["gpt2"], SHAPES["llama"]]
    models = [make(**shape) for shape in shapes]
    expected = [generate(model, random_ids(2, 4), max_new_tokens=18, temperature=1.0, seed=2) for model in models]
    got: list[list[bool]] = [[], []]

    def work(i):
        session = models[i].session(batch=2)
        for _ in range(20):
            out = session.generate(random_ids(2, 4), max_new_tokens=18, temperature=1.0, seed=2)
            got[i].append(torch.equal(out, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [[True] * 20] * 2


def test_ctrl_c_ends_a_generation_and_the_session_goes_on():
    code = """
import _thread, threading, torch
from pykern.lm import Config, Transformer
torch.manual_seed(0)
config = Config(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=97)
session = Transformer(config).session()
ids = torch.zeros(1, 1, dtype=torch.int64)
short = session.generate(ids, max_new_tokens=20, temperature=0.0)
threading.Timer(0.5, _thread.interrupt_main).start()
try:
    session.generate(ids, max_new_tokens=10**7, temperature=0.0)
except KeyboardInterrupt:
    print("interrupted", torch.equal(session.generate(ids, max_new_tokens=20, temperature=0.0), short))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert run.stdout == "interrupted True\n", run.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of 64 x 2 that has learned made-up functions, and text that it has not seen."""
    out = tmp_path_factory.mktemp("quantised")
    trainer = make_trainer(
        out, replace(OPTIONS, steps=150, batch_size=8, eval_every=1000), n_embd=64, n_head=2, block_size=64
    )
    trainer.run()
    return Transformer.load(out), torch.tensor([list(TEXT[-1025:].encode())])


@pytest.mark.parametrize("dtype, most", [("bfloat16", 0.02), ("int8", 0.01), ("int4", 0.15)])
def test_perplexity_of_a_quantised_session_stays(trained, dtype, most, capsys):
    """Mean loss in nats a byte on held-out text, in windows of 64; perplexity is its exponential."""
    model, text = trained

    def loss(kind):
        session, total = model.session(dtype=kind, batch=16), 0.0
        windows, targets = text[0, :-1].view(16, 64), text[0, 1:].view(16, 64)
        rows = session.extend(list(windows), list(range(16)), every=True)
        total += torch.nn.functional.cross_entropy(rows.double(), targets.flatten()).item()
        return total

    exact, quantised = loss("float32"), loss(dtype)
    with capsys.disabled():
        print(f"\nperplexity: float32 {2.718281828**exact:.4f}, {dtype} {2.718281828**quantised:.4f}", end=" ")
    assert exact < 2.0, "the model has not learned anything"
    assert quantised != exact and abs(quantised - exact) < most


@pytest.mark.parametrize("dtype, most", [("int8", 0.01), ("int4", 0.3)])
def test_divergence_of_a_quantised_session_is_small(dtype, most, capsys):
    """KL divergence of the next token from float32's, in nats, mean over positions of a random model."""
    torch.manual_seed(0)
    model = Transformer(make(n_embd=128, n_head=4, vocab_size=256, block_size=64).config).eval()
    ids = random_ids(1, 64, vocab=256)
    p, q = (
        model.session(dtype=kind).extend(list(ids), [0], every=True).double().log_softmax(-1)
        for kind in ("float32", dtype)
    )
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    with capsys.disabled():
        print(f"\nKL divergence of {dtype}: {divergence:.2e}", end=" ")
    assert 0 < divergence < most
