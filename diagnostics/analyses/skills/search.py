"""The searches for a region that carries one task: of any size, checked, and repeated with other seeds.

One search serves the whole curve: its mask changes in size from step to step, and the region of any size is
the first of its ranking. Some sizes are searched again by themselves, and where that does better on rows that
no search saw, its region stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.candidates import Candidates, GraftedModel
from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.mask_search import (
    POINTS,
    Oracle,
    budget_search,
    faithful_search,
    integrated,
    mask_of,
)
from diagnostics.analyses.skills.movement import kth_largest
from diagnostics.analyses.skills.region import Region
from probes.passes.masked_finetune import row_batches
from probes.passes.objective import Objective

Mode = Literal["budget", "faithful", "movement"]
Start = Literal["gradients", "movement"]

CANDIDATES = 0.1  # of the entries: among them lay 96 to 100 % of what a search over all of them found
PER_ENTRY = 80  # candidates for each entry of the largest budget, if that is fewer
PROBED = 0.05  # of the entries that are no candidates


@dataclass
class Counter:
    """Gradients taken so far, told to whoever waits."""

    total: int
    progress: Callable[[int, int, str], None] | None
    done: int = 0

    def count(self, what: str) -> Callable[[int, int], None]:
        """What a search calls at each of its steps."""

        def step(done: int, total: int) -> None:
            self.done += 1
            if self.progress:
                self.progress(min(self.done, self.total), self.total, what)

        return step


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Candidates ranked by a search, and what it was.

    Attributes:
        scores: of the candidates.
        sizes: that the masks on the way had.
        steps: gradients taken; 0 for an order of movement alone.
        reached: False where a faithful search ended before its mask had its size.
    """

    scores: Tensor
    sizes: tuple[int, ...]
    steps: int = 0
    reached: bool = True


