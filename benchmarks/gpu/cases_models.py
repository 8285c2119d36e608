"""Whole models: a step of decoding, tokens chosen one after the other, loss and gradients of a batch."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_train import pykern_name
from benchmarks.gpu.case import OURS, Case, Maker, Source
from benchmarks.gpu.makers import eager, rivals
from benchmarks.models import GPT2, TINY, Model
from benchmarks.plain_gpt import PlainGPT

if TYPE_CHECKING:
    from pykern.lm import Transformer

BF16 = torch.bfloat16
LARGE = Model("gpt 1.2B", 18, 16, 2048, 1024, 128256)
CONTEXT = 512  # tokens before the step that is timed
TOKENS = 32  # chosen by a call
MODEL_KERNELS = (
    *("embedding_forward", "embedding_backward", "layer_norm_forward", "layer_norm_backward", "linear_forward"),
    *("linear_backward", "attention_forward", "attention_backward", "mlp_forward", "mlp_backward"),
    "linear_cross_entropy",
)


def plain_model(model: Model, device: torch.device, dtype: torch.dtype) -> PlainGPT:
    torch.manual_seed(0)
    with torch.device(device):
        return PlainGPT(**model.sizes).to(dtype)


def step_inputs(source: Source, model: Model, B: int, context: int) -> tuple:
    plain = plain_model(model, source.device, BF16)
    return source.integers(model.vocab_size, B), plain, plain.caches(B, BF16), context


def step(ids: Tensor, plain: PlainGPT, caches: list, context: int) -> Tensor:
    """Logits after one more token; the caches are static, as under torch.compile's reduce-overhead."""
    with torch.no_grad():
        return F.linear(plain.hidden(ids[:, None], caches, context)[:, -1], plain.wte.weight)


def step_cases(tiny: bool) -> Iterator[Case]:
    """A step, replayed as one CUDA graph: without it launches are timed. pykern chooses tokens in graphs of its own."""
    for goal, model, B in [("G15", TINY, 2)] if tiny else [("G15", GPT2, 1), ("G16", LARGE, 1), ("G15", GPT2, 8)]:
        context = 5 if tiny else CONTEXT
        yield Case(
            *("decode step", goal, 5 if B == 1 else 7, BF16, f"{model.name} B{B} context{context}"),
            model.decode_bytes(B, context, BF16.itemsize),
            model.decode_flops(B, context),
            lambda source, model=model, B=B, context=context: step_inputs(source, model, B, context),
            rivals(step),
            traffic="read",
            one_set=True,
            extra_seconds=20.0,
        )


def twin_of(model: Model, plain: PlainGPT) -> "Transformer":
    """pykern.lm with the weights of a PlainGPT, in its dtype, on its device."""
    from pykern.lm import Config, Transformer

    twin = Transformer(Config(**model.sizes)).to(plain.wte.weight)
    twin.load_state_dict({pykern_name(name): value for name, value in plain.state_dict().items()})
    return twin


def token_inputs(source: Source, model: Model, context: int) -> tuple:
    """The text, the token that follows it, the model, and caches that hold the text: the same for all contestants."""
    plain = plain_model(model, source.device, BF16)
    text, caches = source.integers(model.vocab_size, 1, context), plain.caches(1, BF16)
    with torch.no_grad():
        plain.hidden(text, caches)
    return text, source.integers(model.vocab_size, 1), plain, caches


def greedy(text: Tensor, first: Tensor, plain: PlainGPT, caches: list) -> list[Tensor]:
    """Logits after the first token, and the TOKENS most likely tokens from there on. As a graph: all steps in one."""
    token, chosen, after_first = first, [], None
    for i in range(TOKENS):
        logits = step(token, plain, caches, text.shape[1] + i)
        after_first = logits if after_first is None else after_first
        token = logits.argmax(-1)
        chosen.append(token)
    return [after_first, torch.stack(chosen, 1)]


