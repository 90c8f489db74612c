"""The control of mitigation: keep loss of the scaled whole update at the same task loss.

Every edit of a tuned model trades task loss for retention, and so does base + α (tuned − base), which needs
no theory. An edit is useful only if it keeps more than that control at the same task loss. Source of the
control: the public review of arXiv:2410.21228; the comparison is ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from diagnostics.numerics.estimates import Estimate

# Points at which the control is interpolated.
BETWEEN = 400


def control_at_task(
    measured: Float[np.ndarray, " strengths"], measured_task: Float[np.ndarray, "draws strengths"],
    measured_keep: Float[np.ndarray, "draws strengths"], task: Float[np.ndarray, "draws points"],
) -> tuple[Float[np.ndarray, "draws points"], ...]:  # fmt: skip
    """The lowest keep loss of the control with at most this task loss, for every point.

    Also its strength there, and its task loss above that of the point, positive where no strength is as
    good: there the best on the task is taken, which favours the control. Between measured strengths both
    losses follow a monotone cubic. Tuned is always allowed: the control never keeps less than tuned.
    """
    from scipy.interpolate import PchipInterpolator

    strengths = np.union1d(np.linspace(measured[0], measured[-1], BETWEEN + 1), measured)
    control_task, control_keep = (
        PchipInterpolator(measured, losses, axis=1)(strengths) for losses in (measured_task, measured_keep)
    )
    at = np.searchsorted(strengths, measured)
    # Exactly the measured losses: rounding would deny the control its own points.
    control_task[:, at], control_keep[:, at] = measured_task, measured_keep
    tuned = int(np.searchsorted(strengths, 1.0))
    draws = np.arange(len(task))
    best = control_task.argmin(axis=1)
    keep, chosen, beyond = (np.empty_like(task) for _ in range(3))
    for point in range(task.shape[1]):
        allowed: Bool[np.ndarray, "draws strengths"] = control_task <= task[:, point, None]
        unmatched = ~allowed.any(axis=1)
        allowed[:, tuned] = True
        allowed[draws, best] |= unmatched
        lowest = np.where(allowed, control_keep, np.inf).argmin(axis=1)
        keep[:, point], chosen[:, point] = control_keep[draws, lowest], strengths[lowest]
        beyond[:, point] = control_task[draws, lowest] - task[:, point]
    return keep, chosen, beyond


@dataclass(frozen=True, kw_only=True)
class ControlComparison:
    """Points compared with the control at the same task loss."""

    # Keep loss of the control minus that of each point, in nats. The 95 % intervals are simultaneous over the
    # searched points: picking the best does not bias them.
    gains: tuple[Estimate, ...]
    # Of the control with the same task loss, or the best on the task if none is as good.
    strength: Float[np.ndarray, " points"]
    short: Float[np.ndarray, " points"]  # task loss of the control above that of the point; 0 if as good


def advantage(
    task: Float[np.ndarray, "draws points"],
    keep: Float[np.ndarray, "draws points"],
    strengths: Float[np.ndarray, " points"],
    searched: Bool[np.ndarray, " points"],
) -> ControlComparison:
    """Compare every point with the control; the first draw is the rows themselves.

    Args:
        strengths: of the points that are the control; NaN for the others.
        searched: the points among which the best is picked.
    """
    control = np.flatnonzero(~np.isnan(strengths))
    control = control[np.argsort(strengths[control])]
    # The strengths ascend, with 1, which is tuned.
    reached, chosen, beyond = control_at_task(strengths[control], task[:, control], keep[:, control], task)
    gain = reached - keep
    value, spread = gain[0], gain[1:].std(axis=0, ddof=1)
    # Standardised, so that a point whose losses are noisy does not widen the intervals of the others.
    away = np.abs(gain[1:] - value) / np.where(spread > 0, spread, np.inf)
    width = float(np.quantile(away[:, searched].max(axis=1), 0.95)) if searched.any() else np.nan
    bounds = zip(value, value - width * spread, value + width * spread, spread, strict=True)
    gains = tuple(Estimate(*map(float, columns)) for columns in bounds)
    return ControlComparison(gains=gains, strength=chosen[0], short=beyond[0].clip(min=0))
