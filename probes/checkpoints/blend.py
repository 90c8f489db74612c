"""Interpolated weights: base + α (tuned − base), written tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.pair import CheckpointPair
from probes.checkpoints.save import write_checkpoint
from probes.files.layout import Header
from probes.naming.align import align
from probes.progress import Progress

# Entries that are widened to float64 together.
CHUNK = 2**18


@dataclass(frozen=True)
class Blend:
    """Squared Frobenius norms of tuned − base where they differ; tensors that base lacks, left unchanged."""

    squares: dict[str, float] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)


def write_blend(
    pair: CheckpointPair, out: str | Path, alpha: float, *, progress: Progress | None = None
) -> Blend:
    """Write base + α (tuned − base) of every tensor as full weights, under the names and dtypes of tuned.

    0 gives the base's values, 1 the tuned ones, both bit for bit where the dtypes agree.

    Raises:
        InputError: `out` is occupied or cannot be written, or weights are not finite.
    """
    done = Blend()
    blender = Blender(pair)

    def change(name: str, stored: Tensor) -> Tensor:
        value, square = blender.between(name, stored, alpha)
        if square is None:
            done.alone.append(name)
        elif square:
            done.squares[name] = square
        return value

    write_checkpoint(pair.tuned, out, change, progress=progress)
    return done


class Blender:
    """Blends the tensors of a pair one at a time, under the names of tuned."""

    def __init__(self, pair: CheckpointPair):
        self.pair = pair
        aligned = align(pair.base.headers, pair.tuned.headers)[0]
        self._aligned = {theirs: ours for ours, theirs in aligned.items()}
        self._matrices: dict[str, list[str]] = {}
        for name in pair.matrices:
            self._matrices.setdefault(pair.counterpart(name).tensor, []).append(name)

    def between(self, name: str, stored: Tensor, alpha: float) -> tuple[Tensor, float | None]:
        """base + α (tuned − base) of one tensor of tuned, and the squared Frobenius norm of tuned − base.

        A tensor that tuning left unchanged is returned; the norm is None for one that the base lacks.
        """
        pair, square = self.pair, 0.0
        if not stored.is_floating_point():
            return stored, 0.0
        if not self.has_base(name, stored.shape):
            return stored, None
        value = unrounded(pair.tuned, name, stored)
        if ours := self._ours(name, stored.shape):
            value, square = between(pair.base.tensor(ours.name), value, alpha)
        else:  # stored differently, or a resized vocabulary: matrix by matrix, as far as they go
            for other in self._matrices[name]:
                matrix, rows = pair.counterpart(other), pair.matrices[other].rows
                blended = matrix.take(value).clone()
                blended[:rows], part = between(pair.base.matrix(other)[:rows], blended[:rows], alpha)
                value, square = matrix.put(value, blended), square + part
        return (value if square else stored), square

    def _ours(self, name: str, shape: tuple[int, ...]) -> Header | None:
        """The base's tensor for one of tuned, if it has the same shape."""
        ours = self.pair.base.headers.get(self._aligned.get(name, ""))
        return ours if ours is not None and ours.shape == shape else None

    def has_base(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether base has all or some entries of a tensor of tuned."""
        return self._ours(name, shape) is not None or name in self._matrices

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that holds both sides of every floating tensor of tuned that base has too."""
        dtypes = {}
        for name, header in self.pair.tuned.headers.items():
            if header.dtype.is_floating_point and self.has_base(name, header.shape):
                ours = self._ours(name, header.shape)
                sides = [ours.dtype] if ours else map(self._matrix_dtype, self._matrices[name])
                dtypes[name] = reduce(torch.promote_types, sides, header.dtype)
        return dtypes

    def _matrix_dtype(self, name: str) -> torch.dtype:
        """The dtype that the base stores a matrix in."""
        return self.pair.base.headers[self.pair.base.matrices[name].tensor].dtype

    def base_of(self, name: str, stored: Tensor) -> Tensor | None:
        """The base's values of a tensor of tuned, uncomputed; None if base has none.

        In a resized vocabulary the rows that base lacks are those of `stored`, which is tuned's.
        """
        pair = self.pair
        if ours := self._ours(name, stored.shape):
            return pair.base.tensor(ours.name).to(ours.dtype)
        if name not in self._matrices:
            return None
        value = stored
        for other in self._matrices[name]:  # stored differently, or a resized vocabulary
            matrix, rows = pair.counterpart(other), pair.matrices[other].rows
            base = pair.base.matrix(other)[:rows].to(self._matrix_dtype(other))
            value = value.to(torch.promote_types(value.dtype, base.dtype))
            blended = matrix.take(value).clone()
            blended[:rows] = base
            value = matrix.put(value, blended)
        return value


def unrounded(checkpoint: Checkpoint, name: str, stored: Tensor) -> Tensor:
    """A tensor in a dtype wide enough that only writing it rounds."""
    return stored if stored.dtype == checkpoint.headers[name].dtype else stored.double()


def between(base: Tensor, tuned: Tensor, alpha: float) -> tuple[Tensor, float]:
    """base + α (tuned − base), and the squared Frobenius norm of tuned − base.

    Computed in float64 and rounded once to the dtype of `tuned`; equal tensors are returned unchanged.
    """
    if base.dtype == tuned.dtype and torch.equal(base, tuned):
        return tuned, 0.0
    value = tuned if alpha == 1 else torch.empty_like(tuned, memory_format=torch.contiguous_format)
    square = torch.zeros((), dtype=torch.float64, device=tuned.device)
    for ours, theirs, new in _parts(base, tuned, value):
        delta = theirs.double() - ours.double()
        square += delta.square().sum()
        if value is not tuned:
            new.copy_(ours.double() + alpha * delta)
    return value, float(square)


def _parts(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in parts, so that no float64 copy of a complete tensor exists."""
    if all(side.is_contiguous() for side in sides):
        return zip(*(side.view(-1).split(CHUNK) for side in sides), strict=True)
    rows = max(1, CHUNK // max(1, sides[0][0].numel()))
    return zip(*(side.split(rows) for side in sides), strict=True)
