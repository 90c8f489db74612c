"""Where a curve drops: by the paper's definition, by a fit that noise cannot fool, and how surely."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from diagnostics.analyses.sparsity.dropping_point import (
    Hinge,
    crossing,
    estimate_dropping_point,
    fit_bend,
    fit_hinge,
    isotonic,
    next_sparsity,
    paper_dropping_point,
    rows_needed,
    verdict_of,
)

GRID = np.arange(10) / 10
# Next-token accuracy of a small model without, and with, masked fine-tuning, and under random masks.
ZERO_SHOT = np.array([0.4904, 0.4887, 0.4853, 0.4736, 0.42, 0.3595, 0.2861, 0.1770, 0.13, 0.0908])
MASKED = np.array([0.52, 0.5187, 0.5181, 0.5181, 0.515, 0.5127, 0.5046, 0.4977, 0.4781, 0.4117])
RANDOM = np.array([0.4904, 0.3525, 0.2261, 0.1563, 0.11, 0.0893, 0.0775, 0.0732, 0.08, 0.0896])
# Sixteenths add up without rounding, so that what must be equal is equal to the last bit.
curves = st.lists(st.integers(-64, 64), min_size=4, max_size=12).map(lambda v: np.array(v) / 16)


def still(curve, draws=50):
    """Draws that are all the curve itself: what a set of rows without any noise would give."""
    return np.repeat(np.asarray(curve, dtype=float)[None], draws, axis=0)


def estimate(curve, drawn=None, **settings):
    about = {"tolerance": 0.01, "relative": False, "step": 0.1, "rows": 1000, **settings}
    curve = np.asarray(curve, dtype=float)
    return estimate_dropping_point(
        GRID[: len(curve)], curve, still(curve) if drawn is None else drawn, **about
    )


# --- the isotonic fit and the crossing ---


@given(st.lists(st.lists(st.integers(-64, 64), min_size=6, max_size=6), min_size=1, max_size=5))
def test_the_fit_is_what_pooling_adjacent_violators_gives(rows):
    values = np.array(rows) / 16
    pooled = [IsotonicRegression(increasing=False).fit_transform(np.arange(6), row) for row in values]
    np.testing.assert_allclose(isotonic(values), pooled, atol=1e-12)


@given(curves)
def test_a_curve_that_never_rises_is_its_own_fit(curve):
    falling = np.sort(curve)[::-1]
    assert np.array_equal(isotonic(falling[None])[0], falling)


def test_the_crossing_is_linear_between_the_points_around_it():
    # 1.0 - 0.3 = 0.7 lies a quarter of the way from 0.8 at 0.2 to 0.4 at 0.3.
    last, point = crossing(GRID[:5], np.array([[1.0, 0.9, 0.8, 0.4, 0.1]]), np.array([0.3]))
    assert last[0] == 2
    assert point[0] == pytest.approx(0.225)


def test_a_dip_by_noise_is_no_crossing():
    # Pooled with the point behind it, the dip to 0.97 is at 0.985, within 0.02; the paper's definition falls
    # for it, and then again at the true edge.
    curve = np.array([1.0, 0.97, 1.0, 0.99, 0.5, 0.4])
    assert estimate(curve, tolerance=0.02).at == 0.3
    point = paper_dropping_point(GRID[:6], curve, 0.02)
    assert (point.at, point.until, point.crossings) == (0.0, 0.1, 2)


@given(curves, st.integers(1, 64), st.integers(0, 64))
def test_the_point_rises_with_the_tolerance_and_lies_in_its_bracket(curve, small, more):
    points = np.arange(len(curve)) / 16
    before = -1.0
    for allowed in (small / 16, (small + more) / 16):
        last, point = crossing(points, curve[None], np.array([allowed]))
        assert point[0] >= before
        before = point[0]
        after = min(last[0] + 1, len(points) - 1)
        assert points[last[0]] <= point[0] <= points[after]


@given(curves, st.integers(1, 64), st.integers(-640, 640))
def test_a_constant_added_to_the_curve_changes_nothing(curve, allowed, constant):
    points = np.arange(len(curve)) / 16
    given_ = np.array([allowed / 16])
    plain, shifted = (crossing(points, values[None], given_) for values in (curve, curve + constant / 16))
    assert plain[0] == shifted[0]
    assert plain[1] == pytest.approx(shifted[1], abs=1e-9)
    assert paper_dropping_point(points, curve, allowed / 16) == paper_dropping_point(
        points, curve + constant / 16, allowed / 16
    )
    first, second = fit_hinge(points, curve), fit_hinge(points, curve + constant / 16)
    assert first.dbic == pytest.approx(second.dbic, abs=1e-3)


def test_a_drop_of_exactly_the_tolerance_is_tolerated_whatever_rounding_makes_of_it():
    assert 0.9 - 0.89 > 0.01  # in floating point
    assert estimate([0.9, 0.89, 0.5, 0.4]).at == 0.1


# --- the paper's definition ---


def test_the_papers_point_is_the_last_before_the_fall_with_its_share_of_the_remaining_weights():
    # Within 1 point up to 0.2 (0.4853 >= 0.4804), not at 0.3. From 0.2 to 0.3, 0.1 / 0.8 of the rest goes.
    point = paper_dropping_point(GRID, ZERO_SHOT, 0.01)
    assert (point.at, point.until, point.crossings) == (0.2, 0.3, 1)
    assert point.rho == pytest.approx(0.125)
    assert paper_dropping_point(GRID, MASKED, 0.01).at == 0.5


def test_a_curve_that_stays_within_the_tolerance_is_not_reached():
    result = estimate(np.full(10, 0.3))
    assert not result.reached
    assert (result.paper.at, result.at, result.point, result.verdict) == (0.9, 0.9, 0.9, "not reached")
    assert math.isnan(result.until)
    assert math.isnan(result.paper.until)


# --- the hinge ---


def naive(points, curve):
    """The hinge by normal equations, with BIC written out."""
    n, best = len(curve), None
    for at in points[1:-1]:
        X = np.array([[1, s, max(s - at, 0)] for s in points])
        b = np.linalg.solve(X.T @ X, X.T @ curve)
        rss = float(np.sum((curve - X @ b) ** 2))
        best = min(best or (math.inf,), (rss, at, b[1], b[1] + b[2]))
    X = np.array([[1, s] for s in points])
    line = float(np.sum((curve - X @ np.linalg.solve(X.T @ X, X.T @ curve)) ** 2))
    bic = [n * math.log(rss / n) + k * math.log(n) for rss, k in ((line, 2), (best[0], 4))]
    return best[1], best[2], best[3], bic[0] - bic[1]


@pytest.mark.parametrize("curve", [ZERO_SHOT, MASKED, RANDOM])
def test_the_hinge_is_the_best_of_all_breakpoints(curve):
    hinge = fit_hinge(GRID, curve)
    np.testing.assert_allclose((hinge.at, hinge.before, hinge.after, hinge.dbic), naive(GRID, curve))


def test_a_line_prefers_two_parameters_to_four():
    # Both fit perfectly: 2 log 10 - 4 log 10 = -4.605.
    assert fit_hinge(GRID, 1 - 0.5 * GRID).dbic == pytest.approx(-2 * math.log(10))
    assert fit_hinge(GRID, np.full(10, 0.3)).dbic == pytest.approx(-2 * math.log(10))


def test_too_few_points_for_four_parameters_are_refused():
    with pytest.raises(ValueError, match="3 points; a hinge has 4 parameters"):
        fit_hinge(GRID[:3], np.ones(3))


@pytest.mark.parametrize("bend", range(2, 8))
def test_a_planted_bend_is_found_within_one_step(bend):
    # The curve falls by 0.1 a step behind the bend; noise has 0.2 of that as its standard deviation.
    clean = 1 - np.maximum(np.arange(10) - bend, 0) * 0.1
    bends = [
        fit_hinge(GRID, clean + 0.02 * np.random.default_rng(seed).normal(size=10)).at for seed in range(200)
    ]
    assert np.mean(np.abs(np.array(bends) - GRID[bend]) <= 0.1 + 1e-9) >= 0.99


@pytest.mark.parametrize("center", [0.3, 0.4, 0.5, 0.6])
def test_a_cliff_onto_a_floor_is_sharp_wherever_it_stands(center):
    # Fitted whole, such a cliff has two bends of which a hinge follows neither, or the wrong one.
    cliff = 0.1 + 0.5 / (1 + np.exp((GRID - center) / 0.02))
    assert fit_hinge(GRID, 0.1 + 0.5 / (1 + np.exp((GRID - 0.4) / 0.02))).dbic < 2
    result = estimate(cliff)
    assert result.verdict == "sharp"
    # Within 1 point up to one step before the center: 0.5 / (1 + e^5) = 0.003 lower.
    assert result.at == pytest.approx(center - 0.1)
    assert result.hinge.until == pytest.approx(center + 0.1)  # 0.997 of the fall is done there


def test_without_a_plateau_or_a_floor_the_whole_curve_is_fitted():
    assert fit_bend(GRID, RANDOM, plateau=False).until == 0.9
    assert fit_bend(GRID, ZERO_SHOT, plateau=True) == fit_hinge(GRID, ZERO_SHOT)


# --- the verdict ---


def test_the_verdicts_on_known_shapes():
    result = estimate(ZERO_SHOT)
    assert result.verdict == "sharp"
    assert result.hinge.dbic > 10
    assert result.hinge.after < 3 * result.hinge.before < 0
    assert estimate(MASKED).verdict == "sharp"
    # 1 point is gone at 0.01 / 0.5 = 0.02, before the first step of the grid.
    line = estimate(1 - 0.5 * GRID)
    assert (line.verdict, line.at, line.until) == ("no plateau", 0.0, 0.1)
    assert line.point == pytest.approx(0.02)
    # A line of the same slope that tolerates 6 points has no bend.
    assert estimate(1 - 0.5 * GRID, tolerance=0.06).verdict == "gradual"
    collapsed = estimate(RANDOM)
    assert (collapsed.verdict, collapsed.at, collapsed.until) == ("no plateau", 0.0, 0.1)
    assert collapsed.hinge.before < -1 < -0.2 < collapsed.hinge.after  # convex


@pytest.mark.parametrize(
    ("before", "after", "dbic", "expected"),
    [
        (-0.125, -0.375, 10.1, "sharp"),
        (-0.125, -0.37, 10.1, "unclear"),  # less than three times as steep
        (-0.125, -0.375, 10.0, "unclear"),
        (0.125, -0.375, 10.1, "sharp"),
        (-0.125, -0.375, 2.0, "gradual"),
        (-0.375, -0.125, 2.0, "gradual"),
        (-0.375, -0.125, 2.1, "no plateau"),  # convex
        (-0.375, -0.125, 50.0, "no plateau"),
    ],
)
def test_the_word_follows_the_bend(before, after, dbic, expected):
    bent = Hinge(at=0.5, before=before, after=after, dbic=dbic, until=0.9)
    assert verdict_of(at=0.1, reached=True, step=0.1, bent=bent) == expected
    assert verdict_of(at=0.08, reached=True, step=0.1, bent=bent) == "no plateau"
    assert verdict_of(at=0.9, reached=False, step=0.1, bent=bent) == "not reached"


# --- how surely ---


def sampled(curve, rows, draws=400, seed=0):
    """Answers of so many rows, each right up to a sparsity of its own, and their resampled accuracies."""
    generator = np.random.default_rng(seed)
    right = generator.random(rows)[None] < np.asarray(curve)[:, None]
    copies = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws)
    return right.mean(axis=1), copies @ right.T / rows


def test_the_interval_is_of_the_crossing_of_every_draw_by_itself():
    curve, drawn = sampled(ZERO_SHOT, 4000)
    result = estimate(curve, drawn, rows=4000, least=1.96 / 4000)
    alone = [crossing(GRID, sample[None], np.array([0.01]))[1][0] for sample in drawn]
    np.testing.assert_allclose(result.points, alone)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(alone, [0.025, 0.975])))
    assert result.low <= result.point <= result.high
    assert result.decided


def test_what_few_rows_cannot_tell_is_not_decided_and_says_how_many_would():
    curve, drawn = sampled(ZERO_SHOT, 60, seed=1)
    result = estimate(curve, drawn, rows=60, least=1.96 / 60)
    assert not result.decided
    assert result.verdict == "unclear"
    assert result.rows_needed > 60
    enough = estimate(curve, drawn, rows=60, least=1.96 / 60, tolerance=0.3)
    assert enough.decided


def test_a_fall_far_beyond_the_noise_is_decided_though_it_is_noisy_itself():
    # At 0.3 everything is lost, give or take 4 points; up to 0.2 nothing is, give or take none.
    curve = np.array([0.9, 0.9, 0.9, 0.3, 0.2])
    drawn = still(curve, 200)
    drawn[:, 3] += np.linspace(-0.04, 0.04, 200)
    assert estimate(curve, drawn, rows=10_000).decided
    # Give or take 2 points at 0.2, a drop of 1 cannot be told.
    drawn[:, 2] += np.linspace(-0.02, 0.02, 200)
    result = estimate(curve, drawn, rows=10_000)
    assert not result.decided
    # The middle 95 % of 4 points have a half-width of 1.9: 10 000 x (1.9 / 1)² rows.
    assert result.half_width == pytest.approx(0.019, rel=1e-3)
    assert result.rows_needed == pytest.approx(36_100, rel=1e-3)


def test_that_no_row_disagrees_is_no_proof_from_few_rows():
    # The bracket is seen without any spread; of 100 rows one is a point, which cannot prove a drop below it.
    curve = [0.9, 0.9, 0.9, 0.3, 0.2]
    assert not estimate(curve, rows=100, least=1.96 / 100).decided
    assert estimate(curve, rows=196, least=1.96 / 196).decided


def test_a_first_step_that_fails_surely_is_decided():
    result = estimate([0.9, 0.5, 0.3, 0.2], rows=50, least=1.96 / 50)
    assert (result.at, result.decided, result.verdict) == (0.0, True, "no plateau")


def test_the_rows_needed_are_those_of_paired_predictions():
    # Where a share d of rows disagrees, the half-width of n rows is 1.96 √(d / n), so that 1 point at d = 5 %
    # needs (1.96 / 0.01)² x 0.05 = 1 920.8 rows, however many gave the estimate.
    for rows in (100, 5000):
        assert rows_needed(rows, 1.96 * math.sqrt(0.05 / rows), 0.01) == 1921


def test_a_relative_tolerance_is_a_share_of_the_first_value_in_every_draw():
    # Losses of 2.0: 1 % is 0.02, so that the drop of 0.015 at 0.2 is tolerated and that of 0.03 is not. With
    # all losses doubled, as in every draw, the crossing is the same.
    curve = -np.array([2.0, 2.0, 2.015, 2.03, 2.5])
    result = estimate(curve, 2 * still(curve), relative=True)
    assert result.allowed == pytest.approx(0.02)
    assert result.at == pytest.approx(0.2)
    np.testing.assert_allclose(result.points, result.point)
    # 0.005 of the 0.015 between 0.2 and 0.3
    assert result.point == pytest.approx(0.2 + 0.1 / 3)


# --- where to measure next ---


def measured(curve_at, *, allowed, step, most):
    """The sparsities that are asked for one after the other."""
    points = list(GRID)
    asked = []
    for _ in range(most):
        sparsity = next_sparsity(points, [curve_at(s) for s in points], allowed=allowed, step=step)
        if sparsity is None:
            break
        asked.append(sparsity)
        points = sorted([*points, sparsity])
    return asked, points


@given(st.floats(0.005, 0.895))
def test_the_bracket_of_any_edge_is_one_step_wide_after_three_evaluations(edge):
    def flat_then_down(s):
        return 1.0 if s <= edge else 0.0

    asked, points = measured(flat_then_down, allowed=0.01, step=0.02, most=3)
    at = max(s for s in points if s <= edge)
    until = min(s for s in points if s > edge)
    assert until - at == pytest.approx(0.02)
    # All are whole steps, none is measured twice.
    assert all(abs(s / 0.02 - round(s / 0.02)) < 1e-9 for s in asked)
    assert len(set(points)) == len(points)


def test_what_is_left_is_spent_where_the_curve_bends():
    def bends_late(s):  # 1 point is gone at 0.22, the bend is at 0.7
        return 1 - 0.045 * s - 5 * max(s - 0.7, 0)

    asked, points = measured(bends_late, allowed=0.01, step=0.02, most=4)
    crossed = [s for s in asked if 0.2 < s < 0.3]
    assert crossed == asked[: len(crossed)]
    assert all(0.6 < s < 0.8 for s in asked[len(crossed) :])
    assert asked[:2] == [0.24, 0.22]
    assert len(asked) == 4
    assert {0.22, 0.24} <= set(points)


def test_where_nothing_is_crossed_nothing_more_is_measured():
    assert next_sparsity(list(GRID), [0.3] * 10, allowed=0.01, step=0.02) is None


def test_a_grid_finer_than_the_step_is_not_refined():
    points = [0.0, 0.01, 0.02, 0.03]
    assert next_sparsity(points, [1.0, 1.0, 0.0, 0.0], allowed=0.01, step=0.02) is None
