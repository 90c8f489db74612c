"""Intervals of estimates."""

import math

import numpy as np
import pytest

from diagnostics.numerics.estimates import Estimate, combined


def test_a_normal_interval_reaches_196_standard_errors_to_either_side():
    estimate = Estimate.normal(3.0, error=2.0)
    assert estimate.half == pytest.approx(3.919927969080108)
    assert estimate == (3.0, 3.0 - estimate.half, 3.0 + estimate.half, 2.0)


def test_of_one_row_there_is_no_interval():
    estimate = combined(np.array([[2.0], [1.0]]), np.array([1.0]), [1.0, -1.0])
    assert estimate.value == 1.0
    assert np.isnan([estimate.low, estimate.high, estimate.error, estimate.half]).all()


def test_an_error_that_is_not_known_is_nan():
    assert math.isnan(Estimate(0.5, 0.4, 0.7).error)
