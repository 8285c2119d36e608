"""Scaled dot-product attention: softmax(score) v over the keys that causal, window and mask allow.

q [B, H, T, D]    k [B, G, S, D]    v [B, G, S, E]    out [B, H, T, E]

score(t, s) = cap(scale q_t k_s) - slope |d - s| + bias(t, s), d = S - T + t;  H / G query heads share a key head.
"""

from typing import Any

import numpy as np

from pykern import _C

from . import inputs
from .engine import Module, Parameter

SEEDS = np.iinfo(np.int64)


def limits(window: Any) -> tuple[int, int]:
    """(left, right) of the kernels, -1 for unlimited."""
    if window is None:
        return -1, -1
    for limit in inputs.pair("Attention", "window", window):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, np.integer))):
            raise TypeError(f"Attention: window is {window!r}, expected two whole numbers or None")
        if limit is not None and limit < 0:
            raise ValueError(f"Attention: window is {window!r}, expected 0 or more keys on either side")
    left, right = (-1 if limit is None else int(limit) for limit in window)
    return left, right


def seed_value(seed: Any) -> int | None:
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"Attention: seed is {inputs.describe(seed)}, expected a whole number or None")
    if not SEEDS.min <= seed <= SEEDS.max:
        raise ValueError(f"Attention: seed is {seed}, expected 64 bits")
    return int(seed)


class Attention(Module):
    """apply_fwd(q, k, v), optionally followed by a mask (bool, True = attend) and a bias (float), in any order.

    P = softmax(score), out = Z P v, where Z is 1 without dropout;  g_v = (Z P)^T g, g_P = Z (g v^T),
    g_S = P (g_P - sum(P g_P)), g_bias = g_S and, with C = cap'(scale q k^T), which is 1 without softcap,
    g_q = scale (g_S C) k, g_k = scale (g_S C)^T q. P is never stored as a whole.
    causal: query t sees the keys up to its diagonal d = t + S - T. window=(left, right): no more keys than that before
    and behind the diagonal, None = all. Mask and bias broadcast to [B, H, T, S]. A query that sees no key gives 0.
    scale is 1 / sqrt(D) unless given. softcap: cap(x) = softcap tanh(x / softcap). alibi_slopes [H] or [B, H]:
    constants, held in float32.
    sinks [H], an array or a Parameter, becomes the parameter `sinks`: one more logit for every row, with no value;
    g_sinks = -sum over b, t of exp(sink - lse) sum(g out).
    dropout_p: the probability with which a weight is left out; the others grow by 1 / (1 - p). A seed decides by
    position which ones, the same at each application; without one every application draws its own.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        dropout_p: float = 0.0,
        seed: int | None = None,
    ):
        self.causal = bool(causal)
        self.scale = scale if scale is None else inputs.number("Attention", "scale", scale)
        self.window = limits(window)
        self.softcap = 0.0 if softcap is None else inputs.number("Attention", "softcap", softcap, least=0)
        self.slopes = alibi_slopes
        if alibi_slopes is not None:
            self.slopes = inputs.as_array("Attention", "alibi_slopes", alibi_slopes, np.float32)
            if not np.isfinite(self.slopes).all():
                wrong = self.slopes[~np.isfinite(self.slopes)][0]
                raise ValueError(f"Attention: alibi_slopes holds {wrong}, expected finite numbers")
        if sinks is not None:
            self.sinks = sinks if isinstance(sinks, Parameter) else Parameter(sinks)
            inputs.rank("Attention", "sinks", self.sinks.value, 1, exactly=True)
        self.dropout_p = inputs.number("Attention", "dropout_p", dropout_p, least=0, most=1)
        self.seed_given = seed_value(seed)

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
        if self.slopes is not None and self.slopes.shape not in ((H,), (B, H)):
            raise ValueError(
                f"Attention: alibi_slopes has shape {self.slopes.shape}, expected ({H},) or ({B}, {H}) for q {q.shape}"
            )
        if self.sink_values is not None and self.sink_values.shape != (H,):
            raise ValueError(f"Attention: sinks has shape {self.sink_values.shape}, expected ({H},) for q {q.shape}")

    @property
    def sink_values(self) -> np.ndarray | None:
        return self.sinks.value if hasattr(self, "sinks") else None

    def choose(self, q: np.ndarray) -> dict[str, Any]:
        """What both kernels are told; a seed is drawn here, once for the way there and back."""
        seed = None
        if self.dropout_p:
            drawn = self.seed_given
            if drawn is None:
                drawn = int(np.random.default_rng().integers(SEEDS.min, SEEDS.max, endpoint=True))
            seed = np.array([drawn], np.int64)
        return dict(
            causal=self.causal,
            scale=q.shape[3] ** -0.5 if self.scale is None else self.scale,
            window_left=self.window[0],
            window_right=self.window[1],
            softcap=self.softcap,
            alibi_slopes=None if self.slopes is None else np.broadcast_to(self.slopes, q.shape[:2]),
            sinks=self.sink_values,
            dropout_p=self.dropout_p,
            seed=seed,
        )

    def forward(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *mask_and_bias: np.ndarray) -> np.ndarray:
        scores = (*q.shape[:3], k.shape[2])
        self.mask = self.bias = None
        for extra in mask_and_bias:
            expanded = np.broadcast_to(extra, scores)
            if extra.dtype.kind == "b":
                self.mask = expanded
            else:
                self.bias = expanded
        self.options = self.choose(q)
        out, self.lse = np.empty((*q.shape[:3], v.shape[3]), q.dtype), np.empty(q.shape[:3], np.float64)
        _C.attention_forward(q, k, v, self.mask, self.bias, out, self.lse, **self.options)
        return out

    def backward(self, in_tensors: tuple, out_tensor: np.ndarray, out_gradient: np.ndarray) -> list:
        q, k, v, *mask_and_bias = in_tensors
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        gradients = [None if extra.dtype.kind == "b" else np.empty_like(extra) for extra in mask_and_bias]
        dbias = next((g.reshape((1,) * (4 - g.ndim) + g.shape) for g in gradients if g is not None), None)  # a view
        dsinks = None if self.sink_values is None else np.empty_like(self.sink_values)
        _C.attention_backward(
            q, k, v, self.mask, self.bias, out_tensor, self.lse, out_gradient, None, dq, dk, dv, dbias, dsinks,
            **self.options,
        )  # fmt: skip
        if dsinks is not None:
            self.sinks.grad += dsinks
        return [dq, dk, dv, *gradients]
