"""Row scores at every checkpoint of a run, and their curves over the run.

The scores of a checkpoint are flat arrays by name, to be stored: `score.{n}.nats`, `.units` and `.right` of
the n-th set, one number a row, and `score.{n}.missing`, the reason if there are none. How the
checkpoint reads them is told by `.ids`, a fingerprint of the tokens, `.bytes` of each row and `.labels`, its
classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.row_losses import EncodedTask, Losses, encoded, refuse_numbers
from diagnostics.evaluation.sets import SetKey
from diagnostics.numerics.estimates import Estimate, combined
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.models.editable import Editable
from probes.models.loading import Loading, context_of, memory_of
from probes.passes.batched import NonFiniteError
from probes.text.rows import Task

ByRow = Float[np.ndarray, "checkpoints rows"]
# Of the arrays of `scores`; measurements in an earlier one are not read.
FORMAT = 2
PER_BYTE = (
    "The checkpoints split rows differently: each reads with its own tokenizer, and losses of texts are in "
    "nats per byte."
)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(RowOptions):
    """Row options of the checkpoints of a run: all that scores depend on, except rows and weights."""

    def open(self, checkpoint: Checkpoint) -> Editable:
        """A checkpoint as a model; one in memory keeps its dtype and device."""
        in_memory = {"device": None, "dtype": None} if memory_of(checkpoint) is not None else {}
        return Editable(checkpoint, **(self.of_models | in_memory))

    def cut_alike(self, checkpoints: Sequence[Checkpoint]) -> "ScoringOptions":
        """These options, with rows as long as every checkpoint takes: all score the same tokens."""
        first, *others = (checkpoint.config for checkpoint in checkpoints)
        if all(config == first for config in others):
            return self
        loading = Loading(None, None, None, self.trust_remote_code)
        lengths = [self.max_length, *(context_of(loading.config(checkpoint)) for checkpoint in checkpoints)]
        return replace(self, max_length=min((n for n in lengths if n is not None), default=None))

    def encode(self, editable: Editable, task: Task) -> EncodedTask:
        """A task as token ids of a model."""
        return encoded(editable, task, **self.of_rows)

    def key(self, sets: Mapping[SetKey, Task]) -> dict[str, Any]:
        """Everything that a measurement on these sets depends on, as JSON keeps it."""
        options = {name: getattr(self, name) for name in ("max_length", "chat_template", "dtype")}
        return {"sets": [[*key, identity(task)] for key, task in sets.items()], "format": FORMAT, **options}


def identity(task: Task) -> str:
    """A fingerprint of a task's rows; a subset has another than the whole."""
    numbers = ",".join(str(row.number) for row in task.rows)
    return f"{task.fingerprint} {hashlib.blake2b(numbers.encode(), digest_size=8).hexdigest()}"


def scores(editable: Editable, sets: Mapping[SetKey, Task], options: ScoringOptions) -> dict[str, np.ndarray]:
    """One model's scores of every row of every set; a set with a loss that is not finite is all NaN."""
    arrays: dict[str, np.ndarray] = {}
    for index, task in enumerate(sets.values()):
        rows = options.encode(editable, task)
        try:
            losses, missing = rows.measure(editable.model), ""
        except NonFiniteError as error:
            nothing = np.full(len(task.rows), np.nan)
            losses, missing = Losses(nats=nothing, units=nothing, right=nothing), str(error)
        ids = repr([(example.ids, example.scored) for example in rows.examples])
        values = vars(losses) | {
            "missing": np.array(missing), "notes": np.array(rows.notes, dtype=str), "bytes": rows.bytes,
            "ids": np.array(hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()),
            "labels": np.array(rows.labels, dtype=str),
        }  # fmt: skip
        arrays |= {f"score.{index}.{name}": array for name, array in values.items()}
    return arrays


