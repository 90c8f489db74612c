"""Paths of single layers, from tuned and from base, with what they are held against.

A layer's path moves it alone from base to tuned while all others stay at one end. Its barrier is compared
with random moves of the same size, with its equal share of the whole path's barrier, and with what pinning it
to an end takes off the loss where the whole path is at its worst.
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
from diagnostics.evaluation.interpolation import PathEvaluator, Which
from diagnostics.numerics.estimates import UNDEFINED, Estimate, combined
from probes.models.interpolated import InterpolatedModel, Layer

Nats = Float[np.ndarray, "alphas rows"]
# Nats by row of each set; None where the loss is not finite.
LossesByRow: TypeAlias = list[Float[np.ndarray, " rows"] | None]


@dataclass(frozen=True, kw_only=True)
class LayerPath:
    """What was measured of one layer, in nats by row.

    Attributes:
        tuned, base: the paths from either anchor; α is that of the layer.
        control: tuned with the layer moved at random, by half its change in each tensor.
        pinned: the whole model at the worst α with the layer held at base, and at tuned.
        displacement, size: norms of the layer's delta and of its base.
    """

    layer: Layer
    tuned: Nats
    base: Nats
    control: Float[np.ndarray, "draws rows"]
    pinned: Float[np.ndarray, "ends rows"]
    displacement: float
    size: float


class LayerPaths:
    """Layer paths on the rows of some sets, which are pooled.

    Attributes:
        cached: whether blocks before a layer are run once; they are unless that changes a loss.
    """

    def __init__(
        self,
        along: PathEvaluator,
        on: Sequence[Which],
        alphas: Sequence[float],
        *,
        draws: int = 4,
        seed: int = 0,
    ):
        self.along, self.on, self.alphas = along, tuple(on), tuple(alphas)
        self.draws, self.seed = draws, seed
        self.units = np.concatenate([along.units(which) for which in on])
        self.cached = self._same()

    def whole(self, alpha: float) -> Float[np.ndarray, " rows"]:
        """Nats by row of the whole model at α."""
        return np.concatenate([self.along.rows(which, alpha) for which in self.on])

    def curve(self, nats: Nats) -> loss_curves.Curve:
        """Losses of nats by row."""
        return nats.sum(axis=1) / self.units.sum()

    def worst(self, alphas: Sequence[float]) -> float:
        """The interior α at which the whole path lies furthest above its chord; the middle if nowhere."""
        if self.barrier(alphas) <= 0:  # where layers are furthest from both ends
            return float(min(alphas[1:-1], key=lambda alpha: abs(alpha - 0.5)))
        losses = self.curve(np.stack([self.whole(alpha) for alpha in alphas]))
        return float(alphas[loss_curves.highest(np.array(alphas), losses)])

    def barrier(self, alphas: Sequence[float]) -> float:
        """That of the whole path."""
        return loss_curves.barrier(
            np.array(alphas), self.curve(np.stack([self.whole(alpha) for alpha in alphas]))
        )

    def measure(self, worst: float) -> list[LayerPath]:
        """Every layer, in order.

        Args:
            worst: where layers are pinned.
        """
        layers, inside = self.along.walk.layers, self.alphas[1:-1]
        leg = partial(_leg, on=self.on, cached=self.cached, seed=self.seed)
        plan: list[tuple[float, Layer, partial[list[LossesByRow]]]] = []
        for anchor, alphas, draws in (
            (1.0, (*inside, 0.0), self.draws), (0.0, (*inside, 1.0), 0), (worst, (0.0, 1.0), 0),
        ):  # fmt: skip
            plan += [
                (anchor, layer, partial(leg, anchor=anchor, layer=layer.index, alphas=alphas, draws=draws))
                for layer in layers
            ]
        found: dict[tuple[float, int], Nats] = {}
        made = self.along.each(call for _, _, call in plan)
        for done, ((anchor, layer, _), rows) in enumerate(zip(plan, made, strict=True)):
            found[anchor, layer.index] = np.stack([self._filled(each) for each in rows])
            where = {1.0: "from tuned", 0.0: "from base"}.get(anchor, "pinned")
            self.along.tell(done + 1, len(plan), f"{layer.name} {where}")
        self.along.forget()
        base, tuned, between = self.whole(0.0)[None], self.whole(1.0)[None], len(inside)
        return [
            LayerPath(
                layer=layer,
                tuned=np.concatenate([away[[between]], away[:between], tuned]),
                base=np.concatenate([base, found[0.0, layer.index]]),
                control=away[between + 1 :], pinned=found[worst, layer.index],
                displacement=norms[0], size=norms[1],
            )
            for layer in layers
            for away, norms in ((found[1.0, layer.index], self.along.walk.displacement(layer)),)
        ]  # fmt: skip

    def screened(self, path: LayerPath, worst: float) -> ScreenedLayer:
        """What the rule for stragglers asks of a layer."""
        ends = [self._barrier(nats) for nats in (path.tuned, path.base)]
        stood = self.whole(worst)
        repairs = [combined(np.stack([stood, end]), self.units, [1.0, -1.0]) for end in path.pinned]
        return ScreenedLayer(
            barrier=max(ends, key=lambda each: each.value),
            repairs=(repairs[0], repairs[1]),
            rewind=combined(path.tuned[[0, -1]], self.units, [1.0, -1.0]),
            displacement=path.displacement / path.size if path.size else math.nan,
        )

    def row(self, path: LayerPath, worst: float) -> dict[str, Any]:
        """A layer as a row of a table."""
        found = self.screened(path, worst)
        alphas, tuned = np.array(self.alphas), self.curve(path.tuned)
        middle = int(np.argmin(np.abs(alphas - 0.5)))
        return {
            "layer": path.layer.index,
            "name": path.layer.name,
            "weights": path.layer.weights,
            "displacement": found.displacement,
            "moved": path.displacement,
            "barrier": found.barrier.value,
            "barrier_error": found.barrier.error,
            "barrier_tuned": self._barrier(path.tuned).value,
            "barrier_base": self._barrier(path.base).value,
            "lag": loss_curves.lag(alphas, tuned),
            "rewind_cost": found.rewind.value,
            "rewind_half": found.rewind.half,
            "midway_rise": float(tuned[middle] - tuned[-1]),
            "control_rise": float(self.curve(path.control).mean() - tuned[-1]),
            "repair_base": found.repairs[0].value,
            "repair_base_half": found.repairs[0].half,
            "repair_tuned": found.repairs[1].value,
            "repair_tuned_half": found.repairs[1].half,
        }

    def path_rows(self, path: LayerPath) -> list[dict[str, Any]]:
        """A layer's paths, a row a place."""
        return [
            {"layer": path.layer.index, "anchor": anchor, "alpha": alpha, "loss": float(loss)}
            for anchor, nats in (("tuned", path.tuned), ("base", path.base))
            for alpha, loss in zip(self.alphas, self.curve(nats), strict=True)
        ]

    def _barrier(self, nats: Nats) -> Estimate:
        """The barrier of a layer's path with the error of the place where it is highest."""
        alphas, losses = np.array(self.alphas), self.curve(nats)
        place = loss_curves.highest(alphas, losses)
        if not place:
            return UNDEFINED
        weights = [alphas[place] - 1, -alphas[place], 1.0]
        found = combined(nats[[0, -1, place]], self.units, weights)
        return Estimate.normal(max(0.0, found.value), found.error)

    def _filled(self, rows: LossesByRow) -> Float[np.ndarray, " rows"]:
        """Nats of the rows of all sets; NaN where the loss is not finite."""
        whole = [self.along.units(which) for which in self.on]
        return np.concatenate(
            [
                np.full(len(units), math.nan) if each is None else each
                for units, each in zip(whole, rows, strict=True)
            ]
        )

    def _same(self) -> bool:
        """Whether a loss behind what was kept is that of a full pass, to the bit."""
        self.along.walk.place(1.0)
        last = self.along.walk.layers[-1].index
        kept = [self._filled(_here(self.along, self.on, last, 1.0)) for _ in range(2)]
        self.along.forget()
        return all(np.array_equal(self.whole(1.0), each) for each in kept)


