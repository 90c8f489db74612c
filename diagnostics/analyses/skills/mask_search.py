"""Grafting masks: which entries of the update carry a task, learned by gradients of the task loss.

A graft keeps the tuned value at the entries of a mask g and the base's everywhere else. Both searches rank
candidate entries and see the model only through an oracle: mask values m in [0, 1] -> dL/dm at base + m ⊙ D.

- `budget` (ours, the default): the mask is that of the largest scores, exactly as many as asked for at every
  step, and the gradient with respect to that hard mask goes straight to the scores.
- `faithful`: the paper's sigmoid relaxation of a mask that grows from a base mask by plain gradient descent,
  with three repairs: scores start at 0, the step is calibrated to the gradient, and the search ends when the
  rounded mask has reached its size.

Source: Panigrahi et al. 2023, arXiv:2302.06600, and its released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diagnostics.analyses.skills.movement import kth_largest

# A mask of the candidates, hard or with values in [0, 1] -> gradient of the loss with respect to each.
Oracle = Callable[[Tensor], Tensor]
# Places of candidates, rising -> how far each moved.
Moved = Callable[[Tensor], Tensor]
Step = Callable[[int, int], None]

POINTS = 10  # of the integral
BIAS = 10.0  # `sigmoid_bias` of the released code
STEP = 0.02  # of the best score, at the first step of `budget`
LOGIT = 0.1  # moved by the entry that is to be the last of `faithful`, at its first step


def mask_of(
    scores: Float[Tensor, " candidates"], size: int, moved: Moved | None = None
) -> Bool[Tensor, " candidates"]:
    """True at exactly `size` candidates: those with the largest scores.

    Of equal ones those that moved further, then the first; smaller masks lie in larger ones.
    """
    count = len(scores)
    if size <= 0 or size >= count:
        return torch.full((count,), size > 0)
    bar = kth_largest(scores, size)
    mask = scores > bar
    level = (scores == bar).nonzero()[:, 0]
    short = size - int(mask.sum())
    if short < len(level):
        if moved is not None:
            level = level[moved(level).sort(descending=True, stable=True).indices]
        level = level[:short]
    mask[level] = True
    return mask


def integrated(oracle: Oracle, count: int, *, points: int = POINTS, step: Step | None = None) -> Tensor:
    """Integrated gradients of every candidate along the whole update: minus the mean of dL/dm at m = a.

    About what each candidate takes off the loss on the way from base to tuned; above 0 it helps. A midpoint
    rule over `points` values of a. A start for a search, no result: what must move together it cannot see.
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
    """Scores whose largest are a mask of low loss; every mask on the way has exactly its size.

    With one size throughout, the largest scores are the best mask of that size that it finds. With sizes that
    change from step to step, those of every size are good masks, nested in one another: one search serves a
    whole curve (ours), a little less well than a search of its own serves each size.

    Args:
        start: scores to begin with; only their proportions count.
        sizes: of the mask at each step; as many gradients are taken.
        moved: how far candidates moved: what breaks ties.
        rate: the first step at the steepest entry, as a share of the largest start score; falls to 0.
    """
    largest, steps = float(start.abs().max()) if len(start) else 0.0, len(sizes)
    scores = start / largest if largest > 0 else start.clone()
    for done, size in enumerate(sizes):
        gradient = oracle(mask_of(scores, size, moved))
        steepest = max(float(gradient.max()), -float(gradient.min()))
        if steepest > 0:
            scores -= gradient.mul_(rate * (1 - done / steps) / steepest)
        del gradient  # before the next mask is made
        if step:
            step(done + 1, steps)
    return scores


def soft(
    scores: Float[Tensor, " candidates"], grown_from: Bool[Tensor, " candidates"], bias: float = BIAS
) -> Float[Tensor, " candidates"]:
    """The relaxed mask g(S) = g₀ + (1 − 2 g₀) σ(S − b): the base mask at S = −∞, its complement at +∞."""
    flips = torch.sigmoid(scores - bias)
    return torch.where(grown_from, 1 - flips, flips)


def logits(
    scores: Float[Tensor, " candidates"], grown_from: Bool[Tensor, " candidates"], bias: float = BIAS
) -> Float[Tensor, " candidates"]:
    """The logit of g(S): above 0 where the mask rounds to 1."""
    return torch.where(grown_from, bias - scores, scores - bias)


def to_scores(
    gradient: Float[Tensor, " candidates"],
    scores: Float[Tensor, " candidates"],
    grown_from: Bool[Tensor, " candidates"],
    bias: float = BIAS,
) -> Float[Tensor, " candidates"]:
    """dL/dS out of dL/dg: times (1 − 2 g₀) σ'(S − b)."""
    flips = torch.sigmoid(scores - bias)
    slope = flips * (1 - flips)
    return gradient * torch.where(grown_from, -slope, slope)


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """What a faithful search ended with.

    Attributes:
        scores: logits of the relaxed mask; the region is the largest of them.
        steps: gradients taken.
        reached: whether the rounded mask reached its size.
    """

    scores: Float[Tensor, " candidates"]
    steps: int
    reached: bool


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
        grown_from: the base mask. The released script's is all but empty, so that the region is grown.
        steps: at most so many.
        bias: b; an entry that is not to be touched stays below it.
        logit: by how much the `size`-th steepest score moves at the first step, which sets the learning rate
            (ours; the released 1e7 is right for one model and one loss alone).
    """
    count = len(grown_from)
    scores, rate, done, reached = torch.zeros(count), 0.0, 0, False
    start = int(grown_from.sum())
    for done in range(1, steps + 1):
        gradient = to_scores(oracle(soft(scores, grown_from, bias)), scores, grown_from, bias)
        if not rate:
            bar = kth_largest(gradient.abs(), min(max(size, 1), count)) if count else 0.0
            rate = logit / bar if bar > 0 else 0.0
        scores = scores - rate * gradient
        if step:
            step(done, steps)
        rounded = int((logits(scores, grown_from, bias) > 0).sum())
        reached = rounded >= size if start < size else rounded <= size
        if reached or not rate:
            break
    return SearchOutcome(scores=logits(scores, grown_from, bias), steps=done, reached=reached)
