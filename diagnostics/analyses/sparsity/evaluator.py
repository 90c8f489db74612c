"""Base and tuned measured under masks: every sparsity, pattern and control on one model in memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diagnostics.analyses.sparsity.mask_overlap import Mass, Overlaps, mass, squared_change
from diagnostics.evaluation.row_losses import EncodedTask, Losses
from diagnostics.execution import workers
from diagnostics.numerics import row_bootstrap
from probes.checkpoints.pair import Side
from probes.checkpoints.prune import (
    Cut,
    Order,
    Scope,
    cut_levels,
    magnitude_order,
    n_of_m,
    pattern_pruned,
    random_order,
)
from probes.errors import InputError
from probes.files.layout import Part
from probes.models.two_sided import TwoSidedModel

if TYPE_CHECKING:
    import pandas as pd

Regime = Literal["zero_shot", "masked_finetune"]
Metric = Literal["accuracy", "loss"]
Progress = Callable[[int, int, str], None]
Set = tuple[str, str]  # role and name
Asked = tuple[Side, str, float]  # whose weights, pattern, sparsity

MAGNITUDE, RANDOM = "magnitude", "random"
SIDES: tuple[Side, ...] = ("base", "tuned")
PATTERNS = ("1:2", "2:4", "4:8")
# Digits by which two sparsities are told apart.
DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of the model.

    Attributes:
        model: whose weights are masked, and by whose magnitudes.
        pattern: `magnitude`, `random`, or N:M as in `2:4`.
        sparsity: as asked for.
        realised: share of the weights in the scope that is pruned.
        regime: whether anything is trained behind the mask.
    """

    model: Side
    pattern: str
    sparsity: float
    realised: float
    regime: Regime = "zero_shot"


def parsed(pattern: str) -> tuple[int, int]:
    """How many weights of how many a pattern keeps at most.

    Raises:
        InputError: it is not N:M with N below M.
    """
    parts = pattern.split(":")
    if (
        len(parts) != 2
        or not all(part.isdecimal() for part in parts)
        or not 0 < int(parts[0]) < int(parts[1])
    ):
        raise InputError(f"patterns holds {pattern!r}; write N:M, at most N of M weights kept, such as 2:4")
    return int(parts[0]), int(parts[1])


def sparsity_of(pattern: str) -> float:
    """The share that an N:M pattern prunes.

    Raises:
        InputError: as `parsed`.
    """
    kept, of = parsed(pattern)
    return 1 - kept / of


