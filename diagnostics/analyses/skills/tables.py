"""The tables and numbers of a skill localization, out of what was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.cross_task import overlap_rows, recoveries, unions
from diagnostics.analyses.skills.evaluator import GraftEvaluator, Key, layers
from diagnostics.analyses.skills.measurements import ALPHAS, TaskMeasurements, interpolation
from diagnostics.analyses.skills.notes import verdict, wording
from diagnostics.analyses.skills.size_selection import SizeChoice
from diagnostics.evaluation.answers import Answers, AnswerScores, agreement, calibration, drawn_ece
from diagnostics.numerics.calibration import ece, reliability

if TYPE_CHECKING:
    import pandas as pd

# Overlap beyond this many times chance, or a recovery below this of another task, is interference; ours.
OVERLAP, HARM = 3.0, -0.05
# Of the calibration error that a graft must take off: the least published.
CALMER = 0.4


def budget_rows(one: TaskMeasurements, total: int) -> list[dict[str, Any]]:
    """A row for every point of the curve of one task."""
    scores, tuned = one.compared, one.report["tuned"]
    rows = []
    for name, about in one.points.items():
        metric = scores.shown(name)
        rel = scores.rel(name)
        rows.append(
            {
                "task": one.task, "share": about["entries"] / total if total else math.nan,
                "metric": metric.value, "method": about["method"], "alpha": about.get("alpha", math.nan),
                "entries": about["entries"], "low": metric.low, "high": metric.high, "rel": rel.value,
                "rel_low": rel.low, "rel_high": rel.high, "recovery": scores.recovery(name),
                "agreement": agreement(one.report[name], tuned),
                "rel_selection": about.get("kept", math.nan), "alone": about.get("alone", False),
                "chosen": about.get("chosen", False),
            }
        )  # fmt: skip
    return rows


def region_rows(bench: GraftEvaluator, one: SizeChoice, task: str) -> list[dict[str, Any]]:
    """Where the chosen region of a task lies."""
    shapes = {name: bench.shapes[name] for name in bench.movement.entries}
    matrices = bench.host.pair.tuned.matrices
    rows = region.places(one.chosen, shapes, matrices, layers(shapes))
    return [{"task": task, **row} for row in rows]


def densest_rows(bench: GraftEvaluator, one: SizeChoice, task: str) -> list[dict[str, Any]]:
    """The rows and columns that hold most of the chosen region of a task."""
    rows = region.densest(one.chosen, bench.shapes, bench.host.pair.tuned.matrices)
    return [{"task": task, **row} for row in rows]


def calibration_rows(one: TaskMeasurements, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Calibration of each model of one task on the report rows."""
    return [
        {
            "task": one.task, "model": name, "temperature": one.tempered if name == "tempered" else math.nan,
            "accuracy": float(said.right.mean()), **calibration(said, draws=draws, seed=seed)._asdict(),
        }
        for name, said in calibrated(one).items()
    ]  # fmt: skip


def calibrated(one: TaskMeasurements) -> dict[str, Answers]:
    """The models whose calibration is compared; none where rows have neither choices nor labels."""
    if one.report["tuned"].logs is None:
        return {}
    names = ["base", "tuned", *(["graft"] if one.choice else []), *map(interpolation, ALPHAS)]
    made = {name: one.report[name] for name in names}
    if not math.isnan(one.tempered):
        made["tempered"] = one.report["tuned"].cooled(one.tempered)
    return made


def reliability_rows(one: TaskMeasurements) -> list[dict[str, Any]]:
    """Stated confidence against accuracy, by bin."""
    rows = []
    for name, said in calibrated(one).items():
        found = reliability(said.confidence, said.right)
        rows += [
            {
                "task": one.task,
                "model": name,
                "bin": place,
                "rows": int(count),
                "confidence": c,
                "accuracy": a,
            }
            for place, (count, c, a) in enumerate(zip(*found, strict=True))
            if count
        ]
    return rows


