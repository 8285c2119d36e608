"""attention: the words of every refusal of an option, by pykern.attention and by the kernels, which write nothing."""

import math
import re

import numpy as np
import pytest
import torch

import pykern
from pykern import _C

pytestmark = pytest.mark.one_isa


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def offsets(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


DENSE = dict(q=ones(2, 4, 5, 3), k=ones(2, 2, 7, 3), v=ones(2, 2, 7, 6))
RAGGED = dict(q=ones(5, 4, 3), k=ones(7, 2, 3), v=ones(7, 2, 6))
CU = dict(cu_seqlens_q=offsets(0, 2, 5), cu_seqlens_k=offsets(0, 3, 7))

# (error, what is wrong, words behind "attention: ")
OPTIONS = [
    (ValueError, dict(window=5), "window is 5, expected (left, right), numbers of keys or None"),
    (ValueError, dict(window=(1, 2, 3)), "window is (1, 2, 3), expected (left, right), numbers of keys or None"),
    (ValueError, dict(window="ab"), "window is 'ab', expected (left, right), numbers of keys or None"),
    (ValueError, dict(window=(-1, 0)), "window is (-1, 0), expected numbers of keys that are not negative"),
    (ValueError, dict(window=[0, -3]), "window is [0, -3], expected numbers of keys that are not negative"),
    (ValueError, dict(window=(0, -3), causal=True), "window is (0, -3), expected numbers of keys that are not neg"),
    (TypeError, dict(window=(1.0, None)), "window is (1.0, None), expected int or None for left and right"),
    (TypeError, dict(window=(True, 0)), "window is (True, 0), expected int or None for left and right"),
    (TypeError, dict(window=(None, "3")), "window is (None, '3'), expected int or None for left and right"),
    (ValueError, dict(softcap=-1.0), "softcap is -1, expected a positive number, or 0 for none"),
    (ValueError, dict(softcap=math.inf), "softcap is inf, expected a positive number, or 0 for none"),
    (ValueError, dict(softcap=math.nan), "softcap is nan, expected a positive number, or 0 for none"),
    (TypeError, dict(alibi_slopes=[0.5] * 4), "alibi_slopes must be a torch.Tensor, got list"),
    (TypeError, dict(alibi_slopes=ones(4).double()), "alibi_slopes has dtype float64, expected float32"),
    (TypeError, dict(alibi_slopes=ones(2, 4).bfloat16()), "alibi_slopes has dtype bfloat16, expected float32"),
    (ValueError, dict(alibi_slopes=ones(2)), "alibi_slopes has shape [2], expected [4] or [2, 4]"),
    (ValueError, dict(alibi_slopes=ones(4, 2)), "alibi_slopes has shape [4, 2], expected [4] or [2, 4]"),
    (ValueError, dict(alibi_slopes=ones(1, 4)), "alibi_slopes has shape [1, 4], expected [4] or [2, 4]"),
    (
        ValueError,
        dict(alibi_slopes=ones(4).requires_grad_()),
        "alibi_slopes takes no gradient; pass -slopes * distance as bias to learn them",
    ),
    (TypeError, dict(sinks=[0.0] * 4), "sinks must be a torch.Tensor, got list"),
    (TypeError, dict(sinks=ones(4).double()), "sinks has dtype float64 but q has float32"),
    (ValueError, dict(sinks=ones(2)), "sinks has shape [2], expected heads of q = 4 in dimension 0"),
    (ValueError, dict(sinks=ones(1, 4)), "sinks must be [H], got shape [1, 4]"),
    (ValueError, dict(dropout_p=-0.1), "dropout_p is -0.1, expected 0..1"),
    (ValueError, dict(dropout_p=1.5, seed=1), "dropout_p is 1.5, expected 0..1"),
    (ValueError, dict(dropout_p=math.nan), "dropout_p is nan, expected 0..1"),
    (TypeError, dict(dropout_p=0.5, seed=1.5), "seed must be an int or an int64 tensor, got float"),
    (TypeError, dict(dropout_p=0.5, seed=True), "seed must be an int or an int64 tensor, got bool"),
    (TypeError, dict(dropout_p=0.5, seed=offsets(1)), "seed has dtype int32, expected int64"),
    (ValueError, dict(dropout_p=0.5, seed=2**63), "seed is 9223372036854775808, expected 64 bits"),
    (ValueError, dict(dropout_p=0.5, seed=torch.tensor([1, 2])), "seed has shape [2], expected one element"),
    (ValueError, dict(dropout_p=0.5, seed=torch.zeros(0).long()), "seed has shape [0], expected one element"),
]


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: next(iter(case[1])))
def test_option(case):
    error, options, words = case
    with pytest.raises(error, match=re.escape(f"attention: {words}")):
        pykern.attention(**DENSE, **options)
    if "alibi_slopes" not in options:  # the shape's words name the sequences
        with pytest.raises(error, match=re.escape(f"attention: {words}")):
            pykern.attention(**RAGGED, **CU, **options)


