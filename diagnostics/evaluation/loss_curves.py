"""Measures of loss curves between base and tuned: barrier, bump, dip, success or failure of a path.

α = 0 is base and α = 1 is tuned. Losses are in nats, means over units (tokens, or rows of choices and
labels). Sources: Wortsman et al., arXiv:2109.01903 (the path), Lin et al., arXiv:2309.17230
(FalseFalseTrue). The definition of a failure mode is ours: arXiv:2410.16476 names it without a rule.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from diagnostics.numerics.estimates import Estimate

Curve: TypeAlias = Float[np.ndarray, " alphas"]
PathOutcome: TypeAlias = Literal["success", "weak", "strong"]

# Right (T) or wrong (F) under base, tuned and the interpolated model.
PATTERNS = tuple(f"{base}{tuned}{blend}" for base in "FT" for tuned in "FT" for blend in "FT")


def chord(alphas: Curve, losses: Curve) -> Curve:
    """The straight line between the losses at both ends."""
    return (1 - alphas) * losses[0] + alphas * losses[-1]


def barrier(alphas: Curve, losses: Curve) -> float:
    """Largest excess of a curve over its chord, at least 0; NaNs are skipped."""
    return float(np.nanmax(np.concatenate([[0.0], losses - chord(alphas, losses)])))


def bump(losses: Curve) -> float:
    """Largest excess of a curve over its higher end, at least 0."""
    return max(0.0, float(np.nanmax(losses)) - max(losses[0], losses[-1]))


def dip(losses: Curve) -> float:
    """Largest drop of a curve below its lower end, at least 0."""
    return max(0.0, min(losses[0], losses[-1]) - float(np.nanmin(losses)))


def highest(alphas: Curve, losses: Curve) -> int:
    """Index of the interior point furthest above the chord."""
    excess = (losses - chord(alphas, losses))[1:-1]
    return 1 + int(np.nanargmax(excess)) if np.isfinite(excess).any() else 0


def lag(alphas: Curve, losses: Curve) -> float:
    """Smallest α with half of the loss reduction from base to tuned, linear between points; NaN: none."""
    gain = losses[0] - losses[-1]
    if not gain > 0 or not np.isfinite(losses).all():
        return math.nan
    goal = losses[-1] + gain / 2
    index = int(np.argmax(losses <= goal))
    before, after = losses[index - 1], losses[index]
    step = (before - goal) / (before - after)
    return float(alphas[index - 1] + step * (alphas[index] - alphas[index - 1]))


def outcome(gains: Sequence[Estimate], losses: Sequence[Estimate]) -> PathOutcome:
    """Success or failure of interpolation on a set.

    A strong failure has an interior point that is worse than both ends, a success one that is better than
    both, each by more than half the paired 95 % interval; a strong failure takes precedence.

    Args:
        gains: of each interior point, the loss of the better end minus its own.
        losses: of each interior point, its own loss minus that of the worse end.
    """
    if any(loss.low > 0 for loss in losses):
        return "strong"
    return "success" if any(gain.low > 0 for gain in gains) else "weak"


def patterns(
    base: Bool[np.ndarray, " units"], tuned: Bool[np.ndarray, " units"], blend: Bool[np.ndarray, " units"]
) -> dict[str, float]:
    """Share of units with each pattern of `PATTERNS`: `FFT` is right in the interpolated model alone."""
    codes = 4 * base.astype(int) + 2 * tuned.astype(int) + blend.astype(int)
    shares = np.bincount(codes, minlength=8) / len(codes)
    return dict(zip(PATTERNS, shares.tolist(), strict=True))


def ensemble_nats(
    base: Float[np.ndarray, " units"], tuned: Float[np.ndarray, " units"], alpha: float
) -> Float[np.ndarray, " units"]:
    """Nats of each unit under the mixture (1 − α) p_base + α p_tuned."""
    with np.errstate(divide="ignore"):  # of log 0 at an end
        return -np.logaddexp(np.log1p(-alpha) - base, np.log(alpha) - tuned)


def best_alpha(alphas: Curve, losses: Mapping[str, Curve]) -> float:
    """α of the lowest mean loss over sets; of equals the largest."""
    mean = np.mean(list(losses.values()), axis=0)
    low = np.nanmin(mean)
    return float(alphas[np.flatnonzero(mean == low)[-1]])
