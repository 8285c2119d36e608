"""pykern.nn.MultiheadAttention against torch.nn.MultiheadAttention in float64, over every option of both of its calls.

Outputs, weights and the gradients of inputs, float masks and parameters. Where torch is NaN, or drops weights at
random, the formula stands beside it.
"""

import copy
import itertools

import pytest
import torch
from nn_twins import CLOSE, assert_same_gradients, randn, same_module

from pykern import _C, nn

BLOCKED = torch.tensor(
    [[False, True, True], [False, False, True], [False, True, False], [True, False, False]]
)  # [T=4, S=3]

# name: arguments of both forwards, for T=4 queries, S=3 keys, B=2 texts, 2 heads
MASKS = {
    "none": {},
    "bool attn_mask": {"attn_mask": BLOCKED},
    "float attn_mask": {"attn_mask": randn(4, 3, seed=7)},
    "float attn_mask with -inf": {"attn_mask": torch.zeros(4, 3, dtype=torch.float64).masked_fill(BLOCKED, -torch.inf)},
    "bool attn_mask per head": {"attn_mask": torch.stack([BLOCKED, ~BLOCKED, BLOCKED, BLOCKED])},
    "float attn_mask per head": {"attn_mask": randn(4, 4, 3, seed=7)},
    "bool padding": {"key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])},
    "float padding": {"key_padding_mask": randn(2, 3, seed=8)},
    "float padding with -inf": {"key_padding_mask": torch.tensor([[0.5, 0, -torch.inf], [0, -1, 0]]).double()},
    "bool attn_mask and padding": {
        "attn_mask": BLOCKED[[0, 1, 1, 0]],
        "key_padding_mask": torch.tensor([[False, True, False], [False, False, False]]),
    },
    "float attn_mask and padding": {"attn_mask": randn(4, 3, seed=7), "key_padding_mask": randn(2, 3, seed=8)},
    "float attn_mask per head and padding": {
        "attn_mask": randn(4, 4, 3, seed=7),
        "key_padding_mask": randn(2, 3, seed=8),
    },
}
SIZES = {"same sizes": {}, "own key and value sizes": {"kdim": 5, "vdim": 7}, "no biases": {"bias": False}}
EXTRA_KEYS = {
    "no extra key": {},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}


def pair(**options):
    """Our module and torch's with the same random weights; 6 wide, 2 heads."""
    options = {"dtype": torch.float64} | options
    ours, theirs = nn.MultiheadAttention(6, 2, **options), torch.nn.MultiheadAttention(6, 2, **options)
    same_module(ours, theirs)
    return ours, theirs


def both_masks(masks, *collected):
    """A copy of the masks for each list in collected, which receives those that are float: they have a gradient."""
    copies = [copy.deepcopy(masks) for _ in collected]
    for given, collect in zip(copies, collected, strict=True):
        collect += [mask.requires_grad_() for mask in given.values() if mask.dtype != torch.bool]
    return copies


def compare(ours, theirs, our_in, their_in, call, our_masks, their_masks):
    """Outputs, both kinds of weights, and every gradient of a random sum over output and weights."""
    for average in (True, False):
        our_out, our_weights = call(ours, our_in, average_attn_weights=average, **our_masks)
        their_out, their_weights = call(theirs, their_in, average_attn_weights=average, **their_masks)
        torch.testing.assert_close(our_weights, their_weights, **CLOSE)
        without, none = call(ours, our_in, need_weights=False, **our_masks)
        assert none is None and torch.equal(without, our_out)
        ours.zero_grad(), theirs.zero_grad()
        for x in (*our_in, *their_in):
            x.grad = None
        seed = randn(*our_weights.shape, seed=11)
        ours_total = torch.cat([our_out.flatten(), (our_weights * seed).sum()[None]])
        theirs_total = torch.cat([their_out.flatten(), (their_weights * seed).sum()[None]])
        assert_same_gradients(ours, theirs, our_in, their_in, ours_total, theirs_total)


@pytest.mark.parametrize("extra", EXTRA_KEYS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_cross_attention(mask, sizes, extra):
    for batch_first in (False, True):
        ours, theirs = pair(**SIZES[sizes], **EXTRA_KEYS[extra], batch_first=batch_first)

        def inputs(module=ours, batch_first=batch_first):
            batched = [
                randn(2, n, width, seed=n) for n, width in ((4, module.embed_dim), (3, module.kdim), (3, module.vdim))
            ]
            return [(x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_() for x in batched]

        our_in, their_in = inputs(), inputs()
        our_masks, their_masks = both_masks(MASKS[mask], our_in, their_in)
        call = lambda module, given, **options: module(*given[:3], **options)  # noqa: E731
        compare(ours, theirs, our_in, their_in, call, our_masks, their_masks)


@pytest.mark.parametrize("extra", EXTRA_KEYS)
@pytest.mark.parametrize("mask", ["none", "bool attn_mask", "float attn_mask per head", "bool padding"])
def test_equal_inputs_share_their_projection(mask, extra):
    """query, key, value all one tensor, and key and value one: fewer products, the same result."""
    for batch_first, memory in itertools.product((False, True), (False, True)):
        ours, theirs = pair(**EXTRA_KEYS[extra], batch_first=batch_first)

        def inputs(batch_first=batch_first, memory=memory):
            shapes = [(2, 4, 6), (2, 3, 6)] if memory else [(2, 3, 6)]
            shapes = [s if batch_first else (s[1], s[0], s[2]) for s in shapes]
            return [randn(*s, seed=s[0] + s[1]).requires_grad_() for s in shapes]

        our_in, their_in = inputs(), inputs()
        masks = {k: m if memory or k != "attn_mask" else m[..., :3, :] for k, m in MASKS[mask].items()}
        our_masks, their_masks = both_masks(masks, our_in, their_in)

        def call(module, given, memory=memory, **options):
            return module(given[0], *([given[1]] * 2 if memory else [given[0]] * 2), **options)

        compare(ours, theirs, our_in, their_in, call, our_masks, their_masks)


@pytest.mark.parametrize("extra", EXTRA_KEYS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(batch_first, extra):
    ours, theirs = pair(**EXTRA_KEYS[extra], batch_first=batch_first, kdim=5, vdim=7)
    for masks in (
        {},
        {"attn_mask": BLOCKED, "key_padding_mask": torch.tensor([False, True, False])},
        {"attn_mask": randn(2, 4, 3)},
        {"key_padding_mask": randn(3)},
    ):
        if "key_padding_mask" in masks and "attn_mask" in masks:
            masks = masks | {"attn_mask": BLOCKED[[0, 1, 1, 0]]}  # torch is NaN where nothing is left
        our_in = [randn(*s).requires_grad_() for s in ((4, 6), (3, 5), (3, 7))]
        their_in = [randn(*s).requires_grad_() for s in ((4, 6), (3, 5), (3, 7))]
        our_masks, their_masks = both_masks(masks, our_in, their_in)
        call = lambda module, given, **options: module(*given[:3], **options)  # noqa: E731
        compare(ours, theirs, our_in, their_in, call, our_masks, their_masks)


@pytest.mark.parametrize("extra", EXTRA_KEYS)
def test_evaluation_is_torchs_inference_path(extra):
    """Without gradients torch runs another kernel, its fast path, when there is no extra key."""
    ours, theirs = pair(**EXTRA_KEYS[extra], batch_first=True, dropout=0.5)
    ours.eval(), theirs.eval()
    x, padding = randn(2, 3, 6), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": BLOCKED[:3]}):
            for average in (True, False):
                out, weights = ours(x, x, x, average_attn_weights=average, **masks)
                expected, their_weights = theirs(x, x, x, average_attn_weights=average, **masks)
                torch.testing.assert_close(out, expected, **CLOSE)
                torch.testing.assert_close(weights, their_weights, **CLOSE)


@pytest.mark.parametrize("extra", EXTRA_KEYS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batched", [True, False])
def test_causal_hint(batched, padded, extra):
    ours, theirs = pair(**EXTRA_KEYS[extra], batch_first=True)
    x = randn(2, 5, 6) if batched else randn(5, 6)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True, False, True], [False] * 5])
    masks = {"key_padding_mask": padding if batched else padding[0]} if padded else {}
    expected, their_weights = theirs(x, x, x, attn_mask=causal, **masks)
    for hint in ({"is_causal": True}, {"is_causal": True, "attn_mask": causal}, {"attn_mask": causal}):
        out, weights = ours(x, x, x, **hint, **masks)
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(weights, their_weights, **CLOSE)


# ---- where torch is NaN


@pytest.mark.parametrize("kind", ["bool padding", "float padding", "bool attn_mask", "float attn_mask", "both"])
def test_a_query_with_no_key_left_gives_zero_where_torch_is_nan(kind):
    ours, theirs = pair(batch_first=True)
    x, y = randn(2, 3, 6).requires_grad_(), randn(2, 3, 6).requires_grad_()
    padding = torch.tensor([[True, True, True], [False, False, False]])
    first = torch.tensor([[True], [True], [False], [False]])[..., None].expand(4, 3, 3)  # both heads of the first text
    half = torch.tensor([[False, True, True]] * 3)
    masks = {
        "bool padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(2, 3).double().masked_fill(padding, -torch.inf)},
        "bool attn_mask": {"attn_mask": first},
        "float attn_mask": {"attn_mask": torch.zeros(4, 3, 3).double().masked_fill(first, -torch.inf)},
        "both": {"attn_mask": half, "key_padding_mask": torch.tensor([[True, False, False], [False] * 3])},
    }[kind]
    out, weights = ours(x, x, x, **masks)
    expected, their_weights = theirs(y, y, y, **masks)
    assert expected[0].isnan().all() and their_weights[0].isnan().all()
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(3, 6), rtol=0, atol=0)
    assert weights[0].eq(0).all()
    torch.testing.assert_close(out[1], expected[1], **CLOSE)
    torch.testing.assert_close(weights[1], their_weights[1], **CLOSE)
    (out.sum() + (weights * randn(2, 3, 3)).sum()).backward()
    (expected[1].sum() + (their_weights[1] * randn(2, 3, 3)[1]).sum()).backward()
    assert x.grad[0].eq(0).all()
    torch.testing.assert_close(x.grad[1], y.grad[1], **CLOSE)
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_padding_may_hold_anything():
    ours, _ = pair(batch_first=True)
    x, padding = randn(2, 4, 6), torch.tensor([[False, False, True, True], [False] * 4])
    clean, clean_weights = ours(x, x, x, key_padding_mask=padding)
    keys = x.masked_fill(padding[..., None], torch.nan)
    out, weights = ours(x, keys, keys, key_padding_mask=padding)
    torch.testing.assert_close(out, clean, **CLOSE)
    torch.testing.assert_close(weights, clean_weights, **CLOSE)


def test_weights_of_more_keys_than_a_head_is_wide():
    """They once came from attention over an identity matrix, which ends at S = 1024."""
    ours, theirs = pair()
    x, keys = randn(2, 1, 6), randn(1500, 1, 6, seed=1)
    for average in (True, False):
        weights = ours(x, keys, keys, average_attn_weights=average)[1]
        torch.testing.assert_close(weights, theirs(x, keys, keys, average_attn_weights=average)[1], **CLOSE)
        assert weights.shape[-1] == 1500


# ---- dropout


def formula(module, x, memory, keep, p):
    """Output and undropped weights of batch-first x, memory: keep [B, heads, T, S] says which weights stay."""
    w, b = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (t @ w[i].T + b[i] for i, t in enumerate((x, memory, memory)))
    if module.bias_k is not None:
        k, v = (torch.cat([t, e.expand(2, 1, 6)], 1) for t, e in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([t, torch.zeros(2, 1, 6).double()], 1) for t in (k, v))
        keep = torch.cat([keep, keep[..., :1]], -1)  # a value of zeros: whatever becomes of its weight
    q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.mT / 3**0.5).softmax(-1)
    heads = (weights * keep / (1 - p)) @ v
    return heads.transpose(1, 2).flatten(2) @ module.out_proj.weight.T + module.out_proj.bias, weights


