"""Paths of single layers between base and tuned, with their controls.

A layer's path moves it alone while all others stay at one end. Its barrier is compared with random moves of
the same size, with its equal share of the whole model's barrier, and with the gain from pinning it to an end
at the α where the whole model's path is worst.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.sharpness.stragglers import ScreenedLayer
from diagnostics.evaluation import loss_curves
from diagnostics.evaluation.interpolation import PathEvaluator
from diagnostics.evaluation.sets import SetKey
from diagnostics.numerics.estimates import UNDEFINED, Estimate, combined
from probes.models.interpolated import InterpolatedModel, Layer

Nats = Float[np.ndarray, "alphas rows"]
# Nats by row of each set; None where the loss is not finite.
LossesByRow: TypeAlias = list[Float[np.ndarray, " rows"] | None]


@dataclass(frozen=True, kw_only=True)
class LayerPath:
    """Losses of one layer's paths in nats by row, and the norms of its delta and of its base.

    Attributes:
        tuned, base: the paths with all other layers at that end; α is the layer's.
        control: tuned with the layer moved at random, each tensor by half the norm of its delta.
        pinned: the whole model at the worst α with the layer at base, and at tuned.
    """

    layer: Layer
    tuned: Nats
    base: Nats
    control: Float[np.ndarray, "draws rows"]
    pinned: Float[np.ndarray, "ends rows"]
    displacement: float
    size: float


class LayerPaths:
    """Layer paths on the pooled rows of some sets, with the blocks before a layer `cached` where exact."""

    def __init__(
        self, evaluator: PathEvaluator, on: Sequence[SetKey], alphas: Sequence[float], *, draws: int = 4,
        seed: int = 0,
    ):  # fmt: skip
        self.evaluator, self.on, self.alphas = evaluator, tuple(on), tuple(alphas)
        self.draws, self.seed = draws, seed
        self.units = np.concatenate([evaluator.units(which) for which in on])
        self.cached = self._cache_is_exact()

    def path(self, alpha: float) -> Float[np.ndarray, " rows"]:
        """Nats by row of the whole model at α."""
        return np.concatenate([self.evaluator.rows(which, alpha) for which in self.on])

    def curve(self, nats: Nats) -> loss_curves.Curve:
        """Mean losses from nats by row."""
        return nats.sum(axis=1) / self.units.sum()

    def worst(self, alphas: Sequence[float]) -> tuple[float, float]:
        """The interior α furthest above the line between the ends, else the middle one; and the barrier."""
        losses = self.curve(np.stack([self.path(alpha) for alpha in alphas]))
        barrier = loss_curves.barrier(np.array(alphas), losses)
        if barrier <= 0:
            return float(min(alphas[1:-1], key=lambda alpha: abs(alpha - 0.5))), barrier
        return float(alphas[loss_curves.highest(np.array(alphas), losses)]), barrier

    def measure(self, worst: float) -> list[LayerPath]:
        """The paths of all layers, in order, which are pinned at the α `worst`."""
        layers, inside = self.evaluator.interpolated.layers, self.alphas[1:-1]
        plan: list[tuple[float, Layer, partial[list[LossesByRow]]]] = []
        for anchor, alphas, draws in (
            (1.0, (*inside, 0.0), self.draws), (0.0, (*inside, 1.0), 0), (worst, (0.0, 1.0), 0),
        ):  # fmt: skip
            measure = partial(
                _layer_losses, on=self.on, cached=self.cached, seed=self.seed, anchor=anchor, alphas=alphas,
                draws=draws,
            )  # fmt: skip
            plan += [(anchor, layer, partial(measure, layer=layer.index)) for layer in layers]
        losses: dict[tuple[float, int], Nats] = {}
        results = self.evaluator.run(call for _, _, call in plan)
        for done, ((anchor, layer, _), rows) in enumerate(zip(plan, results, strict=True)):
            losses[anchor, layer.index] = np.stack([self._filled(sets) for sets in rows])
            where = {1.0: "from tuned", 0.0: "from base"}.get(anchor, "pinned")
            self.evaluator.tell(done + 1, len(plan), f"{layer.name} {where}")
        self.evaluator.clear_prefix()
        base, tuned, between = self.path(0.0)[None], self.path(1.0)[None], len(inside)
        return [
            LayerPath(
                layer=layer,
                tuned=np.concatenate([away[[between]], away[:between], tuned]),
                base=np.concatenate([base, losses[0.0, layer.index]]),
                control=away[between + 1 :], pinned=losses[worst, layer.index],
                displacement=norms[0], size=norms[1],
            )
            for layer in layers
            for away, norms in ((losses[1.0, layer.index], self.evaluator.interpolated.displacement(layer)),)
        ]  # fmt: skip

    def screened(self, path: LayerPath, worst: float) -> ScreenedLayer:
        """The measurements that the rule for stragglers takes."""
        ends = [self._barrier(nats) for nats in (path.tuned, path.base)]
        unpinned = self.path(worst)
        repairs = [combined(np.stack([unpinned, end]), self.units, [1.0, -1.0]) for end in path.pinned]
        return ScreenedLayer(
            barrier=max(ends, key=lambda end: end.value),
            repairs=(repairs[0], repairs[1]),
            rewind=combined(path.tuned[[0, -1]], self.units, [1.0, -1.0]),
            displacement=path.displacement / path.size if path.size else math.nan,
        )

    def row(self, path: LayerPath, worst: float) -> dict[str, Any]:
        """The layer's columns of `layers`, without sharpness and verdicts."""
        screened = self.screened(path, worst)
        alphas, tuned = np.array(self.alphas), self.curve(path.tuned)
        middle = int(np.argmin(np.abs(alphas - 0.5)))
        to_base, to_tuned = screened.repairs
        return {
            "layer": path.layer.index, "name": path.layer.name, "weights": path.layer.weights,
            "displacement": screened.displacement, "moved": path.displacement,
            "barrier": screened.barrier.value, "barrier_error": screened.barrier.error,
            "barrier_tuned": self._barrier(path.tuned).value, "barrier_base": self._barrier(path.base).value,
            "lag": loss_curves.lag(alphas, tuned), "rewind_cost": screened.rewind.value,
            "rewind_half": screened.rewind.half, "midway_rise": float(tuned[middle] - tuned[-1]),
            "control_rise": float(self.curve(path.control).mean() - tuned[-1]), "repair_base": to_base.value,
            "repair_base_half": to_base.half, "repair_tuned": to_tuned.value,
            "repair_tuned_half": to_tuned.half,
        }  # fmt: skip

    def path_rows(self, path: LayerPath) -> list[dict[str, Any]]:
        """A layer's rows of `layer_paths`."""
        return [
            {"layer": path.layer.index, "anchor": anchor, "alpha": alpha, "loss": float(loss)}
            for anchor, nats in (("tuned", path.tuned), ("base", path.base))
            for alpha, loss in zip(self.alphas, self.curve(nats), strict=True)
        ]

    def _barrier(self, nats: Nats) -> Estimate:
        """The barrier of a layer's path, with the standard error at its highest point."""
        alphas, losses = np.array(self.alphas), self.curve(nats)
        top = loss_curves.highest(alphas, losses)
        if not top:
            return UNDEFINED
        weights = [alphas[top] - 1, -alphas[top], 1.0]
        height = combined(nats[[0, -1, top]], self.units, weights)
        return Estimate.normal(max(0.0, height.value), height.error)

    def _filled(self, rows: LossesByRow) -> Float[np.ndarray, " rows"]:
        """Nats of the rows of all sets; NaN where the loss is not finite."""
        parts = [
            np.full(len(self.evaluator.units(which)), math.nan) if nats is None else nats
            for which, nats in zip(self.on, rows, strict=True)
        ]
        return np.concatenate(parts)

    def _cache_is_exact(self) -> bool:
        """Whether a loss from cached blocks equals that of a full pass, bit for bit."""
        self.evaluator.interpolated.set_alpha(1.0)
        last = self.evaluator.interpolated.layers[-1].index
        cached = [self._filled(_current_losses(self.evaluator, self.on, last, 1.0)) for _ in range(2)]
        self.evaluator.clear_prefix()
        return all(np.array_equal(self.path(1.0), nats) for nats in cached)


