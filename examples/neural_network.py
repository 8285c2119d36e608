"""The course's NeuralNetwork on the tape: Linear, Sigmoid, Linear, Softmax and CrossEntropy learn three spirals.

    python examples/neural_network.py
    python examples/neural_network.py --steps 50 --hidden 8

First every gradient is compared with finite differences, then gradient descent is written out by hand: forward,
tape_bwd(), and for each parameter value -= rate * grad. At the end the plane is drawn in letters. numpy and pykern's
kernels in float64, no torch.
"""

import argparse

import numpy as np

import pykern
from pykern.tape import NeuralNetwork, check_gradients, no_tape, tape_bwd

CLASSES, POINTS, NOISE = 3, 60, 0.08
ROWS, COLUMNS = 15, 40


def spirals(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """x [CLASSES * POINTS, 2] in -1 .. 1 and labels: arms that turn by most of a circle, with noise on the angle."""
    radius = np.tile(np.linspace(0.05, 1.0, POINTS), CLASSES)
    labels = np.repeat(np.arange(CLASSES), POINTS)
    angle = 4.0 * radius + labels * 2 * np.pi / CLASSES + NOISE * rng.normal(size=len(radius))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), labels


def answers(network: NeuralNetwork, x: np.ndarray) -> np.ndarray:
    """The likeliest class of each row."""
    with no_tape():
        return network.apply_fwd(x).out_tensor.argmax(1)


def step(network: NeuralNetwork, x: np.ndarray, labels: np.ndarray, rate: float) -> float:
    """One step of gradient descent on all points; the loss before it."""
    loss = network.apply_fwd(x, labels)
    tape_bwd()
    for parameter in network.parameters():
        parameter.value -= rate * parameter.grad
    network.zero_grad()
    return float(loss.out_tensor)


def draw(network: NeuralNetwork) -> str:
    """The class of each place of the plane as a letter."""
    y, x = np.meshgrid(np.linspace(1, -1, ROWS), np.linspace(-1, 1, COLUMNS), indexing="ij")
    found = answers(network, np.stack([x.ravel(), y.ravel()], axis=1)).reshape(ROWS, COLUMNS)
    return "\n".join("".join(".ox"[c] for c in row) for row in found)


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    parser = argparse.ArgumentParser(description="Train the course's network on three spirals.")
    parser.add_argument("--steps", type=int, default=2000, help="of gradient descent (default 2000)")
    parser.add_argument("--hidden", type=int, default=24, help="sigmoid units (default 24)")
    parser.add_argument("--rate", type=float, default=3.0, help="the step size (default 3)")
    options = parser.parse_args(argv)
    pykern.set_num_threads(1)  # the matrices are small
    rng = np.random.default_rng(0)
    x, labels = spirals(rng)
    network = NeuralNetwork(2, options.hidden, CLASSES, rng=0)
    print(f"the worst of all gradients, of a batch of 5: {check_gradients(network, x[:5], labels[:5])}")

    losses = []
    for n in range(options.steps):
        losses.append(step(network, x, labels, options.rate))
        if n % max(1, options.steps // 6) == 0 or n == options.steps - 1:
            right = float(np.mean(answers(network, x) == labels))
            print(f"step {n:5}  loss {losses[-1]:.3f}  right {right:.1%}", flush=True)
    fresh, truth = spirals(np.random.default_rng(1))
    accuracy = float(np.mean(answers(network, fresh) == truth))
    print(f"right on points that it has not seen: {accuracy:.1%}\n\n{draw(network)}")
    return losses, accuracy


if __name__ == "__main__":
    main()
