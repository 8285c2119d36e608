"""The Transformer language model: embedding, pre-norm blocks, final norm, head. Built from pykern modules only.

Parameters have GPT-2's names whatever the Config: transformer.wte.weight, transformer.h.0.attn.c_attn.weight, …
Unlike in GPT-2's own files, matrices are [outputs, inputs].
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pykern import nn, ops
from pykern.lm import checkpoint, positions
from pykern.lm.config import T5_BUCKETS, T5_MAX_DISTANCE, Config
from pykern.lm.kvcache import KVCache
from pykern.lm.layout import make_layout, real_tokens
from pykern.lm.options import RESIDUAL_INITS
from pykern.lm.session import Session
from pykern.nn.positions import alibi_slopes
from pykern.nn.transformer import make_norm

# Config's names to those of pykern.nn
ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_erf": "gelu", "relu": "relu", "silu": "silu", "swiglu": "swiglu"}


class Body(torch.nn.Module):
    """What is under the head, under the names that GPT-2 gives it."""

    def __init__(self, config: Config, place: dict[str, Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, **place)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd, **place)
        if config.positions == "t5":
            self.relative_bias = nn.RelativePositionBias(
                config.n_head, T5_BUCKETS, T5_MAX_DISTANCE, bidirectional=False, **place
            )
        self.h = torch.nn.ModuleList(
            nn.TransformerBlock(
                config.n_embd,
                config.n_head,
                config.kv_heads,
                hidden=config.hidden_size,
                norm=config.norm,
                norm_eps=config.norm_epsilon,
                activation=ACTIVATIONS[config.activation],
                bias=config.has_bias,
                qk_norm=config.qk_norm,
                dropout=config.dropout,
                **place,
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = make_norm(config.norm, config.n_embd, bias=True, **place, eps=config.norm_epsilon)


class Transformer(torch.nn.Module):
    """A language model of the shape that `config` says, with fresh weights drawn from torch's random stream.

    model(ids) gives logits [B, T, V] for ids [B, T] int64; model(ids, targets) gives the mean loss over the targets
    that are not -100, without the logits ever existing at once. T is at most block_size.
    TypeError: ids that are no integers. ValueError: shapes, T beyond block_size. IndexError: ids out of range.
    Source: Vaswani et al., arXiv 1706.03762; blocks that normalise first: Radford et al. (GPT-2, 2019).
    """

    def __init__(
        self, config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.transformer = Body(config, place)
        self.lm_head = None if config.tied_head else nn.Linear(config.n_embd, config.vocab_size, bias=False, **place)
        if self.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, residual: str = "scaled", generator: torch.Generator | None = None) -> None:
        """Normal weights of deviation 0.02 and zero biases, as in GPT-2.

        What feeds the residual stream is "scaled" by 1 / sqrt(2 n_layer), or "zero": every block starts as the
        identity.
        """
        if residual not in RESIDUAL_INITS:
            raise ValueError(f"Transformer: residual is {residual!r} but must be one of {', '.join(RESIDUAL_INITS)}")
        into_stream = 0.0 if residual == "zero" else 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, (nn.Embedding, nn.RelativePositionBias)):
                module.weight.normal_(0.0, 0.02, generator=generator)
            elif isinstance(module, nn.Linear):
                std = into_stream if name.endswith("c_proj") else 0.02
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()

    def recompute(self, on: bool = True) -> "Transformer":
        """Whether the blocks keep less for backward and make it again there (pykern.nn.TransformerBlock); the model."""
        for block in self.modules():
            if isinstance(block, nn.TransformerBlock):
                block.recompute = on
        return self

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.wte.weight.dtype

    def embed(self, ids: Tensor, start: int, places: Tensor | None = None) -> Tensor:
        """[B, T, n_embd] for ids [B, T] at positions start, start + 1, …, or at those of places [B, T] int64."""
        x = self.transformer.wte(ids)
        T = ids.shape[1]
        if self.config.positions == "learned":
            where = torch.arange(start, start + T, device=ids.device) if places is None else places
            return x + self.transformer.wpe(where)
        if self.config.positions == "sinusoidal":  # sines have size 1: the embedding is brought to their size
            table = positions.sinusoids(start, T, self.config.n_embd, x)
            return x * self.config.n_embd**0.5 + (table if places is None else table[places])
        return x

    def position_arguments(self, start: int, length: int, like: Tensor, places: Tensor | None = None) -> dict[str, Any]:
        """What the attention of every block is told about positions: rotary tables, slopes or a bias on the scores.

        places, int64 [T] or [B, T], are the rows of the tables; the others depend on distances alone.
        """
        if self.config.positions == "rope":
            tables = positions.rotary(start, length, self.config.head_size, like, self.config.rope_theta)
            return {"rotary": tables, "positions": places}
        if self.config.positions == "alibi":
            return {"alibi_slopes": alibi_slopes(self.config.n_head).to(like.device, torch.float32)}
        if self.config.positions == "t5":
            return {"bias": self.transformer.relative_bias(length, start + length)}
        return {}

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The states [B, T, n_embd] that the head reads. With a cache, ids follow the tokens in it and join them.

        lengths, documents: those of forward. ValueError beside a cache.
        """
        if ids.dim() != 2:
            raise ValueError(f"Transformer: ids have shape {tuple(ids.shape)} but must be [B, T]")
        if lengths is not None or documents is not None:
            if cache is not None:
                raise ValueError("Transformer: lengths and documents cannot be combined with a cache")
            return self._laid_out(ids, lengths, documents)
        start, T = (0 if cache is None else cache.length), ids.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(
                f"Transformer: {start + T} tokens exceed block_size {self.config.block_size}"
                if cache is None
                else f"Transformer: {T} tokens after {start} in the cache exceed block_size {self.config.block_size}"
            )
        if cache is not None:
            if not bool((cache.lengths == start).all()):
                raise ValueError(f"Transformer: the cache holds texts of lengths {cache.lengths.tolist()}, not of one")
            cache.reserve(T)
        x = self.embed(ids, start)
        place = self.position_arguments(start, T, x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, **place, cache=None if cache is None else cache.layer(i))
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(T)
        return x

    def _laid_out(self, ids: Tensor, lengths: Tensor | None, documents: Tensor | None) -> Tensor:
        """hidden for rows that are padded or hold several texts."""
        T, shape = ids.shape[1], ids.shape
        layout = make_layout(ids, lengths, documents, offsets=self.config.positions != "t5")
        real, places = layout.real, layout.positions
        longest = T if places is None else int(places.max()) + 1
        if longest > self.config.block_size:
            texts = "" if documents is None else " of one text"
            raise ValueError(f"Transformer: {longest} tokens{texts} exceed block_size {self.config.block_size}")
        if layout.cu_seqlens is not None and places is not None:  # all rows end to end
            ids, places = ids.reshape(1, -1), places.reshape(1, -1)
            real = None if real is None else real.reshape(1, -1)
        x = self.embed(ids, 0, places)
        if real is not None:  # from here on padding is finite, so a gradient of 0 stays 0
            x = torch.where(real[..., None], x, 0.0)
        length = T if self.config.positions == "t5" else longest
        place = self.position_arguments(0, length, x, places)
        for block in self.transformer.h:
            x = block(x, **place, mask=layout.mask, cu_seqlens=layout.cu_seqlens)
        return self.transformer.ln_f(x).view(*shape, self.config.n_embd)

    @property
    def head_weight(self) -> Tensor:
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] for states [..., n_embd]."""
        return ops.linear(hidden, self.head_weight)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits [B, T, V], or the loss of targets [B, T] int64 (-100: none), reduced by "mean", "sum" or "none".

        lengths, int64 [B]: row b has that many tokens and then padding, which no token sees and no loss counts; its
        logits mean nothing. documents, int64 [B, T], never decreasing along a row: tokens with equal numbers are one
        text, which sees itself alone and whose positions count from 0; each, not the row, is at most block_size long.
        """
        if targets is not None and targets.shape != ids.shape:
            raise ValueError(f"Transformer: targets have shape {tuple(targets.shape)} but ids {tuple(ids.shape)}")
        x = self.hidden(ids, lengths=lengths, documents=documents)
        if targets is None:
            return self.logits(x)
        if lengths is not None:
            targets = targets.masked_fill(~real_tokens(lengths, ids.shape[1]), -100)
        loss = ops.linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def session(
        self, dtype: str = "float32", max_len: int | None = None, batch: int = 1, *, cache_dtype: str | None = None
    ) -> Session:
        """A reader with a packed copy of the weights, "float32", "bfloat16", "int8" or "int4". max_len: block_size."""
        return Session(self, dtype=dtype, max_len=max_len, batch=batch, cache_dtype=cache_dtype)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Makes `folder` a checkpoint of this model in float32: config.json and model.safetensors, atomically."""
        tensors = {name: value.float() for name, value in self.state_dict().items()}
        checkpoint.save_checkpoint(folder, config=self.config, tensors=tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Transformer":
        """The model in a checkpoint folder, in float32. FileNotFoundError, or ValueError naming the faulty file."""
        return cls.from_checkpoint(checkpoint.load_checkpoint(folder, expected=expected_tensors, training=False))

    @classmethod
    def from_checkpoint(cls, loaded: checkpoint.Checkpoint) -> "Transformer":
        """The model in what load_checkpoint read, whose tensors become its parameters."""
        model = cls(loaded.config, device="meta")
        model.load_state_dict(loaded.tensors, assign=True)
        return model


def expected_tensors(config: Config) -> dict[str, Tensor]:
    """Names and shapes of a model's parameters, as tensors without memory; quick whatever a hostile Config says."""
    one = Transformer(replace(config, n_layer=1), device="meta").state_dict()
    return {
        name.replace(".h.0.", f".h.{i}."): tensor
        for name, tensor in one.items()
        for i in range(config.n_layer if ".h.0." in name else 1)
    }
