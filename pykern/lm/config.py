"""Shape of a Transformer language model: one frozen dataclass, what follows from it, and its JSON form.

Parameters and FLOPs are counted from the fields alone, so a run can be sized before anything is allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "t5", "none")
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_erf", "relu", "silu", "swiglu")
ROPE_THETA = 10000.0
T5_BUCKETS = 32  # relative distances of the T5 bias, shared by all layers
T5_MAX_DISTANCE = 128  # and where the last of them begins

# Generous ends of each range: a file that passes them describes a model, not an attempt to exhaust the machine.
LIMITS = {
    "n_layer": 1024,
    "n_head": 1024,
    "n_kv_head": 1024,
    "n_embd": 1 << 17,
    "n_hidden": 1 << 20,
    "block_size": 1 << 24,
    "vocab_size": 1 << 24,
}
OPTIONAL = ("n_kv_head", "n_hidden")  # None: what follows from the other fields


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"Config: {name} must be an integer, got {_shown(value)}")
    if not 1 <= value <= LIMITS[name]:
        raise ValueError(f"Config: {name} must lie between 1 and {LIMITS[name]}, got {_shown(value)}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"Config: {name} must be one of {', '.join(choices)}, got {_shown(value)}")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"Config: {name} must be a number, got {_shown(value)}")
    if not least <= value <= most:
        raise ValueError(f"Config: {name} must lie between {least:g} and {most:g}, got {_shown(value)}")


def _shown(value: object) -> str:
    """repr for a message: short, and safe for an integer of a million digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a Transformer LM. Every field is checked: ValueError names the one that is wrong.

    n_kv_head=None means n_head, n_hidden=None the hidden_size below, norm_eps=None the norm_epsilon below. "gelu" is
    GPT-2's tanh form, "gelu_erf" x Phi(x). "swiglu" has three matrices instead of two. rope_theta is the base of RoPE.
    qk_norm brings every head's query and key to root mean square 1, without a weight, before it is rotated.
    """

    n_layer: int
    n_head: int
    n_kv_head: int | None = None
    n_embd: int
    n_hidden: int | None = None
    block_size: int
    vocab_size: int
    positions: str = "learned"
    rope_theta: float = ROPE_THETA
    norm: str = "layernorm"
    norm_eps: float | None = None
    activation: str = "gelu"
    tied_head: bool = True
    qk_norm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in LIMITS:
            if name not in OPTIONAL or getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        if self.n_embd % self.n_head:
            raise ValueError(f"Config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"Config: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        _check_choice("positions", self.positions, POSITIONS)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"Config: positions 'rope' needs an even head size, n_embd / n_head is {self.head_size}")
        if self.positions == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"Config: positions 'sinusoidal' needs an even n_embd, got {self.n_embd}")
        _check_number("rope_theta", self.rope_theta, 1.0, 1e12)
        if self.positions != "rope" and self.rope_theta != ROPE_THETA:
            raise ValueError(f"Config: rope_theta {self.rope_theta:g} needs positions 'rope', not {self.positions!r}")
        if self.norm_eps is not None:
            _check_number("norm_eps", self.norm_eps, 1e-12, 1.0)
        for name in ("tied_head", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Config: {name} must be true or false, got {_shown(getattr(self, name))}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise ValueError(f"Config: dropout must be a number, got {_shown(self.dropout)}")
        if not (0.0 <= self.dropout < 1.0 and isfinite(self.dropout)):
            raise ValueError(f"Config: dropout must lie in [0, 1), got {_shown(self.dropout)}")

    @property
    def kv_heads(self) -> int:
        """Heads of k and v: n_kv_head, or n_head when that is None."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_size(self) -> int:
        """Width inside the MLP: n_hidden, or 4 n_embd when that is None; with swiglu, which has one matrix more, 8/3
        n_embd up to a multiple of 8."""
        if self.n_hidden is not None:
            return self.n_hidden
        if self.activation == "swiglu":
            return -(-8 * self.n_embd // 24) * 8
        return 4 * self.n_embd

    @property
    def norm_epsilon(self) -> float:
        """What the norms add to the variance: norm_eps, or 1e-5 (layernorm) and 1e-6 (rmsnorm) when that is None."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 1e-5 if self.norm == "layernorm" else 1e-6

    @property
    def has_bias(self) -> bool:
        """Linear layers in the blocks have a bias with LayerNorm, as in GPT-2, and none with RMSNorm, as in Llama."""
        return self.norm == "layernorm"

    def _block_weights(self) -> int:
        """Weights of the matrices of one block, each used once per token: q, k, v, output projection, MLP."""
        attention = self.n_embd * (2 * self.n_embd + 2 * self.kv_heads * self.head_size)
        matrices = 3 if self.activation == "swiglu" else 2
        return attention + matrices * self.n_embd * self.hidden_size

    def _block_vectors(self) -> int:
        """Entries of the two norms and the biases of one block."""
        norms = 2 * self.n_embd * (2 if self.norm == "layernorm" else 1)
        if not self.has_bias:
            return norms
        attention = 2 * self.n_embd + 2 * self.kv_heads * self.head_size
        mlp = self.n_embd + self.hidden_size * (2 if self.activation == "swiglu" else 1)
        return norms + attention + mlp

    @property
    def parameter_count(self) -> int:
        """Number of trained values; a tied head counts once."""
        embedding = self.vocab_size * self.n_embd * (1 if self.tied_head else 2)
        if self.positions == "learned":
            embedding += self.block_size * self.n_embd
        elif self.positions == "t5":
            embedding += T5_BUCKETS * self.n_head
        final_norm = self.n_embd * (2 if self.norm == "layernorm" else 1)
        return embedding + self.n_layer * (self._block_weights() + self._block_vectors()) + final_norm

    def forward_flops_per_token(self, length: int | None = None) -> int:
        """Multiplications and additions per token of a causal pass over `length` tokens (block_size when None).

        2 per matrix weight, head included and embedding lookup excluded, and 4 n_embd per visible key and layer
        (scores and weighted sum), of which a token sees (length + 1) / 2 on average.
        """
        length = self.block_size if length is None else length
        matrices = self.n_layer * self._block_weights() + self.vocab_size * self.n_embd
        return 2 * matrices + 2 * self.n_layer * self.n_embd * (length + 1)

    def training_flops_per_token(self, length: int | None = None) -> int:
        """Forward and backward: three times the forward pass; what a kernel recomputes is not counted."""
        return 3 * self.forward_flops_per_token(length)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; from_dict gives an equal Config back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Config from a mapping of field names. ValueError names an unknown, missing or unusable field."""
        if not isinstance(values, Mapping):
            raise ValueError(f"Config: expected a mapping of field names, got {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"Config: unknown field {_shown(unknown[0])}")
        required = [name for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size") if name not in values]
        if required:
            raise ValueError(f"Config: field {required[0]} is missing")
        return cls(**values)
