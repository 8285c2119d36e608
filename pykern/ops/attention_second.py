"""The second derivative of attention: how its gradients dq, dk, dv, dbias, dsinks depend on what they are made from.

The gradients, of the weights P and p0 (of the sink), the dropout factors Z and y = q k^T, score = f(y) + ...:

    R = Z (dout v^T)    delta = sum(P R) - dlse    dS = P (R - delta)    dY = f'(y) dS
    dq = dY k    dk = dY^T q    dv = (Z P)^T dout    dbias = dS    dsinks = -p0 delta

With the gradients cq, ck, cv, cbias, csinks of some scalar by these, and U = f' (cq k^T + q ck^T) + cbias by dS,
N = Z (dout cv^T), the scalar has the gradients

    by delta   gdelta = -sum(P U) - csinks p0        by R   gR = P (U + gdelta)
    by P       gP = U (R - delta) + N + gdelta R     by p0  g0 = -csinks delta
    by score   gS = P (gP - m),  m = sum(P gP) + p0 g0
    by y       gY = f' gS + f'' dS (cq k^T + q ck^T)

from which follow those by q, k, v, dout, dlse, bias and sinks, at the end of _add_block. Blocks of rows, added up.
"""

import torch
from torch import Tensor

from pykern.ops._library import define, operators
from pykern.ops.attention_dropout import factors
from pykern.ops.attention_formula import (
    BIAS,
    CU_Q,
    DROPOUT,
    LEFT,
    OPTIONS,
    SEED,
    SINKS,
    Block,
    blocks,
    compute_dtype,
    scores,
    softmax,
)


def _dropout(block: Block, q: Tensor, options) -> Tensor | float:
    """Z, what dropout multiplies the weights of the block's rows q by."""
    if options[DROPOUT] == 0:
        return 1.0
    B, H = q.shape[:2]
    sequences = torch.arange(B, device=q.device) if options[CU_Q] is None else block.rows.new_tensor([block.sequence])
    keys = slice(block.keys.start - block.first_key, block.keys.stop - block.first_key)
    return factors(options[SEED], options[DROPOUT], sequences, H, block.rows - block.first_row, keys, dtype=q.dtype)


def _add_block(block: Block, inputs, cotangents, sums, options) -> None:
    """Adds what the block's rows contribute to the gradients of q, k, v, dout, dlse, bias and sinks."""
    k, v, ck, cv = (x[:, :, block.keys] for x in (*inputs[1:3], *cotangents[1:3]))
    q, dout, cq = (block.of_rows(x) for x in (inputs[0], inputs[3], cotangents[0]))
    dlse, cbias, csinks = inputs[4], cotangents[3], cotangents[4]
    s = scores(block, q, k, options)
    P, p0 = softmax(s, options[SINKS])
    Z = _dropout(block, q, options)
    c0 = torch.zeros_like(p0) if csinks is None else csinks.view(1, -1, 1, 1).expand_as(p0)

    R = Z * s.pairs(dout, v)
    delta = (P * R).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - block.of_rows(dlse)[..., None]
    dS = s.hide(P * (R - delta))
    dY = s.slope * dS
    C = s.pairs(cq, k) + s.pairs(q, ck)
    U = s.slope * C
    if cbias is not None:
        U = U + s.hide(block.of_scores(cbias))

    gdelta = -(P * U).sum(-1, keepdim=True) - (p0 * c0).sum(-1, keepdim=True)
    gR = Z * s.hide(P * (U + gdelta))
    gP = U * (R - delta) + Z * s.pairs(dout, cv) + gdelta * R
    g0 = -c0 * delta
    m = (P * gP).sum(-1, keepdim=True) + (p0 * g0).sum(-1, keepdim=True)
    gS = s.hide(P * (gP - m))
    gY = s.slope * gS + s.bend * (dS * C)

    gq, gk, gv, gdout, gdlse, gbias, gsinks = sums
    gq.index_copy_(2, block.rows, s.over_keys(gY, k) + s.over_keys(dY, ck))
    gk[:, :, block.keys] += s.over_rows(gY, q) + s.over_rows(dY, cq)
    gv[:, :, block.keys] += s.over_rows(gR, dout)
    gdout.index_copy_(2, block.rows, s.over_keys(gR, v) + s.over_keys(Z * P, cv))
    if gdlse is not None:
        gdlse.index_copy_(2, block.rows, -gdelta[..., 0])
    if gbias is not None:
        block.add_scores(gbias, gS)
    if gsinks is not None:
        gsinks += torch.where(p0 == 0, 0.0, p0 * (g0 - m)).sum((0, 2, 3))  # m may be NaN where a row sees nothing


def _second(q, k, v, dout, dlse, cq, ck, cv, cbias, csinks, *options):
    dtype = compute_dtype(q)
    wide = [None if x is None else x.to(dtype) for x in (q, k, v, dout, dlse, cq, ck, cv, cbias, csinks)]
    inputs, cotangents = wide[:5], wide[5:]
    bias, sinks = options[BIAS], options[SINKS]
    results = (q, k, v, dout, dlse, bias, sinks)
    sums = [None if x is None else x.new_zeros(x.shape, dtype=dtype) for x in results]
    for block in blocks(q, k, options):
        _add_block(block, inputs, cotangents, sums, options)
    return tuple(q.new_empty(0) if x is None else total.to(x.dtype) for total, x in zip(sums, results, strict=True))


def _like(q, k, v, dout, dlse, cq, ck, cv, cbias, csinks, *options):
    results = (q, k, v, dout, dlse, options[BIAS], options[SINKS])
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in results)


_attention_second = define(
    "attention_second(Tensor q, Tensor k, Tensor v, Tensor dout, Tensor? dlse, Tensor cq, Tensor ck, Tensor cv, "
    f"Tensor? cbias, Tensor? csinks, {OPTIONS}) -> ({', '.join(['Tensor'] * 7)})",
    _second,
    _like,
)


class AttentionBackward(torch.autograd.Function):
    """Goes in front of attention_backward. out and lse are functions of q, k, ... here: they get no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, out, lse, dout, dlse, want_bias, want_sinks, *options):
        ctx.save_for_backward(q, k, v, dout, dlse, *options[:LEFT])
        ctx.wants = want_bias, want_sinks
        ctx.numbers = options[LEFT:]
        op = operators["attention_backward"]
        return op.below_autograd(q, k, v, out, lse, dout, dlse, want_bias, want_sinks, *options)

    @staticmethod
    def backward(ctx, cq, ck, cv, cbias, csinks):
        q, k, v, dout, dlse, *tensors = ctx.saved_tensors
        want_bias, want_sinks = ctx.wants
        gq, gk, gv, gdout, gdlse, gbias, gsinks = _attention_second(
            *(q, k, v, dout, dlse, cq, ck, cv, cbias if want_bias else None, csinks if want_sinks else None),
            *(*tensors, *ctx.numbers),
        )
        return (
            *(gq, gk, gv, None, None, gdout, None if dlse is None else gdlse, None, None),  # to want_sinks
            *(None, None if tensors[BIAS] is None else gbias, None, None if tensors[SINKS] is None else gsinks),
            *([None] * 8),
        )
