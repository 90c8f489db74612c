"""Losses of the same rows at several points, and their bootstrap over rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# Rows times draws held at once.
HELD = 2**23


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """The losses of one set of rows at every point.

    Attributes:
        nats: of each row.
        units: what a row counts; rows with 0 are left out beforehand.
    """

    nats: Float[np.ndarray, "points rows"]
    units: Float[np.ndarray, " rows"]

    @property
    def loss(self) -> Float[np.ndarray, " points"]:
        """Mean loss of a unit."""
        return self.nats.sum(axis=1) / self.units.sum()

    def drawn(self, draws: int, generator: np.random.Generator) -> Float[np.ndarray, "draws points"]:
        """The same with rows drawn anew, the same ones at every point."""
        count = len(self.units)
        parts, chunk = [], max(1, HELD // count)
        for first in range(0, draws, chunk):
            size = min(chunk, draws - first)
            copies = generator.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
            parts.append((copies @ self.nats.T) / (copies @ self.units)[:, None])
        return np.concatenate(parts)


def mean_loss(sets: Sequence[RowLosses]) -> Float[np.ndarray, " points"]:
    """Mean over sets, each of which counts alike."""
    return np.mean([rows.loss for rows in sets], axis=0)


def mean_drawn(
    sets: Sequence[RowLosses], draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws points"]:
    """Mean over sets of the losses with rows drawn anew within each."""
    return np.mean([rows.drawn(draws, generator) for rows in sets], axis=0)
