"""Movement: how far tuning moved every entry, |tuned − base|, and the entries that moved furthest.

Tensors are streamed, one at a time, so that memory is what is picked and the largest tensor, whatever the
size of the model. Entries are ordered by one total order: |tuned − base| descending, then the tensor's name,
then the place in it. The first s of it are exactly s entries, and those of a smaller s are among those of a
larger one.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diagnostics.region import Region
from probes.sources import same_bytes

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


def leading(values: Float[Tensor, " entries"], count: int) -> Int[Tensor, " count"]:
    """Where the `count` largest values stand, in order of place; of equal ones the first."""
    if count >= len(values):
        return torch.arange(len(values))
    if count <= 0:
        return torch.empty(0, dtype=torch.long)
    bar = kth_largest(values, count)
    above = (values > bar).nonzero()[:, 0]
    level = (values == bar).nonzero()[: count - len(above), 0]
    return torch.cat([above, level]).sort().values


@dataclass(frozen=True, kw_only=True)
class Order:
    """Entries that moved furthest, first to last.

    Attributes:
        names: the tensors that they are in, sorted.
        tensor: of each entry, which of `names`.
        index: its place in the flattened tensor.
        size: how far it moved.
    """

    names: tuple[str, ...]
    tensor: Int[Tensor, " entries"]
    index: Int[Tensor, " entries"]
    size: Float[Tensor, " entries"]

    def __len__(self) -> int:
        return len(self.index)

    def region(self, start: int, stop: int | None = None) -> Region:
        """The entries from the one at `start` to before `stop`; the first `start` if only that is given."""
        part = slice(0, start) if stop is None else slice(start, stop)
        tensor, index = self.tensor[part], self.index[part].long()
        order = self.by_place(part)
        places, counts = tensor[order].unique_consecutive(return_counts=True)
        split = index[order].split(counts.tolist())
        return {self.names[place]: entries for place, entries in zip(places.tolist(), split, strict=True)}

    def first(self, count: int) -> "Order":
        """The first so many."""
        return Order(
            names=self.names, tensor=self.tensor[:count], index=self.index[:count], size=self.size[:count]
        )

    def by_place(self, part: slice = slice(None)) -> Int[Tensor, " _"]:
        """What puts entries in the order of their tensors' names, and of their places there."""
        return torch.from_numpy(np.lexsort((self.index[part].numpy(), self.tensor[part].numpy())))


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
        """
        self._read = read
        self.entries: dict[str, int] = {}
        self.moved: dict[str, int] = {}
        self.squares = 0.0
        frozen = []
        for name in sorted(shapes):
            base, tuned = read(name)
            assert base.shape == tuned.shape == torch.Size(shapes[name]), name
            if base.dtype == tuned.dtype and same_bytes(base, tuned):
                frozen.append(name)
                continue
            D = delta(base, tuned)
            self.entries[name], self.moved[name] = D.numel(), int(D.count_nonzero())
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

    def largest(self, count: int) -> Order:
        """The `count` entries that moved furthest; those that did not move come last.

        Raises:
            ValueError: there are not so many entries.
        """
        if not 0 <= count <= self.total:
            raise ValueError(f"{count} entries are asked for; there are {self.total}")
        names = tuple(self.entries)
        sizes, tensors, indices = [torch.empty(0)], [torch.empty(0).int()], [torch.empty(0).long()]
        held, bar = 0, -1.0
        for place, name in enumerate(names if count else ()):
            size = delta(*self._read(name)).abs_()
            picked = leading(size, count)
            # What only equals the last of a full list comes after it: its tensor's name does.
            picked = picked[size[picked] > bar]
            sizes.append(size[picked])
            tensors.append(torch.full((len(picked),), place, dtype=torch.int32))
            indices.append(picked)
            held += len(picked)
            # Cut only when twice as many are held, so that each cut is paid for by as many new entries.
            if held > count and (held >= 2 * count or place == len(names) - 1):
                every = torch.cat(sizes)
                kept = leading(every, count)
                sizes, tensors, indices = ([torch.cat(each)[kept]] for each in (sizes, tensors, indices))
                held, bar = count, float(sizes[0].min())
        size, tensor, index = (torch.cat(each) for each in (sizes, tensors, indices))
        order = size.sort(descending=True, stable=True).indices
        return Order(names=names, tensor=tensor[order], index=index[order], size=size[order])

    def random(self, region: Region, seed: int) -> Region:
        """As many entries of each tensor as a region has there, drawn evenly from those that moved.

        Entries that did not move are drawn only where a region has more than there are others.
        """
        drawn = {}
        for name, index in region.items():
            if not len(index):
                continue
            D = delta(*self._read(name))
            moved = D.nonzero()[:, 0]
            # By the tensor's name, so that its place in the file changes nothing.
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            count = min(len(index), len(moved))
            chosen = moved[
                torch.from_numpy(generator.choice(len(moved), count, replace=False, shuffle=False))
            ]
            if count < len(index):
                still = (D == 0).nonzero()[:, 0]
                more = generator.choice(len(still), len(index) - count, replace=False, shuffle=False)
                chosen = torch.cat([chosen, still[torch.from_numpy(more)]])
            drawn[name] = chosen.sort().values
        return drawn

    def others(self, names: Iterable[str], chosen: Region, share: float, seed: int) -> Region:
        """Entries that moved and are not among the chosen ones: this share of them, drawn evenly."""
        drawn = {}
        for name in names:
            D = delta(*self._read(name))
            free = D != 0
            if name in chosen:
                free[chosen[name]] = False
            generator = np.random.default_rng([seed, 1, zlib.crc32(name.encode())])
            places = free.nonzero()[:, 0]
            count = int(generator.binomial(len(places), share))
            if count:
                picked = generator.choice(len(places), count, replace=False, shuffle=False)
                drawn[name] = places[torch.from_numpy(picked)].sort().values
        return drawn
