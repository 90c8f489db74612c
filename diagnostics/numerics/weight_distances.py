"""Distances between the weights of a run's checkpoints, with two tensors in memory at a time.

Angles follow from distances: 2⟨a − b, c − d⟩ = |a − d|² + |b − c|² − |a − c|² − |b − d|². No third tensor is
held, and nothing of the size of the weights cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.sources import finite

# Entries converted to float64 at a time: 8 MB each of two tensors and their difference.
CHUNK = 2**20

# Indices of two checkpoints.
Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """Floating tensors with one shape over a run, tied ones once, and those that some checkpoint lacks."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def shared(checkpoints: Sequence[Checkpoint]) -> SharedWeights:
    """The floating tensors that all checkpoints have in one shape; InputError if there are none."""
    headers = [checkpoint.headers for checkpoint in checkpoints]
    floating = dict.fromkeys(
        name for of in headers for name, header in of.items() if header.dtype.is_floating_point
    )
    common = [
        name
        for name in floating
        if all(name in of and of[name].shape == headers[0][name].shape for of in headers)
    ]
    tied = [{name for matrix in c.matrices.values() for name in matrix.tied} for c in checkpoints]
    copies = set.intersection(*tied)
    names = tuple(name for name in common if name not in copies)
    if not names:
        refs = " and ".join((checkpoints[0].ref, checkpoints[-1].ref))
        raise InputError(f"{refs}: no tensor is in all {len(checkpoints)} checkpoints; are they of one run?")
    return SharedWeights(names=names, left_out=tuple(name for name in floating if name not in set(common)))


def pairs(count: int) -> list[Pair]:
    """The pairs of checkpoints that `path_rows` needs: with the first, the last and the two before."""
    last = count - 1
    needed = {(0, index) for index in range(1, count)} | {(index, last) for index in range(last)}
    needed |= {(index - back, index) for back in (1, 2) for index in range(back, count)}
    return sorted(needed)


def squared_distances(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[Pair, float]:
    """Squared distances of `pairs`, summed over tensors; InputError if weights are not finite."""
    squares = dict.fromkeys(pairs(len(checkpoints)), 0.0)
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names), name)
        held: tuple[int, Tensor] | None = None
        for pair in squares:
            first, second = (checkpoints[index] for index in pair)
            if first.source.location(name) == second.source.location(name):
                continue  # the tensor of one file, which an adapter leaves alone
            if held is None or held[0] != pair[0]:
                held = None  # freed before the next is read
                held = pair[0], first.tensor(name)
            distance = squared(held[1], second.tensor(name))
            if not math.isfinite(distance):
                for checkpoint in (first, second):
                    finite(checkpoint.ref, name, checkpoint.tensor(name))
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
