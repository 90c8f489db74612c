"""Detection metrics of OOD scores, with intervals.

Functions take the scores of the `inside` (in-distribution) and `outside` (OOD) rows. Higher means more
out-of-distribution; OOD is the positive class. Only order matters; ties count half. Metrics are in [0, 1] and
come from counts at the distinct scores, so that millions of rows cost two sorts.
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

from diagnostics.numerics.estimates import Estimate
from probes.errors import InputError

Metric: TypeAlias = Literal["auroc", "aupr_ood", "aupr_id", "fpr95", "ood_missed_at_95_id_kept"]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

KEPT = 0.95
ROUNDING = 1e-12  # half-widths below this are 0
MANY = 2**17  # from so many scores on, sorting takes longer than starting a thread
T = TypeVar("T")


class DetectionScores(NamedTuple):
    """Scores of in-distribution and of OOD rows; two scores are compared in the same order of rows."""

    inside: ArrayLike
    outside: ArrayLike


@dataclass(frozen=True)
class ROC:
    """The ROC at each distinct score of the positive rows, from the highest down.

    Attributes:
        caught, flagged: positive and negative rows with at least this score.
        before: negative rows with a higher score.
    """

    caught: Float[np.ndarray, " steps"]
    flagged: Float[np.ndarray, " steps"]
    before: Float[np.ndarray, " steps"]
    negatives: float


class Ranks:
    """Ranks of the distinct positive scores among all: the ROC of every bootstrap draw follows from them."""

    def __init__(
        self, positive: Array, left: Counts, right: Counts, negatives: int, *,
        orders: tuple[Array, Array] | None = None,
    ):  # fmt: skip
        """Take the positive scores in ascending order.

        Args:
            left, right: for each, the number of negative scores below it, and of those not above it.
            orders: argsort of negative and of positive rows; needed for `copies`.
        """
        self.sizes = negatives, len(positive)
        self.orders = orders
        self.starts = np.flatnonzero(np.concatenate([[True], positive[1:] != positive[:-1]]))[::-1]
        self.left, self.right = left[self.starts], right[self.starts]

    def roc(self, copies: tuple[Array, Array] | None = None) -> ROC:
        """The ROC; `copies` holds how often each negative and each positive row counts, in input order."""
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
        return ROC(caught.astype(float), flagged.astype(float), before.astype(float), float(negatives))


def both_ways(scores: DetectionScores, *, ordered: bool = False) -> tuple[Ranks, Ranks]:
    """Ranks with OOD as the positive class, and with in-distribution as the positive class."""
    inside, outside = checked(scores)
    orders = None
    if ordered:
        orders = np.argsort(inside), np.argsort(outside)
        inside, outside = inside[orders[0]], outside[orders[1]]
    else:
        inside, outside = both(np.sort, (inside,), (outside,))
    (below_inside, upto_outside), (below_outside, upto_inside) = both(
        merged, (inside, outside), (outside, inside)
    )
    ood = Ranks(outside, below_outside, upto_outside, len(inside), orders=orders)
    # With all signs turned, "not above a score" becomes "not below it".
    below, upto = (len(outside) - counts[::-1] for counts in (upto_inside, below_inside))
    if orders is not None:
        orders = orders[1][::-1], orders[0][::-1]
    return ood, Ranks(-inside[::-1], below, upto, len(outside), orders=orders)


def both(run: Callable[..., T], first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[T, T]:
    """`run` on two argument lists, in two threads where they are long."""
    if len(first[0]) + len(second[0]) < MANY:
        return run(*first), run(*second)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, *second)
        return run(*first), future.result()


def merged(first: Array, second: Array) -> tuple[Counts, Counts]:
    """For each of `first` the number of `second` below it; for each of `second` that of `first` not above it.

    Both are sorted, so that the stable sort only merges them: far faster than a search for each.
    """
    from_first = np.argsort(np.concatenate([first, second]), kind="stable") < len(first)
    ranks = np.flatnonzero(from_first), np.flatnonzero(~from_first)
    return ranks[0] - np.arange(len(first)), ranks[1] - np.arange(len(second))


def checked(scores: DetectionScores, *, least: int = 1) -> tuple[Array, Array]:
    """Both arrays as float64, of at least so many rows and without NaN."""
    arrays = np.asarray(scores.inside, dtype=np.float64), np.asarray(scores.outside, dtype=np.float64)
    for name, array in zip(("in-distribution", "OOD"), arrays, strict=True):
        if array.ndim != 1:
            raise InputError(f"{name} scores have shape {array.shape}; give one number per row")
        if len(array) < least:
            raise InputError(f"{len(array)} {name} rows; at least {least} of each kind are needed")
        missing = np.isnan(array)
        if missing.any():
            raise InputError(f"the score of {name} row {int(missing.argmax())} is not a number; leave it out")
    return arrays


def area(roc: ROC) -> float:
    """Area under the ROC: share of pairs in the right order."""
    right = roc.negatives - (roc.flagged + roc.before) / 2
    return float((np.diff(roc.caught, prepend=0.0) * right).sum() / (roc.caught[-1] * roc.negatives))


def precision(roc: ROC) -> float:
    """Average precision: share of positive rows among those flagged, averaged over the positive rows."""
    share = roc.caught / np.maximum(roc.caught + roc.flagged, 1.0)
    return float((np.diff(roc.caught, prepend=0.0) * share).sum() / roc.caught[-1])


def false_alarm(roc: ROC) -> float:
    """Share of negative rows flagged where the ROC reaches `KEPT` of the positive rows, interpolated."""
    needed = KEPT * roc.caught[-1]  # a whole number where it should be: 0.95 is near its float
    step = int(np.searchsorted(roc.caught, needed))
    earlier = roc.caught[step - 1] if step else 0.0
    part = (needed - earlier) / (roc.caught[step] - earlier)
    flagged = roc.before[step] + part * (roc.flagged[step] - roc.before[step])
    return float(flagged / roc.negatives)


# metric -> its formula, and the positive class: 0 OOD, 1 in-distribution
METRICS: dict[Metric, tuple[Callable[[ROC], float], int]] = {
    "auroc": (area, 0),
    "aupr_ood": (precision, 0),
    "aupr_id": (precision, 1),
    "fpr95": (false_alarm, 0),
    "ood_missed_at_95_id_kept": (false_alarm, 1),
}


def detection(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    """Every metric of `METRICS`, and `prevalence`, the share of OOD rows: chance for `aupr_ood`.

    `fpr95` is the share of in-distribution rows flagged when 95 % of the OOD rows are; other papers mean
    `ood_missed_at_95_id_kept` by that name. Chance is 0.95 for both. Average precision is a sum of steps:
    trapezoids would give a constant score (1 + prevalence) / 2.

    >>> detection(inside=[0, 1, 2], outside=[3, 4])["fpr95"]
    0.0
    """
    curves = [ranks.roc() for ranks in both_ways(DetectionScores(inside, outside))]
    negatives, positives = curves[0].negatives, curves[1].negatives
    metrics: dict[str, float] = {name: formula(curves[side]) for name, (formula, side) in METRICS.items()}
    return metrics | {"prevalence": positives / (negatives + positives)}


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Probability that an OOD row scores above an in-distribution row, ties as half (Mann–Whitney).

    0.5 is chance; below it the score ranks the two classes the wrong way round.
    """
    inside, outside = (np.sort(array) for array in checked(DetectionScores(inside, outside)))
    left, right = merged(outside, inside)[0], merged(inside, outside)[1]
    return area(Ranks(outside, left, right, len(inside)).roc())


