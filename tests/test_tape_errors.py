"""Bad input is refused with a sentence that starts with the name of the module and names the argument."""

import numpy as np
import pytest

from pykern.tape import (
    SGD,
    AdamW,
    Add,
    Attention,
    CrossEntropy,
    Embedding,
    LayerNorm,
    Linear,
    MergeHeads,
    Module,
    Mul,
    Network,
    NeuralNetwork,
    Parameter,
    Reshape,
    RMSNorm,
    Scale,
    Sigmoid,
    Softmax,
    SoftmaxCrossEntropy,
    SplitHeads,
    Tensor,
    TransformerLM,
    Transpose,
    tape,
    tape_bwd,
)


def ones(*shape):
    return np.ones(shape)


class Halves(Module):
    def forward(self, a):
        return a / 2

    def backward(self, in_tensors, out_tensor, out_gradient):
        return self.answer

    def answering(self, answer):
        self.answer = answer
        return self


APPLY = {
    "a list": (Linear(3, 2), [[1.0, 2.0, 3.0]], TypeError, "Linear: a is a list, expected a Tensor, a module"),
    "None": (Sigmoid(), [None], TypeError, "Sigmoid: a is a NoneType"),
    "too many inputs": (Linear(3, 2), [ones(3), ones(3)], TypeError, "Linear: got 2 inputs, expected (a)"),
    "too few inputs": (
        Attention(),
        [ones(1, 1, 1, 1)],
        TypeError,
        "Attention: got 1 inputs, expected (q, k, v, *mask_and_bias)",
    ),
    "network inputs": (
        NeuralNetwork(2, 2, 2),
        [],
        TypeError,
        "NeuralNetwork: got 0 inputs, expected (x, targets=None)",
    ),
    "not applied yet": (Sigmoid(), [Linear(3, 2)], ValueError, "Linear: not applied yet"),
    "complex": (Sigmoid(), [ones(2) * 1j], TypeError, "Tensor: array is an array of complex128"),
    "float32 among float64": (
        Linear(3, 2),
        [Tensor(ones(3), dtype=np.float32)],
        TypeError,
        "Linear: a is float32 but weight is float64",
    ),
    "mixed inputs": (Add(), [ones(3), Tensor(ones(3), dtype="f4")], TypeError, "Add: a is float64 but b is float32"),
    "wrong width": (
        Linear(3, 2),
        [ones(5, 4)],
        ValueError,
        "Linear: a has shape (5, 4), expected a last dimension of 3",
    ),
    "no dimension": (Linear(3, 2), [np.array(1.0)], ValueError, "Linear: a has shape (), expected a last dimension"),
    "booleans": (Linear(3, 2), [ones(3) > 0], TypeError, "Linear: a is bool"),
    "softmax of a number": (Softmax(), [np.array(1.0)], ValueError, "Softmax: a has shape (), expected 1 dimensions"),
    "layer norm width": (LayerNorm(3), [ones(2, 4)], ValueError, "LayerNorm: a has shape (2, 4)"),
    "rms norm width": (RMSNorm(3), [ones(2, 4)], ValueError, "RMSNorm: a has shape (2, 4)"),
    "float ids": (Embedding(4, 2), [ones(3)], TypeError, "Embedding: ids is float64, expected integers"),
    "id too large": (
        Embedding(4, 2),
        [np.array([[0, 1], [4, 9]])],
        IndexError,
        "Embedding: ids[1, 0] is 4, expected 0 .. 3",
    ),
    "negative id": (Embedding(4, 2), [np.array([-1])], IndexError, "Embedding: ids[0] is -1, expected 0 .. 3"),
    "shapes do not add": (Add(), [ones(3), ones(2)], ValueError, "Add: the shapes do not broadcast: a (3,), b (2,)"),
    "shapes do not multiply": (Mul(), [ones(3), ones(2)], ValueError, "Mul: the shapes do not broadcast"),
    "scale of booleans": (Scale(2.0), [ones(3) > 0], TypeError, "Scale: a is bool"),
    "reshape": (Reshape(4, -1), [ones(3)], ValueError, "Reshape: a has shape (3,), which does not fit shape (4, -1)"),
    "transpose rank": (Transpose(1, 0), [ones(3)], ValueError, "Transpose: a has shape (3,), expected 2 dimensions"),
    "heads do not divide": (SplitHeads(3), [ones(1, 2, 4)], ValueError, "SplitHeads: a has 4 features, which 3 heads"),
    "split rank": (SplitHeads(2), [ones(2, 4)], ValueError, "SplitHeads: a has shape (2, 4), expected 3 dimensions"),
    "merge rank": (MergeHeads(), [ones(2, 4)], ValueError, "MergeHeads: a has shape (2, 4), expected 4 dimensions"),
    "query rank": (
        Attention(),
        [ones(3, 4), ones(1, 1, 3, 4), ones(1, 1, 3, 4)],
        ValueError,
        "Attention: q has shape (3, 4), expected 4 dimensions",
    ),
    "head size": (
        Attention(),
        [ones(1, 1, 3, 4), ones(1, 1, 3, 5), ones(1, 1, 3, 4)],
        ValueError,
        "Attention: k has shape (1, 1, 3, 5), expected [1, G, S, 4]",
    ),
    "batch": (
        Attention(),
        [ones(2, 1, 3, 4), ones(1, 1, 3, 4), ones(1, 1, 3, 4)],
        ValueError,
        "Attention: k has shape (1, 1, 3, 4), expected [2, G, S, 4]",
    ),
    "values": (
        Attention(),
        [ones(1, 1, 3, 4), ones(1, 1, 3, 4), ones(1, 1, 2, 4)],
        ValueError,
        "Attention: v has shape (1, 1, 2, 4), expected [1, 1, 3, E]",
    ),
    "shared heads": (
        Attention(),
        [ones(1, 3, 3, 4), ones(1, 2, 3, 4), ones(1, 2, 3, 4)],
        ValueError,
        "Attention: k has 2 heads, which do not divide the 3 heads of q",
    ),
    "mask shape": (
        Attention(),
        [*[ones(1, 1, 3, 4)] * 3, ones(2, 3) > 0],
        ValueError,
        "Attention: mask_and_bias has shape (2, 3), which does not broadcast to (1, 1, 3, 3)",
    ),
    "slopes of other heads": (
        Attention(alibi_slopes=[1.0, 2.0, 3.0]),
        [ones(2, 2, 3, 4), ones(2, 1, 3, 4), ones(2, 1, 3, 4)],
        ValueError,
        "Attention: alibi_slopes has shape (3,), expected (2,) or (2, 2) for q (2, 2, 3, 4)",
    ),
    "sinks of other heads": (
        Attention(sinks=ones(1)),
        [ones(2, 2, 3, 4), ones(2, 1, 3, 4), ones(2, 1, 3, 4)],
        ValueError,
        "Attention: sinks has shape (1,), expected (2,) for q (2, 2, 3, 4)",
    ),
    "sinks of another dtype": (
        Attention(sinks=ones(1)),
        [Tensor(ones(1, 1, 3, 4), dtype="f4") for _ in range(3)],
        TypeError,
        "Attention: q is float32 but sinks is float64; use one dtype",
    ),
    "two masks": (
        Attention(),
        [*[ones(1, 1, 3, 4)] * 3, ones(3) > 0, ones(3) > 0],
        ValueError,
        "Attention: mask_and_bias holds two masks or two biases",
    ),
    "target shape": (
        CrossEntropy(),
        [ones(2, 3), ones(2, 4)],
        ValueError,
        "CrossEntropy: targets has shape (2, 4), expected labels (2,) or distributions (2, 3)",
    ),
    "float labels": (
        CrossEntropy(),
        [ones(2, 3), ones(2)],
        TypeError,
        "CrossEntropy: targets is float64, expected int",
    ),
    "negative probability": (
        CrossEntropy(),
        [-ones(2, 3), ones(2, 3)],
        ValueError,
        "CrossEntropy: probabilities holds -1.0, expected 0 or more",
    ),
    "label too large": (
        SoftmaxCrossEntropy(),
        [ones(2, 3), np.array([-100, 3])],
        IndexError,
        "SoftmaxCrossEntropy: targets[1] is 3, expected 0 .. 2",
    ),
    "no classes": (
        SoftmaxCrossEntropy(),
        [ones(2, 0), np.array([0, 0])],
        ValueError,
        "SoftmaxCrossEntropy: logits has shape (2, 0), expected at least one class",
    ),
    "smoothed distributions": (
        SoftmaxCrossEntropy(label_smoothing=0.1),
        [ones(2, 3), ones(2, 3)],
        ValueError,
        "SoftmaxCrossEntropy: targets are distributions, label_smoothing needs labels",
    ),
    "too long": (
        TransformerLM(5, 4),
        [np.zeros((1, 5), int)],
        ValueError,
        "TransformerLM: ids has 5 positions, expected 1 .. 4",
    ),
    "ids rank": (TransformerLM(5, 4), [np.zeros(3, int)], ValueError, "TransformerLM: ids has shape (3,), expected 2"),
    "forward returns nothing": (
        type("Nothing", (Module,), {"forward": lambda self, a: None})(),
        [ones(2)],
        TypeError,
        "Nothing: forward returned a NoneType, expected an array of numbers",
    ),
    "no forward": (
        type("Empty", (Module,), {})(),
        [],
        NotImplementedError,
        "Empty: forward(*in_tensors) is not written",
    ),
    "no connect": (
        type("Loose", (Network,), {})(),
        [],
        NotImplementedError,
        "Loose: connect(*in_modules) is not written",
    ),
}


