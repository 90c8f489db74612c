"""Calibration error and Brier score of predicted probabilities."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from probes.errors import InputError


class Reliability(NamedTuple):
    """Mean confidence against accuracy, bin by bin; NaN in bins without rows."""

    rows: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]


def reliability(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15, by: Literal["width", "mass"] = "width"
) -> Reliability:
    """Mean confidence and accuracy in bins of equal width, open below, or of equally many rows.

    Equal confidences share a bin, so that the order of rows does not matter.
    """
    stated, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if stated.ndim != 1 or stated.shape != right.shape or not len(stated):
        raise InputError(
            f"confidence has shape {stated.shape} and correct {right.shape}; give one of each per row"
        )
    if not ((stated >= 0) & (stated <= 1)).all():
        raise InputError("confidence is a probability; some values are outside [0, 1]")
    if by == "width":
        bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], stated, side="left")
    else:
        bin_of = np.searchsorted(np.sort(stated), stated, side="left") * bins // len(stated)
    rows = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bin_of, weights=values, minlength=bins) / rows for values in (stated, right)]
    return Reliability(rows, *means)


def ece(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15, by: Literal["width", "mass"] = "width"
) -> float:
    """Expected calibration error: mean over rows of |accuracy - confidence| of their bin; 0 is calibrated.

    15 bins of equal width as in Guo et al. 2017. Fewer bins lower it, fewer rows raise it.

    >>> ece([0.2, 0.4, 0.8, 0.9], [0, 0, 1, 0], bins=2)
    0.325...
    """
    binned = reliability(confidence, correct, bins=bins, by=by)
    return float(np.nansum(binned.rows * np.abs(binned.accuracy - binned.confidence)) / binned.rows.sum())


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of probabilities: in [0, 1] for one event, in [0, 2] over all classes.

    Args:
        probabilities: (rows,) of an event, or (rows, classes).
        labels: whether the event happened, or the index of the class.
    """
    stated, happened = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if stated.ndim not in (1, 2) or happened.shape != stated.shape[:1] or not len(stated):
        raise InputError(
            f"probabilities have shape {stated.shape} and labels {happened.shape}; give one label per row"
        )
    if stated.ndim == 1:
        return float(((stated - happened) ** 2).mean())
    if happened.min() < 0 or happened.max() >= stated.shape[1]:
        raise InputError(
            f"labels go from {happened.min()} to {happened.max()}, classes to {stated.shape[1] - 1}"
        )
    return float(((stated - np.eye(stated.shape[1])[happened.astype(int)]) ** 2).sum(axis=1).mean())
