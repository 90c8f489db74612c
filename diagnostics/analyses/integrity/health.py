"""Numerical health of a tensor: NaN, infinities, subnormal numbers, zeros, the largest magnitude.

Floats are read as integers without their sign: these order as the magnitudes do, the numbers below the first
normal one are zero and the subnormal ones, and those from the exponent of all ones on are infinity and NaN.
One bitwise and, one minimum and maximum, both in cache, settle a tensor in which nothing is unusual.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

# Entries looked at together: both sides of a chunk stay in the cache of a core.
CHUNK = 2**18

CODES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Health:
    """Counts of unusual entries; `largest` is the largest finite magnitude."""

    entries: int = 0
    nan: int = 0
    infinite: int = 0
    subnormal: int = 0
    zero: int = 0
    largest: float = 0.0

    def __add__(self, other: "Health") -> "Health":
        return Health(
            entries=self.entries + other.entries, nan=self.nan + other.nan,
            infinite=self.infinite + other.infinite, subnormal=self.subnormal + other.subnormal,
            zero=self.zero + other.zero, largest=max(self.largest, other.largest),
        )  # fmt: skip


def magnitudes(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The bits of floats without the sign, as integers that order as the magnitudes do.

    >>> magnitudes(torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=torch.bfloat16)).tolist()
    [0, 0, 16256, 16256]
    """
    codes = CODES[values.dtype.itemsize]
    return values.view(codes) & torch.iinfo(codes).max


def health(values: Shaped[Tensor, " entries"]) -> Health:
    """The health of one chunk of floating entries.

    >>> health(torch.tensor([1.0, 0.0, float("nan"), -float("inf"), 1e-40]))
    Health(entries=5, nan=1, infinite=1, subnormal=1, zero=1, largest=1.0)
    """
    if values.numel() == 0:
        return Health()
    codes = magnitudes(values)
    first_normal, infinity = magnitudes(
        torch.tensor([torch.finfo(values.dtype).tiny, torch.inf], dtype=values.dtype)
    ).tolist()
    low, high = (int(code) for code in torch.aminmax(codes))
    zero = subnormal = infinite = nan = 0
    if low < first_normal:
        zero = int((codes == 0).sum())
        subnormal = int((codes < first_normal).sum()) - zero
    if high >= infinity:
        infinite = int((codes == infinity).sum())
        nan = int((codes > infinity).sum())
        codes = codes[codes < infinity]
        high = int(codes.max()) if codes.numel() else 0
    largest = torch.tensor([high], dtype=codes.dtype).view(values.dtype)
    return Health(
        entries=values.numel(), nan=nan, infinite=infinite, subnormal=subnormal, zero=zero,
        largest=float(largest),
    )  # fmt: skip


def chunks(tensor: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, " entries"]]:
    """A stored tensor in parts that fit a cache."""
    return list(tensor.reshape(-1).split(CHUNK)) if tensor.numel() else []


def overflowing(tensor: Shaped[Tensor, "..."], largest: float, dtype: torch.dtype) -> int:
    """Finite entries that become infinite when the tensor is cast to a dtype.

    >>> overflowing(torch.tensor([1.0, 7e4, -7e4, torch.inf]), 7e4, torch.float16)
    2
    """
    if largest <= torch.finfo(dtype).max:
        return 0
    parts = chunks(tensor)
    return sum(int((part.isfinite() & part.to(dtype).isinf()).sum()) for part in parts)
