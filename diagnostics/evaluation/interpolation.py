"""Measuring sets of rows at places between base and tuned, each place once.

What `path` and `sharpness` share: the curves of every set, and what they say of it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float

from diagnostics.evaluation import loss_curves
from diagnostics.evaluation.row_losses import EncodedTask
from diagnostics.evaluation.unit_scores import Units, unit_scores
from diagnostics.execution import workers
from diagnostics.numerics.estimates import UNDEFINED, Estimate, combined
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.interpolated import InterpolatedModel
from probes.models.loading import memory_of
from probes.models.perturb import Prefix
from probes.models.two_sided import TwoSidedModel
from probes.passes.batched import NonFiniteError

Made = TypeVar("Made")
Which: TypeAlias = tuple[str, str]  # role and name of a set
Progress: TypeAlias = Callable[[int, int, str], None]

HALF = ("bfloat16", "float16")
# WiSE-FT's grid, its code's.
ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))


def check_alphas(alphas: Sequence[float], least: int = 3) -> tuple[float, ...]:
    """The places on the path, rising, both ends among them.

    Raises:
        InputError: one outside [0, 1], or no place between the ends.
    """
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise InputError(f"alphas holds {alpha}; they go from 0, base, to 1, tuned")
    chosen = tuple(sorted({0.0, 1.0, *map(float, alphas)}))
    if len(chosen) < least:
        raise InputError("alphas holds no place between 0, base, and 1, tuned")
    return chosen


def is_half(model: Any) -> bool:
    """Whether any weight of a model is in half precision."""
    return any(str(each.dtype).removeprefix("torch.") in HALF for each in model.parameters())


def model_notes(pair: CheckpointPair, model: Any) -> list[str]:
    """What a reader must know of a model that is blended and perturbed.

    Raises:
        InputError: batch norms, whose statistics no blend has.
    """
    from torch import nn

    modules = list(model.modules())
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        raise InputError(
            f"{pair.tuned.ref}: has batch norms; those of a blend are not known, and no path of it is run"
        )
    notes = []
    training = any(
        memory is not None and getattr(memory, "training", False)
        for memory in map(memory_of, (pair.base, pair.tuned))
    )
    dropping = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    if training or dropping:
        what = "was given in training mode" if training else "has dropout"
        notes.append(f"The model {what}: it was run in evaluation mode, without dropout.")
    if any(matrix.expert is not None for matrix in pair.tuned.matrices.values()):
        notes.append(
            "Experts that no token is routed to cannot show a barrier or any sharpness, and where routes "
            "change a path jumps."
        )
    if is_half(model):
        notes.append("Blends were run in half precision: small steps from an end change few weights or none.")
    elif any(dtype in HALF for dtype in (pair.base.dtype, pair.tuned.dtype)):
        notes.append(
            "Blends were run in float32; written in the file's half precision, small steps from an end are "
            "rounded away."
        )
    return notes


class PathEvaluator:
    """What a walk makes of every set, measured as it is asked for.

    Attributes:
        missing: what was not finite, in words.
        progress: told of what is done here; on a worker nobody is.
    """

    def __init__(
        self, walk: InterpolatedModel, sets: Mapping[Which, EncodedTask], progress: Progress | None = None
    ):
        self.walk, self.sets, self.progress = walk, dict(sets), progress
        self.missing: list[str] = []
        self._known: dict[float, dict[Which, Units | None]] = {}
        self._before: float | None = None

    def each(self, calls: Iterable[Callable[["PathEvaluator"], Made]]) -> Iterator[Made]:
        """What calls make of this, in their order; on an engine with workers, of one like it on each.

        A call finds the walk wherever another has left it. What it cannot measure is noted here.
        """
        noting = (partial(_with_missing, call) for call in calls)
        for made, missing in workers.run_calls(self._there, self, noting):
            for note in missing:
                self._note(note)
            yield made

    @cached_property
    def _there(self) -> "workers.WorkerObject[PathEvaluator] | None":
        return workers.host_on_workers(self.walk.host, partial(_of, sets=self.sets))

    def measure(self, alphas: Sequence[float]) -> None:
        """Measure places of the whole model, the ends first: a broken one ends it.

        Raises:
            NonFiniteError: at an end.
        """
        order = sorted(alphas, key=lambda each: each not in (0, 1))
        made = self.each(partial(PathEvaluator._at, alpha=alpha) for alpha in order)
        for done, (alpha, units) in enumerate(zip(order, made, strict=True)):
            self._known[alpha] = units
            self.tell(done + 1, len(order), f"alpha {alpha:g}")

    def tell(self, done: int, total: int, what: str) -> None:
        """Tell of progress, if anyone is to be told."""
        if self.progress:
            self.progress(done, total, what)

    def at(self, alpha: float) -> dict[Which, Units | None]:
        """The units of every set with the whole model at α; None where the loss is not finite.

        Raises:
            NonFiniteError: at an end, without which there is no path.
        """
        if alpha not in self._known:
            self._known[alpha] = self._at(alpha)
        return self._known[alpha]

    def _at(self, alpha: float) -> dict[Which, Units | None]:
        self.walk.place(alpha)
        return {which: self._units(which, alpha) for which in self.sets}

    def rows(self, which: Which, alpha: float) -> Float[np.ndarray, " rows"]:
        """Nats of each row of a set at α; NaN where the loss is not finite."""
        units = self.at(alpha)[which]
        return self._nats(which, units)

    def here(self, which: Which) -> Float[np.ndarray, " rows"] | None:
        """Nats of each row of a set wherever the walk stands; None where the loss is not finite."""
        try:
            return unit_scores(self.sets[which], self.walk.model).by_row()[0]
        except NonFiniteError as error:
            self._miss(f"a single layer's path ({error})")
            return None

    @contextmanager
    def behind(self, layer: int, alpha: float) -> Iterator[None]:
        """Inside, what stands before a layer is not run again for rows that it has seen; it is at α."""
        if self._before != alpha:
            self.forget()
            self._before = alpha
        with self._prefix.entering(layer):
            yield

    def forget(self) -> None:
        """Let go of what `behind` keeps."""
        self._prefix.clear()
        self._before = None

    @cached_property
    def _prefix(self) -> Prefix:
        return Prefix(self.walk.model)

    def standing(self) -> dict[Which, Units | None]:
        """The units of every set wherever the walk stands; None where the loss is not finite."""
        return {which: self._units(which, math.nan) for which in self.sets}

    def units(self, which: Which) -> Float[np.ndarray, " rows"]:
        """How many units each row of a set has."""
        base = self.at(0.0)[which]
        assert base is not None
        return base.by_row()[1]

    def losses(self, which: Which, alphas: Sequence[float]) -> loss_curves.Curve:
        """Loss of a set at places on the path."""
        total = self.units(which).sum()
        return np.array([self.rows(which, alpha).sum() / total for alpha in alphas])

    def combined(self, which: Which, weights: Mapping[float, float]) -> Estimate:
        """A weighted sum of the losses of a set at places on the path."""
        nats = np.stack([self.rows(which, alpha) for alpha in weights])
        return combined(nats, self.units(which), list(weights.values()))

    def role(self, role: str) -> list[Which]:
        """The sets of a role."""
        return [which for which in self.sets if which[0] == role]

    def _nats(self, which: Which, units: Units | None) -> Float[np.ndarray, " rows"]:
        return np.full(len(self.units(which)), math.nan) if units is None else units.by_row()[0]

    def _units(self, which: Which, alpha: float) -> Units | None:
        try:
            return unit_scores(self.sets[which], self.walk.model)
        except NonFiniteError as error:
            if alpha in (0.0, 1.0):
                raise
            self._miss(f"a remedy ({error})" if math.isnan(alpha) else f"alpha {alpha:g} ({error})")
            return None

    def _miss(self, where: str) -> None:
        self._note(f"Not measured, because it is not finite: {where}.")

    def _note(self, note: str) -> None:
        if note not in self.missing:
            self.missing.append(note)


# On a worker


def _of(host: TwoSidedModel, sets: Mapping[Which, EncodedTask]) -> PathEvaluator:
    return PathEvaluator(InterpolatedModel(host), sets)


def _with_missing(call: Callable[[PathEvaluator], Made], along: PathEvaluator) -> tuple[Made, list[str]]:
    """What a call makes, and what it alone could not measure."""
    before, along.missing = along.missing, []
    try:
        return call(along), along.missing
    finally:
        along.missing = before


def path_rows(along: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Every set at every α: loss, accuracy, confidence, who is right where, and the mixture of both ends."""
    found = []
    for which, encoded_set in along.sets.items():
        base, tuned = (along.at(end)[which] for end in (0.0, 1.0))
        assert base is not None
        assert tuned is not None
        for alpha in alphas:
            units = along.at(alpha)[which]
            values = {} if units is None else _values(base, tuned, units, alpha)
            for metric in METRICS:
                row = {"alpha": alpha, "role": which[0], "set": which[1], "metric": metric}
                found.append(row | {"value": values.get(metric, math.nan), "unit": encoded_set.unit})
    return found


