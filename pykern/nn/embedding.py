"""A table of vectors, looked up by token."""

import torch
from torch import Tensor

from pykern import ops


class Embedding(torch.nn.Embedding):
    """weight[ids] for weight [V, D] and ids [...] int64 or int32: [..., D]. The row of padding_idx gets no gradient.

    Dtypes and errors: pykern.embedding. ValueError: options of torch's module that are not supported.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise ValueError("Embedding: max_norm, scale_grad_by_freq and sparse are not supported")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"Embedding: padding_idx is {padding_idx} but there are {num_embeddings} rows")
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing no numbers at all takes torch two seconds the first time
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        out = ops.embedding(self.weight, ids)
        if self.padding_idx is None:
            return out
        return torch.where((ids == self.padding_idx).unsqueeze(-1), out.detach(), out)
