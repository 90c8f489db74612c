"""Tables, metrics and notes of `trajectory`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.analyses.trajectory import troughs
from diagnostics.evaluation.checkpoint_scores import Curves
from diagnostics.numerics import weight_distances
from probes.checkpoints.series import CheckpointSeries
from probes.errors import InputError

# Depth from which a lasting trough counts as a loss: a share of rows, or nats (ours).
DEEP = {"metric": 0.02, "loss": 0.05}
# Recovery below which a trough counts as not recovered (ours).
UNRECOVERED = 0.1
# The fewest checkpoints for a correlation over steps.
CORRELATED = 6


def step_rows(series: CheckpointSeries, sets: Sequence[Curves]) -> list[dict[str, Any]]:
    """One row a set and checkpoint."""
    return [
        {
            "step": step, "label": series.labels[index], "role": curve.which[0], "set": curve.which[1],
            "metric": float(curve.metric[index]), "loss": float(curve.loss[index]),
            "rows": curve.nats.shape[1], "unit": curve.unit,
        }
        for curve in sets
        for index, step in enumerate(series.steps)
    ]  # fmt: skip


def trough_rows(steps: troughs.Curve, curves: Curves, recovered: float) -> list[dict[str, Any]]:
    """The trough of both curves of a set, with its lower bound and the late slope."""
    rows = []
    for measure in ("metric", "loss"):
        scored = curves.score(measure)
        low = troughs.trough(steps, scored, recovered=recovered)
        # The lowest checkpoint was selected, so that its interval must hold for all of them.
        width = troughs.deviations(len(steps) - 1) * curves.difference(measure, 0, low.index).error
        late = troughs.last_third(len(steps))
        slope = troughs.slope(steps[late], scored[late])
        rows.append(
            {
                "role": curves.which[0], "set": curves.which[1], "measure": measure,
                "judged": measure == curves.judged, "first": float(scored[0]),
                "lowest": float(scored[low.index]), "last": float(scored[-1]), "depth": low.depth,
                "depth_low": low.depth - width, "recovery": low.recovery,
                "trough_step": float(steps[low.index]), "steps_to_trough": low.steps_down,
                "steps_to_recover": low.steps_up, "slope": slope.value, "slope_low": slope.low,
                "slope_high": slope.high, "slope_points": int((~np.isnan(scored[late])).sum()),
            }
        )  # fmt: skip
    return rows


def decoupling_rows(curves: Curves) -> list[dict[str, Any]]:
    """Rank correlation of minus the loss with the metric, over the whole run and over each third."""
    parts = {"whole": slice(None)} | troughs.thirds(len(curves.loss))
    return [
        {
            "set": curves.which[1], "part": part,
            "spearman": troughs.rank_correlation(-curves.loss[at], curves.metric[at]),
            "checkpoints": len(curves.loss[at]),
        }
        for part, at in parts.items()
    ]  # fmt: skip


def trough_metrics(rows: Sequence[Mapping[str, Any]], recovered: float) -> dict[str, float | int]:
    """The deepest trough of each role, and the number of keep sets in one."""
    metrics: dict[str, float | int] = {}
    for role in ("keep", "task"):
        for measure, unit in (("metric", ""), ("loss", "_nats")):
            candidates = [row for row in rows if (row["role"], row["measure"]) == (role, measure)]
            if not candidates or any(math.isnan(row["depth"]) for row in candidates):
                continue
            deepest = max(candidates, key=lambda row: row["depth"])
            metrics[f"depth_{role}{unit}"] = deepest["depth"]
            if deepest["depth"] > 0:
                metrics[f"recovery_{role}{unit}"] = deepest["recovery"]
            if role == "keep" and deepest["judged"] and deepest["depth"] > 0:
                metrics["steps_to_trough_keep"] = deepest["steps_to_trough"]
                if not math.isnan(deepest["steps_to_recover"]):
                    metrics["steps_to_recover_keep"] = deepest["steps_to_recover"]
    judged = [row for row in rows if row["role"] == "keep" and row["judged"]]
    if judged:
        metrics["shipped_low"] = sum(shipped_low(row, recovered) for row in judged)
        metrics["unrecovered"] = sum(unrecovered(row) for row in judged)
    return metrics


def shipped_low(row: Mapping[str, Any], recovered: float) -> bool:
    """Whether a score significantly fell, has not recovered, and significantly still rises."""
    return bool(row["depth_low"] > 0 and row["recovery"] < recovered and row["slope_low"] > 0)


def unrecovered(row: Mapping[str, Any]) -> bool:
    """Whether a score significantly fell by what counts as a loss, and has not recovered."""
    return bool(row["depth_low"] > DEEP[row["measure"]] and row["recovery"] < UNRECOVERED)


def decoupling_metrics(
    sets: Sequence[Curves], rows: Sequence[Mapping[str, Any]], notes: list[str]
) -> dict[str, float | int]:
    """The lowest correlation over the whole run, where there are enough checkpoints and the loss moved."""
    correlations = []
    for curves in (curves for curves in sets if curves.which[0] == "task"):
        name = curves.which[1]
        row = next(row for row in rows if row["set"] == name and row["part"] == "whole")
        if row["checkpoints"] < CORRELATED:
            notes.append(
                f"Decoupling is left out: it needs {CORRELATED} checkpoints, and there are "
                f"{row['checkpoints']}."
            )
        elif math.isnan(row["spearman"]):
            notes.append(f"Decoupling of the task rows {name} is undefined: loss or metric is constant.")
        elif not loss_moved(curves):
            notes.append(
                f"Decoupling is left out: the loss of the task rows {name} moved by no more than its noise."
            )
        else:
            correlations.append(row["spearman"])
    return {"decoupling": min(correlations)} if correlations else {}


def loss_moved(curves: Curves) -> bool:
    """Whether the loss of any checkpoint differs significantly from the first's."""
    count = len(curves.loss) - 1
    differences = [curves.difference("loss", 0, index) for index in range(1, count + 1)]
    return any(abs(change.value) > troughs.deviations(count) * change.error for change in differences)


