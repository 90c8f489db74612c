"""Stored tensors, and the (out, in) matrices in them. Analyses see only the matrices."""

import math
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
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.entries * self.dtype.itemsize


Part = Literal["block", "embedding", "head", "router", "other"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight as (out_features, in_features), wherever and however it is stored.

    Of a stored tensor it takes expert `expert` of a stack, flattens the trailing axes into one, transposes if
    the file keeps (in, out), then takes the rows `start:stop` of each of `heads` equal groups. None of this
    applies to a plain matrix.

    Attributes:
        name: the tensor's name in the file; a part adds `:q`, `:k`, `:v`, `:gate`, `:up` or `:<expert>`
            (a stacked and fused part adds both: `…:3:gate`).
        tensor: the stored tensor's name.
        layer: block index from 0; None outside the blocks.
        component: the field's name of the weight (`q_proj`, `down_proj`, `embed`…), or its own
            (`kv_a_proj_with_mqa`). A block's second attention or feed-forward has a prefix (`cross_q_proj`,
            `shared_up_proj`).
        part: of the model; weight analyses read `block` by default.
        rows, columns: out_features and in_features.
        dtype: of the stored tensor.
        expert: index in a stack of experts (or on an axis of length one); None if the tensor is no stack.
        experts: how many experts share the first axis of a stack whose experts have no axis of their own.
        transposed: the file keeps (in, out).
        start, stop, heads: the rows that a part has in each of `heads` equal groups; `stop` is None for all.
        tied: other tensors that the model overwrites with this one; they are not matrices of their own.
        missing: config keys without which a fused tensor cannot be divided and stays one matrix
            (`qkv_proj`, `gate_up_proj`); else empty.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_checkpoint
    >>> matrix = open_checkpoint(BUNDLED / "base").matrices["model.layers.2.mlp.down_proj.weight"]
    >>> matrix.layer, matrix.component, matrix.rows, matrix.columns
    (2, 'down_proj', 128, 352)
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
        matrix = self._undivided(stored)
        return matrix if self.stop is None else self._rows(matrix).flatten(0, 1)

    def put(self, stored: Tensor, matrix: Tensor) -> Tensor:
        """A copy of the stored tensor in which this matrix is replaced; dtype and shape stay."""
        if matrix.shape != (self.rows, self.columns):
            raise InputError(
                f"{self.name}: is {self.rows} x {self.columns}, and a tensor of shape {tuple(matrix.shape)} "
                "cannot replace it"
            )
        # Contiguous, for in a strided copy the flattened axes would be a copy again, and the edit lost.
        changed = stored.clone(memory_format=torch.contiguous_format)
        view = self._undivided(changed)
        if self.stop is None:
            view.copy_(matrix)
        else:
            self._rows(view).copy_(matrix.unflatten(0, (self.heads, -1)))
        return changed

    def _rows(self, undivided: Tensor) -> Tensor:
        return undivided.unflatten(0, (self.heads, -1))[:, self.start : self.stop]

    def _undivided(self, stored: Tensor) -> Tensor:
        """The undivided (out, in) matrix of the tensor or of the expert."""
        stack = stored if self.experts is None else stored.unflatten(0, (self.experts, -1))
        matrix = (stack if self.expert is None else stack[self.expert]).flatten(1)
        return matrix.mT if self.transposed else matrix
