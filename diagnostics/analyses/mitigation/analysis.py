"""Mitigation: does damping intruders keep more than scaling the whole update does?

Every mode of `mitigate` is applied in memory at every strength. The control, which the paper lacks, is
scaling the whole update: a mode is recommended only if it significantly keeps more at the same task loss.
Source: Shuttleworth et al., arXiv:2410.21228 v3 (both grids of strengths), and its public review.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.intruders.damping import Mode, applied, by_tensor, choose, triples
from diagnostics.analyses.mitigation import control
from diagnostics.analyses.mitigation.figures import draw
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.one_function import apart_notes
from diagnostics.evaluation.row_losses import EncodedTask, Losses
from diagnostics.evaluation.sets import SetKey, encode_sets, load_sets, set_notes
from diagnostics.evaluation.tokenizers import refuse_other_splits
from diagnostics.execution import jobs, workers
from diagnostics.numerics import row_bootstrap
from diagnostics.numerics.estimates import UNDEFINED
from probes import CheckpointPair
from probes.checkpoints.adapter_refit import Edit
from probes.checkpoints.blend import Blender
from probes.errors import InputError
from probes.files.layout import Part
from probes.models.config_changes import ConfigChange, differing, function_changes
from probes.models.editable import Editable
from probes.models.loading import Loading, kind_of
from probes.models.runnable import common_context

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, str], None]
# The grids of the paper's tables and of its curves.
SCALES = (0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0, 1.5, 2.0)
# Modes that can be recommended; the other two are controls.
REPAIRS = ("top", "all")
# A control strength this near a measured one is not measured again.
NEAR = 5e-3

METRICS = {
    "recommended": "modes that significantly keep more than scaling the whole update at the same task loss",
    "over_control_nats": "keep loss of the control minus that of the best mode; above 0 the mode is better",
    "over_control_low_nats": "lower end of its 95 % interval, corrected for the search over strengths",
    "over_control_high_nats": "upper end of that interval",
    "best_scale": "strength of the best mode: 0 removes, 1 changes nothing",
    "control_scale": "strength of the whole update with the same task loss",
    "retained_nats": "keep loss of tuned minus that of the best mode",
    "retention": "retained_nats as a share of forgotten_nats",
    "task_cost_nats": "task loss of the best mode minus that of tuned",
    "forgotten_nats": "keep loss of tuned minus that of base; above 0 tuning made the keep rows worse",
    "forgotten_low_nats": "lower end of the paired 95 % interval of forgotten_nats",
    "forgotten_high_nats": "upper end of that interval",
    "task_gain_nats": "task loss of base minus that of tuned",
    "keep_loss_base": "loss of base on the keep rows, nats per token (per row with choices or labels)",
    "keep_loss_tuned": "loss of tuned on the keep rows",
    "task_loss_base": "loss of base on the task rows",
    "task_loss_tuned": "loss of tuned on the task rows",
    "task_accuracy_base": "accuracy of base on task rows with choices or labels",
    "task_accuracy_tuned": "accuracy of tuned on task rows with choices or labels",
    "intruders": "intruder dimensions found",
    "edited": "matrices with an intruder; 0: there is nothing to damp, and only the control is measured",
    "rows_task": "task rows scored",
    "rows_keep": "keep rows scored",
    "unscored": "rows with nothing to score",
    "truncated": "rows cut because they are longer than the model takes",
}


def summary(result: Result) -> str:
    """The mode, if any, that keeps more than scaling the whole update."""
    m = result.metrics
    text = f"tuning cost {m['forgotten_nats']:+.3g} nats on the keep rows and gained "
    text += f"{m['task_gain_nats']:+.3g} on the task; "
    if not m["edited"]:
        return f"{text}no intruder to damp"
    if result.tables["modes"].empty:
        return f"{text}no control lies between two functions"
    row = best(result.tables["modes"])
    gain = f"({row['over_control_nats']:+.3g}, {row['over_control_low_nats']:.3g} to "
    gain += f"{row['over_control_high_nats']:.3g})"
    if m["recommended"]:
        return f"{text}`{row['mode']}` at {row['scale']:g} keeps more than scaling the whole update {gain}"
    return f"{text}no mode significantly beats scaling the whole update: at best `{row['mode']}` {gain}"


@analysis(
    "mitigation",
    question="Does damping intruder dimensions keep more than scaling the whole update does?",
    reading=(
        "Each line starts at tuned, strength 1, and trades task loss for retention; the scaled update ends "
        "at base. Only above that line does knowing the intruders help; on or below it, scaling the update "
        "does as well. The neighbouring vector is a second control: the effect of damping any leading "
        "direction. Intervals are of the difference at the same task loss, on the same "
        "rows, simultaneous over strengths. A mode is recommended if its interval lies above the margin."
    ),
    paper="arXiv:2410.21228",
    cost=(
        "a forward pass over task and keep rows for every mode and strength, about 43 by default; one SVD of "
        "each matrix with an intruder; one copy of the model in memory"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"scales": (0.5,), "draws": 100},
        absolute={"task_accuracy_base": 1 / 60, "task_accuracy_tuned": 1 / 60, "intruders": 0, "edited": 0},
        relative={"keep_loss_base": 1e-4, "keep_loss_tuned": 1e-4, "task_loss_tuned": 1e-4},
    ),
)
def judged_mitigation(
    pair: CheckpointPair, task: Any, keep: Any, *, scales: tuple[float, ...] = SCALES, k: int = 10,
    epsilon: float = 0.5, parts: tuple[Part, ...] = ("block",), margin: float = 0.01, draws: int = 1000,
    options: RowOptions = RowOptions(), seed: int = 0, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Measure retention and task loss for every mode of `mitigate` and for two controls.

    Weights are those that `mitigate` writes, computed in float64 and rounded once; an adapter is merged. Base
    is base's own model. Every file of a role has the same weight. Only strengths below 1 are candidates.
    Where the configurations of base and tuned give two functions, no scaled update lies between them: the
    modes are measured without that control, and none is recommended.

    Args:
        pair: base and tuned.
        task: held-out rows of the tuned model's own distribution: a task, a file, texts, or several by name.
        keep: rows of what must survive, in the same forms.
        scales: strengths; 0 and 1 of the whole update, base and tuned, are always measured.
        k, epsilon, parts: definition of an intruder, as in `intruder_dimensions`.
        margin: nats that a mode must significantly keep beyond the control to be recommended (ours: the
            largest effect of damping the neighbouring vector in our runs).
        draws: bootstrap draws of the rows, for the intervals (ours).
        options: how rows are read and how models run on them.
        device: where the model runs and matrices are decomposed.
        seed: of the draws.
        progress: called with (done, total, what).

    Metrics: listed with their meanings in the registration's `metrics`.

    Tables:
        `curve`: one row a mode and strength: mode (update, top, all or neighbour), scale, matrices (edited),
            keep_loss, task_loss (nats per unit, mean of the sets), task_accuracy, retained_nats, retention
            (share of the forgotten loss), task_cost_nats, task_kept (share of the gain), over_control_nats,
            over_control_low_nats, over_control_high_nats (95 % interval, simultaneous), control_scale,
            control_short_nats (task loss of the control above that of the mode), recommended (boolean).
        `modes`: the best strength of each mode; columns of `curve`: mode, scale, matrices, keep_loss,
            task_loss, task_accuracy, retained_nats, retention, task_cost_nats, task_kept, over_control_nats,
            over_control_low_nats, over_control_high_nats, control_scale, control_short_nats, recommended.
        `sets`: one row a file, mode and strength: role, set, mode, scale, rows (count), loss (nats per unit),
            unit (token or row), accuracy.

    Raises:
        InputError: a parameter out of range, rows or a model that cannot be scored, likelihoods that are not
            finite.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "full")
        >>> task, keep = (["one", "two"], ["three", "four"])
        >>> result = judged_mitigation(pair, task, keep, scales=(0.5,), draws=100)
        >>> result.metrics["rows_keep"]
        2
    """
    import pandas as pd

    _check(scales, margin, draws)
    loaded = load_sets({"task": task, "keep": keep}, least=2, purpose="judging a mitigation")
    refuse_other_splits(pair, loaded.values(), options)
    editable = Editable(pair.tuned, **options.of_models)
    editable.context = common_context(pair, editable.loading)
    sets = encode_sets(editable, loaded, **options.of_rows)
    # The search for intruders may take long: rows are checked first.
    plan = DampingPlan.of(pair, k=k, epsilon=epsilon, parts=parts, device=options.device, progress=progress)
    evaluator = DampingEvaluator(plan, editable, sets, progress)
    between = () if plan.config_changes else scales
    evaluator.measure([("update", scale) for scale in sorted({0.0, 1.0, *between})])
    for mode in plan.ranks:
        evaluator.measure([(mode, scale) for scale in sorted(set(scales))])
    comparison = evaluator.compare(draws=draws, seed=seed)
    matching = [] if plan.config_changes else comparison.matching()
    if matching:  # the deciding points of the control are measured, not interpolated
        evaluator.measure([("update", scale) for scale in matching])
        comparison = evaluator.compare(draws=draws, seed=seed)
    curve = comparison.curve(plan, margin)
    compared = () if plan.config_changes else plan.ranks
    modes = pd.DataFrame(
        [candidates(curve, mode).nlargest(1, "over_control_low_nats").iloc[0] for mode in compared],
        columns=curve.columns,
    ).reset_index(drop=True)
    metrics = comparison.metrics() | {
        "intruders": plan.intruders,
        "edited": len(plan.ranks.get("top", {})),
        "unscored": sum(int((losses.units == 0).sum()) for losses in evaluator.losses[0].values()),
        "truncated": sum(encoded.truncated for encoded in sets.values()),
    }
    if len(modes):
        row = best(modes).rename({"scale": "best_scale"})
        columns = [*COMPARED, "retained_nats", "retention", "task_cost_nats", "best_scale"]
        metrics |= {name: float(row[name]) for name in columns if not pd.isna(row[name])}
        metrics["recommended"] = int(modes["recommended"].sum())
    notes = [*plan.notes, *conclusions(curve, modes, metrics, margin, adapter=pair.tuned.kind == "adapter")]
    tables = {"curve": curve, "modes": modes, "sets": evaluator.table()}
    return Result(metrics=metrics, tables=tables, notes=(*notes, *set_notes(sets)))


