"""How sure the numbers about pathways are, and when samples were memorised.

Pairs of samples share samples, so that they are not independent: the mean over pairs is a U-statistic, and
its standard error comes from what each single sample contributes to it. Contributions of the same samples at
two checkpoints are subtracted, so that a change is judged in pairs. Samples are drawn group by group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diagnostics.numerics.estimates import Estimate

# Checkpoints below which no correlation is given (ours: the paper's own seem to rest on 4 to 6).
LEAST = 6
# Share of samples that are to be memorised before the last checkpoint, from which the paper takes epsilon.
WANTED = (0.20, 0.25)
# The highest epsilon that is tried: the paper tries 1.5 to 2.0.
HIGHEST = 2.0
Labels = Int[np.ndarray, " samples"]
Matrix = Float[np.ndarray, "samples samples"]


@dataclass(frozen=True, kw_only=True)
class SampleStatistic:
    """A statistic of samples drawn group by group, with its influence function.

    Attributes:
        influence: contribution of each sample to the deviation of the value, to first order.
        groups: of the samples, from 0.
    """

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
        """Contributions without the mean of their group."""
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
    """Mean of values, or their sum over that of units; samples with NaN do not count."""
    known = ~np.isnan(values)
    weights = known.astype(float) if units is None else np.where(known, units, 0.0)
    total = weights.sum()
    if not total:
        return SampleStatistic(value=math.nan, influence=np.zeros(len(values)), groups=groups)
    filled = np.where(known, values, 0.0)
    value = float(filled.sum() / total)
    return SampleStatistic(value=value, influence=(filled - value * weights) / total, groups=groups)


class Pairs(NamedTuple):
    """Mean distances between the two samples of a pair.

    Attributes:
        within: pairs of one group; NaN where no group has two samples.
        between: pairs of two groups; NaN where there is one group.
        gap: between − within.
        overall: all pairs.
    """

    within: SampleStatistic
    between: SampleStatistic
    gap: SampleStatistic
    overall: SampleStatistic


def pairs(found: Matrix, groups: Labels) -> Pairs:
    """What a matrix of distances, with 0 between a sample and itself, says of groups; pairs count alike."""
    hot = _hot(groups)
    sums, counts = found @ hot, hot.sum(axis=0)
    rows = np.arange(len(groups))
    own, others = sums[rows, groups], sums.sum(axis=1)
    inside = counts[groups] - 1
    outside = len(groups) - counts[groups]
    return _pairs((own, inside), (others - own, outside), groups)


def pairs_of_groups(found: Matrix, groups: Labels) -> list[Pairs]:
    """The same of each group: pairs in it, and pairs of one of its samples with one of another group."""
    hot = _hot(groups)
    sums, counts = found @ hot, hot.sum(axis=0)
    made = []
    for group, count in enumerate(counts):
        own = groups == group
        inside = np.where(own, sums[:, group], 0.0), np.where(own, count - 1, 0.0)
        outside = (
            np.where(own, sums.sum(axis=1) - sums[:, group], sums[:, group]),
            np.where(own, len(groups) - count, count),
        )
        made.append(_pairs(inside, outside, groups))
    return made


Rows = tuple[Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]]


def _pairs(inside: Rows, outside: Rows, groups: Labels) -> Pairs:
    within, between = (_mean_of_pairs(*rows, groups) for rows in (inside, outside))
    everything = inside[0] + outside[0], inside[1] + outside[1]
    return Pairs(within, between, between.minus(within), _mean_of_pairs(*everything, groups))


def _mean_of_pairs(
    sums: Float[np.ndarray, " samples"], counts: Float[np.ndarray, " samples"], groups: Labels
) -> SampleStatistic:
    """Mean over pairs, from the sum and the number of those that each sample is in."""
    count = counts.sum() / 2
    if not count:
        return SampleStatistic(value=math.nan, influence=np.full(len(sums), math.nan), groups=groups)
    value = float(sums.sum() / 2 / count)
    # Hájek's projection: a sample moves the mean by what its own pairs are off, over all pairs.
    return SampleStatistic(value=value, influence=(sums - value * counts) / count, groups=groups)


def _hot(labels: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape kinds"]:
    return (labels[..., None] == np.arange(labels.max() + 1)).astype(float)


def gap_p(
    found: Matrix, groups: Labels, *, permutations: int, seed: int
) -> tuple[float, Float[np.ndarray, " kinds"]]:
    """How often shuffled labels give a gap at least as large: of all groups, and of each against others.

    One-sided, never 0; NaN without a gap. Of the difference between two checkpoints' distances it tests
    whether the gap widened.
    """
    counts = np.bincount(groups).astype(float)
    n, kinds = len(groups), len(counts)
    inside, outside = counts * (counts - 1) / 2, counts * (n - counts)
    generator = np.random.default_rng(seed)
    sums = found.sum(axis=1)

    def gaps(labels: Int[np.ndarray, "samples draws"]) -> Float[np.ndarray, "draws gaps"]:
        hot = _hot(labels).reshape(n, -1)
        within = ((found @ hot) * hot).sum(axis=0).reshape(-1, kinds) / 2
        across = (sums @ hot).reshape(-1, kinds) - 2 * within
        with np.errstate(invalid="ignore", divide="ignore"):
            each = across / outside - within / inside
            overall = across.sum(axis=1) / outside.sum() - within.sum(axis=1) / inside.sum()
        return np.column_stack([overall, each])

    own = gaps(groups[:, None])[0]
    size = max(1, 2**22 // (n * kinds))
    reached = np.zeros(1 + kinds)
    for start in range(0, permutations, size):
        draws = min(size, permutations - start)
        labels = np.stack([generator.permutation(groups) for _ in range(draws)], axis=1)
        reached += (gaps(labels) >= own - 1e-12).sum(axis=0)
    p = np.where(np.isnan(own), math.nan, (1 + reached) / (1 + permutations))
    return float(p[0]), p[1:]


def memorised_at(
    losses: Float[np.ndarray, "steps samples"],
    epsilon: float | Float[np.ndarray, " samples"],
    delta: float = 0.05,
) -> Int[np.ndarray, " samples"]:
    """The first checkpoint from which on a sample's loss stays at most epsilon and within delta of its last.

    Counted from 0; as many as there are checkpoints where the last loss is above epsilon or not a number.
    Source: arXiv:2506.21551, delta 0.05.
    """
    held = (losses <= epsilon) & (np.abs(losses - losses[-1]) <= delta)
    from_here = np.logical_and.accumulate(held[::-1], axis=0)[::-1]
    return np.where(from_here.any(axis=0), from_here.argmax(axis=0), len(losses))


def chosen_epsilon(losses: Float[np.ndarray, "steps samples"], delta: float = 0.05) -> tuple[float, float]:
    """The epsilon with which 20 to 25 % of samples are memorised before the last checkpoint, and that share.

    From the paper's grid of 0.1, here up to 2; the smallest of those that serve. Where none does it is the
    one whose share comes nearest.
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
    """The step at which a number has made half of its way from the first to the last, for good.

    Linear between checkpoints. The interval holds 95 % of the redrawn ones, and always both checkpoints
    between which it lies: what happens between these was not seen.

    Args:
        drawn: the values with samples drawn anew.
    """
    at = np.asarray(steps, dtype=float)
    place, own = _crossing(at, values[None])
    _, others = _crossing(at, drawn)
    low, high = np.quantile(others, [0.025, 0.975])
    before, after = at[place[0]], at[min(place[0] + 1, len(at) - 1)]
    return Estimate(float(own[0]), float(min(low, before)), float(max(high, after)))


