"""Statistics of pathway distances with their errors, permutation tests, and dates of memorisation.

Pairs of samples are not independent: the mean over pairs is a U-statistic, and its standard error comes from
the influence of each sample. Influences at two checkpoints are subtracted, so that changes are tested in
pairs. Samples are drawn group by group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diagnostics.numerics.estimates import Estimate

# The fewest checkpoints for a correlation (ours: the paper's seem to rest on 4 to 6).
LEAST = 6
# The paper chooses epsilon so that this share of samples is memorised before the last checkpoint.
WANTED = (0.20, 0.25)
# The highest epsilon tried; the paper tries 1.5 to 2.0.
HIGHEST = 2.0
Labels = Int[np.ndarray, " samples"]
Matrix = Float[np.ndarray, "samples samples"]
# Sum and number of the pairs of each sample.
Rows = tuple[Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]]


@dataclass(frozen=True, kw_only=True)
class SampleStatistic:
    """A statistic of samples drawn group by group, and each sample's first-order share in its deviation."""

    value: float
    influence: Float[np.ndarray, " samples"]
    groups: Labels

    @cached_property
    def estimate(self) -> Estimate:
        """With standard error and 95 % interval; these are NaN if no group has two samples.

        The interval is Student's, with as many degrees of freedom as samples beyond one a group.
        """
        from scipy.stats import t

        counts = np.bincount(self.groups)
        several = counts > 1
        if not several.any():
            return Estimate(self.value, math.nan, math.nan)
        squares = np.bincount(self.groups, self._centred**2)[several]
        counts = counts[several]
        error = float(np.sqrt((squares * counts / (counts - 1)).sum()))
        if math.isnan(self.value):
            return Estimate(self.value, math.nan, math.nan, error)
        half = float(t.ppf(0.975, int((counts - 1).sum()))) * error
        return Estimate(self.value, self.value - half, self.value + half, error)

    @property
    def _centred(self) -> Float[np.ndarray, " samples"]:
        """Influence minus its mean in each group."""
        counts = np.maximum(np.bincount(self.groups), 1)
        return self.influence - (np.bincount(self.groups, self.influence) / counts)[self.groups]

    def minus(self, earlier: "SampleStatistic") -> "SampleStatistic":
        """The change from an earlier statistic of the same samples."""
        return SampleStatistic(
            value=self.value - earlier.value, influence=self.influence - earlier.influence, groups=self.groups
        )


def mean(
    values: Float[np.ndarray, " samples"], groups: Labels, units: Float[np.ndarray, " samples"] | None = None
) -> SampleStatistic:
    """Mean of values, or their sum over that of units; NaN values are left out."""
    valid = ~np.isnan(values)
    weights = valid.astype(float) if units is None else np.where(valid, units, 0.0)
    total = weights.sum()
    if not total:
        return SampleStatistic(value=math.nan, influence=np.zeros(len(values)), groups=groups)
    filled = np.where(valid, values, 0.0)
    value = float(filled.sum() / total)
    return SampleStatistic(value=value, influence=(filled - value * weights) / total, groups=groups)


class Pairs(NamedTuple):
    """Mean distances over pairs of one group, of two groups, their difference, and over all pairs.

    NaN where no group has two samples, or there is one group.
    """

    within: SampleStatistic
    between: SampleStatistic
    gap: SampleStatistic
    overall: SampleStatistic


def pairs(distances: Matrix, groups: Labels) -> Pairs:
    """Mean distances within and between groups, all pairs counting equally; the diagonal is 0."""
    hot = _hot(groups)
    sums, sizes = distances @ hot, hot.sum(axis=0)[groups]
    within = sums[np.arange(len(groups)), groups]
    return _pairs((within, sizes - 1), (sums.sum(axis=1) - within, len(groups) - sizes), groups)


def pairs_of_groups(distances: Matrix, groups: Labels) -> list[Pairs]:
    """`pairs` for each group: pairs in it, and pairs of its samples with other groups."""
    hot = _hot(groups)
    sums, counts = distances @ hot, hot.sum(axis=0)
    by_group, totals = [], sums.sum(axis=1)
    for group, count in enumerate(counts):
        members, to_group = groups == group, sums[:, group]
        inside = np.where(members, to_group, 0.0), np.where(members, count - 1, 0.0)
        outside = (
            np.where(members, totals - to_group, to_group), np.where(members, len(groups) - count, count)
        )  # fmt: skip
        by_group.append(_pairs(inside, outside, groups))
    return by_group


