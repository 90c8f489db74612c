"""The tables and metrics of a skill localization."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.evaluator import GraftEvaluator, Key, layer_lookup
from diagnostics.analyses.skills.measurements import HALF_UPDATE, INTERPOLATIONS, TaskMeasurements
from diagnostics.analyses.skills.notes import size_label, verdict
from diagnostics.analyses.skills.region import Region
from diagnostics.evaluation.answers import Answers, AnswerScores, agreement, calibration, drawn_ece
from diagnostics.numerics.calibration import ece, reliability

Rows = list[dict[str, Any]]
# Overlap beyond this many times chance, or a recovery of another task below this, is interference; ours.
OVERLAP, HARM = 3.0, -0.05
# Share of tuned's calibration error that a graft has to remove: the least published.
CALIBRATION_GAIN = 0.4


def budget_rows(measured: TaskMeasurements, total: int) -> Rows:
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


def calibrated_models(measured: TaskMeasurements) -> dict[str, Answers]:
    """Report answers of the models that calibration compares; empty without choices or labels."""
    if measured.report["tuned"].logs is None:
        return {}
    names = ["base", "tuned", "graft", *INTERPOLATIONS]
    models = {name: measured.report[name] for name in names if name in measured.report}
    if not math.isnan(measured.temperature):
        models["tempered"] = measured.report["tuned"].cooled(measured.temperature)
    return models


def calibration_rows(measured: TaskMeasurements, *, draws: int, seed: int) -> Rows:
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


def reliability_rows(measured: TaskMeasurements) -> Rows:
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


def set_rows(measured: TaskMeasurements, *, draws: int, seed: int) -> Rows:
    """Each model on the report rows and on the other sets, with its difference to tuned."""
    rows = []
    sets: dict[Key, Mapping[str, Answers]] = {("task", measured.task): measured.report}
    sets |= measured.other_sets
    names = ["base", "tuned", "graft", "complement", *INTERPOLATIONS]
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


def error_of(answers: Answers) -> float:
    """Expected calibration error of answers."""
    return ece(answers.confidence, answers.right)


@dataclass(frozen=True, kw_only=True)
class CalibrationChange:
    """How far a graft lowers the calibration error, against interpolations that are not surely worse."""

    less: float  # share of tuned's error that the graft removes
    less_low: float  # lower end of the 95 % interval of the error removed, in units of the error
    interpolated: float  # the largest share that an interpolation removes

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
    rivals = [name for name in INTERPOLATIONS if measured.scores.difference(name, "graft").high >= 0]
    return CalibrationChange(
        less=1 - error_of(graft) / tuned_error,
        less_low=float(np.quantile(drawn[:, 0] - drawn[:, 1], 0.025)),
        interpolated=max((1 - error_of(measured.report[name]) / tuned_error for name in rivals), default=0.0),
    )


def task_metrics(
    measured: TaskMeasurements,
    total: int,
    change: CalibrationChange | None,
    regions: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """The metrics of one task without the undefined ones; `regions` are the rows of `by_component`."""
    scores, choice, report = measured.scores, measured.choice, measured.report
    with_confidence = report["tuned"].logs is not None
    values: dict[str, float] = {
        **{f"{side}_metric": scores.shown(side).value for side in ("base", "tuned")},
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
            "share": choice.size / total, "region": choice.size,
            "rel": rel.value, "rel_low": rel.low, "rel_high": rel.high,
            "recovery": scores.recovery("graft"), "agreement": agreement(report["graft"], report["tuned"]),
            "necessity": 1 - scores.rel("complement").value,
            "movement_rel": measured.mean_rel("movement"), "random_rel": measured.mean_rel("random"),
            "half_update_rel": scores.rel(HALF_UPDATE).value, "whole_rel": scores.rel("ones").value,
            "bias_or_norm": sum(row["share"] for row in regions if row["component"] in ("bias", "norm")),
        }  # fmt: skip
        if choice.passed:
            values["skill_size"] = choice.size / total
        if choice.other_seeds:
            values["stability"] = float(np.mean([jaccard for *_, jaccard in choice.stability()]))
        if with_confidence:
            values["ece_graft"] = error_of(report["graft"])
            values["ece_half_update"] = error_of(report[HALF_UPDATE])
        if change is not None:
            values["ece_less"] = change.less
    return {name: value for name, value in values.items() if not math.isnan(value)}


def tables_and_metrics(
    measurements: Mapping[str, TaskMeasurements], evaluator: GraftEvaluator, *, draws: int, seed: int
) -> tuple[dict[str, pd.DataFrame], dict[str, float | int]]:
    """All tables, and all metrics: those of the first task, and counts over all tasks."""
    drawing = {"draws": draws, "seed": seed}
    movement, matrices = evaluator.movement, evaluator.two_sided.pair.tuned.matrices
    shapes = {name: evaluator.shapes[name] for name in movement.entries}
    rows: defaultdict[str, Rows] = defaultdict(list)
    choices = {task: m.choice for task, m in measurements.items() if m.choice is not None}
    changes = []
    for task, measured in measurements.items():
        changes.append(calibration_change(measured, **drawing))
        choice = measured.choice
        parts = region.by_component(choice.chosen, shapes, matrices, layer_lookup(shapes)) if choice else []
        of_task = task_metrics(measured, movement.total, changes[-1], parts)
        rows["tasks"].append({"task": task, **of_task, "verdict": verdict(measured, movement.total, of_task)})
        rows["budget"] += budget_rows(measured, movement.total)
        rows["sets"] += set_rows(measured, **drawing)
        rows["calibration"] += calibration_rows(measured, **drawing)
        rows["reliability"] += reliability_rows(measured)
        rows["region"] += [{"task": task, **row} for row in parts]
        if choice:
            densest = region.densest(choice.chosen, shapes, matrices)
            rows["densest"] += [{"task": task, **row} for row in densest]
            rows["stability"] += [
                {"task": task, "seed": first, "other": second, "jaccard": jaccard}
                for first, second, jaccard in choice.stability()
            ]
    first_task, *_ = rows["tasks"]
    metrics = {name: value for name, value in first_task.items() if name not in ("task", "verdict")}
    if len(choices) > 1:
        regions = {task: choice.chosen for task, choice in choices.items()}
        rows["overlap"] = overlap_rows(regions, movement.entries)
        rows["rel"], recovered = recoveries(measurements, list(regions), **drawing)
        rows["unions"] = unions(measurements, regions, evaluator, **drawing)
        metrics["interfering"] = interfering_pairs(rows["overlap"], rows["rel"])
        purity = float(region.purity(recovered)[0])
        if first_task["task"] in choices and not math.isnan(purity):
            metrics["purity"] = purity
    sizes = [choice.size / movement.total for choice in choices.values() if choice.passed]
    metrics |= {
        "tasks": len(measurements), "entries": movement.total, "moved": movement.total_moved,
        "localised": len(sizes),
        "diffuse": len(choices) - len(sizes) + sum(size_label(size) == "diffuse" for size in sizes),
        "without_gain": len(measurements) - len(choices),
        "overconfident": sum(change is not None and change.overconfident for change in changes),
        "harmful_rest": sum(
            row["model"] == "graft" and row["role"] != "keep" and row["over_tuned_low"] > 0
            for row in rows["sets"]
        ),
    }  # fmt: skip
    if movement.squares:
        leading = movement.largest(math.ceil(movement.total / 100))
        metrics["movement_top"] = movement.square(leading) / movement.squares
    tables = {name: pd.DataFrame(table) for name, table in rows.items() if table}
    for name in tables.keys() & {"region", "densest"}:
        tables[name]["layer"] = tables[name]["layer"].astype(float)  # NaN outside the blocks
    return tables, metrics


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


def overlap_rows(regions: Mapping[str, Region], entries: Mapping[str, int]) -> Rows:
    """How the regions of two tasks overlap, each way, against chance."""
    total = sum(entries.values())
    return [
        {
            "task": task, "other": other_task, "overlap": region.overlap(first, second),
            "chance": region.chance(first, second, entries), "density": region.size(first) / total,
            "jaccard": region.jaccard(first, second),
        }
        for task, first in regions.items()
        for other_task, second in regions.items()
    ]  # fmt: skip


def recoveries(
    measurements: Mapping[str, TaskMeasurements], tasks: Sequence[str], *, draws: int, seed: int
) -> tuple[Rows, np.ndarray]:
    """The share of each task's gain that each task's region keeps, as rows and as (regions, tasks)."""
    rows, matrix = [], np.full((len(tasks), len(tasks)), math.nan)
    for t, task in enumerate(tasks):
        answers = {side: measurements[task].report[side] for side in ("base", "tuned")}
        for owner in tasks:
            answers[f"of {owner}"] = measurements[owner].on_other_tasks[task]
        scores = AnswerScores(answers, draws=draws, seed=seed, where=task)
        for i, owner in enumerate(tasks):
            rel = scores.rel(f"of {owner}")
            matrix[i, t] = rel.value
            rows.append({"region": owner, "task": task, "rel": rel.value, "low": rel.low, "high": rel.high})
    return rows, matrix


def unions(
    measurements: Mapping[str, TaskMeasurements],
    regions: Mapping[str, Region],
    evaluator: GraftEvaluator,
    *,
    draws: int,
    seed: int,
) -> Rows:
    """How much of every task the union of all regions keeps, and each union with one task left out."""
    tasks = list(regions)
    groups = [tuple(tasks)] if len(tasks) < 3 else [tuple(tasks), *combinations(tasks, len(tasks) - 1)]
    rows = []
    keys = [(task, "report") for task in tasks]
    for group in groups:
        union = region.union([regions[task] for task in group])
        answers = evaluator.graft(union, keys)
        for task in tasks:
            ends = {side: measurements[task].report[side] for side in ("base", "tuned")}
            models = {**ends, "union": answers[task, "report"]}
            scores = AnswerScores(models, draws=draws, seed=seed, where=task)
            rel = scores.rel("union")
            rows.append(
                {
                    "union": " + ".join(group), "entries": region.size(union), "task": task,
                    "member": task in group, "metric": scores.shown("union").value, "rel": rel.value,
                    "low": rel.low, "high": rel.high,
                }
            )  # fmt: skip
    return rows
