"""Scores and weights over a training run: troughs of keep scores, detours in weights, loss against metric.

The formulas are ours; the papers show curves: Guo et al., arXiv:2406.14833 (the stability gap); Gupta et al.,
arXiv:2308.04014 (re-warming); Frankle et al., arXiv:1903.01611 (distance and angle); Isik et al.,
arXiv:2402.04177 (loss against BLEU).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analyses.trajectory import tables as trajectory_tables
from diagnostics.analyses.trajectory.figures import draw
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.evaluation.checkpoint_scores import (
    ScoringOptions,
    curves,
    reading_notes,
    scores,
)
from diagnostics.evaluation.sets import SetKey, load_sets
from diagnostics.execution.workers import checkpoint_runner
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.series import series_of
from probes.errors import InputError
from probes.text.rows import Task

METRICS = {
    "shipped_low": "keep sets significantly below the first step at the last one, and still rising",
    "unrecovered": "keep sets that fell far and regained less than 10 % of it",
    **{
        f"{name}_{role}{unit}": f"{text} {of}, for the {role} set that fell deepest"
        for role in ("keep", "task")
        for unit, of in (("", "as share of rows or tokens"), ("_nats", "in nats"))
        for name, text in (
            ("depth", "deepest fall below the first checkpoint"),
            ("recovery", "share of that fall regained at the last checkpoint; measured"),
        )
    },
    "steps_to_trough_keep": "steps from the first checkpoint to the lowest of that keep set",
    "steps_to_recover_keep": "steps from there until the share that counts as recovered is regained",
    "decoupling": "Spearman correlation of minus the task loss with its metric over the steps; lowest set",
    "delayed_generalisation": "1 if a task metric still rises after the train metric has settled",
    "settled_step": "step from which on the train metric stays near its last value",
    "rise_after_settling": "largest rise of a task metric after that step",
    "inefficiency": "length of the path through the weights over the distance of its ends; 1 is straight",
    "widest_angle_degrees": "largest angle of a step to the line from first to last checkpoint",
    "distance": "distance of the last checkpoint's weights from the first's",
    "checkpoints": "number of checkpoints",
}


def summary(result: Result) -> str:
    """Keep scores first, then loss against metric, then weights."""
    m = result.metrics
    parts = []
    if "depth_keep" in m or "depth_keep_nats" in m:
        low, lost = m["shipped_low"], m["unrecovered"]
        if lost:
            parts.append(f"{lost} keep {'set' if lost == 1 else 'sets'} fell and did not recover")
        elif low:
            parts.append(f"{low} keep {'set is' if low == 1 else 'sets are'} still in a trough, and rising")
        else:
            depths = {"": m.get("depth_keep", 0.0), " nats": m.get("depth_keep_nats", 0.0)}
            fell = " and ".join(f"{depth:.3g}{unit}" for unit, depth in depths.items() if depth > 0)
            parts.append(f"keep scores fell by at most {fell}" if fell else "no keep score ever fell")
    if "decoupling" in m:
        parts.append(f"rank correlation of loss and metric {m['decoupling']:.2f}")
    if m.get("delayed_generalisation"):
        parts.append(
            f"the task metric still rises after step {m['settled_step']:g}, where the train metric settled"
        )
    if "inefficiency" in m:
        parts.append(f"path through the weights {m['inefficiency']:.2f} times the straight line")
    return "; ".join(parts) or f"{m['checkpoints']} checkpoints, nothing measurable"


@analysis(
    "trajectory",
    question="Is the run shipped from a trough, and does its loss still follow its metric?",
    reading=(
        "A depth of 0 means that no score ever fell below the first step; a recovery of 1 that all of a "
        "trough was regained (meaningless where the depth is within noise). An inefficiency of 1 is a "
        "straight path through the weights; large values are common and no fault. Decoupling is 1 where loss "
        "and metric order the checkpoints the same way, 0 where they are unrelated, negative where they "
        "disagree."
    ),
    paper="arXiv:2406.14833",
    cost="for each checkpoint a forward pass over all rows, and four readings of its weights",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(parameters={"rows": 40}, relative={"distance": 1e-4, "inefficiency": 1e-4}),
)
def training_trajectory(
    series: Any,
    task: Any,
    keep: Any = None,
    train: Any = None,
    *,
    rows: int | None = 2000,
    recovered: float = 0.8,
    settled: float = 0.01,
    options: ScoringOptions = ScoringOptions(),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Follow task and keep scores, and the weights, over the checkpoints of one run.

    The metric of a set is its accuracy; for rows without answers, the share of tokens that are the model's
    most likely ones. Its loss is in nats per row or token. Rows with answers are judged by the metric,
    others by the loss.

    Args:
        series: at least 4 checkpoints, the base first: a series, or references in order.
        task: held-out rows of the trained task: a task, a file, texts, or several of these by name.
        keep: rows of what must survive.
        train: rows of the training data.
        rows: most scored rows of a set, drawn at random (ours); None: all.
        recovered: share of a trough to regain that counts as recovered (ours).
        settled: the train metric has settled where it stays within this of its last value (ours).
        options: how rows are read and how models run on them.
        seed: of the choice of rows.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables:
        `steps`: one row a set and checkpoint: step, label, role, set, metric (share), loss (nats per unit),
            rows (count), unit (row or token).
        `troughs`: one row a set and measure: role, set, measure (metric or loss), judged (boolean: the
            measure the set is judged by), first, lowest, last (scores; minus the loss), depth, depth_low
            (share or nats; lower bound), recovery (share), trough_step, steps_to_trough, steps_to_recover
            (steps), slope, slope_low, slope_high (late slope per step, 90 % interval), slope_points (count).
        `decoupling`: one row a task set and part of the run: set, part, spearman, checkpoints (count).
        `path`: one row a checkpoint: step, label, length (of the step in weights), angle, turn (degrees; to
            the line from first to last, to the step before), distance_start, distance_end (in weights).

    Raises:
        TooShortError: fewer than 4 checkpoints.
        InputError: rows that cannot be scored.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> run = [BUNDLED / f"grokking/parity/checkpoint-{step}" for step in (0, 50, 100, 150)]
        >>> training_trajectory(run, BUNDLED / "grokking/held-out.jsonl", rows=4).metrics["checkpoints"]
        4
    """
    if not 0 < recovered <= 1 or not 0 <= settled < 1:
        raise InputError(
            f"recovered is {recovered} and settled {settled}; both are shares, recovered above 0 and settled "
            "below 1"
        )
    if rows is not None and rows < 1:
        raise InputError(f"rows is {rows}; it is at least 1")
    series = series_of(series)
    sets = load_sets({"task": task, "keep": keep, "train": train}, rows=rows, seed=seed)
    options = options.cut_alike(series.checkpoints)
    measure = partial(_measured, sets=sets, reading=options)
    measurements = series.measured(
        "scores", options.key(sets), measure, progress, least=(4, "a trajectory"),
        run_calls=checkpoint_runner(series, options.device),
    )  # fmt: skip
    steps, by_set = np.array(series.steps), curves(measurements, sets)
    notes = [] if series.stepped else ["The steps are unknown: checkpoints are numbered 0, 1, 2 …"]
    judged = [curve for curve in by_set if curve.which[0] != "train"]
    trough_table = [row for curve in judged for row in trajectory_tables.trough_rows(steps, curve, recovered)]
    tasks = [curve for curve in judged if curve.which[0] == "task"]
    decoupling = [row for curve in tasks for row in trajectory_tables.decoupling_rows(curve)]
    metrics: dict[str, float | int] = {"checkpoints": len(series)}
    metrics |= trajectory_tables.trough_metrics(trough_table, recovered)
    metrics |= trajectory_tables.decoupling_metrics(by_set, decoupling, notes)
    metrics |= trajectory_tables.settling_metrics(steps, by_set, settled, notes)
    tables = {
        "steps": pd.DataFrame(trajectory_tables.step_rows(series, by_set)),
        "troughs": pd.DataFrame(trough_table),
        "decoupling": pd.DataFrame(decoupling),
    }
    path = trajectory_tables.weight_path(series, notes, progress)
    if path:
        tables["path"] = pd.DataFrame({"step": series.steps, "label": series.labels}).join(pd.DataFrame(path))
        metrics |= trajectory_tables.path_metrics(path, notes)
    notes += trajectory_tables.trough_notes(trough_table, recovered)
    notes += reading_notes(measurements, sets, series.labels)
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


def _measured(
    checkpoint: Checkpoint, *, sets: Mapping[SetKey, Task], reading: ScoringOptions
) -> Mapping[str, np.ndarray]:
    """The scores of one checkpoint, in this process or on a worker."""
    return scores(reading.open(checkpoint), sets, reading)