def _layer_losses(
    evaluator: PathEvaluator, *, on: Sequence[SetKey], cached: bool, seed: int, anchor: float, layer: int,
    alphas: Sequence[float], draws: int,
) -> list[LossesByRow]:  # fmt: skip
    """Losses with a layer at some α and all others at an anchor, then with it moved at random there."""
    prefix = anchor if cached else None
    losses = []
    for alpha in alphas:
        evaluator.interpolated.set_alpha(anchor, {layer: alpha})
        losses.append(_current_losses(evaluator, on, layer, prefix))
    evaluator.interpolated.set_alpha(anchor)
    (moved,) = (candidate for candidate in evaluator.interpolated.layers if candidate.index == layer)
    for draw in range(draws):
        with evaluator.interpolated.changed(moved, _noise(evaluator.interpolated, layer, seed, draw)):
            losses.append(_current_losses(evaluator, on, layer, prefix))
    return losses


def _current_losses(
    evaluator: PathEvaluator, on: Sequence[SetKey], layer: int, prefix: float | None
) -> LossesByRow:
    """Nats by row at the current weights, with the blocks before the layer cached at α `prefix` if given."""
    with nullcontext() if prefix is None else evaluator.prefix_cached(layer, prefix):
        return [evaluator.current_rows(which) for which in on]


def _noise(
    interpolated: InterpolatedModel, layer: int, seed: int, draw: int
) -> Callable[[str, Tensor], Tensor]:
    """Move each tensor of a layer at random, by half the norm of its delta."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer + 2) * 1_000_003 + draw)

    def change(name: str, value: Tensor) -> Tensor:
        base, tuned = interpolated.ends(name)
        noise = torch.randn(tuned.shape, generator=generator, dtype=torch.float64)
        half = float((tuned.double() - base.double()).norm()) / 2
        size = float(noise.norm())
        return (value.double() + noise * (half / size if size else 0.0)).to(value.dtype)

    return change
