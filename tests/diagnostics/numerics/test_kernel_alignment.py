import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.numerics.kernel_alignment import alignment, cka, debiased_cka


def kernel(seed, rows=8, width=3):
    X = np.random.default_rng(seed).normal(size=(rows, width)) + 1
    return X @ X.T


@given(st.integers(0, 100), st.floats(0.01, 100))
def test_a_kernel_is_alike_to_itself_whatever_its_scale(seed, factor):
    K = kernel(seed)
    assert cka(K, factor * K) == pytest.approx(1)
    assert debiased_cka(K, factor * K) == pytest.approx(1)


@given(st.integers(0, 50))
def test_alignment_of_kernels_is_the_cosine_of_their_centred_entries(seed):
    K, M = kernel(seed), kernel(seed + 1000)
    n = len(K)
    H = np.eye(n) - np.ones((n, n)) / n
    first, second = H @ K @ H, H @ M @ H
    expected = np.trace(first @ second) / math.sqrt(np.trace(first @ first) * np.trace(second @ second))
    assert cka(K, M) == pytest.approx(expected)
    assert cka(K, M) == pytest.approx(cka(M, K))


def test_unrelated_kernels_of_many_features_look_alike_only_with_their_diagonals():
    pairs = [(kernel(seed, 20, 2000), kernel(seed + 500, 20, 2000)) for seed in range(20)]
    assert np.mean([cka(K, M) for K, M in pairs]) > 0.9
    assert np.mean([debiased_cka(K, M) for K, M in pairs]) == pytest.approx(0, abs=0.1)


def test_two_classes_are_aligned_as_the_formula_for_one_label_has_it():
    K, y = kernel(3, rows=6), np.array([1.0, 1, 1, 1, -1, -1])
    centred = y - y.mean()
    expected = centred @ K @ centred / (np.linalg.norm(K) * (centred @ centred))
    assert alignment(K, ["a", "a", "a", "a", "b", "b"]) == pytest.approx(expected)
    # The kernel of the centred label itself is aligned wholly.
    assert alignment(np.outer(centred, centred), y.tolist()) == pytest.approx(1)


def test_one_class_or_a_kernel_without_spread_is_aligned_with_nothing():
    assert math.isnan(alignment(kernel(0), ["a"] * 8))
    assert math.isnan(cka(np.zeros((5, 5)), kernel(0, rows=5)))
    assert math.isnan(debiased_cka(kernel(0, rows=3), kernel(1, rows=3)))
