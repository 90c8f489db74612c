"""The dropping point of a curve: the sparsity beyond which a metric falls by more than a tolerance.

A curve is a metric, higher is better, at ascending sparsities from 0. The definition on a grid is the paper's
(Jaiswal et al. 2023, arXiv:2306.03805, section 3); the isotonic estimate, its interval, the hinge and the
verdict are ours.
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
Verdict = Literal["sharp", "gradual", "no plateau", "unclear", "not reached"]

# Differences in BIC that are usually called very strong, and not worth mentioning.
STRONG, WEAK = 10.0, 2.0
# How much steeper a curve falls behind a sharp bend (ours).
STEEPER = 3.0
# Share of its fall at which a curve counts as on its floor (ours), and fewest points of a fit.
FALLEN, FEWEST = 0.95, 5
# Rounding of sums is no drop.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class PaperDroppingPoint:
    """The paper's dropping point on the measured sparsities."""

    at: float  # the last sparsity before the metric first leaves the tolerance, or the last measured
    until: float  # the next sparsity; NaN if the metric never leaves the tolerance
    rho: float  # share of the remaining weights that are removed in between, (until − at) / (1 − at)
    crossings: int  # how often the curve leaves the tolerance; above 1 it is noisy


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """The best continuous fit of two slopes."""

    at: float  # the sparsity at which they meet
    before: float  # slope, metric per unit of sparsity
    after: float
    dbic: float  # BIC of one line minus BIC of the hinge; above 10 there surely is a bend, up to 2 none
    until: float  # the last sparsity fitted; below the last measured where the curve reaches a floor


@dataclass(frozen=True, kw_only=True)
class DroppingPoint:
    """The dropping point of one curve, by all estimates."""

    paper: PaperDroppingPoint
    allowed: float  # tolerated drop, in the metric's unit
    at: float  # the robust bracket
    until: float  # its end; NaN where the grid ends first
    point: float  # the crossing within the bracket
    low: float  # its 95 % interval
    high: float
    reached: bool  # whether the curve leaves the tolerance; else `point` is a lower bound
    decided: bool  # whether the rows can tell the tolerance from noise
    rows_needed: int  # how many rows could
    half_width: float
    hinge: Hinge
    verdict: Verdict
    points: Float[np.ndarray, " draws"]  # the crossing in each draw


def isotonic(curves: Float[np.ndarray, "curves points"]) -> Float[np.ndarray, "curves points"]:
    """Isotonic regression: the least-squares curve that never rises, by the min-max formula."""
    points = curves.shape[1]
    sums = np.concatenate([np.zeros((len(curves), 1)), np.cumsum(curves, axis=1)], axis=1)
    first, last = np.indices((points, points))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (sums[:, None, 1:] - sums[:, :-1, None]) / (last - first + 1)
    means[:, range(points), range(points)] = curves
    means = np.where(last >= first, means, -np.inf)
    # The largest mean of a stretch that starts at `first` and includes each point.
    highest = np.maximum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    fitted: Float[np.ndarray, "curves points"] = np.where(last >= first, highest, np.inf).min(axis=1)
    return fitted


def within_tolerance(
    curves: Float[np.ndarray, "curves points"],
    start: Float[np.ndarray, " curves"],
    allowed: Float[np.ndarray, " curves"],
) -> Bool[np.ndarray, "curves points"]:
    """Where curves lie at most the allowed drop below their start."""
    slack = ROUNDING * np.maximum(allowed, 1e-3 * np.abs(start))
    return start[:, None] - curves <= (allowed + slack)[:, None]


def crossing(
    sparsities: Sparsities, curves: Float[np.ndarray, "curves points"], allowed: Float[np.ndarray, " curves"]
) -> tuple[Int[np.ndarray, " curves"], Float[np.ndarray, " curves"]]:
    """Index of the last point at which each isotonic fit is within the allowed drop, and its crossing.

    The crossing is linear between that point and the next; it is the last sparsity where the grid ends first.
    """
    fitted = isotonic(curves)
    start = curves[:, 0]
    last = within_tolerance(fitted, start, allowed).sum(axis=1) - 1  # never rising: they come first
    rows, after = np.arange(len(curves)), np.minimum(last + 1, len(sparsities) - 1)
    inside = fitted[rows, last]
    fall = inside - fitted[rows, after]
    part = (inside - (start - allowed)) / np.where(fall > 0, fall, 1.0)
    width = sparsities[after] - sparsities[last]
    return last, sparsities[last] + np.clip(part, 0.0, 1.0) * width


def paper_dropping_point(sparsities: Sparsities, curve: SparsityCurve, allowed: float) -> PaperDroppingPoint:
    """The dropping point by the paper's definition."""
    inside = within_tolerance(curve[None], curve[:1], np.array([allowed]))[0]
    falls = np.flatnonzero(inside[:-1] & ~inside[1:])
    if not len(falls):
        return PaperDroppingPoint(at=float(sparsities[-1]), until=math.nan, rho=math.nan, crossings=0)
    at, until = float(sparsities[falls[0]]), float(sparsities[falls[0] + 1])
    return PaperDroppingPoint(at=at, until=until, rho=(until - at) / (1 - at), crossings=len(falls))


