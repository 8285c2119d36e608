"""Scaled dot-product attention: softmax(scale q k^T + bias) v, over the keys that causal and mask allow.

q [B, H, T, D]    k [B, G, S, D]    v [B, G, S, E]    out [B, H, T, E]

H / G query heads share a key head.
"""

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module


class Attention(Module):
    """apply_fwd(q, k, v), optionally followed by a mask (bool, True = attend) and a bias (float), in any order.

    P = softmax(scale q k^T + bias), out = P v;  g_v = P^T g, g_P = g v^T, g_S = P (g_P - sum(P g_P)),
    g_q = scale g_S k, g_k = scale g_S^T q, g_bias = g_S. P is never stored as a whole.
    causal: query i sees the keys up to i + S - T. scale is 1 / sqrt(D) unless given.
    Mask and bias broadcast to [B, H, T, S]. A query that may look nowhere gives 0.
    """

    def __init__(self, *, causal: bool = False, scale: float | None = None):
        self.causal = bool(causal)
        self.scale = scale if scale is None else inputs.number("Attention", "scale", scale)

    def check(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *mask_and_bias: np.ndarray) -> None:
        inputs.floats("Attention", q=q, k=k, v=v)
        for argument, tensor in (("q", q), ("k", k), ("v", v)):
            inputs.rank("Attention", argument, tensor, 4, exactly=True)
        (B, H, T, D), (_, G, S, _) = q.shape, k.shape
        if k.shape[0] != B or k.shape[3] != D:
            raise ValueError(f"Attention: k has shape {k.shape}, expected [{B}, G, S, {D}] for q {q.shape}")
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(f"Attention: v has shape {v.shape}, expected [{B}, {G}, {S}, E] for k {k.shape}")
        if G == 0 or H % G:
            raise ValueError(f"Attention: k has {G} heads, which do not divide the {H} heads of q")
        if len({extra.dtype.kind for extra in mask_and_bias}) < len(mask_and_bias):
            raise ValueError("Attention: mask_and_bias holds two masks or two biases, expected at most one of each")
        for extra in mask_and_bias:
            inputs.broadcast_to("Attention", "mask_and_bias", extra, (B, H, T, S))

    def forward(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *mask_and_bias: np.ndarray) -> np.ndarray:
        scores = (*q.shape[:3], k.shape[2])
        self.mask = self.bias = None
        for extra in mask_and_bias:
            expanded = np.broadcast_to(extra, scores)
            if extra.dtype.kind == "b":
                self.mask = expanded
            else:
                self.bias = expanded
        self.s = q.shape[3] ** -0.5 if self.scale is None else self.scale
        out, self.lse = np.empty((*q.shape[:3], v.shape[3]), q.dtype), np.empty(q.shape[:3], q.dtype)
        _C.attention_forward(q, k, v, self.mask, self.bias, out, self.lse, causal=self.causal, scale=self.s)
        return out

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> list:
        q, k, v, *mask_and_bias = in_tensors
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        gradients = [None if extra.dtype.kind == "b" else np.empty_like(extra) for extra in mask_and_bias]
        dbias = next((g.reshape((1,) * (4 - g.ndim) + g.shape) for g in gradients if g is not None), None)  # a view
        _C.attention_backward(
            q, k, v, self.mask, self.bias, out_tensor, self.lse, out_gradient, None, dq, dk, dv, dbias,
            causal=self.causal, scale=self.s,
        )  # fmt: skip
        return [dq, dk, dv, *gradients]
