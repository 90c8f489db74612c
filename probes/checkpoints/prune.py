"""Pruning: exact cuts of an order over tensors that are never concatenated.

Thresholds come from histograms of bit patterns, which sort like the non-negative floats that they encode: a
few passes over the tensors serve all sparsities.
Source: one-shot magnitude pruning of Jaiswal et al. 2023, arXiv:2306.03805.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.layout import Header, Part
from probes.naming.align import natural_key

Scope = Literal["global", "block", "tensor"]
# Entries processed together: they fit into a core's cache.
CHUNK = 2**18
# Bits of a float without its sign, its integer type, and the pattern of infinity.
PATTERNS = {
    torch.float16: (15, torch.int16, 0x7C00),
    torch.bfloat16: (15, torch.int16, 0x7F80),
    torch.float32: (31, torch.int32, 0x7F800000),
    torch.float64: (63, torch.int64, 0x7FF0000000000000),
}
# Bits resolved by one histogram.
DIGIT = 16


@dataclass(frozen=True)
class Segment:
    """The pruned entries of a run: all below a threshold, and the first `ties` that equal it."""

    threshold: float
    ties: int
    every_tie: bool


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The entries that a sparsity, of each group, prunes: how many of each tensor, and which of its parts."""

    sparsity: float
    entries: Mapping[str, int]
    pruned_entries: Mapping[str, int]
    segments: Mapping[str, tuple[Segment, ...]] = field(repr=False)

    @property
    def realised(self) -> float:
        """Share of all entries that is pruned."""
        return sum(self.pruned_entries.values()) / max(1, sum(self.entries.values()))

    def divides_ties(self, name: str) -> bool:
        """Whether some of a tensor's entries at a threshold are pruned and others are not."""
        return any(segment.ties and not segment.every_tie for segment in self.segments[name])

    def pruned(self, name: str, keys: Shaped[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """The pruned entries of a tensor with these keys in the order."""
        segments = self.segments[name]
        taken = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
        parts = keys.reshape(len(segments), -1), taken.view(len(segments), -1)
        for segment, values, marks in zip(segments, *parts, strict=True):
            left = segment.ties
            # The threshold of another dtype may lie between two values of this one; comparing would round it.
            bound = float(torch.tensor(segment.threshold, dtype=torch.float64).to(keys.dtype))
            up_to = segment.every_tie or bound < segment.threshold
            for chunk, mark in zip(values.split(CHUNK), marks.split(CHUNK), strict=True):
                size = chunk.abs()
                if up_to:
                    torch.le(size, bound, out=mark)
                    continue
                torch.lt(size, bound, out=mark)
                if left:
                    equal = (size == bound).nonzero()[:left, 0]
                    mark[equal] = True
                    left -= len(equal)
        return taken


def cut_levels(
    cuts: Sequence[Cut], name: str, keys: Shaped[Tensor, "*shape"]
) -> Integer[np.ndarray, " entries"]:
    """The number of cuts that keep each entry of a tensor: the masks of all cuts in one, as they nest.

    The cuts are of one order, by rising sparsity; the i-th prunes an entry if the result is at most i.
    """
    counts = np.empty(keys.numel(), np.uint8 if len(cuts) < 256 else np.int32)
    segments = [cut.segments[name] for cut in cuts]
    bounds_of_parts = [[segment.threshold for segment in parts] for parts in segments]
    thresholds = torch.tensor(bounds_of_parts, dtype=torch.float64)
    # An order over several dtypes has thresholds that the narrower dtypes cannot represent.
    held = bool((thresholds.float() == thresholds).all()) and keys.dtype != torch.float64
    dtype = torch.float32 if held else torch.float64
    bits, integers, _ = PATTERNS[dtype]
    shift = bits - DIGIT
    parts = keys.reshape(len(segments[0]), -1), counts.reshape(len(segments[0]), -1)
    for part, (values, marks) in enumerate(zip(*parts, strict=True)):
        bounds = thresholds[:, part].to(dtype).view(integers).numpy()
        heads = bounds >> shift
        below = np.searchsorted(heads, np.arange(1 << DIGIT)).astype(counts.dtype)
        near = np.zeros(1 << DIGIT, bool)
        near[heads] = True
        left = [parts[part].ties for parts in segments]
        for start in range(0, len(marks), CHUNK):
            chunk = values[start : start + CHUNK].cpu().to(dtype).view(integers).numpy()
            patterns = chunk & ((1 << bits) - 1)
            tops = patterns >> shift
            mark = below[tops]
            # The top digits decide nearly all entries; only those that share them with a threshold remain.
            close_at = np.flatnonzero(near[tops])
            close = patterns[close_at]
            above = np.searchsorted(bounds, close, side="right")
            for index in np.flatnonzero(left):
                equal = np.flatnonzero(close == bounds[index])[: left[index]]
                above[equal] -= 1
                left[index] -= len(equal)
            mark[close_at] = above
            marks[start : start + CHUNK] = mark
    return counts


class Order:
    """Entries of named tensors from the least to the largest |key|.

    Equal keys are ordered by tensor, in the order of `shapes`, then by flat index: every cut has exactly its
    size, and lies within every cut of a higher sparsity.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        *,
        groups: Mapping[str, Sequence[Hashable]] | None = None,
    ):
        """Define an order; nothing is read yet.

        Args:
            read: returns the keys of a tensor; called once for each pass.
            groups: which entries are cut together: for each tensor the groups of its equal consecutive parts,
                such as the experts of a stack. By default all tensors are one group.
        """
        self.shapes = dict(shapes)
        self.read = read
        self.groups = {name: tuple((groups or {}).get(name, (None,))) for name in self.shapes}
        self.entries = {name: math.prod(shape) for name, shape in self.shapes.items()}
        for name, parts in self.groups.items():
            if self.entries[name] % len(parts):
                raise InputError(f"{name}: its {self.entries[name]} entries are not {len(parts)} equal parts")

    def pruned(self, cut: Cut, name: str) -> Bool[Tensor, "..."]:
        """The entries of a tensor that a cut prunes; reads its keys."""
        return cut.pruned(name, self.read(name))

    def cuts(self, sparsities: Sequence[float]) -> list[Cut]:
        """The cut of each sparsity, as a share of each group.

        Raises:
            InputError: a sparsity outside [0, 1); keys that are not finite, or no floats.
        """
        for sparsity in sparsities:
            if not 0 <= sparsity < 1:
                raise InputError(f"sparsity is {sparsity}; it is a share of the weights, from 0 to below 1")
        dtype = self._dtype()
        members: dict[Hashable, list[tuple[str, int]]] = defaultdict(list)
        for name, groups in self.groups.items():
            for part, group in enumerate(groups):
                members[group].append((name, part))
        segments: dict[str, list[list[Segment]]] = {
            name: [[] for _ in groups] for name, groups in self.groups.items()
        }
        taken = [dict.fromkeys(self.shapes, 0) for _ in sparsities]
        # Group by group, so that only the histograms of one are held.
        for parts in members.values():
            size = sum(self.entries[name] // len(self.groups[name]) for name, _ in parts)
            ranks = [round(sparsity * size) for sparsity in sparsities]
            search = RankSearch(ranks, PATTERNS[dtype][0])
            for level in search.levels:
                for name, part in parts:
                    search.count(level, self._patterns(name, part, dtype))
                search.descend(level)
            left = [search.ties[rank] for rank in ranks]
            for name, part in parts:
                tallies = search.tally(self._patterns(name, part, dtype))
                for index, rank in enumerate(ranks):
                    below, equal = tallies[rank]
                    ties = min(left[index], equal)
                    left[index] -= ties
                    threshold = number(search.thresholds[rank], dtype)
                    segments[name][part].append(Segment(threshold, ties, 0 < ties == equal))
                    taken[index][name] += below + ties
        cuts = []
        for index, sparsity in enumerate(sparsities):
            chosen = {name: tuple(part[index] for part in parts) for name, parts in segments.items()}
            cuts.append(
                Cut(sparsity=sparsity, entries=self.entries, pruned_entries=taken[index], segments=chosen)
            )
        return cuts

    def _dtype(self) -> torch.dtype:
        """The narrowest dtype that holds the keys of every tensor exactly."""
        dtypes = {name: self.read(name).dtype for name in self.shapes}
        for name, dtype in dtypes.items():
            if dtype not in PATTERNS:
                raise InputError(
                    f"{name}: is stored as {str(dtype).removeprefix('torch.')}, and codes have no order "
                    "of magnitude; dequantise the checkpoint first"
                )
        return reduce(torch.promote_types, dtypes.values()) if dtypes else torch.float32

    def _patterns(self, name: str, part: int, dtype: torch.dtype) -> Iterator[np.ndarray]:
        """The bit patterns of the keys of one part of a tensor, without their signs, in chunks."""
        bits, integers, infinity = PATTERNS[dtype]
        keys = self.read(name).detach().reshape(len(self.groups[name]), -1)[part]
        for chunk in keys.split(CHUNK):
            patterns = chunk.cpu().to(dtype).view(integers).numpy() & ((1 << bits) - 1)
            if patterns.size and patterns.max() >= infinity:
                raise InputError(
                    f"{name}: holds NaN or infinite weights, which have no magnitude; the file is damaged or "
                    "its training diverged: take another checkpoint"
                )
            yield patterns


class RankSearch:
    """The k-th smallest of many bit patterns for several ranks k, digit by digit from the top."""

    def __init__(self, ranks: Sequence[int], bits: int):
        first = max(0, bits - DIGIT)
        self.levels = [*range(first, 0, -DIGIT), 0]  # the shift of each digit
        self._widths = {level: (bits if level == first else above) - level
                        for level, above in zip(self.levels, [bits, *self.levels], strict=False)}  # fmt: skip
        # The pattern at each rank, from 1; 0 for rank 0, which prunes nothing.
        self.thresholds = dict.fromkeys(ranks, 0)
        self.ties = {rank: rank for rank in ranks}  # patterns equal to the threshold among the first k
        self._prefixes = np.zeros(1, np.int64)
        self._counts: np.ndarray | None = None

    def count(self, level: int, chunks: Iterable[np.ndarray]) -> None:
        """Count the digits at a level of those patterns that share all digits above it with a threshold."""
        size = 1 << self._widths[level]
        if self._counts is None:
            self._counts = np.zeros((len(self._prefixes), size), np.int64)
        for chunk in chunks:
            if level == self.levels[0]:
                self._counts[0] += np.bincount(chunk >> level, minlength=size)
                continue
            rows, sharing = _sharing(self._prefixes, chunk >> (level + self._widths[level]))
            digits = (chunk[sharing] >> level) & (size - 1)
            cells = rows.astype(np.int64) * size + digits
            self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)

    def descend(self, level: int) -> None:
        """Take the counted digit into every threshold."""
        assert self._counts is not None
        sums = self._counts.cumsum(axis=1)
        for rank, prefix in self.thresholds.items():
            if rank:
                row = sums[np.searchsorted(self._prefixes, prefix)]
                digit = int(np.searchsorted(row, self.ties[rank]))
                self.ties[rank] -= int(row[digit - 1]) if digit else 0
                self.thresholds[rank] = prefix << self._widths[level] | digit
        self._prefixes = np.unique([prefix for rank, prefix in self.thresholds.items() if rank] or [0])
        self._counts = None

    def tally(self, chunks: Iterable[np.ndarray]) -> dict[int, tuple[int, int]]:
        """The number of patterns below the threshold of each rank, and of those equal to it."""
        patterns = self._prefixes
        top = self.levels[0]
        heads = np.unique(patterns >> top)
        below, equal = np.zeros((2, len(patterns)), np.int64)
        for chunk in chunks:
            # The top digits decide nearly all patterns; only those that share them with a threshold remain.
            tops = chunk >> top
            sums = np.concatenate([[0], np.bincount(tops, minlength=1 << self._widths[top]).cumsum()])
            near = np.sort(chunk[_sharing(heads, tops)[1]])
            first, last = (np.searchsorted(near, patterns, side=side) for side in ("left", "right"))
            start = np.searchsorted(near, (patterns >> top) << top)
            below += sums[patterns >> top] + first - start
            equal += last - first
        by_pattern = {int(pattern): (int(below[i]), int(equal[i])) for i, pattern in enumerate(patterns)}
        return {rank: by_pattern[pattern] if rank else (0, 0) for rank, pattern in self.thresholds.items()}


def _sharing(prefixes: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of some heads those that are among the prefixes, as indices into these, and their own indices."""
    if prefixes[-1] < 1 << DIGIT and (not heads.size or heads.dtype.itemsize < 8):
        table = np.full(1 << DIGIT, -1, np.int16)
        table[prefixes] = np.arange(len(prefixes))
        rows = table[heads]
        matching = np.flatnonzero(rows >= 0)
    else:
        rows = np.minimum(np.searchsorted(prefixes, heads), len(prefixes) - 1)
        matching = np.flatnonzero(prefixes[rows] == heads)
    return rows[matching], matching


def number(pattern: int, dtype: torch.dtype) -> float:
    """The float that a bit pattern stands for."""
    return float(torch.tensor(pattern, dtype=PATTERNS[dtype][1]).view(dtype))


def scope_of(checkpoint: Checkpoint, parts: tuple[Part, ...] = ("block",)) -> dict[str, Header]:
    """The stored tensors that hold matrices of these parts, layer by layer; InputError if there are none.

    By default the six linear maps of a block, as in the paper's code, and of a gated one the seventh.
    """
    wanted = [matrix for matrix in checkpoint.matrices.values() if matrix.part in parts]
    wanted.sort(key=lambda matrix: (-1 if matrix.layer is None else matrix.layer, natural_key(matrix.tensor)))
    if not wanted:
        kinds = " or ".join(parts)
        raise InputError(f"{checkpoint.ref}: has no {kinds} matrix; there is nothing to prune")
    return {matrix.tensor: checkpoint.headers[matrix.tensor] for matrix in wanted}


def magnitude_order(
    checkpoint: Checkpoint,
    scope: Scope = "global",
    parts: tuple[Part, ...] = ("block",),
    *,
    read: Callable[[str], Tensor] | None = None,
) -> Order:
    """The weights of a checkpoint, or those that `read` returns, from the least to the largest magnitude.

    `scope`: which weights are cut together: all, those of a layer, or those of a tensor or expert.
    """
    shapes = {name: header.shape for name, header in scope_of(checkpoint, parts).items()}
    return Order(shapes, read or checkpoint.tensor, groups=_groups(checkpoint, shapes, scope))


def random_order(
    checkpoint: Checkpoint, scope: Scope = "global", parts: tuple[Part, ...] = ("block",), *, seed: int = 0
) -> Order:
    """The same weights in a random order: the control for `magnitude_order`."""
    shapes = {name: header.shape for name, header in scope_of(checkpoint, parts).items()}

    def keys(name: str) -> Float[Tensor, "..."]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.rand(shapes[name], generator=generator)

    return Order(shapes, keys, groups=_groups(checkpoint, shapes, scope))


def _groups(checkpoint: Checkpoint, shapes: Mapping[str, object], scope: Scope) -> dict[str, list[Hashable]]:
    if scope == "global":
        return {}
    layers: dict[str, int | None] = {}
    experts: dict[str, int] = defaultdict(int)
    for matrix in checkpoint.matrices.values():
        layers.setdefault(matrix.tensor, matrix.layer)
        experts[matrix.tensor] = max(experts[matrix.tensor], 1 + (matrix.expert or 0))
    if scope == "block":
        return {name: [layers[name]] for name in shapes}
    assert scope == "tensor", scope
    return {name: [(name, expert) for expert in range(experts[name])] for name in shapes}


def n_of_m(W: Shaped[Tensor, "out in"], n_keep: int, m: int) -> Bool[Tensor, "out in"]:
    """The weights that an N:M pattern keeps: the `n_keep` largest of `m` consecutive inputs of an output.

    Of equal magnitudes the later ones are kept, as in an order. Groups that do not fill a row: InputError.
    """
    if not 0 < n_keep < m:
        raise InputError(f"{n_keep}:{m} is no pattern; N of M weights are kept, and N is from 1 to below M")
    if W.shape[1] % m:
        raise InputError(f"its {W.shape[1]} inputs are not groups of {m}; leave {n_keep}:{m} out")
    sizes = W.abs().unflatten(1, (-1, m))
    ranks = torch.zeros(sizes.shape, dtype=torch.uint8, device=W.device)
    for position in range(m):
        current = sizes[..., position : position + 1]
        ranks += current < sizes
        ranks[..., position + 1 :] += current == sizes[..., position + 1 :]
    return (ranks >= m - n_keep).flatten(1)


def pattern_pruned(
    checkpoint: Checkpoint, name: str, stored: Tensor, n_keep: int, m: int
) -> Bool[Tensor, "..."]:
    """The entries of a stored tensor that an N:M pattern prunes, along the inputs of each matrix in it."""
    pruned = torch.zeros(stored.shape, dtype=torch.bool)
    for matrix in checkpoint.matrices.values():
        if matrix.tensor == name:
            try:
                kept = n_of_m(matrix.take(stored), n_keep, m)
            except ValueError as error:
                raise InputError(f"{matrix.name}: {error}") from error
            pruned = matrix.put(pruned, ~kept)
    return pruned
