"""Rank correlations over several tuned models of one base, raw and partial.

Learning rate and training length move predictors and outcome alike. Each correlation is therefore given
twice: raw, and partial given how far each model moved. Rows must be models, not points of one path, where α
itself is such a confounder.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from diagnostics.numerics.estimates import Z95
from probes.errors import InputError, UnknownNameError

# Models below which no correlation is given (ours).
LEAST = 12
Values = Float[np.ndarray, " models"]


def correlations(
    models: pd.DataFrame, *, outcome: str, predictors: Sequence[str], given: str = "displacement",
    permutations: int = 10_000, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Spearman correlations of predictors with an outcome over models, raw and given a confounder.

    Args:
        models: one row per tuned model of one base; rows with a missing value are left out.
        outcome: column to be predicted, such as the OOD loss of the blend.
        predictors: columns, such as the sharpness of each layer and of all blocks.
        given: column of the confounder: displacement, or the learning rate if it is known.
        permutations: of the two-sided permutation tests; exact where all permutations are no more.

    Returns:
        one row per predictor: predictor, models, raw and partial Spearman correlation with 95 % intervals
        (`raw_low`…), permutation p-values (`raw_p`, `partial_p`), and these after Holm's correction over the
        predictors (`raw_holm`, `partial_holm`). All NaN below 12 models and where a column is constant.

    >>> import pandas as pd
    >>> models = pd.DataFrame({"sharp": range(12), "loss": range(12), "displacement": [0, 1] * 6})
    >>> correlations(models, outcome="loss", predictors=["sharp"])[["models", "raw"]]
       models  raw
    0      12  1.0
    """
    for column in (outcome, given, *predictors):
        if column not in models:
            names = ", ".join(map(str, models.columns))
            raise UnknownNameError(f"the table of models has no column {column!r}; it has: {names}")
    if not predictors:
        raise InputError("predictors is empty; name the columns to correlate with the outcome")
    if permutations < 100:
        raise InputError(f"permutations is {permutations}; at least 100")
    rows: list[dict[str, Any]] = []
    for name in predictors:
        measured = models[[outcome, given, name]].dropna()
        row = _row(measured, outcome, name, given, permutations, seed)
        rows.append({"predictor": name, "models": len(measured), **row})
    for kind in ("raw", "partial"):
        corrected = holm(np.array([row[f"{kind}_p"] for row in rows]))
        for row, value in zip(rows, corrected, strict=True):
            row[f"{kind}_holm"] = float(value)
    return pd.DataFrame(rows)


def _row(
    models: pd.DataFrame, outcome: str, name: str, given: str, permutations: int, seed: int
) -> dict[str, float]:
    from scipy.stats import rankdata

    names = [f"{kind}{end}" for kind in ("raw", "partial") for end in ("", "_low", "_high", "_p")]
    row = dict.fromkeys(names, math.nan)
    x, y, z = (np.asarray(rankdata(models[column]), dtype=float) for column in (name, outcome, given))
    if len(models) < LEAST or not np.ptp(x) or not np.ptp(y):
        return row
    generator = np.random.default_rng(seed)
    pairs = {"raw": (x, y, 3), "partial": (residuals(x, z), residuals(y, z), 4)}
    for kind, (predictor, target, lost) in pairs.items():
        if any(np.linalg.norm(values - values.mean()) < 1e-9 * len(values) for values in (predictor, target)):
            continue
        value = correlation(predictor, target)
        low, high = interval(value, len(models), lost)
        row |= {kind: value, f"{kind}_low": low, f"{kind}_high": high}
        row[f"{kind}_p"] = permutation_p(predictor, target, permutations, generator)
    return row


def residuals(values: Values, given: Values) -> Values:
    """Values minus their least-squares line in another variable."""
    if not np.ptp(given):
        return values - values.mean()
    slope = float(np.cov(values, given)[0, 1] / given.var(ddof=1))
    return values - values.mean() - slope * (given - given.mean())


def correlation(x: Values, y: Values) -> float:
    """Pearson correlation."""
    a, b = x - x.mean(), y - y.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def interval(value: float, count: int, lost: int) -> tuple[float, float]:
    """Fisher's 95 % interval of a rank correlation; `lost` is 3, and 1 more for each variable held fixed."""
    half = Z95 * 1.03 / math.sqrt(count - lost)  # 1.03: of ranks (Fieller et al. 1957)
    middle = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))
    return math.tanh(middle - half), math.tanh(middle + half)


def permutation_p(x: Values, y: Values, permutations: int, generator: np.random.Generator) -> float:
    """Two-sided p-value of a correlation by permuting x; exact if there are no more orders."""
    from scipy.stats import permutation_test

    centred = y - y.mean()

    def size(permuted: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(np.abs(permuted @ centred))

    test = permutation_test(
        (x - x.mean(),), size, permutation_type="pairings", vectorized=True, n_resamples=permutations,
        alternative="greater", rng=generator,
    )  # fmt: skip
    return float(test.pvalue)


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's step-down correction; a NaN is no test."""
    corrected = np.full(len(p), math.nan)
    tests = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN are sorted last
    factors = np.arange(len(tests), 0, -1)
    corrected[tests] = np.maximum.accumulate(np.minimum(1.0, factors * p[tests]))
    return corrected
