"""A pair in memory and the rows its grafts are measured on: three splits of each task, and other sets.

What is searched on, what is chosen on and what is reported on are different rows; rows of equal content are
in one split. Every measurement is of one running model that is base, tuned, or some of both by selection.
"""

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
from probes.errors import InputError
from probes.files.sources import same_bytes
from probes.models.two_sided import TwoSidedModel
from probes.naming import families
from probes.text.rows import Task

Split = Literal["search", "selection", "report"]
Eligible = Literal["blocks", "matrices", "everything"]
Progress = Callable[[int, int, str], None]
# A task and a split of it, or a role and a set of it.
Key = tuple[str, str]

SPLITS: tuple[Split, ...] = get_args(Split)
LEAST = 8  # rows of a split
# Rows of a split that are used; more than this would only take longer.
MOST = {"search": 1024, "selection": 1000, "report": 2000}


def split(task: Task, shares: Sequence[float], seed: int) -> dict[Split, list[int]]:
    """Rows of a task for each purpose, drawn by the seed; what stands in several rows is in one split.

    Raises:
        NotApplicableError: too few rows; the message says how many are needed.
    """
    alike: dict[object, list[int]] = {}
    for place, row in enumerate(task.rows):
        alike.setdefault((row.text, row.prompt), []).append(place)
    groups = list(alike.values())
    needed = math.ceil(LEAST / min(shares) - 1e-9)
    if len(groups) < needed:
        different = "" if len(groups) == len(task.rows) else f", {len(groups)} of them different"
        raise NotApplicableError(
            f"{task.ref}: has {len(task.rows)} rows{different}; to search, select and report on different "
            f"rows ({', '.join(f'{share:g}' for share in shares)} of them) it needs at least {needed}"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    ends = np.round(np.cumsum(shares) * len(groups)).astype(int)
    made = {}
    for name, start, stop in zip(SPLITS, [0, *ends[:-1]], ends, strict=True):
        rows = [row for group in order[start:stop] for row in groups[group]]
        made[name] = sorted(rows[: MOST[name]])
    return made


def part(whole: EncodedTask, rows: Sequence[int]) -> EncodedTask:
    """Some rows of an encoded task."""
    place = {row: new for new, row in enumerate(rows)}
    return replace(
        whole,
        task=replace(whole.task, rows=tuple(whole.task.rows[row] for row in rows)),
        examples=[
            replace(example, row=place[example.row]) for example in whole.examples if example.row in place
        ],
        classes=tuple(whole.classes[row] for row in rows) if whole.classes else (),
    )


def eligible_tensors(host: TwoSidedModel, eligible: Eligible) -> dict[str, tuple[int, ...]]:
    """The tensors that a mask may choose entries of, with their shapes.

    `blocks`: every weight, bias and norm inside the blocks, as in the released code; `matrices`: the matrices
    there alone; `everything`: embeddings and heads too. Only what base has too and the model differentiates.

    Raises:
        InputError: there is none.
    """
    matrices = {matrix.tensor for matrix in host.pair.tuned.matrices.values()}
    found = {}
    for name in sorted(host.in_both):
        inside = re.search(families.BLOCK, name) is not None
        if eligible != "everything" and not (inside and (eligible == "blocks" or name in matrices)):
            continue
        # Running statistics and other buffers belong to neither side of a graft.
        if all(isinstance(slot.tensor, nn.Parameter) for slot in host.editable.slots(name, torch.arange(1))):
            found[name] = host.headers[name].shape
    if not found:
        raise InputError(
            f"{host.pair.tuned.ref}: no tensor of base and tuned is eligible for a mask (eligible = "
            f"{eligible})"
        )
    return found


def layers(names: Collection[str]) -> Callable[[str], int | None]:
    """Gives the layer of a tensor by its name; None outside the blocks."""
    blocks = {name: found[1] for name in names if (found := re.search(families.BLOCK, name))}
    stacks: dict[str, list[tuple[int, ...]]] = {}
    numbers = {name: tuple(map(int, re.findall(r"\.(\d+)", block))) for name, block in blocks.items()}
    for name, index in numbers.items():
        stacks.setdefault(re.sub(r"\d+", "#", blocks[name]), []).append(index)
    # Blocks in stages are counted through.
    places = {stack: sorted(set(indices)) for stack, indices in stacks.items()}

    def layer(name: str) -> int | None:
        if name not in blocks:
            return None
        index = numbers[name]
        return index[0] if len(index) == 1 else places[re.sub(r"\d+", "#", blocks[name])].index(index)

    return layer


def wide(region: Region) -> Region:
    """A region whose places can index a tensor on any device."""
    return {name: index.long() for name, index in region.items()}


class GraftEvaluator:
    """Measures grafts of one pair.

    Attributes:
        host: base at rest, once `begin` has been called.
        sets: rows in the model's tokens.
        shapes: of the eligible tensors.
        movement: of these.
        outside: tensors that differ and are not eligible; a graft leaves them base's.
        evaluations: passes over a set so far.
    """

    def __init__(self, host: TwoSidedModel, sets: Mapping[Key, EncodedTask], eligible: Eligible):
        self.host, self.sets = host, sets
        self.shapes = eligible_tensors(host, eligible)
        self.movement = Movement(self.shapes, self.read)
        self.outside = [
            name for name in sorted(host.in_both - self.shapes.keys()) if not same_bytes(*self.read(name))
        ]
        self.evaluations = 0
        self._blender = Blender(host.pair)

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A tensor of base and of tuned."""
        return self.host.read(name, "base"), self.host.read(name, "tuned")

    def said(self, keys: Collection[Key]) -> dict[Key, Answers]:
        """What the model, as it is now, says of some sets."""
        self.evaluations += len(keys)
        return {key: answers(self.sets[key], self.host.model) for key in keys}

    def graft(self, region: Region, keys: Collection[Key]) -> dict[Key, Answers]:
        """What base says with a region of tuned."""
        self.host.become("base")
        with self.host.selecting(wide(region), "tuned"):
            return self.said(keys)

    def complement(self, region: Region, keys: Collection[Key]) -> dict[Key, Answers]:
        """What tuned says with a region of base: is the region needed?"""
        self.host.become("tuned")
        with self.host.selecting(wide(region), "base"):
            said = self.said(keys)
        self.host.become("base")
        return said

    def ones(self, keys: Collection[Key]) -> dict[Key, Answers]:
        """What a graft of every eligible entry says: tuned, but for what is not eligible."""
        self.host.become("tuned")
        with self._written((name, self.host.read(name, "base")) for name in self.outside):
            said = self.said(keys)
        self.host.become("base")
        return said

    def interpolated(self, alpha: float, keys: Collection[Key]) -> dict[Key, Answers]:
        """What base + α (tuned − base) of all weights says."""
        self.host.become("base")
        tuned = self.host.pair.tuned

        def blends() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(self.host.in_both):
                value, square = self._blender.between(name, tuned.tensor(name), alpha)
                if square:
                    yield name, value.to(self.host.headers[name].dtype)

        with self._written(blends()):
            return self.said(keys)

    @contextmanager
    def _written(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[None]:
        """Whole tensors with other values for a while."""
        try:
            for name, value in tensors:
                self.host.changed([name])
                self.host.editable.write(name, value)
            yield
        finally:
            self.host.restore()
