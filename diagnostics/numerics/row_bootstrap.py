"""Losses of the same rows under several models, and their bootstrap over rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# Rows times draws held at once.
HELD = 2**23


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Losses of one set of rows at every point: nats of each row, and its weight in the mean, above 0."""

    nats: Float[np.ndarray, "points rows"]
    units: Float[np.ndarray, " rows"]

    @property
    def loss(self) -> Float[np.ndarray, " points"]:
        """Mean loss per unit."""
        return self.nats.sum(axis=1) / self.units.sum()

    def drawn(self, draws: int, generator: np.random.Generator) -> Float[np.ndarray, "draws points"]:
        """Bootstrap of `loss`: every draw resamples the same rows at all points."""
        count = len(self.units)
        parts, chunk = [], max(1, HELD // count)
        for start in range(0, draws, chunk):
            size = min(chunk, draws - start)
            copies = generator.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
            parts.append((copies @ self.nats.T) / (copies @ self.units)[:, None])
        return np.concatenate(parts)


def mean_loss(sets: Sequence[RowLosses]) -> Float[np.ndarray, " points"]:
    """Mean loss over sets, which count equally."""
    return np.mean([rows.loss for rows in sets], axis=0)


def mean_drawn(
    sets: Sequence[RowLosses], draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws points"]:
    """Bootstrap of `mean_loss`, rows being resampled within each set."""
    return np.mean([rows.drawn(draws, generator) for rows in sets], axis=0)
