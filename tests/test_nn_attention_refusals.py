"""pykern.nn.MultiheadAttention refuses bad input in a sentence that names it."""

import pytest
import torch

from pykern import nn

T4, S3 = torch.ones(2, 4, 6), torch.ones(2, 3, 6)


def call(query=T4, key=S3, value=S3, batch_first=True, **options):
    return nn.MultiheadAttention(6, 2, batch_first=batch_first)(query, key, value, **options)


REFUSALS = {
    "heads that do not divide": (lambda: nn.MultiheadAttention(4, 3), ValueError, "3 heads do not divide embed_dim 4"),
    "no heads": (lambda: nn.MultiheadAttention(4, 0), ValueError, "0 heads do not divide embed_dim 4"),
    "dropout": (lambda: nn.MultiheadAttention(4, 2, dropout=1.5), ValueError, "dropout is 1.5, expected 0..1"),
    "a list": (lambda: call(query=[1.0]), TypeError, "query must be a torch.Tensor, got list"),
    "rank": (lambda: call(query=torch.ones(6)), ValueError, "query has shape [6], expected 2 or 3 dimensions"),
    "key without a batch": (
        lambda: call(key=torch.ones(3, 6)),
        ValueError,
        "key has shape [3, 6], expected 3 dimensions, the last of 6",
    ),
    "width of the query": (
        lambda: call(query=torch.ones(2, 4, 5)),
        ValueError,
        "query has shape [2, 4, 5], expected 3 dimensions, the last of 6",
    ),
    "width of the value": (
        lambda: call(value=torch.ones(2, 3, 5)),
        ValueError,
        "value has shape [2, 3, 5], expected 3 dimensions, the last of 6",
    ),
    "number of values": (
        lambda: call(value=torch.ones(2, 4, 6)),
        ValueError,
        "value has shape [2, 4, 6], key [2, 3, 6]: they must differ in nothing but the last dimension",
    ),
    "batch": (lambda: call(query=torch.ones(1, 4, 6)), ValueError, "key has a batch of 2, query one of 1"),
    "second batch": (
        lambda: call(torch.ones(4, 1, 6), torch.ones(3, 2, 6), torch.ones(3, 2, 6), batch_first=False),
        ValueError,
        "key has a batch of 2, query one of 1",
    ),
    "integer mask": (
        lambda: call(attn_mask=torch.ones(4, 3, dtype=torch.int64)),
        TypeError,
        "attn_mask is torch.int64, expected bool or a floating dtype",
    ),
    "mask is a list": (lambda: call(attn_mask=[True]), TypeError, "attn_mask must be a torch.Tensor, got list"),
    "attn_mask": (
        lambda: call(attn_mask=torch.ones(3, 4) > 0),
        ValueError,
        "attn_mask has shape [3, 4], expected [4, 3] or [4, 4, 3]",
    ),
    "attn_mask to broadcast": (
        lambda: call(attn_mask=torch.ones(1, 4, 3)),
        ValueError,
        "attn_mask has shape [1, 4, 3], expected [4, 3] or [4, 4, 3]",
    ),
    "padding": (
        lambda: call(key_padding_mask=torch.ones(3, 2) > 0),
        ValueError,
        "key_padding_mask has shape [3, 2], expected [2, 3]",
    ),
    "padding without a batch": (
        lambda: call(T4[0], S3[0], S3[0], key_padding_mask=torch.ones(1, 3) > 0),
        ValueError,
        "key_padding_mask has shape [1, 3], expected [3]",
    ),
    "padding, batch second": (
        lambda: call(torch.ones(4, 2, 6), torch.ones(3, 2, 6), torch.ones(3, 2, 6), False, key_padding_mask=T4[0] > 0),
        ValueError,
        "key_padding_mask has shape [4, 6], expected [2, 3]",
    ),
    "causal hint with other keys": (
        lambda: call(is_causal=True),
        ValueError,
        "is_causal without attn_mask needs as many keys as queries, not 3 for 4",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    refused, error, message = REFUSALS[case]
    with pytest.raises(error) as caught:
        refused()
    assert str(caught.value) == f"MultiheadAttention: {message}"
