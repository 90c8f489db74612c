"""Which size of region carries a task: searched once for all sizes, checked, and chosen on rows of its own.

The skill size is the smallest region that keeps so much of what tuning gained, on rows that no search saw and
nothing is reported on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.region import Region
from diagnostics.analyses.skills.search import Ranking, TaskSearch
from diagnostics.evaluation.answers import Answers, score

CHECKED = 3  # sizes that are searched again by themselves
POINT = 0.01  # of accuracy, or of the loss gained, that such a search must win to stand
HALVINGS = 3  # of the gap between the largest size that is too small and the smallest that is not


@dataclass(kw_only=True)
class SizeChoice:
    """Regions for one task.

    Attributes:
        regions: by size, rising; the chosen one among them.
        kept: of each, the share of tuning's gain that it keeps on the selection rows.
        alone: sizes whose region comes from a search of their own.
        size: the chosen one.
        passed: whether it keeps what is asked for; else it is the one that keeps the most.
        ranking: what its region is the first of; None: movement.
        again: the region of this size from searches with other seeds.
    """

    search: TaskSearch
    regions: dict[int, Region] = field(default_factory=dict)
    kept: dict[int, float] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    size: int = 0
    passed: bool = False
    ranking: Ranking | None = None
    again: list[Region] = field(default_factory=list)

    @property
    def chosen(self) -> Region:
        """The region that is reported."""
        return self.regions[self.size]

    def stability(self) -> list[tuple[int, int, float]]:
        """Two seeds, counted from 0, and how alike their regions are."""
        every = [self.chosen, *self.again]
        return [
            (first, second, region.jaccard(every[first], every[second]))
            for second in range(len(every))
            for first in range(second)
        ]


class SizeChooser:
    """Chooses a size for one task."""

    def __init__(
        self, bench: GraftEvaluator, search: TaskSearch, base: Answers, tuned: Answers, share: float
    ):
        """Take what both sides say of the selection rows.

        Args:
            share: of tuning's gain that a region is to keep.
        """
        self.bench, self.search, self.share = bench, search, share
        self._key = (search.task, "selection")
        self._base, self._gain = score(base), score(tuned) - score(base)
        self.point = POINT if tuned.logs is not None else POINT * max(self._gain, 0.0)

    def score(self, one: Region) -> float:
        """How well base does on the selection rows with a region of tuned."""
        return score(self.bench.graft(one, [self._key])[self._key])

    def kept(self, value: float) -> float:
        """The share of tuning's gain that such a score keeps; NaN without a gain on these rows."""
        return (value - self._base) / self._gain if self._gain > 0 else math.nan

    def choose(self, *, seeds: int) -> SizeChoice:
        """Search, check, choose, and search again with other seeds."""
        search, made = self.search, SizeChoice(search=self.search)
        values: dict[int, float] = {}
        rankings: dict[int, Ranking | None] = {}
        curve = None
        if search.mode != "movement":

            def better(ranking: Ranking) -> float:
                return sum(self.score(search.region(ranking, size)) for size in search.sizes)

            curve = search.curve(better)
        for size in search.sizes:
            made.regions[size], rankings[size] = search.region(curve, size), curve
            values[size] = self.score(made.regions[size])
        if curve is not None:
            for size in self._to_check(list(search.sizes), values):
                own = search.run([size], search.seed) if curve.sizes != (size,) else curve
                one = search.region(own, size)
                value = self.score(one)
                if value > values[size] + self.point:
                    made.regions[size], rankings[size], values[size] = one, own, value
                    made.alone.add(size)
        made.size = self._smallest(values) or 0
        made.passed = bool(made.size)
        if made.passed:
            self._narrow(made, values, rankings)
        else:
            made.size = max(values, key=lambda size: (values[size], -size))
        made.kept = {size: self.kept(values[size]) for size in sorted(values)}
        made.regions = {size: made.regions[size] for size in made.kept}
        made.ranking = rankings[made.size]
        if made.ranking is not None and made.size < len(search.candidates):
            for seed in range(search.seed + 1, search.seed + seeds):
                made.again.append(search.region(search.run(made.ranking.sizes, seed), made.size))
        return made

    def _smallest(self, values: dict[int, float]) -> int | None:
        """The smallest size that keeps what is asked for."""
        return next((size for size in sorted(values) if self.kept(values[size]) >= self.share), None)

    def _to_check(self, sizes: Sequence[int], values: dict[int, float]) -> list[int]:
        """Sizes whose own search could tell most: around the smallest that suffices, and the largest."""
        inner = [size for size in sizes if size <= len(self.search.candidates) / 2]
        first = self._smallest(values)
        place = next((i for i, size in enumerate(inner) if size == first), len(inner) - 1)
        order = [place, place - 1, len(inner) - 1, place + 1, place - 2]
        wanted = dict.fromkeys(i for i in order if 0 <= i < len(inner))
        return sorted(inner[i] for i in list(wanted)[:CHECKED])

    def _narrow(
        self, made: SizeChoice, values: dict[int, float], rankings: dict[int, Ranking | None]
    ) -> None:
        """Halve the gap below the smallest size that suffices; it starts at the largest that does not."""
        low = max((size for size in values if size < made.size), default=0)
        for _ in range(HALVINGS if low else 0):
            size = round(math.sqrt(low * made.size))
            if size in values:
                return
            ranking = rankings[made.size]
            one = self.search.region(ranking, size)
            value = self.score(one)
            if self.kept(value) >= self.share:
                made.regions[size], values[size], rankings[size] = one, value, ranking
                if made.size in made.alone:
                    made.alone.add(size)
                made.size = size
            else:
                low = size
