"""Masked fine-tuning: the regime of nearly every figure in the paper on essential sparsity."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool
from torch import Tensor, nn

from probes.errors import InputError
from probes.models.two_sided import TwoSidedModel
from probes.passes.masked_finetune import masked_finetune
from probes.passes.objective import Objective
from probes.text.rows import Task


def check_training(steps: int, share: float, lr: float, batch_rows: int) -> None:
    """Refuse parameters out of range."""
    if steps < 0:
        raise InputError(f"finetune_steps is {steps}; it is at least 0 (no tuning)")
    if not 0 < share < 1:
        raise InputError(f"finetune_share is {share}; it is between 0 and 1, such as 0.5")
    if not lr > 0 or batch_rows < 1:
        raise InputError(f"finetune_lr is {lr} and finetune_batch {batch_rows}; both are above 0")


def split_training(
    sets: Mapping[tuple[str, str], Task], share: float, seed: int
) -> tuple[Task, dict[tuple[str, str], Task]]:
    """A random share of the task rows to tune on, and all sets without them."""
    task_keys = [key for key in sets if key[0] == "task"]
    if len(task_keys) > 1:
        names = ", ".join(name for _, name in task_keys)
        raise InputError(f"finetune_steps: there are {len(task_keys)} tasks ({names}); give one to tune on")
    task = sets[task_keys[0]]
    count = len(task.rows)
    drawn = set(np.random.default_rng(seed).permutation(count)[: round(share * count)].tolist())
    parts = [tuple(row for index, row in enumerate(task.rows) if (index in drawn) == chosen)
             for chosen in (True, False)]  # fmt: skip
    if min(map(len, parts)) < 2:
        raise InputError(
            f"{task.ref}: with finetune_share={share:g}, its {count} rows leave {len(parts[0])} to tune on "
            f"and {len(parts[1])} to measure; both need 2"
        )
    training, rest = (replace(task, rows=rows) for rows in parts)
    return training, {**sets, task_keys[0]: rest}


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedFinetuning:
    """Tunes behind a mask, with the same rows, order and schedule for every mask."""

    two_sided: TwoSidedModel
    objective: Objective
    rows: int  # training rows
    steps: int
    lr: float
    batch_rows: int
    seed: int

    def __call__(self, held: Mapping[nn.Parameter, Bool[Tensor, "..."]]) -> None:
        """Tune the model with these entries held at zero; the two-sided model restores it later."""
        self.two_sided.changed()
        masked_finetune(
            self.two_sided.model, self.objective, held, steps=self.steps, lr=self.lr, seed=self.seed,
            batch_rows=self.batch_rows,
        )  # fmt: skip
