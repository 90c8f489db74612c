"""Tuning what a mask leaves: the regime of nearly every figure in the paper on essential sparsity."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from diagnostics.evaluation.row_losses import EncodedTask
from probes.errors import InputError
from probes.models.two_sided import TwoSidedModel
from probes.passes.masked_finetune import masked_finetune
from probes.passes.objective import Objective
from probes.text.rows import Task


def check(steps: int, share: float, lr: float, batch_rows: int) -> None:
    """Refuse what cannot be asked for.

    Raises:
        InputError: a number out of its range.
    """
    if steps < 0:
        raise InputError(f"finetune_steps is {steps}; at least 0, which tunes nothing")
    if not 0 < share < 1:
        raise InputError(f"finetune_share is {share}; it is between 0 and 1, such as 0.5")
    if not lr > 0 or batch_rows < 1:
        raise InputError(f"finetune_lr is {lr} and finetune_batch {batch_rows}; both are above 0")


def split(
    given: Mapping[tuple[str, str], Task], share: float, seed: int
) -> tuple[Task, dict[tuple[str, str], Task]]:
    """Rows of the task to be tuned on, drawn at random, and all sets without them.

    Raises:
        InputError: several task files, or fewer than 2 rows on either side.
    """
    own = [which for which in given if which[0] == "task"]
    if len(own) > 1:
        names = ", ".join(name for _, name in own)
        raise InputError(f"finetune_steps: there are {len(own)} tasks ({names}); give one, to be tuned on")
    task = given[own[0]]
    count = len(task.rows)
    drawn = set(np.random.default_rng(seed).permutation(count)[: round(share * count)].tolist())
    parts = [tuple(row for place, row in enumerate(task.rows) if (place in drawn) == chosen)
             for chosen in (True, False)]  # fmt: skip
    if min(map(len, parts)) < 2:
        raise InputError(
            f"{task.ref}: of its {count} rows a share of {share:g} leaves {len(parts[0])} to be tuned on and "
            f"{len(parts[1])} to be measured; both need 2"
        )
    lesson, rest = (replace(task, rows=rows) for rows in parts)
    return lesson, {**given, own[0]: rest}


class Training:
    """The same lesson for every mask: rows, their order and the schedule never differ.

    Attributes:
        rows: how many rows are tuned on.
    """

    def __init__(
        self,
        host: TwoSidedModel,
        lesson: EncodedTask,
        *,
        steps: int,
        lr: float,
        batch_rows: int,
        seed: int,
        batch_tokens: int,
    ):
        self.host, self.steps, self.lr, self.batch_rows, self.seed = host, steps, lr, batch_rows, seed
        self.rows = len(lesson.task.rows)
        self._objective = Objective(lesson, tokens=batch_tokens)

    @property
    def half(self) -> bool:
        """Whether weights are in half precision, which rounds small steps away."""
        return any(
            parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.host.model.parameters()
        )

    def __call__(self, held: Mapping[nn.Parameter, Bool[Tensor, "..."]]) -> None:
        """Tune the model with these entries held at zero; it is to be restored by its host."""
        nothing = torch.empty(0, dtype=torch.long)
        for name in self.host.headers:  # whatever is trained, the host is to put back
            self.host.write(name, nothing, torch.empty(0))
        masked_finetune(
            self.host.model, self._objective, held, steps=self.steps, lr=self.lr, batch_rows=self.batch_rows,
            seed=self.seed,
        )  # fmt: skip
