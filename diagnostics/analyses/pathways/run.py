"""What the checkpoints of a run say together: when samples were memorised, and what routes did after that."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from diagnostics.analyses.pathways import pathway
from diagnostics.analyses.pathways.record import Record, Samples
from diagnostics.analyses.pathways.snapshot import PathwaySettings, Snapshot
from diagnostics.analyses.pathways.statistics import (
    LEAST,
    WANTED,
    SampleStatistic,
    chosen_epsilon,
    gap_p,
    halfway,
    memorised_at,
    redrawn,
)
from diagnostics.numerics.estimates import Estimate

# A gap that surely widens by less is called flat (ours): sparse parity widened it by 0.18 to 0.34, and the
# same inputs with labels at random by 0.005 at most.
WIDENED = 0.02

Verdict = Literal[
    "reorganising after memorisation",
    "routing drift without a generalisation signal",
    "no movement after memorisation",
    "undecided",
    "not memorised",
    "withheld",
]


class RoutingRun:
    """Everything that the checkpoints of a run say together.

    Attributes:
        since: the checkpoint from which changes and correlations are taken: the one at which the samples were
            memorised, else the first.
        epsilon: of each group; empty where samples are not of the training rows.
        memorised: of each sample the checkpoint from which on it is memorised; as many as there are: never.
    """

    def __init__(
        self,
        steps: Sequence[float],
        labels: Sequence[str],
        records: Sequence[Record],
        samples: Samples,
        ask: PathwaySettings,
        *,
        workers: int = -1,
        progress: Callable[[int, int, str], None] | None = None,
    ):
        self.steps, self.labels, self.samples, self.ask = tuple(steps), tuple(labels), samples, ask
        self.last = len(records) - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            self.losses = np.stack([record.nats / record.units for record in records])
        self.epsilon, self.memorised = self._memorised()
        self.since = self._since()
        self.looks: list[Snapshot] = []
        for done, record in enumerate(records):
            if progress:
                progress(done, len(records), f"pathways of {labels[done]}")
            keep = done in (self.since, self.last)
            self.looks.append(Snapshot(record, samples, ask, workers=workers, keep=keep))
        self.widened_p = math.nan
        if 0 <= self.since < self.last:
            before, after = self.looks[self.since].share(), self.looks[self.last].share()
            self.widened_p = gap_p(
                after - before, samples.groups, permutations=ask.permutations, seed=ask.seed
            )[0]
        self.verdict, self.why = self._judged()

    # --- memorisation ---

    def _memorised(self) -> tuple[dict[str, float], Int[np.ndarray, " samples"]]:
        never = np.full(len(self.samples.groups), len(self.losses))
        if not self.samples.trained:
            return {}, never
        epsilon = {}
        for group, name in enumerate(self.samples.names):
            own = self.samples.groups == group
            chosen = chosen_epsilon(self.losses[:, own], self.ask.delta)[0]
            epsilon[name] = chosen if self.ask.epsilon is None else self.ask.epsilon
            never[own] = memorised_at(self.losses[:, own], epsilon[name], self.ask.delta)
        return epsilon, never

    @property
    def memorised_share(self) -> float:
        """Share of samples that are memorised before the last checkpoint."""
        return float((self.memorised < self.last).mean())

    @property
    def share_memorised(self) -> float:
        """The same, and NaN where no rows of training tell it."""
        return self.memorised_share if self.samples.trained else math.nan

    @property
    def dated(self) -> bool:
        """Whether enough samples are memorised to say when."""
        return self.memorised_share >= WANTED[0]

    def _since(self) -> int:
        return int(np.quantile(self.early, 0.5, method="lower")) if self.dated else 0

    @property
    def early(self) -> Int[np.ndarray, " memorised"]:
        """The checkpoints at which those samples were memorised that were so before the last."""
        return self.memorised[self.memorised < self.last]

    @cached_property
    def memorised_step(self) -> Estimate | None:
        """The median step at which samples were memorised, with the interval that drawing them anew gives."""
        if not self.dated:
            return None
        generator = np.random.default_rng(self.ask.seed)
        drawn = generator.choice(self.early, (self.ask.draws, len(self.early)))
        medians = np.quantile(drawn, 0.5, axis=1, method="lower")
        low, high = np.quantile(medians, [0.025, 0.975], method="nearest")
        return Estimate(*(self.steps[int(place)] for place in (self.since, low, high)))

    # --- changes ---

    @cached_property
    def changes(self) -> dict[str, SampleStatistic]:
        """How the followed numbers changed from `since` to the last checkpoint."""
        first, last = self.looks[self.since].estimates, self.looks[self.last].estimates
        return {name: last[name].minus(first[name]) for name in last}

    def surely(self, name: str) -> int:
        """1 if a number surely rose, −1 if it surely fell, 0 if neither is sure: by two standard errors."""
        change = self.changes[name]
        return int(np.sign(change.value)) if abs(change.value) > max(2 * change.estimate.error, 1e-9) else 0

    @property
    def improved(self) -> bool:
        """Whether the held-out metric surely got better since then."""
        return self.surely("held_out") == (1 if self.ask.metric == "accuracy" else -1)

    def _judged(self) -> tuple[Verdict, str]:
        """The verdict, and what it rests on."""
        if len(self.looks) < 3:
            return "withheld", "of two checkpoints only differences are given; no trend can be claimed"
        if not self.samples.trained:
            return "withheld", "no rows of training were given, so that nothing says what was memorised"
        if not self.dated:
            share = f"{self.memorised_share:.2g} of the samples are memorised before the last checkpoint"
            return "not memorised", f"{share}, and dating it takes {WANTED[0]:g}"
        gap = self.changes["gap"]
        if math.isnan(gap.value):
            return "withheld", (
                "rows of one group have no gap between groups, and weight decay alone moves all else; give "
                "rows a group"
            )
        _, low, high, _ = gap.estimate
        told = (
            f"the distance within groups changes by {self.changes['distance'].value:+.3f}, and the gap "
            f"between groups by {gap.value:+.3f} ({low:+.3f} to {high:+.3f}, p {self.widened_p:.2g})"
        )
        widens = self.surely("gap") > 0 and self.widened_p <= 0.05 and high >= WIDENED
        if widens and gap.value < WIDENED:
            return "undecided", f"{told}, which is less than the {WIDENED:g} that is more than drift"
        if widens and self.surely("distance") < 0:
            return "reorganising after memorisation", told
        if widens:
            return "undecided", f"{told}, though the distance within groups does not surely fall"
        if self.surely("consistency") or self.surely("distance"):
            return "routing drift without a generalisation signal", told
        return "no movement after memorisation", told

    @cached_property
    def turn(self) -> Estimate | None:
        """The step at which the gap has made half of its way, if all says that memorisation gave way."""
        if self.verdict != "reorganising after memorisation" or not self.improved:
            return None
        return self._halfway("gap")

    @cached_property
    def held_out_turn(self) -> Estimate | None:
        """The step at which the held-out metric has made half of its way since memorisation."""
        return self._halfway("held_out") if self.dated and self.last > 1 and self.improved else None

    def _halfway(self, name: str) -> Estimate:
        looks = self.looks[self.since :]
        estimates = [look.estimates[name] for look in looks]
        drawn = redrawn(estimates, draws=self.ask.draws, seed=self.ask.seed)
        values = np.array([each.value for each in estimates])
        return halfway(self.steps[self.since :], values, drawn)

    def drifts(self) -> tuple[Int[np.ndarray, " samples"], Float[np.ndarray, " samples"]]:
        """How far each sample's pathway moved from the first checkpoint to the last: edits, and a share."""
        first, last = self.looks[0], self.looks[self.last]
        raw = pathway.moved(first.words, last.words)
        return raw, raw / np.maximum(first.lengths, last.lengths)

    @property
    def too_few(self) -> bool:
        """Whether correlations are withheld."""
        return len(self.looks) - self.since < LEAST
