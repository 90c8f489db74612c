"""What rounding alone explains: the unit in the last place of a dtype, and entries that differ by more."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def ulp(values: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The distance of neighbouring numbers of a dtype at each magnitude.

    >>> ulp(torch.tensor([1.0, 1.5, 2.0, 0.0]), torch.bfloat16).log2().tolist()
    [-7.0, -7.0, -6.0, -133.0]
    """
    facts = torch.finfo(dtype)
    _, exponents = torch.frexp(values.abs().clamp(min=facts.tiny).double())
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponents - 1) * facts.eps


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype with fewer digits."""
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


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


def changed(base: Shaped[Tensor, "..."], tuned: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Where two tensors differ by more than the rounding of the coarser dtype.

    >>> changed(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.25]).bfloat16()).tolist()
    [False, True]
    """
    if base.dtype != tuned.dtype:
        dtype = coarser(base.dtype, tuned.dtype)
        base, tuned = base.to(dtype), tuned.to(dtype)
    return (base != tuned) & ~(base.isnan() & tuned.isnan())


def changed_entries(base: Shaped[Tensor, "..."], tuned: Shaped[Tensor, "..."]) -> int:
    """How many entries of a chunk differ by more than rounding explains."""
    if base.dtype == tuned.dtype and torch.equal(base, tuned):
        return 0
    count = int(changed(base, tuned).sum())
    if count and base.dtype == tuned.dtype and base.dtype.itemsize > 2:
        # Rounded to half precision on the way, and stored wide again.
        for dtype in HALF:
            if not changed(base.to(dtype).to(base.dtype), tuned).any():
                return 0
    return count
