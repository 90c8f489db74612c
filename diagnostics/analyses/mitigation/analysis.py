"""Mitigation judged: does damping intruders keep more than scaling the whole update does?

Every mode of `mitigate` is applied in memory at every strength, and what must survive is measured against the
task. Scaling the whole update is the control that the paper lacks and its authors said gives similar curves:
a mode is recommended only where it surely keeps more than that at the same task loss.
Source: Shuttleworth et al., arXiv:2410.21228 v3, whose two grids of strengths these are, and its public
review.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.intruders.damping import Mode, applied, by_tensor, choose, triples
from diagnostics.analyses.mitigation import control
from diagnostics.core.analysis import Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.evaluation.row_losses import EncodedTask, Losses, encoded
from diagnostics.execution import jobs, workers
from diagnostics.numerics import row_bootstrap
from probes import CheckpointPair
from probes.checkpoints.adapter_refit import Edit
from probes.checkpoints.blend import Blender
from probes.errors import InputError
from probes.files.layout import Part
from probes.models.editable import Editable
from probes.models.loading import Loading

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Progress = Callable[[int, int, str], None]
# The grids of the paper's tables and of its curves.
SCALES = (0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0, 1.5, 2.0)
# What is offered as a repair; the other two are there to be compared with.
REPAIRS = ("top", "all")
# A control strength this near one that was measured is not measured again.
NEAR = 5e-3

METRICS = {
    "recommended": "modes that surely keep more than scaling the whole update does at the same task loss",
    "over_control_nats": "what the best mode keeps beyond that control: nats of keep loss, above 0 is better",
    "over_control_low_nats": "lower end of its 95 % interval, which allows for the search over strengths",
    "over_control_high_nats": "upper end",
    "best_scale": "strength of that mode: 0 removes, 1 changes nothing",
    "control_scale": "strength of the whole update at which it is as good on the task",
    "retained_nats": "keep loss that the mode takes off tuned's",
    "retention": "the same as a share of what tuned had forgotten",
    "task_cost_nats": "task loss that it adds to tuned's",
    "forgotten_nats": "keep loss of tuned minus that of base; above 0 tuning made the keep rows worse",
    "forgotten_low_nats": "lower end of its paired 95 % interval",
    "forgotten_high_nats": "upper end",
    "task_gain_nats": "task loss that tuning took off base's",
    "keep_loss_base": "loss on the keep rows, nats per token; per row where rows have choices or labels",
    "keep_loss_tuned": "the same of tuned",
    "task_loss_base": "loss on the task rows, in the same unit",
    "task_loss_tuned": "the same of tuned",
    "task_accuracy_base": "share of task rows whose right choice or label is the likeliest",
    "task_accuracy_tuned": "the same of tuned",
    "intruders": "intruder dimensions found",
    "edited": "matrices that have one; 0: there is nothing to damp, and only the control is drawn",
    "rows_task": "task rows scored",
    "rows_keep": "keep rows scored",
    "unscored": "rows with nothing to score",
    "truncated": "rows cut because they are longer than the model takes",
}


def summary(result: Result) -> str:
    """Which mode, if any, is worth more than scaling the whole update."""
    m = result.metrics
    text = f"tuning cost {m['forgotten_nats']:+.3g} nats on the keep rows for {m['task_gain_nats']:+.3g} "
    text += "won on the task; "
    if not m["edited"]:
        return f"{text}no intruder to damp"
    row = best(result.tables["modes"])
    gain = f"({row['over_control_nats']:+.3g}, {row['over_control_low_nats']:.3g} to "
    gain += f"{row['over_control_high_nats']:.3g})"
    if m["recommended"]:
        return f"{text}`{row['mode']}` at {row['scale']:g} keeps more than scaling the whole update {gain}"
    return f"{text}no mode surely keeps more than scaling the whole update: at best `{row['mode']}` {gain}"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.mitigation import figures

    return figures.draw(result)


@analysis(
    "mitigation",
    question="Does damping intruder dimensions keep more than scaling the whole update does?",
    reading=(
        "Each line starts at tuned, strength 1, and trades task for retention; the whole update, scaled, "
        "ends at base. Only what lies above that line is gained by knowing the intruders: on or under it, "
        "scaling the update does as well. The neighbouring vector shows what damping any leading direction "
        "does. Intervals are of the difference at the same task loss, on the same rows, for all strengths at "
        "once; one that reaches the margin recommends nothing."
    ),
    paper="arXiv:2410.21228",
    cost=(
        "a forward pass over task and keep rows for every mode and strength, about 43 by default; one SVD of "
        "each matrix with an intruder; one copy of the model in memory"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
)
def judged_mitigation(
    pair: CheckpointPair,
    task: Any,
    keep: Any,
    *,
    scales: tuple[float, ...] = SCALES,
    k: int = 10,
    epsilon: float = 0.5,
    parts: tuple[Part, ...] = ("block",),
    margin: float = 0.01,
    draws: int = 1000,
    max_length: int | None = None,
    chat_template: bool = False,
    batch_tokens: int = 16384,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Measure retention against task score for every mode of `mitigate` and for both of its controls.

    Weights are those that `mitigate` writes, in float64 and rounded once; an adapter is its merged weights.
    Several files of a role count alike. Only strengths below 1 are candidates.

    Args:
        pair: base and tuned.
        task: rows of what was trained, best such as tuning never saw: a task, a file, texts, or several.
        keep: rows of what must survive, in the same forms.
        scales: strengths; 0 and 1 of the whole update, base and tuned, are always measured.
        k, epsilon, parts: what counts as an intruder, and where, as in `intruder_dimensions`.
        margin: nats that a mode must surely keep beyond the control to be recommended (ours: the most by
            which damping the neighbouring vector lowered the loss in our runs).
        draws: of the rows, for the intervals (ours).
        max_length: most tokens of a row; None: what the model takes.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a batch; changes no result.
        trust_remote_code: run code that a repository brings.
        device: where the model runs and matrices are decomposed.
        dtype: of the model; None as stored.
        seed: of the draws.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables: `curve` (mode, scale, keep_loss, task_loss, task_accuracy, retained_nats, retention,
        over_control_nats …), `modes` (the best strength of each mode), `sets` (each file by itself).

    Raises:
        InputError: a parameter out of range, rows or a model that cannot be scored, likelihoods that are not
            finite.
    """
    import pandas as pd

    _check(scales, margin, draws)
    given = {
        role: {name: one.at_least(2, "judging a mitigation") for name, one in tasks(source, role).items()}
        for role, source in (("task", task), ("keep", keep))
    }
    editable = Editable(pair.tuned, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    sets = {
        (role, name): encoded(
            editable, one, max_length=max_length, chat_template=chat_template, batch_tokens=batch_tokens
        )
        for role, named in given.items()
        for name, one in named.items()
    }
    # Only now: the search may take long, and rows may be refused.
    bench = DampingPlan.of(pair, k=k, epsilon=epsilon, parts=parts, device=device, progress=progress)
    measured = DampingEvaluator(bench, editable, sets, progress)
    measured.take([("update", scale) for scale in sorted({0.0, 1.0, *scales})])
    for mode in bench.chosen:
        measured.take([(mode, scale) for scale in sorted(set(scales))])
    judged = measured.judged(draws=draws, seed=seed)
    extra = judged.matching()
    if extra:  # where it is decided, the control is measured and not interpolated
        measured.take([("update", scale) for scale in extra])
        judged = measured.judged(draws=draws, seed=seed)
    curve = judged.curve(bench, margin)
    modes = pd.DataFrame(
        [candidates(curve, mode).nlargest(1, "over_control_low_nats").iloc[0] for mode in bench.chosen],
        columns=curve.columns,
    ).reset_index(drop=True)
    metrics = judged.metrics()
    metrics |= {
        "intruders": bench.intruders,
        "edited": len(bench.chosen.get("top", {})),
        "unscored": measured.unscored,
        "truncated": sum(each.truncated for each in sets.values()),
    }
    if len(modes):
        row = best(modes)
        metrics["recommended"] = int(modes["recommended"].sum())
        told = [*(f"over_control{end}_nats" for end in ("", "_low", "_high")), "control_scale"]
        told += ["retained_nats", "retention", "task_cost_nats"]
        metrics |= {name: float(row[name]) for name in told if not pd.isna(row[name])}
        metrics["best_scale"] = float(row["scale"])
    notes = [*bench.notes, *judgement(curve, modes, metrics, margin, adapter=pair.tuned.kind == "adapter")]
    notes += dict.fromkeys(note for each in sets.values() for note in each.notes)
    tables = {"curve": curve, "modes": modes, "sets": measured.table()}
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


def _check(scales: Sequence[float], margin: float, draws: int) -> None:
    for scale in scales:
        if not 0 <= scale < math.inf:
            raise InputError(f"scales holds {scale}; 0 removes, 1 changes nothing, above 1 amplifies")
    if not any(scale < 1 for scale in scales):
        raise InputError("scales holds no strength below 1, so that nothing would be damped")
    if not 0 <= margin < math.inf:
        raise InputError(f"margin is {margin}; it is nats, from 0")
    if draws < 100:
        raise InputError(f"draws is {draws}; at least 100 for a 95 % interval")


@dataclass(frozen=True, kw_only=True)
class DampingPlan:
    """What can be done to a tuned model: the triples of its flagged matrices, taken once for all modes.

    Attributes:
        chosen: ranks by matrix for every mode that has any.
        factors: by matrix and rank the triple as (u, s vᵀ).
    """

    pair: CheckpointPair
    blender: Blender
    chosen: Mapping[Mode, Mapping[str, Sequence[int]]]
    factors: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]]
    intruders: int
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, pair: CheckpointPair, *, device: str, progress: Progress | None, **search: Any
    ) -> "DampingPlan":
        """Find the intruders of a pair and decompose the matrices that have one."""
        from diagnostics.analyses.intruders.analysis import intruder_dimensions

        found = intruder_dimensions(pair, device=device, progress=progress, **search)
        chosen: dict[Mode, Mapping[str, Sequence[int]]] = {}
        notes = list(found.notes)
        if found.metrics.get("descendant", 1):
            every = {
                mode: choose(found.tables["vectors"], mode) for mode in get_args(Mode) if mode != "update"
            }
            chosen = {mode: ranks for mode, ranks in every.items() if ranks}
        if not chosen:
            notes.append(
                f"No intruder dimension among the {search['k']} leading vectors of any matrix: modes top, "
                "all and neighbour have nothing to scale, and only the control is drawn."
            )
        elif "neighbour" not in chosen:
            notes.append("No flagged matrix has a leading vector that is no intruder: there is no neighbour.")
        if chosen and chosen["top"] == chosen["all"]:
            notes.append("No matrix has more than one intruder: modes top and all are the same here.")
        if pair.unmatched:
            one = pair.unmatched[0]
            notes.append(
                f"{len(pair.unmatched)} tensors differ in more than their values, such as {one.tensor} "
                f"({one.reason}): strength 0 of the whole update is base but for these."
            )
        wanted: dict[str, set[int]] = {}
        for by_matrix in chosen.values():
            for name, ranks in by_matrix.items():
                wanted.setdefault(name, set()).update(ranks)
        calls = (partial(_factors, pair, name, sorted(ranks), device) for name, ranks in wanted.items())
        factors = dict(zip(wanted, jobs.run_jobs(calls, device=device), strict=True))
        intruders = int(found.metrics.get("intruders", 0))
        return cls(
            pair=pair, blender=Blender(pair), chosen=chosen, factors=factors, intruders=intruders,
            notes=tuple(notes),
        )  # fmt: skip

    def edits(self, mode: Mode, scale: float) -> list[Edit]:
        """The edits of a mode other than `update`."""
        made = []
        for name, ranks in self.chosen[mode].items():
            left, right = zip(*(self.factors[name][rank] for rank in ranks), strict=True)
            edit = Edit(
                self.pair.counterpart(name), torch.stack(left, dim=1), (scale - 1) * torch.stack(right)
            )
            made.append(edit)
        return made

    def changes(self, mode: Mode, scale: float) -> tuple[Iterable[str], Callable[[str, Tensor], Tensor]]:
        """Which stored tensors of tuned a mode changes, and how: as `mitigate` writes them."""
        if scale == 1:
            return (), lambda name, stored: stored
        if mode == "update":
            return self.pair.tuned.headers, lambda name, stored: self.blender.between(name, stored, scale)[0]
        tensors = by_tensor(self.edits(mode, scale))
        return tensors, lambda name, stored: applied(self.pair.tuned, name, stored, tensors[name])


