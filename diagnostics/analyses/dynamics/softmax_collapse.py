"""How large logits are, and whether a softmax over them has collapsed to 1 exactly.

Source: Prieto et al., arXiv:2501.04697, whose measure tests only that the exponentials add to 1, not that the
label is the one that is left; both are given here. Logit scale and margin are ours.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.errors import InputError


def collapsed(logits: Float[Tensor, "positions classes"], dtype: torch.dtype) -> Bool[Tensor, " positions"]:
    """Where Σ exp(o) is 1 exactly in a dtype, o being the logits less their largest.

    All but the likeliest class have then vanished (in float32 below 2⁻²⁴), and where that one is right the
    loss and its gradient are 0. It holds for the dtype that the loss is computed in, and no other.
    """
    wide = logits.to(dtype)
    return (wide - wide.amax(dim=-1, keepdim=True)).exp().sum(dim=-1) == 1


def scale(logits: Float[Tensor, "positions classes"]) -> Float[Tensor, " positions"]:
    """Standard deviation of the logits over the classes: no shift changes it, a factor multiplies it."""
    return logits.double().std(dim=-1, correction=0)


def margin(
    logits: Float[Tensor, "positions classes"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """The label's logit less the largest other; above 0 where it is right."""
    at = targets[:, None].to(logits.device)
    wide = logits.double()
    return (wide.gather(1, at) - wide.scatter(1, at, -math.inf).amax(dim=1, keepdim=True))[:, 0]


@dataclass(frozen=True, kw_only=True)
class Logits:
    """The logits at all labels of a set, summed up.

    Attributes:
        labels: how many there are.
        collapsed: share with a collapsed softmax.
        collapsed_right: share where besides the label is the class that is left.
        scale: mean standard deviation over the classes.
        margin: mean margin of the label.
    """

    labels: int
    collapsed: float
    collapsed_right: float
    scale: float
    margin: float


def summed(parts: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Logits:
    """Logits and labels, a chunk at a time, summed up.

    Raises:
        InputError: there is no label.
    """
    count, sums = 0, np.zeros(4)
    for logits, targets in parts:
        flat, apart = collapsed(logits, dtype), margin(logits, targets)
        right = flat & (apart > 0)
        sums += [float(each.double().sum()) for each in (flat, right, scale(logits), apart)]
        count += len(targets)
    if not count:
        raise InputError("no row has a label whose logits could be looked at")
    share, right_share, size, apart_by = (sums / count).tolist()
    return Logits(labels=count, collapsed=share, collapsed_right=right_share, scale=size, margin=apart_by)