def drawn(p, *shape):
    """What dropout keeps when the generator's next number is the seed."""
    keep = torch.empty(shape, dtype=torch.bool)
    _C.attention_dropout(torch.randint(-(2**63), 2**63 - 1, (1,)), keep, dropout_p=p)
    return keep


@pytest.mark.parametrize("extra", EXTRA_KEYS)
def test_dropout_is_its_formula(extra):
    ours, _ = pair(**EXTRA_KEYS[extra], batch_first=True, dropout=0.4)
    twin = copy.deepcopy(ours)
    x, memory = randn(2, 5, 6).requires_grad_(), randn(2, 7, 6, seed=1).requires_grad_()
    y, y_memory = (t.detach().clone().requires_grad_() for t in (x, memory))
    torch.manual_seed(3)
    keep = drawn(0.4, 2, 2, 5, 7 + (ours.bias_k is not None))
    assert keep.any() and not keep.all()
    expected, undropped = formula(twin, y, y_memory, keep, 0.4)
    torch.manual_seed(3)
    out, weights = ours(x, memory, memory, average_attn_weights=False)
    torch.testing.assert_close(weights, undropped, **CLOSE)
    assert_same_gradients(ours, twin, [x, memory], [y, y_memory], out, expected)


def test_dropout_follows_torchs_seed_and_ends_with_training():
    ours, theirs = pair(batch_first=True, dropout=0.5)
    x = randn(2, 5, 6)

    def run(seed):
        torch.manual_seed(seed)
        return ours(x, x, x)[0]

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    torch.manual_seed(0)
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    ours.eval(), theirs.eval()
    assert torch.equal(run(0), run(1))
    torch.testing.assert_close(run(0), theirs(x, x, x)[0], **CLOSE)