def _check(scales: Sequence[float], margin: float, draws: int) -> None:
    for scale in scales:
        if not 0 <= scale < math.inf:
            raise InputError(f"scales holds {scale}; 0 removes, 1 changes nothing, above 1 amplifies")
    if not any(scale < 1 for scale in scales):
        raise InputError("scales holds no strength below 1, so nothing would be damped")
    if not 0 <= margin < math.inf:
        raise InputError(f"margin is {margin}; it is in nats, at least 0")
    if draws < 100:
        raise InputError(f"draws is {draws}; at least 100 for a 95 % interval")


@dataclass(frozen=True)
class DampingPlan:
    """The edits of every mode: singular triples of the matrices with intruders, decomposed once."""

    pair: CheckpointPair
    blender: Blender
    ranks: Mapping[Mode, Mapping[str, Sequence[int]]]  # of the triples to scale; only modes that have some
    factors: Mapping[str, Mapping[int, tuple[Tensor, ...]]]  # (u, s vᵀ) by matrix and rank
    intruders: int
    notes: tuple[str, ...]
    config_changes: tuple[ConfigChange, ...] = ()  # of the configurations, that give two functions

    @classmethod
    def of(
        cls, pair: CheckpointPair, *, device: str, progress: Progress | None, **search: Any
    ) -> "DampingPlan":
        """Find the intruders of a pair and decompose the matrices that have one."""
        from diagnostics.analyses.intruders.analysis import intruder_dimensions

        search_result = intruder_dimensions(pair, device=device, progress=progress, **search)
        ranks: dict[Mode, Mapping[str, Sequence[int]]] = {}
        notes = list(search_result.notes)
        if search_result.metrics.get("descendant", 1):
            vectors = search_result.tables["vectors"]
            modes = [mode for mode in get_args(Mode) if mode != "update"]
            ranks = {mode: by_matrix for mode in modes if (by_matrix := choose(vectors, mode))}
        if not ranks:
            notes.append(
                f"No intruder dimension among the {search['k']} leading vectors of any matrix: modes top, "
                "all and neighbour have nothing to scale. Only the control is measured."
            )
        elif "neighbour" not in ranks:
            notes.append(
                "Every leading vector of the flagged matrices is an intruder: there is no neighbour."
            )
        if ranks and ranks["top"] == ranks["all"]:
            notes.append("No matrix has more than one intruder: modes top and all are the same.")
        changes = function_changes(pair.base, pair.tuned)
        if changes:
            notes += apart_notes(pair)
            notes.append("No scaled update lies between two functions: the modes are without a control.")
        elif pair.unmatched:
            first = pair.unmatched[0]
            notes.append(
                f"{len(pair.unmatched)} tensors differ in more than their values, such as {first.tensor} "
                f"({first.reason}): strength 0 of the whole update is base except for them."
            )
        needed = defaultdict[str, set[int]](set)
        for name, of_matrix in chain.from_iterable(by_matrix.items() for by_matrix in ranks.values()):
            needed[name].update(of_matrix)
        calls = (partial(_factors, pair, name, sorted(needed[name]), device) for name in needed)
        factors = dict(zip(needed, jobs.run_jobs(calls, device=device), strict=True))
        intruders = int(search_result.metrics.get("intruders", 0))
        return cls(pair, Blender(pair), ranks, factors, intruders, tuple(notes), changes)

    @property
    def own_base(self) -> bool:
        """Whether strength 0 of the whole update, in a model of tuned's, is not base."""
        rounded = self.pair.base.dtype != self.pair.tuned.dtype and not self.pair.unmatched
        return bool(self.config_changes) or (rounded and kind_of(self.pair.base) == kind_of(self.pair.tuned))

    def edits(self, mode: Mode, scale: float) -> list[Edit]:
        """The edits of a mode other than `update`."""
        edits = []
        for name, ranks in self.ranks[mode].items():
            left, right = zip(*(self.factors[name][rank] for rank in ranks), strict=True)
            matrix, scaled = self.pair.counterpart(name), (scale - 1) * torch.stack(right)
            edits.append(Edit(matrix, torch.stack(left, dim=1), scaled))
        return edits

    def changes(self, mode: Mode, scale: float) -> tuple[Iterable[str], Callable[[str, Tensor], Tensor]]:
        """The stored tensors of tuned that a mode changes, and the change, as `mitigate` writes them."""
        if scale == 1:
            return (), lambda name, stored: stored
        if mode == "update":
            return self.pair.tuned.headers, lambda name, stored: self.blender.between(name, stored, scale)[0]
        tensors = by_tensor(self.edits(mode, scale))
        return tensors, lambda name, stored: applied(self.pair.tuned, name, stored, tensors[name])


