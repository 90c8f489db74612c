"""What rounding alone explains: the unit in the last place of a dtype, and entries that differ by more."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diagnostics.analyses.integrity.health import CODES, chunks, magnitudes
from probes.checkpoints.rounding import changed, is_rounded_copy

HALF = (torch.bfloat16, torch.float16)


def ulp(values: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The distance of neighbouring numbers of a dtype at each magnitude.

    >>> ulp(torch.tensor([1.0, 1.5, 2.0, 0.0]), torch.bfloat16).log2().tolist()
    [-7.0, -7.0, -6.0, -133.0]
    """
    facts = torch.finfo(dtype)
    _, exponents = torch.frexp(values.abs().clamp(min=facts.tiny).double())
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponents - 1) * facts.eps


def grid(values: Shaped[Tensor, "..."]) -> torch.dtype:
    """The coarsest dtype that holds all values: a file may keep in float32 what was rounded to bfloat16.

    >>> grid(torch.tensor([1.0, 0.1])), grid(torch.tensor([1.0, 0.1]).bfloat16().float())
    (torch.float32, torch.bfloat16)
    """
    if values.dtype.itemsize > 2:
        for dtype in HALF:
            if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in values.split(64)):
                return dtype
    return values.dtype


def changed_entries(base: Shaped[Tensor, "..."], tuned: Shaped[Tensor, "..."]) -> int:
    """How many entries of a tensor or matrix differ by more than rounding explains.

    What `probes.checkpoints.rounding.changed` counts, by comparing bits, and NaN equals itself.

    >>> changed_entries(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.25]).bfloat16())
    1
    """
    if not (base.is_floating_point() and tuned.is_floating_point()):
        return int((base != tuned).sum())
    if torch.finfo(tuned.dtype).eps > torch.finfo(base.dtype).eps:
        return _not_rounded(tuned, base)
    count = sum(_different(ours.to(theirs.dtype), theirs) for ours, theirs in _chunk_pairs(base, tuned))
    if count and base.dtype != tuned.dtype and is_rounded_copy(base.reshape(-1), tuned.reshape(-1)):
        return _not_rounded(base, tuned)
    if count and base.dtype == tuned.dtype and base.dtype.itemsize > 2:
        # Rounded to half precision on the way, and stored wide again.
        for dtype in HALF:
            parts = _chunk_pairs(base, tuned)
            if all(_different(ours.to(dtype).to(ours.dtype), theirs) == 0 for ours, theirs in parts):
                return 0
    return count


def _chunk_pairs(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(chunks(base), chunks(tuned), strict=True)


def _not_rounded(coarse: Tensor, fine: Tensor) -> int:
    """How many fine entries do not round to the coarse ones."""
    count = 0
    for c, f in _chunk_pairs(coarse, fine):
        differing = _different(f.to(c.dtype), c)
        if differing and f.dtype == torch.float32 and c.dtype in HALF:
            likely = torch.from_numpy(_half_way(f, c.dtype))
            apart = int(changed(f[likely], c[likely]).sum())
            differing += apart - _different(f[likely].to(c.dtype), c[likely])
        elif differing:
            differing = int(changed(f, c).sum())
        count += differing
    return count


def _half_way(fine: Float[Tensor, " entries"], dtype: torch.dtype) -> np.ndarray:
    """Indices of what may round either way: the bits that are dropped are a one and zeros."""
    bits = fine.view(torch.int32).numpy()
    dropped = 23 + round(math.log2(torch.finfo(dtype).eps))
    half_way = (bits & ((1 << dropped) - 1)) == 1 << (dropped - 1)
    # Subnormal numbers drop more.
    small = (bits & np.iinfo(np.int32).max) < int(magnitudes(torch.tensor([torch.finfo(dtype).tiny])))
    return np.flatnonzero(half_way | small)


def _different(first: Shaped[Tensor, " entries"], second: Shaped[Tensor, " entries"]) -> int:
    """Entries of another value, of one dtype; 0 equals -0, and NaN itself."""
    # numpy compares integers many times faster than torch compares half precision.
    ours, theirs = (side.view(CODES[side.dtype.itemsize]).numpy() for side in (first, second))
    unequal = ours != theirs
    count = int(np.count_nonzero(unequal))
    if count:
        unsigned, infinity = np.iinfo(ours.dtype).max, int(magnitudes(first.new_tensor([torch.inf])))
        either = (ours | theirs) & unsigned
        if either.min() == 0:
            count -= int(np.count_nonzero(unequal & (either == 0)))
        if either.max() > infinity:
            both = np.minimum(ours & unsigned, theirs & unsigned) > infinity
            count -= int(np.count_nonzero(unequal & both))
    return count
