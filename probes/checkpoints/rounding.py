"""Which entries tuning changed: those that differ by more than a dtype of the two files rounds.

A float32 base and its bfloat16 copy differ nearly everywhere, and nothing was tuned. Casting to another dtype
rounds to the nearest value, ties to even; an entry that this explains did not change.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

# Entries whose spacing is computed together.
CHUNK = 2**18
# Entries on which a rounded copy is told from small steps, evenly spaced over the tensor.
SAMPLE = 2**16


def changed(
    base: Shaped[Tensor, "*shape"],
    tuned: Shaped[Tensor, "*shape"],
    *,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> Bool[Tensor, "*shape"]:
    """Which entries of a tensor were changed.

    An entry did not change if it equals the base's, cast to tuned's dtype. Where base has the coarser dtype,
    it may be a rounded copy of what tuned started from, or what tuned was trained from in finer steps. In a
    copy, the differences are spread evenly over what is rounded away; then an entry that rounds to the base's
    did not change either.

    Args:
        base, tuned: a complete tensor or matrix, not a part of one.
        dtypes: of both in their files, if they were read in others: an adapter merged in float32 was not
            rounded, and differs from a base of bfloat16 wherever its delta is not 0.

    >>> base = torch.tensor([1.001, 2.0])
    >>> changed(base, base.bfloat16()), changed(base, torch.tensor([1.001, 2.5]).bfloat16())
    (tensor([False, False]), tensor([False,  True]))
    """
    if not rounds(base, tuned, dtypes):
        return base != tuned
    if torch.finfo(tuned.dtype).eps > torch.finfo(base.dtype).eps:
        return ~_rounds_to(tuned, base)
    different = base.to(tuned.dtype) != tuned
    return different & ~_rounds_to(base, tuned) if is_rounded_copy(base, tuned) else different


def rounds(base: Tensor, tuned: Tensor, dtypes: tuple[torch.dtype, torch.dtype] | None = None) -> bool:
    """Whether casting from one file's dtype to the other's may have rounded.

    >>> rounds(torch.ones(1), torch.ones(1)), rounds(torch.ones(1), torch.ones(1).bfloat16())
    (False, True)
    """
    of_base, of_tuned = dtypes or (base.dtype, tuned.dtype)
    in_files = of_base != of_tuned and of_base.is_floating_point and of_tuned.is_floating_point
    return in_files and (base.dtype, tuned.dtype) == (of_base, of_tuned)


def settled(
    base: Float[Tensor, "*shape"],
    tuned: Float[Tensor, "*shape"],
    *,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> Float[Tensor, "*shape"]:
    """Tuned with the base's value in each entry that did not change, in a dtype that holds both.

    Tuned itself, where neither dtype rounds.

    >>> settled(torch.tensor([1.001, 2.0]), torch.tensor([1.0, 3.0]).bfloat16())
    tensor([1.0010, 3.0000])
    """
    if not rounds(base, tuned, dtypes):
        return tuned
    wide = torch.promote_types(base.dtype, tuned.dtype)
    return torch.where(changed(base, tuned), tuned.to(wide), base.to(wide))


def is_rounded_copy(coarse: Float[Tensor, "*shape"], fine: Float[Tensor, "*shape"]) -> bool:
    """Whether weights of a coarser dtype look like a rounded copy of finer ones, but for some entries.

    Of the entries that round to the coarse ones, half lie within half of what is rounded away. More do so
    where the fine ones were trained from the coarse, in steps that these cannot resolve.

    >>> weights = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    >>> base = weights.bfloat16()
    >>> is_rounded_copy(base, weights), is_rounded_copy(base, base.float() + 1e-5)
    (True, False)
    """
    step = max(1, coarse.numel() // SAMPLE)
    coarse, fine = (side.reshape(-1)[::step] for side in (coarse, fine))
    close = _rounds_to(coarse, fine) & (coarse != 0)
    if not close.any():
        return True
    distance, spacing = (fine[close].double() - coarse[close].double()).abs(), _spacing(coarse[close])
    # What lies on the edge counts half: few weights of float16 lie between two of bfloat16.
    near = (distance < spacing / 4).double() + (distance == spacing / 4) / 2
    # Three standard errors of a share of one half.
    return float(near.mean()) <= 0.51 + 1.5 / len(near) ** 0.5


def _rounds_to(coarse: Float[Tensor, "*shape"], fine: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Whether each fine value is rounded to the coarse one; of two that are as near, it may be either."""
    # Neither half holds the other: values that were rounded to both lie between two of the wider spacing.
    ordered = torch.promote_types(coarse.dtype, fine.dtype) == fine.dtype
    near = []
    for c, f in zip(*(side.reshape(-1).split(CHUNK) for side in (coarse, fine)), strict=True):
        distance, half = (f.double() - c.double()).abs(), _spacing(c) / 2
        halfway = distance == half if ordered else distance <= torch.maximum(half, _spacing(f) / 2)
        near.append((f.to(c.dtype) == c) | halfway)
    return torch.cat(near).view(coarse.shape)


def _spacing(values: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
    """Distance of each value from the next larger of its dtype, in float64."""
    kind = torch.finfo(values.dtype)
    exponents = torch.frexp(values.double()).exponent - 1
    return kind.eps * torch.exp2(exponents.double()).clamp(min=kind.smallest_normal)