def _factors(pair: CheckpointPair, name: str, ranks: list[int], device: str) -> dict[int, tuple[Tensor, ...]]:
    U, rows = (part.cpu() for part in triples(pair.read(name)[1].to(device), ranks))
    return dict(zip(ranks, zip(U.mT, rows, strict=True), strict=True))


class DampingEvaluator:
    """Losses of every row at every point (mode and strength) that `measure` was called with."""

    def __init__(
        self, plan: DampingPlan, editable: Editable, sets: Mapping[SetKey, EncodedTask],
        progress: Progress | None,
    ):  # fmt: skip
        self.plan, self.editable, self.sets, self.progress = plan, editable, sets, progress
        self.points: list[tuple[Mode, float]] = []
        self.losses: list[dict[SetKey, Losses]] = []
        self._by_weights: dict[Any, dict[SetKey, Losses]] = {}

    def measure(self, points: Sequence[tuple[Mode, float]]) -> None:
        """Measure points; one with the weights of an earlier point takes its losses."""
        new = {self._key(*point): point for point in points if self._key(*point) not in self._by_weights}
        calls = (partial(DampingEvaluator.at, point=point) for point in new.values())
        results = workers.run_calls(self._on_workers, self, calls)
        for mode, scale in points:
            key = self._key(mode, scale)
            if key not in self._by_weights:
                self._by_weights[key] = next(results)
            self.points.append((mode, scale))
            self.losses.append(self._by_weights[key])
            if self.progress:
                total = max(len(self.points), len(SCALES) * (1 + len(self.plan.ranks)))
                self.progress(len(self.points), total, f"{mode} at {scale:g}")

    def at(self, point: tuple[Mode, float]) -> dict[SetKey, Losses]:
        """The losses of every set at one point."""
        if point == ("update", 0.0) and self.plan.own_base:
            return self._at_base()
        with self.editable.holding(*self.plan.changes(*point)) as model:
            return {key: encoded.measure(model) for key, encoded in self.sets.items()}

    def _at_base(self) -> dict[SetKey, Losses]:
        """The losses of base's own model."""
        loading = {name: getattr(self.editable.loading, name) for name in MODEL_OPTIONS}
        base = Editable(self.plan.pair.base, **loading)
        if base.kind != self.editable.kind:
            differ = differing(self.plan.config_changes)
            raise InputError(
                f"{self.plan.pair.base.ref}: is a {base.kind} model, tuned is {self.editable.kind}, and "
                f"{differ}: base cannot run as what tuned is"
            )
        return {key: encoded.under(base).measure(base.model) for key, encoded in self.sets.items()}

    def _key(self, mode: Mode, scale: float) -> Any:
        ranks = self.plan.ranks.get(mode, {})
        return "tuned" if scale == 1 else (scale, mode == "update", tuple(map(str, ranks.items())))

    @cached_property
    def _on_workers(self) -> "workers.WorkerObject[DampingEvaluator] | None":
        make = partial(_on_worker, plan=self.plan, sets=self.sets)
        return workers.pair_on_workers(self.plan.pair, self.editable.loading, make)

    def rows(self, key: SetKey) -> row_bootstrap.RowLosses:
        """The losses of a set at every point, without rows that have nothing to score."""
        units = self.losses[0][key].units
        scored = units > 0
        if scored.sum() < 2:
            ref = self.sets[key].task.ref
            raise InputError(f"{ref}: {scored.sum()} rows have a token to score; at least 2 are needed")
        nats = np.stack([losses[key].nats[scored] for losses in self.losses])
        return row_bootstrap.RowLosses(nats=nats, units=units[scored])

    def compare(self, *, draws: int, seed: int) -> "ModeComparison":
        """Compare all points with the control."""
        generator = np.random.default_rng(seed)
        roles, counts = {}, {}
        for role in ("task", "keep"):
            sets = [self.rows(key) for key in self.sets if key[0] == role]
            drawn = row_bootstrap.mean_drawn(sets, draws, generator)
            roles[role] = np.concatenate([row_bootstrap.mean_loss(sets)[None], drawn])
            counts[f"rows_{role}"] = sum(rows.units.size for rows in sets)
        accuracy = [
            np.mean([self._accuracy(key, losses) for key in self.sets if key[0] == "task"])
            for losses in self.losses
        ]
        return ModeComparison(
            points=tuple(self.points), accuracy=np.array(accuracy), counts=counts,
            controlled=not self.plan.config_changes, **roles,
        )  # fmt: skip

    def _accuracy(self, key: SetKey, losses: Mapping[SetKey, Losses]) -> float:
        right = losses[key].right
        scored = right[~np.isnan(right)] if self.sets[key].unit == "row" else right[:0]
        return float(scored.mean()) if len(scored) else math.nan

    def table(self) -> "pd.DataFrame":
        """Losses of each file, the table `sets`."""
        import pandas as pd

        return pd.DataFrame(
            {
                "role": role, "set": name, "mode": mode, "scale": scale, "rows": rows.units.size,
                "loss": rows.loss[index], "unit": self.sets[role, name].unit,
                "accuracy": self._accuracy((role, name), self.losses[index]),
            }
            for role, name in self.sets
            for rows in (self.rows((role, name)),)
            for index, (mode, scale) in enumerate(self.points)
        ).sort_values(["role", "set", "mode", "scale"], kind="stable", ignore_index=True)  # fmt: skip


