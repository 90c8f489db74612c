"""The dropping point of a curve: the sparsity beyond which a metric falls by more than a tolerance.

Curves are of a metric that is better when higher, measured at rising sparsities of which the first is 0. The
definition on a grid is the paper's (Jaiswal et al. 2023, arXiv:2306.03805, section 3); the isotonic estimate,
its interval, the hinge and the verdict are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.errors import InputError

Sparsities: TypeAlias = Float[np.ndarray, " points"]
SparsityCurve: TypeAlias = Float[np.ndarray, " points"]
Word = Literal["sharp", "gradual", "no plateau", "unclear", "not reached"]

# The customary marks of a difference in BIC: very strong, and not worth mentioning.
STRONG, WEAK = 10.0, 2.0
# How many times steeper a curve falls behind a sharp bend (ours).
STEEPER = 3.0
# Of its whole fall, what a curve has done where it levels off again (ours), and the fewest points of a fit.
FALLEN, FEWEST = 0.95, 5
# Rounding of sums is no drop.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class PaperDroppingPoint:
    """The dropping point as the paper defines it, on the points that were measured.

    Attributes:
        at: the last sparsity before the metric first falls below the tolerance; the last measured where it
            never does.
        until: the one behind it; NaN where the metric never falls below.
        rho: share of the remaining weights whose removal is the fall, (until − at) / (1 − at).
        crossings: how often the curve falls below the tolerance; above 1 it is noisy.
    """

    at: float
    until: float
    rho: float
    crossings: int


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """The best continuous fit of two slopes.

    Attributes:
        at: where they meet.
        before, after: the slopes, metric per unit of sparsity.
        dbic: BIC of one line minus BIC of the hinge; above 10 the bend is beyond doubt, up to 2
            there is none.
        until: the last sparsity fitted; less than the last measured where the curve levels off before it.
    """

    at: float
    before: float
    after: float
    dbic: float
    until: float


@dataclass(frozen=True, kw_only=True)
class DroppingPoint:
    """All that is said of where one curve drops.

    Attributes:
        allowed: drop that is tolerated, in the metric's unit.
        at, until: the robust bracket; `until` is NaN where the grid ends first.
        point, low, high: the crossing within the bracket, and its 95 % interval.
        reached: whether the curve leaves the tolerance at all; else `point` is a lower bound.
        decided: whether the rows suffice to tell the tolerance from noise.
        rows_needed: how many would.
        points: the crossing in every draw.
    """

    paper: PaperDroppingPoint
    allowed: float
    at: float
    until: float
    point: float
    low: float
    high: float
    reached: bool
    decided: bool
    rows_needed: int
    half_width: float
    hinge: Hinge
    verdict: Word
    points: Float[np.ndarray, " draws"]


def isotonic(curves: Float[np.ndarray, "curves points"]) -> Float[np.ndarray, "curves points"]:
    """The nearest curve, by least squares, that never rises: what pooling of adjacent violators gives.

    By the min-max formula, for all curves at once.
    """
    points = curves.shape[1]
    sums = np.concatenate([np.zeros((len(curves), 1)), np.cumsum(curves, axis=1)], axis=1)
    first, last = np.indices((points, points))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (sums[:, None, 1:] - sums[:, :-1, None]) / (last - first + 1)
    means[:, range(points), range(points)] = curves
    means = np.where(last >= first, means, -np.inf)
    # The largest mean of a stretch from `first` that reaches at least to each point.
    highest = np.maximum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    fitted: Float[np.ndarray, "curves points"] = np.where(last >= first, highest, np.inf).min(axis=1)
    return fitted


def within(
    curves: Float[np.ndarray, "curves points"],
    start: Float[np.ndarray, " curves"],
    allowed: Float[np.ndarray, " curves"],
) -> Bool[np.ndarray, "curves points"]:
    """Where curves lie at most the allowed drop under their start."""
    slack = ROUNDING * np.maximum(allowed, 1e-3 * np.abs(start))
    return start[:, None] - curves <= (allowed + slack)[:, None]


def crossing(
    sparsities: Sparsities,
    curves: Float[np.ndarray, "curves points"],
    allowed: Float[np.ndarray, " curves"],
) -> tuple[Int[np.ndarray, " curves"], Float[np.ndarray, " curves"]]:
    """The last point at which each isotonic fit is within the allowed drop, and where it leaves it.

    The second is linear between that point and the next one, or the last sparsity where the grid ends first.
    """
    fitted = isotonic(curves)
    start = curves[:, 0]
    last = within(fitted, start, allowed).sum(axis=1) - 1  # never rising: all of them come first
    rows, after = np.arange(len(curves)), np.minimum(last + 1, len(sparsities) - 1)
    here, there = fitted[rows, last], fitted[rows, after]
    fall = here - there
    part = (here - (start - allowed)) / np.where(fall > 0, fall, 1.0)
    width = sparsities[after] - sparsities[last]
    return last, sparsities[last] + np.clip(part, 0.0, 1.0) * width


def paper_point(sparsities: Sparsities, curve: SparsityCurve, allowed: float) -> PaperDroppingPoint:
    """The dropping point of the paper's definition."""
    inside = within(curve[None], curve[:1], np.array([allowed]))[0]
    falls = np.flatnonzero(inside[:-1] & ~inside[1:])
    if not len(falls):
        return PaperDroppingPoint(at=float(sparsities[-1]), until=math.nan, rho=math.nan, crossings=0)
    at, until = float(sparsities[falls[0]]), float(sparsities[falls[0] + 1])
    return PaperDroppingPoint(at=at, until=until, rho=(until - at) / (1 - at), crossings=len(falls))


