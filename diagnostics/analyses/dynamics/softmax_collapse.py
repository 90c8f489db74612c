"""Logit scale, margin and collapse of the softmax.

Source: Prieto et al., arXiv:2501.04697. Its measure tests only that the exponentials add to 1, not that the
remaining class is the label; both are given here. Logit scale and margin are ours.
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
    """Where Σ exp(o) is exactly 1 in the dtype of the loss, o being the logits minus their largest.

    All but the most likely class have then vanished (in float32 below 2⁻²⁴), without a gradient on the label.
    """
    wide = logits.to(dtype)
    return (wide - wide.amax(dim=-1, keepdim=True)).exp().sum(dim=-1) == 1


def scale(logits: Float[Tensor, "positions classes"]) -> Float[Tensor, " positions"]:
    """Standard deviation of the logits over the classes; unchanged by a shift, multiplied by a factor."""
    return logits.double().std(dim=-1, correction=0)


def margin(
    logits: Float[Tensor, "positions classes"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """The label's logit minus the largest other one; above 0 where the label is predicted."""
    label = targets[:, None].to(logits.device)
    wide = logits.double()
    return (wide.gather(1, label) - wide.scatter(1, label, -math.inf).amax(dim=1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class LogitSummary:
    """Number of labels of a set, shares with a collapsed softmax, and mean scale and margin of the logits."""

    labels: int
    collapsed: float
    collapsed_right: float
    scale: float
    margin: float


def summarise(parts: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> LogitSummary:
    """Means over logits and labels, a chunk at a time."""
    count, sums = 0, np.zeros(4)
    for logits, targets in parts:
        flat, margins = collapsed(logits, dtype), margin(logits, targets)
        right = flat & (margins > 0)
        sums += [float(values.double().sum()) for values in (flat, right, scale(logits), margins)]
        count += len(targets)
    if not count:
        raise InputError("no row has a label to measure logits at")
    return LogitSummary(count, *(sums / count).tolist())
