"""Masked fine-tuning: pruned entries stay exactly zero while all others are trained."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probes.errors import InputError
from probes.models.body import trainable
from probes.passes.objective import Objective
from probes.progress import Progress


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
    progress: Progress | None = None,
) -> list[float]:
    """Train all weights of a model, its head too, except the entries that are held at zero.

    AdamW with a learning rate that falls linearly to zero, no warm-up and no clipping, and the rates and
    batches of text of Jaiswal et al. 2023 (arXiv:2306.03805). Training without dropout is ours; as the seed
    alone decides the order of the rows, two runs differ in the held entries only.

    Args:
        held: True where an entry is zero and stays so; weights without a mask are trained fully.
        steps: of the optimiser; 0 leaves the other entries unchanged.
        batch_rows: rows of a step. Each row is used once before any is used again.
        weight_decay: of AdamW; ours.
        progress: called with (steps done, all, "tuned").

    Returns:
        The loss of the rows of each step before it, in nats per unit.

    Raises:
        InputError: a mask of another shape than its weight, too small a number, or as `Objective.backward`.
        NonFiniteError: as `Objective.backward`.
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
    with trainable(model) as weights:
        zero_entries(zeros)
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        for step, rows in zip(range(steps), row_batches(objective.rows, batch_rows, seed), strict=False):
            optimizer.zero_grad()
            losses.append(objective.backward(model, rows))
            optimizer.step()
            schedule.step()
            zero_entries(zeros)
            if progress:
                progress(step + 1, steps, "tuned")
    return losses


def row_batches(rows: Sequence[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of rows: all rows in a random order, then in another; a batch may span two orders.

    Raises:
        InputError: there is no row.
    """
    if not rows:
        raise InputError("the task has no row with anything to score; there is nothing to train on")
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch:
            waiting += [rows[index] for index in torch.randperm(len(rows), generator=generator)]
        yield waiting[:batch]
        del waiting[:batch]


@torch.no_grad()
def zero_entries(zeros: Sequence[tuple[nn.Parameter, Bool[Tensor, "..."]]]) -> None:
    """Set the entries to zero."""
    for weight, zero in zeros:
        weight.masked_fill_(zero, 0)
