"""Evaluates base and tuned under masks: every sparsity, pattern and control on one model in memory."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diagnostics.analyses.sparsity.mask_overlap import Mass, Overlaps, kept_mass, squared_change
from diagnostics.evaluation.row_losses import EncodedTask, Losses
from diagnostics.execution import workers
from diagnostics.numerics import row_bootstrap
from probes.checkpoints import prune
from probes.checkpoints.pair import Side
from probes.checkpoints.prune import Cut, Order, Scope
from probes.errors import InputError
from probes.files.layout import Part
from probes.models.two_sided import TwoSidedModel
from probes.progress import Progress

Regime = Literal["zero_shot", "masked_finetune"]
Metric = Literal["accuracy", "loss"]
SetKey = tuple[str, str]  # role and name
PointKey = tuple[Side, str, float]  # side, pattern, sparsity

MAGNITUDE, RANDOM = "magnitude", "random"
SIDES: tuple[Side, ...] = ("base", "tuned")
PATTERNS = ("1:2", "2:4", "4:8")
# Columns of the table of overlaps.
OVERLAPS = ("cosine", "cosine_chance", "kappa", "iou", "iou_chance", "revived", "delta_low")
# Sparsities are equal up to so many digits.
DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of the model."""

    model: Side  # the side that is masked, by its own magnitudes
    pattern: str  # `magnitude`, `random`, or N:M as in `2:4`
    sparsity: float  # as requested
    realised: float  # share of the weights in the scope that is pruned
    regime: Regime = "zero_shot"  # whether weights are tuned behind the mask

    @property
    def curve(self) -> tuple[Side, str, Regime]:
        """The curve that it is a point of."""
        return self.model, self.pattern, self.regime


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N and M of an N:M pattern, which keeps at most N of M weights."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise InputError(f"patterns holds {pattern!r}; write N:M, at most N of M weights kept, such as 2:4")
    return int(match[1]), int(match[2])


def pattern_sparsity(pattern: str) -> float:
    """The share that an N:M pattern prunes."""
    kept, of = parse_pattern(pattern)
    return 1 - kept / of