@dataclass(frozen=True)
class Curves:
    """One set of rows over the checkpoints of a run, without rows that no checkpoint can score."""

    which: SetKey
    task: Task
    nats: ByRow
    units: ByRow
    right: ByRow
    per_byte: bool = False  # the checkpoints split the texts differently

    @property
    def unit(self) -> str:
        """The unit of the loss."""
        if self.task.shape in ("choices", "label"):
            return "row"
        return "byte" if self.per_byte else "token"

    @property
    def judged(self) -> str:
        """The curve by which a set is judged: accuracy, or the loss where rows have no answer."""
        return "metric" if self.unit == "row" else "loss"

    @cached_property
    def loss(self) -> Float[np.ndarray, " checkpoints"]:
        """Mean nats per unit; NaN where not finite."""
        return self.nats.sum(axis=1) / self.units.sum(axis=1)

    @cached_property
    def metric(self) -> Float[np.ndarray, " checkpoints"]:
        """Share of units that are right."""
        return (self.right * self.units).sum(axis=1) / self.units.sum(axis=1)

    def score(self, measure: str) -> Float[np.ndarray, " checkpoints"]:
        """A curve where higher is better: the metric, or minus the loss."""
        return self.metric if measure == "metric" else -self.loss

    def difference(self, measure: str, first: int, second: int) -> Estimate:
        """Score of one checkpoint minus that of another on the same rows."""
        by_row = self.right * self.units if measure == "metric" else -self.nats
        return combined(by_row[[first, second]], self.units[first], [1.0, -1.0])


def curves(measurements: Sequence[Mapping[str, np.ndarray]], sets: Mapping[SetKey, Task]) -> list[Curves]:
    """The curves of every set, from the arrays of `scores` of every checkpoint.

    Where checkpoints split texts differently, the unit is a byte, and rows that one of them cut are left out.

    Raises:
        InputError: no row can be scored, or labels are numbers and classes are in another order.
    """
    by_set = []
    for index, (key, task) in enumerate(sets.items()):
        nats, units, right, size = (
            np.stack([arrays[f"score.{index}.{name}"] for arrays in measurements])
            for name in ("nats", "units", "right", "bytes")
        )
        first, *later = (list(map(str, arrays[f"score.{index}.labels"])) for arrays in measurements)
        for labels in later:
            refuse_numbers(task, first, labels)
        per_byte = split_differently(measurements, index) and task.shape in ("text", "completion")
        if per_byte:
            complete = ((np.isnan(units) | (units > 0)) & (size > 0)).all(axis=0)
            units = np.where(np.isnan(units), np.nan, size * complete)
        scored = np.nan_to_num(units).max(axis=0) > 0
        if not scored.any():
            raise InputError(f"{task.ref}: none of its rows can be scored at any checkpoint")
        by_set.append(Curves(key, task, nats[:, scored], units[:, scored], right[:, scored], per_byte))
    return by_set


def split_differently(measurements: Sequence[Mapping[str, np.ndarray]], index: int) -> bool:
    """Whether checkpoints read a set as different tokens."""
    return len({str(arrays[f"score.{index}.ids"]) for arrays in measurements}) > 1


def reading_notes(
    measurements: Sequence[Mapping[str, np.ndarray]], sets: Mapping[SetKey, Task], labels: Sequence[str]
) -> list[str]:
    """Notes on the rows: cut ones, and checkpoints without a finite loss."""
    notes: dict[str, None] = {}
    for index, (role, name) in enumerate(sets):
        notes |= {str(note): None for arrays in measurements for note in arrays[f"score.{index}.notes"]}
        if split_differently(measurements, index):
            notes[PER_BYTE] = None
        reasons = [str(arrays[f"score.{index}.missing"]) for arrays in measurements]
        missing = dict(pair for pair in zip(labels, reasons, strict=True) if pair[1])
        if missing:
            rows = f"{role} rows" if role == name else f"{role} rows {name}"
            where = f"{', '.join(missing)} ({next(iter(missing.values()))})"
            notes[f"The {rows} have no finite loss at {where}: left out there."] = None
    return list(notes)
