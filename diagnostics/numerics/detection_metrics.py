"""How well a score tells in-distribution from out-of-distribution rows, and how sure that is.

Functions take the scores of the `inside` (in-distribution) rows and of the `outside` (OOD) rows. Higher means
more out-of-distribution; OOD is the positive class. Only order matters, and ties count as half. Metrics are
in [0, 1] and come from counts at the distinct scores, so that millions of rows cost two sorts.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from diagnostics.numerics.calibration import brier as brier
from diagnostics.numerics.calibration import ece as ece
from diagnostics.numerics.estimates import Estimate
from probes.errors import InputError

Metric: TypeAlias = Literal["auroc", "aupr_ood", "aupr_id", "fpr95", "ood_missed_at_95_id_kept"]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

KEPT = 0.95
ROUNDING = 1e-12  # a narrower interval is none
MANY = 2**17  # scores whose sorting takes longer than starting a thread
T = TypeVar("T")


class DetectionScores(NamedTuple):
    """One number for each in-distribution and each OOD row; what is compared has its rows in one order."""

    inside: ArrayLike
    outside: ArrayLike


@dataclass(frozen=True)
class Steps:
    """The ROC at each distinct score of the positive rows, from the highest down: what every metric needs.

    Attributes:
        caught: positive rows with at least this score.
        flagged: negative rows with at least this score.
        before: negative rows with a higher score.
        negatives: all negative rows.
    """

    caught: Float[np.ndarray, " steps"]
    flagged: Float[np.ndarray, " steps"]
    before: Float[np.ndarray, " steps"]
    negatives: float


class Ranks:
    """Where the distinct scores of the positive rows stand among all, however often a row counts."""

    def __init__(
        self,
        positive: Array,
        left: Counts,
        right: Counts,
        negatives: int,
        *,
        orders: tuple[Array, Array] | None = None,
    ):
        """Take the positive scores, sorted upwards, with where each stands among the negative ones.

        Args:
            left, right: for each, how many negative scores are below it, and how many not above it.
            negatives: how many there are.
            orders: what sorts negative and positive rows, if rows are to be copied.
        """
        self.sizes = negatives, len(positive)
        self.orders = orders
        self.starts = np.flatnonzero(np.concatenate([[True], positive[1:] != positive[:-1]]))[::-1]
        self.left, self.right = left[self.starts], right[self.starts]

    def steps(self, copies: tuple[Array, Array] | None = None) -> Steps:
        """The counts; `copies` says how often each negative and each positive row counts, as first given."""
        if copies is None:
            negatives, positives = self.sizes
            caught, flagged, before = positives - self.starts, negatives - self.left, negatives - self.right
        else:
            assert self.orders is not None
            below_negative, below_positive = (
                np.concatenate([[0], np.cumsum(count[order])])
                for count, order in zip(copies, self.orders, strict=True)
            )
            negatives = below_negative[-1]
            caught = below_positive[-1] - below_positive[self.starts]
            flagged, before = negatives - below_negative[self.left], negatives - below_negative[self.right]
        return Steps(caught.astype(float), flagged.astype(float), before.astype(float), float(negatives))


def both_ways(scores: DetectionScores, *, ordered: bool = False) -> tuple[Ranks, Ranks]:
    """Ranks with OOD as the class to find, and with in-distribution as the class to find."""
    arrays = checked(scores)
    orders = None
    if ordered:
        orders = np.argsort(arrays[0]), np.argsort(arrays[1])
        inside, outside = arrays[0][orders[0]], arrays[1][orders[1]]
    else:
        inside, outside = both(np.sort, *((array,) for array in arrays))
    (below_inside, upto_outside), (below_outside, upto_inside) = both(
        merged, (inside, outside), (outside, inside)
    )
    # The other class is found from below: what is not above a score becomes what is not below it.
    found = Ranks(outside, below_outside, upto_outside, len(inside), orders=orders)
    below, upto = (len(outside) - counts[::-1] for counts in (upto_inside, below_inside))
    if orders is not None:
        orders = orders[1][::-1], orders[0][::-1]
    return found, Ranks(-inside[::-1], below, upto, len(outside), orders=orders)


def both(run: Callable[..., T], one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[T, T]:
    """What `run` gives for two lists of arguments, side by side where it takes long enough."""
    if len(one[0]) + len(two[0]) < MANY:
        return run(*one), run(*two)
    with ThreadPoolExecutor(1) as other:
        later = other.submit(run, *two)
        return run(*one), later.result()


def merged(first: Array, second: Array) -> tuple[Counts, Counts]:
    """For each of `first` how many of `second` are below it; for each of `second` how many not above it.

    Both are sorted, so that the stable sort only merges them: far faster than searching for each.
    """
    of_first = np.argsort(np.concatenate([first, second]), kind="stable") < len(first)
    ranks = np.flatnonzero(of_first), np.flatnonzero(~of_first)
    return ranks[0] - np.arange(len(first)), ranks[1] - np.arange(len(second))


def checked(scores: DetectionScores, *, least: int = 1) -> tuple[Array, Array]:
    """Both arrays as float64.

    Raises:
        InputError: one is not one number a row, has too few rows, or holds a NaN.
    """
    arrays = np.asarray(scores.inside, dtype=np.float64), np.asarray(scores.outside, dtype=np.float64)
    for name, array in zip(("in-distribution", "OOD"), arrays, strict=True):
        if array.ndim != 1:
            raise InputError(f"{name} scores have shape {array.shape}; give one number a row")
        if len(array) < least:
            raise InputError(f"{len(array)} {name} rows; at least {least} of each kind are needed")
        missing = np.isnan(array)
        if missing.any():
            raise InputError(f"the score of {name} row {int(missing.argmax())} is not a number; leave it out")
    return arrays


def area(steps: Steps) -> float:
    """Under the ROC: pairs in the right order, over all pairs."""
    right = steps.negatives - (steps.flagged + steps.before) / 2
    return float((np.diff(steps.caught, prepend=0.0) * right).sum() / (steps.caught[-1] * steps.negatives))


def precision(steps: Steps) -> float:
    """Share of positive rows among those flagged, averaged over the positive rows."""
    share = steps.caught / np.maximum(steps.caught + steps.flagged, 1.0)
    return float((np.diff(steps.caught, prepend=0.0) * share).sum() / steps.caught[-1])


def false_alarm(steps: Steps) -> float:
    """Share of negative rows flagged where the ROC first has `KEPT` of the positive rows."""
    needed = KEPT * steps.caught[-1]  # 0.95 is so near its float that this is whole where it should be
    step = int(np.searchsorted(steps.caught, needed))
    earlier = steps.caught[step - 1] if step else 0.0
    part = (needed - earlier) / (steps.caught[step] - earlier)
    flagged = steps.before[step] + part * (steps.flagged[step] - steps.before[step])
    return float(flagged / steps.negatives)


# metric -> its formula, and which class it is to find: 0 OOD, 1 in-distribution
METRICS: dict[Metric, tuple[Callable[[Steps], float], int]] = {
    "auroc": (area, 0),
    "aupr_ood": (precision, 0),
    "aupr_id": (precision, 1),
    "fpr95": (false_alarm, 0),
    "ood_missed_at_95_id_kept": (false_alarm, 1),
}


def detection(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    """Every metric of `METRICS`, and `prevalence`, the share of OOD rows: chance for `aupr_ood`."""
    scores = DetectionScores(inside, outside)
    ways = [ranks.steps() for ranks in both_ways(scores)]
    negatives, positives = ways[0].negatives, ways[1].negatives
    found: dict[str, float] = {name: formula(ways[way]) for name, (formula, way) in METRICS.items()}
    return found | {"prevalence": positives / (negatives + positives)}


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Probability that an OOD row scores above an in-distribution row, ties as half (Mann–Whitney).

    0.5 is chance; under it the score has the two the wrong way round.
    """
    return area(one_way(DetectionScores(inside, outside)))


