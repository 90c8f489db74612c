"""How alike the geometry of the same rows is under base and tuned; sources in `analysis`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diagnostics.numerics.kernel_alignment import debiased_cka

Points = Float[np.ndarray, "rows width"]

# RSA below which the representations of base and tuned are said to part.
ONSET = 0.95
# Rows that differ by less than this share of their norm differ by the round-off of float32 (ours).
ROUND_OFF = 1e-6


def rsa(X: Points, Y: Points) -> float:
    """Correlation of the cosines between pairs of rows: 1 if alike, 0 if independent, NaN without spread."""
    # Without the diagonal of ones: with it, 2,000 independent rows of width 768 would be at 0.43.
    upper = np.triu_indices(len(X), k=1)
    cosines = [(unit(points) @ unit(points).T)[upper] for points in (X, Y)]
    a, b = (values - values.mean() for values in cosines)
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 1e-12 * len(a) else math.nan


def cka(X: Points, Y: Points) -> float:
    """Debiased linear CKA; 1 for equal geometry, 0 on average for independent data; NaN without spread."""
    if not (spread(X) and spread(Y)):
        return math.nan
    return debiased_cka(*(centred(points) @ centred(points).T for points in (X, Y)))


def procrustes(X: Points, Y: Points) -> float:
    """Residual after the best rotation, scale and shift, from 0 (none) to 1; NaN without spread."""
    if not (spread(X) and spread(Y)):
        return math.nan
    X, Y = centred(X), centred(Y)
    # The singular values of XᵀY, from a product of the smaller of rows and width.
    R, S = (np.linalg.qr(points.T).R for points in (X, Y))
    common = float(np.linalg.svd(R @ S.T, compute_uv=False).sum())
    return max(0.0, 1 - common / float(np.linalg.norm(X) * np.linalg.norm(Y)))


def displacement(X: Points, Y: Points) -> float:
    """How far rows moved, as a share of base's norm; large with a small Procrustes residual: a rotation."""
    size = float(np.linalg.norm(X))
    return float(np.linalg.norm(Y - X)) / size if size else math.nan


def unit(X: Points) -> Points:
    """Rows scaled to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(X, axis=1, keepdims=True)
    return X / np.where(lengths > 0, lengths, 1)


def centred(X: Points) -> Points:
    """Columns of mean 0."""
    return X - X.mean(axis=0)


def spread(X: Points) -> bool:
    """Whether rows differ by more than round-off."""
    return bool(np.linalg.norm(centred(X)) > ROUND_OFF * np.linalg.norm(X))


def class_shift(X: Points, Y: Points, classes: Sequence[Any]) -> float:
    """Mean distance between the centres of a class in base and tuned, over base's spread within classes.

    NaN without such a spread.
    """
    members = [np.array([label == name for label in classes]) for name in sorted(set(classes), key=str)]
    within = math.sqrt(sum(float((centred(X[rows]) ** 2).sum()) for rows in members) / len(X))
    moved = [float(np.linalg.norm(Y[rows].mean(axis=0) - X[rows].mean(axis=0))) for rows in members]
    return float(np.mean(moved)) / within if within else math.nan