RAGGED_CASES = [
    (TypeError, dict(cu_seqlens_q=[0, 2, 5]), "cu_seqlens_q must be a torch.Tensor, got list"),
    (TypeError, dict(cu_seqlens_k=(0, 3, 7)), "cu_seqlens_k must be a torch.Tensor, got tuple"),
    (TypeError, dict(cu_seqlens_q=offsets(0, 2, 5, dtype=torch.int64)), "cu_seqlens_q has dtype int64, expected int32"),
    (TypeError, dict(cu_seqlens_k=offsets(0, 3, 7).float()), "cu_seqlens_k has dtype float32, expected int32"),
    (ValueError, dict(cu_seqlens_k=None), "cu_seqlens_q and cu_seqlens_k must be given together"),
    (ValueError, dict(cu_seqlens_q=None), "cu_seqlens_q and cu_seqlens_k must be given together"),
    (ValueError, dict(cu_seqlens_q=offsets(0, 2, 5)[None]), "cu_seqlens_q must be [sequences + 1], got shape [1, 3]"),
    (ValueError, dict(cu_seqlens_q=offsets()), "cu_seqlens_q is empty, expected sequences + 1 numbers"),
    (
        ValueError,
        dict(cu_seqlens_k=offsets(0, 3, 5, 7)),
        "cu_seqlens_k has shape [4], expected that of cu_seqlens_q = 3 in dimension 0",
    ),
    (ValueError, dict(cu_seqlens_q=offsets(1, 2, 5)), "cu_seqlens_q[0] is 1, expected 0"),
    (ValueError, dict(cu_seqlens_q=offsets(0, 6, 5)), "cu_seqlens_q[2] is 5, less than the 6 before it"),
    (ValueError, dict(cu_seqlens_k=offsets(0, -1, 7)), "cu_seqlens_k[1] is -1, less than the 0 before it"),
    (ValueError, dict(cu_seqlens_q=offsets(0, 2, 4)), "cu_seqlens_q ends with 4, expected the 5 rows of q"),
    (ValueError, dict(cu_seqlens_k=offsets(0, 2, 8)), "cu_seqlens_k ends with 8, expected the 7 rows of k"),
    (ValueError, dict(mask=ones(7).bool()), "mask and bias cannot be combined with cu_seqlens_q"),
    (ValueError, dict(bias=ones(5, 7)), "mask and bias cannot be combined with cu_seqlens_q"),
    (ValueError, dict(alibi_slopes=ones(5)), "alibi_slopes has shape [5], expected [4] or [2, 4]"),
    (ValueError, dict(alibi_slopes=ones(1, 4)), "alibi_slopes has shape [1, 4], expected [4] or [2, 4]"),
    (ValueError, dict(q=ones(1, 4, 5, 3)), "q must be [total, H, D], got shape [1, 4, 5, 3]"),
    (ValueError, dict(k=ones(7, 3)), "k must be [total, G, D], got shape [7, 3]"),
    (ValueError, dict(v=ones(1, 2, 7, 6)), "v must be [total, G, E], got shape [1, 2, 7, 6]"),
    (ValueError, dict(k=ones(7, 3, 3)), "v has 2 heads but k has 3"),
    (ValueError, dict(v=ones(6, 2, 6)), "v has 6 keys but k has 7"),
]


