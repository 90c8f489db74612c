"""Detection metrics equal pair counting and scikit-learn, and their intervals hold what they should."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from diagnostics.numerics.detection_metrics import (
    METRICS,
    DetectionScores,
    auroc,
    auroc_difference,
    auroc_interval,
    auroc_within,
    bootstrap,
    both_ways,
    conformal_p,
    detection,
    lowest,
    threshold_catching,
    threshold_keeping,
)

# Few distinct values, so that ties within and between the classes are the rule.
TIED = st.sampled_from([-math.inf, -1.5, -1.0, -0.0, 0.0, 0.25, 1.0, 2.0, math.inf])
ANY = st.one_of(TIED, st.floats(-1e6, 1e6))


def rows(elements=ANY, least=1, most=60):
    """An array of scores."""
    return st.integers(least, most).flatmap(lambda n: arrays(np.float64, n, elements=elements))


def fpr95_of(inside, outside):
    """FPR95 alone."""
    return detection(inside, outside)["fpr95"]


def together(inside, outside):
    """As scikit-learn wants them: labels (1 is OOD) and scores."""
    labels = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    return labels, np.r_[inside, outside].clip(-1e300, 1e300)  # it refuses infinities, whose order this keeps


def on_the_curve(labels, scores):
    """FPR95 read off scikit-learn's ROC point by point."""
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    for k in range(1, len(true)):
        if true[k] >= 0.95 - 1e-12:
            part = (0.95 - true[k - 1]) / (true[k] - true[k - 1])
            return false[k - 1] + part * (false[k] - false[k - 1])
    raise AssertionError("the curve ends at 1")


def by_scikit_learn(inside, outside):
    """Every metric by other code than ours."""
    labels, scores = together(inside, outside)
    return {
        "auroc": roc_auc_score(labels, scores),
        "aupr_ood": average_precision_score(labels, scores),
        "aupr_id": average_precision_score(1 - labels, -scores),
        "fpr95": on_the_curve(labels, scores),
        "ood_missed_at_95_id_kept": on_the_curve(1 - labels, -scores),
    }


