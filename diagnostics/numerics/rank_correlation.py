"""Does sharpness predict how a blend does out of distribution, over several tuned models of one base?

Learning rate and length of tuning move sharpness and quality alike, so that every correlation is given twice:
raw, and partial, given how far each model moved. Of few models none is given. Along one path α itself is
such a confounder: rows must be models, not places on a path.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from diagnostics.numerics.estimates import Z95
from probes.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

# Models below which no correlation is given (ours).
LEAST = 12
Values = Float[np.ndarray, " models"]


def correlations(
    models: "pd.DataFrame",
    *,
    outcome: str,
    predictors: Sequence[str],
    given: str = "displacement",
    permutations: int = 10_000,
    seed: int = 0,
) -> "pd.DataFrame":
    """Rank correlations of predictors with an outcome over models, raw and given a confounder.

    Args:
        models: a row a tuned model of one base; rows with a gap in what is asked for are left out.
        outcome: column of what is to be predicted, such as the OOD loss of the blend.
        predictors: columns, such as the sharpness of each layer and of all blocks.
        given: column of what both may follow: displacement, or learning rate if it is known.
        permutations: of the two-sided permutation tests.

    Returns:
        a row a predictor: predictor, models, raw and partial Spearman correlation with 95 % intervals
        (`raw_low`…), permutation p-values (`raw_p`, `partial_p`) and these after Holm's correction over the
        predictors (`raw_holm`, `partial_holm`). All NaN below 12 models, and where a column is constant.

    Raises:
        UnknownNameError: a column that the table lacks.
        InputError: no predictors, or fewer than 100 permutations.
    """
    import pandas as pd

    for column in (outcome, given, *predictors):
        if column not in models:
            known = ", ".join(map(str, models.columns))
            raise UnknownNameError(f"the table of models has no column {column!r}; it has: {known}")
    if not predictors:
        raise InputError("predictors is empty; name the columns whose correlation is asked for")
    if permutations < 100:
        raise InputError(f"permutations is {permutations}; at least 100")
    rows = [
        {"predictor": name, "models": len(known), **_row(known, outcome, name, given, permutations, seed)}
        for name in predictors
        for known in (models[[outcome, given, name]].dropna(),)
    ]
    for kind in ("raw", "partial"):
        corrected = holm(np.array([row[f"{kind}_p"] for row in rows]))
        for row, value in zip(rows, corrected, strict=True):
            row[f"{kind}_holm"] = float(value)
    return pd.DataFrame(rows)


def _row(
    known: "pd.DataFrame", outcome: str, name: str, given: str, permutations: int, seed: int
) -> dict[str, float]:
    names = [f"{kind}{end}" for kind in ("raw", "partial") for end in ("", "_low", "_high", "_p")]
    found = dict.fromkeys(names, math.nan)
    x, y, z = (ranks(known[column].to_numpy(float)) for column in (name, outcome, given))
    if len(known) < LEAST or not np.ptp(x) or not np.ptp(y):
        return found
    generator = np.random.default_rng(seed)
    # What is left of both once the confounder is taken out of their ranks.
    pairs = {"raw": (x, y, 3), "partial": (residuals(x, z), residuals(y, z), 4)}
    for kind, (one, two, lost) in pairs.items():
        if np.linalg.norm(one - one.mean()) < 1e-9 * len(one) or np.linalg.norm(two - two.mean()) < 1e-9:
            continue
        value = correlation(one, two)
        low, high = interval(value, len(known), lost)
        found |= {kind: value, f"{kind}_low": low, f"{kind}_high": high}
        found[f"{kind}_p"] = permutation_p(one, two, permutations, generator)
    return found


def ranks(values: Values) -> Values:
    """Ranks from 1, equal values at their mean rank."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=float)


def residuals(values: Values, given: Values) -> Values:
    """What is left of values once a line in another is taken out."""
    if not np.ptp(given):
        return values - values.mean()
    slope = float(np.cov(values, given)[0, 1] / given.var(ddof=1))
    return values - values.mean() - slope * (given - given.mean())


def correlation(x: Values, y: Values) -> float:
    """Pearson's."""
    a, b = x - x.mean(), y - y.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def interval(value: float, count: int, lost: int) -> tuple[float, float]:
    """Fisher's 95 % interval; `lost` is 3, and 1 more for each variable held fixed."""
    half = Z95 * 1.03 / math.sqrt(count - lost)  # 1.03: of ranks (Fieller et al. 1957)
    middle = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))
    return math.tanh(middle - half), math.tanh(middle + half)


def permutation_p(x: Values, y: Values, permutations: int, generator: np.random.Generator) -> float:
    """Two-sided: how often shuffling one makes a correlation at least as large; never 0."""
    a, b = x - x.mean(), y - y.mean()
    own = abs(a @ b)
    shuffled = np.stack([generator.permutation(a) for _ in range(permutations)]) @ b
    return float((1 + (np.abs(shuffled) >= own - 1e-9 * abs(own)).sum()) / (1 + permutations))


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's step-down correction; NaN are no tests."""
    found = np.full(len(p), math.nan)
    tested = [int(place) for place in np.argsort(p) if not math.isnan(p[place])]
    running = 0.0
    for turn, place in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - turn) * float(p[place])))
        found[place] = running
    return found
