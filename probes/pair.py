"""Two checkpoints side by side: which matrices are the same weight, and what does not align."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probes.checkpoint import open_checkpoint
from probes.layout import Matrix
from probes.sources import raw

if TYPE_CHECKING:
    from probes.adapters import LowRank


@dataclass(frozen=True)
class Unmatched:
    """A tensor that has no counterpart, or one of another shape."""

    tensor: str
    reason: str
    base_shape: tuple[int, ...] | None
    tuned_shape: tuple[int, ...] | None


def finite(checkpoint: str, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ValueError: names the checkpoint, the tensor, how many and where the first is.
    """
    # A sum is not finite if an entry is not; it may also overflow, so that only then each entry is looked at.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32 if tensor.is_floating_point() else None))):
        return
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count:
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{checkpoint}: {name} holds {count} NaN or infinite values, the first at {first}; "
            "this checkpoint is damaged or its training diverged"
        )


class CheckpointPair:
    """Base and tuned, aligned.

    Attributes:
        base, tuned: the checkpoints.
        matrices: what both have, as the base names it, by layer.
        unmatched: every tensor that does not align, and why.
        resized: vocabulary matrices of unequal length, as (base rows, tuned rows); they keep the common rows.
    """

    def __init__(self, base: Any, tuned: Any):
        self.base = open_checkpoint(base)
        self.tuned = open_checkpoint(tuned, base=self.base)
        self.unmatched: list[Unmatched] = []
        self.resized: dict[str, tuple[int, int]] = {}

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """What both have, by layer and then as in the file."""
        theirs = self.tuned.matrices
        common = [
            m
            for name, m in self.base.matrices.items()
            if name in theirs and (theirs[name].rows, theirs[name].columns) == (m.rows, m.columns)
        ]
        common.sort(key=lambda m: (m.layer is not None, m.layer or 0))
        return {m.name: m for m in common}

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A matrix of base and tuned as (out, in)."""
        base, tuned = self.base.matrix(name), self.tuned.matrix(name)
        finite(self.base.ref, name, base)
        finite(self.tuned.ref, name, tuned)
        return base, tuned

    def identical(self, name: str) -> bool:
        """Whether tuning left a matrix bit for bit as it was."""
        base, tuned = self.base.matrix(name), self.tuned.matrix(name)
        return base.dtype == tuned.dtype and raw(base) == raw(tuned)

    def delta(self, name: str) -> "LowRank | None":
        """What an adapter adds to a matrix, as factors."""
        return self.tuned.delta(name)
