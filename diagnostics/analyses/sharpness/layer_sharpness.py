"""Sharpness of a running model, layer by layer: rises of the task loss, batch by batch.

The maximum is taken for each batch and then averaged, so that values depend on the size of a batch: only
values of one size compare. What stands before a layer is run once a batch and α.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.analyses.sharpness.ascent import Norm, PerturbedLoss, Worst, average, normalised, worst
from probes.errors import InputError
from probes.models.interpolated import Layer
from probes.models.perturb import PerturbedWeights, Prefix, logits_through
from probes.passes.batched import NonFiniteError
from probes.passes.objective import Objective

WHOLE = "all blocks"
# What was measured on one batch, by name of the layer and radius.
Rises: TypeAlias = dict[tuple[str, float], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class SharpnessSettings:
    """How sharpness is measured; values of other settings do not compare.

    Attributes:
        rhos: radii, rising.
        norm: of u; of kind linf a value is a lower bound unless the starts agree.
        adaptive: perturbations are in proportion to |w|.
        normalise: logits are normalised, so that their scale does not count.
        steps, starts: of the ascent.
        pairs: of random perturbations for the average; 0: none.
        per_size: a layer's radii are scaled by √(its weights / the median layer's).
        matrices_only: norm gains and biases stay as they are.
        cached: blocks before a layer are run once.
    """

    rhos: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    norm: Norm = "l2"
    adaptive: bool = True
    normalise: bool = True
    steps: int = 20
    starts: int = 1
    pairs: int = 10
    per_size: bool = False
    matrices_only: bool = False
    cached: bool = True
    seed: int = 0

    def parameters(self, layer: Layer) -> tuple[nn.Parameter, ...]:
        """What of a layer is moved."""
        return tuple(each for each in layer.parameters if each.ndim > 1 or not self.matrices_only)


@dataclass(frozen=True)
class RowBatch:
    """A batch of rows of one task."""

    objective: Objective
    rows: tuple[int, ...]


def lots(objectives: Sequence[Objective], count: int, size: int, seed: int) -> list[RowBatch]:
    """Batches of rows drawn without repetition, from each task in turn, as many as there are.

    Raises:
        InputError: there is nothing to draw.
    """
    generator = np.random.default_rng(seed)
    queues = [list(generator.permutation(each.rows)) for each in objectives]
    found: list[RowBatch] = []
    while len(found) < count and any(queues):
        for objective, queue in zip(objectives, queues, strict=True):
            rows, queue[:] = queue[:size], queue[size:]
            # A last batch that is smaller would be sharper for that alone.
            if rows and (len(rows) == size or not found) and len(found) < count:
                found.append(RowBatch(objective, tuple(int(row) for row in sorted(rows))))
    if not found:
        raise InputError("sharpness: no task row has anything to score")
    return found


class BatchLoss:
    """The loss of a batch and its slope as functions of u."""

    def __init__(self, model: nn.Module, lot: RowBatch, moved: PerturbedWeights):
        self._model, self._lot, self._moved = model, lot, moved

    def __call__(self, u: Tensor) -> tuple[float, Tensor]:
        """Both; NaN where the loss is not finite."""
        self._moved.put(u)
        try:
            with self._moved.sloping():
                return self._lot.objective.backward(self._model, self._lot.rows), self._moved.slope()
        except NonFiniteError:
            return math.nan, torch.zeros_like(u)

    def loss(self, u: Tensor) -> float:
        """The loss alone."""
        self._moved.put(u)
        try:
            return self._lot.objective.backward(self._model, self._lot.rows)
        except NonFiniteError:
            return math.nan


def rises(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[RowBatch],
    settings: SharpnessSettings,
    *,
    whole: bool = True,
    radii: Mapping[str, Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """Sharpness of each layer alone, and of all blocks together, at the weights that the model has.

    Args:
        layers: in order.
        whole: also perturb all blocks jointly; at least as sharp as each of them by construction, in l2.
        radii: of layers by name that are not measured at all of the settings' radii.

    Returns:
        rows of layer, name, rho, radius, worst, single, average, average_error, spread, slope, loss.
    """
    made = [
        rises_of(model, layers, lot, number, settings, whole=whole, radii=radii)
        for number, lot in enumerate(batches)
    ]
    return averaged(layers, made)


def averaged(layers: Sequence[Layer], made: Sequence[Rises]) -> list[dict[str, Any]]:
    """Means over batches, a row a layer and radius; as `rises`."""
    places = {layer.name: layer.index for layer in layers}
    return [
        {
            "layer": places.get(name, math.nan),
            "name": name,
            "rho": rho,
            **_mean([each[name, rho] for each in made]),
        }
        for name, rho in made[0]
    ]


def rises_of(
    model: nn.Module,
    layers: Sequence[Layer],
    lot: RowBatch,
    number: int,
    settings: SharpnessSettings,
    *,
    whole: bool = True,
    radii: Mapping[str, Sequence[float]] | None = None,
    tell: Callable[[int, str], None] = lambda done, what: None,
) -> Rises:
    """Sharpness on one batch, as of `rises`.

    Args:
        number: of the batch, for what is drawn at random.
        tell: called with how many layers are done, and which was the last.
    """
    found: Rises = {}
    median = float(np.median([_size(settings.parameters(layer)) for layer in layers]))
    blocks = [layer for layer in layers if layer.name.startswith("block")]
    every = Layer(-2, WHOLE, tuple(each for layer in blocks for each in layer.parameters))
    prefix = Prefix(model)
    tops: dict[float, tuple[Layer, Worst]] = {}
    chosen = [*layers, *([every] if whole and blocks else [])]
    with logits_normalised(model, settings.normalise):
        for done, layer in enumerate(chosen):
            size = _size(settings.parameters(layer))
            scale = math.sqrt(size / median) if settings.per_size and layer is not every else 1.0
            warm = {rho: _embedded(blocks, settings, *tops[rho]) for rho in tops if layer is every}
            own = replace(settings, rhos=tuple((radii or {}).get(layer.name, settings.rhos)))
            with prefix.entering(layer.index if settings.cached else -1):
                rows, worsts = _layer(model, layer, lot, own, scale, number, warm)
            for rho, row in rows.items():
                found[layer.name, rho] = row
                top = tops.get(rho)
                if layer in blocks and (top is None or worsts[rho].rise > top[1].rise):
                    tops[rho] = layer, _on_cpu(worsts[rho])
            tell(done + 1, layer.name)
    return found


def logits_normalised(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Inside, logits are normalised, if that is wanted."""
    return logits_through(model, normalised) if wanted else nullcontext()


