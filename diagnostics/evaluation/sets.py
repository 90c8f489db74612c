"""Sets of rows: one per file, keyed by role and name, and seeded draws from them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from diagnostics.core.inputs import tasks
from diagnostics.evaluation.row_losses import EncodedTask, encoded
from probes.models.editable import Editable
from probes.text.rows import Task

T = TypeVar("T")
SetKey: TypeAlias = tuple[str, str]  # role and name of a set


def load_sets(
    sources: Mapping[str, Any], *, least: int = 1, purpose: str = "an analysis", rows: int | None = None,
    seed: int = 0,
) -> dict[SetKey, Task]:  # fmt: skip
    """The tasks of every role that has a source, at most `rows` of each; fewer than `least` are refused."""
    return {
        (role, name): draw_rows(task.at_least(least, purpose), rows, seed)
        for role, source in sources.items()
        if source is not None
        for name, task in tasks(source, role).items()
    }


def load_named_sets(
    sources: Mapping[str, Any], *, least: int, purpose: str
) -> tuple[dict[str, str], dict[str, Task]]:
    """Role and task of every set by a unique name; a name that two roles share gets its role in front."""
    roles: dict[str, str] = {}
    sets: dict[str, Task] = {}
    for (role, name), task in load_sets(sources, least=least, purpose=purpose).items():
        unique = name if name not in sets else f"{role}:{name}"
        roles[unique], sets[unique] = role, task
    return roles, sets


def encode_sets(editable: Editable, sets: Mapping[SetKey, Task], **options: Any) -> dict[SetKey, EncodedTask]:
    """The sets as token ids of one model; `options` are those of `encoded`."""
    return {key: encoded(editable, task, **options) for key, task in sets.items()}


def set_notes(sets: Mapping[SetKey, EncodedTask]) -> list[str]:
    """The notes of all sets, each once."""
    return list(dict.fromkeys(note for encoded_set in sets.values() for note in encoded_set.notes))


def draw_rows(task: Task, count: int | None, seed: int) -> Task:
    """At most `count` rows of a task, drawn without replacement, in file order; None: all."""
    if count is None or len(task.rows) <= count:
        return task
    return replace(task, rows=tuple(draw_items(task.rows, count, seed)))


def draw_items(items: Sequence[T], count: int, seed: int) -> list[T]:
    """At most `count` items, drawn without replacement, in their order."""
    if len(items) <= count:
        return list(items)
    indices = np.random.default_rng(seed).choice(len(items), size=count, replace=False)
    return [items[index] for index in sorted(indices)]
