"""Distances between the weights of a run's checkpoints, two tensors in memory at a time.

Angles follow from distances alone: 2⟨a − b, c − d⟩ = |a − d|² + |b − c|² − |a − c|² − |b − d|². So no third
tensor need be held to compare a step with the whole way, and nothing of the size of the weights cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.sources import finite

# Entries that are widened to float64 at a time: 8 MB each of two tensors and their difference.
CHUNK = 2**20

Places: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """What all checkpoints of a run hold alike.

    Attributes:
        names: floating tensors of one shape in all of them, a tied one once.
        left_out: floating tensors that some lack, or hold in another shape.
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def shared(checkpoints: Sequence[Checkpoint]) -> SharedWeights:
    """The tensors whose distances can be told.

    Raises:
        InputError: there are none.
    """
    first = checkpoints[0].headers
    floating = {
        name: None
        for checkpoint in checkpoints
        for name, header in checkpoint.headers.items()
        if header.dtype.is_floating_point
    }
    common = [
        name
        for name in floating
        if all(name in one.headers and one.headers[name].shape == first[name].shape for one in checkpoints)
    ]
    copies = set.intersection(
        *({name for matrix in one.matrices.values() for name in matrix.tied} for one in checkpoints)
    )
    names = tuple(name for name in common if name not in copies)
    if not names:
        refs = " and ".join((checkpoints[0].ref, checkpoints[-1].ref))
        raise InputError(f"{refs}: no tensor is in all {len(checkpoints)} checkpoints; are they of one run?")
    return SharedWeights(names=names, left_out=tuple(name for name in floating if name not in set(common)))


def pairs(count: int) -> list[Places]:
    """The pairs whose distances tell a path: with the first, the last and the two before."""
    last = count - 1
    wanted = {(0, place) for place in range(1, count)} | {(place, last) for place in range(last)}
    wanted |= {(place - back, place) for back in (1, 2) for place in range(back, count)}
    return sorted(wanted)


def squared_distances(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[Places, float]:
    """Squared distances over all these tensors, of `pairs`.

    Raises:
        InputError: weights that are NaN or infinite.
    """
    found = dict.fromkeys(pairs(len(checkpoints)), 0.0)
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names), name)
        held: tuple[int, Tensor] | None = None
        for one, other in found:
            places = (checkpoints[one].source.location(name), checkpoints[other].source.location(name))
            if places[0] == places[1]:  # one file's tensor, which an adapter leaves alone
                continue
            if held is None or held[0] != one:
                held = None  # before the next is read
                held = one, checkpoints[one].tensor(name)
            apart = squared(held[1], checkpoints[other].tensor(name))
            if not math.isfinite(apart):
                for place in (one, other):
                    finite(checkpoints[place].ref, name, checkpoints[place].tensor(name))
            found[one, other] += apart
    return found


def squared(first: Tensor, second: Tensor) -> float:
    """The squared distance of two tensors of one shape, summed in float64."""
    total = 0.0
    for one, other in zip(first.reshape(-1).split(CHUNK), second.reshape(-1).split(CHUNK), strict=True):
        apart = one.double() - other.double()
        total += float(apart @ apart)
    return total


def path_rows(squares: dict[Places, float], count: int) -> list[dict[str, float]]:
    """Of each checkpoint: the step that led to it, and where it lies.

    Columns: `length` of the step; `angle` of the step to the whole way and `turn` against the step before it,
    in degrees; `distance_start` and `distance_end`. NaN where there is no step, or no way to turn from.
    """
    last = count - 1

    def apart(one: int, other: int) -> float:
        return 0.0 if one == other else squares[min(one, other), max(one, other)]

    def angle(step: Places, way: Places) -> float:
        (a, b), (c, d) = step, way
        product = (apart(b, c) + apart(a, d) - apart(b, d) - apart(a, c)) / 2
        size = math.sqrt(apart(a, b) * apart(c, d))
        return math.degrees(math.acos(max(-1.0, min(1.0, product / size)))) if size > 0 else math.nan

    rows = []
    for place in range(count):
        step = (place - 1, place)
        rows.append(
            {
                "length": math.sqrt(apart(*step)) if place else math.nan,
                "angle": angle(step, (0, last)) if place else math.nan,
                "turn": angle(step, (place - 2, place - 1)) if place > 1 else math.nan,
                "distance_start": math.sqrt(apart(0, place)),
                "distance_end": math.sqrt(apart(place, last)),
            }
        )
    return rows


def inefficiency(rows: Sequence[dict[str, float]]) -> float:
    """Length of the way over the distance between its ends; 1 on a straight line, NaN if the ends are one."""
    whole = rows[-1]["distance_start"]
    return math.fsum(row["length"] for row in rows[1:]) / whole if whole > 0 else math.nan
