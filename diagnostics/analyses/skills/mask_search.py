"""Grafting masks learned by gradients of the task loss.

The searches rank candidates by an oracle: mask values m in [0, 1] -> dL/dm at base + m ⊙ (tuned − base).
Source: Panigrahi et al. 2023, arXiv:2302.06600, and its released code, repaired in three places: scores start
at 0, the step is calibrated to the gradient, and the search ends when the rounded mask has its size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diagnostics.analyses.skills.movement import kth_largest

# Mask of the candidates, hard or in [0, 1] -> gradient of the loss with respect to each.
Oracle = Callable[[Tensor], Tensor]
# Ascending positions of candidates -> |tuned − base| of each.
Moved = Callable[[Tensor], Tensor]
Step = Callable[[int, int], None]

POINTS = 10  # of the integral
BIAS = 10.0  # `sigmoid_bias` of the released code
STEP = 0.02  # first step of `budget`, as a share of the largest score
LOGIT = 0.1  # first step of `faithful` at the last entry of the mask


def top_mask(
    scores: Float[Tensor, " candidates"], size: int, moved: Moved | None = None
) -> Bool[Tensor, " candidates"]:
    """True at exactly the `size` largest scores; smaller masks lie in larger ones.

    Of equal scores, entries that moved further come first, then the earlier.
    """
    count = len(scores)
    if size <= 0 or size >= count:
        return torch.full((count,), size > 0)
    threshold = kth_largest(scores, size)
    mask = scores > threshold
    ties = (scores == threshold).nonzero()[:, 0]
    missing = size - int(mask.sum())
    if missing < len(ties):
        if moved is not None:
            ties = ties[moved(ties).sort(descending=True, stable=True).indices]
        ties = ties[:missing]
    mask[ties] = True
    return mask


def integrated_gradients(
    oracle: Oracle, count: int, *, points: int = POINTS, step: Step | None = None
) -> Tensor:
    """Integrated gradients of every candidate along the update: minus the mean of dL/dm at m = a.

    About how much each lowers the loss, by the midpoint rule; it misses interactions of entries.
    """
    total = torch.zeros(count)
    for point in range(points):
        total -= oracle(torch.full((count,), (point + 0.5) / points)) / points
        if step:
            step(point + 1, points)
    return total


def budget_search(
    oracle: Oracle,
    start: Float[Tensor, " candidates"],
    sizes: Sequence[int],
    moved: Moved | None = None,
    *,
    rate: float = STEP,
    step: Step | None = None,
) -> Float[Tensor, " candidates"]:
    """Scores that rank the candidates: the largest are a mask of low loss (ours).

    The mask selects the largest scores, as many as the step asks for; the gradient with respect to that hard
    mask is applied to the scores (straight-through). With sizes that change from step to step, one search
    gives nested masks of all sizes, a little less good than a search for each size.

    Args:
        start: initial scores; only their proportions count.
        sizes: of the mask at each step, one gradient each.
        rate: the first step at the steepest entry, as a share of the largest start score; falls to 0.
    """
    largest, steps = float(start.abs().max()) if len(start) else 0.0, len(sizes)
    scores = start / largest if largest > 0 else start.clone()
    for done, size in enumerate(sizes):
        gradient = oracle(top_mask(scores, size, moved))
        steepest = max(float(gradient.max()), -float(gradient.min()))
        if steepest > 0:
            scores -= gradient.mul_(rate * (1 - done / steps) / steepest)
        del gradient  # frees memory for the next mask
        if step:
            step(done + 1, steps)
    return scores


def soft_mask(
    scores: Float[Tensor, " candidates"], grown_from: Bool[Tensor, " candidates"], bias: float = BIAS
) -> Float[Tensor, " candidates"]:
    """The relaxed mask g(S) = g₀ + (1 − 2 g₀) σ(S − b): the base mask at S = −∞, its complement at +∞."""
    flips = torch.sigmoid(scores - bias)
    return torch.where(grown_from, 1 - flips, flips)


def mask_logits(
    scores: Float[Tensor, " candidates"], grown_from: Bool[Tensor, " candidates"], bias: float = BIAS
) -> Float[Tensor, " candidates"]:
    """The logit of g(S); above 0 the mask rounds to 1."""
    return torch.where(grown_from, bias - scores, scores - bias)


def score_gradient(
    gradient: Float[Tensor, " candidates"],
    scores: Float[Tensor, " candidates"],
    grown_from: Bool[Tensor, " candidates"],
    bias: float = BIAS,
) -> Float[Tensor, " candidates"]:
    """dL/dS = dL/dg (1 − 2 g₀) σ'(S − b)."""
    flips = torch.sigmoid(scores - bias)
    slope = flips * (1 - flips)
    return gradient * torch.where(grown_from, -slope, slope)


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """The end of a faithful search."""

    scores: Float[Tensor, " candidates"]  # logits of the relaxed mask; the region has the largest
    steps: int  # gradients taken
    reached: bool  # whether the rounded mask reached its size


def faithful_search(
    oracle: Oracle,
    size: int,
    grown_from: Bool[Tensor, " candidates"],
    *,
    steps: int = 100,
    bias: float = BIAS,
    logit: float = LOGIT,
    step: Step | None = None,
) -> SearchOutcome:
    """The paper's search: gradient descent on the scores of a relaxed mask until it rounds to `size` entries.

    Args:
        grown_from: the base mask; nearly empty in the released script.
        steps: at most.
        bias: b, above the scores of untouched entries.
        logit: first step of the `size`-th steepest score, which sets the learning rate (ours; the released
            1e7 suits one model and one loss).
    """
    count = len(grown_from)
    scores, rate, done, reached = torch.zeros(count), 0.0, 0, False
    start = int(grown_from.sum())
    for done in range(1, steps + 1):
        gradient = score_gradient(oracle(soft_mask(scores, grown_from, bias)), scores, grown_from, bias)
        if not rate:
            slope = kth_largest(gradient.abs(), min(max(size, 1), count)) if count else 0.0
            rate = logit / slope if slope > 0 else 0.0
        scores = scores - rate * gradient
        if step:
            step(done, steps)
        rounded = int((mask_logits(scores, grown_from, bias) > 0).sum())
        reached = rounded >= size if start < size else rounded <= size
        if reached or not rate:
            break
    return SearchOutcome(scores=mask_logits(scores, grown_from, bias), steps=done, reached=reached)