@pytest.mark.parametrize("case", APPLY)
def test_apply_fwd_refuses(case):
    module, arrays, error, message = APPLY[case]
    tape.clear()
    with pytest.raises(error) as caught:
        module.apply_fwd(*arrays)
    assert str(caught.value).startswith(message)
    if not isinstance(module, Network):
        assert tape == [] and module.latest is None  # nothing half done


BUILD = {
    "n_in": (lambda: Linear(0, 2), ValueError, "Linear: n_in is 0, expected 1 or more"),
    "n_out": (lambda: Linear(2, 2.0), TypeError, "Linear: n_out is 2.0, expected a whole number"),
    "n": (lambda: Embedding(-1, 2), ValueError, "Embedding: n is -1"),
    "d": (lambda: LayerNorm(True), TypeError, "LayerNorm: d is True"),
    "eps": (lambda: LayerNorm(2, eps=-1), ValueError, "LayerNorm: eps is -1, expected a finite number (least 0)"),
    "dtype": (
        lambda: Linear(2, 2, dtype=np.float16),
        TypeError,
        "Linear: dtype is float16, expected float32 or float64",
    ),
    "unknown dtype": (lambda: Tensor(1.0, dtype="real"), TypeError, "Tensor: dtype is 'real', expected float32 or"),
    "nan scale": (
        lambda: Attention(scale=float("nan")),
        ValueError,
        "Attention: scale is nan, expected a finite number",
    ),
    "window of one number": (lambda: Attention(window=3), ValueError, "Attention: window is 3, expected two numbers"),
    "window of floats": (
        lambda: Attention(window=(1.0, None)),
        TypeError,
        "Attention: window is (1.0, None), expected two whole numbers or None",
    ),
    "negative window": (
        lambda: Attention(window=(-1, 0)),
        ValueError,
        "Attention: window is (-1, 0), expected 0 or more keys on either side",
    ),
    "softcap": (
        lambda: Attention(softcap=-1.0),
        ValueError,
        "Attention: softcap is -1.0, expected a finite number (le",
    ),
    "slopes": (lambda: Attention(alibi_slopes="steep"), TypeError, "Attention: alibi_slopes is a str, expected an arr"),
    "slopes that are not finite": (
        lambda: Attention(alibi_slopes=[np.inf]),
        ValueError,
        "Attention: alibi_slopes holds inf, expected finite numbers",
    ),
    "sinks": (lambda: Attention(sinks=ones(1, 2)), ValueError, "Attention: sinks has shape (1, 2), expected 1 dimens"),
    "dropout_p": (
        lambda: Attention(dropout_p=1.5),
        ValueError,
        "Attention: dropout_p is 1.5, expected a finite number (least 0, most 1)",
    ),
    "seed": (lambda: Attention(seed=0.5), TypeError, "Attention: seed is a float, expected a whole number or None"),
    "large seed": (lambda: Attention(seed=2**63), ValueError, f"Attention: seed is {2**63}, expected 64 bits"),
    "factor": (lambda: Scale("2"), TypeError, "Scale: factor is a str, expected a number"),
    "axes": (lambda: Transpose(0, 2), ValueError, "Transpose: axes are (0, 2), expected each of 0 .. 1 once"),
    "reduction": (
        lambda: CrossEntropy(reduction="max"),
        ValueError,
        "CrossEntropy: reduction is 'max', expected one of",
    ),
    "smoothing": (
        lambda: SoftmaxCrossEntropy(label_smoothing=1.5),
        ValueError,
        "SoftmaxCrossEntropy: label_smoothing is 1.5, expected a finite number (least 0, most 1)",
    ),
    "lr": (lambda: SGD([Parameter(1.0)], lr=-1), ValueError, "SGD: lr is -1, expected a finite number (least 0)"),
    "betas": (lambda: AdamW([Parameter(1.0)], betas=(0.9, 1.0)), ValueError, "AdamW: betas is 1.0"),
    "one beta": (lambda: AdamW([Parameter(1.0)], betas=0.9), ValueError, "AdamW: betas is 0.9, expected two numbers"),
    "no parameters": (lambda: SGD([], lr=0.1), ValueError, "SGD: parameters is empty"),
    "a module": (lambda: AdamW(Linear(2, 2)), TypeError, "AdamW: parameters is a Linear, expected a list"),
    "modules": (lambda: AdamW([Linear(2, 2)]), TypeError, "AdamW: parameters holds a Linear, expected module.param"),
    "heads": (
        lambda: TransformerLM(5, 4, n_head=3, n_embd=4),
        ValueError,
        "TransformerBlock: n_embd is 4, which 3 heads",
    ),
    "text": (lambda: Tensor("abc"), TypeError, "Tensor: array is a str"),
    "nothing": (lambda: Tensor(None), TypeError, "Tensor: array is a NoneType"),
    "ragged": (lambda: Tensor([[1.0], [2.0, 3.0]]), ValueError, "Tensor: array is not a rectangular array"),
}


