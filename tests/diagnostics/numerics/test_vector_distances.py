import numpy as np
import pytest

from diagnostics.numerics.vector_distances import cosine, held_out, mahalanobis, neighbour


def vectors(rows, width, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)) * np.arange(1, width + 1)


@pytest.mark.parametrize(("rows", "width"), [(50, 4), (6, 20), (20, 20)])
def test_mahalanobis_distances_are_those_of_scikit_learns_shrunk_covariance(rows, width):
    from sklearn.covariance import LedoitWolf

    reference, new = vectors(rows, width), vectors(7, width, seed=1)
    expected = LedoitWolf().fit(reference).mahalanobis(new)
    assert mahalanobis(reference, new) == pytest.approx(expected, rel=1e-9)


def test_without_any_spread_the_distance_is_euclidean():
    reference = np.tile([1.0, 2.0], (3, 1))
    assert mahalanobis(reference, np.array([[1.0, 2.0], [4.0, 6.0]])).tolist() == [0, 25]


def test_cosine_and_neighbour_distances_do_not_depend_on_length_and_agree():
    reference, new = vectors(12, 5), vectors(7, 5, seed=1)
    assert cosine(reference, 3 * new) == pytest.approx(cosine(reference, new))
    # Unit vectors at cosine c are √(2 − 2c) apart.
    assert neighbour(reference, new, k=1) == pytest.approx(np.sqrt(2 * cosine(reference, new)))
    assert (neighbour(reference, new, k=3) >= neighbour(reference, new, k=2)).all()
    farthest = np.sort(
        np.linalg.norm(
            new[:, None] / np.linalg.norm(new, axis=1)[:, None, None]
            - (reference / np.linalg.norm(reference, axis=1)[:, None])[None],
            axis=2,
        ),
        axis=1,
    )[:, -1]
    assert neighbour(reference, new, k=100) == pytest.approx(farthest)


def test_no_vector_is_measured_against_itself():
    inside = vectors(9, 3)
    inner, outer = held_out(cosine, inside, inside.copy(), folds=9)
    # One fold each: against all others. As outsiders they meet themselves in eight folds of nine.
    alone = [cosine(np.delete(inside, row, axis=0), inside[row : row + 1])[0] for row in range(9)]
    assert inner == pytest.approx(alone)
    assert outer == pytest.approx(np.array(alone) / 9)
