"""Fine-tuning with a mask held: what is pruned stays exactly zero while everything else is trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probes.errors import InputError
from probes.passes.objective import Objective


def masked_finetune(
    model: nn.Module,
    objective: Objective,
    held: Mapping[nn.Parameter, Bool[Tensor, "..."]],
    *,
    steps: int,
    lr: float = 2e-5,
    batch_rows: int = 32,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[float]:
    """Train all weights of a model, its head too, but for the entries that are held at zero.

    AdamW with a rate that falls linearly to zero, as in Jaiswal et al. 2023 (arXiv:2306.03805), whose rates
    and batches of text these are; it has no warm-up and clips no gradient. Without dropout, which is ours,
    and with rows in an order that the seed alone decides, two runs differ by what is held and by nothing
    else. The weights are changed for good, in the dtype that they have; half precision rounds small steps
    away.

    Args:
        held: True where an entry is zero and stays so; weights that are not in it are trained wholly.
        steps: of the optimiser; 0 leaves the other entries as they are.
        batch_rows: rows of a step. Each row is used once before any is used again.
        weight_decay: of AdamW; ours.
        progress: called with steps done, of how many, and what is being done.

    Returns:
        The loss of the rows of each step before it, in nats a unit.

    Raises:
        InputError: a mask of another shape than its weight, a number below its least, or as `backward` says.
        NonFiniteError: as `backward` says.
    """
    if steps < 0 or batch_rows < 1:
        raise InputError(f"{steps} steps of {batch_rows} rows; give 0 steps or more, of 1 row or more")
    for weight, zero in held.items():
        if zero.shape != weight.shape:
            raise InputError(
                f"a mask is {tuple(zero.shape)} and its weight {tuple(weight.shape)}; give one for each entry"
            )
    zeros = [(weight, zero.to(weight.device)) for weight, zero in held.items()]
    losses = []
    with training(model) as weights:
        hold(zeros)
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        for step, rows in zip(range(steps), orders(objective.rows, batch_rows, seed), strict=False):
            optimizer.zero_grad()
            losses.append(objective.backward(model, rows))
            optimizer.step()
            schedule.step()
            hold(zeros)
            if progress:
                progress(step + 1, steps, "tuned")
    return losses


def orders(rows: Sequence[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of rows: all of them in a drawn order, then in another; a batch may be of two.

    Raises:
        InputError: there is no row.
    """
    if not rows:
        raise InputError("the task has no row with anything to score; there is nothing to train on")
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch:
            waiting += [rows[place] for place in torch.randperm(len(rows), generator=generator)]
        yield waiting[:batch]
        del waiting[:batch]


@contextmanager
def training(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All weights of a model, requiring gradients; outside each has its own switch and gradient again."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    before = [(weight, weight.requires_grad, weight.grad) for weight in weights]
    try:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight, switch, gradient in before:
            weight.requires_grad_(switch)
            weight.grad = gradient


@torch.no_grad()
def hold(zeros: Sequence[tuple[nn.Parameter, Bool[Tensor, "..."]]]) -> None:
    """Set the entries to zero."""
    for weight, zero in zeros:
        weight.masked_fill_(zero, 0)
