"""Regions: sets of entries of a checkpoint, as sorted indices into its flattened tensors.

Where a region lies is given by density, its share of a tensor: tensors differ in size by orders of magnitude.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# tensor name -> distinct ascending indices into the flattened tensor, in 32 bits where these suffice
Region: TypeAlias = Mapping[str, Int[Tensor, " _"]]
Combine: TypeAlias = Callable[[Int[np.ndarray, " a"], Int[np.ndarray, " b"]], Int[np.ndarray, " c"]]


def narrowest_index(index: Int[Tensor, " _"], entries: int) -> Int[Tensor, " _"]:
    """Indices into a tensor of so many entries, in 32 bits where these suffice."""
    return index.int() if entries <= 2**31 else index


def size(region: Region) -> int:
    """Number of entries."""
    return sum(len(index) for index in region.values())


def union(regions: Iterable[Region]) -> Region:
    """Entries of any of the regions."""
    union: Region = {}
    for region in regions:
        union = _combined(union, region, np.union1d)
    return union


def intersection(first: Region, second: Region) -> Region:
    """Entries of both."""
    return _combined(first, second, lambda a, b: np.intersect1d(a, b, assume_unique=True))


def _combined(first: Region, second: Region, combine: Combine) -> Region:
    empty = torch.empty(0, dtype=torch.long)
    combined = {}
    for name in sorted({*first, *second}):
        a, b = (region.get(name, empty).numpy() for region in (first, second))
        index = torch.from_numpy(combine(a, b))
        if len(index):
            combined[name] = index
    return combined


def overlap(first: Region, second: Region) -> float:
    """|first ∩ second| / |second|: the share of the second that is in the first; NaN if the second is empty.

    In [0, 1]; not symmetric. Source: arXiv:2302.06600.
    """
    count = size(second)
    return size(intersection(first, second)) / count if count else float("nan")


def chance(first: Region, second: Region, entries: Mapping[str, int]) -> float:
    """The expected overlap if the first had as many random entries of each tensor."""
    count = size(second)
    if not count:
        return float("nan")
    return (
        sum(len(first[name]) * len(second[name]) / entries[name] for name in second if name in first) / count
    )


def jaccard(first: Region, second: Region) -> float:
    """|first ∩ second| / |first ∪ second|: 1 if equal, 0 if disjoint, NaN if both are empty."""
    shared = size(intersection(first, second))
    either = size(first) + size(second) - shared
    return shared / either if either else float("nan")


def purity(rel: Float[np.ndarray, "regions tasks"]) -> Float[np.ndarray, " regions"]:
    """How much better a region recovers its task than any other: rel[i, i] − max of rel[i, t ≠ i].

    1 for a region of one task alone, 0 for one that serves another too. Undefined recoveries are left out.
    """
    others = np.where(np.eye(len(rel), dtype=bool) | np.isnan(rel), -np.inf, rel).max(axis=1)
    return np.where(np.isinf(others), np.nan, np.diag(rel) - others)


def to_mask(index: Int[Tensor, " _"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """A mask of this shape that is true at the indices."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[index.long()] = True
    return mask.reshape(shape)


def component_of(name: str) -> str:
    """The component of a tensor that holds no matrix: `bias`, `norm`, or the last part of its name."""
    path = name.removesuffix(".weight")
    leaf = path.rpartition(".")[2]
    if "bias" in leaf:
        return "bias"
    return "norm" if any(sign in path.lower().rsplit(".", 2)[-1] for sign in ("norm", "ln")) else leaf


def by_component(
    region: Region,
    shapes: Mapping[str, tuple[int, ...]],
    matrices: Mapping[str, Any],
    layer_of: Callable[[str], int | None],
) -> list[dict[str, Any]]:
    """A row for each layer and component of the eligible tensors, also for those without an entry.

    `density` is relative to a region that is spread evenly: 1 is chance. Tensors that hold no matrix go by
    `layer_of` and `component_of`.
    """
    by_tensor: dict[str, list[Any]] = {}
    for matrix in matrices.values():
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    counts: dict[tuple[int | None, str], list[int]] = {}
    for name, shape in shapes.items():
        index = region.get(name, torch.empty(0, dtype=torch.long))
        parts = by_tensor.get(name, [])
        mask = to_mask(index, shape) if parts and len(index) else None
        for matrix in parts:
            row = counts.setdefault((matrix.layer, matrix.component), [0, 0])
            row[0] += matrix.rows * matrix.columns
            row[1] += 0 if mask is None else int(matrix.take(mask).sum())
        if not parts:
            row = counts.setdefault((layer_of(name), component_of(name)), [0, 0])
            row[0] += math.prod(shape)
            row[1] += len(index)
    total, chosen = sum(row[0] for row in counts.values()), size(region)
    return [
        {
            "layer": layer, "component": component, "size": part, "entries": entries,
            "share": entries / chosen if chosen else 0.0,
            "density": (entries / part) / (chosen / total) if chosen and part else 0.0,
        }
        for (layer, component), (part, entries) in counts.items()
    ]  # fmt: skip


def densest(
    region: Region, shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, Any], count: int = 20
) -> list[dict[str, Any]]:
    """The densest rows (outputs) and columns (inputs) of matrices; density is the share of that row."""
    rows: list[dict[str, Any]] = []
    for matrix in matrices.values():
        index = region.get(matrix.tensor)
        if index is None or not len(index):
            continue
        mask = matrix.take(to_mask(index, shapes[matrix.tensor]))
        for axis, dim in (("row", 1), ("column", 0)):
            sums = mask.sum(dim=dim)
            best = sums.topk(min(count, len(sums)))
            rows += [
                {
                    "matrix": matrix.name, "layer": matrix.layer, "component": matrix.component, "axis": axis,
                    "place": position, "entries": entries, "density": entries / mask.shape[dim],
                }
                for entries, position in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if entries
            ]  # fmt: skip
    rows.sort(key=lambda row: (-row["density"], -row["entries"], row["matrix"], row["axis"], row["place"]))
    return rows[:count]
