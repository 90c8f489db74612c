"""Correlations over models: raw and given how far each moved, and none from a handful."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.numerics.rank_correlation import correlations, holm, permutation_p


def table(n=40, seed=0):
    """Displacement drives both sharpness and loss; `own` is tied to the loss beside it, `block` is not."""
    rng = np.random.default_rng(seed)
    moved, noise = rng.standard_normal(n), rng.standard_normal(n)
    return pd.DataFrame(
        {
            "displacement": moved,
            "loss": moved + 0.5 * noise,
            "block": moved + 0.3 * rng.standard_normal(n),
            "own": noise + 0.1 * rng.standard_normal(n),
        }
    )


def by_predictor(models, **settings):
    given = {"outcome": "loss", "predictors": ["block", "own"], "permutations": 2000, **settings}
    return correlations(models, **given).set_index("predictor")


def test_what_only_follows_displacement_correlates_raw_and_not_given_it():
    result = by_predictor(table())
    assert result.loc["block", "raw"] > 0.6
    assert result.loc["block", "raw_holm"] < 0.01
    assert abs(result.loc["block", "partial"]) < 0.4
    assert result.loc["block", "partial_holm"] > 0.05
    assert result.loc["own", "partial"] > 0.8
    assert result.loc["own", "partial_holm"] < 0.01


def test_correlations_are_those_of_scipy_and_of_the_textbook():
    from scipy.stats import spearmanr

    models = table(17)
    result = by_predictor(models)
    x, y, z = (models[name] for name in ("block", "loss", "displacement"))
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    assert result.loc["block", "raw"] == pytest.approx(xy)
    partial = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert result.loc["block", "partial"] == pytest.approx(partial)
    assert result.loc["block", "raw_low"] < xy < result.loc["block", "raw_high"]


def test_below_twelve_models_none_is_given():
    result = by_predictor(table(11))
    assert result["models"].tolist() == [11, 11]
    assert result.drop(columns="models").isna().all(axis=None)
    assert by_predictor(table(12))["raw"].notna().all()
    # A model with a gap is none.
    gap = table(12)
    gap.loc[3, "own"] = math.nan
    assert by_predictor(gap)["raw"].isna().tolist() == [False, True]


@given(st.integers(0, 50))
def test_the_correlation_does_not_know_in_which_order_models_come(seed):
    models = table(15, 3)
    shuffled = models.sample(frac=1, random_state=seed)
    for column in ("raw", "partial"):
        a, b = (by_predictor(frame, permutations=100)[column] for frame in (models, shuffled))
        assert a.to_numpy() == pytest.approx(b.to_numpy())


def test_a_constant_predictor_has_no_correlation():
    models = table()
    models["own"] = 1.0
    assert math.isnan(by_predictor(models).loc["own", "raw"])


def test_the_permutation_test_of_few_points_counts_all_orders():
    x, y = np.array([0.0, 1, 2, 4, 3]), np.array([1.0, 0, 2, 3, 5])
    reached = [abs(np.corrcoef(order, y)[0, 1]) >= abs(np.corrcoef(x, y)[0, 1]) - 1e-12
               for order in permutations(x)]  # fmt: skip
    assert permutation_p(x, y, 120, np.random.default_rng(0)) == pytest.approx(np.mean(reached))


def test_the_permutation_test_of_unrelated_values_is_even_and_never_0():
    generator = np.random.default_rng(0)
    p_values = [permutation_p(*generator.normal(size=(2, 20)), 199, generator) for _ in range(200)]
    # Uniform on 0.005 … 1: the mean is 0.5, give or take 0.289/√200 = 0.02.
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)
    x = np.arange(20.0)
    assert permutation_p(x, x, 199, generator) == pytest.approx(1 / 200)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    # 0.01 * 3, then 0.02 * 2 = 0.04, then 0.03 * 1 raised to 0.04
    assert holm(np.array([0.03, 0.01, math.nan, 0.02])).tolist() == pytest.approx(
        [0.04, 0.03, math.nan, 0.04], nan_ok=True
    )
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(LookupError, match=r"no column 'rate'; it has: displacement, loss, block, own"):
        by_predictor(table(), given="rate")
    with pytest.raises(ValueError, match="predictors is empty"):
        by_predictor(table(), predictors=[])