@dataclass(kw_only=True)
class TaskSearch:
    """Searches for one task.

    Attributes:
        objective: the loss of its search rows; None where movement alone ranks.
        sizes: of the regions asked for, rising.
        share: of the entries that are candidates; None: as many as the sizes need.
        rate: of the first step of a `budget` search.
        starts: each start's scores, of a `budget` search.
        start: the one that did better.
        notes: what a reader must know.
    """

    bench: GraftEvaluator
    task: str
    mode: Mode
    objective: Objective | None
    sizes: Sequence[int]
    share: float | None
    steps: int
    rate: float
    batch: int
    seed: int
    counter: Counter
    start: Start = "gradients"
    starts: dict[Start, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        movement = self.bench.movement
        share = CANDIDATES if self.share is None else self.share
        count = math.ceil(share * movement.total)
        if self.share is None:
            count = min(count, PER_ENTRY * max(self.sizes))
        self._take(max(1, min(count, movement.total_moved)))
        if self.objective is not None:
            self._check(double=self.share is None)

    def _take(self, count: int) -> None:
        self.candidates = Candidates.of(self.bench.movement.largest(count), self.bench.read)

    def _check(self, *, double: bool) -> None:
        """Score some other entries by their gradients, and take twice as many candidates if one is needed."""
        assert self.objective is not None
        count, movement = len(self.candidates), self.bench.movement
        others = movement.total_moved - count
        size = max([size for size in self.sizes if size <= count / 10] or [min(*self.sizes, count)])
        if not others:
            return
        # No more of them than candidates, so that they take no more memory.
        share = min(PROBED, count / others)
        probed = movement.others(self.candidates.index, share, self.seed)
        if not region.size(probed):
            return
        with GraftedModel(self.bench.host, self.candidates) as graft:
            middle, rows = torch.full((count,), 0.5), self.batch_rows()
            own = -graft.gradient(middle, self.objective, rows)
            theirs = -graft.elsewhere(probed, self.bench.read, middle, self.objective, rows)
        bar = kth_largest(own, size)
        entered = int((theirs > bar).sum())
        if not entered:
            return
        said = (
            f"{self.task}: of {len(theirs):,} other entries, drawn at random, the gradients of {entered:,} "
            f"would put them among the {size:,} best of the {count:,} candidates"
        )
        if not double:
            self.notes.append(f"{said}; a larger share of candidates may find a better region.")
            return
        self._take(min(2 * count, movement.total_moved))
        self.notes.append(f"{said}; twice as many were taken.")

    def batch_rows(self) -> list[int]:
        """The rows that one-off gradients are taken on."""
        assert self.objective is not None
        return list(next(row_batches(self.objective.rows, 8 * self.batch, self.seed)))

    def region(self, ranking: Ranking | None, size: int) -> Region:
        """The first entries of a ranking; behind the candidates, and without a ranking, by movement."""
        if size > len(self.candidates):
            return self.bench.movement.largest(size)
        if ranking is None:
            return self.candidates.region(mask_of(self.candidates.movement(), size))
        return self.candidates.region(mask_of(ranking.scores, size, self.candidates.movement))

    def curve(self, better: Callable[[Ranking], float]) -> Ranking:
        """The ranking that serves all sizes.

        Args:
            better: how well a ranking does on rows that no search sees; of two starts the better is kept.
        """
        inner = [size for size in self.sizes if size <= len(self.candidates) / 2]
        if self.mode == "faithful":
            return self.run([(inner or self.sizes)[len(inner or self.sizes) // 2]], self.seed)
        with GraftedModel(self.bench.host, self.candidates) as graft:
            everything = self._oracle(graft, None, self.seed)
            counted = self.counter.count(f"{self.task}: integrated gradients")
            start = integrated(everything, len(self.candidates), step=counted)
        self.starts = {"gradients": start, "movement": self.candidates.movement().float()}
        made: dict[Start, Ranking] = {}
        for start_name in self.starts:
            self.start = start_name
            made[start_name] = self.run(inner or list(self.sizes), self.seed)
        self.start = max(made, key=lambda name: better(made[name]))
        self.starts = {self.start: self.starts[self.start]}
        return made[self.start]

    def run(self, sizes: Sequence[int], seed: int) -> Ranking:
        """A search over masks of these sizes, from the better start."""
        what = f"{self.task}: {self.mode} search"
        count = len(self.candidates)
        with GraftedModel(self.bench.host, self.candidates) as graft:
            if self.mode == "faithful":
                nothing = torch.zeros(count, dtype=torch.bool)
                oracle = self._oracle(graft, None, seed)
                grown = faithful_search(
                    oracle, sizes[0], nothing, steps=self.steps, step=self.counter.count(what)
                )
                return Ranking(
                    scores=grown.scores, sizes=tuple(sizes), steps=grown.steps, reached=grown.reached
                )
            # Each size as often as any other, in an order that is drawn anew each time round.
            generator = np.random.default_rng(seed)
            rounds = math.ceil(self.steps / len(sizes))
            turns = [size for _ in range(rounds) for size in generator.permutation(np.array(sizes)).tolist()]
            oracle = self._oracle(graft, self.batch, seed)
            scores = budget_search(
                oracle, self.starts[self.start], turns[: self.steps], self.candidates.movement,
                rate=self.rate, step=self.counter.count(what),
            )  # fmt: skip
        return Ranking(scores=scores, sizes=tuple(sizes), steps=self.steps)

    def _oracle(self, graft: GraftedModel, batch: int | None, seed: int) -> Oracle:
        """The gradient on batches of rows, or on all; with another seed, on all drawn with replacement."""
        objective = self.objective
        assert objective is not None
        if batch is not None:
            drawn = row_batches(objective.rows, batch, seed)
            return lambda mask: graft.gradient(mask, objective, next(drawn))
        rows = list(objective.rows)
        if seed != self.seed:  # all rows are the same for every seed, unless they are drawn anew
            rows = np.random.default_rng(seed).choice(rows, len(rows)).tolist()
        return lambda mask: graft.gradient(mask, objective, rows)


def gradients(mode: Mode, steps: int, seeds: int, checked: int) -> int:
    """About how many gradients the searches for one task take."""
    if mode == "movement":
        return 1
    return (POINTS + steps if mode == "budget" else 0) + steps * (1 + checked + seeds - 1)
