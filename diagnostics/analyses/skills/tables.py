"""The tables and metrics of a skill localization."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.cross_task import overlap_rows, recoveries, unions
from diagnostics.analyses.skills.evaluator import GraftEvaluator, Key, layer_lookup
from diagnostics.analyses.skills.measurements import ALPHAS, TaskMeasurements, interpolation_name
from diagnostics.analyses.skills.notes import size_label, verdict
from diagnostics.analyses.skills.size_selection import SizeChoice
from diagnostics.evaluation.answers import Answers, AnswerScores, agreement, calibration, drawn_ece
from diagnostics.numerics.calibration import ece, reliability

if TYPE_CHECKING:
    import pandas as pd

# Overlap beyond this many times chance, or a recovery of another task below this, is interference; ours.
OVERLAP, HARM = 3.0, -0.05
# Share of tuned's calibration error that a graft has to remove: the least published.
CALIBRATION_GAIN = 0.4
INTERPOLATIONS = tuple(map(interpolation_name, ALPHAS))


def budget_rows(measured: TaskMeasurements, total: int) -> list[dict[str, Any]]:
    """A row for every point of a task's curve."""
    scores, tuned = measured.scores, measured.report["tuned"]
    rows = []
    for name, point in measured.points.items():
        metric = scores.shown(name)
        rel = scores.rel(name)
        rows.append(
            {
                "task": measured.task, "share": point["entries"] / total if total else math.nan,
                "metric": metric.value, "method": point["method"], "alpha": point.get("alpha", math.nan),
                "entries": point["entries"], "low": metric.low, "high": metric.high, "rel": rel.value,
                "rel_low": rel.low, "rel_high": rel.high, "recovery": scores.recovery(name),
                "agreement": agreement(measured.report[name], tuned),
                "rel_selection": point.get("kept", math.nan), "alone": point.get("alone", False),
                "chosen": point.get("chosen", False),
            }
        )  # fmt: skip
    return rows


def region_rows(evaluator: GraftEvaluator, choice: SizeChoice) -> list[dict[str, Any]]:
    """Entries and density of the chosen region by layer and component."""
    shapes = {name: evaluator.shapes[name] for name in evaluator.movement.entries}
    matrices = evaluator.host.pair.tuned.matrices
    rows = region.by_component(choice.chosen, shapes, matrices, layer_lookup(shapes))
    return [{"task": choice.search.task, **row} for row in rows]


def densest_rows(evaluator: GraftEvaluator, choice: SizeChoice) -> list[dict[str, Any]]:
    """The matrix rows and columns that hold most of the chosen region."""
    rows = region.densest(choice.chosen, evaluator.shapes, evaluator.host.pair.tuned.matrices)
    return [{"task": choice.search.task, **row} for row in rows]


def calibrated_models(measured: TaskMeasurements) -> dict[str, Answers]:
    """Report answers of the models that calibration compares; empty without choices or labels."""
    if measured.report["tuned"].logs is None:
        return {}
    names = ["base", "tuned", *(["graft"] if measured.choice else []), *INTERPOLATIONS]
    models = {name: measured.report[name] for name in names}
    if not math.isnan(measured.temperature):
        models["tempered"] = measured.report["tuned"].cooled(measured.temperature)
    return models


