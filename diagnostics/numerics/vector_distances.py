"""Distance scores: how far vectors lie from a reference set. They are the baselines of the likelihood ratio.

Each function takes reference vectors, one a row, and returns one distance for every other vector.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Vectors = Float[np.ndarray, "rows width"]
Distances = Float[np.ndarray, " rows"]


def mahalanobis(reference: Float[np.ndarray, "reference width"], vectors: Vectors) -> Distances:
    """Squared Mahalanobis distance to the mean, in float64; covariance shrunk after Ledoit and Wolf (2004).

    Source: Lee et al., arXiv:1807.03888, with one class. The shrunk covariance has full rank however few
    the reference vectors are. It is inverted in their span, so that no matrix of width by width is made.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    reference, vectors = reference.astype(np.float64), vectors.astype(np.float64)
    mean = reference.mean(axis=0)
    reference, vectors = reference - mean, vectors - mean
    squares = (vectors**2).sum(axis=1)
    if not reference.any():  # all reference vectors are equal: nothing to scale by
        return squares
    shrinkage = float(ledoit_wolf_shrinkage(reference, assume_centered=True))
    _, S, Vh = np.linalg.svd(reference, full_matrices=False)
    variances = S**2 / len(reference)
    floor = shrinkage * variances.sum() / reference.shape[1]
    inside = (vectors @ Vh.T) ** 2
    variances = (1 - shrinkage) * variances + floor
    # Shrinkage is 0 only with more vectors than dimensions; then nothing lies outside their span.
    outside = np.maximum(squares - inside.sum(axis=1), 0) / floor if floor else np.zeros(len(vectors))
    return (inside / variances).sum(axis=1) + outside


def cosine(reference: Float[np.ndarray, "reference width"], vectors: Vectors) -> Distances:
    """1 − largest cosine with a reference vector, from 0 to 2."""
    return 1 - (unit(vectors) @ unit(reference).T).max(axis=1)


def neighbour(reference: Float[np.ndarray, "reference width"], vectors: Vectors, k: int = 10) -> Distances:
    """Distance of unit vectors to the k-th nearest reference vector, or the farthest of fewer, from 0 to 2.

    Source: Sun et al., arXiv:2204.06507; k is ours, for sets of hundreds of rows.
    """
    cosines = unit(vectors) @ unit(reference).T
    k = min(k, cosines.shape[1])
    nearest = np.partition(cosines, -k, axis=1)[:, -k]
    return np.sqrt(np.maximum(2 - 2 * nearest, 0))


def unit(vectors: Vectors) -> Vectors:
    """Vectors scaled to length 1, in float64; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def held_out(
    distance: Callable[[Vectors, Vectors], Distances], inside: Float[np.ndarray, "inside width"],
    outside: Float[np.ndarray, "outside width"], *, folds: int = 5, seed: int = 0,
) -> tuple[Float[np.ndarray, " inside"], Float[np.ndarray, " outside"]]:  # fmt: skip
    """Distances to the inside set: of its vectors to the other folds, of others their mean over all folds."""
    order = np.random.default_rng(seed).permutation(len(inside))
    from_inside, from_outside = np.empty(len(inside)), np.zeros(len(outside))
    parts = np.array_split(order, min(folds, len(inside)))
    for part in parts:
        reference = np.delete(inside, part, axis=0)
        from_inside[part] = distance(reference, inside[part])
        if len(outside):
            from_outside += distance(reference, outside) / len(parts)
    return from_inside, from_outside