class Masks:
    """The weights that each sparsity prunes of base, of tuned, and at random."""

    def __init__(
        self,
        two_sided: TwoSidedModel,
        sparsities: Sequence[float],
        *,
        scope: Scope,
        parts: tuple[Part, ...],
        random: bool,
        seed: int,
    ):
        """Find the cuts of all sparsities in the same passes over the weights."""
        self.two_sided = two_sided
        self.settings = {"scope": scope, "parts": parts, "random": random, "seed": seed}
        tuned = two_sided.pair.tuned
        order = prune.magnitude_order(tuned, scope, parts)
        quantised = [name for name in order.shapes if not tuned.headers[name].dtype.is_floating_point]
        if quantised:
            dtype = str(tuned.headers[quantised[0]].dtype).removeprefix("torch.")
            raise InputError(
                f"{tuned.ref}: {quantised[0]} is stored as {dtype}; dequantise the checkpoint first, codes "
                "have no order of magnitude"
            )
        # Tensors in the scope, and those that the running model lacks.
        self.names = tuple(name for name in order.shapes if name in two_sided.headers)
        self.left_out = tuple(name for name in order.shapes if name not in two_sided.headers)
        if not self.names:
            raise InputError(f"{tuned.ref}: the running model has no {' or '.join(parts)} matrix of the file")
        shapes = {name: order.shapes[name] for name in self.names}
        groups = {name: order.groups[name] for name in self.names}
        self._orders: dict[str, Order] = {
            side: Order(shapes, partial(two_sided.read, side=side), groups=groups) for side in SIDES
        }
        if random:
            drawn = prune.random_order(tuned, scope, parts, seed=seed)
            self._orders[RANDOM] = Order(shapes, drawn.read, groups=groups)
        self._cuts: dict[tuple[str, float], Cut] = {}
        for kind in self._orders if sparsities else ():
            self._find(kind, sparsities)

    def _find(self, kind: str, sparsities: Sequence[float]) -> None:
        ascending = sorted({round(sparsity, DIGITS) for sparsity in sparsities})
        cuts = self._orders[kind].cuts(ascending)
        self._cuts |= {(kind, sparsity): cut for sparsity, cut in zip(ascending, cuts, strict=True)}

    @property
    def entries(self) -> int:
        """Weights in the scope."""
        return sum(self._orders["tuned"].entries.values())

    def order(self, model: Side, pattern: str) -> Order:
        """The order that the cuts of a side and pattern are taken from."""
        return self._orders[RANDOM if pattern == RANDOM else model]

    def cut(self, model: Side, sparsity: float, pattern: str = MAGNITUDE) -> Cut:
        """The cut of a sparsity; found on demand if it was not requested at first."""
        key = self._key(model, sparsity, pattern)
        if key not in self._cuts:
            self._find(key[0], [sparsity])
        return self._cuts[key]

    def set_cut(self, model: Side, sparsity: float, pattern: str, cut: Cut) -> None:
        """Use a cut that another process found."""
        self._cuts[self._key(model, sparsity, pattern)] = cut

    def _key(self, model: Side, sparsity: float, pattern: str) -> tuple[str, float]:
        return (RANDOM if pattern == RANDOM else model, round(sparsity, DIGITS))

    def pruned(self, model: Side, pattern: str, sparsity: float, name: str) -> Bool[Tensor, "..."]:
        """The pruned entries of a stored tensor."""
        if pattern not in (MAGNITUDE, RANDOM):
            stored = self.two_sided.read(name, model)
            return prune.pattern_pruned(self.two_sided.pair.tuned, name, stored, *parse_pattern(pattern))
        return self.order(model, pattern).pruned(self.cut(model, sparsity, pattern), name)

    def realised(self, model: Side, pattern: str, sparsity: float) -> float:
        """Share of the scope that is pruned."""
        if pattern in (MAGNITUDE, RANDOM):
            return self.cut(model, sparsity, pattern).realised
        return pattern_sparsity(pattern)

    def misfit(self, pattern: str) -> str:
        """Why a pattern does not fit, naming the matrix; empty if it fits."""
        kept, of = parse_pattern(pattern)
        for matrix in self.two_sided.pair.tuned.matrices.values():
            if matrix.tensor in self.names:
                try:
                    prune.n_of_m(torch.zeros(1, matrix.columns), kept, of)
                except InputError as error:
                    return f"{matrix.name}: {error}"
        return ""

    def fitting(self, patterns: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
        """The patterns to measure, by default those of `PATTERNS` that fit, and notes on the others."""
        reasons = {pattern: self.misfit(pattern) for pattern in (PATTERNS if patterns is None else patterns)}
        misfits = {pattern: reason for pattern, reason in reasons.items() if reason}
        if patterns is not None and misfits:
            raise InputError(f"{self.two_sided.pair.tuned.ref}: {next(iter(misfits.values()))}")
        notes = [f"{pattern} is not measured: {reason}." for pattern, reason in misfits.items()]
        return tuple(pattern for pattern in reasons if pattern not in misfits), notes

    def kept_entries(self, model: Side, sparsity: float) -> dict[str, Int[Tensor, " _"]]:
        """Flat indices of the entries that a magnitude mask keeps, of each stored tensor."""
        return {
            name: (~self.pruned(model, MAGNITUDE, sparsity, name)).flatten().nonzero()[:, 0]
            for name in self.names
        }

    def kept(self, model: Side, pattern: str, sparsity: float) -> Mass:
        """The magnitude that a mask keeps."""
        parts = (
            kept_mass(self.two_sided.read(name, model), self.pruned(model, pattern, sparsity, name))
            for name in self.names
        )
        return sum(parts, Mass())

    def overlaps(self, sparsities: Sequence[float]) -> "pd.DataFrame":
        """Overlap of the masks of base and tuned at each sparsity, without tensors that base lacks."""
        ascending = sorted(set(sparsities))
        cuts = [[self.cut(side, sparsity) for sparsity in ascending] for side in SIDES]
        overlaps = Overlaps(len(ascending))
        for name in self.names:
            if name in self.two_sided.in_both:
                sides = [self.two_sided.read(name, side) for side in SIDES]
                base, tuned = (prune.cut_levels(cut, name, W) for cut, W in zip(cuts, sides, strict=True))
                overlaps.add(base, tuned, squared_change(sides[0], self.two_sided.settled(name)))
        table = pd.DataFrame({name: getattr(overlap, name) for name in OVERLAPS} for overlap in overlaps)
        table.insert(0, "sparsity", ascending)
        table.insert(7, "revived_chance", 1 - table["sparsity"])
        return table.assign(delta_low_chance=table["sparsity"])

    def layers(self, model: Side, sparsity: float) -> "pd.DataFrame":
        """Sparsity of each matrix under a mask, and the sparsity that its scale predicts for normal weights.

        `gaussian` is erf(t / (√2 σ)) with the matrix's rms σ and its pruning threshold t; `excess` is the
        sparsity beyond it.
        """
        cut, rows = self.cut(model, sparsity), []
        for name in self.names:
            stored = self.two_sided.read(name, model)
            pruned, segments = cut.pruned(name, stored), cut.segments[name]
            for matrix in (m for m in self.two_sided.pair.tuned.matrices.values() if m.tensor == name):
                weights, count = matrix.take(stored), int(matrix.take(pruned).sum())
                threshold = segments[(matrix.expert or 0) if len(segments) > 1 else 0].threshold
                rms = float(weights.float().square().mean(dtype=torch.float64)) ** 0.5
                share = count / weights.numel()
                predicted = math.erf(threshold / (math.sqrt(2) * rms)) if rms and sparsity else math.nan
                rows.append(
                    {
                        "model": model, "matrix": matrix.name, "layer": matrix.layer,
                        "component": matrix.component, "at": sparsity, "entries": weights.numel(),
                        "sparsity": share, "density": 1 - share, "gaussian": predicted,
                        "excess": share - predicted, "rms": rms,
                        "zero": int((weights == 0).sum()) / weights.numel(),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows).astype({"layer": "Int64"})


class MaskEvaluator:
    """Losses of every row at every point, measured on demand."""

    def __init__(
        self,
        masks: Masks,
        sets: Mapping[SetKey, EncodedTask],
        *,
        total: int,
        progress: Progress | None = None,
    ):
        self.masks, self.two_sided, self.sets = masks, masks.two_sided, sets
        self.points: list[Point] = []  # in the order of measurement
        self._losses: list[dict[SetKey, Losses]] = []
        self.evaluations = 0  # passes over the rows
        self._from_workers: dict[PointKey, dict[SetKey, Losses]] = {}
        self._total, self._progress, self._done = total, progress, 0
        self._applied: PointKey | None = None

    def measure_on_workers(self, keys: Sequence[PointKey]) -> None:
        """Measure points without training on the engine's workers, if any; `measure` finds their losses."""
        build = partial(_build, sets=self.sets, settings=self.masks.settings)
        remote = workers.two_sided_on_workers(self.two_sided, build)
        if remote is None:
            return
        # Without a mask all patterns are one model.
        plan = [key for key in keys if key[2] or key[1] == MAGNITUDE]
        calls = (partial(_measure_point, key=key, cut=self._cut(*key)) for key in plan)
        for key, losses in zip(plan, remote.run(calls), strict=True):
            self._from_workers[key] = losses
            self._report(*key)

    def _cut(self, model: Side, pattern: str, sparsity: float) -> Cut | None:
        return self.masks.cut(model, sparsity, pattern) if pattern in (MAGNITUDE, RANDOM) else None

    def _report(self, model: Side, pattern: str, sparsity: float) -> None:
        self._done += 1
        if self._progress:
            what = f"{model}, {pattern} at {sparsity:g}"
            self._progress(self._done, max(self._done, self._total), what)

    def prune(self, model: Side, pattern: str, sparsity: float) -> None:
        """Apply a mask to a side; after a lower sparsity of the same order, only more entries are zeroed."""
        applied = self._applied
        if applied is None or applied[:2] != (model, pattern) or sparsity < applied[2]:
            self.two_sided.become(model)
        self._applied = (model, pattern, sparsity)
        if pattern in (MAGNITUDE, RANDOM):
            order, cut = self.masks.order(model, pattern), self.masks.cut(model, sparsity, pattern)
            self.two_sided.prune(order, cut, rising=pattern == MAGNITUDE)
            return
        for name in self.masks.names:
            self.two_sided.zero(name, self.masks.pruned(model, pattern, sparsity, name))

    def measure(
        self,
        model: Side,
        pattern: str,
        sparsity: float,
        *,
        regime: Regime = "zero_shot",
        train: Callable[[Mapping[nn.Parameter, Bool[Tensor, "..."]]], None] | None = None,
    ) -> Point:
        """Measure one point; `train` tunes behind the mask before it, given the entries held at zero."""
        point = Point(
            model=model, pattern=pattern, sparsity=sparsity, regime=regime,
            realised=self.masks.realised(model, pattern, sparsity),
        )  # fmt: skip
        dense = None if sparsity else self.dense(model, regime)
        remote = self._from_workers.pop((model, pattern, sparsity), None) if train is None else None
        if dense is not None:  # without a mask all patterns are one model
            losses = self._losses[dense]
        elif remote is not None:
            losses = remote
        else:
            self.prune(model, pattern, sparsity)
            if train is not None:
                train(self.pruned_parameters(model, pattern, sparsity))
                self._applied = None  # the next mask starts from the checkpoint
            losses = self.losses()
        self.evaluations += dense is None
        self.points.append(point)
        self._losses.append(losses)
        if remote is None:
            self._report(model, pattern, sparsity)
        return point

    def losses(self) -> dict[SetKey, Losses]:
        """Losses of every row with the model in its present state."""
        editable = self.two_sided.editable
        return {key: encoded.under(editable).measure(editable.model) for key, encoded in self.sets.items()}

    @property
    def curves(self) -> list[tuple[Side, Regime]]:
        """Each side and regime that was measured, in order."""
        return list(dict.fromkeys((point.model, point.regime) for point in self.points))

    def curve(self, model: Side, pattern: str, regime: Regime) -> list[int]:
        """Indices of a curve's points, by ascending sparsity."""
        wanted = (model, pattern, regime)
        order = sorted(range(len(self.points)), key=lambda index: self.points[index].sparsity)
        return [index for index in order if self.points[index].curve == wanted]

    def count(self, role: str) -> int:
        """Number of rows of a role with something to score."""
        return sum(int((self._losses[0][key].units > 0).sum()) for key in self.sets if key[0] == role)

    def dense(self, model: Side, regime: Regime) -> int | None:
        """Index of the point of a side without a mask."""
        for index, point in enumerate(self.points):
            if (point.model, point.regime, point.sparsity) == (model, regime, 0):
                return index
        return None

    def pruned_parameters(
        self, model: Side, pattern: str, sparsity: float
    ) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
        """The pruned entries of each parameter of the running model."""
        held: dict[nn.Parameter, Bool[Tensor, ...]] = {}
        for name in self.masks.names:
            pruned = self.masks.pruned(model, pattern, sparsity, name)
            index = pruned.flatten().nonzero()[:, 0]
            for slot in self.two_sided.editable.slots(name, index):
                parameter = slot.tensor
                assert isinstance(parameter, nn.Parameter), name
                if parameter not in held:
                    held[parameter] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
                held[parameter].view(-1)[slot.indices] = True
        return held

    def rows(self, role: str, metric: Metric) -> list[row_bootstrap.RowLosses]:
        """Scores of each set of a role at every point, without rows that have nothing to score."""
        rows = []
        for key, encoded in self.sets.items():
            if key[0] != role:
                continue
            units = self._losses[0][key].units
            scored = units > 0
            if scored.sum() < 2:
                raise InputError(
                    f"{encoded.task.ref}: {scored.sum()} rows have a token to score; at least 2 are needed"
                )
            values = [
                losses[key].nats if metric == "loss" else losses[key].right * units for losses in self._losses
            ]
            rows.append(row_bootstrap.RowLosses(nats=np.stack(values)[:, scored], units=units[scored]))
        return rows

    def values(self, role: str, metric: Metric) -> Float[np.ndarray, " points"]:
        """The metric at every point, with equal weight for each set."""
        return row_bootstrap.mean_loss(self.rows(role, metric))

    @property
    def unscored(self) -> int:
        """Number of rows with nothing to score."""
        return sum(int((losses.units == 0).sum()) for losses in self._losses[0].values())


# On a worker


def _build(
    two_sided: TwoSidedModel, sets: Mapping[SetKey, EncodedTask], settings: Mapping[str, Any]
) -> MaskEvaluator:
    return MaskEvaluator(Masks(two_sided, (), **settings), sets, total=0)


def _measure_point(evaluator: MaskEvaluator, *, key: PointKey, cut: Cut | None) -> dict[SetKey, Losses]:
    model, pattern, sparsity = key
    if cut is not None:
        evaluator.masks.set_cut(model, sparsity, pattern, cut)
    evaluator.prune(model, pattern, sparsity)
    return evaluator.losses()