def _factors(
    pair: CheckpointPair, name: str, ranks: list[int], device: str
) -> dict[int, tuple[Tensor, Tensor]]:
    U, rows = (part.cpu() for part in triples(pair.read(name)[1].to(device), ranks))
    return {rank: (U[:, place], rows[place]) for place, rank in enumerate(ranks)}


class DampingEvaluator:
    """Losses of every row at every point, measured as they are asked for."""

    def __init__(
        self,
        bench: DampingPlan,
        editable: Editable,
        sets: Mapping[tuple[str, str], EncodedTask],
        progress: Progress | None,
    ):
        self.bench, self.editable, self.sets, self.progress = bench, editable, sets, progress
        self.points: list[tuple[Mode, float]] = []
        self._losses: list[dict[tuple[str, str], Losses]] = []
        self._known: dict[Any, dict[tuple[str, str], Losses]] = {}

    def take(self, points: Sequence[tuple[Mode, float]]) -> None:
        """Measure these points; what has the weights of one measured before has its losses."""
        new = {self._key(*point): point for point in points if self._key(*point) not in self._known}
        made = workers.run_calls(
            self._there, self, (partial(DampingEvaluator.at, point=point) for point in new.values())
        )
        for mode, scale in points:
            key = self._key(mode, scale)
            if key not in self._known:
                self._known[key] = next(made)
            self.points.append((mode, scale))
            self._losses.append(self._known[key])
            if self.progress:
                total = max(len(self.points), len(SCALES) * (1 + len(self.bench.chosen)))
                self.progress(len(self.points), total, f"{mode} at {scale:g}")

    def at(self, point: tuple[Mode, float]) -> dict[tuple[str, str], Losses]:
        """The losses of every set at one point."""
        names, change = self.bench.changes(*point)
        with self.editable.holding(names, change) as model:
            return {which: each.measure(model) for which, each in self.sets.items()}

    def _key(self, mode: Mode, scale: float) -> Any:
        chosen = self.bench.chosen.get(mode, {})
        return "tuned" if scale == 1 else (scale, mode == "update", tuple(map(str, chosen.items())))

    @cached_property
    def _there(self) -> "workers.WorkerObject[DampingEvaluator] | None":
        make = partial(_measured, bench=self.bench, sets=self.sets)
        return workers.pair_on_workers(self.bench.pair, self.editable.loading, make)

    @property
    def unscored(self) -> int:
        """Rows with nothing to score."""
        return sum(int((each.units == 0).sum()) for each in self._losses[0].values())

    def rows(self, which: tuple[str, str]) -> row_bootstrap.RowLosses:
        """The losses of a set at every point, rows with nothing to score left out.

        Raises:
            InputError: fewer than 2 rows are left.
        """
        units = self._losses[0][which].units
        scored = units > 0
        if scored.sum() < 2:
            ref = self.sets[which].task.ref
            raise InputError(f"{ref}: {scored.sum()} rows have a token to score; at least 2 are needed")
        return row_bootstrap.RowLosses(
            nats=np.stack([losses[which].nats[scored] for losses in self._losses]), units=units[scored]
        )

    def judged(self, *, draws: int, seed: int) -> "ControlComparison":
        """Compare all points with the control."""
        generator = np.random.default_rng(seed)
        roles = {}
        for role in ("task", "keep"):
            sets = [self.rows(which) for which in self.sets if which[0] == role]
            drawn = row_bootstrap.mean_drawn(sets, draws, generator)
            roles[role] = np.concatenate([row_bootstrap.mean_loss(sets)[None], drawn])
        right = [
            np.mean([self._accuracy(which, losses) for which in self.sets if which[0] == "task"])
            for losses in self._losses
        ]
        counts = {
            f"rows_{role}": sum(self.rows(which).units.size for which in self.sets if which[0] == role)
            for role in roles
        }
        return ControlComparison(points=tuple(self.points), accuracy=np.array(right), counts=counts, **roles)

    def _accuracy(self, which: tuple[str, str], losses: Mapping[tuple[str, str], Losses]) -> float:
        right = losses[which].right
        known = right[~np.isnan(right)] if self.sets[which].unit == "row" else right[:0]
        return float(known.mean()) if len(known) else math.nan

    def table(self) -> "pd.DataFrame":
        """Each file by itself."""
        import pandas as pd

        return pd.DataFrame(
            {
                "role": role, "set": name, "mode": mode, "scale": scale, "rows": rows.units.size,
                "loss": rows.loss[place], "unit": self.sets[role, name].unit,
                "accuracy": self._accuracy((role, name), self._losses[place]),
            }
            for role, name in self.sets
            for rows in (self.rows((role, name)),)
            for place, (mode, scale) in enumerate(self.points)
        ).sort_values(["role", "set", "mode", "scale"], kind="stable", ignore_index=True)  # fmt: skip


