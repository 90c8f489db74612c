"""How far stated confidence can be trusted: calibration error and squared error of probabilities."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from probes.errors import InputError


class Reliability(NamedTuple):
    """Stated against actual, by bin of confidence; NaN in bins without rows."""

    rows: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]


def reliability(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15, by: Literal["width", "mass"] = "width"
) -> Reliability:
    """Mean confidence and accuracy in bins of equal width, open below, or of equally many rows.

    Equal confidences share a bin, so that the order of rows does not matter.

    Args:
        confidence: probability given to what was answered, in [0, 1].
        correct: whether it was right.

    Raises:
        InputError: no rows, not one of each a row, or a confidence outside [0, 1].
    """
    stated, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if stated.ndim != 1 or stated.shape != right.shape or not len(stated):
        raise InputError(
            f"confidence has shape {stated.shape} and correct {right.shape}; give one each a row"
        )
    if not ((stated >= 0) & (stated <= 1)).all():
        raise InputError("confidence is a probability; some are outside [0, 1]")
    if by == "width":
        places = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], stated, side="left")
    else:
        places = np.searchsorted(np.sort(stated), stated, side="left") * bins // len(stated)
    rows = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(places, weights=each, minlength=bins) / rows for each in (stated, right)]
    return Reliability(rows, *means)


def ece(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15, by: Literal["width", "mass"] = "width"
) -> float:
    """Expected calibration error: |accuracy - confidence| averaged over rows, bin by bin; 0 is calibrated.

    15 bins of equal width as in Guo et al. 2017. Falls with fewer bins, rises with fewer rows.
    """
    found = reliability(confidence, correct, bins=bins, by=by)
    return float(np.nansum(found.rows * np.abs(found.accuracy - found.confidence)) / found.rows.sum())


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of probabilities: of an event in [0, 1], or over all classes in [0, 2].

    Args:
        probabilities: (rows,) of an event, or (rows, classes).
        labels: whether it happened, or the index of the class.

    Raises:
        InputError: shapes that do not belong together, or a label that is no class.
    """
    stated, happened = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if stated.ndim not in (1, 2) or happened.shape != stated.shape[:1] or not len(stated):
        raise InputError(
            f"probabilities have shape {stated.shape} and labels {happened.shape}; one label a row"
        )
    if stated.ndim == 1:
        return float(((stated - happened) ** 2).mean())
    if happened.min() < 0 or happened.max() >= stated.shape[1]:
        raise InputError(
            f"labels go from {happened.min()} to {happened.max()}, classes to {stated.shape[1] - 1}"
        )
    return float(((stated - np.eye(stated.shape[1])[happened.astype(int)]) ** 2).sum(axis=1).mean())