MODEL_OPTIONS = ("device", "dtype", "trust_remote_code")


def _on_worker(
    pair: CheckpointPair, loading: Loading, *, plan: DampingPlan, sets: Mapping[SetKey, EncodedTask]
) -> DampingEvaluator:
    options = {name: getattr(loading, name) for name in MODEL_OPTIONS}
    return DampingEvaluator(plan, Editable(pair.tuned, **options), sets, None)


COMPARED = (*(f"over_control{end}_nats" for end in ("", "_low", "_high")), "control_scale")


@dataclass(frozen=True, kw_only=True)
class ModeComparison:
    """Every point, a mode and its strength, compared with the control."""

    points: tuple[tuple[Mode, float], ...]
    # Losses: the first draw is the rows themselves, the others are bootstrap draws.
    task: Float[np.ndarray, "draws points"]
    keep: Float[np.ndarray, "draws points"]
    accuracy: Float[np.ndarray, " points"]
    counts: Mapping[str, int]
    controlled: bool = True  # whether the points hold the scaled update between base and tuned

    @property
    def base(self) -> int:
        """Index of base."""
        return self.points.index(("update", 0.0))

    @property
    def tuned(self) -> int:
        """Index of tuned."""
        return self.points.index(("update", 1.0))

    def searched(self) -> np.ndarray:
        """True for the candidates."""
        return np.array([mode in REPAIRS and scale < 1 for mode, scale in self.points])

    def advantage(self) -> control.ControlComparison:
        """Keep loss of the control minus that of each point."""
        strengths = np.array([scale if mode == "update" else math.nan for mode, scale in self.points])
        if not self.controlled:
            nothing = np.full(len(strengths), math.nan)
            return control.ControlComparison(
                gains=(UNDEFINED,) * len(strengths), strength=nothing, short=nothing
            )
        return control.advantage(self.task, self.keep, strengths, self.searched())

    def matching(self) -> list[float]:
        """Strengths of the control, not yet measured, with the task loss of the best candidates."""
        advantage = self.advantage()
        measured = [scale for mode, scale in self.points if mode == "update"]
        missing = set()
        for mode in REPAIRS:
            points = [i for i in np.flatnonzero(self.searched()) if self.points[i][0] == mode]
            if points:
                top = max(points, key=lambda i: advantage.gains[i].value)
                strength = round(float(advantage.strength[top]), 3)
                if advantage.gains[top].value > 0 and min(abs(strength - scale) for scale in measured) > NEAR:
                    missing.add(strength)
        return sorted(missing)

    def curve(self, plan: DampingPlan, margin: float) -> "pd.DataFrame":
        """A row for every point, the table `curve`."""
        import pandas as pd

        advantage, task, keep = self.advantage(), self.task[0], self.keep[0]
        forgotten, gained = keep[self.tuned] - keep[self.base], task[self.base] - task[self.tuned]
        value, low, high, _ = np.transpose(advantage.gains)
        table = pd.DataFrame(self.points, columns=["mode", "scale"]).assign(
            matrices=[len(plan.ranks.get(mode, ())) or math.nan for mode, _ in self.points],
            keep_loss=keep, task_loss=task, task_accuracy=self.accuracy,
            retained_nats=keep[self.tuned] - keep,
            retention=(keep[self.tuned] - keep) / forgotten if forgotten > 0 else math.nan,
            task_cost_nats=task - task[self.tuned],
            task_kept=(task[self.base] - task) / gained if gained > 0 else math.nan,
            over_control_nats=value, over_control_low_nats=low, over_control_high_nats=high,
            control_scale=advantage.strength, control_short_nats=advantage.short,
            recommended=self.searched() & (low > margin),
        )  # fmt: skip
        table.loc[table["mode"] == "update", [*COMPARED, "control_short_nats"]] = math.nan
        order = ("update", "top", "all", "neighbour").index
        return table.sort_values(
            ["mode", "scale"], key=lambda c: c.map(order) if c.name == "mode" else c, ignore_index=True
        )

    def metrics(self) -> dict[str, float | int]:
        """The metrics of base and tuned."""
        lost = self.keep[:, self.tuned] - self.keep[:, self.base]
        low, high = np.quantile(lost[1:], [0.025, 0.975])
        values = {
            "forgotten_nats": lost[0], "forgotten_low_nats": low, "forgotten_high_nats": high,
            "task_gain_nats": self.task[0, self.base] - self.task[0, self.tuned],
        }  # fmt: skip
        for side, index in (("base", self.base), ("tuned", self.tuned)):
            values[f"keep_loss_{side}"], values[f"task_loss_{side}"] = (
                self.keep[0, index],
                self.task[0, index],
            )
            values[f"task_accuracy_{side}"] = self.accuracy[index]
        finite = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        return {**finite, **self.counts}