def set_rows(one: TaskMeasurements, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Every model on the report rows and on the other sets, with its difference to tuned."""
    rows = []
    every: dict[Key, Mapping[str, Answers]] = {("task", one.task): one.report, **one.elsewhere}
    kept = ["base", "tuned", *(["graft", "complement"] if one.choice else []), *map(interpolation, ALPHAS)]
    for (role, name), said in every.items():
        models = {model: said[model] for model in kept if model in said}
        scores = AnswerScores(models, draws=draws, seed=seed, where=name)
        for model in models:
            metric = scores.shown(model)
            over = scores.difference(model, "tuned")
            rows.append(
                {
                    "task": one.task, "role": role, "set": name, "model": model, "kind": scores.kind,
                    "metric": metric.value, "low": metric.low, "high": metric.high, "over_tuned": over.value,
                    "over_tuned_low": over.low, "over_tuned_high": over.high,
                    "agreement": agreement(models[model], models["tuned"]),
                    "ece": math.nan if models[model].logs is None
                    else ece(models[model].confidence, models[model].right),
                }
            )  # fmt: skip
    return rows


def stability_rows(one: TaskMeasurements) -> list[dict[str, Any]]:
    """How alike the regions of a task are that searches with other seeds find."""
    assert one.choice is not None
    return [
        {"task": one.task, "seed": first, "other": second, "jaccard": value}
        for first, second, value in one.choice.stability()
    ]


@dataclass(frozen=True, kw_only=True)
class CalibrationChange:
    """What a graft does to the calibration error, and what scaling the whole update does.

    Attributes:
        less: share of tuned's error that the graft takes off.
        less_low: lower end of the 95 % interval of the error taken off, in units of the error.
        interpolated: the largest share that an interpolation takes off which is not surely worse than the
            graft.
    """

    less: float
    less_low: float
    interpolated: float

    @property
    def overconfident(self) -> bool:
        """Whether the graft takes much off the error, surely something, and more than interpolation does."""
        return self.less >= CALMER and self.less_low > 0 and self.less > self.interpolated


def calm(one: TaskMeasurements, *, draws: int, seed: int) -> CalibrationChange | None:
    """How much better calibrated the graft is; None where that is not defined."""
    if one.choice is None or one.report["tuned"].logs is None:
        return None
    tuned, graft = (one.report[name] for name in ("tuned", "graft"))
    errors = [ece(said.confidence, said.right) for said in (tuned, graft)]
    if not errors[0]:
        return None
    drawn = drawn_ece([tuned, graft], draws=draws, seed=seed)
    # One that is surely worse is no alternative: base itself is often the best calibrated of all.
    names = [interpolation(alpha) for alpha in ALPHAS]
    rivals = [one.report[name] for name in names if one.compared.difference(name, "graft").high >= 0]
    return CalibrationChange(
        less=1 - errors[1] / errors[0],
        less_low=float(np.quantile(drawn[:, 0] - drawn[:, 1], 0.025)),
        interpolated=max((1 - ece(said.confidence, said.right) / errors[0] for said in rivals), default=0.0),
    )


def headline(
    one: TaskMeasurements,
    bench: GraftEvaluator,
    calmer: CalibrationChange | None,
    where: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """The numbers of one task, those that are not defined left out."""
    scores, total = one.compared, bench.movement.total
    values: dict[str, float] = {
        "base_metric": scores.shown("base").value,
        "tuned_metric": scores.shown("tuned").value,
        "gain": scores.value["tuned"] - scores.value["base"],
        "gain_error": scores.difference("tuned", "base").error,
        "rows_report": len(one.report["tuned"].losses.units),
    }
    if one.report["tuned"].logs is not None:
        said = one.report["tuned"]
        values |= {"ece_tuned": ece(said.confidence, said.right), "temperature": one.tempered}
        if not math.isnan(one.tempered):
            cooled = said.cooled(one.tempered)
            values["ece_tempered"] = ece(cooled.confidence, cooled.right)
    if one.choice is not None:
        rel = scores.rel("graft")
        values |= {
            "graft_metric": scores.shown("graft").value,
            "share": one.choice.size / total,
            "region": one.choice.size,
            "rel": rel.value, "rel_low": rel.low, "rel_high": rel.high,
            "recovery": scores.recovery("graft"),
            "agreement": agreement(one.report["graft"], one.report["tuned"]),
            "necessity": 1 - scores.rel("complement").value,
            "movement_rel": one.rel_of("movement"),
            "random_rel": one.rel_of("random"),
            "half_update_rel": scores.rel(interpolation(0.5)).value,
            "whole_rel": scores.rel("ones").value,
        }  # fmt: skip
        values["bias_or_norm"] = sum(row["share"] for row in where if row["component"] in ("bias", "norm"))
        if one.choice.passed:
            values["skill_size"] = one.choice.size / total
        if one.choice.again:
            values["stability"] = float(np.mean([alike for *_, alike in one.choice.stability()]))
        if one.report["graft"].logs is not None:
            said = one.report["graft"]
            values["ece_graft"] = ece(said.confidence, said.right)
            halved = one.report[interpolation(0.5)]
            values["ece_half_update"] = ece(halved.confidence, halved.right)
        if calmer is not None:
            values["ece_less"] = calmer.less
    return {name: value for name, value in values.items() if not math.isnan(value)}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Everything that was measured, as a result holds it."""

    found: Mapping[str, TaskMeasurements]
    bench: GraftEvaluator
    draws: int
    seed: int

    def made(self) -> "tuple[dict[str, pd.DataFrame], dict[str, float | int]]":
        """All tables, and every metric: of the first task, and counts over all of them."""
        how = {"draws": self.draws, "seed": self.seed}
        total, rows = self.bench.movement.total, TableRows()
        chosen = {name: one.choice for name, one in self.found.items() if one.choice is not None}
        calmer = {name: calm(one, **how) for name, one in self.found.items()}
        for name, one in self.found.items():
            where = region_rows(self.bench, chosen[name], name) if name in chosen else []
            own = headline(one, self.bench, calmer[name], where)
            rows["tasks"].append({"task": name, **own, "verdict": verdict(one, total, own)})
            rows["budget"] += budget_rows(one, total)
            rows["sets"] += set_rows(one, **how)
            rows["calibration"] += calibration_rows(one, **how)
            rows["reliability"] += reliability_rows(one)
            rows["region"] += where
            if name in chosen:
                rows["densest"] += densest_rows(self.bench, chosen[name], name)
                rows["stability"] += stability_rows(one)
        metrics: dict[str, float | int] = dict(rows["tasks"][0])
        for name in ("task", "verdict"):
            del metrics[name]
        if len(chosen) > 1:
            regions = {name: choice.chosen for name, choice in chosen.items()}
            rows["overlap"] += overlap_rows(regions, self.bench.movement.entries)
            crossed, matrix = recoveries(self.found, list(regions), **how)
            rows["rel"] += crossed
            rows["unions"] += unions(self.found, regions, self.bench, **how)
            metrics["interfering"] = interfering(rows["overlap"], crossed)
            purity = float(region.purity(matrix)[0])
            if next(iter(self.found)) in chosen and not math.isnan(purity):
                metrics["purity"] = purity
        metrics |= self.counts(list(chosen.values()), list(calmer.values()), rows["sets"])
        return {name: frame(each) for name, each in rows.items() if each}, metrics

    def counts(
        self,
        chosen: Sequence[SizeChoice],
        calmer: Sequence[CalibrationChange | None],
        sets: Sequence[Mapping[str, Any]],
    ) -> dict[str, float | int]:
        """What is counted over all tasks, and what is true of the pair."""
        movement = self.bench.movement
        made: dict[str, float | int] = {
            "tasks": len(self.found), "entries": movement.total, "moved": movement.total_moved,
            "localised": sum(choice.passed for choice in chosen),
            "diffuse": sum(
                not choice.passed or wording(choice.size / movement.total) == "diffuse" for choice in chosen
            ),
            "without_gain": len(self.found) - len(chosen),
            "overconfident": sum(each is not None and each.overconfident for each in calmer),
            "harmful_rest": sum(
                row["model"] == "graft" and row["role"] != "keep" and row["over_tuned_low"] > 0
                for row in sets
            ),
        }  # fmt: skip
        if movement.squares:
            leading = movement.largest(math.ceil(movement.total / 100))
            made["movement_top"] = movement.square(leading) / movement.squares
        return made


class TableRows(dict[str, list[dict[str, Any]]]):
    """The rows of tables by name; one that has none yet is empty."""

    def __missing__(self, name: str) -> list[dict[str, Any]]:
        return self.setdefault(name, [])


def interfering(overlaps: Sequence[Mapping[str, Any]], crossed: Sequence[Mapping[str, Any]]) -> int:
    """Pairs of tasks whose regions overlap far beyond chance, or one of which harms the other."""
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


def frame(rows: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Rows as a table."""
    import pandas as pd

    table = pd.DataFrame(list(rows))
    if "layer" in table:  # outside the blocks there is none
        table["layer"] = table["layer"].astype(float)
    return table
