"""What a curve over the steps of a run says: troughs, what is recovered of them, late slopes, partings.

Scores are higher for better. `further_diagnostics`' formulas: depth = s_0 − min s, recovery = (s_T − min s) /
depth; they are ours, for the papers on the stability gap show curves. Slopes are Theil and Sen's.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from diagnostics.numerics.estimates import UNDEFINED, Estimate

Curve = Float[np.ndarray, " steps"]

# Two-sided level of the interval of a slope, and the fewest points that it can be told of: of 4 points all in
# order one of 24 arrangements rises throughout, so that [least, largest slope] holds 92 %. 95 % would need 5.
LEVEL, FEWEST = 0.90, 4
# The fewest points of a rank correlation in a table; between 3 points only 4 values are possible.
RANKED = 4


@dataclass(frozen=True, kw_only=True)
class Trough:
    """Where a score fell below its first value, and what came back.

    Attributes:
        place: of the lowest score.
        depth: first score less the lowest; 0 if it never fell below the first.
        recovery: share of the depth that the last score has won back; NaN without a depth.
        steps_down: from the first checkpoint to the lowest.
        steps_up: from the lowest to the first that has won back the share asked for; NaN if none has.
    """

    place: int
    depth: float
    recovery: float
    steps_down: float
    steps_up: float


def trough(steps: Curve, scores: Curve, *, recovered: float = 0.8) -> Trough:
    """The trough of a curve; missing scores are passed over, but not the first nor the last."""
    if np.isnan(scores[[0, -1]]).any():
        return Trough(place=0, depth=math.nan, recovery=math.nan, steps_down=math.nan, steps_up=math.nan)
    place = int(np.nanargmin(scores))
    low = scores[place]
    depth = float(scores[0] - low)
    if depth == 0:
        return Trough(place=0, depth=0.0, recovery=math.nan, steps_down=0.0, steps_up=math.nan)
    back = np.flatnonzero(scores[place:] >= low + recovered * depth)
    return Trough(
        place=place,
        depth=depth,
        recovery=float((scores[-1] - low) / depth),
        steps_down=float(steps[place] - steps[0]),
        steps_up=float(steps[place + back[0]] - steps[place]) if len(back) else math.nan,
    )


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
    """The last third of so many checkpoints, rounded up, and at least two."""
    return slice(count - max(2, math.ceil(count / 3)), None)


def thirds(count: int) -> dict[str, slice]:
    """The first, second and last third of so many checkpoints, the first ones longer by one."""
    ends = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(count), 3))]).tolist()
    names = ("first third", "second third", "last third")
    return {name: slice(start, stop) for name, start, stop in zip(names, ends, ends[1:], strict=False)}


def rank_correlation(first: Curve, second: Curve) -> float:
    """Spearman's; NaN of fewer than 4 points, or where either does not vary."""
    from scipy.stats import spearmanr

    there = ~(np.isnan(first) | np.isnan(second))
    first, second = first[there], second[there]
    if len(first) < RANKED or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)


def settled_from(scores: Curve, within: float) -> int:
    """The first place from which every score lies within so much of the last; the last place always does."""
    beyond = np.flatnonzero(~(np.abs(scores - scores[-1]) <= within))
    return int(beyond[-1]) + 1 if len(beyond) else 0


def deviations(comparisons: int) -> float:
    """Half-widths, in standard errors, that hold for so many comparisons at once at 95 % (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.05 / (2 * max(1, comparisons)))