def _our_tokens(model: Model) -> Maker:
    """A session that reads the text once; every call forgets what the one before has appended."""

    def make() -> Callable[..., Any]:
        sessions: dict[int, tuple] = {}

        def tokens(text: Tensor, first: Tensor, plain: PlainGPT, caches: list) -> list[Tensor]:
            if id(plain) not in sessions:
                session = twin_of(model, plain).session("bfloat16")
                session.read(text)
                logits = session.step(first)  # once: a call chooses tokens, logits stay inside it
                sessions[id(plain)] = session, logits, int(first)
            session, logits, token = sessions[id(plain)]
            session.cache.truncate(text.shape[1])
            return [logits, torch.tensor([session.continue_greedily(token, TOKENS)])]

        return tokens

    return make


def token_cases(tiny: bool) -> Iterator[Case]:
    """What a user waits for: the choice of tokens, the launches and the one wait of a call included."""
    for goal, model in [("G15", TINY)] if tiny else [("G15", GPT2), ("G16", LARGE)]:
        context = 5 if tiny else CONTEXT
        steps = range(context, context + TOKENS)
        yield Case(
            *(f"{TOKENS} greedy tokens", goal, 3, BF16, f"{model.name} B1 context{context}"),
            sum(model.decode_bytes(1, past, BF16.itemsize) for past in steps),
            sum(model.decode_flops(1, past) for past in steps),
            lambda source, model=model, context=context: token_inputs(source, model, context),
            {"torch": eager(greedy), OURS: _our_tokens(model)},
            ("lm_step", "lm_generate"),
            traffic="read",
            one_set=True,
            extra_seconds=20.0,
        )


def train_inputs(source: Source, model: Model, B: int, T: int) -> tuple:
    plain = plain_model(model, source.device, torch.float32)
    ids = source.integers(model.vocab_size, B, T + 1)
    return plain, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loss_and_gradients(plain: PlainGPT, ids: Tensor, targets: Tensor) -> list[Tensor]:
    """In bfloat16 by autocast; the loss, and the gradient of every parameter."""
    with torch.autocast(ids.device.type, BF16):
        loss = plain.loss(ids, targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(plain.parameters()))]


def _compiled_training() -> Callable[..., Any]:
    """torch.compile of the loss; its gradient is compiled with it. SDPA by cuDNN where that runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.gpu.makers import compiled

    loss_of = compiled(lambda plain, ids, targets: plain.loss(ids, targets))()

    def both(plain: PlainGPT, ids: Tensor, targets: Tensor) -> list[Tensor]:
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True), torch.autocast(ids.device.type, BF16):
            loss = loss_of(plain, ids, targets)
        return [loss.detach(), *torch.autograd.grad(loss, list(plain.parameters()))]

    return both


def _our_training(model: Model) -> Maker:
    def make() -> Callable[..., Any]:
        twins: dict[int, tuple] = {}

        def both(plain: PlainGPT, ids: Tensor, targets: Tensor) -> list[Tensor]:
            if id(plain) not in twins:
                twin = twin_of(model, plain)
                names = [pykern_name(name) for name, _ in plain.named_parameters()]
                twins[id(plain)] = twin, [twin.get_parameter(name) for name in names]
            twin, parameters = twins[id(plain)]
            with torch.autocast(ids.device.type, BF16):
                loss = twin(ids, targets)
            return [loss.detach(), *torch.autograd.grad(loss, parameters)]

        return both

    return make


def train_cases(tiny: bool) -> Iterator[Case]:
    """Loss and gradients of a batch, without the optimiser, which has a case of its own."""
    for model, B, T in [(TINY, 2, 8)] if tiny else [(GPT2, 16, 1024)]:
        yield Case(
            *("loss and gradients", "G14", 6, BF16, f"{model.name} B{B} T{T}"),
            float(model.parameters * 8),
            model.training_flops(B, T),
            lambda source, model=model, B=B, T=T: train_inputs(source, model, B, T),
            {"torch": lambda: loss_and_gradients, "torch.compile": _compiled_training, OURS: _our_training(model)},
            MODEL_KERNELS,
            one_set=True,
            extra_seconds=60.0,
        )


def cases(tiny: bool) -> Iterator[Case]:
    yield from token_cases(tiny)
    yield from step_cases(tiny)
    yield from train_cases(tiny)
