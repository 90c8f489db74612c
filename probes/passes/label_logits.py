"""Logits where a task's labels are: at each scored token, or of a row's classes.

Of rows with choices the labels are the tokens of the right one, for these are what training is given; of a
masked model every place is asked for with all others shown.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.models.body import evaluating, inputs, padding_known, run, unwrapped
from probes.passes.batched import not_finite
from probes.passes.objective import EncodedRows, ScoringUnit, batch_of, micro_batches, wholes
from probes.passes.scores import at_once
from probes.text.batches import Batch


class Labelled(NamedTuple):
    """Logits of some label positions.

    Attributes:
        logits: in float32, or as the model gives them where they are differentiated.
        targets: the label at each.
        rows: which row of the task each is of.
    """

    logits: Float[Tensor, "positions classes"]
    targets: Int[Tensor, " positions"]
    rows: Int[Tensor, " positions"]


def labelled(encoded: EncodedRows, rows: Collection[int] | None = None) -> list[ScoringUnit]:
    """What must be run to see every label of some rows, by default of all that have one."""
    found = []
    for whole in wholes(encoded):
        if rows is not None and whole.row not in rows:
            continue
        if encoded.task.shape == "choices":
            answer = encoded.task.rows[whole.row].answer or 0
            right = tuple(
                each for each in whole.sequences if (encoded.examples[each[0]].choice or 0) == answer
            )
            whole = ScoringUnit(whole.row, right, whole.length)
        found.append(whole)
    return found


def label_logits(
    model: nn.Module, encoded: EncodedRows, *, rows: Collection[int] | None = None, tokens: int = 16384
) -> Iterator[Labelled]:
    """The logits at every label, a chunk at a time.

    Args:
        rows: of the task; by default all that have something to score.
        tokens: most tokens in a forward pass, padding included.

    Raises:
        NonFiniteError: logits that are NaN or infinite; the message names the row.
    """
    with evaluating(model):
        for part in micro_batches(labelled(encoded, rows), tokens):
            seen = Seen(model, encoded, part)
            for at in torch.arange(seen.count).split(seen.at_once):
                logits = seen.logits(at).float()
                bad = ~logits.isfinite().all(dim=1)
                if bad.any():
                    place = int(seen.sequence[at[int(bad.nonzero()[0, 0])]])
                    raise not_finite(model, seen.batch, place)
                yield Labelled(logits, seen.targets[at], seen.rows[at])


class Seen:
    """One forward pass over what shows some labels.

    Attributes:
        count: labels.
        at_once: how many labels' logits are made at a time.
        targets, rows: of each label, as in `Labelled`.
        sequence: which sequence of the batch each label is in.
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
        owner = torch.tensor([whole.row for whole in part for _ in whole.sequences])
        self.at_once = at_once(model)
        self.logits: Callable[[Int[Tensor, " labels"]], Tensor]
        if encoded.task.shape == "label":
            self.sequence = torch.arange(len(owner))
            self.targets = torch.tensor([encoded.classes[row] for row in owner.tolist()])
            whole = _classes(model, self.batch, differentiable)
            self.logits = lambda at: whole[at.to(whole.device)]
        else:
            self.sequence, places = self.batch.scored.nonzero(as_tuple=True)
            at_labels = self.sequence * self.batch.ids.shape[1] + places - int(encoded.mask_id is None)
            passed = run(model, self.batch, differentiable=differentiable)
            self.logits = lambda at: passed.logits(at_labels[at])
        self.rows = owner[self.sequence]
        self.count = len(self.targets)


def _classes(model: nn.Module, batch: Batch, differentiable: bool) -> Float[Tensor, "rows classes"]:
    inner = unwrapped(model)
    given = inputs(inner, batch)
    with padding_known(inner, given), nullcontext() if differentiable else torch.no_grad():
        return inner(**given).logits


def row_outputs(
    model: nn.Module,
    encoded: EncodedRows,
    row: int,
    projection: Float[Tensor, "outputs classes"],
    *,
    differentiable: bool = False,
) -> Float[Tensor, " outputs"]:
    """A row's logits, projected and averaged over its labels: a function of the row to compare models by.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    seen = Seen(model, encoded, labelled(encoded, {row}), differentiable=differentiable)
    logits = seen.logits(torch.arange(seen.count))
    made = (logits.to(projection) @ projection.T).mean(dim=0)
    if not made.isfinite().all():
        raise not_finite(model, seen.batch, 0)
    return made
