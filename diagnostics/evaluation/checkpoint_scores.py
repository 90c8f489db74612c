"""Rows scored at every checkpoint of a run: what is recorded of one, and the curves that all of them make.

What is recorded is flat arrays by name, so that it outlives the checkpoint: `score.{n}.nats`, `.units` and
`.right` of the n-th set, a number a row, and `score.{n}.missing`, why there is none.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.row_losses import Losses, encoded
from diagnostics.numerics.estimates import Estimate, combined
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.models.editable import Editable
from probes.models.loading import memory_of
from probes.passes.batched import NonFiniteError
from probes.text.rows import Task

Which: TypeAlias = tuple[str, str]  # role and name of a set
ByRow = Float[np.ndarray, "checkpoints rows"]


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(RowOptions):
    """Row options with which the checkpoints of a run are scored; scores depend on nothing else but rows."""

    def open(self, checkpoint: Checkpoint) -> Editable:
        """A checkpoint as a model of its own; what lies in memory already keeps its dtype and its device."""
        in_memory = {"device": None, "dtype": None} if memory_of(checkpoint) is not None else {}
        return Editable(checkpoint, **(self.of_models | in_memory))

    def encode(self, editable: Editable, task: Task) -> Any:
        """A task in a model's tokens."""
        return encoded(editable, task, **self.of_rows)

    def key(self, sets: Mapping[Which, Task]) -> dict[str, Any]:
        """What a measurement on these sets depends on, as JSON keeps it."""
        rows = [[*which, identity(task)] for which, task in sets.items()]
        return {
            "sets": rows,
            "max_length": self.max_length,
            "chat_template": self.chat_template,
            "dtype": self.dtype,
        }


def identity(task: Task) -> str:
    """What tells rows from others, also some of a task's from all of them."""
    numbers = ",".join(str(row.number) for row in task.rows)
    return f"{task.fingerprint} {hashlib.blake2b(numbers.encode(), digest_size=8).hexdigest()}"


def sets_of(given: Mapping[str, Any]) -> dict[Which, Task]:
    """The sets of every role that was given, in order."""
    return {
        (role, name): task
        for role, source in given.items()
        if source is not None
        for name, task in tasks(source, role).items()
    }


def scores(editable: Editable, sets: Mapping[Which, Task], reading: ScoringOptions) -> dict[str, np.ndarray]:
    """What one model makes of every row of every set.

    A set whose loss is not finite has NaN throughout, and says so.
    """
    found: dict[str, np.ndarray] = {}
    for place, task in enumerate(sets.values()):
        rows = reading.encode(editable, task)
        try:
            losses, missing = rows.measure(editable.model), ""
        except NonFiniteError as error:
            nothing = np.full(len(task.rows), np.nan)
            losses, missing = Losses(nats=nothing, units=nothing, right=nothing), str(error)
        start = f"score.{place}"
        found |= {f"{start}.{name}": getattr(losses, name) for name in ("nats", "units", "right")}
        found |= {
            f"{start}.missing": np.array(missing),
            f"{start}.notes": np.array(list(rows.notes), dtype=str),
        }
    return found


@dataclass(frozen=True)
class Curves:
    """One set of rows over the checkpoints of a run.

    Attributes:
        nats, units, right: of each row at each checkpoint; rows that no checkpoint can score are left out.
    """

    which: Which
    task: Task
    nats: ByRow
    units: ByRow
    right: ByRow

    @property
    def unit(self) -> str:
        """What the loss is counted per."""
        return "row" if self.task.shape in ("choices", "label") else "token"

    @property
    def judged(self) -> str:
        """The curve by which a set is judged: right rows, or the loss where rows have no answer."""
        return "metric" if self.unit == "row" else "loss"

    @cached_property
    def loss(self) -> Float[np.ndarray, " checkpoints"]:
        """Mean nats of a unit; NaN where it is not finite."""
        return self.nats.sum(axis=1) / self.units.sum(axis=1)

    @cached_property
    def metric(self) -> Float[np.ndarray, " checkpoints"]:
        """Share of units that are right."""
        return (self.right * self.units).sum(axis=1) / self.units.sum(axis=1)

    def score(self, measure: str) -> Float[np.ndarray, " checkpoints"]:
        """A curve that is higher for better: the metric, or minus the loss."""
        return self.metric if measure == "metric" else -self.loss

    def difference(self, measure: str, first: int, second: int) -> Estimate:
        """Score of one checkpoint less that of another on the same rows, with its standard error."""
        by_row = self.right * self.units if measure == "metric" else -self.nats
        return combined(by_row[[first, second]], self.units[first], [1.0, -1.0])


def curves(measurements: Sequence[Mapping[str, np.ndarray]], sets: Mapping[Which, Task]) -> list[Curves]:
    """The curves of every set out of what was recorded of every checkpoint.

    Raises:
        InputError: a set of which nothing can be scored.
    """
    found = []
    for place, (which, task) in enumerate(sets.items()):
        nats, units, right = (
            np.stack([one[f"score.{place}.{name}"] for one in measurements])
            for name in ("nats", "units", "right")
        )
        scored = np.nan_to_num(units).max(axis=0) > 0
        if not scored.any():
            raise InputError(f"{task.ref}: none of its rows can be scored at any checkpoint")
        found.append(Curves(which, task, nats[:, scored], units[:, scored], right[:, scored]))
    return found


def reading_notes(
    measurements: Sequence[Mapping[str, np.ndarray]], sets: Mapping[Which, Task], labels: Sequence[str]
) -> list[str]:
    """What a reader must know of the rows: what was cut, and where a loss is missing."""
    notes: dict[str, None] = {}
    for place, (role, name) in enumerate(sets):
        notes |= {str(note): None for one in measurements for note in one[f"score.{place}.notes"]}
        lost = [
            (label, str(one[f"score.{place}.missing"]))
            for label, one in zip(labels, measurements, strict=True)
            if str(one[f"score.{place}.missing"])
        ]
        if lost:
            what = f"{role} rows" if role == name else f"{role} rows {name}"
            at = ", ".join(label for label, _ in lost)
            notes[f"The {what} have no finite loss at {at} ({lost[0][1]}); they are left out there."] = None
    return list(notes)
