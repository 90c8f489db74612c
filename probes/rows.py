"""Rows of text: files and dataset splits, checked field by field.

A row is one of four shapes, told apart by its fields; every row of a task has the same one.  What is wrong is said with
the file, the line and the field.  Nothing here needs torch.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Shape: TypeAlias = Literal["text", "completion", "choices", "label"]

# shape -> its fields; the last two are tried first, since each extends another
SHAPES: dict[Shape, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "choices": ("prompt", "choices", "answer"),
    "label": ("text", "label"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row; the fields that its shape lacks are None.

    Attributes:
        answer: index of the right one of `choices`, from 0.
        label: name or number of a class.
        group: what results are broken down by.
        number: its line in the file, or its place in a split, from 1.
    """

    number: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    label: str | int | None = None
    group: str | None = None