@given(rows(), rows())
def test_auroc_counts_pairs_with_ties_as_half(inside, outside):
    pairs = [(b > a) + 0.5 * (b == a) for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(rows(), rows())
def test_every_metric_equals_scikit_learns(inside, outside):
    metrics, expected = detection(inside, outside), by_scikit_learn(inside, outside)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name
    assert metrics["prevalence"] == len(outside) / (len(inside) + len(outside))
    assert set(expected) == set(METRICS)


@given(rows(), rows())
def test_the_auroc_alone_is_that_of_all_metrics(inside, outside):
    assert detection(inside, outside)["auroc"] == auroc(inside, outside)


@pytest.mark.parametrize("size", [20, 37, 100, 20_000])
def test_metrics_of_many_rows_equal_scikit_learns_with_and_without_ties(size):
    generator = np.random.default_rng(size)
    for digits in (1, 15):
        inside = np.round(generator.normal(size=3 * size), digits)
        outside = np.round(generator.normal(1, 2, size=size), digits)
        labels, scores = together(inside, outside)
        metrics = detection(inside, outside)
        assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert metrics["aupr_ood"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert metrics["fpr95"] == pytest.approx(on_the_curve(labels, scores), abs=1e-12)


@given(rows(), rows())
def test_swapping_the_classes_or_the_sign_reflects(inside, outside):
    assert auroc(inside, outside) + auroc(outside, inside) == pytest.approx(1, abs=1e-12)
    assert auroc(inside, outside) + auroc(-inside, -outside) == pytest.approx(1, abs=1e-12)
    metrics, reflected = detection(inside, outside), detection(-outside, -inside)
    assert metrics["fpr95"] == reflected["ood_missed_at_95_id_kept"]
    assert metrics["aupr_ood"] == reflected["aupr_id"]


@given(rows(st.integers(-50, 50).map(float)), rows(st.integers(-50, 50).map(float)), st.randoms())
def test_increasing_maps_and_the_order_of_rows_change_nothing(inside, outside, random):
    shuffled = [random.sample(list(scores), len(scores)) for scores in (inside, outside)]
    metrics = detection(inside, outside)
    assert detection(*shuffled) == metrics
    assert detection(np.exp(inside / 7), np.exp(outside / 7)) == metrics


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_constant_score_is_worth_chance(inside, outside):
    metrics = detection(np.full(inside, 3.0), np.full(outside, 3.0))
    prevalence = outside / (inside + outside)
    assert metrics == pytest.approx(
        {"auroc": 0.5, "aupr_ood": prevalence, "aupr_id": 1 - prevalence, "fpr95": 0.95,
         "ood_missed_at_95_id_kept": 0.95, "prevalence": prevalence}, abs=1e-12
    )  # fmt: skip


def test_a_base_that_equals_the_tuned_gives_chance_whatever_sign_its_zeros_have():
    # log p - log p is 0.0, and -0.0 once negated
    assert auroc([0.0, -0.0, 0.0], [-0.0, 0.0]) == 0.5


def test_a_perfect_score_has_no_false_alarm():
    assert detection([0, 1, 2], [3, 4]) == {
        "auroc": 1.0, "aupr_ood": 1.0, "aupr_id": 1.0, "fpr95": 0.0, "ood_missed_at_95_id_kept": 0.0,
        "prevalence": 0.4,
    }  # fmt: skip


def test_ninety_five_percent_of_twenty_rows_is_nineteen_of_them():
    # 19 of 20 OOD rows lie above every other row and one below them all: 95 % are caught at no cost. Were
    # 0.95 · 20 more than 19 by rounding, every in-distribution row would be flagged.
    assert fpr95_of(np.ones(7), np.r_[np.full(19, 2.0), 0.0]) == 0.0
    # 19 of 21 are fewer than 95 %: the rest come after every in-distribution row.
    assert fpr95_of(np.ones(7), np.r_[np.full(19, 2.0), 0.0, 0.0]) == 1.0


def test_every_multiple_of_twenty_has_a_whole_ninety_five_percent():
    # As above, for n OOD rows of which 19 n / 20 are caught at no cost.
    for n in range(20, 4000, 20):
        outside = np.r_[np.full(19 * n // 20, 2.0), np.zeros(n // 20)]
        assert fpr95_of([1.0], outside) == 0.0


def test_the_false_alarm_lies_between_two_thresholds_as_the_curve_does():
    # Of 10 OOD rows 9 are at 3, and one is tied at 1 with 2 of 4 in-distribution rows; these others are at 2
    # and 0. Curve: (0, .9), then (1/4, .9) at 2, then (3/4, 1) at 1. Halfway up, at .95: 1/4 + 1/2 · 2/4.
    outside = np.r_[np.full(9, 3.0), 1.0]
    assert fpr95_of([2.0, 1.0, 1.0, 0.0], outside) == pytest.approx(0.5, abs=1e-12)


def test_two_symbols_have_the_exact_auroc_of_their_binomials():
    # Base (1/2, 1/2), tuned (0.9, 0.1), 10 tokens: the ratio grows with the count of second symbols, which is
    # Binomial(10, 1/10) in distribution and Binomial(10, 1/2) out of it. Summed in fractions the AUROC is
    # 0.9808060155078125, exactly. Each count is one row of that weight.
    counts = np.arange(11.0)
    weigh = [np.array([math.comb(10, k) * q**k * (1 - q) ** (10 - k) for k in range(11)]) for q in (0.1, 0.5)]
    ranks, _ = both_ways(DetectionScores(counts, counts), ordered=True)
    area, _ = METRICS["auroc"]
    assert area(ranks.roc((weigh[0], weigh[1]))) == pytest.approx(0.9808060155078125, abs=1e-14)


def test_scores_may_be_lists_integers_or_tensors():
    torch = pytest.importorskip("torch")
    assert auroc([1, 2], [2, 3]) == auroc(torch.tensor([1.0, 2.0]), np.array([2, 3], dtype=np.int8)) == 0.875


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([], [1.0], "0 in-distribution rows; at least 1 of each kind"),
        ([1.0], [], "0 OOD rows; at least 1 of each kind"),
        ([1.0, 2.0], [0.0, math.nan], "the score of OOD row 1 is not a number"),
        ([[1.0], [2.0]], [0.0], r"in-distribution scores have shape \(2, 1\)"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(inside, outside, message):
    for metric in (auroc, detection):
        with pytest.raises(ValueError, match=message):
            metric(inside, outside)


# --- intervals ---------------------------------------------------------------------------------------------


def delong_by_hand(inside, outside):
    """Mean over pairs of each row."""
    order = np.array([[(b > a) + 0.5 * (b == a) for a in inside] for b in outside])
    return order.mean(axis=0), order.mean(axis=1)


@given(rows(least=2, most=25), rows(least=2, most=25))
def test_the_interval_has_delongs_variance(inside, outside):
    by_inside, by_outside = delong_by_hand(inside, outside)
    variance = by_inside.var(ddof=1) / len(inside) + by_outside.var(ddof=1) / len(outside)
    interval = auroc_interval(inside, outside)
    assume(variance > 1e-20)
    half = 1.959963984540054 * variance**0.5
    assert interval.value == auroc(inside, outside)
    assert interval.low == pytest.approx(max(0, interval.value - half), abs=1e-12)
    assert interval.high == pytest.approx(min(1, interval.value + half), abs=1e-12)


@given(st.data(), st.integers(2, 20), st.integers(2, 20))
def test_the_paired_interval_has_delongs_covariance(data, inside, outside):
    first, second = (
        DetectionScores(*(data.draw(arrays(np.float64, n, elements=ANY)) for n in (inside, outside)))
        for _ in range(2)
    )
    # Var(A - B) = Var A + Var B - 2 Cov, for either kind of row.
    both = [delong_by_hand(*scores) for scores in (first, second)]
    variance = sum(
        np.cov(both[0][kind], both[1][kind])[[0, 1, 0], [0, 1, 1]] @ [1, 1, -2] / size
        for kind, size in enumerate((inside, outside))
    )
    difference = auroc_difference(first, second)
    assert difference.value == pytest.approx(auroc(*first) - auroc(*second), abs=1e-12)
    assert -1 <= difference.low <= difference.value <= difference.high <= 1
    assume(variance > 1e-12)
    half = 1.959963984540054 * variance**0.5
    assert difference.low == pytest.approx(max(-1, difference.value - half), abs=1e-9)
    assert difference.high == pytest.approx(min(1, difference.value + half), abs=1e-9)


def test_nineteen_of_twenty_intervals_hold_the_true_auroc():
    # N(0, 1) against N(1, 1): Phi(1 / sqrt 2). 600 trials: 0.95 with a standard error of 0.009.
    true = 0.5 * (1 + math.erf(0.5))
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(600):
        interval = auroc_interval(generator.normal(size=60), generator.normal(1, size=40))
        held += interval.low <= true <= interval.high
    assert 0.92 <= held / 600 <= 0.98


def test_a_score_compared_with_itself_differs_by_nothing():
    generator = np.random.default_rng(0)
    scores = DetectionScores(generator.normal(size=30), generator.normal(1, size=20))
    assert auroc_difference(scores, scores) == (0.0, 0.0, 0.0, 0.0)
    for metric in METRICS:
        assert bootstrap(metric, scores, scores, draws=20)[:3] == (0.0, 0.0, 0.0)


def test_pairing_makes_the_interval_of_a_difference_narrow():
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(size=400), generator.normal(1, size=300)
    nearly = DetectionScores(
        inside + 0.1 * generator.normal(size=400), outside + 0.1 * generator.normal(size=300)
    )
    paired = auroc_difference(DetectionScores(inside, outside), nearly)
    alone = auroc_interval(inside, outside)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    drawn = bootstrap("auroc", DetectionScores(inside, outside), nearly, draws=400)
    assert (drawn.low, drawn.high) == pytest.approx((paired.low, paired.high), abs=0.004)


def test_a_few_rows_in_perfect_order_leave_much_open():
    interval = auroc_interval([0.0, 1.0, 2.0], [3.0, 4.0])
    assert (interval.value, interval.high) == (1.0, 1.0)
    # The bound A solves (1 - A)² = z² A (1 - A) [1 + r (1 - A) / (2 - A) + r A / (1 + A)] / (3 · 2), where
    # r = (3 + 2) / 2 - 1 and z = 1.96.
    A = interval.low
    variance = A * (1 - A) * (1 + 1.5 * (1 - A) / (2 - A) + 1.5 * A / (1 + A)) / 6
    assert (1 - A) / variance**0.5 == pytest.approx(1.959963984540054, rel=1e-9)
    assert 0.3 < A < 0.5
    assert auroc_interval([3.0, 4.0, 5.0], [0.0, 1.0]) == (0.0, 0.0, pytest.approx(1 - A), 0.0)
    # More rows leave less open.
    assert lowest(30, 20, 0.95) > lowest(3, 2, 0.95)


def test_a_perfect_score_is_not_certain_to_beat_a_constant_one():
    perfect, constant = DetectionScores([0.0, 1.0], [2.0, 3.0]), DetectionScores([0.0, 0.0], [0.0, 0.0])
    difference = auroc_difference(perfect, constant)
    assert difference.value == 0.5
    assert difference.low == pytest.approx(0.5 - (1 - lowest(2, 2, 0.95)))
    assert difference.high == 0.5
    # Nor is one that is right every time certain to beat one that is wrong every time: both are uncertain.
    backward = DetectionScores([2.0, 3.0], [0.0, 1.0])
    difference = auroc_difference(perfect, backward)
    assert (difference.value, difference.high) == (1.0, 1.0)
    assert difference.low == pytest.approx(1 - 2**0.5 * (1 - lowest(2, 2, 0.95)))


@given(st.data())
def test_drawing_rows_again_counts_them_as_often(data):
    inside, outside = data.draw(rows(most=15)), data.draw(rows(most=15))
    copies = [
        data.draw(arrays(np.int64, len(values), elements=st.integers(0, 3)).filter(np.any))
        for values in (inside, outside)
    ]
    repeated = detection(np.repeat(inside, copies[0]), np.repeat(outside, copies[1]))
    for name, (formula, way) in METRICS.items():
        ranks = both_ways(DetectionScores(inside, outside), ordered=True)[way]
        counted = formula(ranks.roc((copies[way], copies[1 - way])))
        assert counted == pytest.approx(repeated[name], abs=1e-12), name


@pytest.mark.parametrize("metric", METRICS)
def test_the_paired_bootstrap_has_the_quantiles_of_rows_drawn_again_by_hand(metric):
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(size=(2, 40)), generator.normal(0.8, 1, size=(2, 30))
    first, second = (
        DetectionScores(*(np.round(scores[k], 1) for scores in (inside, outside))) for k in (0, 1)
    )
    interval = bootstrap(metric, first, second, draws=60, seed=7)
    generator = np.random.default_rng(7)
    kinds = (0, 1) if METRICS[metric][1] == 0 else (1, 0)  # the class that is to be found is drawn second
    differences = []
    for _ in range(60):
        chosen = {kind: generator.integers(len(first[kind]), size=len(first[kind])) for kind in kinds}
        first_metrics, second_metrics = (
            by_scikit_learn(*(scores[kind][chosen[kind]] for kind in (0, 1))) for scores in (first, second)
        )
        differences.append(first_metrics[metric] - second_metrics[metric])
    # The q-th quantile of n lies at place q (n - 1), between its neighbours.
    ordered = sorted(differences)
    for q, bound in ((0.025, interval.low), (0.975, interval.high)):
        below, part = divmod(q * 59, 1)
        expected = ordered[int(below)] + part * (ordered[int(below) + 1] - ordered[int(below)])
        assert bound == pytest.approx(expected, abs=1e-12)
    assert interval.value == pytest.approx(by_scikit_learn(*first)[metric] - by_scikit_learn(*second)[metric])
    assert interval.low < interval.high


def test_the_bootstrap_agrees_with_delong_and_with_its_seed():
    generator = np.random.default_rng(3)
    scores = DetectionScores(generator.normal(size=300), generator.normal(1, size=200))
    exact, drawn = auroc_interval(*scores), bootstrap("auroc", scores, draws=1000, seed=5)
    assert drawn.value == exact.value
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.006)
    assert bootstrap("auroc", scores, draws=50, seed=5) == bootstrap("auroc", scores, draws=50, seed=5)
    assert bootstrap("auroc", scores, draws=50, seed=5) != bootstrap("auroc", scores, draws=50, seed=6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_higher_level_gives_a_wider_interval_around_the_value(metric):
    generator = np.random.default_rng(4)
    scores = DetectionScores(generator.normal(size=80), generator.normal(1, size=70))
    narrow, wide = (bootstrap(metric, scores, draws=300, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.low < wide.value < wide.high


def test_intervals_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="1 OOD rows; at least 2 of each kind"):
        auroc_interval([1.0, 2.0], [1.0])
    with pytest.raises(
        ValueError, match=r"\(2, 3\) and \(3, 3\) rows inside and outside; compare the same rows"
    ):
        auroc_difference(DetectionScores([1, 2], [1, 2, 3]), DetectionScores([1, 2, 3], [1, 2, 3]))
    with pytest.raises(ValueError, match=r"level is 95\.0; a share between 0 and 1"):
        auroc_interval([1, 2], [1, 2], level=95.0)
    with pytest.raises(ValueError, match="compare the same rows"):
        bootstrap("fpr95", DetectionScores([1, 2], [1, 2, 3]), DetectionScores([1, 2, 3], [1, 2]))
    with pytest.raises(ValueError, match="draws is 0; at least 1"):
        bootstrap("fpr95", DetectionScores([1, 2], [1, 2]), draws=0)


# --- thresholds and lengths --------------------------------------------------------------------------------


@given(rows(), st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]))
def test_thresholds_catch_and_keep_their_share_and_no_more_than_they_must(scores, share):
    caught = threshold_catching(scores, share)
    assert np.mean(scores >= caught) >= share - 1e-12
    assert np.mean(scores > caught) < share
    kept = threshold_keeping(scores, share)
    assert np.mean(scores <= kept) >= share - 1e-12
    assert np.mean(scores < kept) < share


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"share is 95.0; it is in \(0, 1\]"):
        threshold_keeping([1.0], share=95.0)


def test_conformal_probabilities_count_the_calibration_rows_that_score_as_high():
    # Of 1, 2, 2, 3: four reach 0.5, three reach 2, none reaches 9; and the row itself counts, over 5.
    assert conformal_p([2.0, 1.0, 3.0, 2.0], [0.5, 2.0, 9.0]) == pytest.approx([1.0, 0.8, 0.2])


def test_length_cannot_help_among_rows_of_one_length():
    generator = np.random.default_rng(0)
    lengths = DetectionScores(generator.integers(5, 15, size=500), generator.integers(8, 20, size=300))
    assert auroc(*lengths) > 0.75
    # With a bin for every length, as a score it ties all rows that it is compared among.
    stratified = auroc_within(lengths, lengths, bins=200)
    assert stratified.value == pytest.approx(0.5, abs=1e-12)
    assert np.nanmax(stratified.aurocs) == np.nanmin(stratified.aurocs) == 0.5


def test_aurocs_of_like_length_are_pooled_by_their_pairs():
    # Two bins, up to and over the median length 2.5. Short: inside 1, 5 against outside 3: 1 pair of 2 right.
    # Long: inside 0 against outside 1, 2: 2 of 2. Together 3 of 4 pairs, out of 3 · 3.
    scores = DetectionScores([1.0, 5.0, 0.0], [3.0, 1.0, 2.0])
    lengths = DetectionScores([1, 2, 3], [2, 4, 5])
    stratified = auroc_within(scores, lengths, bins=2)
    assert stratified.value == pytest.approx(3 / 4)
    assert stratified.pairs == pytest.approx(4 / 9)
    assert stratified.aurocs.tolist() == [0.5, 1.0]
    assert (stratified.inside.tolist(), stratified.outside.tolist()) == ([2, 1], [1, 2])


def test_no_rows_of_like_length_leave_nothing_to_compare():
    stratified = auroc_within(DetectionScores([1, 2], [3, 4]), DetectionScores([1, 2], [100, 101]), bins=2)
    assert math.isnan(stratified.value)
    assert stratified.pairs == 0.0
    with pytest.raises(ValueError, match="compare the same rows"):
        auroc_within(DetectionScores([1, 2], [3, 4]), DetectionScores([1, 2], [100]))