@pytest.mark.parametrize("case", RAGGED_CASES, ids=lambda case: f"{next(iter(case[1]))}: {case[2][:40]}")
def test_ragged(case):
    error, changed, words = case
    with pytest.raises(error, match=re.escape(f"attention: {words}")):
        pykern.attention(**(RAGGED | CU | changed))


def test_the_options_that_are_refused_when_wrong_are_taken_when_right():
    pykern.attention(**DENSE, window=[3, None], softcap=1, alibi_slopes=ones(2, 4), sinks=ones(4), dropout_p=1, seed=-1)
    pykern.attention(**RAGGED, **CU, window=(0, 0), softcap=0.5, alibi_slopes=ones(4), sinks=ones(4))
    with torch.no_grad():
        pykern.attention(**DENSE, alibi_slopes=ones(4).requires_grad_())


# ---- the kernels


def sentinel(*shape, dtype=np.float64):
    return np.full(shape, 7.0, dtype)


def test_refusals_of_the_kernel_write_nothing():
    q, k, v = np.ones((2, 4, 5, 3)), np.ones((2, 2, 7, 3)), np.ones((2, 2, 7, 6))
    dout, slopes, sinks, seed = np.ones((2, 4, 5, 6)), np.ones((2, 4), np.float32), np.ones(4), np.array([1])
    out, lse, dq, dk, dv, dsinks = (sentinel(*x.shape) for x in (dout, dout[..., 0], q, k, v, sinks))
    readonly, wide = sentinel(4), sentinel(2, 4, 5, 8)
    readonly.flags.writeable = False
    alias = np.lib.stride_tricks.as_strided
    on = dict(alibi_slopes=slopes, sinks=sinks, dropout_p=0.5, seed=seed, window_left=2, window_right=3, softcap=1.5)

    def forward(**changed):
        arguments = dict(out=out, lse=lse) | {n: changed.pop(n) for n in ("out", "lse") if n in changed}
        _C.attention_forward(q, k, v, None, None, *arguments.values(), causal=False, scale=1.0, **(on | changed))

    def backward(**changed):
        given = dict(dsinks=dsinks) | {n: changed.pop(n) for n in ("dsinks", "dq") if n in changed}
        arguments = (np.ones_like(out), np.ones_like(lse), dout, None, given.get("dq", dq), dk, dv, None)
        _C.attention_backward(
            *(q, k, v, None, None, *arguments), given["dsinks"], causal=False, scale=1.0, **(on | changed)
        )

    either = [
        (ValueError, dict(window_left=-2), "window is (-2, 3), expected numbers of keys, or None for no limit"),
        (ValueError, dict(window_right=-9), "window is (2, -9), expected numbers of keys, or None for no limit"),
        (ValueError, dict(softcap=-1.0), "softcap is -1, expected a positive number, or 0 for none"),
        (ValueError, dict(dropout_p=1.5), "dropout_p is 1.5, expected 0..1"),
        (ValueError, dict(dropout_p=math.nan), "dropout_p is nan, expected 0..1"),
        (ValueError, dict(seed=None), "dropout_p is 0.5 without a seed"),
        (ValueError, dict(seed=np.array([1, 2])), "seed has shape [2], expected one element"),
        (TypeError, dict(seed=np.array([1.0])), "seed has dtype float64, expected int64"),
        (ValueError, dict(alibi_slopes=slopes[0]), "alibi_slopes must be [B, H], got shape [4]"),
        (ValueError, dict(alibi_slopes=slopes[:1]), "alibi_slopes has shape [1, 4], expected batch = 2 in dimension 0"),
        (ValueError, dict(alibi_slopes=slopes[:, :3]), "alibi_slopes has shape [2, 3], expected heads of q = 4 in dim"),
        (TypeError, dict(alibi_slopes=np.ones((2, 4))), "alibi_slopes has dtype float64, expected float32"),
        (ValueError, dict(sinks=np.ones((1, 4))), "sinks must be [H], got shape [1, 4]"),
        (ValueError, dict(sinks=sinks[:3]), "sinks has shape [3], expected heads of q = 4 in dimension 0"),
        (TypeError, dict(sinks=sinks.astype(np.float32)), "sinks has dtype float32 but q has float64"),
        (
            ValueError,
            dict(cu_seqlens_q=np.array([0, 5], np.int32)),
            "cu_seqlens_q and cu_seqlens_k must be given together",
        ),
        (
            ValueError,
            dict(cu_seqlens_q=np.array([0, 5], np.int32), cu_seqlens_k=np.array([0, 7], np.int32)),
            "q has shape [2, 4, 5, 3], expected one batch of packed sequences = 1 in dimension 0",
        ),
    ]
    cases = [(call, *case) for call in (forward, backward) for case in either]
    cases += [
        (forward, ValueError, dict(out=wide[..., :6], sinks=wide[0, :, 0, 7]), "out shares memory with sinks"),
        (backward, ValueError, dict(dsinks=sentinel(1, 4)), "dsinks has shape [1, 4] but sinks has [4]"),
        (backward, ValueError, dict(dsinks=sentinel(3)), "dsinks has shape [3] but sinks has [4]"),
        (backward, ValueError, dict(sinks=None), "dsinks is given without sinks"),
        (backward, TypeError, dict(dsinks=sentinel(4, dtype=np.float32)), "dsinks has dtype float32 but q has float64"),
        (backward, ValueError, dict(dsinks=readonly), "dsinks is read-only"),
        (backward, ValueError, dict(dsinks=alias(wide, (4,), (0,))), "elements of dsinks share memory"),
        (backward, ValueError, dict(dsinks=sinks), "dsinks shares memory with sinks"),
        (backward, ValueError, dict(dq=wide[..., :3], dsinks=wide[0, 0, 0, :4]), "dsinks shares memory with dq"),
    ]
    for call, error, changed, words in cases:
        with pytest.raises(error, match=re.escape(f"attention: {words}")):
            call(**changed)
        for array in (out, lse, dq, dk, dv, dsinks, wide, readonly):
            assert (array == 7.0).all(), f"written although refused: {words}"
        assert (sinks == 1.0).all()
    forward()
    backward()
    assert not any((x == 7.0).any() for x in (out, lse, dq, dk, dv, dsinks))


