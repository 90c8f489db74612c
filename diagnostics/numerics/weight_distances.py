"""Distances between the weights of a run's checkpoints, with two tensors in memory at a time.

Angles follow from distances: 2⟨a − b, c − d⟩ = |a − d|² + |b − c|² − |a − c|² − |b − d|². No third tensor is
held, and nothing of the size of the weights cancels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from probes.checkpoints.alignment import align_checkpoints, is_head
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.rounding import settled
from probes.errors import InputError
from probes.files.sources import finite

# Entries converted to float64 at a time: 8 MB each of two tensors and their difference.
CHUNK = 2**20

# Indices of two checkpoints.
Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """The floating weights that all checkpoints of a run have, tied ones once.

    Attributes:
        checkpoints: the run; the first gives the names.
        names: of the tensors.
        left_out: tensors that some checkpoint lacks, or has in another shape.
        stored: of each checkpoint, its own name of each tensor.
        rows: how many first rows are compared of a vocabulary that was resized during the run.
    """

    checkpoints: Sequence[Checkpoint]
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    stored: tuple[Mapping[str, str], ...]
    rows: Mapping[str, int]

    def notes(self, what: str) -> list[str]:
        """What a reader must know of the weights that `what` does not compare."""
        notes = []
        if self.left_out:
            more = " …" if len(self.left_out) > 5 else ""
            notes.append(
                f"{what} leaves out {len(self.left_out)} tensors that some checkpoint lacks in that shape: "
                f"{', '.join(self.left_out[:5])}{more}."
            )
        if self.rows:
            rows = ", ".join(map(str, dict.fromkeys(self.rows.values())))
            notes.append(f"{what} compares the first {rows} rows of a vocabulary that was resized.")
        return notes

    def read(self, index: int, name: str) -> Tensor:
        """A tensor of a checkpoint, as far as all have it."""
        tensor = self.checkpoints[index].tensor(self.stored[index][name])
        return tensor[: self.rows[name]] if name in self.rows else tensor

    def squared(self, first: int, second: int, name: str, start: Tensor | None = None) -> float:
        """Squared distance of a tensor in two checkpoints; `start` is the first one's, if it was read.

        Entries that only a dtype rounded add nothing.
        """
        sides = [(self.checkpoints[index], self.stored[index][name]) for index in (first, second)]
        if len({checkpoint.source.location(stored) for checkpoint, stored in sides}) == 1:
            return 0.0  # the tensor of one file, which an adapter leaves alone
        start = self.read(first, name) if start is None else start
        of_first, of_second = (checkpoint.headers[stored].dtype for checkpoint, stored in sides)
        return squared(start, settled(start, self.read(second, name), dtypes=(of_first, of_second)))


def shared(checkpoints: Sequence[Checkpoint]) -> SharedWeights:
    """The weights that all checkpoints have; InputError if there are none."""
    first = checkpoints[0]
    stored = [_names_in(first, checkpoint) for checkpoint in checkpoints]
    floating = [name for name, header in first.headers.items() if header.dtype.is_floating_point]
    tied = [{alias for matrix in c.matrices.values() for alias in matrix.tied} for c in checkpoints]
    names, rows = [], {}
    for name in floating:
        theirs = [of_checkpoint.get(name) for of_checkpoint in stored]
        if all(other in copies for other, copies in zip(theirs, tied, strict=True)):
            continue
        shapes = {
            checkpoint.headers[other].shape if other else None
            for other, checkpoint in zip(theirs, checkpoints, strict=True)
        }
        if len(shapes) == 1 and None not in shapes:
            names.append(name)
        elif len({shape[1:] for shape in shapes if shape}) == 1 and all(
            other and _is_vocabulary(checkpoint, other)
            for other, checkpoint in zip(theirs, checkpoints, strict=True)
        ):
            names.append(name)
            rows[name] = min(shape[0] for shape in shapes if shape)
    if not names:
        refs = " and ".join((first.ref, checkpoints[-1].ref))
        raise InputError(f"{refs}: no tensor is in all {len(checkpoints)} checkpoints; are they of one run?")
    copies = set.union(*tied)
    unnamed = dict.fromkeys(
        name
        for of_checkpoint, checkpoint in zip(stored, checkpoints, strict=True)
        for name, header in checkpoint.headers.items()
        if header.dtype.is_floating_point and name not in of_checkpoint.values() and name not in copies
    )
    left_out = [name for name in floating if name not in names and name not in copies]
    return SharedWeights(
        checkpoints=checkpoints, names=tuple(names), left_out=(*left_out, *unnamed), stored=tuple(stored),
        rows=rows,
    )  # fmt: skip


def _names_in(first: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """The other checkpoint's name of each tensor of the first."""
    return dict(align_checkpoints(first, other).tensors)