# At one place of one layer, here or on a worker


def _leg(
    along: PathEvaluator,
    *,
    on: Sequence[Which],
    cached: bool,
    seed: int,
    anchor: float,
    layer: int,
    alphas: Sequence[float],
    draws: int,
) -> list[LossesByRow]:
    """A layer at places of its own and all others at an anchor, then moved at random there."""
    behind = anchor if cached else None
    found = []
    for alpha in alphas:
        along.walk.place(anchor, {layer: alpha})
        found.append(_here(along, on, layer, behind))
    along.walk.place(anchor)
    (moved,) = (each for each in along.walk.layers if each.index == layer)
    for draw in range(draws):
        with along.walk.changed(moved, _noise(along.walk, layer, seed, draw)):
            found.append(_here(along, on, layer, behind))
    return found


def _here(along: PathEvaluator, on: Sequence[Which], layer: int, behind: float | None) -> LossesByRow:
    """Nats by row wherever the model stands.

    Args:
        behind: where all that stands before the layer is; None: it is run again.
    """
    with nullcontext() if behind is None else along.behind(layer, behind):
        return [along.here(which) for which in on]


def _noise(walk: InterpolatedModel, layer: int, seed: int, draw: int) -> Callable[[str, Tensor], Tensor]:
    """Moves each tensor of a layer at random, by half its change."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer + 2) * 1_000_003 + draw)

    def change(name: str, value: Tensor) -> Tensor:
        base, tuned = walk.ends(name)
        noise = torch.randn(tuned.shape, generator=generator, dtype=torch.float64)
        half = float((tuned.double() - base.double()).norm()) / 2
        size = float(noise.norm())
        return (value.double() + noise * (half / size if size else 0.0)).to(value.dtype)

    return change
