"""Several tasks: how their regions overlap, and how much of every task each region keeps."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.measurements import TaskMeasurements
from diagnostics.analyses.skills.region import Region
from diagnostics.evaluation.answers import AnswerScores


def overlap_rows(regions: Mapping[str, Region], entries: Mapping[str, int]) -> list[dict[str, Any]]:
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
) -> tuple[list[dict[str, Any]], np.ndarray]:
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
) -> list[dict[str, Any]]:
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
