"""Stragglers: layers with a barrier that stands out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from diagnostics.numerics.estimates import Estimate

# The rule for a straggler: least barrier in nats, least number of standard errors, modified z-score of an
# outlier (a general convention), least spread in nats, and the multiple of its equal share of the barrier.
LEAST, ERRORS, OUTLIER, SPREAD, SHARE = 0.05, 2.0, 3.5, 0.005, 2.0


def modified_z(values: Float[np.ndarray, " layers"], spread: float = 0.0) -> Float[np.ndarray, " layers"]:
    """0.6745 (value − median) / MAD; `spread` is the least MAD, so that noise does not stand out."""
    deviations = values - np.median(values)
    return 0.6745 * deviations / max(float(np.median(np.abs(deviations))), spread)


class ScreenedLayer(NamedTuple):
    """The measurements of a layer that decide whether it is a straggler, in nats.

    Attributes:
        barrier: the larger of its two barriers.
        repairs: loss at the worst α minus that with the layer pinned to base, and to tuned.
        rewind: rise of tuned's loss with this layer alone set back to base.
    """

    barrier: Estimate
    repairs: tuple[Estimate, Estimate]
    rewind: Estimate
    displacement: float


def stands_out(barriers: Sequence[Estimate], path_barrier: float) -> Bool[np.ndarray, " layers"]:
    """Conditions (i) and (ii): a significant barrier, and an outlier or more than its share of the path's."""
    values = np.array([barrier.value for barrier in barriers])
    errors = np.nan_to_num([barrier.error for barrier in barriers])
    significant = (values >= LEAST) & (values > ERRORS * errors)
    large = (modified_z(values, SPREAD) > OUTLIER) | (values >= SHARE * path_barrier / len(values))
    return significant & large


def stragglers(layers: Sequence[ScreenedLayer], path_barrier: float) -> Bool[np.ndarray, " layers"]:
    """Layers that stand out and (iii) where pinning surely helps."""
    repaired = [any(repair.low > 0 for repair in layer.repairs) for layer in layers]
    return stands_out([layer.barrier for layer in layers], path_barrier) & np.array(repaired, bool)


def load_bearing(layers: Sequence[ScreenedLayer], path_barrier: float) -> Bool[np.ndarray, " layers"]:
    """Layers without a barrier with an outlying rewind cost and a displacement above the median (ours)."""
    barred = stands_out([layer.barrier for layer in layers], path_barrier)
    rewind = np.array([layer.rewind.value for layer in layers])
    needed = (modified_z(rewind, SPREAD) > OUTLIER) & [layer.rewind.low > 0 for layer in layers]
    moved = np.array([layer.displacement for layer in layers])
    return needed & (moved > np.median(moved)) & ~barred
