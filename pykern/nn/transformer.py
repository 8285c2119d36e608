"""The pre-norm Transformer block: x + attention(norm(x)), then h + mlp(norm(h)). Parameters have GPT-2's names."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pykern import ops
from pykern.nn.linear import MLP, Linear
from pykern.nn.norm import LayerNorm, RMSNorm
from pykern.nn.recompute import norm_into

Rotary = tuple[Tensor, Tensor]


class Attend(Protocol):
    """What a cache is to a block: it stores the new keys and values and attends over all it has."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, alibi_slopes: Tensor | None
    ) -> Tensor: ...


def make_norm(
    kind: str, width: int, bias: bool, device=None, dtype=None, *, eps: float | None = None
) -> LayerNorm | RMSNorm:
    """norm "layernorm" (eps 1e-5 unless given) or "rmsnorm" (eps 1e-6 unless given) over the last dimension."""
    if kind == "layernorm":
        return LayerNorm(width, eps=1e-5 if eps is None else eps, bias=bias, device=device, dtype=dtype)
    if kind == "rmsnorm":
        return RMSNorm(width, eps=1e-6 if eps is None else eps, device=device, dtype=dtype)
    raise ValueError(f"norm is {kind!r} but must be layernorm or rmsnorm")


class SelfAttention(torch.nn.Module):
    """c_proj(attention(q, k, v)) + residual for x [B, T, width]; (q | k | v) = c_attn(x), n_kv_head heads of k and v.

    rotary (cos, sin), each [positions, head size / 2], rotates q and k; mask, bias and alibi_slopes are those of
    pykern.attention. cu_seqlens, int32 [N + 1]: x is [1, T, width], N sequences end to end that do not see each other;
    without mask, bias and cache. qk_norm normalises each head of q and k to root mean square 1 before the rotation.
    dropout falls on the attention weights, in training and without a cache.
    Dtypes, formula and errors: pykern.attention. ValueError: widths that the heads do not divide.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int | None = None,
        *,
        bias: bool = True,
        causal: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if width <= 0 or n_head <= 0 or width % n_head:
            raise ValueError(f"SelfAttention: {n_head} heads do not divide width {width}")
        if n_kv_head <= 0 or n_head % n_kv_head:
            raise ValueError(f"SelfAttention: {n_kv_head} key/value heads do not divide {n_head} heads")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"SelfAttention: dropout is {dropout}, expected 0..1")
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = n_head, n_kv_head, width // n_head
        self.causal, self.qk_norm, self.dropout = causal, qk_norm, dropout
        self.c_attn = Linear(width, (n_head + 2 * n_kv_head) * self.head_size, bias, device, dtype)
        self.c_proj = Linear(width, width, bias, device, dtype)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, n_head, T, head size] and k, v [B, n_kv_head, T, head size]: views of one product."""
        qkv = self.c_attn(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), 1)
        if self.qk_norm:
            q, k = ops.rms_norm(q, None, 1e-6), ops.rms_norm(k, None, 1e-6)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        cache: Attend | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        if cu_seqlens is not None and (cache is not None or x.shape[0] != 1):
            raise ValueError(
                "SelfAttention: cu_seqlens needs x [1, T, width] and no cache, got x "
                f"{list(x.shape)}{'' if cache is None else ' and a cache'}"
            )
        q, k, v = self.heads(x)
        if rotary is not None:
            q, k = (ops.rope(y, *rotary, positions=positions) for y in (q, k))
        out: Any
        if cache is None:
            if cu_seqlens is not None:
                q, k, v = (y[0].transpose(0, 1) for y in (q, k, v))
            out = ops.attention(
                *(q, k, v),
                mask=mask,
                bias=bias,
                causal=self.causal,
                alibi_slopes=alibi_slopes,
                dropout_p=self.dropout if self.training else 0.0,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
            )
            if cu_seqlens is not None:
                out = out.transpose(0, 1)[None]
        else:
            out = cache(q, k, v, bias=bias, alibi_slopes=alibi_slopes)
        return self.c_proj(out.transpose(1, 2).flatten(2), residual)

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, n_kv_head={self.n_kv_head}, head_size={self.head_size}, causal={self.causal}"


class TransformerBlock(torch.nn.Module):
    """h = x + attn(ln_1(x));  out = h + mlp(ln_2(h)), for x [B, T, width].

    hidden is 4 * width unless given, norm_eps is make_norm's. dropout falls on the attention weights and on what each
    half adds, as in GPT-2. recompute, also an attribute, keeps less for backward: the outputs of ln_1 and ln_2 are made
    again there. Gradients have the same bits. The keyword arguments of forward are those of SelfAttention.
    Dtypes and errors: pykern.nn.SelfAttention, pykern.mlp. ValueError: an unknown norm or activation.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int | None = None,
        *,
        hidden: int | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
        causal: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ln_1 = make_norm(norm, width, bias, **place, eps=norm_eps)
        self.attn = SelfAttention(
            *(width, n_head, n_kv_head), bias=bias, causal=causal, qk_norm=qk_norm, dropout=dropout, **place
        )
        self.ln_2 = make_norm(norm, width, bias, **place, eps=norm_eps)
        self.mlp = MLP(width, 4 * width if hidden is None else hidden, activation, bias, **place)
        self.dropout, self.recompute = dropout, recompute

    def through(self, norm: torch.nn.Module, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """part(norm(x))."""
        return norm_into(norm, x, part) if self.recompute else part(norm(x))

    def forward(self, x: Tensor, **attention) -> Tensor:
        if self.dropout and self.training:
            added = self.through(self.ln_1, x, lambda y: self.attn(y, **attention))
            x = x + torch.nn.functional.dropout(added, self.dropout)
            return x + torch.nn.functional.dropout(self.through(self.ln_2, x, self.mlp), self.dropout)
        h = self.through(self.ln_1, x, lambda y: self.attn(y, x, **attention))
        return self.through(self.ln_2, h, lambda y: self.mlp(y, h))
