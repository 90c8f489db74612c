"""Movement: how far tuning moved every entry, |tuned − base|, and the entries that moved furthest.

Tensors are streamed, one at a time, so that memory is what is picked, whatever the size of the model. Entries
are ordered by one total order: |tuned − base| descending, then the tensor's name, then the place in it. The
first s of it are exactly s entries, and those of a smaller s are among those of a larger one.
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

# A stored tensor of base and of tuned, of one shape; neither is to be written to.
Read = Callable[[str], tuple[Tensor, Tensor]]


def delta(base: Tensor, tuned: Tensor) -> Float[Tensor, " entries"]:
    """tuned − base of every entry in turn, in float32, or float64 where one of them is."""
    # In half precision the difference would be rounded a second time, and many more entries would be equal.
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    return tuned.reshape(-1).to(wide) - base.reshape(-1).to(wide)


def kth_largest(values: Float[Tensor, " entries"], k: int) -> float:
    """The k-th largest value, counted from 1."""
    # numpy selects in place in one copy; torch.topk holds an index for every entry beside it.
    array = values.detach().cpu().numpy()
    return float(np.partition(array, len(array) - k)[len(array) - k])


class Movement:
    """The movement of some tensors of a pair.

    Attributes:
        entries: entries of each tensor that differs in at least one bit, by name, sorted.
        moved: how many of these have another value.
        frozen: names of tensors that are equal in both.
        squares: summed squared movement.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Read):
        """Read every tensor once.

        Args:
            shapes: of the tensors, by name; their order means nothing.
            read: gives a tensor of base and of tuned.

        Raises:
            InputError: weights that are NaN or infinite.
        """
        self._read = read
        self.entries: dict[str, int] = {}
        self.moved: dict[str, int] = {}
        self.squares = 0.0
        self._dtype = torch.float32
        frozen = []
        for name in sorted(shapes):
            base, tuned = read(name)
            assert base.shape == tuned.shape == torch.Size(shapes[name]), name
            if base.dtype == tuned.dtype and same_bytes(base, tuned):
                frozen.append(name)
                continue
            self.entries[name], self.moved[name] = base.numel(), 0
            for D in self._chunks(base, tuned):
                if not D.isfinite().all():
                    raise InputError(
                        f"{name}: holds NaN or infinite weights; how far they moved is not known"
                    )
                self._dtype = torch.promote_types(self._dtype, D.dtype)
                self.moved[name] += int(D.count_nonzero())
                self.squares += float(D.double().square().sum())
        self.frozen = tuple(frozen)

    @property
    def total(self) -> int:
        """N: entries of all tensors that differ."""
        return sum(self.entries.values())

    @property
    def total_moved(self) -> int:
        """Entries whose value differs."""
        return sum(self.moved.values())

    def largest(self, count: int) -> Region:
        """The `count` entries that moved furthest; those that did not move come last.

        Raises:
            InputError: there are not so many entries.
        """
        if not 0 <= count <= self.total:
            raise InputError(f"{count} entries are asked for; there are {self.total}")
        if not count:
            return {}
        bar = self._bar(count)
        above: dict[str, Tensor] = {}
        level: dict[str, Tensor] = {}
        equals = 0
        for name in self.entries:
            found = [self._where(name, lambda size: size > bar)]
            if equals < count:
                found.append(self._where(name, lambda size: size == bar))
                equals += len(found[1])
            for kept, index in zip((above, level), found, strict=False):
                if len(index):
                    kept[name] = index
        short = count - region.size(above)
        for name, index in level.items():
            here = index[:short]
            short -= len(here)
            if len(here):
                both = [above[name], here] if name in above else [here]
                above[name] = torch.cat(both).sort().values
        return {name: above[name] for name in sorted(above)}

    def random(self, pattern: Region, seed: int) -> Region:
        """As many entries of each tensor as a region has there, drawn evenly from those that moved.

        Entries that did not move are drawn only where a region has more than there are others.
        """
        drawn = {}
        for name, index in pattern.items():
            if not len(index):
                continue
            moved = self._where(name, lambda size: size > 0)
            # By the tensor's name, so that its place in the file changes nothing.
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            count = min(len(index), len(moved))
            chosen = moved[_some(generator, len(moved), count)]
            if count < len(index):
                still = self._where(name, lambda size: size == 0)
                chosen = torch.cat([chosen, still[_some(generator, len(still), len(index) - count)]])
            drawn[name] = chosen.sort().values
        return drawn

    def others(self, chosen: Region, share: float, seed: int) -> Region:
        """Entries that moved and are not among the chosen ones: this share of them, drawn evenly."""
        drawn = {}
        for name, entries in self.entries.items():
            free = torch.zeros(entries, dtype=torch.bool)
            free[self._where(name, lambda size: size > 0).long()] = True
            if name in chosen:
                free[chosen[name].long()] = False
            places = free.nonzero()[:, 0]
            generator = np.random.default_rng([seed, 1, zlib.crc32(name.encode())])
            count = int(generator.binomial(len(places), share))
            if count:
                picked = places[_some(generator, len(places), count)].sort().values
                drawn[name] = region.narrowed(picked, entries)
        return drawn

    def square(self, of: Region) -> float:
        """Summed squared movement of a region."""
        return math.fsum(
            float(
                delta(*(side.reshape(-1)[index.long()] for side in self._read(name))).double().square().sum()
            )
            for name, index in of.items()
        )

    def _bar(self, count: int) -> float:
        """How far the `count`-th entry moved."""
        bits, integers, _ = PATTERNS[self._dtype]
        rank = self.total - count + 1
        search = RankSearch([rank], bits)
        for level in search.levels:
            for name in self.entries:
                sizes = (
                    D.abs().to(self._dtype).view(integers).numpy() for D in self._chunks(*self._read(name))
                )
                search.count(level, sizes)
            search.descend(level)
        return number(search.thresholds[rank], self._dtype)

    def _where(self, name: str, true: Callable[[Tensor], Tensor]) -> Int[Tensor, " _"]:
        """Where something holds of how far the entries of a tensor moved, as narrow indices."""
        found, start = [], 0
        for D in self._chunks(*self._read(name)):
            index = true(D.abs_().to(self._dtype)).nonzero()[:, 0] + start
            found.append(region.narrowed(index, self.entries[name]))
            start += len(D)
        return torch.cat(found)

    @staticmethod
    def _chunks(base: Tensor, tuned: Tensor) -> Iterator[Float[Tensor, " _"]]:
        """tuned − base, a part at a time."""
        sides = (side.reshape(-1).split(CHUNK) for side in (base, tuned))
        for ours, theirs in zip(*sides, strict=True):
            yield delta(ours, theirs)


def _some(generator: np.random.Generator, size: int, count: int) -> Int[Tensor, " count"]:
    """So many of `size` places, each once."""
    return torch.from_numpy(generator.choice(size, count, replace=False, shuffle=False))