def candidates(curve: "pd.DataFrame", mode: str) -> "pd.DataFrame":
    """The points of a mode with a strength below 1."""
    return curve[(curve["mode"] == mode) & (curve["scale"] < 1)]


def best(modes: "pd.DataFrame") -> "pd.Series[Any]":
    """The repair with the highest lower bound over the control."""
    return modes[modes["mode"].isin(REPAIRS)].nlargest(1, "over_control_low_nats").iloc[0]


def conclusions(
    curve: "pd.DataFrame", modes: "pd.DataFrame", metrics: Mapping[str, float | int], margin: float, *,
    adapter: bool,
) -> list[str]:  # fmt: skip
    """Notes on forgetting and on which mode to take."""
    notes = []
    if metrics["forgotten_high_nats"] <= 0:
        notes.append("Tuning forgot nothing on the keep rows: there is nothing to repair.")
    elif metrics["forgotten_low_nats"] <= 0:
        notes.append("Forgetting on the keep rows is not significant.")
    if metrics["task_gain_nats"] <= 0:
        notes.append("Tuned is no better than base on the task rows; are these rows of what was trained?")
    for row in modes[modes["mode"].isin(REPAIRS)].to_dict("records"):
        mode, scale, short = row["mode"], f"{row['scale']:g}", row["control_short_nats"]
        effect = f"it lowers the keep loss by {row['retained_nats']:.3g} nats and changes the task loss by "
        effect += f"{row['task_cost_nats']:+.3g}"
        scaled = f"the whole update scaled by {row['control_scale']:.3g}, which is "
        scaled += f"best on the task but {short:.3g} nats short of it" if short > 0 else "as good on the task"
        gain = f"{row['over_control_nats']:+.3g} nats (95 % interval {row['over_control_low_nats']:+.3g} to "
        gain += f"{row['over_control_high_nats']:+.3g})"
        if row["recommended"]:
            full = " --full" if adapter else ""
            notes.append(
                f"Mode {mode} at {scale} is recommended: {effect}, and keeps {gain} more than {scaled}. "
                f"`tunescope mitigate BASE TUNED --out DIR --mode {mode} --scale {scale}{full}` writes it."
            )
            continue
        reason, points = "it may keep no more than the control", candidates(curve, mode)
        if points["over_control_high_nats"].max() <= margin:
            matches = "matches it" if (points["control_short_nats"] == 0).all() else "keeps as much"
            reason = f"the control {matches} at every strength"
        notes.append(
            f"Mode {mode} is not recommended: {reason}. At its best strength, {scale}, {effect}; it keeps "
            f"{gain} more than {scaled}."
        )
    return notes
