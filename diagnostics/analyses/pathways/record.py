"""Routes, routers and losses of the followed rows at one checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The followed samples, ordered by group.

    Attributes:
        names: of the groups.
        groups: index of each sample's group.
        rows: file and line of each sample.
        trained: whether they are train rows.
    """

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
    """The measurements of one checkpoint.

    Attributes:
        routes: of each sample.
        routers: one matrix per layer, one row per expert.
        nats, units: summed loss of each sample, and its number of units.
        held_nats, held_units, held_right: the same for each held-out row, and its share right.
    """

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
        routes = replace(
            self.routes,
            full=self.routes.full[kept],
            top=self.routes.top[kept],
            tokens=self.routes.tokens[kept],
        )
        return replace(self, routes=routes, nats=self.nats[kept], units=self.units[kept])


@dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """The rows and options of a record.

    Attributes:
        followed: rows with followed routes, by name.
        held: held-out rows, by name.
    """

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
        """Routes, losses and routers of one checkpoint, as flat arrays.

        Raises:
            NotApplicableError: the model has no experts.
            InputError: rows or a model that cannot be scored.
        """
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
        losses = joined([rows.measure(editable.model) for rows in followed])
        held_losses = joined([rows.measure(editable.model) for rows in held])
        return {
            **stacked(routed).record(),
            "routers": np.asarray(routers, dtype=np.float32),
            "nats": losses.nats,
            "units": losses.units,
            "held_nats": held_losses.nats,
            "held_units": held_losses.units,
            "held_right": held_losses.right,
            "truncated": np.array(sum(rows.truncated for rows in (*followed, *held))),
        }


def stacked(routed: Sequence[Routes]) -> Routes:
    """Routes of several files, concatenated."""
    return replace(
        routed[0],
        full=np.concatenate([routes.full for routes in routed]),
        top=np.concatenate([routes.top for routes in routed]),
        tokens=np.concatenate([routes.tokens for routes in routed]),
    )


def joined(losses: Sequence[Losses]) -> Losses:
    """Losses of several files, concatenated."""
    return Losses(
        nats=np.concatenate([part.nats for part in losses]),
        units=np.concatenate([part.units for part in losses]),
        right=np.concatenate([part.right for part in losses]),
    )


def draw_rows(
    given: Mapping[str, Task], count: int, seed: int
) -> tuple[dict[str, Task], list[str], list[str]]:
    """At most `count` random rows of each group, with the group and the file and line of each.

    Rows without a group form one by the name of their file, or `all`.
    """
    groups = {
        (name, index): row.group or (name if len(given) > 1 else ALL)
        for name, task in given.items()
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
            for name, task in given.items()}  # fmt: skip
    cut = {
        name: replace(given[name], rows=tuple(given[name].rows[index] for index in indices),
                      fingerprint=f"{given[name].fingerprint}/{most}/{seed}")
        for name, indices in left.items() if indices
    }  # fmt: skip
    order = [(name, index) for name in cut for index in left[name]]
    return cut, [groups[row_key] for row_key in order], [given[name].where(index) for name, index in order]


def comparable(labels: Sequence[str], records: Sequence[Record]) -> None:
    """Refuse checkpoints with different routers.

    Raises:
        InputError: the message names the first that differs.
    """
    first = records[0]
    for label, record in zip(labels[1:], records[1:], strict=True):
        expected, found = (
            f"{shape[0]} layers of {shape[1]} experts of width {shape[2]}"
            for shape in (first.routers.shape, record.routers.shape)
        )
        if expected != found or record.routes.layers != first.routes.layers:
            raise InputError(
                f"{label}: has {found}, and {labels[0]} {expected}. Routes can only be followed through the "
                "same experts; leave out checkpoints of another shape, such as those with merged or upcycled "
                "experts"
            )
