"""Troughs, recovery, late slopes and rank correlations of curves over the steps of a run.

Higher scores are better. depth = s_0 − min s, recovery = (s_T − min s) / depth. These formulas are ours: the
papers on the stability gap show curves. Slopes are Theil–Sen.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from diagnostics.numerics.estimates import UNDEFINED, Estimate

Curve = Float[np.ndarray, " steps"]

# Two-sided level of a slope's interval, and the fewest points for one: of the 24 orders of 4 points one rises
# throughout, so that [least, largest slope] holds 92 %. 95 % would need 5 points.
LEVEL, FEWEST = 0.90, 4
# The fewest points of a rank correlation; between 3 points only 4 values are possible.
RANKED = 4


@dataclass(frozen=True)
class Trough:
    """The fall of a score below its first value, and its recovery.

    Attributes:
        index: of the lowest score.
        depth: first score minus the lowest; 0 if it never fell below the first.
        recovery: share of the depth that the last score has regained; NaN without a depth.
        steps_down, steps_up: from the first checkpoint to the lowest, and on to one that has recovered.
    """

    index: int
    depth: float
    recovery: float
    steps_down: float
    steps_up: float


def trough(steps: Curve, scores: Curve, *, recovered: float = 0.8) -> Trough:
    """The trough of a curve; missing scores are skipped, except for the first and the last."""
    if np.isnan(scores[[0, -1]]).any():
        return Trough(0, math.nan, math.nan, math.nan, math.nan)
    index = int(np.nanargmin(scores))
    low = scores[index]
    depth = float(scores[0] - low)
    if depth == 0:
        return Trough(0, 0.0, math.nan, 0.0, math.nan)
    regained = np.flatnonzero(scores[index:] >= low + recovered * depth)
    up = float(steps[index + regained[0]] - steps[index]) if len(regained) else math.nan
    return Trough(index, depth, float((scores[-1] - low) / depth), float(steps[index] - steps[0]), up)


def slope(steps: Curve, scores: Curve) -> Estimate:
    """Theil-Sen slope in units a step with its 90 % interval; NaN below 2 points, no interval below 4."""
    from scipy.stats import theilslopes

    measured = ~np.isnan(scores)
    count = int(measured.sum())
    if count < 2:
        return UNDEFINED
    median, _, low, high = map(float, theilslopes(scores[measured], steps[measured], alpha=LEVEL))
    return Estimate(median, low, high) if count >= FEWEST else Estimate(median, math.nan, math.nan)


def last_third(count: int) -> slice:
    """The last third of `count` checkpoints, rounded up, at least two."""
    return slice(count - max(2, math.ceil(count / 3)), None)


def thirds(count: int) -> dict[str, slice]:
    """The three thirds of `count` checkpoints; the first ones get the remainder."""
    ends = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(count), 3))]).tolist()
    names = ("first third", "second third", "last third")
    return {name: slice(start, stop) for name, start, stop in zip(names, ends, ends[1:], strict=False)}


def rank_correlation(first: Curve, second: Curve) -> float:
    """Spearman correlation; NaN below 4 points, or where a curve is constant."""
    from scipy.stats import spearmanr

    measured = ~(np.isnan(first) | np.isnan(second))
    first, second = first[measured], second[measured]
    if len(first) < RANKED or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)


def settled_from(scores: Curve, within: float) -> int:
    """The first index from which on every score lies within `within` of the last."""
    beyond = np.flatnonzero(~(np.abs(scores - scores[-1]) <= within))
    return int(beyond[-1]) + 1 if len(beyond) else 0


def deviations(comparisons: int) -> float:
    """Half-width, in standard errors, of simultaneous 95 % intervals (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.05 / (2 * max(1, comparisons)))
