"""Sharpness of a model, layer by layer and batch by batch.

The maximum is taken over each batch and then averaged: values depend on the batch size and compare only at
one. The blocks before a layer are run once for each batch and α.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

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
# Values on one batch, by layer name and radius.
BatchSharpness: TypeAlias = dict[tuple[str, float], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class SharpnessSettings:
    """How sharpness is measured, as in `layer_sharpness`; values compare only under the same settings.

    Attributes:
        rhos: radii, ascending.
        cached: run the blocks before a layer once.
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
        """The perturbed parameters of a layer."""
        return tuple(p for p in layer.parameters if p.ndim > 1 or not self.matrices_only)


class RowBatch(NamedTuple):
    """A batch of rows of one task."""

    objective: Objective
    rows: tuple[int, ...]


def row_batches(objectives: Sequence[Objective], count: int, size: int, seed: int) -> list[RowBatch]:
    """At most `count` batches of distinct random rows, from each task in turn."""
    generator = np.random.default_rng(seed)
    queues = [list(generator.permutation(objective.rows)) for objective in objectives]
    batches: list[RowBatch] = []
    while len(batches) < count and any(queues):
        for objective, queue in zip(objectives, queues, strict=True):
            rows, queue[:] = queue[:size], queue[size:]
            # A smaller last batch would be sharper for its size alone.
            if rows and (len(rows) == size or not batches) and len(batches) < count:
                batches.append(RowBatch(objective, tuple(int(row) for row in sorted(rows))))
    if not batches:
        raise InputError("sharpness: no task row can be scored")
    return batches


