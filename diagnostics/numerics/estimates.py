"""A value with its interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Half-width of a two-sided 95 % normal interval, in standard errors.
Z95 = 1.959963984540054


class Estimate(NamedTuple):
    """A value with the bounds of its interval, 95 % unless the function that returns it says otherwise.

    What is unknown or not defined is NaN: `error`, the standard error, is for intervals from resampling.

    >>> Estimate.normal(1.0, error=0.5)
    Estimate(value=1.0, low=0.020..., high=1.979..., error=0.5)
    """

    value: float
    low: float
    high: float
    error: float = math.nan

    @classmethod
    def normal(cls, value: float, error: float) -> "Estimate":
        """The 95 % interval of a normal distribution with this standard error."""
        return cls(value, value - Z95 * error, value + Z95 * error, error)

    @property
    def half(self) -> float:
        """Half-width of a normal interval."""
        return Z95 * self.error


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


def combined(
    nats: Float[np.ndarray, "models rows"], units: Float[np.ndarray, " rows"], weights: Sequence[float]
) -> Estimate:
    """Weighted sum of the mean losses of several models on the same rows.

    The standard error is that of a ratio of sums over independent rows. Weights that add to 0 leave only
    paired noise.
    """
    rows = np.asarray(weights, float) @ nats
    value = float(rows.sum() / units.sum())
    count = len(units)
    if count < 2:
        return Estimate.normal(value, math.nan)
    rest = rows - value * units
    error = math.sqrt(count / (count - 1) * float(rest @ rest)) / units.sum()
    return Estimate.normal(value, float(error))
