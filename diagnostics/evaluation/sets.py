"""The sets of rows that an analysis evaluates, by role and name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from diagnostics.core.inputs import tasks
from diagnostics.evaluation.interpolation import Which
from diagnostics.evaluation.row_losses import EncodedTask, encoded
from probes.models.editable import Editable
from probes.text.rows import Task


def sets_of(
    given: Mapping[str, Any],
    editable: Editable,
    *,
    purpose: str,
    max_length: int | None,
    chat_template: bool,
    batch_tokens: int,
    rows: int | None = None,
    seed: int = 0,
) -> dict[Which, EncodedTask]:
    """The sets of every role that was given, in the tokens of a model.

    Args:
        purpose: what needs at least 2 rows, in words.
        rows: most rows of a set, drawn at random; None: all.

    Raises:
        InputError: rows that cannot be scored, or fewer than 2 in a set.
    """
    found = {
        (role, name): drawn(one.at_least(2, purpose), rows, seed)
        for role, source in given.items()
        if source is not None
        for name, one in tasks(source, role).items()
    }
    return {
        which: encoded(
            editable, one, max_length=max_length, chat_template=chat_template, batch_tokens=batch_tokens
        )
        for which, one in found.items()
    }


def drawn(task: Task, rows: int | None, seed: int) -> Task:
    """At most so many rows of a task, at random, in their order."""
    if rows is None or len(task.rows) <= rows:
        return task
    places = np.random.default_rng(seed).choice(len(task.rows), size=rows, replace=False)
    return replace(task, rows=tuple(task.rows[place] for place in sorted(places)))