class BatchLoss:
    """The loss of a batch, and its gradient, as functions of u."""

    def __init__(self, model: nn.Module, batch: RowBatch, weights: PerturbedWeights):
        self._model, self._batch, self._weights = model, batch, weights

    def __call__(self, u: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient; NaN where the loss is not finite."""
        with self._weights.sloping():
            loss = self.loss(u)
            return loss, self._weights.slope() if math.isfinite(loss) else torch.zeros_like(u)

    def loss(self, u: Tensor) -> float:
        """The loss alone."""
        self._weights.put(u)
        try:
            return self._batch.objective.backward(self._model, self._batch.rows)
        except NonFiniteError:
            return math.nan


def batch_sharpness(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: RowBatch,
    number: int,
    settings: SharpnessSettings,
    *,
    joint: bool = True,
    radii: Mapping[str, Sequence[float]] | None = None,
    report: Callable[[int, str], None] = lambda done, what: None,
) -> BatchSharpness:
    """Sharpness on one batch: of each layer alone, and of all blocks together, at the model's weights.

    Args:
        number: of the batch, which seeds its random draws.
        joint: also perturb all blocks jointly; for l2 at least as sharp as each of them by construction.
        radii: of layers, by name, that are not measured at all radii of the settings.
        report: called with the number of measured layers and the name of the last.
    """
    values: BatchSharpness = {}
    median = float(np.median([_size(settings.parameters(layer)) for layer in layers]))
    blocks = [layer for layer in layers if layer.name.startswith("block")]
    all_blocks = Layer(-2, WHOLE, tuple(p for layer in blocks for p in layer.parameters))
    prefix = Prefix(model)
    sharpest: dict[float, tuple[Layer, Worst]] = {}
    chosen = [*layers, *([all_blocks] if joint and blocks else [])]
    with logits_normalised(model, settings.normalise):
        for done, layer in enumerate(chosen):
            size = _size(settings.parameters(layer))
            single = layer is not all_blocks
            scale = math.sqrt(size / median) if settings.per_size and single else 1.0
            warm = {} if single else {rho: _embedded(blocks, settings, *top) for rho, top in sharpest.items()}
            rhos = tuple((radii or {}).get(layer.name, settings.rhos))
            with prefix.entering(layer.index if settings.cached else -1):
                rows, worsts = _layer(model, layer, batch, replace(settings, rhos=rhos), scale, number, warm)
            for rho, row in rows.items():
                values[layer.name, rho] = row
                top = sharpest.get(rho)
                if layer in blocks and (top is None or worsts[rho].rise > top[1].rise):
                    sharpest[rho] = layer, _on_cpu(worsts[rho])
            report(done + 1, layer.name)
    return values


def mean_over_batches(layers: Sequence[Layer], batches: Sequence[BatchSharpness]) -> list[dict[str, Any]]:
    """Means over batches, one row per layer and radius: the columns of `sharpness` without alpha."""
    index = {layer.name: layer.index for layer in layers}
    return [
        {"layer": index.get(name, math.nan), "name": name, "rho": rho,
         **_mean([batch[name, rho] for batch in batches])}
        for name, rho in batches[0]
    ]  # fmt: skip


def logits_normalised(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Normalise logits within the context, if wanted."""
    return logits_through(model, normalised) if wanted else nullcontext()


def _layer(
    model: nn.Module, layer: Layer, batch: RowBatch, settings: SharpnessSettings, scale: float, number: int,
    warm: Mapping[float, Tensor],
) -> tuple[dict[float, dict[str, float]], dict[float, Worst]]:  # fmt: skip
    """One layer on one batch, by ascending radius."""
    rows: dict[float, dict[str, float]] = {}
    worsts: dict[float, Worst] = {}
    with PerturbedWeights(settings.parameters(layer), adaptive=settings.adaptive) as weights:
        batch_loss = BatchLoss(model, batch, weights)
        zero = PerturbedLoss(weights.zero, *batch_loss(weights.zero))
        if not math.isfinite(zero.loss):
            columns = ("radius", "worst", "single", "spread", "slope", "loss", "average", "average_error")
            unmeasured = dict.fromkeys(columns, math.nan)
            return dict.fromkeys(settings.rhos, unmeasured), {
                rho: Worst(math.nan, math.nan, 0.0, zero) for rho in settings.rhos
            }
        smaller: list[PerturbedLoss] = []
        for rho in settings.rhos:
            starts = list(smaller)
            if rho in warm:
                u = warm[rho].to(weights.zero)
                starts.append(PerturbedLoss(u, *batch_loss(u)))
            worsts[rho] = worst(
                batch_loss, zero, rho * scale, norm=settings.norm, steps=settings.steps,
                starts=settings.starts, generator=_generator(settings.seed, layer.index, number), warm=starts,
            )  # fmt: skip
            smaller = [worsts[rho].best]
            rows[rho] = {
                "radius": rho * scale, "worst": worsts[rho].rise, "single": worsts[rho].single,
                "spread": worsts[rho].spread, "slope": float(zero.gradient.norm()), "loss": zero.loss,
                "average": math.nan, "average_error": math.nan,
            }  # fmt: skip
            if settings.pairs:
                mean = average(
                    batch_loss.loss, zero.loss, zero.u, rho * scale, norm=settings.norm, pairs=settings.pairs,
                    generator=_generator(settings.seed + 1, layer.index, number),
                )  # fmt: skip
                rows[rho] |= {"average": mean.value, "average_error": mean.error}
    return rows, worsts


def _embedded(blocks: Sequence[Layer], settings: SharpnessSettings, layer: Layer, top: Worst) -> Tensor:
    """The worst perturbation of one block, as a perturbation of all blocks."""
    parts = [
        top.best.u if block is layer else torch.zeros(_size(settings.parameters(block))) for block in blocks
    ]
    return torch.cat([part.cpu() for part in parts])


def _on_cpu(top: Worst) -> Worst:
    """Without the gradient, which takes as much memory as the layer."""
    return replace(top, best=PerturbedLoss(top.best.u.cpu(), top.best.loss, torch.zeros(0)))


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _generator(seed: int, layer: int, number: int) -> torch.Generator:
    """One generator for each layer and batch, the same at every α."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer + 2) * 1_000_003 + number)


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over batches; the errors are those of a mean of independent values."""
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    mean["average_error"] = float(np.sqrt(np.sum([row["average_error"] ** 2 for row in rows])) / len(rows))
    mean["spread"] = max(row["spread"] for row in rows)
    worsts = np.array([row["worst"] for row in rows])
    mean["worst_error"] = float(worsts.std(ddof=1) / math.sqrt(len(worsts))) if len(worsts) > 1 else math.nan
    return mean
