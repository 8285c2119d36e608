"""scaled_dot_product_attention with the arguments, the broadcasting and the causal corner of torch.nn.functional's."""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from pykern.ops._library import autocast, require_tensors
from pykern.ops.attention import attention

OP = "scaled_dot_product_attention"


def _bias_module() -> Any:
    """torch.nn.attention.bias where somebody has imported it, and may have a CausalBias: its import takes seconds."""
    return sys.modules.get("torch.nn.attention.bias")


def called_as(op: str, function, *args, **kwargs):
    """function(*args, **kwargs), whose refusals then begin with the name of the op that the caller knows."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError, IndexError) as error:
        name, colon, words = str(error).partition(": ")
        raise type(error)(f"{op}: {words}" if colon and name == function.__name__ else str(error)) from None


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = dict(query=query, key=key, value=value)
    for (name, x), layout in zip(named.items(), ("[..., L, E]", "[..., S, E]", "[..., S, Ev]"), strict=True):
        if x.dim() < 2:
            raise ValueError(f"{OP}: {name} must be {layout}, got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {name} has dtype {x.dtype}, expected a floating one")
        if x.dtype != query.dtype:
            raise TypeError(f"{OP}: {name} has dtype {x.dtype} but query has {query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{OP}: {name} is on {x.device} but query on {query.device}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{OP}: key has head size {key.shape[-1]} but query has {query.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{OP}: value has {value.shape[-2]} keys but key has {key.shape[-2]}")


def _heads(x: Tensor) -> int:
    return x.shape[-3] if x.dim() > 2 else 1


def _share_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """enable_gqa: key and value with one number of heads that divides query's."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 3:
            raise ValueError(f"{OP}: enable_gqa needs a dimension of heads, but {name} has shape {list(x.shape)}")
    H = _heads(query)
    for name, x in (("key", key), ("value", value)):
        G = _heads(x)
        if H != G and (G == 0 or H % G):
            raise ValueError(f"{OP}: query has {H} heads, which is not a multiple of the {G} heads of {name}")
    if _heads(key) != _heads(value):
        key, value = (x.repeat_interleave(H // max(_heads(x), 1), -3) for x in (key, value))
    return key, value


def _as_rank4(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool):
    """(q [B, H, L, E], k [B, G, S, E], v [B, G, S, Ev], batch): views up to rank 4; batch is the shape before L."""
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, tuple(query.shape[:2])  # the usual case needs no views
    if enable_gqa:
        key, value = _share_heads(query, key, value)
        H, G = _heads(query), _heads(key)
    else:
        heads = {_heads(x) for x in (query, key, value)} - {1} or {1}
        if len(heads) > 1:
            sizes = [_heads(x) for x in (query, key, value)]
            raise ValueError(f"{OP}: {sizes} heads of query, key and value do not broadcast (is enable_gqa meant?)")
        H = heads.pop()
        G = 1 if _heads(key) == _heads(value) == 1 else H
    lead: tuple[int, ...] = query.shape[:-3]
    if not lead == key.shape[:-3] == value.shape[:-3]:
        shapes = [list(x.shape) for x in (query, key, value)]
        try:
            lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
        except RuntimeError:
            raise ValueError(f"{OP}: shapes {shapes} of query, key and value do not broadcast") from None

    def rank4(x: Tensor, n: int) -> Tensor:
        return x.expand(*lead, n, *x.shape[-2:]).reshape(math.prod(lead), n, *x.shape[-2:])

    batch = (*lead, H) if max(query.dim(), key.dim(), value.dim()) > 2 else ()
    return rank4(query, H), rank4(key, G), rank4(value, G), batch


def _mask_as_rank4(mask: Tensor, batch: tuple[int, ...], L: int, S: int) -> Tensor:
    """attn_mask as something that pykern.attention broadcasts to [B, H, L, S]; a view unless rank exceeds 4."""
    scores = (*batch, L, S)
    aligned = scores[len(scores) - mask.dim() :]
    if mask.dim() > len(scores) or any(n not in (1, size) for n, size in zip(mask.shape, aligned, strict=True)):
        raise ValueError(
            f"{OP}: attn_mask of shape {list(mask.shape)} does not broadcast to the scores' {list(scores)}"
        )
    if mask.dim() == 0:
        return mask.reshape(1)
    lead = batch[:-1]
    if mask.dim() <= 3 or len(lead) == 1:
        return mask
    own = lead if math.prod(mask.shape[:-3]) != 1 else (1,) * (mask.dim() - 3)
    return mask.expand(*own, *mask.shape[-3:]).reshape(math.prod(own), *mask.shape[-3:])


def _float_mask(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of numbers, in q's dtype, or float32 as torch allows."""
    if mask.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{OP}: attn_mask has dtype {mask.dtype}, expected bool, float32 or query's {q.dtype}")
    return mask.to(q.dtype) if q.dtype == torch.float64 else mask


def _triangle(bias: Any, query: Tensor, key: Tensor) -> tuple[bool, bool]:
    """(upper left, lower right): the corner of the triangle that bias stands for."""
    sizes = [bias.seq_len_q, bias.seq_len_kv]
    if query.dim() > 1 and key.dim() > 1 and [query.shape[-2], key.shape[-2]] != sizes:
        raise ValueError(
            f"{OP}: attn_mask is a CausalBias of {sizes[0]} queries and {sizes[1]} keys, but there are "
            f"{query.shape[-2]} and {key.shape[-2]}"
        )
    lower_right = bias.variant == _bias_module().CausalVariant.LOWER_RIGHT
    return not lower_right, lower_right


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale query key^T + attn_mask) value, as torch.nn.functional's: a drop-in, fused forward and backward.

    query [..., L, E], key [..., S, E], value [..., S, Ev] -> [..., L, Ev] of one dtype, float32, float64, bfloat16 or
    float16; rank 2 and more, the dimensions before L and S broadcast. attn_mask broadcasts to [..., L, S]: bool, True =
    attend, or numbers that are added to the scores, of query's dtype or float32, with a gradient when it asks for one;
    a torch.nn.attention.bias.CausalBias is not expanded. With 16-bit inputs a float32 mask costs a calculation in
    float32. is_causal: query t sees keys 0 .. t, the upper left triangle (pykern.attention: the lower right).
    dropout_p always applies; torch.manual_seed makes it repeatable. scale: 1 / sqrt(E) by default. enable_gqa: query
    head h reads key head h // (heads of query // heads of key). A row that sees no key is 0, its gradients 0.
    RuntimeError: attn_mask and is_causal together. TypeError: not a tensor, nested, other or mixed dtypes. ValueError:
    shapes that do not broadcast, E outside 1..1024, options out of range.
    Formula: the docstring of torch.nn.functional.scaled_dot_product_attention, torch 2.13.
    """
    require_tensors(OP, query=query, key=key, value=value)
    if not isinstance(is_causal, bool | torch.SymBool):
        raise TypeError(f"{OP}: is_causal must be a bool, got {type(is_causal).__name__}")
    if attn_mask is not None and is_causal:
        raise RuntimeError(f"{OP}: Explicit attn_mask should not be set when is_causal=True")
    lower_right = False
    if _bias_module() is not None and isinstance(attn_mask, _bias_module().CausalBias):
        is_causal, lower_right, attn_mask = *_triangle(attn_mask, query, key), None
    if attn_mask is not None:
        require_tensors(OP, attn_mask=attn_mask)
    query, key, value, attn_mask = autocast(OP, query, key, value, attn_mask)
    _check_inputs(query, key, value)
    q, k, v, batch = _as_rank4(query, key, value, enable_gqa)
    L, S, dtype = q.shape[2], k.shape[2], q.dtype
    mask = bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = _mask_as_rank4(attn_mask, batch, L, S)
        else:
            bias = _mask_as_rank4(_float_mask(attn_mask, q), batch, L, S)
            if bias.dtype != dtype:  # 16-bit queries, float32 bias: rounding the bias would be seen in the weights
                q, k, v = q.float(), k.float(), v.float()
    window = None
    if is_causal and L < S:  # the keys from L on are seen by nobody: what is left is square
        k, v = k[:, :, :L], v[:, :, :L]
    elif is_causal and L > S:  # key t is L - S behind the diagonal that pykern counts from
        window = (None, L - S)
    out = called_as(
        *(OP, attention, q, k, v),
        mask=mask,
        bias=bias,
        causal=lower_right or (is_causal and window is None),
        window=window,
        scale=scale,
        dropout_p=dropout_p,
    )
    out = out if len(batch) == 2 else out.reshape(*batch, L, v.shape[3])
    return out if out.dtype == dtype else out.to(dtype)