def _measured(
    pair: CheckpointPair, loading: Loading, *, bench: DampingPlan, sets: Mapping[tuple[str, str], EncodedTask]
) -> DampingEvaluator:
    """On a worker: the same to measure with."""
    editable = Editable(
        pair.tuned, device=loading.device, dtype=loading.dtype, trust_remote_code=loading.trust_remote_code
    )
    return DampingEvaluator(bench, editable, sets, None)


@dataclass(frozen=True, kw_only=True)
class ControlComparison:
    """Every point against the control.

    Attributes:
        points: mode and strength of each.
        task, keep: losses; the first draw is all rows as they are.
        accuracy: on the task; NaN for text.
        counts: rows scored, by metric.
    """

    points: tuple[tuple[Mode, float], ...]
    task: Float[np.ndarray, "draws points"]
    keep: Float[np.ndarray, "draws points"]
    accuracy: Float[np.ndarray, " points"]
    counts: Mapping[str, int]

    @property
    def base(self) -> int:
        """Which point is base."""
        return self.points.index(("update", 0.0))

    @property
    def tuned(self) -> int:
        """Which point is tuned."""
        return self.points.index(("update", 1.0))

    def searched(self) -> np.ndarray:
        """Which points are candidates."""
        return np.array([mode in REPAIRS and scale < 1 for mode, scale in self.points])

    def advantage(self) -> control.ControlComparison:
        """What each keeps beyond the control."""
        strengths = np.array([scale if mode == "update" else math.nan for mode, scale in self.points])
        return control.advantage(self.task, self.keep, strengths, self.searched())

    def matching(self) -> list[float]:
        """Strengths of the control, not yet measured, that are as good on the task as the best candidates."""
        found, known = self.advantage(), [scale for mode, scale in self.points if mode == "update"]
        wanted = set()
        for mode in REPAIRS:
            own = [i for i, flag in enumerate(self.searched()) if flag and self.points[i][0] == mode]
            if own:
                place = max(own, key=lambda i: found.gains[i].value)
                strength = round(float(found.strength[place]), 3)
                if found.gains[place].value > 0 and min(abs(strength - each) for each in known) > NEAR:
                    wanted.add(strength)
        return sorted(wanted)

    def curve(self, bench: DampingPlan, margin: float) -> "pd.DataFrame":
        """A row for every point."""
        import pandas as pd

        found, task, keep = self.advantage(), self.task[0], self.keep[0]
        forgotten, gained = keep[self.tuned] - keep[self.base], task[self.base] - task[self.tuned]
        table = pd.DataFrame(self.points, columns=["mode", "scale"]).assign(
            matrices=[len(bench.chosen.get(mode, ())) or math.nan for mode, _ in self.points],
            keep_loss=keep,
            task_loss=task,
            task_accuracy=self.accuracy,
            retained_nats=keep[self.tuned] - keep,
            retention=(keep[self.tuned] - keep) / forgotten if forgotten > 0 else math.nan,
            task_cost_nats=task - task[self.tuned],
            task_kept=(task[self.base] - task) / gained if gained > 0 else math.nan,
            over_control_nats=[gain.value for gain in found.gains],
            over_control_low_nats=[gain.low for gain in found.gains],
            over_control_high_nats=[gain.high for gain in found.gains],
            control_scale=found.strength,
            control_short_nats=found.short,
            recommended=self.searched() & [gain.low > margin for gain in found.gains],
        )
        compared = [*(f"over_control{end}_nats" for end in ("", "_low", "_high")), "control_scale"]
        compared.append("control_short_nats")
        table.loc[[mode == "update" for mode, _ in self.points], compared] = math.nan
        order = {mode: place for place, mode in enumerate(("update", "top", "all", "neighbour"))}
        return table.sort_values(
            ["mode", "scale"], key=lambda c: c.map(order) if c.name == "mode" else c, ignore_index=True
        )

    def metrics(self) -> dict[str, float | int]:
        """What base and tuned make of the rows."""
        lost = self.keep[:, self.tuned] - self.keep[:, self.base]
        low, high = np.quantile(lost[1:], [0.025, 0.975])
        values = {
            "forgotten_nats": lost[0],
            "forgotten_low_nats": low,
            "forgotten_high_nats": high,
            "task_gain_nats": self.task[0, self.base] - self.task[0, self.tuned],
        }
        for side in ("base", "tuned"):
            place = getattr(self, side)
            values |= {
                f"keep_loss_{side}": self.keep[0, place],
                f"task_loss_{side}": self.task[0, place],
                f"task_accuracy_{side}": self.accuracy[place],
            }
        known = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        return known | dict(self.counts)


