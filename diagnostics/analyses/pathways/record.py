"""What is recorded of each checkpoint for its pathways: routes, routers and losses of chosen rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diagnostics.core.analysis import NotApplicableError
from diagnostics.evaluation.row_losses import Losses, encoded
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.experts.router_weights import router_matrices
from probes.experts.routers import NoRoutersError
from probes.experts.routes import Routes, capture_routes, routed_examples
from probes.models.editable import Editable
from probes.text.rows import Task

# Samples in all, whatever the groups: there is a number for every pair of them.
MOST = 3000
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples whose routes are followed, ordered by group.

    Attributes:
        names: of the groups.
        groups: of each sample, an index into these.
        rows: file and line of each.
        trained: whether they are rows that the run was trained on.
    """

    names: tuple[str, ...]
    groups: Int[np.ndarray, " samples"]
    rows: tuple[str, ...]
    trained: bool

    def take(self, kept: Int[np.ndarray, " kept"]) -> "Samples":
        """Some of them."""
        rows = tuple(self.rows[place] for place in kept)
        present, groups = np.unique(self.groups[kept], return_inverse=True)
        names = tuple(self.names[group] for group in present)
        return Samples(names=names, groups=groups.astype(np.int64), rows=rows, trained=self.trained)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was recorded at one checkpoint.

    Attributes:
        routes: of each sample.
        routers: one matrix a layer, a row an expert.
        nats, units: loss of each sample, and what it is counted per.
        held_nats, held_units, held_right: of each held-out row.
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
        """Out of what was measured."""
        arrays = {
            name: np.asarray(measured[name], dtype=np.float64)
            for name in ("nats", "units", "held_nats", "held_units", "held_right")
        }
        return cls(routes=Routes.of(measured), routers=np.asarray(measured["routers"]), **arrays)

    def take(self, kept: Int[np.ndarray, " kept"]) -> "Record":
        """Of some samples."""
        routes = replace(
            self.routes,
            full=self.routes.full[kept],
            top=self.routes.top[kept],
            tokens=self.routes.tokens[kept],
        )
        return replace(self, routes=routes, nats=self.nats[kept], units=self.units[kept])


@dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """What is recorded of each checkpoint.

    Attributes:
        followed: the rows whose routes are followed, by name.
        held: held-out rows, by name.
    """

    followed: Mapping[str, Task]
    held: Mapping[str, Task]
    drop_first: bool
    fold_gain: bool
    max_length: int | None
    chat_template: bool
    batch_tokens: int
    trust_remote_code: bool
    device: str
    dtype: str | None

    def identity(self) -> dict[str, Any]:
        """What a record depends on, besides the checkpoint."""
        return {
            "followed": [task.fingerprint for task in self.followed.values()],
            "held": [task.fingerprint for task in self.held.values()],
            "drop_first": self.drop_first, "fold_gain": self.fold_gain, "max_length": self.max_length,
            "chat_template": self.chat_template, "dtype": self.dtype,
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
                f"{checkpoint.ref}: is a dense model, and pathways are those through experts; `dynamics` "
                "follows a series of dense checkpoints"
            ) from error
        editable = Editable(
            checkpoint, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        reading: dict[str, Any] = {
            "max_length": self.max_length, "chat_template": self.chat_template,
            "batch_tokens": self.batch_tokens,
        }  # fmt: skip
        followed = [encoded(editable, task, **reading) for task in self.followed.values()]
        held = [encoded(editable, task, **reading) for task in self.held.values()]
        routed = [
            capture_routes(
                editable, routed_examples(each.task, each.examples), drop_first=self.drop_first,
                tokens=self.batch_tokens, where=each.task.where,
            )
            for each in followed
        ]  # fmt: skip
        losses = joined([each.measure(editable.model) for each in followed])
        held_losses = joined([each.measure(editable.model) for each in held])
        return {
            **stacked(routed).record(),
            "routers": np.asarray(routers, dtype=np.float32),
            "nats": losses.nats,
            "units": losses.units,
            "held_nats": held_losses.nats,
            "held_units": held_losses.units,
            "held_right": held_losses.right,
            "truncated": np.array(sum(each.truncated for each in (*followed, *held))),
        }


def stacked(routed: Sequence[Routes]) -> Routes:
    """Routes of several files, one after another."""
    return replace(
        routed[0],
        full=np.concatenate([each.full for each in routed]),
        top=np.concatenate([each.top for each in routed]),
        tokens=np.concatenate([each.tokens for each in routed]),
    )


def joined(losses: Sequence[Losses]) -> Losses:
    """Losses of several files, one after another."""
    return Losses(
        nats=np.concatenate([each.nats for each in losses]),
        units=np.concatenate([each.units for each in losses]),
        right=np.concatenate([each.right for each in losses]),
    )


def some(given: Mapping[str, Task], count: int, seed: int) -> tuple[dict[str, Task], list[str], list[str]]:
    """At most so many rows of each group; and of each row that is left its group, and its file and line.

    A group is what rows call so; rows that name none are of a group by the name of their file, or `all`.
    """
    groups = {
        (name, index): row.group or (name if len(given) > 1 else ALL)
        for name, task in given.items()
        for index, row in enumerate(task.rows)
    }
    of: dict[str, list[tuple[str, int]]] = {}
    for place, group in groups.items():
        of.setdefault(group, []).append(place)
    most = max(2, min(count, MOST // len(of)))
    generator = np.random.default_rng(seed)
    kept = set()
    for places in of.values():
        chosen = generator.choice(len(places), min(most, len(places)), replace=False)
        kept |= {places[index] for index in chosen}
    left = {name: [index for index in range(len(task.rows)) if (name, index) in kept]
            for name, task in given.items()}  # fmt: skip
    cut = {
        name: replace(given[name], rows=tuple(given[name].rows[index] for index in indices),
                      fingerprint=f"{given[name].fingerprint}/{most}/{seed}")
        for name, indices in left.items() if indices
    }  # fmt: skip
    order = [(name, index) for name in cut for index in left[name]]
    return cut, [groups[place] for place in order], [given[name].where(index) for name, index in order]


def comparable(labels: Sequence[str], records: Sequence[Record]) -> None:
    """Refuse checkpoints whose experts are not the same ones.

    Raises:
        InputError: the message names the first that differs.
    """
    first = records[0]
    for label, record in zip(labels[1:], records[1:], strict=True):
        one, other = (
            f"{shape[0]} layers of {shape[1]} experts of width {shape[2]}"
            for shape in (first.routers.shape, record.routers.shape)
        )
        if one != other or record.routes.layers != first.routes.layers:
            raise InputError(
                f"{label}: has {other}, and {labels[0]} {one}: routes are followed through the same experts; "
                "leave out checkpoints of another shape, such as those with merged or upcycled experts"
            )
