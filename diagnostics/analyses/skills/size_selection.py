"""Choice of the region size for a task: the smallest that keeps enough of the gain on the selection rows."""

import math
from dataclasses import dataclass, field

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.region import Region
from diagnostics.analyses.skills.search import Ranking, TaskSearch
from diagnostics.evaluation.answers import Answers, score

CHECKED = 3  # sizes with a search of their own
MIN_GAIN = 0.01  # of accuracy, or of the loss gained, by which such a search must win
HALVINGS = 3  # of the gap between the largest size that is too small and the smallest that suffices


@dataclass(kw_only=True)
class SizeChoice:
    """Regions for one task."""

    search: TaskSearch
    regions: dict[int, Region] = field(default_factory=dict)  # by ascending size; the chosen one among them
    kept: dict[int, float] = field(default_factory=dict)  # share of the gain, on the selection rows
    own_search: set[int] = field(default_factory=set)  # sizes with a region from a search for that size alone
    size: int = 0  # the chosen one
    passed: bool = False  # whether it keeps what is asked for; else it is the size that keeps the most
    ranking: Ranking | None = None  # the ranking that the chosen region begins; None for movement
    other_seeds: list[Region] = field(default_factory=list)  # of the chosen size

    @property
    def chosen(self) -> Region:
        """The region that is reported."""
        return self.regions[self.size]

    def stability(self) -> list[tuple[int, int, float]]:
        """Two seeds, counted from 0, and the Jaccard index of their regions."""
        by_seed = [self.chosen, *self.other_seeds]
        return [
            (first, second, region.jaccard(by_seed[first], by_seed[second]))
            for second in range(len(by_seed))
            for first in range(second)
        ]


class SizeChooser:
    """Chooses a size for one task."""

    def __init__(
        self, evaluator: GraftEvaluator, search: TaskSearch, base: Answers, tuned: Answers, share: float
    ):
        """Prepare a choice from both sides' answers to the selection rows; `share` is of the gain to keep."""
        self.evaluator, self.search, self.share = evaluator, search, share
        self._key = (search.task, "selection")
        self._base, self._gain = score(base), score(tuned) - score(base)
        self.min_gain = MIN_GAIN if tuned.logs is not None else MIN_GAIN * max(self._gain, 0.0)

    def score(self, region: Region) -> float:
        """Score on the selection rows of base with a region of tuned."""
        return score(self.evaluator.graft(region, [self._key])[self._key])

    def kept(self, value: float) -> float:
        """The share of the gain that such a score keeps; NaN without a gain on these rows."""
        return (value - self._base) / self._gain if self._gain > 0 else math.nan

    def choose(self, *, seeds: int) -> SizeChoice:
        """Search, check, choose, and search again with other seeds."""
        search, choice = self.search, SizeChoice(search=self.search)
        values: dict[int, float] = {}
        rankings: dict[int, Ranking | None] = {}

        def total_score(ranking: Ranking) -> float:
            return sum(self.score(search.region(ranking, size)) for size in search.sizes)

        curve = None if search.mode == "movement" else search.rank_all_sizes(total_score)
        for size in search.sizes:
            choice.regions[size], rankings[size] = search.region(curve, size), curve
            values[size] = self.score(choice.regions[size])
        if curve is not None:
            for size in self._sizes_to_check(values):
                ranking = search.rank([size], search.seed) if curve.sizes != (size,) else curve
                candidate = search.region(ranking, size)
                value = self.score(candidate)
                if value > values[size] + self.min_gain:
                    choice.regions[size], rankings[size], values[size] = candidate, ranking, value
                    choice.own_search.add(size)
        choice.size = self._smallest(values) or 0
        choice.passed = bool(choice.size)
        if choice.passed:
            self._narrow(choice, values, rankings)
        else:
            choice.size = max(values, key=lambda size: (values[size], -size))
        choice.kept = {size: self.kept(values[size]) for size in sorted(values)}
        choice.regions = {size: choice.regions[size] for size in choice.kept}
        choice.ranking = rankings[choice.size]
        if choice.ranking is not None and choice.size < len(search.candidates):
            for seed in range(search.seed + 1, search.seed + seeds):
                ranking = search.rank(choice.ranking.sizes, seed)
                choice.other_seeds.append(search.region(ranking, choice.size))
        return choice

    def _smallest(self, values: dict[int, float]) -> int | None:
        """The smallest size that keeps what is asked for."""
        return next((size for size in sorted(values) if self.kept(values[size]) >= self.share), None)

    def _sizes_to_check(self, values: dict[int, float]) -> list[int]:
        """The most informative sizes: around the smallest that suffices, and the largest."""
        inner = [size for size in self.search.sizes if size <= len(self.search.candidates) / 2]
        smallest = self._smallest(values)
        index = next((i for i, size in enumerate(inner) if size == smallest), len(inner) - 1)
        order = [index, index - 1, len(inner) - 1, index + 1, index - 2]
        wanted = dict.fromkeys(i for i in order if 0 <= i < len(inner))
        return sorted(inner[i] for i in list(wanted)[:CHECKED])

    def _narrow(
        self, choice: SizeChoice, values: dict[int, float], rankings: dict[int, Ranking | None]
    ) -> None:
        """Halve the gap below the smallest size that suffices, which starts at the largest that does not."""
        low = max((size for size in values if size < choice.size), default=0)
        for _ in range(HALVINGS if low else 0):
            size = round(math.sqrt(low * choice.size))
            if size in values:
                return
            ranking = rankings[choice.size]
            candidate = self.search.region(ranking, size)
            value = self.score(candidate)
            if self.kept(value) >= self.share:
                choice.regions[size], values[size], rankings[size] = candidate, value, ranking
                if choice.size in choice.own_search:
                    choice.own_search.add(size)
                choice.size = size
            else:
                low = size
