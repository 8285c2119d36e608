"""The computation graph of two networks on pykern.tape, in pictures and in the order in which backward runs.

    python examples/tape_graph.py              (writes out/tape/network.svg and out/tape/transformer.svg)
    python examples/tape_graph.py --steps 20 --out pictures

First a classifier of two layers on the exclusive or, then a small Transformer language model, which is trained for 200
steps on the source of Python's textwrap module. numpy and pykern's kernels, no torch.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np

import pykern
from pykern.tape import AdamW, Network, NeuralNetwork, TransformerLM, graph_svg, record_backward, tape_bwd
from pykern.tape.graph import inputs_of, label

BATCH, BLOCK = 8, 32


def show(title: str, network: Network, arrays: tuple, path: Path) -> None:
    """Print the order of the backward pass of network(*arrays), a loss, and draw the graph."""
    loss = network.apply_fwd(*arrays)
    order = record_backward(loss)
    tape_bwd()
    network.zero_grad()
    print(f"{title}: backward runs in reverse topological order, each module after all who used its output")
    number = {id(node): i for i, node in enumerate(order, 1)}
    for node in order:
        to = [f"{number[id(module)]}" for module in inputs_of(node) if id(module) in number]
        print(f"{number[id(node)]:3}. {label(node, network)}" + (f"  -> {', '.join(to)}" if to else ""))
    path.write_text(graph_svg(loss, network=network, backward=order), encoding="utf-8")
    print(f"picture: {path}\n")


def train(model: TransformerLM, ids: np.ndarray, steps: int) -> list[float]:
    """The losses, nats per character, of steps on random pieces of ids."""
    rng, optimizer, losses = np.random.default_rng(0), AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), []
    for step in range(steps):
        starts = rng.integers(0, len(ids) - BLOCK, BATCH)
        pieces = ids[starts[:, None] + np.arange(BLOCK + 1)]
        loss = model.apply_fwd(pieces[:, :-1], pieces[:, 1:])
        tape_bwd()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.out_tensor))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {np.mean(losses[-20:]):.3f}", flush=True)  # the mean of the last 20
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="Draw two computation graphs and train a small Transformer.")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--out", type=Path, default=Path("out", "tape"), help="folder for the pictures")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    pykern.set_num_threads(1)  # the matrices are small

    xor = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([0, 1, 1, 0])
    show("network", NeuralNetwork(2, 3, 2, rng=0), xor, options.out / "network.svg")

    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    letters, ids = np.unique(list(text), return_inverse=True)
    model = TransformerLM(len(letters), BLOCK, n_layer=1, n_head=2, n_embd=32, rng=0)
    show("Transformer", model, (ids[None, :BLOCK], ids[None, 1 : BLOCK + 1]), options.out / "transformer.svg")

    print(f"{len(text)} characters, {len(letters)} different ones: a guess costs {np.log(len(letters)):.3f} nats")
    return train(model, ids, options.steps)


if __name__ == "__main__":
    main()