def calibration_rows(measured: TaskMeasurements, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Calibration of each model on the report rows."""
    return [
        {
            "task": measured.task, "model": name,
            "temperature": measured.temperature if name == "tempered" else math.nan,
            "accuracy": float(answers.right.mean()),
            **calibration(answers, draws=draws, seed=seed)._asdict(),
        }
        for name, answers in calibrated_models(measured).items()
    ]  # fmt: skip


def reliability_rows(measured: TaskMeasurements) -> list[dict[str, Any]]:
    """Stated confidence against accuracy, by bin."""
    return [
        {
            "task": measured.task, "model": name, "bin": index, "rows": int(count),
            "confidence": confidence, "accuracy": accuracy,
        }
        for name, answers in calibrated_models(measured).items()
        for index, (count, confidence, accuracy) in enumerate(
            zip(*reliability(answers.confidence, answers.right), strict=True)
        )
        if count
    ]  # fmt: skip


def set_rows(measured: TaskMeasurements, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Each model on the report rows and on the other sets, with its difference to tuned."""
    rows = []
    sets: dict[Key, Mapping[str, Answers]] = {("task", measured.task): measured.report}
    sets |= measured.other_sets
    names = ["base", "tuned", *(["graft", "complement"] if measured.choice else []), *INTERPOLATIONS]
    for (role, set_name), by_model in sets.items():
        models = {model: by_model[model] for model in names if model in by_model}
        scores = AnswerScores(models, draws=draws, seed=seed, where=set_name)
        for model, answers in models.items():
            metric = scores.shown(model)
            over = scores.difference(model, "tuned")
            rows.append(
                {
                    "task": measured.task, "role": role, "set": set_name, "model": model,
                    "kind": scores.kind, "metric": metric.value, "low": metric.low, "high": metric.high,
                    "over_tuned": over.value, "over_tuned_low": over.low, "over_tuned_high": over.high,
                    "agreement": agreement(answers, models["tuned"]),
                    "ece": math.nan if answers.logs is None else error_of(answers),
                }
            )  # fmt: skip
    return rows


def stability_rows(choice: SizeChoice) -> list[dict[str, Any]]:
    """Jaccard index of the regions that searches with two seeds find."""
    return [
        {"task": choice.search.task, "seed": first, "other": second, "jaccard": jaccard}
        for first, second, jaccard in choice.stability()
    ]


def error_of(answers: Answers) -> float:
    """Expected calibration error of answers."""
    return ece(answers.confidence, answers.right)


@dataclass(frozen=True, kw_only=True)
class CalibrationChange:
    """How far a graft lowers the calibration error, against interpolation.

    Attributes:
        interpolated: the largest share that an interpolation removes, among those that are not surely worse
            than the graft.
    """

    less: float  # share of tuned's error that the graft removes
    less_low: float  # lower end of the 95 % interval of the error removed, in units of the error
    interpolated: float

    @property
    def overconfident(self) -> bool:
        """Whether the graft surely removes error, a large share, and more than interpolation does."""
        return self.less >= CALIBRATION_GAIN and self.less_low > 0 and self.less > self.interpolated


def calibration_change(measured: TaskMeasurements, *, draws: int, seed: int) -> CalibrationChange | None:
    """How much better calibrated the graft is than tuned; None where that is undefined."""
    if measured.choice is None or measured.report["tuned"].logs is None:
        return None
    tuned, graft = (measured.report[name] for name in ("tuned", "graft"))
    tuned_error = error_of(tuned)
    if not tuned_error:
        return None
    drawn = drawn_ece([tuned, graft], draws=draws, seed=seed)
    # A surely worse model is no alternative: base itself is often the best calibrated.
    rivals = [
        measured.report[name]
        for name in INTERPOLATIONS
        if measured.scores.difference(name, "graft").high >= 0
    ]
    return CalibrationChange(
        less=1 - error_of(graft) / tuned_error,
        less_low=float(np.quantile(drawn[:, 0] - drawn[:, 1], 0.025)),
        interpolated=max((1 - error_of(rival) / tuned_error for rival in rivals), default=0.0),
    )


def task_metrics(
    measured: TaskMeasurements,
    total: int,
    change: CalibrationChange | None,
    regions: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """The metrics of one task without the undefined ones.

    Args:
        total: entries that shares are of.
        regions: the rows of `region_rows`.
    """
    scores, choice, report = measured.scores, measured.choice, measured.report
    with_confidence = report["tuned"].logs is not None
    values: dict[str, float] = {
        "base_metric": scores.shown("base").value,
        "tuned_metric": scores.shown("tuned").value,
        "gain": scores.value["tuned"] - scores.value["base"],
        "gain_error": scores.difference("tuned", "base").error,
        "rows_report": len(report["tuned"].losses.units),
    }
    if with_confidence:
        values |= {"ece_tuned": error_of(report["tuned"]), "temperature": measured.temperature}
        if not math.isnan(measured.temperature):
            values["ece_tempered"] = error_of(report["tuned"].cooled(measured.temperature))
    if choice is not None:
        rel = scores.rel("graft")
        values |= {
            "graft_metric": scores.shown("graft").value,
            "share": choice.size / total,
            "region": choice.size,
            "rel": rel.value, "rel_low": rel.low, "rel_high": rel.high,
            "recovery": scores.recovery("graft"),
            "agreement": agreement(report["graft"], report["tuned"]),
            "necessity": 1 - scores.rel("complement").value,
            "movement_rel": measured.mean_rel("movement"),
            "random_rel": measured.mean_rel("random"),
            "half_update_rel": scores.rel(interpolation_name(0.5)).value,
            "whole_rel": scores.rel("ones").value,
            "bias_or_norm": sum(row["share"] for row in regions if row["component"] in ("bias", "norm")),
        }  # fmt: skip
        if choice.passed:
            values["skill_size"] = choice.size / total
        if choice.other_seeds:
            values["stability"] = float(np.mean([jaccard for *_, jaccard in choice.stability()]))
        if with_confidence:
            values["ece_graft"] = error_of(report["graft"])
            values["ece_half_update"] = error_of(report[interpolation_name(0.5)])
        if change is not None:
            values["ece_less"] = change.less
    return {name: value for name, value in values.items() if not math.isnan(value)}


@dataclass(frozen=True, kw_only=True)
class SkillTables:
    """Builds the tables and metrics from the measurements of all tasks."""

    measurements: Mapping[str, TaskMeasurements]
    evaluator: GraftEvaluator
    draws: int
    seed: int

    def build(self) -> "tuple[dict[str, pd.DataFrame], dict[str, float | int]]":
        """All tables, and all metrics: those of the first task, and counts over all tasks."""
        drawing = {"draws": self.draws, "seed": self.seed}
        movement = self.evaluator.movement
        rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        choices = {task: m.choice for task, m in self.measurements.items() if m.choice is not None}
        changes = []
        for task, measured in self.measurements.items():
            change = calibration_change(measured, **drawing)
            changes.append(change)
            lies_in = region_rows(self.evaluator, choices[task]) if task in choices else []
            metrics = task_metrics(measured, movement.total, change, lies_in)
            rows["tasks"].append(
                {"task": task, **metrics, "verdict": verdict(measured, movement.total, metrics)}
            )
            rows["budget"] += budget_rows(measured, movement.total)
            rows["sets"] += set_rows(measured, **drawing)
            rows["calibration"] += calibration_rows(measured, **drawing)
            rows["reliability"] += reliability_rows(measured)
            rows["region"] += lies_in
            if task in choices:
                rows["densest"] += densest_rows(self.evaluator, choices[task])
                rows["stability"] += stability_rows(choices[task])
        first = rows["tasks"][0]
        overall: dict[str, float | int] = {
            name: value for name, value in first.items() if name not in ("task", "verdict")
        }
        if len(choices) > 1:
            regions = {task: choice.chosen for task, choice in choices.items()}
            rows["overlap"] += overlap_rows(regions, movement.entries)
            crossed, matrix = recoveries(self.measurements, list(regions), **drawing)
            rows["rel"] += crossed
            rows["unions"] += unions(self.measurements, regions, self.evaluator, **drawing)
            overall["interfering"] = interfering_pairs(rows["overlap"], crossed)
            purity = float(region.purity(matrix)[0])
            if first["task"] in choices and not math.isnan(purity):
                overall["purity"] = purity
        overall |= self._counts(list(choices.values()), changes, rows["sets"])
        return {name: to_frame(table) for name, table in rows.items() if table}, overall

    def _counts(
        self,
        choices: Sequence[SizeChoice],
        changes: Sequence[CalibrationChange | None],
        sets: Sequence[Mapping[str, Any]],
    ) -> dict[str, float | int]:
        """Counts over all tasks, and the metrics of the pair."""
        movement = self.evaluator.movement
        counts: dict[str, float | int] = {
            "tasks": len(self.measurements), "entries": movement.total, "moved": movement.total_moved,
            "localised": sum(choice.passed for choice in choices),
            "diffuse": sum(
                not choice.passed or size_label(choice.size / movement.total) == "diffuse"
                for choice in choices
            ),
            "without_gain": len(self.measurements) - len(choices),
            "overconfident": sum(change is not None and change.overconfident for change in changes),
            "harmful_rest": sum(
                row["model"] == "graft" and row["role"] != "keep" and row["over_tuned_low"] > 0
                for row in sets
            ),
        }  # fmt: skip
        if movement.squares:
            leading = movement.largest(math.ceil(movement.total / 100))
            counts["movement_top"] = movement.square(leading) / movement.squares
        return counts


def interfering_pairs(overlaps: Sequence[Mapping[str, Any]], crossed: Sequence[Mapping[str, Any]]) -> int:
    """Number of task pairs with an overlap far beyond chance, or a region that harms the other task."""
    pairs = {
        frozenset((row["task"], row["other"]))
        for row in overlaps
        if row["task"] != row["other"] and row["overlap"] > OVERLAP * row["chance"]
    }
    pairs |= {
        frozenset((row["region"], row["task"]))
        for row in crossed
        if row["region"] != row["task"] and row["rel"] < HARM
    }
    return len(pairs)


def to_frame(rows: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Rows as a table."""
    import pandas as pd

    table = pd.DataFrame(list(rows))
    if "layer" in table:  # NaN outside the blocks
        table["layer"] = table["layer"].astype(float)
    return table
