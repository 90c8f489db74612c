"""Calibration errors are those worked out by hand and scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from diagnostics.numerics.calibration import brier, ece, reliability

BOTH = pytest.mark.parametrize("by", ["width", "mass"])


def stated(most=80):
    """Confidences, many at the edges of bins, and whether each was right."""
    shares = st.one_of(st.integers(0, 15).map(lambda k: k / 15), st.floats(0, 1, width=32))
    return st.integers(1, most).flatmap(
        lambda n: st.tuples(arrays(np.float64, n, elements=shares), arrays(np.bool_, n))
    )


def test_the_error_is_the_mean_gap_weighted_by_rows():
    # Two bins of width 1/2. Low: 0.2 and 0.4, none right, gap 0.3. High: 0.8 and 0.9, one right, gap 0.35.
    assert ece([0.2, 0.4, 0.8, 0.9], [0, 0, 1, 0], bins=2) == pytest.approx(0.5 * 0.3 + 0.5 * 0.35)
    # Two bins of two rows each: the same here; three of equal width: (0, 1/3], (1/3, 2/3], (2/3, 1].
    assert ece([0.2, 0.4, 0.8, 0.9], [0, 0, 1, 0], bins=2, by="mass") == pytest.approx(0.325)
    assert ece([0.2, 0.4, 0.8, 0.9], [0, 0, 1, 0], bins=3) == pytest.approx(0.05 + 0.1 + 0.5 * 0.35)


def test_bins_of_equal_mass_follow_the_rows():
    # All but one over 0.9: one bin of width 0.1 would pool them, equal mass tells the two halves apart.
    confidence, correct = [0.91, 0.92, 0.98, 0.99], [0, 0, 1, 1]
    assert ece(confidence, correct, bins=10) == pytest.approx(abs(0.5 - 0.95))
    assert ece(confidence, correct, bins=2, by="mass") == pytest.approx(0.5 * 0.915 + 0.5 * 0.015)
    assert reliability(confidence, correct, bins=2, by="mass").rows.tolist() == [2, 2]


@given(stated())
def test_bins_of_equal_width_are_scikit_learns(rows):
    confidence, correct = rows
    bins = reliability(confidence, correct)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15, pos_label=True)
    used = bins.rows > 0
    assert bins.accuracy[used] == pytest.approx(accuracy, abs=1e-12)
    assert bins.confidence[used] == pytest.approx(mean, abs=1e-12)
    expected = np.average(np.abs(accuracy - mean), weights=bins.rows[used])
    assert ece(confidence, correct) == pytest.approx(expected, abs=1e-12)


@BOTH
@given(rows=stated(), random=st.randoms())
def test_the_order_of_rows_changes_nothing(by, rows, random):
    confidence, correct = rows
    order = random.sample(range(len(correct)), len(correct))
    assert ece(confidence[order], correct[order], by=by) == pytest.approx(ece(*rows, by=by), abs=1e-12)


@BOTH
@given(rows=stated())
def test_the_error_is_at_least_the_overall_gap_and_at_most_one(by, rows):
    confidence, correct = rows
    error = ece(confidence, correct, by=by)
    assert abs(confidence.mean() - correct.mean()) - 1e-12 <= error <= 1
    assert reliability(confidence, correct, by=by).rows.sum() == len(correct)


@BOTH
def test_one_confidence_for_all_rows_is_calibrated_when_it_is_their_accuracy(by):
    assert ece([0.75] * 4, [1, 1, 1, 0], by=by) == pytest.approx(0, abs=1e-12)


@given(stated())
def test_the_squared_error_of_an_event_is_scikit_learns(rows):
    confidence, happened = rows
    expected = brier_score_loss(happened, confidence, pos_label=True)
    assert brier(confidence, happened) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 30))
def test_the_squared_error_over_classes_is_scikit_learns(seed, classes, rows):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(classes), size=rows)
    labels = generator.integers(classes, size=rows)
    expected = brier_score_loss(labels, probabilities, labels=np.arange(classes), scale_by_half=False)
    assert brier(probabilities, labels) == pytest.approx(expected, abs=1e-9)
    if classes == 2:  # both classes are off by as much
        assert brier(probabilities, labels) == pytest.approx(2 * brier(probabilities[:, 1], labels))


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], r"shape \(0,\) and correct \(0,\)"),
        ([0.5, 0.6], [1], r"shape \(2,\) and correct \(1,\)"),
        ([0.5, 1.5], [1, 0], r"some values are outside \[0, 1\]"),
        ([0.5, float("nan")], [1, 0], r"some values are outside \[0, 1\]"),
    ],
)
def test_confidences_that_are_none_are_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        ece(confidence, correct)


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match="labels go from 0 to 2, classes to 1"):
        brier([[0.5, 0.5], [0.1, 0.9]], [0, 2])
    with pytest.raises(ValueError, match=r"shape \(1, 2\) and labels \(2,\)"):
        brier([[0.5, 0.5]], [0, 1])