@pytest.mark.parametrize("case", BUILD)
def test_building_refuses(case):
    build, error, message = BUILD[case]
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value).startswith(message)


def test_a_gradient_of_the_wrong_shape_is_refused():
    Halves().answering(np.ones(2)).apply_fwd(Tensor(np.ones((2, 2)))).out_gradient = np.ones((2, 2))
    with pytest.raises(
        ValueError, match=r"^Halves: backward returned a gradient of shape \(2,\) for a of shape \(2, 2\)"
    ):
        tape_bwd()


def test_the_wrong_number_of_gradients_is_refused():
    Halves().answering((1.0, 1.0)).apply_fwd(Tensor(1.0))
    with pytest.raises(ValueError, match=r"^Halves: backward returned 2 gradients for 1 inputs"):
        tape_bwd()


def test_a_seed_of_the_wrong_shape_is_refused():
    out = Sigmoid().apply_fwd(Tensor(np.ones((2, 2))))
    with pytest.raises(ValueError, match=r"^Sigmoid: out_gradient has shape \(2,\), out_tensor has \(2, 2\)"):
        out.out_gradient = np.ones(2)
    tape.clear()


def test_a_network_has_no_backward_of_its_own():
    net = NeuralNetwork(2, 2, 2)
    net.apply_fwd(np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"^NeuralNetwork: a network is many applications on the tape; call tape_bwd"):
        net.apply_bwd()
    tape.clear()