def average_precision(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of OOD rows among those flagged, averaged over the OOD rows; chance is their prevalence.

    A sum of steps: trapezoids would give a constant score (1 + prevalence) / 2.
    """
    return precision(one_way(DetectionScores(inside, outside)))


def fpr95(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of in-distribution rows flagged when 95 % of the OOD rows are caught; chance is 0.95.

    Linear between the points of the ROC. Other papers mean `ood_missed_at_95_id_kept` by this name.
    """
    return false_alarm(one_way(DetectionScores(inside, outside)))


def ood_missed_at_95_id_kept(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of OOD rows missed when 95 % of the in-distribution rows are kept; chance is 0.95.

    Linear between the points of the ROC.
    """
    inside, outside = checked(DetectionScores(inside, outside))
    return false_alarm(one_way(DetectionScores(-outside, -inside)))


def one_way(scores: DetectionScores) -> Steps:
    """The counts with OOD as the class to find."""
    inside, outside = (np.sort(array) for array in checked(scores))
    return Ranks(outside, merged(outside, inside)[0], merged(inside, outside)[1], len(inside)).steps()


def placements(inside: Array, outside: Array) -> tuple[Array, Array]:
    """For each row the share of rows of the other kind that it is in the right order with, ties as half."""
    shares = []
    for own, other in ((-inside, -outside), (outside, inside)):
        ranked = np.sort(other)
        below = np.searchsorted(ranked, own, side="left") + np.searchsorted(ranked, own, side="right")
        shares.append(below / (2 * len(other)))
    return shares[0], shares[1]


def delong(inside: Array, outside: Array) -> float:
    """Variance of a mean over pairs, from the mean of each row of either kind."""
    return float(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))


def auroc_interval(inside: ArrayLike, outside: ArrayLike, *, level: float = 0.95) -> Estimate:
    """AUROC with its interval.

    Normal with DeLong's variance, cut at 0 and 1. Where every pair is in one order that variance is 0 however
    few the rows are; then Newcombe's, which solves for the AUROC that could still have shown this.

    Raises:
        InputError: fewer than 2 rows of either kind.

    Source: DeLong, DeLong and Clarke-Pearson 1988; Newcombe 2006, part 2, method 5.
    """
    # Sorted, because looking up a million numbers in order is several times as fast.
    arrays = [np.sort(array) for array in checked(DetectionScores(inside, outside), least=2)]
    value = auroc(*arrays)
    error = math.sqrt(delong(*placements(*arrays)))
    half = deviation(level) * error
    if half < ROUNDING and value in (0.0, 1.0):
        half = 1 - lowest(len(arrays[0]), len(arrays[1]), level)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), error)


def auroc_difference(first: DetectionScores, second: DetectionScores, *, level: float = 0.95) -> Estimate:
    """By how much the AUROC of one score exceeds that of another on the same rows: paired DeLong.

    Where that variance is 0 and the AUROCs differ, their own intervals are combined as if independent.

    Raises:
        InputError: fewer than 2 rows of either kind, or not the same number for both scores.
    """
    one, two = checked(first, least=2), checked(second, least=2)
    same_rows(one, two)
    value = auroc(*one) - auroc(*two)
    pairs = zip(placements(*one), placements(*two), strict=True)
    error = math.sqrt(delong(*(a - b for a, b in pairs)))
    below = above = deviation(level) * error
    if below < ROUNDING < abs(value):
        a, b = auroc_interval(*one, level=level), auroc_interval(*two, level=level)
        below = math.hypot(a.value - a.low, b.high - b.value)
        above = math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above), error)


def bootstrap(
    metric: Metric,
    scores: DetectionScores,
    against: DetectionScores | None = None,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of a metric, or of its difference to another score on the same rows.

    Rows are drawn within each kind, the same ones for both scores. Time grows as rows times draws.

    Raises:
        InputError: fewer than 2 rows of either kind, or not the same number for both scores.
    """
    if draws < 1:
        raise InputError(f"draws is {draws}; at least 1, and some hundreds for bounds worth the name")
    given = [checked(each, least=2) for each in (scores, against) if each is not None]
    same_rows(given[0], given[-1])
    formula, way = METRICS[metric]
    ranks = [both_ways(DetectionScores(*each), ordered=True)[way] for each in given]
    generator = np.random.default_rng(seed)

    def measured(copies: tuple[Array, Array] | None) -> float:
        values = [formula(each.steps(copies)) for each in ranks]
        return values[0] - sum(values[1:])

    drawn = np.empty(draws)
    for draw in range(draws):
        # As the class that is not to be found, and the one that is.
        sizes = ranks[0].sizes
        counts = [np.bincount(generator.integers(size, size=size), minlength=size) for size in sizes]
        drawn[draw] = measured((counts[0], counts[1]))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(measured(None), float(low), float(high))


def lowest(inside: int, outside: int, level: float) -> float:
    """The lowest AUROC that could still have shown so many rows without one pair in the wrong order."""
    from scipy.optimize import brentq

    z, rows = deviation(level), (inside + outside) / 2 - 1

    def excess(area: float) -> float:
        variance = area * (1 - area) / (inside * outside)
        variance *= 1 + rows * (1 - area) / (2 - area) + rows * area / (1 + area)
        return (1 - area) ** 2 - z**2 * variance

    return float(brentq(excess, 1e-12, 1 - 1e-12))  # an AUROC of 1 itself is a root too


def deviation(level: float) -> float:
    """Standard deviations to either side that hold this share of a normal distribution."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; a share between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + level) / 2)


def same_rows(first: tuple[Array, Array], second: tuple[Array, Array]) -> None:
    """Refuse scores that cannot be of the same rows."""
    one, two = (tuple(map(len, each)) for each in (first, second))
    if one != two:
        raise InputError(
            f"the two scores have {one} and {two} rows inside and outside; compare the same rows"
        )


def threshold_catching(outside: ArrayLike, share: float = KEPT) -> float:
    """The highest threshold that at least this share of the OOD rows reach."""
    return -threshold_keeping(np.negative(outside), share)


def threshold_keeping(inside: ArrayLike, share: float = KEPT) -> float:
    """The lowest threshold that at least this share of in-distribution rows do not exceed.

    Raises:
        InputError: no rows, a NaN, or a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; it is in (0, 1]")
    ranked = np.sort(checked(DetectionScores(inside, inside))[0])
    exact = Fraction(share).limit_denominator(10**6)  # 0.95 as a float is less than 95 / 100
    return float(ranked[math.ceil(exact * len(ranked)) - 1])


def conformal_p(calibration: ArrayLike, scores: ArrayLike) -> Float[np.ndarray, " rows"]:
    """For each score the probability of one as high by chance, if it were a further in-distribution row.

    `(1 + #{calibration >= score}) / (n + 1)`. Holds for calibration rows that tuning never saw.
    """
    known, new = checked(DetectionScores(calibration, scores))
    ranked = np.sort(known)
    return (1 + len(ranked) - np.searchsorted(ranked, new, side="left")) / (len(ranked) + 1)


class LengthMatchedAUROC(NamedTuple):
    """AUROC among rows of like length.

    Attributes:
        value: over all pairs of like length; NaN when there is no such pair.
        pairs: share of all pairs that these are.
        aurocs: by bin; NaN where it holds rows of one kind only.
        inside, outside: rows by bin.
        longest: greatest length in each bin but the last.
    """

    value: float
    pairs: float
    aurocs: Float[np.ndarray, " bins"]
    inside: Int[np.ndarray, " bins"]
    outside: Int[np.ndarray, " bins"]
    longest: Float[np.ndarray, " edges"]


def auroc_within(scores: DetectionScores, lengths: DetectionScores, *, bins: int = 10) -> LengthMatchedAUROC:
    """AUROC that length cannot account for: of pairs in the same decile of length.

    Deciles are of all rows together, and equal lengths share one.

    Raises:
        InputError: scores and lengths are not of the same rows.
    """
    inside, outside = checked(scores)
    lengths_inside, lengths_outside = checked(lengths)
    same_rows((inside, outside), (lengths_inside, lengths_outside))
    edges = np.quantile(np.concatenate([lengths_inside, lengths_outside]), np.arange(1, bins) / bins)
    places = [np.searchsorted(edges, each, side="left") for each in (lengths_inside, lengths_outside)]
    counts = [np.bincount(each, minlength=bins) for each in places]
    pairs = (counts[0] * counts[1]).astype(float)
    aurocs = np.full(bins, np.nan)
    for bin_ in np.flatnonzero(pairs):
        aurocs[bin_] = auroc(inside[places[0] == bin_], outside[places[1] == bin_])
    compared = pairs.sum()
    value = float(np.nansum(aurocs * pairs) / compared) if compared else math.nan
    return LengthMatchedAUROC(
        value, float(compared / (len(inside) * len(outside))), aurocs, counts[0], counts[1], edges
    )
