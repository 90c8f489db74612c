"""Changes of routing over a run: when samples were memorised, and the verdict on what followed."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from diagnostics.analyses.pathways import pathway, statistics
from diagnostics.analyses.pathways.record import Record, Samples
from diagnostics.analyses.pathways.snapshot import PathwaySettings, Snapshot
from diagnostics.numerics.estimates import Estimate

# A gap that widens by less counts as flat (ours): sparse parity widened it by 0.18 to 0.34, random labels on
# the same inputs by at most 0.005.
WIDENED = 0.02

Verdict = Literal[
    "reorganising after memorisation", "routing drift without a generalisation signal",
    "no movement after memorisation", "undecided", "not memorised", "withheld",
]  # fmt: skip


class RoutingRun:
    """The statistics of all checkpoints of a run, and its verdict.

    Attributes:
        since: checkpoint from which changes and correlations are taken: that of memorisation, else the first.
        epsilon: of each group; empty without train rows.
        memorised: checkpoint from which on a sample is memorised; the number of checkpoints if never.
    """

    def __init__(
        self, steps: Sequence[float], labels: Sequence[str], records: Sequence[Record], samples: Samples,
        settings: PathwaySettings, *, workers: int = -1,
        progress: Callable[[int, int, str], None] | None = None,
    ):  # fmt: skip
        self.steps, self.labels, self.samples, self.settings = tuple(steps), tuple(labels), samples, settings
        self.last = len(records) - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            self.losses = np.stack([record.nats / record.units for record in records])
        self.epsilon, self.memorised = self._memorised()
        early = self.memorised_early
        self.since = int(np.quantile(early, 0.5, method="lower")) if self.enough_memorised else 0
        self.snapshots: list[Snapshot] = []
        for done, record in enumerate(records):
            if progress:
                progress(done, len(records), f"pathways of {labels[done]}")
            keep = done in (self.since, self.last)
            self.snapshots.append(Snapshot(record, samples, settings, workers=workers, keep=keep))
        self.widened_p = math.nan
        if 0 <= self.since < self.last:
            before, after = self.snapshots[self.since].share(), self.snapshots[self.last].share()
            self.widened_p = statistics.gap_p(
                after - before, samples.groups, permutations=settings.permutations, seed=settings.seed
            )[0]
        self.verdict, self.why = self._judged()

    def _memorised(self) -> tuple[dict[str, float], Int[np.ndarray, " samples"]]:
        memorised = np.full(len(self.samples.groups), len(self.losses))
        if not self.samples.trained:
            return {}, memorised
        epsilon = {}
        for group, name in enumerate(self.samples.names):
            members = self.samples.groups == group
            losses = self.losses[:, members]
            chosen = statistics.chosen_epsilon(losses, self.settings.delta)[0]
            epsilon[name] = chosen if self.settings.epsilon is None else self.settings.epsilon
            memorised[members] = statistics.memorised_at(losses, epsilon[name], self.settings.delta)
        return epsilon, memorised

    def share_memorised_by(self, index: int, samples: Any = slice(None)) -> float:
        """Share of samples memorised by a checkpoint; NaN without train rows."""
        return float((self.memorised[samples] <= index).mean()) if self.samples.trained else math.nan

    @property
    def memorised_share(self) -> float:
        """Share of samples memorised before the last checkpoint; NaN without train rows."""
        return self.share_memorised_by(self.last - 1)

    @property
    def enough_memorised(self) -> bool:
        """Whether enough samples are memorised to date memorisation."""
        return self.memorised_share >= statistics.WANTED[0]

    @property
    def memorised_early(self) -> Int[np.ndarray, " memorised"]:
        """The checkpoints of memorisation of the samples memorised before the last one."""
        return self.memorised[self.memorised < self.last]

    @cached_property
    def memorised_step(self) -> Estimate | None:
        """The median step of memorisation, with its bootstrap interval."""
        if not self.enough_memorised:
            return None
        generator = np.random.default_rng(self.settings.seed)
        drawn = generator.choice(self.memorised_early, (self.settings.draws, len(self.memorised_early)))
        medians = np.quantile(drawn, 0.5, axis=1, method="lower")
        low, high = np.quantile(medians, [0.025, 0.975], method="nearest")
        return Estimate(*(self.steps[int(index)] for index in (self.since, low, high)))

    @cached_property
    def changes(self) -> dict[str, statistics.SampleStatistic]:
        """Changes of the followed statistics from `since` to the last checkpoint."""
        first, last = self.snapshots[self.since].estimates, self.snapshots[self.last].estimates
        return {name: last[name].minus(first[name]) for name in last}

    def significant_sign(self, name: str) -> int:
        """1 for a significant rise, −1 for a significant fall (two standard errors), else 0."""
        change = self.changes[name]
        return int(np.sign(change.value)) if abs(change.value) > max(2 * change.estimate.error, 1e-9) else 0

    @property
    def improved(self) -> bool:
        """Whether the held-out metric improved significantly."""
        return self.significant_sign("held_out") == (1 if self.settings.metric == "accuracy" else -1)

    def _judged(self) -> tuple[Verdict, str]:
        """The verdict, and its reason."""
        if len(self.snapshots) < 3:
            return "withheld", "two checkpoints show differences but no trend"
        if not self.samples.trained:
            return "withheld", "without train rows memorisation is unknown"
        if not self.enough_memorised:
            share = f"a share of {self.memorised_share:.2g} is memorised before the last checkpoint"
            return "not memorised", f"{share}; dating memorisation needs {statistics.WANTED[0]:g}"
        gap = self.changes["gap"]
        if math.isnan(gap.value):
            return "withheld", (
                "rows of a single group have no gap, and weight decay alone moves all other numbers; give "
                "rows a group"
            )
        _, low, high, _ = gap.estimate
        evidence = (
            f"the distance within groups changes by {self.changes['distance'].value:+.3f}, and the gap "
            f"between groups by {gap.value:+.3f} ({low:+.3f} to {high:+.3f}, p {self.widened_p:.2g})"
        )
        widens = self.significant_sign("gap") > 0 and self.widened_p <= 0.05 and high >= WIDENED
        if widens and gap.value < WIDENED:
            return "undecided", f"{evidence}, which is below the {WIDENED:g} that exceeds drift"
        if widens and self.significant_sign("distance") < 0:
            return "reorganising after memorisation", evidence
        if widens:
            return "undecided", f"{evidence}, but the distance within groups does not fall significantly"
        if self.significant_sign("consistency") or self.significant_sign("distance"):
            return "routing drift without a generalisation signal", evidence
        return "no movement after memorisation", evidence

    @cached_property
    def turn(self) -> Estimate | None:
        """The step of half the gap's change, if routes reorganise and the held-out metric improves."""
        if self.verdict != "reorganising after memorisation" or not self.improved:
            return None
        return self._halfway("gap")

    @cached_property
    def held_out_turn(self) -> Estimate | None:
        """The step of half the held-out metric's change since memorisation."""
        return (
            self._halfway("held_out") if self.enough_memorised and self.last > 1 and self.improved else None
        )

    def _halfway(self, name: str) -> Estimate:
        followed = [snapshot.estimates[name] for snapshot in self.snapshots[self.since :]]
        drawn = statistics.redrawn(followed, draws=self.settings.draws, seed=self.settings.seed)
        values = np.array([statistic.value for statistic in followed])
        return statistics.halfway(self.steps[self.since :], values, drawn)

    def drifts(self) -> tuple[Int[np.ndarray, " samples"], Float[np.ndarray, " samples"]]:
        """Distance between each sample's first and last pathway: edits, and share of the longer one."""
        first, last = self.snapshots[0], self.snapshots[self.last]
        raw = pathway.moves(first.strings, last.strings)
        return raw, raw / np.maximum(first.lengths, last.lengths)