def settling_metrics(
    steps: troughs.Curve, sets: Sequence[Curves], settled: float, notes: list[str]
) -> dict[str, float | int]:
    """Whether the task metric still rises after the train metric has settled."""
    trained = [curves.metric for curves in sets if curves.which[0] == "train"]
    if not trained:
        return {}
    start = troughs.settled_from(np.mean(trained, axis=0), settled)
    left = len(steps) - start
    if left < troughs.FEWEST:
        notes.append(
            f"The train metric settles with {left} of {len(steps)} checkpoints left, if it does. Delayed "
            f"generalisation is left out: it needs {troughs.FEWEST}."
        )
        return {"settled_step": float(steps[start])}
    held_out = [curves.metric[start:] for curves in sets if curves.which[0] == "task"]
    metric_gains = [float(metric[-1] - metric[0]) for metric in held_out]
    rising = [troughs.slope(steps[start:], metric).low > 0 for metric in held_out]
    delayed = any(rise > settled and up for rise, up in zip(metric_gains, rising, strict=True))
    return {
        "delayed_generalisation": int(delayed),
        "settled_step": float(steps[start]),
        "rise_after_settling": max(metric_gains),
    }


def weight_path(
    series: CheckpointSeries, notes: list[str], progress: Callable[[int, int, str], None] | None
) -> list[dict[str, float]]:
    """The path through the weights; empty where the weights of earlier steps are not kept."""
    if len(series.checkpoints) < len(series):
        notes.append(
            "The path through the weights is not measured: a live run does not keep the weights of earlier "
            "steps. `tunescope series` measures it on saved checkpoints."
        )
        return []
    try:
        common = weight_distances.shared(series.checkpoints)
        squares = weight_distances.squared_distances(common, progress)
    except InputError as error:  # scores do not need it
        notes.append(f"The path through the weights is not measured: {error}.")
        return []
    notes += common.notes("The path")
    return weight_distances.path_rows(squares, len(series))


def path_metrics(path: Sequence[dict[str, float]], notes: list[str]) -> dict[str, float | int]:
    """Distance, inefficiency and widest angle of the path through the weights."""
    metrics: dict[str, float | int] = {"distance": path[-1]["distance_start"]}
    ratio = weight_distances.inefficiency(path)
    if math.isnan(ratio):
        notes.append("The weights of the last checkpoint equal the first's: inefficiency is undefined.")
        return metrics
    angles = [row["angle"] for row in path if not math.isnan(row["angle"])]
    return metrics | {"inefficiency": ratio, "widest_angle_degrees": max(angles)}


def trough_notes(rows: Sequence[Mapping[str, Any]], recovered: float) -> list[str]:
    """Notes on troughs and on slopes without an interval."""
    notes = []
    for row in (row for row in rows if row["judged"]):
        name = f"{row['role']} rows" if row["set"] == row["role"] else f"{row['role']} rows {row['set']}"
        unit = "nats" if row["measure"] == "loss" else "of the metric"
        if row["depth"] > 0 and not row["depth_low"] > 0:
            notes.append(
                f"The trough of the {name} ({row['depth']:.3g} {unit}) is within noise; so is its recovery."
            )
        elif row["role"] == "keep" and shipped_low(row, recovered):
            notes.append(
                f"The {name} fell by {row['depth']:.3g} {unit}, regained {row['recovery']:.0%} of it and "
                "still rise. Before shipping, train longer or mix in rows of what must survive."
            )
    if rows and max(row["slope_points"] for row in rows) < troughs.FEWEST:
        notes.append(
            f"Late slopes have no interval: that needs {troughs.FEWEST} checkpoints in the last third, and "
            f"there are {rows[0]['slope_points']}. No set can count as still rising."
        )
    return notes
