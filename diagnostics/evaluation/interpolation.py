"""Scores of every set of rows between base and tuned, and the tables that `path` and `sharpness` share."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float

from diagnostics.evaluation import loss_curves
from diagnostics.evaluation.row_losses import EncodedTask
from diagnostics.evaluation.sets import SetKey
from diagnostics.evaluation.unit_scores import Units, unit_scores
from diagnostics.execution import workers
from diagnostics.numerics.estimates import UNDEFINED, Estimate, combined
from probes.errors import InputError
from probes.models.interpolated import InterpolatedModel
from probes.models.perturb import Prefix
from probes.models.two_sided import TwoSidedModel
from probes.passes.batched import NonFiniteError

T = TypeVar("T")
Progress: TypeAlias = Callable[[int, int, str], None]

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))  # the grid of WiSE-FT's code


def check_alphas(alphas: Sequence[float], least: int = 3) -> tuple[float, ...]:
    """The alphas in ascending order, with 0 and 1; refused outside [0, 1], and if fewer than `least`."""
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise InputError(f"alphas holds {alpha}; they go from 0, base, to 1, tuned")
    grid = tuple(sorted({0.0, 1.0, *map(float, alphas)}))
    if len(grid) < least:
        raise InputError("alphas holds no value between 0, base, and 1, tuned")
    return grid


class PathEvaluator:
    """Scores every set at points between base and tuned; each alpha is run once."""

    def __init__(
        self, interpolated: InterpolatedModel, sets: Mapping[SetKey, EncodedTask],
        progress: Progress | None = None,
    ):  # fmt: skip
        self.interpolated, self.sets, self.progress = interpolated, dict(sets), progress
        self.missing: list[str] = []  # notes on losses that are not finite
        self._units_at: dict[float, dict[SetKey, Units | None]] = {}
        self._prefix_alpha: float | None = None

    def run(self, calls: Iterable[Callable[["PathEvaluator"], T]]) -> Iterator[T]:
        """Results of calls with an evaluator, in order: this one, or its copy on each worker of the engine.

        A call finds the model at the point where another call left it. `missing` collects the notes of all.
        """
        noting = (partial(_with_missing, call) for call in calls)
        for result, missing in workers.run_calls(self._on_workers, self, noting):
            self.missing += [note for note in missing if note not in self.missing]
            yield result

    @cached_property
    def _on_workers(self) -> "workers.WorkerObject[PathEvaluator] | None":
        return workers.two_sided_on_workers(self.interpolated.two_sided, partial(_on_worker, sets=self.sets))

    def measure(self, alphas: Sequence[float]) -> None:
        """Score all sets at these alphas, the ends first: a loss that is not finite there is an error."""
        order = sorted(alphas, key=lambda alpha: alpha not in (0, 1))
        scores = self.run(partial(PathEvaluator._at, alpha=alpha) for alpha in order)
        for done, (alpha, units) in enumerate(zip(order, scores, strict=True)):
            self._units_at[alpha] = units
            self.tell(done + 1, len(order), f"alpha {alpha:g}")

    def tell(self, done: int, total: int, what: str) -> None:
        """Report progress."""
        if self.progress:
            self.progress(done, total, what)

    def at(self, alpha: float) -> dict[SetKey, Units | None]:
        """Unit scores of every set with all layers at α; None where the loss is not finite."""
        if alpha not in self._units_at:
            self._units_at[alpha] = self._at(alpha)
        return self._units_at[alpha]

    def _at(self, alpha: float) -> dict[SetKey, Units | None]:
        self.interpolated.set_alpha(alpha)
        return {key: self._units(key, alpha) for key in self.sets}

    def rows(self, key: SetKey, alpha: float) -> Float[np.ndarray, " rows"]:
        """Nats of each row of a set at α; NaN where the loss is not finite."""
        units = self.at(alpha)[key]
        return np.full(len(self.units(key)), math.nan) if units is None else units.by_row()[0]

    def current_rows(self, key: SetKey) -> Float[np.ndarray, " rows"] | None:
        """Nats of each row of a set at the model's current point; None where the loss is not finite."""
        try:
            return unit_scores(self.sets[key], self.interpolated.model).by_row()[0]
        except NonFiniteError as error:
            self._miss(f"a single layer's path ({error})")
            return None

    @contextmanager
    def prefix_cached(self, layer: int, alpha: float) -> Iterator[None]:
        """Inside, the layers in front of `layer`, all at α, run once per row: their output is kept."""
        if self._prefix_alpha != alpha:
            self.clear_prefix()
            self._prefix_alpha = alpha
        with self._prefix.entering(layer):
            yield

    def clear_prefix(self) -> None:
        """Free the activations that `prefix_cached` keeps."""
        self._prefix.clear()
        self._prefix_alpha = None

    @cached_property
    def _prefix(self) -> Prefix:
        return Prefix(self.interpolated.model)

    def current_units(self) -> dict[SetKey, Units | None]:
        """Unit scores of every set at the model's current point; None where the loss is not finite."""
        return {key: self._units(key, math.nan) for key in self.sets}

    def ends(self, key: SetKey) -> tuple[Units, Units]:
        """Unit scores of a set under base and tuned."""
        base, tuned = self.at(0.0)[key], self.at(1.0)[key]
        assert base is not None
        assert tuned is not None
        return base, tuned

    def units(self, key: SetKey) -> Float[np.ndarray, " rows"]:
        """Number of units of each row of a set."""
        return self.ends(key)[0].by_row()[1]

    def losses(self, key: SetKey, alphas: Sequence[float]) -> loss_curves.Curve:
        """Loss of a set at each alpha."""
        total = self.units(key).sum()
        return np.array([self.rows(key, alpha).sum() / total for alpha in alphas])

    def combined(self, key: SetKey, weights: Mapping[float, float]) -> Estimate:
        """A weighted sum of the losses of a set, weights by alpha."""
        nats = np.stack([self.rows(key, alpha) for alpha in weights])
        return combined(nats, self.units(key), list(weights.values()))

    def role(self, role: str) -> list[SetKey]:
        """The sets of a role."""
        return [key for key in self.sets if key[0] == role]

    def _units(self, key: SetKey, alpha: float) -> Units | None:
        try:
            return unit_scores(self.sets[key], self.interpolated.model)
        except NonFiniteError as error:
            if alpha in (0.0, 1.0):
                raise
            self._miss(f"a remedy ({error})" if math.isnan(alpha) else f"alpha {alpha:g} ({error})")
            return None

    def _miss(self, where: str) -> None:
        note = f"Not measured, because the loss is not finite: {where}."
        if note not in self.missing:
            self.missing.append(note)