def _pairs(inside: Rows, outside: Rows, groups: Labels) -> Pairs:
    within, between = (_mean_of_pairs(*rows, groups) for rows in (inside, outside))
    everything = inside[0] + outside[0], inside[1] + outside[1]
    return Pairs(within, between, between.minus(within), _mean_of_pairs(*everything, groups))


def _mean_of_pairs(
    sums: Float[np.ndarray, " samples"], counts: Float[np.ndarray, " samples"], groups: Labels
) -> SampleStatistic:
    """Mean over pairs, from each sample's sum and number of pairs."""
    count = counts.sum() / 2
    if not count:
        return SampleStatistic(value=math.nan, influence=np.full(len(sums), math.nan), groups=groups)
    value = float(sums.sum() / 2 / count)
    # Hájek projection: the deviation of a sample's pairs, over all pairs.
    return SampleStatistic(value=value, influence=(sums - value * counts) / count, groups=groups)


def _hot(labels: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape kinds"]:
    return (labels[..., None] == np.arange(labels.max() + 1)).astype(float)


def gap_p(
    distances: Matrix, groups: Labels, *, permutations: int, seed: int
) -> tuple[float, Float[np.ndarray, " kinds"]]:
    """Permutation p-values of the gap: over all groups, and of each group against the others.

    One-sided, never 0; NaN without a gap. For the difference of two checkpoints' distances it tests whether
    the gap widened. All gaps share their permutations, which scipy's `permutation_test` of one statistic
    cannot.
    """
    counts = np.bincount(groups).astype(float)
    n, kinds = len(groups), len(counts)
    inside, outside = counts * (counts - 1) / 2, counts * (n - counts)
    generator = np.random.default_rng(seed)
    sums = distances.sum(axis=1)

    def gaps(labels: Int[np.ndarray, "samples draws"]) -> Float[np.ndarray, "draws gaps"]:
        hot = _hot(labels).reshape(n, -1)
        within = ((distances @ hot) * hot).sum(axis=0).reshape(-1, kinds) / 2
        between = (sums @ hot).reshape(-1, kinds) - 2 * within
        with np.errstate(invalid="ignore", divide="ignore"):
            single = between / outside - within / inside
            overall = between.sum(axis=1) / outside.sum() - within.sum(axis=1) / inside.sum()
        return np.column_stack([overall, single])

    observed = gaps(groups[:, None])[0]
    size = max(1, 2**22 // (n * kinds))
    reached = np.zeros(1 + kinds)
    for start in range(0, permutations, size):
        draws = min(size, permutations - start)
        labels = np.stack([generator.permutation(groups) for _ in range(draws)], axis=1)
        reached += (gaps(labels) >= observed - 1e-12).sum(axis=0)
    p = np.where(np.isnan(observed), math.nan, (1 + reached) / (1 + permutations))
    return float(p[0]), p[1:]


def memorised_at(
    losses: Float[np.ndarray, "steps samples"],
    epsilon: float | Float[np.ndarray, " samples"],
    delta: float = 0.05,
) -> Int[np.ndarray, " samples"]:
    """The first checkpoint from which on a sample's loss stays at most epsilon and within delta of its last.

    Counted from 0; the number of checkpoints if the last loss is above epsilon or NaN.
    Source: arXiv:2506.21551, delta 0.05.
    """
    held = (losses <= epsilon) & (np.abs(losses - losses[-1]) <= delta)
    for_good = np.logical_and.accumulate(held[::-1], axis=0)[::-1]
    return np.where(for_good.any(axis=0), for_good.argmax(axis=0), len(losses))


def chosen_epsilon(losses: Float[np.ndarray, "steps samples"], delta: float = 0.05) -> tuple[float, float]:
    """The smallest epsilon with 20 to 25 % of samples memorised before the last checkpoint, and that share.

    From the paper's grid of 0.1, here up to 2; the one with the nearest share where none fits.
    """
    last = len(losses) - 1
    low, high = WANTED
    best = (math.inf, 0.1, 0.0)
    for tenths in range(1, round(HIGHEST * 10) + 1):
        epsilon = tenths / 10
        share = float((memorised_at(losses, epsilon, delta) < last).mean())
        missed = max(low - share, share - high, 0.0)
        if missed < best[0]:
            best = (missed, epsilon, share)
    return best[1], best[2]


def halfway(
    steps: Sequence[float],
    values: Float[np.ndarray, " steps"],
    drawn: Float[np.ndarray, "draws steps"],
) -> Estimate:
    """The step from which on a value has made at least half of its change from first to last.

    Linear between checkpoints. The interval holds 95 % of the bootstrap draws, and both neighbouring
    checkpoints, between which nothing was seen.
    """
    at = np.asarray(steps, dtype=float)
    index, step = _crossing(at, values[None])
    low, high = np.quantile(_crossing(at, drawn)[1], [0.025, 0.975])
    before, after = at[index[0]], at[min(index[0] + 1, len(at) - 1)]
    return Estimate(float(step[0]), float(min(low, before)), float(max(high, after)))


def _crossing(
    at: Float[np.ndarray, " steps"], values: Float[np.ndarray, "draws steps"]
) -> tuple[Int[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """The last checkpoint with less than half of the change, and the step at which half is reached."""
    change = values[:, -1:] - values[:, :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(change == 0, 0.0, (values - values[:, :1]) / change)
    share[:, -1] = 1.0
    index = share.shape[1] - 1 - (share[:, ::-1] < 0.5).argmax(axis=1)
    rows = np.arange(len(share))
    before, after = share[rows, index], share[rows, index + 1]
    part = (0.5 - before) / (after - before)
    return index, at[index] + part * (at[index + 1] - at[index])


def redrawn(
    statistics: Sequence[SampleStatistic], *, draws: int, seed: int
) -> Float[np.ndarray, "draws statistics"]:
    """Bootstrap of statistics of the same samples, drawn group by group, to first order."""
    generator = np.random.default_rng(seed)
    groups = statistics[0].groups
    influence = np.stack([statistic._centred for statistic in statistics], axis=1)
    values = np.array([statistic.value for statistic in statistics])
    drawn = np.tile(values, (draws, 1))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        n = len(members)
        scale = math.sqrt(n / (n - 1)) if n > 1 else 0.0  # corrects the bootstrap's bias of the variance
        copies = generator.multinomial(n, np.full(n, 1 / n), size=draws) - 1.0
        drawn += scale * copies @ influence[members]
    return drawn


class Correlation(NamedTuple):
    """Correlation of two values over checkpoints; NaN where it is withheld.

    `p` is the two-sided permutation p-value of the rank correlation. It takes checkpoints to be independent,
    which those of one run are not: it is too small.
    """

    points: int
    spearman: float
    pearson: float
    p: float


def correlation(
    x: Float[np.ndarray, " steps"], y: Float[np.ndarray, " steps"], *, lag: int = 0,
    permutations: int = 10_000, seed: int = 0,
) -> Correlation:  # fmt: skip
    """Correlation of x with y `lag` checkpoints later; withheld below 6 checkpoints and for constants."""
    from scipy.stats import rankdata

    from diagnostics.numerics.rank_correlation import correlation as pearson
    from diagnostics.numerics.rank_correlation import permutation_p

    count = max(0, len(x) - abs(lag))
    first, second = x[max(0, -lag) :][:count], y[max(0, lag) :][:count]
    measured = ~(np.isnan(first) | np.isnan(second))
    first, second = first[measured], second[measured]
    if len(first) < LEAST or not np.ptp(first) or not np.ptp(second):
        return Correlation(len(first), math.nan, math.nan, math.nan)
    x, y = (np.asarray(rankdata(values), dtype=float) for values in (first, second))
    p = permutation_p(x, y, permutations, np.random.default_rng(seed))
    return Correlation(len(first), pearson(x, y), pearson(first, second), p)