def placements(inside: Array, outside: Array) -> tuple[Array, Array]:
    """For each row the share of rows of the other class in the right order with it, ties as half."""
    shares = []
    for rows, other in ((-inside, -outside), (outside, inside)):
        ranked = np.sort(other)
        below = np.searchsorted(ranked, rows, side="left") + np.searchsorted(ranked, rows, side="right")
        shares.append(below / (2 * len(other)))
    return shares[0], shares[1]


def delong(inside: Array, outside: Array) -> float:
    """DeLong's variance of a mean over pairs, from the mean of each row of either class."""
    return float(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))


def auroc_interval(inside: ArrayLike, outside: ArrayLike, *, level: float = 0.95) -> Estimate:
    """AUROC with its interval: normal with DeLong's variance, clipped to [0, 1].

    Where all pairs are in one order that variance is 0 however few the rows are. Then the interval is
    Newcombe's, which ends at the AUROC that could still have shown this.

    Source: DeLong, DeLong and Clarke-Pearson 1988; Newcombe 2006, part 2, method 5.
    """
    # Sorted: looking up a million numbers in order is several times faster.
    arrays = [np.sort(array) for array in checked(DetectionScores(inside, outside), least=2)]
    value = auroc(*arrays)
    error = math.sqrt(delong(*placements(*arrays)))
    half = deviation(level) * error
    if half < ROUNDING and value in (0.0, 1.0):
        half = 1 - lowest(len(arrays[0]), len(arrays[1]), level)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), error)


def auroc_difference(first: DetectionScores, second: DetectionScores, *, level: float = 0.95) -> Estimate:
    """AUROC of one score minus that of another on the same rows, by paired DeLong.

    Where that variance is 0 and the AUROCs differ, their two intervals are combined as if independent.
    """
    minuend, subtrahend = checked(first, least=2), checked(second, least=2)
    same_rows(minuend, subtrahend)
    value = auroc(*minuend) - auroc(*subtrahend)
    pairs = zip(placements(*minuend), placements(*subtrahend), strict=True)
    error = math.sqrt(delong(*(a - b for a, b in pairs)))
    below = above = deviation(level) * error
    if below < ROUNDING < abs(value):
        a, b = auroc_interval(*minuend, level=level), auroc_interval(*subtrahend, level=level)
        below = math.hypot(a.value - a.low, b.high - b.value)
        above = math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above), error)