def _on_worker(two_sided: TwoSidedModel, sets: Mapping[SetKey, EncodedTask]) -> PathEvaluator:
    return PathEvaluator(InterpolatedModel(two_sided), sets)


def _with_missing(call: Callable[[PathEvaluator], T], evaluator: PathEvaluator) -> tuple[T, list[str]]:
    """The result of a call, and its own notes on missing losses."""
    before, evaluator.missing = evaluator.missing, []
    try:
        return call(evaluator), evaluator.missing
    finally:
        evaluator.missing = before


METRICS = ("loss", "accuracy", "confidence", "error_confidence", "fft", "ttf", "ensemble_loss")


def path_rows(evaluator: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """A row for every set, α and metric of `METRICS`."""
    rows = []
    for (role, name), encoded_set in evaluator.sets.items():
        base, tuned = evaluator.ends((role, name))
        for alpha in alphas:
            units = evaluator.at(alpha)[role, name]
            values = {} if units is None else _values(base, tuned, units, alpha)
            rows += [
                {
                    "alpha": alpha, "role": role, "set": name, "metric": metric,
                    "value": values.get(metric, math.nan), "unit": encoded_set.unit,
                }
                for metric in METRICS
            ]  # fmt: skip
    return rows


def _values(base: Units, tuned: Units, units: Units, alpha: float) -> dict[str, float]:
    shares = loss_curves.patterns(base.right, tuned.right, units.right)
    mixture = float(loss_curves.ensemble_nats(base.nats, tuned.nats, alpha).mean())
    return {
        "loss": units.loss, "accuracy": units.accuracy, "confidence": float(units.confidence.mean()),
        "error_confidence": units.error_confidence, "fft": shares["FFT"], "ttf": shares["TTF"],
        "ensemble_loss": mixture,
    }  # fmt: skip


def pattern_rows(evaluator: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """The shares of the eight patterns of base, tuned and interpolated model, for every set and α."""
    rows = []
    for key, alpha in product(evaluator.sets, alphas):
        (base, tuned), units = evaluator.ends(key), evaluator.at(alpha)[key]
        if units is not None:
            shares = loss_curves.patterns(base.right, tuned.right, units.right)
            rows += [
                {"alpha": alpha, "role": key[0], "set": key[1], "pattern": pattern, "share": share}
                for pattern, share in shares.items()
            ]
    return rows


def set_rows(evaluator: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """A row for every set: barrier, bump, dip, the best α, success or failure of its curve."""
    grid, rows = np.array(alphas), []
    for key in evaluator.sets:
        losses = evaluator.losses(key, alphas)
        worse, better = (alphas[0], alphas[-1]) if losses[0] > losses[-1] else (alphas[-1], alphas[0])
        inside = [alpha for alpha, loss in zip(alphas, losses, strict=True) if np.isfinite(loss)][1:-1]
        gains = [evaluator.combined(key, {better: 1.0, alpha: -1.0}) for alpha in inside]
        falls = [evaluator.combined(key, {alpha: 1.0, worse: -1.0}) for alpha in inside]
        base, tuned = evaluator.ends(key)
        best, fall = (
            max(estimates, key=lambda estimate: estimate.value, default=UNDEFINED)
            for estimates in (gains, falls)
        )
        rows.append({
            "role": key[0], "set": key[1], "rows": len(evaluator.units(key)),
            "units": int(evaluator.units(key).sum()), "unit": evaluator.sets[key].unit,
            "loss_base": losses[0], "loss_tuned": losses[-1], "barrier": loss_curves.barrier(grid, losses),
            "bump": loss_curves.bump(losses), "dip": loss_curves.dip(losses),
            "best_alpha": loss_curves.best_alpha(grid, {key[1]: losses}),
            "worst_alpha": float(grid[np.nanargmax(losses)]), "gain": best.value, "gain_half": best.half,
            "fall": fall.value, "fall_half": fall.half, "outcome": loss_curves.outcome(gains, falls),
            "accuracy_base": base.accuracy, "accuracy_tuned": tuned.accuracy,
            "confidence_ratio": float(tuned.confidence.mean() / base.confidence.mean()),
            "error_confidence_base": base.error_confidence, "error_confidence_tuned": tuned.error_confidence,
        })  # fmt: skip
    return rows


def pooled(rows: Iterable[Mapping[str, Any]], role: str, column: str, how: str = "mean") -> float | None:
    """Mean or largest value of a column over the sets of a role; None without any number."""
    values = [float(row[column]) for row in rows if row["role"] == role and not math.isnan(row[column])]
    if not values:
        return None
    return max(values) if how == "max" else float(np.mean(values))
