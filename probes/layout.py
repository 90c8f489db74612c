"""What a checkpoint file holds, and how its tensors become (out, in) matrices.

`Header` describes a stored tensor; `Matrix` describes one two-dimensional weight inside it and knows how to
take it out of the stored tensor (`take`) and how to put it back (`put`). Analyses see only `Matrix`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Header:
    """Name, shape and dtype of a stored tensor, known without reading it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """Number of scalars."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.entries * self.dtype.itemsize


Part = Literal["block", "embedding", "head", "router", "other"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight as (out_features, in_features), wherever and however it is stored.

    A stored tensor is read as: expert `expert` of a stack (first axis), then transposed if the file keeps
    (in, out), then the rows `start:stop` of each of `heads` equal groups.  For a plain matrix nothing of this
    applies.

    Attributes:
        name: the tensor's name in the file; a part adds `:q`, `:k`, `:v`, `:gate`, `:up` or `:<expert>`
            (a stacked and fused part adds both: `…:3:gate`).
        tensor: the stored tensor's name.
        layer: block index from 0; None outside the blocks.
        component: the field's name of the weight (`q_proj`, `down_proj`, `embed`…).
        part: where in the model it stands; weight analyses read `block` unless told otherwise.
        rows, columns: out_features and in_features.
    """

    name: str
    tensor: str
    layer: int | None
    component: str
    part: Part
    rows: int
    columns: int
    dtype: torch.dtype
    expert: int | None = None
    transposed: bool = False
    start: int = 0
    stop: int | None = None
    heads: int = 1
    interleave: int = 1
    tied: tuple[str, ...] = ()

    def take(self, stored: Tensor) -> Tensor:
        """The (rows, columns) matrix out of the stored tensor, a view wherever strides allow."""
        matrix = stored if self.expert is None else stored[self.expert]
        if self.transposed:
            matrix = matrix.mT
        matrix = matrix.flatten(1)  # convolutions: (out, rest)
        if self.stop is None:
            return matrix
        if self.interleave > 1:
            return matrix[self.start :: self.interleave]
        grouped = matrix.unflatten(0, (self.heads, -1))
        return grouped[:, self.start : self.stop].flatten(0, 1)

    def put(self, stored: Tensor, matrix: Tensor) -> Tensor:
        """A copy of the stored tensor in which this matrix is replaced; dtype and layout stay."""
        changed = stored.clone()
        view = changed if self.expert is None else changed[self.expert]
        if self.transposed:
            view = view.mT
        value = matrix.to(stored.dtype)
        if self.stop is None:
            view.copy_(value.reshape(view.shape))
        elif self.interleave > 1:
            view[self.start :: self.interleave] = value
        else:
            grouped = view.unflatten(0, (self.heads, -1))
            grouped[:, self.start : self.stop] = value.unflatten(0, (self.heads, -1))
        return changed
