"""Several tasks side by side: how their regions overlap, and what each region keeps of every task."""

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
    """How the regions of two tasks overlap, each way, against what chance gives."""
    total = sum(entries.values())
    return [
        {
            "task": first, "other": second, "overlap": region.overlap(own, other),
            "chance": region.chance(own, other, entries), "density": region.size(own) / total,
            "jaccard": region.jaccard(own, other),
        }
        for first, own in regions.items()
        for second, other in regions.items()
    ]  # fmt: skip


def recoveries(
    found: Mapping[str, TaskMeasurements], names: Sequence[str], *, draws: int, seed: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The share of each task's gain that each task's region keeps."""
    rows, matrix = [], np.full((len(names), len(names)), math.nan)
    for t, task in enumerate(names):
        said = {side: found[task].report[side] for side in ("base", "tuned")}
        for name in names:
            said[f"of {name}"] = found[name].crossed[task]
        scores = AnswerScores(said, draws=draws, seed=seed, where=task)
        for i, name in enumerate(names):
            rel = scores.rel(f"of {name}")
            matrix[i, t] = rel.value
            rows.append({"region": name, "task": task, "rel": rel.value, "low": rel.low, "high": rel.high})
    return rows, matrix


def unions(
    found: Mapping[str, TaskMeasurements],
    regions: Mapping[str, Region],
    bench: GraftEvaluator,
    *,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """What the regions of several tasks together keep, of their own tasks and of one that is left out."""
    names = list(regions)
    groups = [tuple(names)] if len(names) < 3 else [tuple(names), *combinations(names, len(names) - 1)]
    rows = []
    keys = [(name, "report") for name in names]
    for group in groups:
        together = region.union([regions[name] for name in group])
        said = bench.graft(together, keys)
        for name in names:
            ends = {side: found[name].report[side] for side in ("base", "tuned")}
            scores = AnswerScores({**ends, "union": said[name, "report"]}, draws=draws, seed=seed, where=name)
            rel = scores.rel("union")
            rows.append(
                {
                    "union": " + ".join(group), "entries": region.size(together), "task": name,
                    "member": name in group, "metric": scores.shown("union").value, "rel": rel.value,
                    "low": rel.low, "high": rel.high,
                }
            )  # fmt: skip
    return rows
