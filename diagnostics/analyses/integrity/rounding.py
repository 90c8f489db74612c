"""What rounding alone explains: the unit in the last place of a dtype, and entries that differ by more."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diagnostics.analyses.integrity.health import chunks
from probes.checkpoints.rounding import changed

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

    >>> changed_entries(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.25]).bfloat16())
    1
    """
    parts = list(zip(chunks(base), chunks(tuned), strict=True))
    if base.dtype != tuned.dtype:
        equal = all(torch.equal(ours.to(theirs.dtype), theirs) for ours, theirs in parts)
        return 0 if equal else int(changed(base, tuned).sum())
    count = sum(_different(ours, theirs) for ours, theirs in parts)
    if count and base.dtype.itemsize > 2:
        # Rounded to half precision on the way, and stored wide again.
        for dtype in HALF:
            if all(torch.equal(ours.to(dtype).to(ours.dtype), theirs) for ours, theirs in parts):
                return 0
    return count


def _different(base: Shaped[Tensor, " entries"], tuned: Shaped[Tensor, " entries"]) -> int:
    """Entries of another value; NaN in both is none."""
    if torch.equal(base, tuned):
        return 0
    return int(((base != tuned) & ~(base.isnan() & tuned.isnan())).sum())
