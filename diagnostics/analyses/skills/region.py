"""Regions: sets of entries of a checkpoint, as sorted places in its flattened tensors, and how they relate.

A region says which entries keep their tuned values. Its density is its share of a tensor; where
a region lies is said by density, never by counts, for tensors differ in size by orders of magnitude.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# tensor name -> places in the flattened tensor, rising, each once; 32 bits wide where that is enough
Region: TypeAlias = Mapping[str, Int[Tensor, " _"]]
Combine: TypeAlias = Callable[[Int[np.ndarray, " a"], Int[np.ndarray, " b"]], Int[np.ndarray, " c"]]


def narrowed(index: Int[Tensor, " _"], entries: int) -> Int[Tensor, " _"]:
    """Places in a tensor of so many entries, in 32 bits where these hold them."""
    return index.int() if entries <= 2**31 else index


def size(region: Region) -> int:
    """How many entries."""
    return sum(len(index) for index in region.values())


def union(regions: Iterable[Region]) -> Region:
    """Entries of any of the regions."""
    whole: Region = {}
    for region in regions:
        whole = _combined(whole, region, np.union1d)
    return whole


def intersection(first: Region, second: Region) -> Region:
    """Entries of both."""
    return _combined(first, second, lambda a, b: np.intersect1d(a, b, assume_unique=True))


def difference(first: Region, second: Region) -> Region:
    """Entries of the first that are not of the second."""
    return _combined(first, second, lambda a, b: np.setdiff1d(a, b, assume_unique=True))


def _combined(first: Region, second: Region, combine: Combine) -> Region:
    empty = torch.empty(0, dtype=torch.long)
    made = {}
    for name in sorted({*first, *second}):
        a, b = (region.get(name, empty).numpy() for region in (first, second))
        index = torch.from_numpy(combine(a, b))
        if len(index):
            made[name] = index
    return made


def overlap(first: Region, second: Region) -> float:
    """|first ∩ second| / |second|: the share of the second that is in the first; NaN if the second is empty.

    Not symmetric. In [0, 1]; 1 where the second lies within the first. Source: arXiv:2302.06600.
    """
    count = size(second)
    return size(intersection(first, second)) / count if count else float("nan")


def chance(first: Region, second: Region, entries: Mapping[str, int]) -> float:
    """The overlap to expect if the first had as many entries of each tensor, but any of them.

    The density of the first, averaged over the entries of the second: regions that prefer the same tensors
    overlap more than their overall density alone would have it.
    """
    count = size(second)
    if not count:
        return float("nan")
    shared = (
        len(first[name]) * len(index) / entries[name] for name, index in second.items() if name in first
    )
    return sum(shared) / count


def jaccard(first: Region, second: Region) -> float:
    """|first ∩ second| / |first ∪ second|: 1 if equal, 0 if disjoint, NaN if both are empty."""
    shared = size(intersection(first, second))
    either = size(first) + size(second) - shared
    return shared / either if either else float("nan")


def purity(rel: Float[np.ndarray, "regions tasks"]) -> Float[np.ndarray, " regions"]:
    """How much better a region recovers its own task than any other: rel[i, i] − max of rel[i, t ≠ i].

    About 1 for a region that carries its own task alone, 0 for one that serves another as well. NaN for a
    single task. Tasks whose recovery is undefined (NaN) are left out.
    """
    values = np.full(len(rel), np.nan)
    for i, row in enumerate(rel):
        others = np.delete(row, i)
        others = others[~np.isnan(others)]
        if len(others):
            values[i] = row[i] - others.max()
    return values


def marked(index: Int[Tensor, " _"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """True at the places of a region in a tensor of this shape."""
    flags = torch.zeros(int(np.prod(shape, dtype=np.int64)), dtype=torch.bool)
    flags[index.long()] = True
    return flags.reshape(shape)


def kind_of(name: str) -> str:
    """What a tensor that holds no matrix goes by: `bias`, `norm`, or its own last name."""
    path = name.removesuffix(".weight")
    leaf = path.rpartition(".")[2]
    if "bias" in leaf:
        return "bias"
    return "norm" if any(sign in path.lower().rsplit(".", 2)[-1] for sign in ("norm", "ln")) else leaf


def places(
    region: Region,
    shapes: Mapping[str, tuple[int, ...]],
    matrices: Mapping[str, Any],
    layer_of: Callable[[str], int | None],
) -> list[dict[str, Any]]:
    """Where a region lies: a row for each layer and component, also for those without an entry of it.

    Args:
        shapes: of the tensors that entries could be in.
        matrices: of the checkpoint, by name; what is in none counts as `bias`, `norm` or by its own name.
        layer_of: the layer of a tensor that holds no matrix.

    Gives `layer`, `component`, `size` (entries there), `entries` (those of the region), `share` (of the
    region) and `density` relative to a region that is spread evenly: 1 is what chance gives, 0 none.
    """
    by_tensor: dict[str, list[Any]] = {}
    for matrix in matrices.values():
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    counts: dict[tuple[int | None, str], list[int]] = {}
    for name, shape in shapes.items():
        index = region.get(name, torch.empty(0, dtype=torch.long))
        parts = by_tensor.get(name, [])
        held = 0
        flags = marked(index, shape) if parts and len(index) else None
        for matrix in parts:
            row = counts.setdefault((matrix.layer, matrix.component), [0, 0])
            row[0] += matrix.rows * matrix.columns
            row[1] += 0 if flags is None else int(matrix.take(flags).sum())
            held += matrix.rows * matrix.columns
        if not parts:
            row = counts.setdefault((layer_of(name), kind_of(name)), [0, 0])
            row[0] += int(np.prod(shape, dtype=np.int64))
            row[1] += len(index)
    total, whole = sum(row[0] for row in counts.values()), size(region)
    return [
        {
            "layer": layer, "component": component, "size": there, "entries": entries,
            "share": entries / whole if whole else 0.0,
            "density": (entries / there) / (whole / total) if whole and there else 0.0,
        }
        for (layer, component), (there, entries) in counts.items()
    ]  # fmt: skip


def densest(
    region: Region,
    shapes: Mapping[str, tuple[int, ...]],
    matrices: Mapping[str, Any],
    count: int = 20,
) -> list[dict[str, Any]]:
    """The rows and columns of matrices that hold the largest shares of a region, densest first.

    A row is what one output of the matrix is made of, a column what one input does; counted from 0. Gives
    `matrix`, `layer`, `component`, `axis`, `place`, `entries` and `density`, the share of that row or column.
    """
    found: list[dict[str, Any]] = []
    for matrix in matrices.values():
        index = region.get(matrix.tensor)
        if index is None or not len(index):
            continue
        flags = matrix.take(marked(index, shapes[matrix.tensor]))
        for axis, dim in (("row", 1), ("column", 0)):
            sums = flags.sum(dim=dim)
            best = sums.topk(min(count, len(sums)))
            found += [
                {
                    "matrix": matrix.name, "layer": matrix.layer, "component": matrix.component, "axis": axis,
                    "place": place, "entries": entries, "density": entries / flags.shape[dim],
                }
                for entries, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if entries
            ]  # fmt: skip
    found.sort(key=lambda row: (-row["density"], -row["entries"], row["matrix"], row["axis"], row["place"]))
    return found[:count]
