"""Evaluates the grafts of a pair on rows: three splits of each task, and the keep and OOD sets."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.analyses.skills.movement import Movement
from diagnostics.analyses.skills.region import Region
from diagnostics.core.analysis import NotApplicableError
from diagnostics.evaluation.answers import Answers, answers
from diagnostics.evaluation.row_losses import EncodedTask
from probes.checkpoints.blend import Blender
from probes.checkpoints.pair import Side
from probes.errors import InputError
from probes.files.sources import same_bytes
from probes.models.two_sided import TwoSidedModel
from probes.naming import families
from probes.text.rows import Task

Split = Literal["search", "selection", "report"]
Eligible = Literal["blocks", "matrices", "everything"]
Key = tuple[str, str]  # task and split, or role and set

SPLITS: tuple[Split, ...] = get_args(Split)
MIN_ROWS = 8  # of a split
# Rows of a split that are used; more would only take longer.
MAX_ROWS = {"search": 1024, "selection": 1000, "report": 2000}


def split_rows(task: Task, shares: Sequence[float], seed: int) -> dict[Split, list[int]]:
    """Random rows of a task for each split; rows of equal content are in one split."""
    duplicates: dict[object, list[int]] = {}
    for index, row in enumerate(task.rows):
        duplicates.setdefault((row.text, row.prompt), []).append(index)
    groups = list(duplicates.values())
    needed = math.ceil(MIN_ROWS / min(shares) - 1e-9)
    if len(groups) < needed:
        different = "" if len(groups) == len(task.rows) else f", {len(groups)} of them different"
        raise NotApplicableError(
            f"{task.ref}: has {len(task.rows)} rows{different}; at least {needed} are needed to search, "
            f"select and report on different rows (shares {', '.join(f'{share:g}' for share in shares)})"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    ends = np.round(np.cumsum(shares) * len(groups)).astype(int)
    by_split = {}
    for name, start, stop in zip(SPLITS, [0, *ends[:-1]], ends, strict=True):
        rows = [row for group in order[start:stop] for row in groups[group]]
        by_split[name] = sorted(rows[: MAX_ROWS[name]])
    return by_split


def select_rows(encoded: EncodedTask, rows: Sequence[int]) -> EncodedTask:
    """Some rows of an encoded task."""
    renumbered = {row: new for new, row in enumerate(rows)}
    return replace(
        encoded,
        task=replace(encoded.task, rows=tuple(encoded.task.rows[row] for row in rows)),
        examples=[replace(e, row=renumbered[e.row]) for e in encoded.examples if e.row in renumbered],
        classes=tuple(encoded.classes[row] for row in rows) if encoded.classes else (),
    )


def eligible_tensors(two_sided: TwoSidedModel, eligible: Eligible) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a mask may select from: base has them too, and the model differentiates."""
    matrices = {matrix.tensor for matrix in two_sided.pair.tuned.matrices.values()}
    shapes = {}
    for name in sorted(two_sided.in_both):
        inside = re.search(families.BLOCK, name) is not None
        if eligible != "everything" and not (inside and (eligible == "blocks" or name in matrices)):
            continue
        # A graft leaves out running statistics and other buffers.
        if all(
            isinstance(slot.tensor, nn.Parameter) for slot in two_sided.editable.slots(name, torch.arange(1))
        ):
            shapes[name] = two_sided.headers[name].shape
    if not shapes:
        raise InputError(
            f"{two_sided.pair.tuned.ref}: no tensor of base and tuned is eligible (eligible={eligible})"
        )
    return shapes


def layer_lookup(names: Collection[str]) -> Callable[[str], int | None]:
    """A function from a tensor's name to its layer; None outside the blocks."""
    blocks = {name: match[1] for name in names if (match := re.search(families.BLOCK, name))}
    numbers = {name: tuple(map(int, re.findall(r"\.(\d+)", block))) for name, block in blocks.items()}
    stacks = {name: re.sub(r"\d+", "#", block) for name, block in blocks.items()}

    def layer(name: str) -> int | None:
        if name not in blocks or len(numbers[name]) == 1:
            return numbers[name][0] if name in blocks else None
        # Blocks in stages are numbered consecutively.
        stack = {numbers[other] for other in blocks if stacks[other] == stacks[name]}
        return sorted(stack).index(numbers[name])

    return layer


class GraftEvaluator:
    """Evaluates grafts of one pair."""

    def __init__(self, two_sided: TwoSidedModel, sets: Mapping[Key, EncodedTask], eligible: Eligible):
        self.two_sided, self.sets = two_sided, sets
        self.shapes = eligible_tensors(two_sided, eligible)
        self.movement = Movement(self.shapes, self.read)
        # Tensors that differ and are not eligible; a graft has base's.
        outside = sorted(two_sided.in_both - self.shapes.keys())
        self.outside = [name for name in outside if not same_bytes(*self.read(name))]
        self.evaluations = 0  # passes over a set so far
        self._blender = Blender(two_sided.pair)

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A tensor of base and of tuned; entries that only a dtype rounded are base's in both."""
        base, tuned = self.two_sided.read(name, "base"), self.two_sided.settled(name)
        return base.to(torch.promote_types(base.dtype, tuned.dtype)), tuned

    def answers(self, keys: Collection[Key]) -> dict[Key, Answers]:
        """Answers of the model in its present state to some sets."""
        self.evaluations += len(keys)
        return {key: answers(self.sets[key], self.two_sided.model) for key in keys}

    def graft(self, region: Region, keys: Collection[Key]) -> dict[Key, Answers]:
        """Answers of base with a region of tuned."""
        return self._mixed(region, keys, "base", "tuned")

    def complement(self, region: Region, keys: Collection[Key]) -> dict[Key, Answers]:
        """Answers of tuned with a region of base: is the region needed?"""
        return self._mixed(region, keys, "tuned", "base")

    def _mixed(self, region: Region, keys: Collection[Key], most: Side, selected: Side) -> dict[Key, Answers]:
        self.two_sided.become(most)
        with self.two_sided.selecting({name: index.long() for name, index in region.items()}, selected):
            outcome = self.answers(keys)
        self.two_sided.become("base")
        return outcome

    def full_graft(self, keys: Collection[Key]) -> dict[Key, Answers]:
        """Answers of the graft of all eligible entries."""
        self.two_sided.become("tuned")
        with self._written((name, self.two_sided.read(name, "base")) for name in self.outside):
            outcome = self.answers(keys)
        self.two_sided.become("base")
        return outcome

    def interpolated(self, alpha: float, keys: Collection[Key]) -> dict[Key, Answers]:
        """Answers of base + α (tuned − base), over all weights."""
        self.two_sided.become("base")
        tuned = self.two_sided.pair.tuned

        def blends() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(self.two_sided.in_both):
                stored = tuned.tensor(name)
                value, square = self._blender.between(name, stored, alpha)
                if square or value is not stored:
                    yield name, value.to(self.two_sided.headers[name].dtype)

        with self._written(blends()):
            return self.answers(keys)

    @contextmanager
    def _written(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[None]:
        """Give tensors other values, and restore them at the end."""
        try:
            for name, value in tensors:
                self.two_sided.changed([name])
                self.two_sided.editable.write(name, value)
            yield
        finally:
            self.two_sided.restore()