def fit_hinge(sparsities: Sparsities, curve: SparsityCurve) -> Hinge:
    """Fit `a + b s + d max(s − c, 0)`, with c among the inner sparsities."""
    count = len(curve)
    if count < 4:
        raise InputError(f"{count} points; a hinge has 4 parameters")
    # Rounding in a perfect fit is no evidence: residuals are at least a millionth of the curve's range.
    floor = count * (1e-6 * float(np.ptp(curve))) ** 2
    line = np.stack([np.ones(count), sparsities], axis=1)
    straight, _ = least_squares(line, curve)
    fits = [
        (*least_squares(np.column_stack([line, np.maximum(sparsities - at, 0)]), curve), at)
        for at in sparsities[1:-1]
    ]
    bent, parts, at = min(fits, key=lambda candidate: candidate[0])
    gain = math.log(max(straight, floor) / max(bent, floor)) if floor else 0.0
    return Hinge(
        at=float(at), before=float(parts[1]), after=float(parts[1] + parts[2]),
        dbic=count * gain - 2 * math.log(count), until=float(sparsities[-1]),
    )  # fmt: skip


def least_squares(
    design: Float[np.ndarray, "points terms"], curve: SparsityCurve
) -> tuple[float, Float[np.ndarray, " terms"]]:
    """Sum of squared residuals of the least-squares fit, and its coefficients."""
    parts = np.linalg.lstsq(design, curve, rcond=None)[0]
    return float(((curve - design @ parts) ** 2).sum()), parts


def fit_bend(sparsities: Sparsities, curve: SparsityCurve, *, plateau: bool) -> Hinge:
    """The hinge of a curve; a curve with a plateau is fitted up to where it reaches its floor.

    A curve that falls from a plateau to chance has two bends, and the fit could take the second, or neither.
    """
    count = len(curve)
    if plateau:
        fallen = np.flatnonzero(curve[0] - curve >= FALLEN * (curve[0] - curve.min()))
        count = max(int(fallen[0]) + 1, FEWEST) if curve.min() < curve[0] else count
    return fit_hinge(sparsities[:count], curve[:count])


def verdict_of(*, at: float, reached: bool, step: float, bent: Hinge) -> Verdict:
    """The verdict on a curve within the tolerance up to `at`; `step` is the first of the unrefined grid."""
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
    """Rows for an interval as narrow as the tolerance, given the half-width of the interval of `rows`.

    For accuracy this is (z / tolerance)² d, where dense and pruned disagree on a share d of the rows.
    """
    return max(2, math.ceil(rows * (half_width / tolerance) ** 2 * (1 - ROUNDING)))


def estimate_dropping_point(
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
    """Estimate where a curve drops, with its uncertainty.

    It is decided where, at both ends of the bracket, the drop is known to within the tolerance or lies surely
    on one side of it.

    Args:
        drawn: the curve on bootstrap draws of the rows, the same rows at every point.
        tolerance: the tolerated drop; `relative`: as a share of the first value.
        step: the first step of the grid before refinement.
        least: lower bound of the half-width; z / rows for accuracy.
    """
    scale = tolerance * np.abs(np.concatenate([curve[:1], drawn[:, 0]])) if relative else None
    allowed = np.full(1 + len(drawn), tolerance) if scale is None else scale
    lasts, points = crossing(sparsities, np.concatenate([curve[None], drawn]), allowed)
    last, count = int(lasts[0]), len(sparsities)
    reached = last < count - 1
    defined = paper_dropping_point(sparsities, curve, float(allowed[0]))
    ends = {last, last + 1, *(int(np.searchsorted(sparsities, end)) for end in (defined.at, defined.until)
                                if not math.isnan(end))}  # fmt: skip
    widths = {end: max(half_width(drawn[:, 0] - drawn[:, end]), least) for end in ends if 0 < end < count}
    drops = {end: float(curve[0] - curve[end]) for end in widths}
    undecided = [
        end for end, width in widths.items() if width > allowed[0] and abs(drops[end] - allowed[0]) <= width
    ]
    decisive = undecided or ([last] if last in widths else list(widths))
    widest = max((widths[end] for end in decisive), default=0.0)
    low, high = np.quantile(points[1:], [0.025, 0.975])
    at = float(sparsities[last])
    bent = fit_bend(sparsities, curve, plateau=bool(at >= step * (1 - ROUNDING)))
    return DroppingPoint(
        paper=defined, allowed=float(allowed[0]), at=at,
        until=float(sparsities[last + 1]) if reached else math.nan,
        point=float(points[0]), low=float(low), high=float(high), reached=reached,
        decided=not undecided, rows_needed=rows_needed(rows, widest, max(float(allowed[0]), 1e-12)),
        half_width=widest, hinge=bent, points=points[1:],
        verdict="unclear" if undecided else verdict_of(at=at, reached=reached, step=step, bent=bent),
    )  # fmt: skip


def half_width(drawn: Float[np.ndarray, " draws"]) -> float:
    """Half of the width of the 95 % interval of draws."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(high - low) / 2


def next_sparsity(
    sparsities: Sequence[float], curve: Sequence[float], *, allowed: float, step: float
) -> float | None:
    """The most informative next sparsity, as a whole number of steps; None where none is.

    First the bracket of the crossing is halved until it is one step wide, then the wider side of the bend.
    """
    s, values = np.asarray(sparsities, dtype=float), np.asarray(curve, dtype=float)
    last = int(crossing(s, values[None], np.array([allowed]))[0][0])
    gaps = [(last, last + 1)] if last < len(s) - 1 else []
    if gaps and len(s) >= 4:
        bent = fit_bend(s, values, plateau=last > 0)
        knot = int(np.searchsorted(s, bent.at))
        gaps += sorted(((knot - 1, knot), (knot, knot + 1)), key=lambda gap: -(s[gap[1]] - s[gap[0]]))[:1]
    for first, second in gaps:
        low, high = float(s[first]), float(s[second])
        middle = round(step * round((low + high) / 2 / step), 12)
        if low + step / 2 < middle < high - step / 2:
            return middle
    return None