def test_dropout_of_everything():
    ours, theirs = pair(batch_first=True, dropout=1.0)
    x = randn(2, 5, 6).requires_grad_()
    out = ours(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(out, theirs(x, x, x, need_weights=False)[0], **CLOSE)
    out.sum().backward()
    assert x.grad.eq(0).all()


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    """Ten roundings of the dtype on numbers of size 1."""
    ours, theirs = pair(add_bias_kv=True, add_zero_attn=True, batch_first=True)
    x, mask = randn(2, 3, 6), randn(3, 3, seed=5)
    expected, their_weights = theirs(x, x, x, attn_mask=mask)
    ours.to(dtype)
    out, weights = ours(*[x.to(dtype)] * 3, attn_mask=mask.to(dtype))
    assert out.dtype == weights.dtype == dtype
    close = {"rtol": 0, "atol": 10 * torch.finfo(dtype).eps}
    torch.testing.assert_close(weights.double(), their_weights, **close)
    torch.testing.assert_close(out.double(), expected, **(close | {"rtol": 10 * torch.finfo(dtype).eps}))


def test_autocast():
    ours, _ = pair(add_bias_kv=True, add_zero_attn=True, batch_first=True, dtype=torch.float32)
    x, mask = randn(2, 3, 6, dtype=torch.float32), randn(3, 3, dtype=torch.float32)
    full, full_weights = ours(x, x, x, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float(), full_weights, rtol=0.05, atol=0.02)
    torch.testing.assert_close(out.float(), full, rtol=0.05, atol=0.1)
