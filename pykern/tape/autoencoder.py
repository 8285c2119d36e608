"""Layer-wise pre-training: each hidden layer is trained alone on the outputs of the layers before, then all together.

    autoencoders    layer k minimises ||h - decode(encode(h))||^2 over the outputs h of layer k - 1; no labels
    supervised      layer k and a softmax head, thrown away afterwards, minimise the cross entropy of the labels
    fine-tuning     all layers and the softmax head minimise the cross entropy of the labels

Greedy layer-wise training is from Bengio, Lamblin, Popovici and Larochelle, "Greedy Layer-Wise Training of Deep
Networks", NIPS 2006.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from . import inputs
from .activation import ReLU, Sigmoid
from .adamw import AdamW
from .cross_entropy import SoftmaxCrossEntropy
from .engine import Module, Network, no_tape, tape, tape_bwd
from .linear import Linear
from .squared_error import SquaredError

ACTIVATIONS = {"sigmoid": Sigmoid, "relu": ReLU}


class Encoder(Network):
    """h = f(w x + c): x [..., n_in] to h [..., n_out], with f sigmoid or ReLU."""

    def __init__(self, n_in: int, n_out: int, *, activation: str = "sigmoid", rng: Any = None):
        inputs.choice("Encoder", "activation", activation, tuple(ACTIVATIONS))
        self.linear = Linear(n_in, n_out, rng=rng)
        self.activation = ACTIVATIONS[activation]()

    def connect(self, x: Module) -> Module:
        return self.activation(self.linear(x))


class Autoencoder(Network):
    """The reconstruction loss ||x - decode(encode(x))||^2 of x [..., n_in], its mean over the rows.

    decode is a Linear of its own, from n_out features back to n_in.
    """

    def __init__(self, encoder: Encoder, *, rng: Any = None):
        n_out, n_in = encoder.linear.weight.value.shape
        self.encoder = encoder
        self.decoder = Linear(n_out, n_in, rng=rng)
        self.squared_error = SquaredError()

    def connect(self, x: Module) -> Module:
        return self.squared_error(self.reconstruct(x), x)

    def reconstruct(self, x: Any) -> Module:
        """decode(encode(x)), in the shape of x."""
        return self.decoder(self.encoder(x))


class Classifier(Network):
    """Encoders, one on the other, and a softmax head: x [N, sizes[0]] to logits [N, sizes[-1]]; with labels, the loss.

    sizes: features of the input, of each hidden layer, and the number of classes; at least three numbers.
    """

    def __init__(self, sizes: Sequence[int], *, activation: str = "sigmoid", rng: Any = None):
        if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence) or len(sizes) < 3:
            raise ValueError(f"Classifier: sizes is {sizes!r}, expected input, one or more hidden layers, classes")
        rng = np.random.default_rng(rng)
        self.encoders = [Encoder(n_in, n_out, activation=activation, rng=rng) for n_in, n_out in pairwise(sizes[:-1])]
        self.head = Linear(sizes[-2], sizes[-1], rng=rng)
        self.cross_entropy = SoftmaxCrossEntropy()

    def connect(self, x: Module, labels: Module | None = None) -> Module:
        for encoder in self.encoders:
            x = encoder(x)
        logits = self.head(x)
        return logits if labels is None else self.cross_entropy(logits, labels)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The most likely class of each row of x [N, n_in]: int64 [N]."""
        return outputs(self, x).argmax(-1)


class Headed(Network):
    """An encoder under a softmax head of its own: the cross entropy of labels [N] for x [N, n_in]."""

    def __init__(self, encoder: Encoder, n_classes: int, *, rng: Any = None):
        self.encoder = encoder
        self.head = Linear(encoder.linear.weight.value.shape[0], n_classes, rng=rng)
        self.cross_entropy = SoftmaxCrossEntropy()

    def connect(self, x: Module, labels: Module) -> Module:
        return self.cross_entropy(self.head(self.encoder(x)), labels)


def outputs(module: Module, *arrays: np.ndarray) -> np.ndarray:
    """What module makes of the arrays, without a tape."""
    with no_tape():
        return module.apply_fwd(*arrays).out_tensor


