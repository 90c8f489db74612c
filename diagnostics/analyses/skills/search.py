"""Searches for a region that carries one task: for all sizes at once, for one size, and with other seeds.

One search serves the whole curve: its mask changes in size from step to step, and a region of any size is the
beginning of its ranking. Some sizes are searched again alone, and taken where they do better on other rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diagnostics.analyses.skills import mask_search, region
from diagnostics.analyses.skills.candidates import Candidates, GraftedModel
from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.mask_search import Oracle, top_mask
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
class GradientProgress:
    """Counts gradients and reports them."""

    total: int
    progress: Callable[[int, int, str], None] | None
    done: int = 0

    def steps_of(self, what: str) -> Callable[[int, int], None]:
        """The callback that a search calls at each of its steps."""

        def step(done: int, total: int) -> None:
            self.done += 1
            if self.progress:
                self.progress(min(self.done, self.total), self.total, what)

        return step


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Candidates ranked by a search."""

    scores: Tensor  # of the candidates
    sizes: tuple[int, ...]  # of the masks during the search
    steps: int = 0  # gradients taken; 0 for an order of movement alone
    reached: bool = True  # False where a faithful search ended before its mask had its size


@dataclass(kw_only=True)
class TaskSearch:
    """Searches for one task."""

    evaluator: GraftEvaluator
    task: str
    mode: Mode
    objective: Objective | None  # the loss of its search rows; None where movement alone ranks
    sizes: Sequence[int]  # of the regions asked for, ascending
    share: float | None  # of the entries that are candidates; None: as many as the sizes need
    steps: int
    rate: float  # of the first step of a `budget` search
    batch: int
    seed: int
    gradients: GradientProgress
    start: Start = "gradients"  # the one that did better
    starts: dict[Start, Tensor] = field(default_factory=dict)  # initial scores of a `budget` search, by start
    notes: list[str] = field(default_factory=list)  # on the candidates

    def __post_init__(self) -> None:
        count = math.ceil((self.share or CANDIDATES) * self.evaluator.movement.total)
        self._set_candidates(min(count, PER_ENTRY * max(self.sizes)) if self.share is None else count)
        if self.objective is not None:
            self._check_candidates(self.objective)

    def _set_candidates(self, count: int) -> None:
        movement = self.evaluator.movement
        chosen = movement.largest(max(1, min(count, movement.total_moved)))
        self.candidates = Candidates.of(chosen, self.evaluator.read)

    def _check_candidates(self, objective: Objective) -> None:
        """Probe gradients of other entries; double the candidates where one scores as high as the best."""
        count, movement = len(self.candidates), self.evaluator.movement
        others = movement.total_moved - count
        size = max([size for size in self.sizes if size <= count / 10] or [min(*self.sizes, count)])
        if not others:
            return
        # At most as many as there are candidates, so that they take no more memory.
        probed = movement.sample_others(self.candidates.index, min(PROBED, count / others), self.seed)
        if not region.size(probed):
            return
        with GraftedModel(self.evaluator.two_sided, self.candidates) as graft:
            middle = torch.full((count,), 0.5)
            rows = list(next(row_batches(objective.rows, 8 * self.batch, self.seed)))
            scores = -graft.gradient(middle, objective, rows)
            probed_scores = -graft.gradient_at(probed, self.evaluator.read, middle, objective, rows)
        threshold = kth_largest(scores, size)
        as_high = int((probed_scores > threshold).sum())
        if not as_high:
            return
        note = (
            f"{self.task}: of {len(probed_scores):,} random entries that are no candidates, {as_high:,} have "
            f"gradients among the {size:,} largest of the {count:,} candidates"
        )
        if self.share is not None:
            self.notes.append(f"{note}; a larger share of candidates may find a better region.")
            return
        self._set_candidates(2 * count)
        self.notes.append(f"{note}; the number of candidates was doubled.")

    def region(self, ranking: Ranking | None, size: int) -> Region:
        """The first entries of a ranking; by movement beyond the candidates and without a ranking."""
        if size > len(self.candidates):
            return self.evaluator.movement.largest(size)
        if ranking is None:
            return self.candidates.region(top_mask(self.candidates.movement(), size))
        return self.candidates.region(top_mask(ranking.scores, size, self.candidates.movement))

    def rank_all_sizes(self, quality: Callable[[Ranking], float]) -> Ranking:
        """The ranking that serves all sizes, from the start with the higher `quality` of two."""
        inner = [size for size in self.sizes if size <= len(self.candidates) / 2]
        if self.mode == "faithful":
            return self.rank([(inner or self.sizes)[len(inner or self.sizes) // 2]], self.seed)
        with GraftedModel(self.evaluator.two_sided, self.candidates) as graft:
            oracle = self._oracle(graft, None, self.seed)
            step = self.gradients.steps_of(f"{self.task}: integrated gradients")
            scores = mask_search.integrated_gradients(oracle, len(self.candidates), step=step)
        self.starts = {"gradients": scores, "movement": self.candidates.movement().float()}
        rankings: dict[Start, Ranking] = {}
        for start in self.starts:
            self.start = start
            rankings[start] = self.rank(inner or list(self.sizes), self.seed)
        self.start = max(rankings, key=lambda start: quality(rankings[start]))
        self.starts = {self.start: self.starts[self.start]}
        return rankings[self.start]

    def rank(self, sizes: Sequence[int], seed: int) -> Ranking:
        """Search over masks of these sizes, from the better start."""
        step = self.gradients.steps_of(f"{self.task}: {self.mode} search")
        count = len(self.candidates)
        with GraftedModel(self.evaluator.two_sided, self.candidates) as graft:
            if self.mode == "faithful":
                empty = torch.zeros(count, dtype=torch.bool)
                oracle = self._oracle(graft, None, seed)
                outcome = mask_search.faithful_search(oracle, sizes[0], empty, steps=self.steps, step=step)
                return Ranking(sizes=tuple(sizes), **vars(outcome))
            # Each size equally often, in a new random order each round.
            generator = np.random.default_rng(seed)
            rounds = math.ceil(self.steps / len(sizes))
            turns = [size for _ in range(rounds) for size in generator.permutation(np.array(sizes)).tolist()]
            oracle = self._oracle(graft, self.batch, seed)
            scores = mask_search.budget_search(
                oracle, self.starts[self.start], turns[: self.steps], self.candidates.movement,
                rate=self.rate, step=step,
            )  # fmt: skip
        return Ranking(scores=scores, sizes=tuple(sizes), steps=self.steps)

    def _oracle(self, graft: GraftedModel, batch: int | None, seed: int) -> Oracle:
        """The gradient on batches of rows, or on all; with another seed, on rows drawn with replacement."""
        objective = self.objective
        assert objective is not None
        if batch is not None:
            batches = row_batches(objective.rows, batch, seed)
            return lambda mask: graft.gradient(mask, objective, next(batches))
        rows = list(objective.rows)
        if seed != self.seed:  # else another seed would change nothing
            rows = np.random.default_rng(seed).choice(rows, len(rows)).tolist()
        return lambda mask: graft.gradient(mask, objective, rows)


def gradient_count(mode: Mode, steps: int, seeds: int, checked: int) -> int:
    """About how many gradients the searches for one task take."""
    if mode == "movement":
        return 1
    return (mask_search.POINTS + steps if mode == "budget" else 0) + steps * (checked + seeds)