class Masks:
    """What each sparsity prunes of base, of tuned, and at random.

    Attributes:
        about: how they were asked for, beside host and sparsities.
        names: the stored tensors that are pruned, in their order.
        left_out: matrices of the file that the running model does not have.
    """

    def __init__(
        self,
        host: TwoSidedModel,
        sparsities: Sequence[float],
        *,
        scope: Scope,
        parts: tuple[Part, ...],
        random: bool,
        seed: int,
    ):
        """Find the cuts of these sparsities in the same passes over the weights.

        Raises:
            InputError: a sparsity outside [0, 1); nothing to prune, or weights that are no finite floats.
        """
        self.host = host
        self.about = {"scope": scope, "parts": parts, "random": random, "seed": seed}
        tuned = host.pair.tuned
        whole = magnitude_order(tuned, scope, parts)
        coded = [name for name in whole.shapes if not tuned.headers[name].dtype.is_floating_point]
        if coded:
            kind = str(tuned.headers[coded[0]].dtype).removeprefix("torch.")
            raise InputError(
                f"{tuned.ref}: {coded[0]} is stored as {kind}, and codes have no order of magnitude; "
                "dequantise the checkpoint first"
            )
        self.names = tuple(name for name in whole.shapes if name in host.headers)
        self.left_out = tuple(name for name in whole.shapes if name not in host.headers)
        if not self.names:
            raise InputError(f"{tuned.ref}: the model runs with no {' or '.join(parts)} matrix of its file")
        shapes = {name: whole.shapes[name] for name in self.names}
        groups = {name: whole.groups[name] for name in self.names}
        self._orders = {
            "base": Order(shapes, lambda name: host.read(name, "base"), groups=groups),
            "tuned": Order(shapes, lambda name: host.read(name, "tuned"), groups=groups),
        }
        if random:
            drawn = random_order(tuned, scope, parts, seed=seed)
            self._orders[RANDOM] = Order(shapes, drawn.read, groups=groups)
        self._cuts: dict[tuple[str, float], Cut] = {}
        for kind in self._orders if sparsities else ():
            self._find(kind, sparsities)

    def _find(self, kind: str, sparsities: Sequence[float]) -> None:
        asked = sorted({round(sparsity, DIGITS) for sparsity in sparsities})
        found = self._orders[kind].cuts(asked)
        self._cuts |= {(kind, sparsity): cut for sparsity, cut in zip(asked, found, strict=True)}

    @property
    def entries(self) -> int:
        """Weights in the scope."""
        return sum(self._orders["tuned"].entries.values())

    def order(self, model: Side, pattern: str) -> Order:
        """What a side's cuts, or the random ones, are taken from."""
        return self._orders[RANDOM if pattern == RANDOM else model]

    def cut(self, model: Side, sparsity: float, pattern: str = MAGNITUDE) -> Cut:
        """What a sparsity prunes; one that was not asked for at first is found now."""
        key = self._key(model, sparsity, pattern)
        if key not in self._cuts:
            self._find(key[0], [sparsity])
        return self._cuts[key]

    def take(self, model: Side, sparsity: float, pattern: str, cut: Cut) -> None:
        """Take a cut that was found elsewhere."""
        self._cuts[self._key(model, sparsity, pattern)] = cut

    def _key(self, model: Side, sparsity: float, pattern: str) -> tuple[str, float]:
        return (RANDOM if pattern == RANDOM else model, round(sparsity, DIGITS))

    def pruned(self, model: Side, pattern: str, sparsity: float, name: str) -> Bool[Tensor, "..."]:
        """Which entries of a stored tensor are pruned."""
        if pattern not in (MAGNITUDE, RANDOM):
            stored = self.host.read(name, model)
            return pattern_pruned(self.host.pair.tuned, name, stored, *parsed(pattern))
        return self.order(model, pattern).pruned(self.cut(model, sparsity, pattern), name)

    def realised(self, model: Side, pattern: str, sparsity: float) -> float:
        """Share of the scope that is pruned."""
        if pattern in (MAGNITUDE, RANDOM):
            return self.cut(model, sparsity, pattern).realised
        return sparsity_of(pattern)

    def misfit(self, pattern: str) -> str:
        """Why a pattern cannot be taken, with the matrix whose width its groups do not fill; empty if it can.

        Raises:
            InputError: it is no pattern.
        """
        kept, of = parsed(pattern)
        for matrix in self.host.pair.tuned.matrices.values():
            if matrix.tensor in self.names:
                try:
                    n_of_m(torch.zeros(1, matrix.columns), kept, of)
                except ValueError as error:
                    return f"{matrix.name}: {error}"
        return ""

    def fitting(self, patterns: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
        """The patterns to be measured, and what to say of those that are not.

        Args:
            patterns: None are the usual ones, as far as they fit.

        Raises:
            InputError: one that was asked for does not fit; the message names the matrix and its width.
        """
        misfits = {pattern: self.misfit(pattern) for pattern in (PATTERNS if patterns is None else patterns)}
        wrong = next((why for why in misfits.values() if why), "")
        if patterns is not None and wrong:
            raise InputError(f"{self.host.pair.tuned.ref}: {wrong}")
        said = [f"{pattern} is not measured: {why}." for pattern, why in misfits.items() if why]
        return tuple(pattern for pattern, why in misfits.items() if not why), said

    def kept(self, model: Side, pattern: str, sparsity: float) -> Mass:
        """The magnitude that a mask keeps."""
        parts = (
            mass(self.host.read(name, model), self.pruned(model, pattern, sparsity, name))
            for name in self.names
        )
        return sum(parts, Mass())

    def overlaps(self, sparsities: Sequence[float]) -> "pd.DataFrame":
        """How alike the masks of base and tuned are, by rising sparsity, without tensors that base lacks."""
        import pandas as pd

        rising = sorted(set(sparsities))
        cuts = [[self.cut(side, sparsity) for sparsity in rising] for side in SIDES]
        found = Overlaps(len(rising))
        for name in self.names:
            if name in self.host.in_both:
                sides = [self.host.read(name, side) for side in SIDES]
                base, tuned = (cut_levels(each, name, W) for each, W in zip(cuts, sides, strict=True))
                found.add(base, tuned, squared_change(*sides))
        return pd.DataFrame(
            {
                "sparsity": sparsity, "cosine": each.cosine, "cosine_chance": each.cosine_chance,
                "kappa": each.kappa, "iou": each.iou, "iou_chance": each.iou_chance, "revived": each.revived,
                "revived_chance": 1 - sparsity, "delta_low": each.delta_low, "delta_low_chance": sparsity,
            }
            for sparsity, each in zip(rising, found, strict=True)
        )  # fmt: skip

    def layers(self, model: Side, sparsity: float) -> "pd.DataFrame":
        """How sparse each matrix is under a mask, beside what its scale alone predicts of normal weights.

        `gaussian` is erf(t / (√2 σ)) with the matrix's rms σ and the largest pruned magnitude t that bounds
        it; `excess` is what is pruned beyond.
        """
        import pandas as pd

        cut, rows = self.cut(model, sparsity), []
        places = {name: place for place, name in enumerate(self.names)}
        tuned = self.host.pair.tuned.matrices.values()
        held = sorted((m for m in tuned if m.tensor in places), key=lambda matrix: places[matrix.tensor])
        name, stored, pruned = "", torch.empty(0), torch.empty(0, dtype=torch.bool)
        for matrix in held:
            if matrix.tensor != name:
                name = matrix.tensor
                stored = self.host.read(name, model)
                pruned = cut.pruned(name, stored)
            weights, taken = matrix.take(stored), int(matrix.take(pruned).sum())
            segments = cut.segments[name]
            bound = segments[(matrix.expert or 0) if len(segments) > 1 else 0].threshold
            rms = float(weights.float().square().mean(dtype=torch.float64)) ** 0.5
            share = taken / weights.numel()
            predicted = math.erf(bound / (math.sqrt(2) * rms)) if rms and sparsity else math.nan
            rows.append(
                {
                    "model": model, "matrix": matrix.name, "layer": matrix.layer,
                    "component": matrix.component, "at": sparsity, "entries": weights.numel(),
                    "sparsity": share, "density": 1 - share, "gaussian": predicted,
                    "excess": share - predicted, "rms": rms,
                    "zero": int((weights == 0).sum()) / weights.numel(),
                }
            )  # fmt: skip
        table = pd.DataFrame(rows)
        return table.assign(layer=table["layer"].astype("Int64"))


class MaskEvaluator:
    """Losses of every row at every point, measured as they are asked for.

    Attributes:
        points: in the order in which they were measured.
        evaluations: passes over the rows.
    """

    def __init__(
        self, masks: Masks, sets: Mapping[Set, EncodedTask], *, total: int, progress: Progress | None = None
    ):
        self.masks, self.host, self.sets = masks, masks.host, sets
        self.points: list[Point] = []
        self._losses: list[dict[Set, Losses]] = []
        self.evaluations = 0
        self._ahead: dict[Asked, dict[Set, Losses]] = {}
        self._total, self._progress, self._done = total, progress, 0
        self._present: tuple[Side, str, float] | None = None

    def ahead(self, asked: Sequence[Asked]) -> None:
        """Run what `measure` will be asked for on the engine's workers, if it has any.

        Args:
            asked: side, pattern and sparsity of points without training.
        """
        there = workers.hosts(self.host, partial(_of, sets=self.sets, about=self.masks.about))
        if there is None:
            return
        # Without a mask all patterns are one model.
        plan = [each for each in asked if each[2] or each[1] == MAGNITUDE]
        calls = (partial(_losses, asked=each, cut=self._cut(*each)) for each in plan)
        for each, losses in zip(plan, there.each(calls), strict=True):
            self._ahead[each] = losses
            self._tell(*each)

    def _cut(self, model: Side, pattern: str, sparsity: float) -> Cut | None:
        return self.masks.cut(model, sparsity, pattern) if pattern in (MAGNITUDE, RANDOM) else None

    def _tell(self, model: Side, pattern: str, sparsity: float) -> None:
        self._done += 1
        if self._progress:
            what = f"{model}, {pattern} at {sparsity:g}"
            self._progress(self._done, max(self._done, self._total), what)

    def prune(self, model: Side, pattern: str, sparsity: float) -> None:
        """Be a side under a mask; from a lower sparsity of the same order, only more is zeroed."""
        present = self._present
        if present is None or present[:2] != (model, pattern) or sparsity < present[2]:
            self.host.become(model)
        self._present = (model, pattern, sparsity)
        if pattern in (MAGNITUDE, RANDOM):
            order, cut = self.masks.order(model, pattern), self.masks.cut(model, sparsity, pattern)
            self.host.prune(order, cut, rising=pattern == MAGNITUDE)
            return
        for name in self.masks.names:
            self.host.zero(name, self.masks.pruned(model, pattern, sparsity, name))

    def forget(self) -> None:
        """Say that the model was changed otherwise, so that the next mask starts from the checkpoint."""
        self._present = None

    def measure(
        self,
        model: Side,
        pattern: str,
        sparsity: float,
        *,
        regime: Regime = "zero_shot",
        train: Callable[[Mapping[nn.Parameter, Bool[Tensor, "..."]]], None] | None = None,
    ) -> Point:
        """Measure one point.

        Args:
            train: tunes what the mask leaves before anything is measured; given what is held at zero.
        """
        point = Point(
            model=model, pattern=pattern, sparsity=sparsity, regime=regime,
            realised=self.masks.realised(model, pattern, sparsity),
        )  # fmt: skip
        dense = None if sparsity else self.dense(model, regime)
        known = self._ahead.pop((model, pattern, sparsity), None) if train is None else None
        if dense is not None:  # without a mask all patterns are one model
            losses = self._losses[dense]
        elif known is not None:
            losses = known
        else:
            self.prune(model, pattern, sparsity)
            if train is not None:
                train(self.held(model, pattern, sparsity))
                self.forget()
            losses = self.here()
        self.evaluations += dense is None
        self.points.append(point)
        self._losses.append(losses)
        if known is None:
            self._tell(model, pattern, sparsity)
        return point

    def here(self) -> dict[Set, Losses]:
        """Losses of every row with the model as it is."""
        return {which: each.measure(self.host.model) for which, each in self.sets.items()}

    @property
    def curves(self) -> list[tuple[Side, Regime]]:
        """Each side and regime that was measured, in order."""
        return list(dict.fromkeys((point.model, point.regime) for point in self.points))

    def curve(self, model: Side, pattern: str, regime: Regime) -> list[int]:
        """Where a curve's points are, by rising sparsity."""
        own = [
            place
            for place, point in enumerate(self.points)
            if (point.model, point.pattern, point.regime) == (model, pattern, regime)
        ]
        return sorted(own, key=lambda place: self.points[place].sparsity)

    def count(self, role: str) -> int:
        """Rows of a role that have something to score."""
        return sum(int((self._losses[0][which].units > 0).sum()) for which in self.sets if which[0] == role)

    def dense(self, model: Side, regime: Regime) -> int | None:
        """Where a side was measured without a mask."""
        for place, point in enumerate(self.points):
            if (point.model, point.regime, point.sparsity) == (model, regime, 0):
                return place
        return None

    def held(self, model: Side, pattern: str, sparsity: float) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """What a mask holds at zero, by parameter of the running model."""
        held: dict[nn.Parameter, Bool[Tensor, ...]] = {}
        for name in self.masks.names:
            pruned = self.masks.pruned(model, pattern, sparsity, name)
            index = pruned.flatten().nonzero()[:, 0]
            for slot in self.host.editable.slots(name, index):
                parameter = slot.tensor
                assert isinstance(parameter, nn.Parameter), name
                if parameter not in held:
                    held[parameter] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
                held[parameter].view(-1)[slot.indices] = True
        return held

    def rows(self, role: str, metric: Metric) -> list[row_bootstrap.RowLosses]:
        """What each set of a role scored at every point, rows with nothing to score left out.

        Raises:
            InputError: fewer than 2 rows are left.
        """
        found = []
        for which, each in self.sets.items():
            if which[0] != role:
                continue
            units = self._losses[0][which].units
            scored = units > 0
            if scored.sum() < 2:
                raise InputError(
                    f"{each.task.ref}: {scored.sum()} rows have a token to score; at least 2 are needed"
                )
            values = [
                losses[which].nats if metric == "loss" else losses[which].right * units
                for losses in self._losses
            ]
            found.append(row_bootstrap.RowLosses(nats=np.stack(values)[:, scored], units=units[scored]))
        return found

    def values(self, role: str, metric: Metric) -> Float[np.ndarray, " points"]:
        """The metric at every point, each set counting alike."""
        return row_bootstrap.mean_loss(self.rows(role, metric))

    @property
    def unscored(self) -> int:
        """Rows with nothing to score."""
        return sum(int((each.units == 0).sum()) for each in self._losses[0].values())


# On a worker


def _of(host: TwoSidedModel, sets: Mapping[Set, EncodedTask], about: Mapping[str, Any]) -> MaskEvaluator:
    return MaskEvaluator(Masks(host, (), **about), sets, total=0)


def _losses(bench: MaskEvaluator, *, asked: Asked, cut: Cut | None) -> dict[Set, Losses]:
    model, pattern, sparsity = asked
    if cut is not None:
        bench.masks.take(model, sparsity, pattern, cut)
    bench.prune(model, pattern, sparsity)
    return bench.here()
