"""What scaling the whole update would have kept at the same task loss, and how surely something keeps more.

Whatever changes a tuned model trades task for retention, and so does base + α (tuned − base), which needs no
theory at all. A method is worth its name only where it keeps more than that control does without being worse
on the task. Source of the control: the public review of arXiv:2410.21228; the comparison is ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from diagnostics.numerics.estimates import Estimate

# Strengths between those measured at which the control is interpolated.
BETWEEN = 400


@dataclass(frozen=True, kw_only=True)
class Control:
    """The control at some strengths, measured on all rows (one draw) or on resampled ones.

    Attributes:
        strengths: rising; 1 among them, which is tuned itself.
        task, keep: its losses at these strengths.
    """

    strengths: Float[np.ndarray, " strengths"]
    task: Float[np.ndarray, "draws strengths"]
    keep: Float[np.ndarray, "draws strengths"]

    def at_task(
        self, task: Float[np.ndarray, "draws points"]
    ) -> tuple[Float[np.ndarray, "draws points"], ...]:
        """The lowest keep loss that the control reaches without a larger task loss.

        Also at which strength it does, and its task loss there beyond the one asked for; at most 0 unless no
        strength is as good.

        Between measured strengths both losses follow a monotone cubic. Where no strength is as good on the
        task, it is the strength that is best on it, which favours the control. Tuned itself can always be
        had: the control never keeps less.
        """
        from scipy.interpolate import PchipInterpolator

        even = np.linspace(self.strengths[0], self.strengths[-1], BETWEEN + 1)
        strengths = np.union1d(even, self.strengths)
        own_task, own_keep = (
            PchipInterpolator(self.strengths, losses, axis=1)(strengths) for losses in (self.task, self.keep)
        )
        measured = np.searchsorted(strengths, self.strengths)
        # Exactly what was measured: a digit of rounding would deny the control its own points.
        own_task[:, measured], own_keep[:, measured] = self.task, self.keep
        tuned = int(np.searchsorted(strengths, 1.0))
        rows = np.arange(len(task))
        best = own_task.argmin(axis=1)
        keep, chosen, beyond = (np.empty_like(task) for _ in range(3))
        for point in range(task.shape[1]):
            allowed: Bool[np.ndarray, "draws strengths"] = own_task <= task[:, point, None]
            allowed[:, tuned] = True
            allowed[rows, best] |= ~(own_task <= task[:, point, None]).any(axis=1)
            place = np.where(allowed, own_keep, np.inf).argmin(axis=1)
            keep[:, point], chosen[:, point] = own_keep[rows, place], strengths[place]
            beyond[:, point] = own_task[rows, place] - task[:, point]
        return keep, chosen, beyond


@dataclass(frozen=True, kw_only=True)
class ControlComparison:
    """Points against the control at the same task loss.

    Attributes:
        gains: nats that each point keeps beyond the control; above 0 it keeps more. The 95 % intervals hold
            for all searched points at once, so that picking the best does not make it look better than it is.
        strength: of the control, where it is as good on the task, or best on it where no strength is.
        short: task loss of the control there beyond that of the point; 0 where it is as good.
    """

    gains: tuple[Estimate, ...]
    strength: Float[np.ndarray, " points"]
    short: Float[np.ndarray, " points"]


def advantage(
    task: Float[np.ndarray, "draws points"],
    keep: Float[np.ndarray, "draws points"],
    strengths: Float[np.ndarray, " points"],
    searched: Bool[np.ndarray, " points"],
) -> ControlComparison:
    """What every point keeps beyond the control.

    Args:
        task, keep: losses at every point; the first draw is all rows as they are, the others are resampled.
        strengths: of the points that are the control; NaN for the others.
        searched: the points among which the best is picked.
    """
    control = np.flatnonzero(~np.isnan(strengths))
    control = control[np.argsort(strengths[control])]
    own = Control(strengths=strengths[control], task=task[:, control], keep=keep[:, control])
    reached, chosen, beyond = own.at_task(task)
    gain = reached - keep
    value, spread = gain[0], gain[1:].std(axis=0, ddof=1)
    # Standardised, so that a point whose losses are noisy does not widen the intervals of the others.
    away = np.abs(gain[1:] - value) / np.where(spread > 0, spread, np.inf)
    width = float(np.quantile(away[:, searched].max(axis=1), 0.95)) if searched.any() else np.nan
    bounds = zip(value, value - width * spread, value + width * spread, spread, strict=True)
    gains = tuple(Estimate(*map(float, columns)) for columns in bounds)
    return ControlComparison(gains=gains, strength=chosen[0], short=beyond[0].clip(min=0))
