"""Overlap of the sparse masks of base and tuned beyond chance, and the magnitude that a mask keeps.

Masks are given by what they prune. Independent masks of sparsity s have a cosine of 1 − s, so that the cosine
of the paper (Jaiswal et al. 2023, arXiv:2306.03805) is to be read with `kappa`, which is ours.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

Levels: TypeAlias = Integer[np.ndarray, " entries"]
# Entries summed in float64 at a time.
CHUNK = 2**18


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two masks over the same entries, as counts of what base's mask, tuned's, and both prune."""

    entries: int = 0  # in the scope
    base: int = 0
    tuned: int = 0
    both: int = 0
    moved: float = 0.0  # squared norm of tuned − base
    moved_low: float = 0.0  # the same over the entries that base's mask prunes

    @property
    def cosine(self) -> float:
        """Cosine of the two keep-masks; independent ones have `cosine_chance`. NaN if one keeps nothing."""
        kept = (self.entries - self.base) * (self.entries - self.tuned)
        alike = self.entries - self.base - self.tuned + self.both
        return alike / math.sqrt(kept) if kept else math.nan

    @property
    def cosine_chance(self) -> float:
        """The cosine of independent masks: 1 − s."""
        kept = (self.entries - self.base) * (self.entries - self.tuned)
        return math.sqrt(kept) / self.entries if self.entries else math.nan

    @property
    def kappa(self) -> float:
        """Cosine beyond chance: 1 for equal masks, about 0 for independent ones; NaN if nothing is pruned."""
        chance = self.cosine_chance
        return (self.cosine - chance) / (1 - chance) if chance < 1 else math.nan

    @property
    def iou(self) -> float:
        """Share of the entries pruned by either that both prune; NaN if nothing is pruned."""
        either = self.base + self.tuned - self.both
        return self.both / either if either else math.nan

    @property
    def iou_chance(self) -> float:
        """The same of independent masks: s / (2 − s)."""
        both = self.base * self.tuned / self.entries if self.entries else 0.0
        either = self.base + self.tuned - both
        return both / either if either else math.nan

    @property
    def revived(self) -> float:
        """Share of the entries pruned by base's mask that tuned's keeps; by chance 1 − s."""
        return (self.base - self.both) / self.base if self.base else math.nan

    @property
    def delta_low(self) -> float:
        """Share of the squared change in entries that base's mask prunes; by chance s, NaN without change."""
        return self.moved_low / self.moved if self.moved else math.nan


class Overlaps:
    """Overlaps of the masks of base and tuned at several sparsities; a side's masks are nested."""

    def __init__(self, count: int):
        """Start without tensors, for a number of sparsities."""
        self._entries = np.zeros((count + 1, count + 1), np.int64)
        self._moved = np.zeros(count + 1)

    def add(self, base: Levels, tuned: Levels, squares: Float[Tensor, "*shape"]) -> None:
        """Count a tensor: how many masks keep each entry (`cut_levels`), and its (tuned − base)²."""
        count, flat = len(self._moved), squares.reshape(-1)
        for start in range(0, len(base), CHUNK):
            chunk = slice(start, start + CHUNK)
            row = base[chunk].astype(np.intp)
            self._moved += np.bincount(row, flat[chunk].cpu().numpy(), minlength=count)
            both = np.bincount(row * count + tuned[chunk], minlength=count * count)
            self._entries += both.reshape(count, count)

    def __iter__(self) -> Iterator[Overlap]:
        """The overlap at each sparsity."""
        both = self._entries.cumsum(axis=0).cumsum(axis=1)
        low = self._moved.cumsum()
        for level in range(len(low) - 1):
            yield Overlap(
                entries=int(both[-1, -1]), base=int(both[level, -1]), tuned=int(both[-1, level]),
                both=int(both[level, level]), moved=float(low[-1]), moved_low=float(low[level]),
            )  # fmt: skip


def squared_change(base: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """(tuned − base)² of each entry, in float32."""
    return (tuned.float() - base.float()).square_()


def sum_where(values: Float[Tensor, "*shape"], where: Bool[Tensor, "*shape"]) -> float:
    """Sum over the entries where `where` is true, in float64."""
    # In chunks: selecting the entries first takes several times as long.
    chunks = zip(values.reshape(-1).split(CHUNK), where.reshape(-1).split(CHUNK), strict=True)
    return sum(float(torch.dot(chunk.double(), mask.double())) for chunk, mask in chunks)


@dataclass(frozen=True, kw_only=True)
class Mass:
    """Magnitude that a mask keeps, and all there is: sums of |w| and of w²."""

    l1: float = 0.0
    l2: float = 0.0
    all_l1: float = 0.0
    all_l2: float = 0.0

    def __add__(self, other: "Mass") -> "Mass":
        first, second = asdict(self), asdict(other)
        return Mass(**{name: first[name] + second[name] for name in first})

    @property
    def kept_l1(self) -> float:
        """Share of Σ|w|; NaN where all weights are 0."""
        return self.l1 / self.all_l1 if self.all_l1 else math.nan

    @property
    def kept_l2(self) -> float:
        """Share of Σw²; NaN where all weights are 0."""
        return self.l2 / self.all_l2 if self.all_l2 else math.nan


def kept_mass(weights: Float[Tensor, "*shape"], pruned: Bool[Tensor, "*shape"]) -> Mass:
    """The magnitude that a mask keeps of one tensor."""
    size = weights.float().abs()
    all_l1, lost_l1 = float(size.sum(dtype=torch.float64)), sum_where(size, pruned)
    size.square_()
    all_l2, lost_l2 = float(size.sum(dtype=torch.float64)), sum_where(size, pruned)
    return Mass(l1=all_l1 - lost_l1, l2=all_l2 - lost_l2, all_l1=all_l1, all_l2=all_l2)
