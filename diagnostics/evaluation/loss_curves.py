"""The path from base to tuned: what loss curves over α say, and which layer makes a hole in them.

α = 0 is base and α = 1 is tuned. Losses are in nats, means over units (tokens, or rows of choices and
labels). Definitions and the literature's names for them: Wortsman et al., arXiv:2109.01903 (the path), Lin
et al., arXiv:2309.17230 (FalseFalseTrue), Adilova et al., arXiv:2307.06966 (barriers of single layers). The
rule for a straggler and the definition of a failure mode are ours: the paper that names both,
arXiv:2410.16476, gives no rule that could be read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from diagnostics.numerics.estimates import Estimate

Curve: TypeAlias = Float[np.ndarray, " alphas"]
PathOutcome: TypeAlias = Literal["success", "weak", "strong"]

PATTERNS = tuple(
    f"{base}{tuned}{blend}" for base in "FT" for tuned in "FT" for blend in "FT"
)  # base, tuned, blend


# Curves


def chord(alphas: Curve, losses: Curve) -> Curve:
    """The straight line between the losses at both ends."""
    return (1 - alphas) * losses[0] + alphas * losses[-1]


def barrier(alphas: Curve, losses: Curve) -> float:
    """Most by which a curve lies above its chord; never below 0. What is NaN is passed over."""
    return float(np.nanmax(np.concatenate([[0.0], losses - chord(alphas, losses)])))


def bump(losses: Curve) -> float:
    """Most by which a curve lies above both of its ends; never below 0."""
    return max(0.0, float(np.nanmax(losses)) - max(losses[0], losses[-1]))


def dip(losses: Curve) -> float:
    """Most by which a curve lies below both of its ends; never below 0."""
    return max(0.0, min(losses[0], losses[-1]) - float(np.nanmin(losses)))


def highest(alphas: Curve, losses: Curve) -> int:
    """Which interior point lies furthest above the chord."""
    excess = (losses - chord(alphas, losses))[1:-1]
    return 1 + int(np.nanargmax(excess)) if np.isfinite(excess).any() else 0


def lag(alphas: Curve, losses: Curve) -> float:
    """Smallest α at which half of what the way to tuned wins is won: 0.5 on a straight line.

    Between points the curve is straight. NaN where nothing is won, or a loss is missing.
    """
    won = losses[0] - losses[-1]
    if not won > 0 or not np.isfinite(losses).all():
        return math.nan
    goal = losses[-1] + won / 2
    place = int(np.argmax(losses <= goal))
    before, after = losses[place - 1], losses[place]
    step = (before - goal) / (before - after)
    return float(alphas[place - 1] + step * (alphas[place] - alphas[place - 1]))


def outcome(gains: Sequence[Estimate], losses: Sequence[Estimate]) -> PathOutcome:
    """What blending does on a set.

    Args:
        gains: of each interior point, the loss of its better end minus its own.
        losses: of each interior point, its own loss minus that of its worse end.

    Returns:
        strong: some interior point is worse than both ends; weak: none is better than both; each by more
        than half the paired 95 % interval. A hole counts for more than a gain beside it.
    """
    if any(loss.low > 0 for loss in losses):
        return "strong"
    if any(gain.low > 0 for gain in gains):
        return "success"
    return "weak"


# Patterns of right and wrong


def patterns(
    base: Bool[np.ndarray, " units"], tuned: Bool[np.ndarray, " units"], blend: Bool[np.ndarray, " units"]
) -> dict[str, float]:
    """Share of units by who is right, in the order base, tuned, blend: `FFT` is right in the blend alone.

    The eight shares add to 1; the blend's accuracy is the sum of those that end in T.
    """
    codes = 4 * base.astype(int) + 2 * tuned.astype(int) + blend.astype(int)
    shares = np.bincount(codes, minlength=8) / len(codes)
    return dict(zip(PATTERNS, shares.tolist(), strict=True))


def ensemble_nats(
    base: Float[np.ndarray, " units"], tuned: Float[np.ndarray, " units"], alpha: float
) -> Float[np.ndarray, " units"]:
    """Nats of each unit under the mixture (1 − α) p_base + α p_tuned, from those under both."""
    with np.errstate(divide="ignore"):  # of log 0 at an end
        return -np.logaddexp(np.log1p(-alpha) - base, np.log(alpha) - tuned)


# Layers


def best_alpha(alphas: Curve, losses: Mapping[str, Curve]) -> float:
    """α of the lowest mean loss over sets; of equals the nearest to tuned."""
    mean = np.mean(list(losses.values()), axis=0)
    low = np.nanmin(mean)
    return float(alphas[np.flatnonzero(mean == low)[-1]])
