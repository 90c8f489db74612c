"""Interpolated weights: base + α (tuned − base), written tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.pair import CheckpointPair
from probes.checkpoints.rounding import settled
from probes.checkpoints.save import write_checkpoint
from probes.errors import NotApplicableError
from probes.files.layout import Header
from probes.progress import Progress

# Of a tensor in the files of base and tuned.
Dtypes: TypeAlias = tuple[torch.dtype, torch.dtype]
# From entries of base and of tuned, and their dtypes, to the new entries.
Change: TypeAlias = Callable[[Tensor, Tensor, Dtypes], Tensor]

# Entries that are widened to float64 together.
CHUNK = 2**18


@dataclass(frozen=True)
class Blend:
    """Squared Frobenius norms of tuned − base where they differ; tensors that base lacks, left unchanged.

    Attributes:
        rounded: squared norms of what the dtype of the file rounds off an adapter's merged weights.
    """

    squares: dict[str, float] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    rounded: dict[str, float] = field(default_factory=dict)


def write_blend(
    pair: CheckpointPair, out: str | Path, alpha: float, *, progress: Progress | None = None
) -> Blend:
    """Write base + α (tuned − base) of every tensor as full weights, under the names of tuned.

    0 gives the base's values, 1 the tuned ones, both exactly: at 1 the dtypes are tuned's, elsewhere those
    that hold both sides.

    Raises:
        InputError: `out` is occupied or cannot be written, or weights are not finite.
        NotApplicableError: no model lies between the two.
    """
    done = Blend()
    blender = Blender(pair)
    headers = pair.tuned.headers
    wider = {name: dtype for name, dtype in blender.dtypes.items() if dtype != headers[name].dtype}
    dtypes = wider if alpha != 1 else {}

    def change(name: str, stored: Tensor) -> Tensor:
        if name in dtypes:
            stored = stored.to(torch.promote_types(stored.dtype, dtypes[name]))
        value, square = blender.between(name, stored, alpha)
        if square is None:
            done.alone.append(name)
        elif square:
            done.squares[name] = square
            dtype = dtypes.get(name, headers[name].dtype)
            if pair.tuned.kind == "adapter" and dtype.itemsize < value.dtype.itemsize:
                done.rounded[name] = float((value - value.to(dtype)).double().square().sum())
        return value

    write_checkpoint(pair.tuned, out, change, dtypes=dtypes, progress=progress)
    return done


class Blender:
    """Blends the tensors of a pair one at a time, under the names of tuned.

    Raises:
        NotApplicableError: no model lies between the two.
    """

    def __init__(self, pair: CheckpointPair):
        if problem := pair.between_problem():
            raise NotApplicableError(problem)
        self.pair = pair
        self._matrices: dict[str, list[str]] = {}
        for name in pair.matrices:
            self._matrices.setdefault(pair.counterpart(name).tensor, []).append(name)

    def between(self, name: str, stored: Tensor, alpha: float) -> tuple[Tensor, float | None]:
        """base + α (tuned − base) of one tensor of tuned, and the squared Frobenius norm of tuned − base.

        A tensor that equals base's is returned itself; the norm is None for one that the base lacks. Entries
        that only a dtype rounded add nothing to the norm.
        """
        if not stored.is_floating_point():
            return stored, 0.0
        if not self.has_base(name, stored.shape):
            return stored, None
        squares, changed = [], []

        def blend(base: Tensor, tuned: Tensor, dtypes: Dtypes) -> Tensor:
            value, square = between(base, tuned, alpha, dtypes)
            squares.append(square)
            changed.append(value is not tuned)
            return value

        value = self._mapped(name, unrounded(self.pair.tuned, name, stored), blend)
        return value if any(changed) or any(squares) else stored, sum(squares)

    def settled(self, name: str, stored: Tensor) -> Tensor:
        """A tensor of tuned with base's value in each entry that only a dtype rounded."""
        if not self.has_base(name, stored.shape):
            return stored
        return self._mapped(name, stored, lambda base, tuned, dtypes: settled(base, tuned, dtypes=dtypes))

    def base_of(self, name: str, stored: Tensor) -> Tensor | None:
        """The base's values of a tensor of tuned, uncomputed; None if base has none.

        In a resized vocabulary the rows that base lacks are those of `stored`, which is tuned's.
        """
        if not self.has_base(name, stored.shape):
            return None
        return self._mapped(name, stored, lambda base, tuned, dtypes: base.to(dtypes[0]))

    def _mapped(self, name: str, stored: Tensor, change: Change) -> Tensor:
        """A tensor of tuned with what `change` makes of the entries that base has too."""
        pair, of_tuned = self.pair, self.pair.tuned.headers[name].dtype
        if ours := self._ours(name, stored.shape):
            return change(pair.base.tensor(ours.name), stored, (ours.dtype, of_tuned))
        if rows := pair.common_rows(name):
            ours = pair.base.headers[pair.tensors[name]]
            part = change(pair.base.tensor(ours.name)[:rows], stored[:rows], (ours.dtype, of_tuned))
            return torch.cat([part, stored[rows:].to(part.dtype)])
        value = stored
        for other in self._matrices[name]:  # stored differently
            matrix, rows = pair.counterpart(other), pair.matrices[other].rows
            entries = matrix.take(stored).clone()
            part = change(
                pair.base.matrix(other)[:rows], entries[:rows], (self._matrix_dtype(other), of_tuned)
            )
            value = value.to(torch.promote_types(value.dtype, part.dtype))
            entries = entries.to(value.dtype)
            entries[:rows] = part
            value = matrix.put(value, entries)
        return value

    def _ours(self, name: str, shape: tuple[int, ...]) -> Header | None:
        """The base's tensor for one of tuned, if it has the same shape."""
        ours = self.pair.base.headers.get(self.pair.tensors.get(name, ""))
        return ours if ours is not None and ours.shape == shape else None

    def has_base(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether base has all or some entries of a tensor of tuned."""
        return (
            self._ours(name, shape) is not None or bool(self.pair.common_rows(name)) or name in self._matrices
        )

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that holds both sides of every floating tensor of tuned that base has too."""
        dtypes = {}
        for name, header in self.pair.tuned.headers.items():
            if header.dtype.is_floating_point and self.has_base(name, header.shape):
                ours = self.pair.base.headers.get(self.pair.tensors.get(name, ""))
                sides = [ours.dtype] if ours else map(self._matrix_dtype, self._matrices[name])
                dtypes[name] = reduce(torch.promote_types, sides, header.dtype)
        return dtypes

    def _matrix_dtype(self, name: str) -> torch.dtype:
        """The dtype that the base stores a matrix in."""
        return self.pair.base.headers[self.pair.base.matrices[name].tensor].dtype


def unrounded(checkpoint: Checkpoint, name: str, stored: Tensor) -> Tensor:
    """A tensor in a dtype wide enough that only writing it rounds."""
    return stored if stored.dtype == checkpoint.headers[name].dtype else stored.double()


def between(base: Tensor, tuned: Tensor, alpha: float, dtypes: Dtypes | None = None) -> tuple[Tensor, float]:
    """base + α (tuned − base), and the squared Frobenius norm of tuned − base.

    Computed in float64 and rounded once to the dtype of `tuned`; equal tensors are returned unchanged. The
    norm is of the entries that changed, by the dtypes of both files (by default those of the tensors).
    """
    if base.dtype == tuned.dtype and torch.equal(base, tuned):
        return tuned, 0.0
    value = tuned if alpha == 1 else torch.empty_like(tuned, memory_format=torch.contiguous_format)
    square = torch.zeros((), dtype=torch.float64, device=tuned.device)
    changed = settled(base, tuned, dtypes=dtypes)
    for ours, theirs, moved, new in _parts(base, tuned, changed, value):
        delta = moved.double() - ours.double()
        square += delta.square().sum()
        if value is not tuned:
            if changed is not tuned:
                delta = theirs.double() - ours.double()
            new.copy_(ours.double() + alpha * delta)
    return value, float(square)


def _parts(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in parts, so that no float64 copy of a complete tensor exists."""
    if all(side.is_contiguous() for side in sides):
        return zip(*(side.view(-1).split(CHUNK) for side in sides), strict=True)
    rows = max(1, CHUNK // max(1, sides[0][0].numel()))
    return zip(*(side.split(rows) for side in sides), strict=True)