def batches(n: int, batch_size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of `steps` batches out of n rows, each row once per epoch; an epoch drops what does not fill a batch."""
    size, made = min(batch_size, n), 0
    while made < steps:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            if made == steps:
                return
            yield order[start : start + size]
            made += 1


def fit(
    network: Network, *arrays: Any, steps: int, batch_size: int = 50, lr: float = 3e-3, rng: Any = None
) -> list[float]:
    """The loss of each of `steps` AdamW steps of network(*arrays), a scalar loss, on batches of their rows.

    arrays: [N, ...], all of one length N >= 1. rng: a seed or a numpy Generator, for the order of the rows. No weight
    decay. One pass over all rows comes first, so that wrong inputs (TypeError, ValueError, IndexError) and a loss that
    is not finite (FloatingPointError) are refused before a weight changes; a loss that overflows later is refused then.
    Arrays are float64, or integers for labels. The step: pykern.tape.AdamW.
    """
    inputs.positive("fit", batch_size=batch_size, **({} if steps == 0 else {"steps": steps}))
    if not arrays:
        raise TypeError("fit: got no arrays, expected the inputs of the network")
    arrays = tuple(inputs.as_array("fit", f"arrays[{i}]", array) for i, array in enumerate(arrays))
    for i, array in enumerate(arrays):
        if array.ndim == 0 or len(array) != len(arrays[0]) or not len(array):
            raise ValueError(
                f"fit: arrays[{i}] has shape {array.shape}, expected one number of rows for all, 1 or more"
            )
    optimizer = AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    finite("before the first step", outputs(network, *arrays))
    for rows in batches(len(arrays[0]), batch_size, steps, np.random.default_rng(rng)):
        loss = network.apply_fwd(*(array[rows] for array in arrays))
        losses.append(finite(f"of step {len(losses) + 1}", loss.out_tensor))
        tape_bwd()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def finite(when: str, loss: np.ndarray) -> float:
    if loss.ndim:
        raise ValueError(f"fit: the network gives shape {loss.shape}, expected a scalar loss")
    if not np.isfinite(loss):
        tape.clear()
        raise FloatingPointError(f"fit: the loss {when} is {loss}")
    return float(loss)


def pretrain_autoencoders(
    classifier: Classifier, x: np.ndarray, *, steps: int, rng: Any = None, **options: Any
) -> list[list[float]]:
    """Train each encoder of the classifier as an autoencoder of the layer below; no labels, the head stays as it is.

    x [N, n_in], of rows with a label or without. steps are those of one layer, options those of fit. Returns the losses
    of each layer.
    Errors and dtypes: pykern.tape.fit. Source: Bengio et al., Greedy Layer-Wise Training (NIPS 2006).
    """
    rng, losses = np.random.default_rng(rng), []
    for encoder in encoders(classifier, "pretrain_autoencoders"):
        losses.append(fit(Autoencoder(encoder, rng=rng), x, steps=steps, rng=rng, **options))
        x = outputs(encoder, x)
    return losses


def encoders(classifier: Classifier, op: str) -> list[Encoder]:
    if not isinstance(classifier, Classifier):
        raise TypeError(f"{op}: classifier is {inputs.describe(classifier)}, expected a Classifier")
    return classifier.encoders


def pretrain_supervised(
    classifier: Classifier, x: np.ndarray, labels: np.ndarray, *, steps: int, rng: Any = None, **options: Any
) -> list[list[float]]:
    """Train each encoder of the classifier under a softmax head of its own; that head is thrown away.

    x [N, n_in], labels [N]. steps are those of one layer, options those of fit. Returns the losses of each layer.
    Errors and dtypes: pykern.tape.fit. Source: Bengio et al., Greedy Layer-Wise Training (NIPS 2006).
    """
    rng, losses = np.random.default_rng(rng), []
    for encoder in encoders(classifier, "pretrain_supervised"):
        n_classes = len(classifier.head.weight.value)
        losses.append(fit(Headed(encoder, n_classes, rng=rng), x, labels, steps=steps, rng=rng, **options))
        x = outputs(encoder, x)
    return losses
