"""Recurrent language models, one state vector per text instead of attention: h_t = f(x_t, h_{t-1}), logits = E h_t.

    elman   h_t = tanh(W x_t + U h_{t-1} + b)
    lstm    i, f, o = sigmoid(W x_t + U h_{t-1} + b), g = tanh(…)    c_t = f c_{t-1} + i g    h_t = o tanh(c_t)

x_t is sqrt(H) times a row of E [V, H], which is also the head. torch.nn.RNN and torch.nn.LSTM do the work.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern import nn, ops
from pykern.lm.checkpoint import CONFIG, MAX_CONFIG_BYTES, MODEL, read_tensors
from pykern.lm.files import json_bytes, read_json, replace_file
from pykern.lm.sampling import Sampler

KINDS = {"elman": 1, "lstm": 4}  # gates: matrices [H, H] for the input, and as many for the state
LIMITS = {"n_layer": 64, "n_embd": 1 << 17, "block_size": 1 << 24, "vocab_size": 1 << 24}
State = Tensor | tuple[Tensor, Tensor]  # h [n_layer, B, H]; an LSTM's is (h, c)


@dataclass(frozen=True, kw_only=True)
class RNNConfig:
    """Shape of a recurrent LM. ValueError names the field that is wrong. block_size is the length it is trained on."""

    kind: str
    n_layer: int = 1
    n_embd: int
    block_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"RNNConfig: kind must be one of {', '.join(KINDS)}, got {str(self.kind)[:40]!r}")
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"RNNConfig: {name} must be an integer, got {str(value)[:40]!r}")
            if not 1 <= value <= most:
                shown = value if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
                raise ValueError(f"RNNConfig: {name} must lie between 1 and {most}, got {shown}")

    @property
    def parameter_count(self) -> int:
        """V H for the embedding, which is the head too, and gates (2 H² + 2 H) per layer."""
        layer = KINDS[self.kind] * (2 * self.n_embd**2 + 2 * self.n_embd)
        return self.vocab_size * self.n_embd + self.n_layer * layer

    @classmethod
    def of_size(cls, parameters: int, **fields: Any) -> "RNNConfig":
        """The config whose n_embd brings parameter_count closest to `parameters`; fields: the others."""

        def count(n_embd: int) -> int:
            return cls(n_embd=n_embd, **fields).parameter_count

        above = max(2, bisect_left(range(LIMITS["n_embd"]), parameters, lo=1, key=count))
        return cls(n_embd=min((above - 1, above), key=lambda n: abs(count(n) - parameters)), **fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; from_dict gives an equal RNNConfig back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RNNConfig":
        """ValueError names an unknown, missing or unusable field."""
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"RNNConfig: unknown field {str(name)[:40]!r}")
        for name in names:
            if name not in values:
                raise ValueError(f"RNNConfig: field {name} is missing")
        return cls(**values)


class RNNLM(torch.nn.Module):
    """A recurrent language model of the shape that `config` says, with fresh weights from torch's random stream.

    model(ids) gives logits [B, T, V] for ids [B, T] int64; model(ids, targets) the mean loss over the targets that are
    not -100. A text may be of any length; each starts from a state of zeros.
    Formulas: Elman, Cognitive Science 14 (1990), and Hochreiter and Schmidhuber, Neural Computation 9 (1997).
    ValueError: shapes of ids or targets. IndexError: ids out of range.
    """

    def __init__(
        self, config: RNNConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, **place)
        module = {"elman": torch.nn.RNN, "lstm": torch.nn.LSTM}[config.kind]
        self.rnn = module(config.n_embd, config.n_embd, config.n_layer, batch_first=True, **place)
        if self.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embedding normal of deviation H^-1/2; the rest uniform in ±H^-1/2, as in torch; an LSTM's forget bias 1.

        The forget bias is that of Jozefowicz et al., ICML 2015: the cell remembers until it has learned to forget.
        """
        H = self.config.n_embd
        self.rnn.reset_parameters()
        self.wte.weight.normal_(0.0, H**-0.5)
        if self.config.kind == "lstm":
            for name, p in self.rnn.named_parameters():
                if name.startswith("bias_"):  # the two biases are added: 1 + 0
                    p[H : 2 * H] = float(name.startswith("bias_ih"))

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The states [B, T, H] that the head reads, and the one to go on from. state None: zeros."""
        if ids.dim() != 2:
            raise ValueError(f"RNNLM: ids have shape {tuple(ids.shape)} but must be [B, T]")
        x = self.wte(ids) * self.config.n_embd**0.5  # entries of size 1, though the head needs rows of length 1
        return self.rnn(x, state)

    def forward(self, ids: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits [B, T, V], or the loss of targets [B, T] int64 (-100: none), reduced by "mean", "sum" or "none"."""
        if targets is not None and targets.shape != ids.shape:
            raise ValueError(f"RNNLM: targets have shape {tuple(targets.shape)} but ids {tuple(ids.shape)}")
        h, _ = self.hidden(ids)
        if targets is None:
            return ops.linear(h, self.wte.weight)
        loss = ops.linear_cross_entropy(h.flatten(0, 1), self.wte.weight, targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    @torch.no_grad()
    def step(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits [B, V] after one more token ids [B], and the new state; state None begins a text."""
        h, state = self.hidden(ids[:, None], state)
        return ops.linear(h[:, 0], self.wte.weight), state

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        callback: Callable[[Tensor], None] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """ids [T] or [B, T] int64, followed by max_new_tokens new ones; sampling: the fields of Sampling.

        Each token costs the same, however long the text. callback, if given, is called with each new token [B].
        """
        texts = ids[None] if ids.dim() == 1 else ids
        if texts.dim() != 2:
            raise ValueError(f"generate: ids have shape {tuple(ids.shape)} but must be [T] or [B, T]")
        if not texts.shape[1]:
            raise ValueError("generate: the prompt is empty")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens} but must not be negative")
        sampler = Sampler(seed=seed, batch=texts.shape[0], **sampling)
        h, state = self.hidden(texts)
        logits = ops.linear(h[:, -1], self.wte.weight)
        for i in range(max_new_tokens):
            token = sampler(logits.cpu(), history=texts.cpu()).to(texts.device)
            texts = torch.cat([texts, token[:, None]], 1)
            if callback is not None:
                callback(token)
            if i + 1 < max_new_tokens:
                logits, state = self.step(token, state)
        return texts[0] if ids.dim() == 1 else texts

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes model.safetensors (float32), then config.json, into a folder that has neither: ValueError otherwise.

        Without config.json there is no model, so a save that was cut short is never read.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        for name in (CONFIG, MODEL):
            if (folder / name).exists():
                raise ValueError(f"RNNLM: {folder} already holds {name}: choose another folder")
        values = {name: value.float().cpu().contiguous() for name, value in self.state_dict().items()}
        config = json_bytes(self.config.to_dict())
        folder.mkdir(parents=True, exist_ok=True)

        def write(path: Path) -> None:
            path.touch()
            mode = path.stat().st_mode  # the library would leave a file that only its owner can read
            save_file(values, path, metadata={"format": "pt"})
            path.chmod(mode)

        replace_file(folder / MODEL, write)
        replace_file(folder / CONFIG, lambda path: path.write_bytes(config))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RNNLM":
        """The model that save() wrote, in float32. FileNotFoundError, or ValueError naming the faulty file."""
        path = Path(folder) / CONFIG
        values = read_json(path, MAX_CONFIG_BYTES)
        try:
            config = RNNConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        model = cls(config, device="meta")
        model.load_state_dict(read_tensors(Path(folder) / MODEL, model.state_dict()), assign=True)
        return model
