"""How alike the sparse masks of base and tuned are, beyond chance, and how much magnitude a mask keeps.

Masks are given as what they prune. Independent masks of sparsity s already have a cosine of 1 − s, so that
the cosine of the paper (Jaiswal et al. 2023, arXiv:2306.03805) is never read without `kappa`, which is ours.
"""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Entries that are summed together in float64.
CHUNK = 2**18


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two masks over the same entries, as counts.

    Attributes:
        entries: in the scope.
        base, tuned, both: pruned by one mask, by the other, by both.
        moved: squared norm of tuned − base over all entries.
        moved_low: over those that the base's mask prunes.
    """

    entries: int = 0
    base: int = 0
    tuned: int = 0
    both: int = 0
    moved: float = 0.0
    moved_low: float = 0.0

    def __add__(self, other: "Overlap") -> "Overlap":
        own, more = asdict(self), asdict(other)
        return Overlap(**{name: own[name] + more[name] for name in own})

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
        """Cosine beyond chance: 1 for one mask, about 0 for independent ones; NaN where nothing is pruned."""
        chance = self.cosine_chance
        return (self.cosine - chance) / (1 - chance) if chance < 1 else math.nan

    @property
    def iou(self) -> float:
        """Of what either prunes, the share that both do; NaN where nothing is pruned."""
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
        """Of what the base's mask prunes, the share that the tuned one keeps; by chance 1 − s."""
        return (self.base - self.both) / self.base if self.base else math.nan

    @property
    def delta_low(self) -> float:
        """Share of the squared change that lies in what the base's mask prunes.

        By chance s; NaN where nothing changed.
        """
        return self.moved_low / self.moved if self.moved else math.nan


def overlap(base: Bool[Tensor, "*shape"], tuned: Bool[Tensor, "*shape"]) -> Overlap:
    """The overlap of what two masks prune in one tensor."""
    counts = {"base": base, "tuned": tuned, "both": base & tuned}
    return Overlap(entries=base.numel(), **{name: int(mask.count_nonzero()) for name, mask in counts.items()})


def squared_change(base: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """(tuned − base)² entry by entry, in float32."""
    return (tuned.float() - base.float()).square_()


def within(values: Float[Tensor, "*shape"], where: Bool[Tensor, "*shape"]) -> float:
    """Sum over the entries where it is true, in float64."""
    # A part at a time: picking the entries out first takes several times as long.
    parts = zip(values.reshape(-1).split(CHUNK), where.reshape(-1).split(CHUNK), strict=True)
    return sum(float(torch.dot(some.double(), here.double())) for some, here in parts)


@dataclass(frozen=True, kw_only=True)
class Mass:
    """Magnitude that a mask keeps, of all there is: sums of |w| and of w².

    Unstructured masks keep the most at a given sparsity, and N:M the more the larger M is.
    """

    l1: float = 0.0
    l2: float = 0.0
    all_l1: float = 0.0
    all_l2: float = 0.0

    def __add__(self, other: "Mass") -> "Mass":
        own, more = asdict(self), asdict(other)
        return Mass(**{name: own[name] + more[name] for name in own})

    @property
    def kept_l1(self) -> float:
        """Share of Σ|w|; NaN where all weights are 0."""
        return self.l1 / self.all_l1 if self.all_l1 else math.nan

    @property
    def kept_l2(self) -> float:
        """Share of Σw²; NaN where all weights are 0."""
        return self.l2 / self.all_l2 if self.all_l2 else math.nan


def mass(weights: Float[Tensor, "*shape"], pruned: Bool[Tensor, "*shape"]) -> Mass:
    """The magnitude that a mask keeps of one tensor."""
    size = weights.float().abs()
    all_l1, lost_l1 = float(size.sum(dtype=torch.float64)), within(size, pruned)
    size.square_()
    all_l2, lost_l2 = float(size.sum(dtype=torch.float64)), within(size, pruned)
    return Mass(l1=all_l1 - lost_l1, l2=all_l2 - lost_l2, all_l1=all_l1, all_l2=all_l2)
