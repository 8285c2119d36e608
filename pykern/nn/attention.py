"""Multi-head attention with the constructor, the masks and the state dict of torch.nn.MultiheadAttention."""

from typing import Any

import torch
from torch import Tensor

from pykern import ops
from pykern.ops._library import require_tensors


def check_inputs(module: "MultiheadAttention", query: Tensor, key: Tensor, value: Tensor) -> None:
    """ValueError unless the shapes are those of the module: all [B, length, width], or all [length, width]."""
    require_tensors("MultiheadAttention", query=query, key=key, value=value)
    if query.dim() not in (2, 3):
        raise ValueError(f"MultiheadAttention: query has shape {list(query.shape)}, expected 2 or 3 dimensions")
    widths = {"query": (query, module.embed_dim), "key": (key, module.kdim), "value": (value, module.vdim)}
    for name, (x, width) in widths.items():
        if x.dim() != query.dim() or x.shape[-1] != width:
            raise ValueError(
                f"MultiheadAttention: {name} has shape {list(x.shape)}, expected {query.dim()} dimensions, the last "
                f"of {width}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"MultiheadAttention: value has shape {list(value.shape)}, key {list(key.shape)}: they must differ in "
            "nothing but the last dimension"
        )
    batch = 0 if module.batch_first else 1
    if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
        raise ValueError(
            f"MultiheadAttention: key has a batch of {key.shape[batch]}, query one of {query.shape[batch]}"
        )


def check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """TypeError unless mask is bool or float, ValueError unless it has one of the shapes; None passes."""
    if mask is None:
        return
    require_tensors("MultiheadAttention", **{name: mask})
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"MultiheadAttention: {name} is {mask.dtype}, expected bool or a floating dtype")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"MultiheadAttention: {name} has shape {list(mask.shape)}, expected {expected}")


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


def append_key(x: Tensor, row: Tensor) -> Tensor:
    """x [B, heads, S, D] and one more key for every text, row [1, 1, heads * D]: [B, heads, S + 1, D]."""
    B, heads, _, D = x.shape
    return torch.cat([x, row.view(1, heads, 1, D).to(x.dtype).expand(B, heads, 1, D)], 2)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention for query [T, B, embed_dim], key [S, B, kdim], value [S, B, vdim]; B comes first when batch_first.

    Without a batch: [T, embed_dim], [S, kdim], [S, vdim]. attn_mask [T, S] or [B * num_heads, T, S] and
    key_padding_mask [B, S] mean what they mean in torch: bool, True = leave out, or float, added to the scores and
    differentiable. A query whose keys are all left out gives out_proj(0), where torch gives NaN.

    add_bias_kv adds a learnt key and value behind those of every text, add_zero_attn a key and value of zeros; no mask
    leaves them out. dropout takes attention weights away in training, with a seed drawn from torch's generator.

    Returns (output, weights). weights [B, T, S], or [B, num_heads, T, S] without average_attn_weights, have one more
    column for each of add_bias_kv and add_zero_attn and are differentiable. They are those before dropout: their rows
    sum to 1, whereas torch returns, in training, what dropout left of them. They cost a second pass: need_weights=False
    saves it. is_causal beside attn_mask is a hint that is not needed; without attn_mask it is the causal mask.
    Dtypes, formula and errors: pykern.attention. TypeError, ValueError: masks of other dtypes or shapes.
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
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention: {num_heads} heads do not divide embed_dim {embed_dim}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"MultiheadAttention: dropout is {dropout}, expected 0..1")
        super().__init__(
            *(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first),
            device=device,
            dtype=dtype,
        )

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v of all heads, [B, heads, T or S, head_dim], for batch-first inputs; equal inputs share a product."""
        E, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value:
            if query is key:
                flat = list(ops.linear(query, weight, bias).chunk(3, -1))
            else:
                bias_q, bias_kv = (None, None) if bias is None else (bias[:E], bias[E:])
                flat = [ops.linear(query, weight[:E], bias_q), *ops.linear(key, weight[E:], bias_kv).chunk(2, -1)]
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if weight is None else weight.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            flat = [ops.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in flat]

    def masks(
        self, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool, B: int, T: int, S: int, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """(mask, bias, causal) of pykern.attention, with a column for the key of add_bias_kv, which all queries see."""
        check_mask("attn_mask", attn_mask, (T, S), (B * self.num_heads, T, S))
        causal = is_causal and attn_mask is None  # beside a mask, is_causal is only a hint about it
        if causal and T != S:
            raise ValueError(
                f"MultiheadAttention: is_causal without attn_mask needs as many keys as queries, not {S} for {T}"
            )
        if causal and self.bias_k is not None:  # one more key would move the diagonal
            attn_mask, causal = torch.ones(T, S, dtype=torch.bool, device=like.device).triu(1), False
        mask, bias = merge_masks(attn_mask, padding, self.num_heads)
        bias = None if bias is None else bias.to(like.dtype)
        if self.bias_k is not None:
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, 1))
        return mask, bias, causal

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
        check_inputs(self, query, key, value)
        batched = query.dim() == 3
        padding = key_padding_mask
        check_mask("key_padding_mask", padding, tuple(key.shape[:-1])[:: 1 if self.batch_first else -1])
        if padding is not None and not batched:
            padding = padding.unsqueeze(0)
        views: dict[int, Tensor] = {}  # of each tensor one, so that equal inputs stay equal
        for x in (query, key, value):
            views[id(x)] = x if batched and self.batch_first else x.transpose(0, 1) if batched else x.unsqueeze(0)
        q, k, v = self.project(views[id(query)], views[id(key)], views[id(value)])

        sizes = (q.shape[0], q.shape[2], k.shape[2])
        mask, bias, causal = self.masks(attn_mask, padding, is_causal, *sizes, q)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = append_key(k, self.bias_k), append_key(v, self.bias_v)
        # A key and value of zeros is a logit of 0 that adds nothing: a sink.
        sinks = q.new_zeros(self.num_heads) if self.add_zero_attn else None
        options: dict[str, Any] = dict(mask=mask, bias=bias, causal=causal, sinks=sinks)
        heads: Any
        heads, lse = ops.attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, return_lse=True, **options
        )
        out = ops.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

        weights: Any = None
        if need_weights:
            weights = ops.attention_weights(q, k, lse, **options)
            if self.add_zero_attn:
                weights = torch.cat([weights, lse.neg().exp().to(weights.dtype).unsqueeze(-1)], -1)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights
