"""Where essential sparsity measures: a coarse grid, then where the curve leaves the tolerance and bends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from diagnostics.analyses.sparsity.dropping_point import next_sparsity
from diagnostics.analyses.sparsity.evaluator import (
    MAGNITUDE,
    RANDOM,
    MaskEvaluator,
    Metric,
    Regime,
    Set,
    sparsity_of,
)
from diagnostics.analyses.sparsity.masked_finetuning import Training
from probes.checkpoints.pair import Side
from probes.errors import InputError
from probes.text.rows import Task

# Most evaluations of a curve that refine its grid.
FINER = 4
TOLERANCE = 0.01
# Where masks are compared in a number or a title.
COMPARED = 0.3
BY_ROW = ("choices", "label")


@dataclass(frozen=True, kw_only=True)
class SparsitySettings:
    """What is asked of the curves.

    Attributes:
        tolerance: None is the default.
        grid: rising, from 0.
        refine: width of the bracket that is aimed at; 0: the grid is not refined.
    """

    metric: Literal["auto", "accuracy", "loss"]
    tolerance: float | None
    grid: tuple[float, ...]
    refine: float
    draws: int
    seed: int

    def __post_init__(self) -> None:
        for sparsity in self.grid:
            if not 0 <= sparsity < 1:
                raise InputError(f"grid holds {sparsity}; a sparsity is a share, from 0 to below 1")
        if len(self.grid) < 4:
            raise InputError(f"grid has {len(self.grid)} sparsities with 0; a bend needs at least 4")
        if not 0 < self.allowed < 1:
            raise InputError(f"tolerance is {self.tolerance}; it is between 0 and 1, such as 0.01")
        if not 0 <= self.refine < 1:
            raise InputError(f"refine is {self.refine}; it is the width of a bracket, below 1, or 0 for none")
        if self.draws < 100:
            raise InputError(f"draws is {self.draws}; at least 100 for a 95 % interval")

    @property
    def allowed(self) -> float:
        """The tolerance in use."""
        return TOLERANCE if self.tolerance is None else self.tolerance

    def metric_of(self, role: str, given: Mapping[Set, Task]) -> Metric:
        """The metric of a role.

        Raises:
            InputError: none suits all of its files.
        """
        if self.metric != "auto":
            return self.metric
        shapes = {task.shape: task.ref for (each, _), task in given.items() if each == role}
        if len({shape in BY_ROW for shape in shapes}) > 1:
            listed = " and ".join(f"{ref} {shape}" for shape, ref in shapes.items())
            raise InputError(f"--{role}: {listed} have no metric in common; set metric to loss or accuracy")
        return "accuracy" if next(iter(shapes)) in BY_ROW else "loss"

    def rule(self, metric: Metric) -> str:
        """The tolerance in words."""
        return f"{self.allowed:g} absolute" if metric == "accuracy" else f"{self.allowed:.3g} of its value"

    def zero_shot(self, patterns: Sequence[str], random: bool) -> list[tuple[str, float]]:
        """Patterns and sparsities that are measured of each side whatever comes out."""
        found = [(MAGNITUDE, sparsity) for sparsity in self.grid]
        found += [(pattern, sparsity_of(pattern)) for pattern in patterns]
        return found + [(RANDOM, sparsity) for sparsity in self.grid if random]

    def sweep(
        self, bench: MaskEvaluator, model: Side, regime: Regime, metric: Metric, train: Training | None
    ) -> None:
        """Measure a curve at rising sparsities, then where it leaves the tolerance and where it bends."""
        for sparsity in self.grid:
            bench.measure(model, MAGNITUDE, sparsity, regime=regime, train=train)
        for _ in range(FINER if self.refine else 0):
            places = bench.curve(model, MAGNITUDE, regime)
            curve = higher(bench.values("task", metric), metric)[places]
            further = next_sparsity(
                [bench.points[place].sparsity for place in places], curve.tolist(),
                allowed=self.allowed * (1.0 if metric == "accuracy" else abs(float(curve[0]))),
                step=self.refine,
            )  # fmt: skip
            if further is None:
                return
            bench.measure(model, MAGNITUDE, further, regime=regime, train=train)


def higher(values: Float[np.ndarray, "*shape"], metric: Metric) -> Float[np.ndarray, "*shape"]:
    """The metric with its sign turned where lower is better."""
    return values if metric == "accuracy" else -values
