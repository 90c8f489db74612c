"""Curves over steps: what is worked out by hand, and what no relabelling of the steps may change."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.trajectory.troughs import (
    deviations,
    last_third,
    rank_correlation,
    settled_from,
    slope,
    thirds,
    trough,
)

numbers = st.floats(-10, 10).map(lambda value: round(value, 3))
curve = st.lists(numbers, min_size=4, max_size=12).map(np.array)


def test_a_trough_is_measured_from_the_first_score_and_recovered_at_the_share_asked_for():
    steps, scores = np.array([0.0, 10, 20, 30, 40]), np.array([0.8, 0.5, 0.6, 0.75, 0.7])
    low = trough(steps, scores, recovered=0.8)
    assert low.index == 1
    # 0.8 − 0.5; (0.7 − 0.5) / 0.3; 0.5 + 0.8 · 0.3 = 0.74 is first passed at step 30, 20 after the trough.
    assert (low.depth, low.recovery) == (pytest.approx(0.3), pytest.approx(2 / 3))
    assert (low.steps_down, low.steps_up) == (10, 20)
    assert math.isnan(trough(steps, scores, recovered=1.0).steps_up)


@given(numbers, st.integers(2, 12))
def test_a_constant_series_has_depth_0_and_no_recovery(value, count):
    low = trough(np.arange(count, dtype=float), np.full(count, value))
    assert low.depth == low.steps_down == 0
    assert math.isnan(low.recovery)
    assert math.isnan(low.steps_up)


def test_scores_that_only_rise_have_no_trough():
    assert trough(np.arange(3.0), np.array([0.1, 0.2, 0.15])).depth == 0


@given(curve, st.floats(0.1, 100), st.floats(-50, 50))
def test_relabelling_the_steps_rescales_times_and_nothing_else(scores, scale, shift):
    steps = np.arange(len(scores), dtype=float)
    plain, relabelled = trough(steps, scores), trough(scale * steps + shift, scores)
    assert (plain.index, plain.depth) == (relabelled.index, relabelled.depth)
    assert plain.recovery == pytest.approx(relabelled.recovery, nan_ok=True)
    assert relabelled.steps_down == pytest.approx(scale * plain.steps_down, abs=1e-9)
    assert relabelled.steps_up == pytest.approx(scale * plain.steps_up, abs=1e-9, nan_ok=True)
    first, second = slope(steps, scores), slope(scale * steps + shift, scores)
    assert second.value * scale == pytest.approx(first.value, abs=1e-6)
    assert second.low * scale == pytest.approx(first.low, abs=1e-6)


@given(curve)
def test_a_recovery_is_at_most_what_lies_above_the_lowest_score(scores):
    low = trough(np.arange(len(scores), dtype=float), scores)
    assert low.depth >= 0
    if low.depth > 0:
        assert low.recovery >= 0
        assert (low.recovery >= 1) == (scores[-1] - scores.min() >= low.depth)


def test_a_missing_score_in_between_is_passed_over_and_at_an_end_is_not():
    steps = np.arange(4.0)
    assert trough(steps, np.array([1.0, math.nan, 0.5, 0.75])).recovery == pytest.approx(0.5)
    assert math.isnan(trough(steps, np.array([1.0, 0.2, 0.5, math.nan])).depth)


@given(curve)
def test_the_slope_is_the_median_over_pairs_of_points(scores):
    steps = np.arange(len(scores)) ** 1.5
    pairs = combinations(range(len(scores)), 2)
    expected = np.median([(scores[j] - scores[i]) / (steps[j] - steps[i]) for i, j in pairs])
    assert slope(steps, scores).value == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_four_points_is_all_that_their_pairs_say_and_of_three_there_is_none():
    # Slopes between pairs: 2, 1, 1, 0, 0.5, 1; by chance 4 points are in order once in 24 arrangements.
    estimate = slope(np.arange(4.0), np.array([0.0, 2, 2, 3]))
    assert (estimate.low, estimate.high) == (0.0, 2.0)
    rising = slope(np.arange(4.0), np.array([0.0, 1, 2, 4]))
    assert rising.low > 0
    assert math.isnan(slope(np.arange(3.0), np.array([0.0, 1, 2])).low)


def test_a_falling_point_among_five_leaves_the_rise_sure_and_two_do_not():
    # One discordant pair of ten has a chance of (1 + 4) / 120 = 4.2 %, two (1 + 4 + 9) / 120 = 12 %.
    assert slope(np.arange(5.0), np.array([0.0, 1, 2, 4, 3])).low > 0
    assert slope(np.arange(5.0), np.array([1.0, 0, 2, 4, 3])).low < 0


def test_thirds_hold_every_checkpoint_once_and_the_last_third_at_least_two():
    for count in range(4, 20):
        places = [index for part in thirds(count).values() for index in range(count)[part]]
        assert places == list(range(count))
    assert [len(range(count)[last_third(count)]) for count in (4, 6, 9, 10, 12, 13)] == [2, 2, 3, 4, 4, 5]


@given(curve)
def test_rank_correlation_is_that_of_the_ranks(scores):
    other = np.cos(np.arange(len(scores)) * 2.0)

    def ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    correlation = rank_correlation(scores, other)
    if np.ptp(scores) == 0:
        assert math.isnan(correlation)
    else:
        assert correlation == pytest.approx(np.corrcoef(ranks(scores), ranks(other))[0, 1], abs=1e-9)


def test_three_points_correlate_with_nothing():
    assert math.isnan(rank_correlation(np.arange(3.0), np.arange(3.0)))


def test_a_curve_has_settled_where_it_stays_near_its_end():
    assert settled_from(np.array([0.2, 0.995, 0.9, 0.992, 1.0]), 0.01) == 3
    assert settled_from(np.array([1.0, 1.0]), 0.01) == 0
    assert settled_from(np.array([0.1, math.nan, 1.0, 1.0]), 0.01) == 2


def test_one_comparison_takes_two_standard_errors_and_ten_take_more():
    # Two-sided at 5 % and at 0.5 %.
    assert deviations(1) == pytest.approx(1.959964)
    assert deviations(10) == pytest.approx(2.807034)