def hinge(sparsities: Sparsities, curve: SparsityCurve) -> Hinge:
    """Fit `a + b s + d max(s − c, 0)`, with c from the second to the last but one sparsity.

    Raises:
        InputError: fewer than 4 points.
    """
    count = len(curve)
    if count < 4:
        raise InputError(f"{count} points; a hinge has 4 parameters")
    # Rounding in a perfect fit is no evidence, so that residuals end at a millionth of the curve's range.
    floor = count * (1e-6 * float(np.ptp(curve))) ** 2
    line = np.stack([np.ones(count), sparsities], axis=1)
    straight, _ = fit(line, curve)
    tried = [
        (*fit(np.column_stack([line, np.maximum(sparsities - at, 0)]), curve), at) for at in sparsities[1:-1]
    ]
    bent, parts, at = min(tried, key=lambda each: each[0])
    gain = math.log(max(straight, floor) / max(bent, floor)) if floor else 0.0
    return Hinge(
        at=float(at), before=float(parts[1]), after=float(parts[1] + parts[2]),
        dbic=count * gain - 2 * math.log(count), until=float(sparsities[-1]),
    )  # fmt: skip


def fit(
    design: Float[np.ndarray, "points terms"], curve: SparsityCurve
) -> tuple[float, Float[np.ndarray, " terms"]]:
    """Sum of squared residuals of the least squares fit, and its coefficients."""
    parts = np.linalg.lstsq(design, curve, rcond=None)[0]
    return float(((curve - design @ parts) ** 2).sum()), parts


def bend(sparsities: Sparsities, curve: SparsityCurve, *, plateau: bool) -> Hinge:
    """The hinge of a curve; one that ends on a floor is fitted up to where it reaches the floor.

    A curve that falls from a plateau to chance has two bends, and the fit may take the second one, or
    neither. Without a plateau there is but one, and the whole curve is fitted.
    """
    count = len(curve)
    if plateau:
        fallen = np.flatnonzero(curve[0] - curve >= FALLEN * (curve[0] - curve.min()))
        count = max(int(fallen[0]) + 1, FEWEST) if curve.min() < curve[0] else count
    return hinge(sparsities[:count], curve[:count])


def word(*, at: float, reached: bool, step: float, bent: Hinge) -> Word:
    """A curve in a word.

    Args:
        at: the last sparsity within the tolerance.
        step: the first step of the grid, before it was refined.
        bent: the hinge of the curve.
    """
    if not reached:
        return "not reached"
    if at < step * (1 - ROUNDING):
        return "no plateau"
    steeper = bent.after < bent.before
    if bent.dbic > STRONG and steeper and abs(bent.after) >= STEEPER * abs(bent.before):
        return "sharp"
    if bent.dbic <= WEAK:
        return "gradual"
    return "unclear" if steeper else "no plateau"


