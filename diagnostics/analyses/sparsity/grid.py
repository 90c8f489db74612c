"""The sparsities to measure: a coarse grid, then points where the curve leaves the tolerance and bends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from diagnostics.analyses.sparsity.dropping_point import next_sparsity
from diagnostics.analyses.sparsity.evaluator import MAGNITUDE, MaskEvaluator, Metric, Regime, SetKey
from diagnostics.analyses.sparsity.masked_finetuning import MaskedFinetuning
from probes.checkpoints.pair import Side
from probes.errors import InputError
from probes.text.rows import Task

# Most points that refine the grid of a curve.
MAX_REFINEMENTS = 4
# The sparsity of the mask metrics and of titles.
COMPARED_SPARSITY = 0.3
BY_ROW = ("choices", "label")


@dataclass(frozen=True, kw_only=True)
class SparsitySettings:
    """How the curves are measured."""

    metric: Literal["auto", "accuracy", "loss"]
    tolerance: float
    grid: tuple[float, ...]  # ascending, from 0
    refine: float  # width of the bracket to reach; 0: the grid is not refined
    draws: int
    seed: int

    def __post_init__(self) -> None:
        for sparsity in self.grid:
            if not 0 <= sparsity < 1:
                raise InputError(f"grid holds {sparsity}; a sparsity is a share, from 0 to below 1")
        if len(self.grid) < 4:
            raise InputError(f"grid has {len(self.grid)} sparsities, 0 included; at least 4 are needed")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}; it is between 0 and 1, such as 0.01")
        if not 0 <= self.refine < 1:
            raise InputError(f"refine is {self.refine}; it is the width of a bracket, in [0, 1)")
        if self.draws < 100:
            raise InputError(f"draws is {self.draws}; at least 100 for a 95 % interval")

    def metric_of(self, role: str, sets: Mapping[SetKey, Task]) -> Metric:
        """The metric of a role."""
        if self.metric != "auto":
            return self.metric
        shapes = {task.shape: task.ref for (set_role, _), task in sets.items() if set_role == role}
        if len({shape in BY_ROW for shape in shapes}) > 1:
            listed = " and ".join(f"{ref} {shape}" for shape, ref in shapes.items())
            raise InputError(f"--{role}: {listed} have no metric in common; set metric to loss or accuracy")
        return "accuracy" if next(iter(shapes)) in BY_ROW else "loss"

    def rule(self, metric: Metric) -> str:
        """The tolerance in words."""
        return (
            f"{self.tolerance:g} absolute" if metric == "accuracy" else f"{self.tolerance:.3g} of its value"
        )

    def sweep(
        self,
        evaluator: MaskEvaluator,
        model: Side,
        regime: Regime,
        metric: Metric,
        train: MaskedFinetuning | None,
    ) -> None:
        """Measure a curve on the grid, then where it leaves the tolerance and bends."""
        for grid_sparsity in self.grid:
            evaluator.measure(model, MAGNITUDE, grid_sparsity, regime=regime, train=train)
        for _ in range(MAX_REFINEMENTS if self.refine else 0):
            indices = evaluator.curve(model, MAGNITUDE, regime)
            curve = higher_is_better(evaluator.values("task", metric), metric)[indices]
            sparsity = next_sparsity(
                [evaluator.points[index].sparsity for index in indices], curve.tolist(),
                allowed=self.tolerance * (1.0 if metric == "accuracy" else abs(float(curve[0]))),
                step=self.refine,
            )  # fmt: skip
            if sparsity is None:
                return
            evaluator.measure(model, MAGNITUDE, sparsity, regime=regime, train=train)


def higher_is_better(values: Float[np.ndarray, "*shape"], metric: Metric) -> Float[np.ndarray, "*shape"]:
    """The metric with its sign turned where lower is better."""
    return values if metric == "accuracy" else -values