def candidates(curve: "pd.DataFrame", mode: str) -> "pd.DataFrame":
    """The points of a mode that damp."""
    return curve[(curve["mode"] == mode) & (curve["scale"] < 1)]


def best(modes: "pd.DataFrame") -> "pd.Series[Any]":
    """The repair that most surely keeps more than the control."""
    return modes[modes["mode"].isin(REPAIRS)].nlargest(1, "over_control_low_nats").iloc[0]


def judgement(
    curve: "pd.DataFrame",
    modes: "pd.DataFrame",
    metrics: Mapping[str, float | int],
    margin: float,
    *,
    adapter: bool,
) -> list[str]:
    """What follows, in plain words."""
    notes = []
    if metrics["forgotten_high_nats"] <= 0:
        notes.append("Tuning forgot nothing on the keep rows: there is nothing to repair.")
    elif metrics["forgotten_low_nats"] <= 0:
        notes.append("Tuning did not surely forget anything on the keep rows.")
    if metrics["task_gain_nats"] <= 0:
        notes.append("Tuned is no better than base on the task rows; are these rows of what was trained?")
    for row in modes[modes["mode"].isin(REPAIRS)].to_dict("records"):
        mode, scale = row["mode"], f"{row['scale']:g}"
        bought = (
            f"it takes {row['retained_nats']:.3g} nats off the keep loss for {row['task_cost_nats']:+.3g} "
        )
        bought += "on the task loss"
        short = row["control_short_nats"]
        same = f"the whole update scaled by {row['control_scale']:.3g}, which is "
        same += f"best on the task but {short:.3g} nats short of it" if short > 0 else "as good on the task"
        gain = f"{row['over_control_nats']:+.3g} nats (95 % interval {row['over_control_low_nats']:+.3g} to "
        gain += f"{row['over_control_high_nats']:+.3g})"
        if row["recommended"]:
            full = " --full" if adapter else ""
            notes.append(
                f"Mode {mode} at {scale} is recommended: {bought}, and keeps {gain} more than {same}. "
                f"`tunescope mitigate BASE TUNED --out DIR --mode {mode} --scale {scale}{full}` writes it."
            )
            continue
        why = "it may keep no more than the control"
        own = candidates(curve, mode)
        if own["over_control_high_nats"].max() <= margin:
            why = f"the control {'matches it' if (own['control_short_nats'] == 0).all() else 'keeps as much'}"
            why += " at every strength"
        notes.append(
            f"Mode {mode} is not recommended: {why}. At its best, {scale}, {bought}; beyond {same}, "
            f"it keeps {gain}."
        )
    return notes
