"""Paths of single layers, from tuned and from base, with what they are held against.

A layer's path moves it alone from base to tuned while all others stay at one end. Its barrier is compared
with random moves of the same size, with its equal share of the whole path's barrier, and with what pinning it
to an end takes off the loss where the whole path is at its worst.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics import barriers
from diagnostics.along import Along, Which
from diagnostics.barriers import Measured, Screened, combined
from probes.perturb import Prefix
from probes.walk import Layer

Nats = Float[np.ndarray, "alphas rows"]


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
        self, along: Along, on: Sequence[Which], alphas: Sequence[float], *, draws: int = 4, seed: int = 0
    ):
        self.along, self.on, self.alphas = along, tuple(on), tuple(alphas)
        self.draws, self.seed = draws, seed
        self.units = np.concatenate([along.units(which) for which in on])
        self.prefix = Prefix(along.walk.model)
        self.cached = self._same()

    @property
    def walk(self) -> Any:
        """The model on its path."""
        return self.along.walk

    def whole(self, alpha: float) -> Float[np.ndarray, " rows"]:
        """Nats by row of the whole model at α."""
        return np.concatenate([self.along.rows(which, alpha) for which in self.on])

    def curve(self, nats: Nats) -> barriers.Curve:
        """Losses of nats by row."""
        return nats.sum(axis=1) / self.units.sum()

    def worst(self, alphas: Sequence[float]) -> float:
        """The interior α at which the whole path lies furthest above its chord; the middle if nowhere."""
        if self.barrier(alphas) <= 0:  # where layers are furthest from both ends
            return float(min(alphas[1:-1], key=lambda alpha: abs(alpha - 0.5)))
        losses = self.curve(np.stack([self.whole(alpha) for alpha in alphas]))
        return float(alphas[barriers.highest(np.array(alphas), losses)])

    def barrier(self, alphas: Sequence[float]) -> float:
        """That of the whole path."""
        return barriers.barrier(
            np.array(alphas), self.curve(np.stack([self.whole(alpha) for alpha in alphas]))
        )

    def here(self, layer: int) -> Float[np.ndarray, " rows"]:
        """Nats by row wherever the model stands, blocks before the layer taken from what was kept."""
        with self.prefix.entering(layer) if self.cached else nullcontext():
            return np.concatenate([self.along.here(which) for which in self.on])

    def measure(
        self, worst: float, progress: Callable[[int, int, str], None] | None = None
    ) -> list[LayerPath]:
        """Every layer, in order.

        Args:
            worst: where layers are pinned.
        """
        layers, inside = self.walk.layers, self.alphas[1:-1]
        paths: dict[tuple[float, int], Nats] = {}
        control: dict[int, Any] = {}
        done = 0

        def tell(what: str) -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, 3 * len(layers), what)

        for anchor in (1.0, 0.0):
            self._moved()
            for layer in layers:
                found = {anchor: self.whole(anchor)}
                for alpha in (*inside, 1.0 - anchor):
                    self.walk.place(anchor, {layer.index: alpha})
                    found[alpha] = self.here(layer.index)
                paths[anchor, layer.index] = np.stack([found[alpha] for alpha in self.alphas])
                self.walk.place(anchor)
                if anchor:
                    control[layer.index] = self._control(layer)
                tell(f"{layer.name} from {'tuned' if anchor else 'base'}")
        self.walk.place(worst)
        self._moved()
        pinned = {}
        for layer in layers:
            ends = []
            for end in (0.0, 1.0):
                self.walk.place(worst, {layer.index: end})
                ends.append(self.here(layer.index))
            self.walk.place(worst)
            pinned[layer.index] = np.stack(ends)
            tell(f"{layer.name} pinned")
        return [
            LayerPath(
                layer=layer, tuned=paths[1.0, layer.index], base=paths[0.0, layer.index],
                control=control[layer.index], pinned=pinned[layer.index],
                displacement=norms[0], size=norms[1],
            )
            for layer in layers
            for norms in (self.walk.displacement(layer),)
        ]  # fmt: skip

    def screened(self, path: LayerPath, worst: float) -> Screened:
        """What the rule for stragglers asks of a layer."""
        ends = [self._barrier(nats) for nats in (path.tuned, path.base)]
        stood = self.whole(worst)
        repairs = [combined(np.stack([stood, end]), self.units, [1.0, -1.0]) for end in path.pinned]
        return Screened(
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
            "lag": barriers.lag(alphas, tuned),
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

    def _barrier(self, nats: Nats) -> Measured:
        """The barrier of a layer's path with the error of the place where it is highest."""
        alphas, losses = np.array(self.alphas), self.curve(nats)
        place = barriers.highest(alphas, losses)
        if not place:
            return Measured(math.nan, math.nan)
        weights = [alphas[place] - 1, -alphas[place], 1.0]
        found = combined(nats[[0, -1, place]], self.units, weights)
        return Measured(max(0.0, found.value), found.error)

    def _control(self, layer: Layer) -> Float[np.ndarray, "draws rows"]:
        """Tuned with a layer moved at random, each tensor by half its change."""
        found = []
        for draw in range(self.draws):
            number = (self.seed * 1_000_003 + layer.index + 2) * 1_000_003 + draw
            generator = torch.Generator().manual_seed(number)

            def change(name: str, value: Tensor, generator: torch.Generator = generator) -> Tensor:
                base, tuned = self.walk.ends(name)
                noise = torch.randn(tuned.shape, generator=generator, dtype=torch.float64)
                half = float((tuned.double() - base.double()).norm()) / 2
                size = float(noise.norm())
                return (value.double() + noise * (half / size if size else 0.0)).to(value.dtype)

            with self.walk.changed(layer, change):
                found.append(self.here(layer.index))
        return np.stack(found)

    def _moved(self) -> None:
        """Forget what stands before the layers: the weights there have changed, or will."""
        self.prefix.clear()

    def _same(self) -> bool:
        """Whether a loss behind what was kept is that of a full pass, to the bit."""
        self.walk.place(1.0)
        last = self.walk.layers[-1].index
        plain = self.whole(1.0)
        with self.prefix.entering(last):
            kept = [np.concatenate([self.along.here(which) for which in self.on]) for _ in range(2)]
        self.prefix.clear()
        return all(np.array_equal(plain, each) for each in kept)
