"""Routes, routers and losses of the followed rows at one checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from diagnostics.core.analysis import NotApplicableError
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.row_losses import Losses, encoded
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.experts.router_weights import router_matrices
from probes.experts.routers import NoRoutersError
from probes.experts.routes import Routes, capture_routes, routed_examples
from probes.models.editable import Editable
from probes.text.rows import Task

# Most samples over all groups: distances are kept for all pairs.
MOST = 3000
ALL = "all"
Part = TypeVar("Part", Routes, Losses)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The followed samples, ordered by group: names of the groups, group and file and line of each sample."""

    names: tuple[str, ...]
    groups: Int[np.ndarray, " samples"]
    rows: tuple[str, ...]
    trained: bool

    def take(self, kept: Int[np.ndarray, " kept"]) -> "Samples":
        """A subset."""
        rows = tuple(self.rows[index] for index in kept)
        present, groups = np.unique(self.groups[kept], return_inverse=True)
        names = tuple(self.names[group] for group in present)
        return Samples(names=names, groups=groups.astype(np.int64), rows=rows, trained=self.trained)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The measurements of one checkpoint: of the samples, and `held_` of the held-out rows."""

    routes: Routes
    routers: Float[np.ndarray, "layers experts width"]
    nats: Float[np.ndarray, " samples"]
    units: Float[np.ndarray, " samples"]
    held_nats: Float[np.ndarray, " rows"]
    held_units: Float[np.ndarray, " rows"]
    held_right: Float[np.ndarray, " rows"]

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> "Record":
        """The record of stored arrays."""
        arrays = {
            name: np.asarray(measured[name], dtype=np.float64)
            for name in ("nats", "units", "held_nats", "held_units", "held_right")
        }
        return cls(routes=Routes.of(measured), routers=np.asarray(measured["routers"]), **arrays)

    def take(self, kept: Int[np.ndarray, " kept"]) -> "Record":
        """The record of a subset of samples."""
        arrays = {name: getattr(self.routes, name)[kept] for name in ("full", "top", "tokens")}
        routes = replace(self.routes, **arrays)
        return replace(self, routes=routes, nats=self.nats[kept], units=self.units[kept])


@dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """The followed and the held-out rows of a record, and its options."""

    followed: Mapping[str, Task]
    held: Mapping[str, Task]
    drop_first: bool
    fold_gain: bool
    options: RowOptions

    def identity(self) -> dict[str, Any]:
        """All that a record depends on besides the checkpoint."""
        return {
            "followed": [task.fingerprint for task in self.followed.values()],
            "held": [task.fingerprint for task in self.held.values()],
            "drop_first": self.drop_first, "fold_gain": self.fold_gain,
            "max_length": self.options.max_length, "chat_template": self.options.chat_template,
            "dtype": self.options.dtype,
        }  # fmt: skip

    def measure(self, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """Routes, losses and routers of one checkpoint, as flat arrays."""
        try:
            routers = router_matrices(checkpoint, fold_gain=self.fold_gain)
        except NoRoutersError as error:
            raise NotApplicableError(
                f"{checkpoint.ref}: is a dense model, and pathways need experts; `dynamics` follows a series "
                "of dense checkpoints"
            ) from error
        editable = Editable(checkpoint, **self.options.of_models)
        reading = self.options.of_rows
        followed = [encoded(editable, task, **reading) for task in self.followed.values()]
        held = [encoded(editable, task, **reading) for task in self.held.values()]
        routed = [
            capture_routes(
                editable, routed_examples(rows.task, rows.examples), drop_first=self.drop_first,
                tokens=self.options.batch_tokens, where=rows.task.where,
            )
            for rows in followed
        ]  # fmt: skip
        measure = ("nats", "units", "right")
        losses = joined([rows.measure(editable.model) for rows in followed], measure)
        held_losses = joined([rows.measure(editable.model) for rows in held], measure)
        return {
            **joined(routed, ("full", "top", "tokens")).record(),
            "routers": np.asarray(routers, dtype=np.float32), "nats": losses.nats, "units": losses.units,
            "held_nats": held_losses.nats, "held_units": held_losses.units, "held_right": held_losses.right,
            "truncated": np.array(sum(rows.truncated for rows in (*followed, *held))),
        }  # fmt: skip


def joined(parts: Sequence[Part], names: Sequence[str]) -> Part:
    """Routes or losses of several files, with these arrays concatenated."""
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **arrays)


def draw_rows(
    sets: Mapping[str, Task], count: int, seed: int
) -> tuple[dict[str, Task], list[str], list[str]]:
    """At most `count` random rows of each group, with the group and the file and line of each.

    Rows without a group form one by the name of their file, or `all`.
    """
    groups = {
        (name, index): row.group or (name if len(sets) > 1 else ALL)
        for name, task in sets.items()
        for index, row in enumerate(task.rows)
    }
    by_group: dict[str, list[tuple[str, int]]] = {}
    for row_key, group in groups.items():
        by_group.setdefault(group, []).append(row_key)
    most = max(2, min(count, MOST // len(by_group)))
    generator = np.random.default_rng(seed)
    kept = set()
    for keys in by_group.values():
        chosen = generator.choice(len(keys), min(most, len(keys)), replace=False)
        kept |= {keys[index] for index in chosen}
    left = {name: [index for index in range(len(task.rows)) if (name, index) in kept]
            for name, task in sets.items()}  # fmt: skip
    cut = {
        name: replace(sets[name], rows=tuple(sets[name].rows[index] for index in indices),
                      fingerprint=f"{sets[name].fingerprint}/{most}/{seed}")
        for name, indices in left.items() if indices
    }  # fmt: skip
    order = [(name, index) for name in cut for index in left[name]]
    return cut, [groups[row_key] for row_key in order], [sets[name].where(index) for name, index in order]


def comparable(labels: Sequence[str], records: Sequence[Record]) -> None:
    """Refuse checkpoints with different routers, naming the first that differs."""
    shapes = ["{} layers of {} experts of width {}".format(*record.routers.shape) for record in records]
    for label, shape, record in zip(labels, shapes, records, strict=True):
        if shape != shapes[0] or record.routes.layers != records[0].routes.layers:
            raise InputError(
                f"{label}: has {shape}, and {labels[0]} {shapes[0]}. Routes can only be followed through the "
                "same experts; leave out checkpoints of another shape, such as those with merged or upcycled "
                "experts"
            )
