"""Pathway statistics of one checkpoint."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

from diagnostics.analyses.pathways import pathway, statistics
from diagnostics.analyses.pathways.pathway import Alphabet
from diagnostics.analyses.pathways.record import Record, Samples
from diagnostics.analyses.pathways.statistics import Pairs, SampleStatistic, gap_p, mean, pairs


@dataclass(frozen=True, kw_only=True)
class PathwaySettings:
    """Parameters of the tables; see `grokking_pathways`."""

    weights: Literal["full", "top"]
    tau: float
    alphabet: Alphabet
    metric: Literal["accuracy", "loss"]
    epsilon: float | None
    delta: float
    permutations: int
    draws: int
    seed: int


class Snapshot:
    """Pathway statistics of one checkpoint; the matrix of distances is kept only if asked for."""

    def __init__(
        self, record: Record, samples: Samples, settings: PathwaySettings, *, workers: int, keep: bool = False
    ):
        self.record, self.samples, self.settings, self.workers = record, samples, settings, workers
        groups = samples.groups
        self.weights = record.routes.select(settings.weights)
        self.pathways = pathway.pathways(self.weights, settings.tau)
        self.strings = self.pathways.strings(settings.alphabet)
        self.lengths = pathway.lengths(self.strings)
        raw = pathway.distances(self.strings, workers=workers)
        share = raw / pathway.longer(self.lengths, self.lengths)
        same = groups[:, None] == groups
        self._kept = share.astype(np.float32) if keep else None
        self.pairs, self.raw = pairs(share, groups), pairs(raw.astype(float), groups)
        self.by_group = statistics.pairs_of_groups(share, groups)
        raw_by_group = statistics.pairs_of_groups(raw.astype(float), groups)
        self.p, self.p_by_group = gap_p(share, groups, permutations=settings.permutations, seed=settings.seed)
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN for a single sample of a group
            self.group_distances = np.where(same, share, 0).sum(axis=1) / (same.sum(axis=1) - 1)
        self.raw_by_group = [pair.within.value for pair in raw_by_group]
        self.cosines = pathway.cosines(self.weights, record.routers)
        layers, undefined = self.weights.shape[1], np.full(len(groups), math.nan)
        self.smooth = pathway.smoothness(self.cosines) if layers > 1 else undefined
        self.rough = pathway.gp_inconsistency(self.cosines) if layers > 2 else undefined
        self.entropies = pathway.entropies(self.weights)

    def share(self) -> Float[np.ndarray, "samples samples"]:
        """Distances between all samples, over the longer pathway."""
        if self._kept is not None:
            return self._kept.astype(float)
        raw = pathway.distances(self.strings, workers=self.workers)
        return raw / pathway.longer(self.lengths, self.lengths)

    @cached_property
    def estimates(self) -> dict[str, SampleStatistic]:
        """The statistics that are followed over the run, by name."""
        groups, record = self.samples.groups, self.record
        rows = np.zeros(len(record.held_nats), dtype=np.int64)
        accuracy, loss = mean(record.held_right, rows), mean(record.held_nats, rows, record.held_units)
        return {
            "distance": self.pairs.within, "gap": self.pairs.gap, "consistency": mean(self.smooth, groups),
            "distance_raw": self.raw.within, "length": mean(self.lengths.astype(float), groups),
            "entropy": mean(self.entropies.mean(axis=1), groups),
            "loss": mean(record.nats, groups, record.units),
            "held_out": accuracy if self.settings.metric == "accuracy" else loss,
        }  # fmt: skip

    @cached_property
    def layers(self) -> list[tuple[Pairs, float, float]]:
        """For each layer the distances of pairs, its effective dimension and mean cosine with the next."""
        groups, by_layer = self.samples.groups, []
        for layer in range(self.weights.shape[1]):
            strings = self.pathways.strings(self.settings.alphabet, layer)
            lengths = pathway.lengths(strings)
            share = pathway.distances(strings, workers=self.workers) / pathway.longer(lengths, lengths)
            ahead = self.cosines[:, layer].mean() if layer < self.cosines.shape[1] else math.nan
            dimension = pathway.effective_dimension(self.weights[:, layer])
            by_layer.append((pairs(share, groups), dimension, float(ahead)))
        return by_layer
