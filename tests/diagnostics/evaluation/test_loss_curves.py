"""What loss curves over α say: barriers, bumps, lags, patterns, and the rule for stragglers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.sharpness import stragglers
from diagnostics.analyses.sharpness.stragglers import ScreenedLayer
from diagnostics.evaluation import loss_curves
from diagnostics.numerics import estimates
from diagnostics.numerics.estimates import Estimate

GRID = np.array([0, 0.25, 0.5, 0.75, 1])
losses = st.lists(st.floats(-5, 5), min_size=5, max_size=5).map(np.array)
answers = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.booleans(), min_size=n, max_size=n).map(np.array) for _ in range(3)))
)


def test_a_barrier_is_the_largest_excess_over_the_chord():
    # chord from 1 to 3: 1, 1.5, 2, 2.5, 3; excess 0, 0.5, 0.25, -1, 0
    curve = np.array([1.0, 2, 2.25, 1.5, 3])
    assert loss_curves.barrier(GRID, curve) == 0.5
    assert loss_curves.highest(GRID, curve) == 1
    # no point is above 3 or below 1
    assert loss_curves.bump(curve) == loss_curves.dip(curve) == 0
    assert loss_curves.bump(np.array([1.0, 4, 2])) == 2
    assert loss_curves.dip(np.array([1.0, 0.25, 2])) == 0.75


def test_a_bend_between_ends_of_other_heights_is_a_barrier_and_no_bump():
    assert loss_curves.barrier(GRID, np.array([7.0, 7, 6, 5, 0])) == pytest.approx(3.25)  # chord 1.75 at 0.75
    assert loss_curves.bump(np.array([7.0, 7, 6, 5, 0])) == 0


@given(losses)
def test_barrier_bump_and_dip_are_those_of_a_naive_computation(curve):
    excess = [curve[i] - ((1 - a) * curve[0] + a * curve[-1]) for i, a in enumerate(GRID)]
    assert loss_curves.barrier(GRID, curve) == pytest.approx(max(0, *excess), abs=1e-12)
    assert loss_curves.bump(curve) == pytest.approx(max(curve) - max(curve[0], curve[-1]))
    assert loss_curves.dip(curve) == pytest.approx(min(curve[0], curve[-1]) - min(curve))
    # A bump lies above the chord at least as far; neither knows which end is which.
    assert loss_curves.bump(curve) <= loss_curves.barrier(GRID, curve) + 1e-9
    assert loss_curves.bump(curve) == loss_curves.bump(curve[::-1])
    assert loss_curves.barrier(GRID, curve) == pytest.approx(loss_curves.barrier(GRID, curve[::-1]), abs=1e-9)


@given(st.floats(0, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_a_convex_curve_has_neither_barrier_nor_bump(bend, slope, height):
    curve = bend * GRID**2 + slope * GRID + height
    assert loss_curves.barrier(GRID, curve) < 1e-12
    assert loss_curves.bump(curve) < 1e-12


def test_what_was_not_measured_is_passed_over():
    curve = np.array([1, math.nan, 4, math.nan, 1])
    assert loss_curves.barrier(GRID, curve) == 3
    assert loss_curves.bump(curve) == 3
    assert loss_curves.highest(GRID, curve) == 2
    assert math.isnan(loss_curves.lag(GRID, curve))
    assert loss_curves.best_alpha(GRID, {"one": curve}) == 1.0  # of equals the nearest to tuned


def test_half_of_what_is_won_is_won_at_half_on_a_straight_line_and_later_on_a_late_one():
    assert loss_curves.lag(GRID, 3 - 2 * GRID) == pytest.approx(0.5)
    # from 2 to 0: half is 1, reached between 0.75 (1.5) and 1 (0) after a third of the step
    assert loss_curves.lag(GRID, np.array([2, 2, 1.75, 1.5, 0])) == pytest.approx(0.75 + 0.25 / 3)
    assert math.isnan(loss_curves.lag(GRID, np.array([1.0, 1, 1, 1, 1])))


def test_the_error_of_a_difference_is_that_of_a_ratio_over_rows():
    nats, units = np.array([[2.0, 6, 3], [1.0, 4, 3]]), np.array([1.0, 2, 3])
    difference = estimates.combined(nats, units, [1.0, -1.0])
    # differences 1, 2, 0 over 6 units: 0.5; rests 0.5, 1, -1.5; sqrt(3/2 * 3.5) / 6
    assert difference.value == pytest.approx(0.5)
    assert difference.error == pytest.approx(math.sqrt(1.5 * 3.5) / 6)
    assert estimates.combined(nats[:1], units, [0.0]) == (0, 0, 0, 0)
    assert math.isnan(estimates.combined(nats[:, :1], units[:1], [1.0, -1.0]).error)


def test_a_hole_beyond_its_noise_is_a_strong_failure_even_beside_a_gain():
    none, sure, unsure = Estimate.normal(-1.0, 0.1), Estimate.normal(0.3, 0.1), Estimate.normal(0.1, 0.1)
    assert loss_curves.outcome([none, sure], [none, unsure]) == "success"
    assert loss_curves.outcome([none, unsure], [none, none]) == "weak"
    assert loss_curves.outcome([sure, none], [none, sure]) == "strong"
    assert loss_curves.outcome([Estimate.normal(1.0, math.nan)], [Estimate.normal(1.0, math.nan)]) == "weak"


@given(answers)
def test_the_eight_patterns_add_to_one_and_give_back_the_accuracy_of_the_blend(given):
    base, tuned, blend = given
    shares = loss_curves.patterns(base, tuned, blend)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(share for name, share in shares.items() if name.endswith("T")) == pytest.approx(blend.mean())
    assert shares["FFT"] == pytest.approx(np.mean(~base & ~tuned & blend))
    assert shares["TTF"] == pytest.approx(np.mean(base & tuned & ~blend))
    for end in (base, tuned):
        ends = loss_curves.patterns(base, tuned, end)
        assert ends["FFT"] == ends["TTF"] == 0


@given(st.floats(0, 1), st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)), min_size=1, max_size=9))
def test_the_mixture_of_both_ends_is_no_worse_than_its_chord(alpha, nats):
    base, tuned = np.array(nats).T
    mixed = loss_curves.ensemble_nats(base, tuned, alpha)
    assert mixed == pytest.approx(-np.log((1 - alpha) * np.exp(-base) + alpha * np.exp(-tuned)))
    assert (mixed <= (1 - alpha) * base + alpha * tuned + 1e-9).all()  # Jensen


# --- stragglers ---


def layer(barrier, *, error=0.001, repairs=(1.0, 1.0), rewind=0.0, moved=0.1):
    return ScreenedLayer(
        Estimate.normal(barrier, error),
        tuple(Estimate.normal(repair, 0.01) for repair in repairs),
        Estimate.normal(rewind, 0.01),
        moved,
    )


def straggling(*layers, barrier=0.0):
    return stragglers.stragglers(layers, barrier).tolist()


def test_a_barrier_that_stands_out_and_that_pinning_repairs_is_a_straggler():
    quiet = layer(0.0)
    assert straggling(quiet, layer(0.5), quiet, quiet) == [False, True, False, False]
    # below 0.05 nats, or within 2 standard errors, there is none to speak of
    assert straggling(quiet, layer(0.049), quiet, quiet) == [False] * 4
    assert straggling(quiet, layer(0.5, error=0.26), quiet, quiet) == [False] * 4
    # and without a repair it is not to blame
    assert straggling(quiet, layer(0.5, repairs=(-1.0, 0.019)), quiet, quiet) == [False] * 4
    assert straggling(quiet, layer(0.5, repairs=(-1.0, 0.02)), quiet, quiet) == [False, True, False, False]


def test_a_layer_that_carries_its_equal_share_of_the_barrier_is_no_straggler():
    # four layers of a barrier of 2 nats: 0.5 is an equal share, and 1.0 twice that
    shares = [layer(value) for value in (0.3, 0.5, 0.6, 0.7)]
    # the z-score of 0.7: 0.6745 * (0.7 - 0.55) / 0.1 = 1.01
    assert straggling(*shares, barrier=2.0) == [False] * 4
    spread = [layer(value) for value in (0.3, 0.5, 0.7, 1.0)]
    # median 0.6, deviations 0.3, 0.1, 0.1, 0.4, MAD 0.2: z = 1.35, but 1.0 is twice its share
    assert straggling(*spread, barrier=2.0) == [False, False, False, True]


def test_the_modified_z_score_has_a_floor_under_its_spread():
    values = np.array([0, 0, 0, 0.001, 0.02])
    # median 0, MAD 0: 0.6745 * 0.02 / 0.005 = 2.698
    assert stragglers.modified_z(values, 0.005)[-1] == pytest.approx(2.698)


def test_a_layer_without_a_barrier_that_tuned_needs_is_load_bearing_and_no_straggler():
    quiet = [layer(0.0, rewind=value, moved=0.1) for value in (0.01, 0.02, 0.015)]
    needed = layer(0.0, rewind=1.0, moved=0.4)
    assert stragglers.load_bearing([*quiet, needed], 0.0).tolist() == [False, False, False, True]
    still = layer(0.0, rewind=1.0, moved=0.05)
    assert not stragglers.load_bearing([*quiet, still], 0.0).any()
    barred = layer(0.5, rewind=1.0, moved=0.4)
    assert not stragglers.load_bearing([*quiet, barred], 0.0).any()
    assert stragglers.stragglers([*quiet, barred], 0.0).tolist() == [False, False, False, True]
