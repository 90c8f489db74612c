"""Movement, |tuned − base| of every entry, and the entries that moved furthest.

Tensors are read one at a time. Entries have a total order: |tuned − base| descending, then tensor name, then
index; a smaller selection lies within a larger one.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.region import Region
from probes.checkpoints.prune import CHUNK, PATTERNS, RankSearch, number
from probes.errors import InputError
from probes.files.sources import same_bytes

# Name -> tensor of base and of tuned, of one shape; read-only.
Read = Callable[[str], tuple[Tensor, Tensor]]


def delta(base: Tensor, tuned: Tensor) -> Float[Tensor, " entries"]:
    """tuned − base, flattened, in float32, or in float64 where one side is."""
    # Half precision would round the difference, and make many more entries equal.
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    return tuned.reshape(-1).to(wide) - base.reshape(-1).to(wide)


def kth_largest(values: Float[Tensor, " entries"], k: int) -> float:
    """The k-th largest value, counted from 1."""
    # numpy selects in one copy; torch.topk also holds an index for every entry.
    array = values.detach().cpu().numpy()
    return float(np.partition(array, len(array) - k)[len(array) - k])


class Movement:
    """The movement of some tensors of a pair."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Read):
        """Read every tensor once."""
        self._read = read
        self.entries: dict[str, int] = {}  # size of each tensor that differs in at least one bit
        self.moved: dict[str, int] = {}  # how many of its entries have another value
        self.frozen: list[str] = []  # tensors that are equal in both
        self.squares = 0.0  # sum of squared movement
        self._dtype = torch.float32
        for name in sorted(shapes):
            base, tuned = read(name)
            assert base.shape == tuned.shape == torch.Size(shapes[name]), name
            if base.dtype == tuned.dtype and same_bytes(base, tuned):
                self.frozen.append(name)
                continue
            self.entries[name], self.moved[name] = base.numel(), 0
            for D in self._chunks(base, tuned):
                if not D.isfinite().all():
                    raise InputError(f"{name}: holds NaN or infinite weights, which have no movement")
                self._dtype = torch.promote_types(self._dtype, D.dtype)
                self.moved[name] += int(D.count_nonzero())
                self.squares += float(D.double().square().sum())

    @property
    def total(self) -> int:
        """N: size of all tensors that differ."""
        return sum(self.entries.values())

    @property
    def total_moved(self) -> int:
        """Entries whose value differs."""
        return sum(self.moved.values())

    def largest(self, count: int) -> Region:
        """The `count` entries that moved furthest; entries that did not move come last."""
        if not 0 <= count <= self.total:
            raise InputError(f"{count} entries are asked for; there are {self.total}")
        if not count:
            return {}
        threshold = self._threshold(count)
        largest: dict[str, Tensor] = {}
        ties: dict[str, Tensor] = {}
        for name in self.entries:
            largest[name] = self._where(name, lambda moved: moved > threshold)
            if region.size(ties) < count:
                ties[name] = self._where(name, lambda moved: moved == threshold)
        missing = count - region.size(largest)
        for name, index in ties.items():
            largest[name] = torch.cat([largest[name], index[:missing]]).sort().values
            missing -= min(missing, len(index))
        return {name: index for name, index in sorted(largest.items()) if len(index)}

    def random(self, pattern: Region, seed: int) -> Region:
        """As many random entries of each tensor as a region has there, among those that moved.

        Entries that did not move are drawn only where too few moved.
        """
        drawn = {}
        for name, index in pattern.items():
            if not len(index):
                continue
            moved = self._where(name, lambda moved: moved > 0)
            # Seeded by name, so that the order of tensors in the file changes nothing.
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            count = min(len(index), len(moved))
            chosen = moved[_sample(generator, len(moved), count)]
            if count < len(index):
                unmoved = self._where(name, lambda moved: moved == 0)
                chosen = torch.cat([chosen, unmoved[_sample(generator, len(unmoved), len(index) - count)]])
            drawn[name] = chosen.sort().values
        return drawn

    def sample_others(self, chosen: Region, share: float, seed: int) -> Region:
        """A random share of the entries that moved and are not chosen."""
        drawn = {}
        for name, entries in self.entries.items():
            free = torch.zeros(entries, dtype=torch.bool)
            free[self._where(name, lambda moved: moved > 0).long()] = True
            if name in chosen:
                free[chosen[name].long()] = False
            indices = free.nonzero()[:, 0]
            generator = np.random.default_rng([seed, 1, zlib.crc32(name.encode())])
            count = int(generator.binomial(len(indices), share))
            if count:
                picked = indices[_sample(generator, len(indices), count)].sort().values
                drawn[name] = region.narrowest_index(picked, entries)
        return drawn

    def square(self, chosen: Region) -> float:
        """Sum of squared movement over a region."""
        sums = []
        for name, index in chosen.items():
            D = delta(*(side.reshape(-1)[index.long()] for side in self._read(name)))
            sums.append(float(D.double().square().sum()))
        return math.fsum(sums)

    def _threshold(self, count: int) -> float:
        """Movement of the `count`-th entry."""
        bits, integers, _ = PATTERNS[self._dtype]
        rank = self.total - count + 1
        search = RankSearch([rank], bits)
        for level in search.levels:
            for name in self.entries:
                patterns = (
                    D.abs().to(self._dtype).view(integers).numpy() for D in self._chunks(*self._read(name))
                )
                search.count(level, patterns)
            search.descend(level)
        return number(search.thresholds[rank], self._dtype)

    def _where(self, name: str, condition: Callable[[Tensor], Tensor]) -> Int[Tensor, " _"]:
        """Indices of the entries of a tensor at which a condition on their movement is true."""
        parts, start = [], 0
        for D in self._chunks(*self._read(name)):
            index = condition(D.abs_().to(self._dtype)).nonzero()[:, 0] + start
            parts.append(region.narrowest_index(index, self.entries[name]))
            start += len(D)
        return torch.cat(parts)

    @staticmethod
    def _chunks(base: Tensor, tuned: Tensor) -> Iterator[Float[Tensor, " _"]]:
        """tuned − base in chunks."""
        sides = (side.reshape(-1).split(CHUNK) for side in (base, tuned))
        for base_chunk, tuned_chunk in zip(*sides, strict=True):
            yield delta(base_chunk, tuned_chunk)


def _sample(generator: np.random.Generator, size: int, count: int) -> Int[Tensor, " count"]:
    """`count` distinct random numbers below `size`."""
    return torch.from_numpy(generator.choice(size, count, replace=False, shuffle=False))
