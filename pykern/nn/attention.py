"""Multi-head attention with the constructor, the masks and the state dict of torch.nn.MultiheadAttention."""

from typing import Any

import torch
from torch import Tensor

from pykern import ops


def merge_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) of pykern.attention from torch's masks: bool, True = leave out, or float, added to the scores.

    attn_mask [T, S] or [B * heads, T, S]; padding [B, S].
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, heads))
    if padding is not None:
        padding = padding[:, None, None, :]
    mask = bias = None
    for given in (attn_mask, padding):
        if given is None:
            continue
        if given.dtype == torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given
    return mask, bias


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention for query [T, B, embed_dim], key [S, B, kdim], value [S, B, vdim]; B comes first when batch_first.

    attn_mask [T, S] or [B * num_heads, T, S] and key_padding_mask [B, S] mean what they mean in torch: bool, True =
    leave out, or float, added to the scores. A query whose keys are all left out gives out_proj(0). Returns (output,
    weights); weights [B, T, S], or [B, num_heads, T, S] without average_attn_weights, cost a second pass:
    need_weights=False saves it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dropout or add_bias_kv or add_zero_attn:
            raise ValueError("MultiheadAttention: dropout, add_bias_kv and add_zero_attn are not supported")
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention: {num_heads} heads do not divide embed_dim {embed_dim}")
        super().__init__(
            embed_dim, num_heads, 0.0, bias, kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype
        )

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The q, k, v of all heads, [B, heads, T or S, head_dim], for batch-first inputs."""
        if self.in_proj_weight is not None and query is key and key is value:
            flat = list(ops.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            weights = (
                (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
                if self.in_proj_weight is None
                else self.in_proj_weight.chunk(3)
            )
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            flat = [ops.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in flat]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        inputs = [query] if query is key and key is value else [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self.project(*(inputs * 3 if len(inputs) == 1 else inputs))

        causal = is_causal and attn_mask is None  # beside a mask, is_causal is only a hint about it
        T, S = q.shape[2], k.shape[2]
        if causal and T != S:
            raise ValueError(
                f"MultiheadAttention: is_causal without attn_mask needs as many keys as queries, not {S} for {T}"
            )
        mask, bias = merge_masks(attn_mask, key_padding_mask, self.num_heads)
        if bias is not None:
            bias = bias.to(q.dtype)
        heads: Any = ops.attention(q, k, v, mask=mask, bias=bias, causal=causal)
        out = ops.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

        weights: Any = None
        if need_weights:  # attention over the rows of the identity matrix: each output row is its own weights
            identity = torch.eye(S, dtype=v.dtype, device=v.device).expand(*v.shape[:2], S, S)
            weights = ops.attention(q, k, identity, mask=mask, bias=bias, causal=causal)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights
