"""Steps of a training run: read out of names, compared without rounding, written as labels."""

import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np

from probes.errors import InputError

# A whole number where a float would round it.
Step: TypeAlias = int | float
# How trainers and hub revisions write a step: checkpoint-500, global_step500, step1000-tokens4B, iter_20k.
STEP = re.compile(r"(?:step|checkpoint|ckpt|iter(?:ation)?)s?[-_=]?(\d+)([kKmM](?![a-zA-Z]))?")
THOUSANDS = {"": 1, "k": 1_000, "m": 1_000_000}


def step_in(name: str) -> Step | None:
    """The step that a name carries; None if it carries none."""
    matched = STEP.search(name)
    return None if matched is None else exact(int(matched[1]) * THOUSANDS[(matched[2] or "").lower()])


def exact(step: Any) -> Step:
    """A step as a float, or as the whole number that it is where a float would round it."""
    if isinstance(step, str):
        try:
            step = int(step)
        except ValueError:
            return float(step)
    number = float(step)
    return int(step) if isinstance(step, Integral) and int(step) != number else number


def step_label(step: Any) -> str:
    """A step in as many digits as tell it from every other; text is returned as it is.

    >>> step_label(500.0), step_label(0.25), step_label(1_000_001)
    ('500', '0.25', '1000001')
    """
    if not isinstance(step, float):
        return str(step)
    return str(int(step)) if step.is_integer() and abs(step) < 1e21 else repr(float(step))


def in_order(labels: Sequence[Any]) -> tuple[Step, ...] | None:
    """The labels as steps; None unless all are finite numbers. Raises InputError if they do not rise."""
    try:
        steps = tuple(exact(label) for label in labels)
    except (TypeError, ValueError, OverflowError):
        return None
    if not steps or not np.isfinite([float(step) for step in steps]).all():
        return None
    for index in range(1, len(steps)):
        if steps[index] <= steps[index - 1]:
            late, early = (step_label(labels[at]) for at in (index, index - 1))
            raise InputError(
                f"step {late} comes after step {early}: give the checkpoints in step order, or say with "
                "--steps what their steps are"
            )
    return steps
