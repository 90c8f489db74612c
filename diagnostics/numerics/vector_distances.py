"""How far a vector lies from a set of vectors: the distance scores that likelihood ratios are compared with.

Each takes known vectors, one a row, and gives a number for every vector of a second set; larger is farther.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Vectors = Float[np.ndarray, "rows width"]
Distances = Float[np.ndarray, " rows"]


def mahalanobis(known: Float[np.ndarray, "known width"], vectors: Vectors) -> Distances:
    """Squared Mahalanobis distance to the mean, in float64; covariance shrunk after Ledoit and Wolf (2004).

    Source: Lee et al., arXiv:1807.03888, with one class. The shrunk covariance has full rank however few
    vectors are known, and is inverted in the space that they span: no matrix of width by width is made.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    known, vectors = known.astype(np.float64), vectors.astype(np.float64)
    mean = known.mean(axis=0)
    known, vectors = known - mean, vectors - mean
    squares = (vectors**2).sum(axis=1)
    if not known.any():  # all known vectors are one: nothing to scale by
        return squares
    shrinkage = float(ledoit_wolf_shrinkage(known, assume_centered=True))
    _, S, Vh = np.linalg.svd(known, full_matrices=False)
    variances = S**2 / len(known)
    floor = shrinkage * variances.sum() / known.shape[1]
    along = (vectors @ Vh.T) ** 2
    variances = (1 - shrinkage) * variances + floor
    # Without shrinkage there are more vectors than dimensions, and nothing is left outside their span.
    beyond = np.maximum(squares - along.sum(axis=1), 0) / floor if floor else np.zeros(len(vectors))
    return (along / variances).sum(axis=1) + beyond


def cosine(known: Float[np.ndarray, "known width"], vectors: Vectors) -> Distances:
    """1 − largest cosine with a known vector, from 0 to 2."""
    return 1 - (unit(vectors) @ unit(known).T).max(axis=1)


def neighbour(known: Float[np.ndarray, "known width"], vectors: Vectors, k: int = 10) -> Distances:
    """Distance of unit vectors to the k-th nearest known one, or to the farthest of fewer, from 0 to 2.

    Source: Sun et al., arXiv:2204.06507; k is ours, for sets of hundreds of rows.
    """
    cosines = unit(vectors) @ unit(known).T
    k = min(k, cosines.shape[1])
    nearest = np.partition(cosines, -k, axis=1)[:, -k]
    return np.sqrt(np.maximum(2 - 2 * nearest, 0))


def unit(vectors: Vectors) -> Vectors:
    """The vectors at length 1, in float64; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def held_out(
    distance: Callable[[Vectors, Vectors], Distances],
    inside: Float[np.ndarray, "inside width"],
    outside: Float[np.ndarray, "outside width"],
    *,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " inside"], Float[np.ndarray, " outside"]]:
    """Distances of both sets to the inside one, no vector measured against a set that it is part of.

    An inside vector is measured against the other folds; an outside one against the same sets, and averaged.
    """
    order = np.random.default_rng(seed).permutation(len(inside))
    inner, outer = np.empty(len(inside)), np.zeros(len(outside))
    parts = np.array_split(order, min(folds, len(inside)))
    for part in parts:
        known = np.delete(inside, part, axis=0)
        inner[part] = distance(known, inside[part])
        if len(outside):
            outer += distance(known, outside) / len(parts)
    return inner, outer