def rows_needed(rows: int, half_width: float, tolerance: float) -> int:
    """Rows whose interval would be as narrow as the tolerance, given the half-width that so many have.

    For accuracy, where d is the share of rows on which dense and pruned disagree, (z / tolerance)² d.
    """
    return max(2, math.ceil(rows * (half_width / tolerance) ** 2 * (1 - ROUNDING)))


def dropping(
    sparsities: Sparsities,
    curve: SparsityCurve,
    drawn: Float[np.ndarray, "draws points"],
    *,
    tolerance: float,
    relative: bool,
    step: float,
    rows: int,
    least: float = 0.0,
) -> DroppingPoint:
    """Estimate where a curve drops, and how surely.

    The rows suffice where, at both ends of the bracket, the drop is known to within the tolerance or lies
    surely on one side of it.

    Args:
        drawn: the curve with rows drawn anew, the same ones at every point.
        tolerance: the drop that is tolerated: itself, or as a share of the first value.
        step: the first step of the grid, before it was refined.
        rows: how many rows were measured.
        least: the smallest half-width that so many rows can have; z / rows for accuracy, where no row that
            disagrees is no proof that none would.

    Raises:
        InputError: fewer than 4 points.
    """
    scale = tolerance * np.abs(np.concatenate([curve[:1], drawn[:, 0]])) if relative else None
    allowed = np.full(1 + len(drawn), tolerance) if scale is None else scale
    lasts, points = crossing(sparsities, np.concatenate([curve[None], drawn]), allowed)
    place, count = int(lasts[0]), len(sparsities)
    reached = place < count - 1
    defined = paper_point(sparsities, curve, float(allowed[0]))
    ends = {place, place + 1, *(int(np.searchsorted(sparsities, end)) for end in (defined.at, defined.until)
                                if not math.isnan(end))}  # fmt: skip
    widths = {end: max(half_width(drawn[:, 0] - drawn[:, end]), least) for end in ends if 0 < end < count}
    drops = {end: float(curve[0] - curve[end]) for end in widths}
    open_ends = [
        end for end, width in widths.items() if width > allowed[0] and abs(drops[end] - allowed[0]) <= width
    ]
    telling = open_ends or ([place] if place in widths else list(widths))
    widest = max((widths[end] for end in telling), default=0.0)
    low, high = np.quantile(points[1:], [0.025, 0.975])
    at = float(sparsities[place])
    bent = bend(sparsities, curve, plateau=bool(at >= step * (1 - ROUNDING)))
    return DroppingPoint(
        paper=defined, allowed=float(allowed[0]), at=at,
        until=float(sparsities[place + 1]) if reached else math.nan,
        point=float(points[0]), low=float(low), high=float(high), reached=reached,
        decided=not open_ends, rows_needed=rows_needed(rows, widest, max(float(allowed[0]), 1e-12)),
        half_width=widest, hinge=bent, points=points[1:],
        verdict="unclear" if open_ends else word(at=at, reached=reached, step=step, bent=bent),
    )  # fmt: skip


def half_width(drawn: Float[np.ndarray, " draws"]) -> float:
    """Half of the 95 % interval of what was drawn."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(high - low) / 2


def next_sparsity(
    sparsities: Sequence[float], curve: Sequence[float], *, allowed: float, step: float
) -> float | None:
    """Where the next evaluation tells most, as a whole number of steps; None where nothing is left to tell.

    First the bracket of the crossing is halved until it is one step wide, then the wider side of the bend.
    """
    s, values = np.asarray(sparsities, dtype=float), np.asarray(curve, dtype=float)
    last = int(crossing(s, values[None], np.array([allowed]))[0][0])
    gaps = [(last, last + 1)] if last < len(s) - 1 else []
    if gaps and len(s) >= 4:
        bent = bend(s, values, plateau=last > 0)
        place = int(np.searchsorted(s, bent.at))
        gaps += sorted(((place - 1, place), (place, place + 1)), key=lambda gap: -(s[gap[1]] - s[gap[0]]))[:1]
    for first, second in gaps:
        low, high = float(s[first]), float(s[second])
        middle = round(step * round((low + high) / 2 / step), 12)
        if low + step / 2 < middle < high - step / 2:
            return middle
    return None
