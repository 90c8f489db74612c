"""Weights between base and tuned: base + α (tuned − base), written tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from probes.align import align
from probes.checkpoint import Checkpoint
from probes.pair import CheckpointPair
from probes.save import write_checkpoint


@dataclass(frozen=True)
class Blend:
    """What a blend was made of.

    Attributes:
        squares: squared Frobenius norm of tuned − base of each tensor that differs, by its name in tuned.
        alone: tensors of tuned that the base lacks; they were written as they are.
    """

    squares: dict[str, float] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)


def write_blend(
    pair: CheckpointPair,
    out: str | Path,
    alpha: float,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Blend:
    """Write base + α (tuned − base) of every tensor as full weights, under the names and dtypes of tuned.

    0 gives the base's values, 1 the tuned ones, both bit for bit where the dtypes agree.

    Raises:
        ValueError: `out` is occupied or cannot be written, or weights are not finite.
    """
    done = Blend()
    base, tuned = pair.base, pair.tuned
    aligned = {theirs: ours for ours, theirs in align(base.headers, tuned.headers)[0].items()}

    def change(name: str, stored: Tensor) -> Tensor:
        ours = base.headers.get(aligned.get(name, ""))
        if not stored.is_floating_point():
            return stored
        value, square = unrounded(tuned, name, stored), 0.0
        if ours is not None and ours.shape == stored.shape:
            value, square = between(base.tensor(ours.name), value, alpha)
        else:  # stored differently, or a resized vocabulary: matrix by matrix, as far as they go
            common = [other for other in pair.matrices if pair.counterpart(other).tensor == name]
            if not common:
                done.alone.append(name)
            for other in common:
                matrix, rows = pair.counterpart(other), pair.matrices[other].rows
                blended = matrix.take(value).clone()
                blended[:rows], part = between(base.matrix(other)[:rows], blended[:rows], alpha)
                value, square = matrix.put(value, blended), square + part
        if square:
            done.squares[name] = square
        return value if square else stored

    write_checkpoint(tuned, out, change, progress=progress)
    return done


def unrounded(checkpoint: Checkpoint, name: str, stored: Tensor) -> Tensor:
    """A tensor wide enough that only writing it rounds: merged weights are wider than their file's dtype."""
    return stored if stored.dtype == checkpoint.headers[name].dtype else stored.double()


def between(base: Tensor, tuned: Tensor, alpha: float) -> tuple[Tensor, float]:
    """base + α (tuned − base), and the squared Frobenius norm of tuned − base.

    Computed in float64 and rounded once to the dtype of `tuned`; equal tensors are given back as they are.
    """
    same = base.dtype == tuned.dtype and torch.equal(base, tuned)
    value = tuned if same or alpha == 1 else torch.empty(tuned.shape, dtype=tuned.dtype)
    if same:
        return tuned, 0.0
    square = 0.0
    # A part at a time, so that no float64 copy of a whole embedding exists.
    sides = (side.split(4096) if side.ndim else (side,) for side in (base, tuned, value))
    for ours, theirs, new in zip(*sides, strict=True):
        delta = theirs.double() - ours.double()
        square += float(delta.square().sum())
        if value is not tuned:
            new.copy_(ours.double() + alpha * delta)
    return value, square
