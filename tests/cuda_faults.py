"""Every barrier and wait of the CUDA kernels left out in turn, on the emulator: which of them nobody would miss?

Run with the emulated extension (tests/test_cuda_emulation.py): prints, for each place that kernels of cuda_cases.py
come to, what showed that it was gone: "bits", a Fault, a signal or "never ends"; or "unseen".
"""

import itertools
import os
import signal
import sys

import emulated
import torch
from cuda_cases import OPS
from cuda_cases_attention import rare_attentions
from cuda_op import results

from pykern.lm import Config
from pykern.lm.trainer import TrainOptions, make_model

CASES = {**OPS, **dict(rare_attentions())}
SEEDS = (1, 2)
SECONDS = 60  # of a child: it may never end
DTYPES = (torch.bfloat16, torch.float32)
# Few blocks, but several tiles of each kind, and rows of several warps. A name without one has its op's smallest shape.
SHAPES = {
    "layer_norm": [(3, 8197)],
    "rms_norm": [(33, 700)],
    "softmax": [(3, 8197)],
    "embedding": [(5000, 300, 4, 300)],  # two rounds of the scan
    "cross_entropy": [(3, 5003)],
    "adamw": [(700,)],
    "square_sum": [(9000,)],
    "linear": [(200, 200, 140), (3, 200, 140)],
    "mlp": [(40, 40, 72)],
    "linear_cross_entropy": [(40, 40, 300)],
    "attention": [(1, 2, 1, 140, 200, 40)],
    "attention, full": [(1, 2, 1, 140, 200, 40), (1, 2, 1, 70, 130, 200)],
    "attention_weights": [(1, 2, 1, 70, 130, 40)],
    "attention, ragged": [(2, 1, 40)],
    # eight rows of a head; more than one tile of them; so many tasks that a block takes several parts of the keys
    "attention_with_kvcache": [(2, 4, 2, 4, 700, 64), (1, 8, 1, 4, 300, 64), (260, 2, 2, 1, 600, 8)],
    "sample": [(3, 5003), (48, 23)],  # of few tokens the history has the likely ones
}


def shapes_of(name):
    """Those of the longest name in SHAPES that it begins with."""
    fitting = [start for start in SHAPES if name.startswith(start)]
    return SHAPES[max(fitting, key=len)] if fitting else [next(iter(CASES[name].shapes.values()))]


def in_a_child(function):
    """What function() returns in a forked process, or how that process ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        with os.fdopen(write, "wb") as pipe:
            try:
                pipe.write(function().encode())
            except RuntimeError as error:  # a Fault of the emulator
                pipe.write(f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return "never ends"
    return said if status == 0 else f"ended with {status}"


def bits(found):
    return {name: x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, x in found.items()}


def what_shows(run, right, site, seed):
    """ "bits" where the results are not the right ones without that barrier or wait, None where they are."""

    def outcome():
        emulated.set_seed(seed)
        emulated.leave_out(site)
        return "" if bits(run()) == right else "bits"

    return in_a_child(outcome) or None


def runs_of(name):
    """Functions that each give results by name, of an op or of "session": a step over an int8 cache."""
    if name == "session":
        config = Config(n_layer=1, n_head=2, n_kv_head=1, n_embd=128, vocab_size=11, block_size=90)
        model = make_model(config, TrainOptions(steps=1))
        for dtype in DTYPES:
            ids = torch.arange(80)[None] % 11
            session = lambda dtype=dtype: model.to(dtype).session(str(dtype).split(".")[1], cache_dtype="int8")  # noqa: E731
            yield lambda session=session, ids=ids: {"logits": session().prefill(ids)}
        return
    op = CASES[name]
    for dtype, shape in itertools.product([d for d in DTYPES if d in op.dtypes], shapes_of(name)):
        inputs = op.inputs(dtype, *shape)
        _, douts = results(op, op.function, inputs)
        yield lambda inputs=inputs, douts=douts: results(op, op.function, inputs, douts or None)[0]


def look(names):
    """{place: what showed} of the kernels that these run."""
    found = {}
    for run in itertools.chain.from_iterable(map(runs_of, names)):
        right = []
        for site in emulated.sites_of(lambda run=run, right=right: right.append(bits(run()))):
            for seed in SEEDS:
                if found.get(site) is None:
                    found[site] = what_shows(run, right[0], site, seed)
    return found


def main():
    groups = sys.argv[1].split(",")
    names = [name for name in [*CASES, "session"] if name.split(",")[0].split(" ")[0] in groups]
    for site, shown in sorted(look(names).items()):
        print(f"{site}: {shown or 'unseen'}")


if __name__ == "__main__":
    main()