def _layer(
    model: nn.Module,
    layer: Layer,
    lot: RowBatch,
    settings: SharpnessSettings,
    scale: float,
    number: int,
    warm: Mapping[float, Tensor],
) -> tuple[dict[float, dict[str, float]], dict[float, Worst]]:
    """One layer on one batch, radii rising."""
    rows: dict[float, dict[str, float]] = {}
    worsts: dict[float, Worst] = {}
    with PerturbedWeights(settings.parameters(layer), adaptive=settings.adaptive) as moved:
        slope = BatchLoss(model, lot, moved)
        zero = PerturbedLoss(moved.zero, *slope(moved.zero))
        if not math.isfinite(zero.loss):
            nothing = dict.fromkeys(("worst", "single", "spread", "average", "average_error"), math.nan)
            nothing |= {"slope": math.nan, "loss": math.nan, "radius": math.nan}
            return dict.fromkeys(settings.rhos, nothing), {
                rho: Worst(math.nan, math.nan, 0.0, zero) for rho in settings.rhos
            }
        before: list[PerturbedLoss] = []
        for rho in settings.rhos:
            starts = list(before)
            if rho in warm:
                u = warm[rho].to(moved.zero)
                starts.append(PerturbedLoss(u, *slope(u)))
            worsts[rho] = worst(
                slope, zero, rho * scale, norm=settings.norm, steps=settings.steps, starts=settings.starts,
                generator=_generator(settings.seed, layer.index, number), warm=starts,
            )  # fmt: skip
            before = [worsts[rho].best]
            rows[rho] = {
                "radius": rho * scale,
                "worst": worsts[rho].rise,
                "single": worsts[rho].single,
                "spread": worsts[rho].spread,
                "slope": float(zero.slope.norm()),
                "loss": zero.loss,
                "average": math.nan,
                "average_error": math.nan,
            }
            if settings.pairs:
                mean = average(
                    slope.loss, zero.loss, zero.u, rho * scale, norm=settings.norm, pairs=settings.pairs,
                    generator=_generator(settings.seed + 1, layer.index, number),
                )  # fmt: skip
                rows[rho] |= {"average": mean.value, "average_error": mean.error}
    return rows, worsts


def _embedded(blocks: Sequence[Layer], settings: SharpnessSettings, layer: Layer, found: Worst) -> Tensor:
    """The worst perturbation of one block as one of all blocks."""
    parts = [
        found.best.u if each is layer else torch.zeros(_size(settings.parameters(each))) for each in blocks
    ]
    return torch.cat([part.cpu() for part in parts])


def _on_cpu(found: Worst) -> Worst:
    """Without the slope, which takes as much as the layer itself."""
    return replace(found, best=PerturbedLoss(found.best.u.cpu(), found.best.loss, torch.zeros(0)))


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)


def _generator(seed: int, layer: int, number: int) -> torch.Generator:
    """One for each layer and batch, the same at every α."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer + 2) * 1_000_003 + number)


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over batches; the error of the average is that of the mean of independent ones."""
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    found["average_error"] = float(np.sqrt(np.sum([row["average_error"] ** 2 for row in rows])) / len(rows))
    found["spread"] = max(row["spread"] for row in rows)
    worsts = np.array([row["worst"] for row in rows])
    found["worst_error"] = float(worsts.std(ddof=1) / math.sqrt(len(worsts))) if len(worsts) > 1 else math.nan
    return found