METRICS = (
    "loss", "accuracy", "confidence", "error_confidence", "fft", "ttf", "ensemble_loss",
)  # fmt: skip


def _values(base: Units, tuned: Units, units: Units, alpha: float) -> dict[str, float]:
    shares = loss_curves.patterns(base.right, tuned.right, units.right)
    return {
        "loss": units.loss,
        "accuracy": units.accuracy,
        "confidence": float(units.confidence.mean()),
        "error_confidence": units.error_confidence,
        "fft": shares["FFT"],
        "ttf": shares["TTF"],
        "ensemble_loss": float(loss_curves.ensemble_nats(base.nats, tuned.nats, alpha).mean()),
    }


def pattern_rows(along: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Of every set and α the shares of the eight patterns of base, tuned and blend."""
    found = []
    for which in along.sets:
        for alpha in alphas:
            base, tuned, units = (along.at(each)[which] for each in (0.0, 1.0, alpha))
            if base is None or tuned is None or units is None:
                continue
            shares = loss_curves.patterns(base.right, tuned.right, units.right)
            found += [
                {"alpha": alpha, "role": which[0], "set": which[1], "pattern": pattern, "share": share}
                for pattern, share in shares.items()
            ]
    return found


def set_rows(along: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """What the curve of each set says: barrier, bump, dip, the best α, success or failure."""
    grid, found = np.array(alphas), []
    for which in along.sets:
        losses = along.losses(which, alphas)
        worse, better = (alphas[0], alphas[-1]) if losses[0] > losses[-1] else (alphas[-1], alphas[0])
        inside = [alpha for alpha, loss in zip(alphas, losses, strict=True) if np.isfinite(loss)][1:-1]
        gains = [along.combined(which, {better: 1.0, alpha: -1.0}) for alpha in inside]
        falls = [along.combined(which, {alpha: 1.0, worse: -1.0}) for alpha in inside]
        base, tuned = along.at(0.0)[which], along.at(1.0)[which]
        assert base is not None
        assert tuned is not None
        best = max(gains, key=lambda each: each.value, default=UNDEFINED)
        fall = max(falls, key=lambda each: each.value, default=UNDEFINED)
        found.append(
            {
                "role": which[0],
                "set": which[1],
                "rows": len(along.units(which)),
                "units": int(along.units(which).sum()),
                "unit": along.sets[which].unit,
                "loss_base": losses[0],
                "loss_tuned": losses[-1],
                "barrier": loss_curves.barrier(grid, losses),
                "bump": loss_curves.bump(losses),
                "dip": loss_curves.dip(losses),
                "best_alpha": loss_curves.best_alpha(grid, {which[1]: losses}),
                "worst_alpha": float(grid[np.nanargmax(losses)]),
                "gain": best.value,
                "gain_half": best.half,
                "fall": fall.value,
                "fall_half": fall.half,
                "outcome": loss_curves.outcome(gains, falls),
                "accuracy_base": base.accuracy,
                "accuracy_tuned": tuned.accuracy,
                "confidence_ratio": float(tuned.confidence.mean() / base.confidence.mean()),
                "error_confidence_base": base.error_confidence,
                "error_confidence_tuned": tuned.error_confidence,
            }
        )
    return found


def pooled(rows: Iterable[Mapping[str, Any]], role: str, column: str, how: str = "mean") -> float | None:
    """A column over the sets of a role: their mean or largest; None if it has none or they are NaN."""
    values = [float(row[column]) for row in rows if row["role"] == role]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    return max(known) if how == "max" else float(np.mean(known))


def pinned_note(pinned: Sequence[str]) -> list[str]:
    """What to say of tensors that base lacks."""
    if not pinned:
        return []
    return [
        f"{len(pinned)} tensors that base lacks, such as {pinned[0]}, are tuned's at every alpha: alpha 0 is "
        "base but for these."
    ]
