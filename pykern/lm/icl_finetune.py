"""Fine-tuning on mapping tasks: for every task a copy of the model learns its k examples by gradient, then answers.

The rival of icl.evaluate_icl on the same tasks. Each example is a text of its own, START x y, and the loss is that of
y; the query is START x: what the model knows of the task is in its weights.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pykern.lm.icl import SHOTS, ShotsResult, checked_shots, wilson
from pykern.lm.icl_tasks import IGNORED, MappingTasks, check_whole
from pykern.lm.model import Transformer
from pykern.lm.tokenizer import Tokenizer
from pykern.optim import AdamW

TEXT = 2  # tokens that are read of an example, START and key, and of a query
STEPS, LR = 10, 1e-2  # the cheapest tried that makes a trained model learn every example: docs/icl.md


def learn(model: Transformer, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """`steps` of AdamW, without weight decay, on all of x, y [k, 2] at once."""
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0, max_norm=1.0)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model(x, y)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"finetune: the loss is {loss.item()}: try a lower lr")
        loss.backward()
        optimizer.step()
        optimizer.finite_norm()  # on a GPU the step does not raise itself


def finetune(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    shots: Sequence[int] = SHOTS,
    episodes: int = 100,
    seed: int = 0,
    steps: int = STEPS,
    lr: float = LR,
    tasks: MappingTasks | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> list[ShotsResult]:
    """Accuracy after fine-tuning on k examples, for the same tasks and queries as evaluate_icl(shots, episodes, seed).

    Every task starts from a fresh copy of `model`, which itself is not changed; without examples nothing is learned.
    seconds_task and flops_task are those of the `steps` steps, three forward passes over k examples each;
    seconds_query and flops_query those of one query by itself. Errors as evaluate_icl's.
    """
    tasks = MappingTasks() if tasks is None else tasks
    numbers = checked_shots("finetune", shots, model.config.block_size)
    check_whole("finetune", "episodes", episodes, 1)
    check_whole("finetune", "seed", seed, 0, 2**63 - 1)
    check_whole("finetune", "steps", steps, 1)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"finetune: lr must be a number, got {type(lr).__name__}")
    if not 0.0 < lr < math.inf:
        raise ValueError(f"finetune: lr is {lr} but must be positive and finite")
    ids = torch.from_numpy(tasks.token_ids(tokenizer)).to(model.device)
    labels, learner, original = ids[tasks.first_label :], copy.deepcopy(model), model.state_dict()
    learner.requires_grad_(True)
    results = []
    for k in numbers:
        drawn = tasks.sample(k, episodes, seed)
        correct, learning, asking = 0, 0.0, 0.0
        for examples, prompt, answer in zip(drawn.examples, drawn.prompts, drawn.answers, strict=True):
            learner.load_state_dict(original)
            start = learned = time.perf_counter()
            if k > 0:
                pairs = ids[torch.from_numpy(examples)]
                x = torch.stack([ids[0].expand(k), pairs[:, 0]], 1)
                y = torch.stack([torch.full_like(pairs[:, 1], IGNORED), pairs[:, 1]], 1)
                learner.train()
                learn(learner, x, y, steps, lr)
                learned = time.perf_counter()
            learner.eval()
            with torch.no_grad():
                query = ids[[0, int(prompt[-1])]][None]
                logits = learner.logits(learner.hidden(query)[0, -1])
            correct += int(logits[labels].argmax()) == int(answer)
            learning += learned - start
            asking += time.perf_counter() - learned
        low, high = wilson(correct, episodes)
        config = model.config
        results.append(
            ShotsResult(
                method="fine-tuned",
                shots=k,
                queries=episodes,
                correct=correct,
                low=low,
                high=high,
                optimal=float(tasks.optimal_accuracy(k)),
                seconds_task=learning / episodes,
                seconds_query=asking / episodes,
                flops_task=steps * k * TEXT * config.training_flops_per_token(TEXT),
                flops_query=TEXT * config.forward_flops_per_token(TEXT),
            )
        )
        report(f"fine-tuned, {k} shots | {correct / episodes:.1%} of {episodes} tasks")
    return results
