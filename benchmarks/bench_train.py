"""A training step: forward, backward, AdamW; bfloat16 is autocast of float32 weights unless bf16 weights are named."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.models import GPT2, SMALL, TINY, Model
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import OURS, Case
from pykern.testing.memory import kept_bytes

STEPS = [(GPT2, 4, 64), (GPT2, 1, 1024), (SMALL, 8, 256)]  # model, B, T
QUICK_STEPS = [(TINY, 2, 32)]
NOT_COMPILED = [*QUICK_STEPS, (GPT2, 1, 1024)]  # unless --compile-all: it takes long
DTYPES = (torch.float32, torch.bfloat16)
ADAMW_BYTES = 28  # per float32 parameter: reads it, its gradient and two moments, writes all but the gradient
LR = 1e-4
PARTS = {"c_attn": "attn.c_attn", "c_out": "attn.c_proj", "c_fc": "mlp.c_fc", "c_proj": "mlp.c_proj"}


def moved(model: Model, B: int, T: int, item: int) -> float:
    """Weights read forward and backward, their gradients written, the optimiser's pass. Activations are not counted."""
    return float(2 * item * model.matrix_weights + 4 * model.parameters + ADAMW_BYTES * model.parameters)


def pykern_name(name: str) -> str:
    """The name in pykern.lm.Transformer of a parameter of PlainGPT."""
    return "transformer." + ".".join(PARTS.get(part, part) for part in name.split("."))


class Step:
    """A contestant: loss(ids, targets) of a model, its gradients, and a step of its optimiser."""

    def __init__(
        self, loss: Callable, model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, autocast: bool
    ):
        self.function, self.model, self.optimizer, self.autocast = loss, model, optimizer, autocast
        self.ids, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def loss(self) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            return self.function(self.ids, self.targets)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def activation_bytes(self) -> int:
        """What forward keeps for backward, parameters left out."""
        return kept_bytes(self.loss, self.model.parameters())


def build(model: Model, B: int, T: int, dtype: torch.dtype, compiled: bool) -> dict[str, Step]:
    """All start from the same weights, rounded where they are bfloat16."""
    from pykern.lm import Config, Transformer
    from pykern.optim import AdamW

    text = torch.randint(model.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    half = dtype == torch.bfloat16
    torch.manual_seed(0)
    plain = PlainGPT(**model.sizes)
    weights = {pykern_name(name): value for name, value in plain.state_dict().items()}

    def ours(weight_dtype: torch.dtype) -> Step:
        twin = Transformer(Config(**model.sizes)).to(weight_dtype)
        twin.load_state_dict(weights)
        return Step(twin, twin, AdamW(twin.parameters(), lr=LR), text, half and weight_dtype == torch.float32)

    def theirs(twin: PlainGPT, loss: Callable) -> Step:
        return Step(loss, twin, torch.optim.AdamW(twin.parameters(), lr=LR, fused=True), text, half)

    contestants = {OURS: ours(torch.float32)}
    if half:
        contestants["pykern, bf16 weights"] = ours(torch.bfloat16)
    contestants["torch"] = theirs(plain, plain.loss)
    if compiled:
        torch.compiler.reset()  # what was compiled for another case would make this one's shapes dynamic, hence slower
        twin = copy.deepcopy(plain)
        contestants["torch.compile"] = theirs(twin, torch.compile(twin.loss, dynamic=False))
    return contestants


def cases(quick: bool, compile_all: bool = False) -> Iterator[Case]:
    for shape in QUICK_STEPS if quick else STEPS:
        model, B, T = shape
        for dtype in DTYPES:
            compiled = compile_all or shape not in NOT_COMPILED
            yield Case(
                f"{model.name} B{B} T{T}",
                dtype,
                model.training_flops(B, T),
                moved(model, B, T, dtype.itemsize),
                lambda shape=shape, dtype=dtype, compiled=compiled: build(*shape, dtype, compiled),
                memory=lambda steps: {who: {"activations": step.activation_bytes()} for who, step in steps.items()},
            )