def bootstrap(
    metric: Metric, scores: DetectionScores, against: DetectionScores | None = None, *, draws: int = 1000,
    level: float = 0.95, seed: int = 0,
) -> Estimate:  # fmt: skip
    """Percentile bootstrap of a metric, or of its difference to another score on the same rows.

    Rows are drawn within each class, the same ones for both scores. Time grows as rows times draws.
    """
    if draws < 1:
        raise InputError(f"draws is {draws}; at least 1, and some hundreds for stable bounds")
    arrays = [checked(compared, least=2) for compared in (scores, against) if compared is not None]
    same_rows(arrays[0], arrays[-1])
    formula, side = METRICS[metric]
    ranks = [both_ways(DetectionScores(*pair), ordered=True)[side] for pair in arrays]
    generator = np.random.default_rng(seed)

    def measured(copies: tuple[Array, Array] | None) -> float:
        values = [formula(rank.roc(copies)) for rank in ranks]
        return values[0] - sum(values[1:])

    drawn, sizes = np.empty(draws), ranks[0].sizes
    for draw in range(draws):
        # Negative rows, then positive ones.
        counts = [np.bincount(generator.integers(size, size=size), minlength=size) for size in sizes]
        drawn[draw] = measured((counts[0], counts[1]))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(measured(None), float(low), float(high))


def lowest(inside: int, outside: int, level: float) -> float:
    """Newcombe's lower bound of the AUROC where all pairs of so many rows are in the right order."""
    from scipy.optimize import brentq

    z, rows = deviation(level), (inside + outside) / 2 - 1

    def excess(area: float) -> float:
        variance = area * (1 - area) / (inside * outside)
        variance *= 1 + rows * (1 - area) / (2 - area) + rows * area / (1 + area)
        return (1 - area) ** 2 - z**2 * variance

    return float(brentq(excess, 1e-12, 1 - 1e-12))  # an AUROC of 1 itself is a root too


def deviation(level: float) -> float:
    """Half-width, in standard deviations, of the interval that holds this share of a normal distribution."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; a share between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + level) / 2)


def same_rows(first: tuple[Array, Array], second: tuple[Array, Array]) -> None:
    """Refuse scores of different rows."""
    counts, others = (tuple(map(len, pair)) for pair in (first, second))
    if counts != others:
        raise InputError(
            f"the two scores have {counts} and {others} rows inside and outside; compare the same rows"
        )


def threshold_catching(outside: ArrayLike, share: float = KEPT) -> float:
    """The highest threshold reached by at least this share of the OOD rows."""
    return -threshold_keeping(np.negative(outside), share)


def threshold_keeping(inside: ArrayLike, share: float = KEPT) -> float:
    """The lowest threshold not exceeded by at least this share of the in-distribution rows."""
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; it is in (0, 1]")
    ranked = np.sort(checked(DetectionScores(inside, inside))[0])
    exact = Fraction(share).limit_denominator(10**6)  # 0.95 as a float is less than 95 / 100
    return float(ranked[math.ceil(exact * len(ranked)) - 1])


def conformal_p(calibration: ArrayLike, scores: ArrayLike) -> Float[np.ndarray, " rows"]:
    """Conformal p-value of each score as a further in-distribution row.

    `(1 + #{calibration >= score}) / (n + 1)`. It holds for calibration rows that tuning never saw.
    """
    calibrated, new = checked(DetectionScores(calibration, scores))
    ranked = np.sort(calibrated)
    return (1 + len(ranked) - np.searchsorted(ranked, new, side="left")) / (len(ranked) + 1)


class LengthMatchedAUROC(NamedTuple):
    """AUROC among rows of similar length; NaN without pairs of one length bin.

    Attributes:
        pairs: share of such pairs in all pairs.
        aurocs, inside, outside: AUROC and numbers of rows of each bin.
        longest: greatest length in each bin but the last.
    """

    value: float
    pairs: float
    aurocs: Float[np.ndarray, " bins"]
    inside: Int[np.ndarray, " bins"]
    outside: Int[np.ndarray, " bins"]
    longest: Float[np.ndarray, " edges"]


def auroc_within(scores: DetectionScores, lengths: DetectionScores, *, bins: int = 10) -> LengthMatchedAUROC:
    """AUROC within deciles of length of all rows together, so that length cannot explain it."""
    inside, outside = checked(scores)
    arrays = checked(lengths)
    same_rows((inside, outside), arrays)
    edges = np.quantile(np.concatenate(arrays), np.arange(1, bins) / bins)
    bin_of = [np.searchsorted(edges, array, side="left") for array in arrays]
    counts = [np.bincount(array, minlength=bins) for array in bin_of]
    pairs = (counts[0] * counts[1]).astype(float)
    aurocs = np.full(bins, np.nan)
    for bin_ in np.flatnonzero(pairs):
        aurocs[bin_] = auroc(inside[bin_of[0] == bin_], outside[bin_of[1] == bin_])
    compared = pairs.sum()
    value = float(np.nansum(aurocs * pairs) / compared) if compared else math.nan
    share = float(compared / (len(inside) * len(outside)))
    return LengthMatchedAUROC(value, share, aurocs, counts[0], counts[1], edges)
