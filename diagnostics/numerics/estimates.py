"""A number with its uncertainty."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Half-width of a 95 % interval in standard errors.
HALF = 1.959963984540054


class Estimate(NamedTuple):
    """A difference in loss, and its standard error over rows."""

    value: float
    error: float

    @property
    def half(self) -> float:
        """Half of its 95 % interval."""
        return HALF * self.error


def combined(
    nats: Float[np.ndarray, "models rows"], units: Float[np.ndarray, " rows"], weights: Sequence[float]
) -> Estimate:
    """A weighted sum of the losses of several models on the same rows.

    The error is that of a ratio of sums, rows drawn independently; weights that add to 0 leave paired noise.

    Args:
        units: of each row, at least one.
        weights: of each model.
    """
    rows = np.asarray(weights, float) @ nats
    value = rows.sum() / units.sum()
    count = len(units)
    if count < 2:
        return Estimate(float(value), math.nan)
    rest = rows - value * units
    error = math.sqrt(count / (count - 1) * float(rest @ rest)) / units.sum()
    return Estimate(float(value), float(error))