def _crossing(
    at: Float[np.ndarray, " steps"], values: Float[np.ndarray, "draws steps"]
) -> tuple[Int[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """The last checkpoint before half of the way is made for good, and the step at which it is."""
    way = values[:, -1:] - values[:, :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        made = np.where(way == 0, 0.0, (values - values[:, :1]) / way)
    made[:, -1] = 1.0
    # The last checkpoint that has not made half of it.
    place = made.shape[1] - 1 - (made[:, ::-1] < 0.5).argmax(axis=1)
    rows = np.arange(len(made))
    one, two = made[rows, place], made[rows, place + 1]
    part = (0.5 - one) / (two - one)
    return place, at[place] + part * (at[place + 1] - at[place])


def redrawn(
    statistics: Sequence[SampleStatistic], *, draws: int, seed: int
) -> Float[np.ndarray, "draws statistics"]:
    """Bootstrap of statistics of the same samples, drawn group by group, to first order."""
    generator = np.random.default_rng(seed)
    groups = statistics[0].groups
    influence = np.stack([statistic._centred for statistic in statistics], axis=1)
    values = np.array([statistic.value for statistic in statistics])
    found = np.tile(values, (draws, 1))
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        # More than one of them spread by n / (n − 1) less when drawn from themselves.
        scale = math.sqrt(len(own) / (len(own) - 1)) if len(own) > 1 else 0.0
        copies = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws) - 1.0
        found += scale * copies @ influence[own]
    return found


class Correlation(NamedTuple):
    """How two numbers go together over checkpoints; all but `points` NaN where it is withheld.

    Attributes:
        points: checkpoints at which both are known.
        p: two-sided, of the rank correlation, by shuffling checkpoints: it takes them to be independent,
            which those of one run are not, so that it is too small.
    """

    points: int
    pearson: float
    spearman: float
    p: float


def correlation(
    x: Float[np.ndarray, " steps"],
    y: Float[np.ndarray, " steps"],
    *,
    lag: int = 0,
    permutations: int = 10_000,
    seed: int = 0,
) -> Correlation:
    """Correlation of x with y `lag` checkpoints later; withheld below 6 checkpoints and for constants."""
    from scipy.stats import rankdata

    from diagnostics.numerics.rank_correlation import correlation as pearson
    from diagnostics.numerics.rank_correlation import permutation_p

    one, two = x, y
    if lag > 0:
        one, two = one[:-lag], two[lag:]
    elif lag < 0:
        one, two = one[-lag:], two[:lag]
    known = ~(np.isnan(one) | np.isnan(two))
    one, two = one[known], two[known]
    withheld = Correlation(len(one), math.nan, math.nan, math.nan)
    if len(one) < LEAST or not np.ptp(one) or not np.ptp(two):
        return withheld
    ranks = np.asarray(rankdata(one), dtype=float), np.asarray(rankdata(two), dtype=float)
    p = permutation_p(*ranks, permutations, np.random.default_rng(seed))
    return Correlation(len(one), pearson(one, two), pearson(*ranks), p)
