"""Stragglers: layers with a barrier that stands out from the others'."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from diagnostics.numerics.estimates import Estimate

# Of the rule for a straggler: least barrier in nats, least standard errors, modified z-score (a general
# convention for outliers), least spread in nats, and how many times its equal share of the whole barrier.
LEAST, ERRORS, OUTLIER, SPREAD, SHARE = 0.05, 2.0, 3.5, 0.005, 2.0


def modified_z(values: Float[np.ndarray, " layers"], spread: float = 0.0) -> Float[np.ndarray, " layers"]:
    """0.6745 (value − median) / MAD; `spread` is the least MAD, so that noise does not stand out."""
    middle = np.median(values)
    return 0.6745 * (values - middle) / max(float(np.median(np.abs(values - middle))), spread)


class ScreenedLayer(NamedTuple):
    """What is known of a layer that may be a straggler.

    Attributes:
        barrier: the larger of its two barriers in nats, with its standard error.
        repairs: what pinning it to base, and to tuned, takes off the loss at the worst α.
        rewind: what tuned loses when this layer alone goes back to base.
        displacement: norm of its delta as a share of its base's norm.
    """

    barrier: Estimate
    repairs: tuple[Estimate, Estimate]
    rewind: Estimate
    displacement: float


def stands_out(barriers: Sequence[Estimate], whole: float) -> Bool[np.ndarray, " layers"]:
    """Conditions (i) and (ii): a barrier that is there, and more than a layer's share or an outlier.

    Args:
        barriers: of each layer.
        whole: the barrier of the whole path.
    """
    values = np.array([each.value for each in barriers])
    errors = np.nan_to_num([each.error for each in barriers])
    there = (values >= LEAST) & (values > ERRORS * errors)
    much = (modified_z(values, SPREAD) > OUTLIER) | (values >= SHARE * whole / len(values))
    return there & much


def stragglers(layers: Sequence[ScreenedLayer], whole: float) -> Bool[np.ndarray, " layers"]:
    """Layers that stand out and that it helps to pin: (iii) one repair is positive beyond its noise."""
    found = stands_out([layer.barrier for layer in layers], whole)
    helped = [any(repair.low > 0 for repair in layer.repairs) for layer in layers]
    return found & np.array(helped, bool)


def load_bearing(layers: Sequence[ScreenedLayer], whole: float) -> Bool[np.ndarray, " layers"]:
    """Layers without a barrier that tuned needs and that moved far: no stragglers.

    Needs (ours): a rewind cost that is an outlier among the layers, and a displacement above the median.
    """
    barred = stands_out([layer.barrier for layer in layers], whole)
    rewind = np.array([layer.rewind.value for layer in layers])
    needed = (modified_z(rewind, SPREAD) > OUTLIER) & [layer.rewind.low > 0 for layer in layers]
    moved = np.array([layer.displacement for layer in layers])
    return needed & (moved > np.median(moved)) & ~barred