def test_refusals_of_the_generator():
    seed, keep = np.array([1]), np.zeros((2, 3, 4, 5), bool)
    readonly = keep.copy()
    readonly.flags.writeable = False
    cases = [
        (ValueError, dict(dropout_p=-1.0), "dropout_p is -1, expected 0..1"),
        (TypeError, dict(keep=np.zeros((2, 3, 4, 5))), "keep has dtype float64, expected bool"),
        (ValueError, dict(keep=keep[0]), "keep must be [B, H, T, S], got shape [3, 4, 5]"),
        (ValueError, dict(keep=keep[..., ::2]), "keep of shape [2, 3, 4, 3] must be contiguous"),
        (ValueError, dict(keep=readonly), "keep is read-only"),
        (TypeError, dict(seed=np.array([1], np.int32)), "seed has dtype int32, expected int64"),
        (ValueError, dict(seed=np.array([1, 2])), "seed has shape [2], expected one element"),
        (TypeError, dict(seed=None), "seed must be an array, got NoneType"),
    ]
    for error, changed, words in cases:
        arguments = dict(seed=seed, keep=keep, dropout_p=0.0 if "keep" in changed else 0.5) | changed
        with pytest.raises(error, match=re.escape(f"attention: {words}")):
            _C.attention_dropout(arguments["seed"], arguments["keep"], dropout_p=arguments["dropout_p"])
        assert not keep.any() and not readonly.any()
    _C.attention_dropout(seed, keep, dropout_p=0.0)
    assert keep.all()
