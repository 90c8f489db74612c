"""What a checkpoint file holds, and how its tensors become (out, in) matrices.

`Header` describes a stored tensor; `Matrix` describes one two-dimensional weight inside it and knows how to
take it out of the stored tensor (`take`) and how to put it back (`put`). Analyses see only `Matrix`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probes.errors import InputError


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

    A stored tensor is read as: expert `expert` of a stack, its trailing axes flattened into one, then
    transposed if the file keeps (in, out), then the rows `start:stop` of each of `heads` equal groups.  For a
    plain matrix nothing of this applies.

    Attributes:
        name: the tensor's name in the file; a part adds `:q`, `:k`, `:v`, `:gate`, `:up` or `:<expert>`
            (a stacked and fused part adds both: `…:3:gate`).
        tensor: the stored tensor's name.
        layer: block index from 0; None outside the blocks.
        component: the field's name of the weight (`q_proj`, `down_proj`, `embed`…). A block's second
            attention or feed-forward has a prefix (`cross_q_proj`, `shared_up_proj`); what has no such name
            goes by its own (`kv_a_proj_with_mqa`).
        part: where in the model it stands; weight analyses read `block` unless told otherwise.
        rows, columns: out_features and in_features.
        dtype: of the stored tensor.
        expert: index in a stack of experts (or on an axis of length one); None if the tensor is no stack.
        experts: how many experts share the first axis of a stack whose experts have no axis of their own.
        transposed: the file keeps (in, out).
        start, stop, heads: the rows that a part has in each of `heads` equal groups; `stop` is None for all.
        tied: other tensors that the model overwrites with this one, and that are therefore not given.
        missing: config keys without which a fused tensor cannot be divided; it is then one matrix
            (`qkv_proj`, `gate_up_proj`), and this is empty for everything else.
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
    experts: int | None = None
    transposed: bool = False
    start: int = 0
    stop: int | None = None
    heads: int = 1
    tied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def take(self, stored: Tensor) -> Tensor:
        """The (rows, columns) matrix out of the stored tensor, a view wherever strides allow."""
        matrix = self._whole(stored)
        if self.stop is None:
            return matrix
        return matrix.unflatten(0, (self.heads, -1))[:, self.start : self.stop].flatten(0, 1)

    def put(self, stored: Tensor, matrix: Tensor) -> Tensor:
        """A copy of the stored tensor in which this matrix is replaced; dtype and shape stay."""
        if matrix.shape != (self.rows, self.columns):
            raise InputError(
                f"{self.name}: a tensor of shape {tuple(matrix.shape)} is put where "
                f"a {self.rows} x {self.columns} matrix stands"
            )
        # Contiguous, for in a strided copy the flattened axes would be a copy again, and the edit lost.
        changed = stored.clone(memory_format=torch.contiguous_format)
        view = self._whole(changed)
        if self.stop is None:
            view.copy_(matrix)
        else:
            grouped = view.unflatten(0, (self.heads, -1))
            grouped[:, self.start : self.stop] = matrix.unflatten(0, (self.heads, -1)).to(stored.dtype)
        return changed

    def _whole(self, stored: Tensor) -> Tensor:
        """(out, in) with all rows that this matrix's tensor, or its expert, has."""
        stack = stored if self.experts is None else stored.unflatten(0, (self.experts, -1))
        matrix = (stack if self.expert is None else stack[self.expert]).flatten(1)
        return matrix.mT if self.transposed else matrix
