"""Logits at a task's labels: at each scored token, or of a row's classes.

The labels of a row with choices are the tokens of the right one, which training is given; a masked model
predicts every position with all others shown.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.models.body import evaluating, full_pass, run
from probes.passes.batched import require_finite
from probes.passes.objective import EncodedRows, ScoringUnit, batch_of, micro_batches, scoring_units
from probes.passes.scores import at_once


class LabelLogits(NamedTuple):
    """Logits of some label positions, in float32, with the label and the task's row of each."""

    logits: Float[Tensor, "positions classes"]
    targets: Int[Tensor, " positions"]
    rows: Int[Tensor, " positions"]


def label_units(encoded: EncodedRows, rows: Collection[int] | None = None) -> list[ScoringUnit]:
    """The units to run for every label of some rows, by default of all rows with a label."""
    units = []
    for unit in scoring_units(encoded):
        if rows is not None and unit.row not in rows:
            continue
        if encoded.task.shape == "choices":
            answer = encoded.task.rows[unit.row].answer or 0
            choice_of = {index: encoded.examples[index].choice or 0 for index, _ in unit.sequences}
            right = tuple(sequence for sequence in unit.sequences if choice_of[sequence[0]] == answer)
            unit = ScoringUnit(unit.row, right, unit.length)
        units.append(unit)
    return units


def label_logits(
    model: nn.Module, encoded: EncodedRows, *, rows: Collection[int] | None = None, tokens: int = 16384
) -> Iterator[LabelLogits]:
    """The logits at every label, a chunk at a time; raises NonFiniteError, which names the row.

    Args:
        rows: of the task; by default all with something to score.
        tokens: most tokens in a forward pass, padding included.
    """
    with evaluating(model):
        for part in micro_batches(label_units(encoded, rows), tokens):
            label_pass = LabelPass(model, encoded, part)
            for at in torch.arange(len(label_pass.targets)).split(at_once(model)):
                logits = label_pass.logits(at).float()
                finite = logits.isfinite().all(dim=1)
                require_finite(model, label_pass.batch, finite, label_pass.sequence[at])
                yield LabelLogits(logits, label_pass.targets[at], label_pass.rows[at])


class LabelPass:
    """One forward pass over the units of some labels.

    Attributes:
        targets, rows: of each label, as in `LabelLogits`.
        sequence: of each label, its sequence in the batch.
    """

    def __init__(
        self, model: nn.Module, encoded: EncodedRows, part: list[ScoringUnit], differentiable: bool = False
    ):
        self.batch, self.targets = batch_of(encoded, part)
        owner = torch.tensor([unit.row for unit in part for _ in unit.sequences])
        self.logits: Callable[[Int[Tensor, " labels"]], Tensor]
        if encoded.task.shape == "label":
            self.sequence = torch.arange(len(owner))
            self.targets = torch.tensor([encoded.classes[row] for row in owner.tolist()])
            with torch.set_grad_enabled(differentiable):
                class_logits = full_pass(model, self.batch).logits
            self.logits = lambda at: class_logits[at.to(class_logits.device)]
        else:
            self.sequence, positions = self.batch.scored.nonzero(as_tuple=True)
            at_labels = self.sequence * self.batch.ids.shape[1] + positions - int(encoded.mask_id is None)
            passed = run(model, self.batch, differentiable=differentiable)
            self.logits = lambda at: passed.logits(at_labels[at])
        self.rows = owner[self.sequence]


def row_outputs(
    model: nn.Module,
    encoded: EncodedRows,
    row: int,
    projection: Float[Tensor, "outputs classes"],
    *,
    differentiable: bool = False,
) -> Float[Tensor, " outputs"]:
    """A row's logits, projected and averaged over its labels: the function that the kernel linearises."""
    label_pass = LabelPass(model, encoded, label_units(encoded, {row}), differentiable)
    logits = label_pass.logits(torch.arange(len(label_pass.targets)))
    outputs = (logits.to(projection) @ projection.T).mean(dim=0)
    require_finite(model, label_pass.batch, outputs.isfinite().all()[None])
    return outputs