def _is_vocabulary(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor has a row, or an entry, for each token."""
    vocabulary = [m for m in checkpoint.matrices.values() if m.component in ("embed", "lm_head")]
    shape = checkpoint.headers[name].shape
    of_tokens = any(name in (m.tensor, *m.tied) for m in vocabulary)
    return of_tokens or (is_head(name) and len(shape) == 1 and shape[0] in {m.rows for m in vocabulary})


def pairs(count: int) -> list[Pair]:
    """The pairs of checkpoints that `path_rows` needs: with the first, the last and the two before."""
    last = count - 1
    needed = {(0, index) for index in range(1, count)} | {(index, last) for index in range(last)}
    needed |= {(index - back, index) for back in (1, 2) for index in range(back, count)}
    return sorted(needed)


def squared_distances(
    common: SharedWeights, progress: Callable[[int, int, str], None] | None = None
) -> dict[Pair, float]:
    """Squared distances of `pairs`, summed over tensors; InputError if weights are not finite."""
    squares = dict.fromkeys(pairs(len(common.checkpoints)), 0.0)
    for done, name in enumerate(common.names):
        if progress:
            progress(done, len(common.names), name)
        held: tuple[int, Tensor] | None = None
        for pair in squares:
            if held is None or held[0] != pair[0]:
                held = None  # freed before the next is read
                held = pair[0], common.read(pair[0], name)
            distance = common.squared(*pair, name, held[1])
            if not math.isfinite(distance):
                for index in pair:
                    finite(common.checkpoints[index].ref, name, common.read(index, name))
            squares[pair] += distance
    return squares


def squared(first: Tensor, second: Tensor) -> float:
    """Squared distance of two tensors of one shape, summed in float64."""
    total = 0.0
    for a, b in zip(first.reshape(-1).split(CHUNK), second.reshape(-1).split(CHUNK), strict=True):
        difference = a.double() - b.double()
        total += float(difference @ difference)
    return total


def path_rows(squares: dict[Pair, float], count: int) -> list[dict[str, float]]:
    """One row a checkpoint: the step that led to it, and its distance from both ends.

    Columns: `length` of the step; its `angle` to the line from first to last checkpoint and its `turn` from
    the step before, in degrees; `distance_start`, `distance_end`. NaN where a step is missing or 0.
    """
    last = count - 1

    def square(first: int, second: int) -> float:
        return 0.0 if first == second else squares[min(first, second), max(first, second)]

    def angle(first: Pair, second: Pair) -> float:
        (a, b), (c, d) = first, second
        product = (square(b, c) + square(a, d) - square(b, d) - square(a, c)) / 2
        size = math.sqrt(square(a, b) * square(c, d))
        return math.degrees(math.acos(max(-1.0, min(1.0, product / size)))) if size > 0 else math.nan

    return [
        {
            "length": math.sqrt(square(index - 1, index)) if index else math.nan,
            "angle": angle((index - 1, index), (0, last)) if index else math.nan,
            "turn": angle((index - 1, index), (index - 2, index - 1)) if index > 1 else math.nan,
            "distance_start": math.sqrt(square(0, index)),
            "distance_end": math.sqrt(square(index, last)),
        }
        for index in range(count)
    ]


def inefficiency(rows: Sequence[dict[str, float]]) -> float:
    """Path length over the distance of its ends; 1 on a straight line, NaN if both ends are equal."""
    distance = rows[-1]["distance_start"]
    return math.fsum(row["length"] for row in rows[1:]) / distance if distance > 0 else math.nan
