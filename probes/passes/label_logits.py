"""Logits at a task's labels: at each scored token, or of a row's classes.

The labels of a row with choices are the tokens of the right one, which training is given; a masked model
predicts every position with all others shown.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.models.body import evaluating, inputs, run, unwrapped, with_padding_id
from probes.passes.batched import non_finite_error
from probes.passes.objective import EncodedRows, ScoringUnit, batch_of, micro_batches, scoring_units
from probes.passes.scores import at_once
from probes.text.batches import Batch


class LabelLogits(NamedTuple):
    """Logits of some label positions.

    Attributes:
        logits: in float32; in the model's dtype where they are differentiated.
        targets: the label at each position.
        rows: the task's row of each position.
    """

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
            right = tuple(
                sequence
                for sequence in unit.sequences
                if (encoded.examples[sequence[0]].choice or 0) == answer
            )
            unit = ScoringUnit(unit.row, right, unit.length)
        units.append(unit)
    return units


def label_logits(
    model: nn.Module, encoded: EncodedRows, *, rows: Collection[int] | None = None, tokens: int = 16384
) -> Iterator[LabelLogits]:
    """The logits at every label, a chunk at a time.

    Args:
        rows: of the task; by default all with something to score.
        tokens: most tokens in a forward pass, padding included.

    Raises:
        NonFiniteError: logits that are NaN or infinite; the message names the row.
    """
    with evaluating(model):
        for part in micro_batches(label_units(encoded, rows), tokens):
            label_pass = LabelPass(model, encoded, part)
            for at in torch.arange(label_pass.count).split(label_pass.at_once):
                logits = label_pass.logits(at).float()
                bad = ~logits.isfinite().all(dim=1)
                if bad.any():
                    sequence = int(label_pass.sequence[at[int(bad.nonzero()[0, 0])]])
                    raise non_finite_error(model, label_pass.batch, sequence)
                yield LabelLogits(logits, label_pass.targets[at], label_pass.rows[at])


class LabelPass:
    """One forward pass over the units of some labels.

    Attributes:
        count: number of labels.
        at_once: labels whose logits are computed at a time.
        targets, rows: of each label, as in `LabelLogits`.
        sequence: of each label, its sequence in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        encoded: EncodedRows,
        part: Sequence[ScoringUnit],
        *,
        differentiable: bool = False,
    ):
        self.batch, self.targets = batch_of(encoded, part)
        owner = torch.tensor([unit.row for unit in part for _ in unit.sequences])
        self.at_once = at_once(model)
        self.logits: Callable[[Int[Tensor, " labels"]], Tensor]
        if encoded.task.shape == "label":
            self.sequence = torch.arange(len(owner))
            self.targets = torch.tensor([encoded.classes[row] for row in owner.tolist()])
            class_logits = _classes(model, self.batch, differentiable)
            self.logits = lambda at: class_logits[at.to(class_logits.device)]
        else:
            self.sequence, positions = self.batch.scored.nonzero(as_tuple=True)
            at_labels = self.sequence * self.batch.ids.shape[1] + positions - int(encoded.mask_id is None)
            passed = run(model, self.batch, differentiable=differentiable)
            self.logits = lambda at: passed.logits(at_labels[at])
        self.rows = owner[self.sequence]
        self.count = len(self.targets)


def _classes(model: nn.Module, batch: Batch, differentiable: bool) -> Float[Tensor, "rows classes"]:
    inner = unwrapped(model)
    arguments = inputs(inner, batch)
    with with_padding_id(inner, arguments), nullcontext() if differentiable else torch.no_grad():
        return inner(**arguments).logits


def row_outputs(
    model: nn.Module,
    encoded: EncodedRows,
    row: int,
    projection: Float[Tensor, "outputs classes"],
    *,
    differentiable: bool = False,
) -> Float[Tensor, " outputs"]:
    """A row's logits, projected and averaged over its labels: the function that the kernel linearises.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    label_pass = LabelPass(model, encoded, label_units(encoded, {row}), differentiable=differentiable)
    logits = label_pass.logits(torch.arange(label_pass.count))
    outputs = (logits.to(projection) @ projection.T).mean(dim=0)
    if not outputs.isfinite().all():
        raise non_finite_error(model, label_pass.batch, 0)
    return outputs
