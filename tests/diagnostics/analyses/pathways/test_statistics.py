"""How sure mean distances are, whether gaps are chance, and when samples were memorised."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diagnostics.analyses.pathways.statistics import (
    SampleStatistic,
    chosen_epsilon,
    correlation,
    gap_p,
    halfway,
    mean,
    memorised_at,
    pairs,
    pairs_of_groups,
    redrawn,
)

# Small cases tell nearly all; a hundred of each take long.
FEW = settings(max_examples=40)


def distances_of(points):
    """A matrix of distances between points on a line."""
    return np.abs(np.subtract.outer(points, points)).astype(float)


@st.composite
def grouped(draw):
    """Distances between samples of one to three groups."""
    count = draw(st.integers(2, 9))
    points = draw(arrays(np.float64, count, elements=st.integers(-5, 5)))
    groups = np.array([0, *draw(st.lists(st.integers(0, 2), min_size=count - 1, max_size=count - 1))])
    return distances_of(points), np.unique(groups, return_inverse=True)[1].astype(np.int64)


def means_naively(D, groups, group=None):
    """Mean over pairs within groups and between, or of one group and against the others; NaN of none."""
    within, between = [], []
    for i, j in combinations(range(len(groups)), 2):
        if group is not None and group not in (groups[i], groups[j]):
            continue
        (within if groups[i] == groups[j] else between).append(D[i, j])
    return tuple(math.fsum(part) / len(part) if part else math.nan for part in (within, between))


# --- means over pairs ---


@FEW
@given(grouped())
def test_means_over_pairs_are_those_of_a_loop_over_pairs(grouping):
    D, groups = grouping
    for means, group in (
        (pairs(D, groups), None),
        *((of_group, g) for g, of_group in enumerate(pairs_of_groups(D, groups))),
    ):
        within, between = means_naively(D, groups, group)
        assert means.within.value == pytest.approx(within, nan_ok=True)
        assert means.between.value == pytest.approx(between, nan_ok=True)
        assert means.gap.value == pytest.approx(between - within, nan_ok=True)
    upper = [D[i, j] for i, j in combinations(range(len(groups)), 2)]
    assert pairs(D, groups).overall.value == pytest.approx(math.fsum(upper) / len(upper))


def test_the_standard_error_of_one_group_is_twice_that_of_the_row_means():
    D = distances_of(np.array([0.0, 1.0, 3.0, 7.0, 8.0]))
    rows = D.sum(axis=1) / 4
    means = pairs(D, np.zeros(5, dtype=np.int64))
    assert means.within.estimate.error == pytest.approx(2 * rows.std(ddof=1) / math.sqrt(5))
    assert means.gap.estimate.error != means.gap.estimate.error  # no other group
    # Student's t with 4 degrees of freedom: 2.776
    within = means.within.estimate
    assert (within.high - within.low) / 2 == pytest.approx(2.7764451 * within.error)


def test_standard_errors_are_what_drawing_samples_anew_from_their_groups_gives():
    generator = np.random.default_rng(0)
    estimates = {"within": [], "gap": []}
    errors = {"within": [], "gap": []}
    sizes = (30, 20)
    groups = np.repeat([0, 1], sizes)
    for _ in range(400):
        points = np.concatenate([generator.normal(0, 1, sizes[0]), generator.normal(1.5, 0.5, sizes[1])])
        means = pairs(distances_of(points), groups)
        for name in estimates:
            estimates[name].append(getattr(means, name).value)
            errors[name].append(getattr(means, name).estimate.error)
    for name in estimates:
        # An error of 1/√800 of the spread itself, 3.5 %, at 3 standard deviations.
        assert np.mean(errors[name]) == pytest.approx(np.std(estimates[name]), rel=0.12)


def test_a_change_is_judged_in_pairs_of_the_same_samples():
    generator = np.random.default_rng(0)
    points, groups = generator.normal(size=40), np.repeat([0, 1], 20)
    before, after = pairs(distances_of(points), groups), pairs(distances_of(0.9 * points), groups)
    change = after.within.minus(before.within)
    assert change.value == pytest.approx(-0.1 * before.within.value)
    assert change.estimate.error == pytest.approx(
        0.1 * before.within.estimate.error
    )  # not √2 of it, as of other samples


@FEW
@given(
    arrays(np.float64, 6, elements=st.floats(-3, 3) | st.just(math.nan)),
    arrays(np.float64, 6, elements=st.integers(1, 5)),
)
def test_a_mean_counts_units_and_passes_over_what_is_unknown(values, units):
    groups = np.zeros(6, dtype=np.int64)
    finite = ~np.isnan(values)
    if not finite.any():
        assert math.isnan(mean(values, groups, units).value)
        return
    assert mean(values, groups, units).value == pytest.approx(
        math.fsum(values[finite]) / math.fsum(units[finite]), abs=1e-12
    )
    assert mean(values, groups).value == pytest.approx(math.fsum(values[finite]) / finite.sum(), abs=1e-12)


def test_the_standard_error_of_a_mean_is_the_usual_one():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert mean(values, np.zeros(4, dtype=np.int64)).estimate.error == pytest.approx(values.std(ddof=1) / 2)


def test_groups_of_one_have_no_interval():
    alone = mean(np.array([1.0, 2.0]), np.array([0, 1]))
    assert math.isnan(alone.estimate.error)
    assert np.isnan([alone.estimate.low, alone.estimate.high]).all()


# --- the gap ---


def test_the_permutation_test_counts_labellings_with_as_large_a_gap():
    # Two groups of 3 far apart: of the 20 ways to choose 3 of 6, that one and its mirror have the gap.
    D = distances_of(np.array([0.0, 0.1, 0.2, 9.0, 9.1, 9.2]))
    p, per_group = gap_p(D, np.repeat([0, 1], 3), permutations=4000, seed=0)
    # 0.1 ± 0.0047; 3 standard deviations
    assert p == pytest.approx(0.1, abs=0.015)
    assert per_group == pytest.approx([0.1, 0.1], abs=0.015)


def test_groups_that_are_none_give_even_p_values():
    generator = np.random.default_rng(1)
    p_values = [
        gap_p(distances_of(generator.normal(size=12)), np.repeat([0, 1, 2], 4), permutations=99, seed=seed)[0]
        for seed in range(200)
    ]
    # Uniform on 0.01 … 1: the mean is 0.505, give or take 0.289/√200 = 0.02.
    assert np.mean(p_values) == pytest.approx(0.505, abs=0.07)
    assert np.mean(np.array(p_values) <= 0.2) == pytest.approx(0.2, abs=0.09)


def test_where_there_is_no_gap_there_is_no_p():
    D = distances_of(np.arange(4.0))
    assert math.isnan(gap_p(D, np.zeros(4, dtype=np.int64), permutations=100, seed=0)[0])
    assert math.isnan(gap_p(D, np.arange(4), permutations=100, seed=0)[0])
    overall, per_group = gap_p(D, np.array([0, 0, 0, 1]), permutations=100, seed=0)
    assert overall > 0
    assert np.isnan(per_group).tolist() == [False, True]  # one sample has no pair of its own


# --- memorisation ---


def memorised_naively(losses, epsilon, delta):
    """The first t with l(u) <= epsilon and |l(u) − l(last)| <= delta for all u >= t."""
    steps = []
    for sample in losses.T:
        held = [
            t for t in range(len(sample))
            if all(u <= epsilon and abs(u - sample[-1]) <= delta for u in sample[t:])
        ]  # fmt: skip
        steps.append(min(held, default=len(sample)))
    return steps


@FEW
@given(
    arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 5)), elements=st.integers(0, 30)),
    st.integers(0, 30),
    st.integers(0, 5),
)
def test_a_sample_is_memorised_when_the_rule_of_the_paper_holds_for_good(sixteenths, epsilon, delta):
    # Sixteenths, so that sums are exact.
    losses, epsilon, delta = sixteenths / 16, epsilon / 16, delta / 16
    assert memorised_at(losses, epsilon, delta).tolist() == memorised_naively(losses, epsilon, delta)


def test_a_constant_low_loss_is_memorised_at_once_and_a_late_spike_puts_it_off():
    constant, spike, never = [0.1] * 5, [0.1, 0.1, 0.1, 0.2, 0.1], [2.0, 0.1, 0.1, 0.1, math.nan]
    assert memorised_at(np.array([constant, spike, never]).T, 0.5).tolist() == [0, 4, 5]


def test_epsilon_is_the_smallest_on_the_grid_with_which_20_to_25_percent_are_memorised():
    # Losses of 10 samples settle at 0.05, 0.15 … 0.95: an epsilon of 0.2 memorises two of them, 0.3 three.
    final = np.arange(10) / 10 + 0.05
    losses = np.stack([final + 2, final, final])
    assert chosen_epsilon(losses) == (0.2, 0.2)
    # All settle at 0.45: none below 0.5 and all from there on. 0 is nearer to 20 % than 1.
    assert chosen_epsilon(np.full((3, 4), 0.45)) == (0.1, 0.0)
    # All near 0: every epsilon memorises all.
    assert chosen_epsilon(np.full((3, 4), 0.01)) == (0.1, 1.0)


# --- steps ---


def test_half_of_the_way_is_found_between_the_checkpoints_around_it():
    values = np.array([0.0, 0.1, 0.4, 0.8, 1.0])
    # From 0.4 at 20 to 0.8 at 40, half is a quarter of the way: 25.
    placed = halfway([0.0, 10.0, 20.0, 40.0, 80.0], values, np.tile(values, (9, 1)))
    assert placed[:3] == (pytest.approx(25), 20, 40)


def test_half_of_the_way_is_made_for_good_and_may_be_downhill():
    values = -np.array([0.0, 0.9, 0.2, 1.0])
    assert halfway([0.0, 1.0, 2.0, 3.0], values, np.tile(values, (9, 1))).value == pytest.approx(
        2 + 0.3 / 0.8
    )


def test_drawing_samples_anew_widens_the_interval_of_a_step():
    values = np.array([0.0, 0.4, 0.8, 1.0])
    later = np.array([0.0, 0.1, 0.2, 1.0])
    placed = halfway([0.0, 10.0, 20.0, 30.0], values, np.array([values] * 50 + [later] * 50))
    assert (placed.low, placed.high) == (10, pytest.approx(20 + 10 * 0.3 / 0.8))


def test_redrawn_estimates_spread_by_their_standard_error_and_move_together():
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1], 30)
    statistics = [mean(generator.normal(size=60), groups)]
    statistics.append(SampleStatistic(value=7.0, influence=2 * statistics[0].influence, groups=groups))
    drawn = redrawn(statistics, draws=4000, seed=0)
    assert drawn.mean(axis=0) == pytest.approx(
        [statistics[0].value, 7.0], abs=5 * statistics[1].estimate.error / math.sqrt(4000)
    )
    assert drawn.std(axis=0) == pytest.approx(
        [statistics[0].estimate.error, statistics[1].estimate.error], rel=0.05
    )
    assert drawn[:, 1] - 7 == pytest.approx(2 * (drawn[:, 0] - statistics[0].value))


# --- correlations ---


@FEW
@given(arrays(np.float64, (2, 8), elements=st.integers(-4, 4)), st.integers(-2, 2))
def test_correlations_with_a_lag_are_those_of_scipy_on_shifted_series(values, lag):
    from scipy.stats import pearsonr, spearmanr

    x, y = values
    leading, lagged = x[max(-lag, 0) : 8 - max(lag, 0)], y[max(lag, 0) : 8 - max(-lag, 0)]
    result = correlation(x, y, lag=lag, permutations=100)
    assert result.points == 8 - abs(lag)
    if not np.ptp(leading) or not np.ptp(lagged):
        assert math.isnan(result.spearman)
        return
    assert result.pearson == pytest.approx(pearsonr(leading, lagged)[0], abs=1e-9)
    assert result.spearman == pytest.approx(spearmanr(leading, lagged)[0], abs=1e-9)


def test_below_6_checkpoints_no_correlation_is_given():
    x = np.arange(7.0)
    assert correlation(x, x).spearman == pytest.approx(1)
    for points in (
        correlation(x, x, lag=2),
        correlation(x[:5], x[:5]),
        correlation(np.where(x < 2, math.nan, x), x),
    ):
        assert points.points == 5
        assert np.isnan([points.pearson, points.spearman, points.p]).all()
