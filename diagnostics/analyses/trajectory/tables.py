"""What the scores and weights of a run say: the tables of `trajectory`, and what follows from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.analyses.trajectory import troughs
from diagnostics.evaluation.checkpoint_scores import Curves
from diagnostics.numerics import weight_distances
from probes.checkpoints.series import CheckpointSeries
from probes.errors import InputError

# Depths from which a trough that stays is a loss: a share of rows, as for regressions, or nats (ours).
DEEP = {"metric": 0.02, "loss": 0.05}
# Share of a trough up to which next to nothing of it has come back (ours).
NOTHING = 0.1
# Fewer checkpoints than this support no correlation over steps.
CORRELATED = 6


def step_rows(series: CheckpointSeries, found: Sequence[Curves]) -> list[dict[str, Any]]:
    """Every set at every checkpoint."""
    return [
        {
            "step": step,
            "label": series.labels[place],
            "role": one.which[0],
            "set": one.which[1],
            "metric": float(one.metric[place]),
            "loss": float(one.loss[place]),
            "rows": one.nats.shape[1],
            "unit": one.unit,
        }
        for one in found
        for place, step in enumerate(series.steps)
    ]


def trough_rows(steps: troughs.Curve, one: Curves, recovered: float) -> list[dict[str, Any]]:
    """What both curves of a set say: a trough, how much of it is no noise, and the late slope."""
    rows = []
    for measure in ("metric", "loss"):
        scored = one.score(measure)
        low = troughs.trough(steps, scored, recovered=recovered)
        # The lowest of all is compared, so that its error must hold for every checkpoint.
        width = troughs.deviations(len(steps) - 1) * one.difference(measure, 0, low.place).error
        late = troughs.last_third(len(steps))
        slope = troughs.slope(steps[late], scored[late])
        rows.append(
            {
                "role": one.which[0],
                "set": one.which[1],
                "measure": measure,
                "judged": measure == one.judged,
                "first": float(scored[0]),
                "lowest": float(scored[low.place]),
                "last": float(scored[-1]),
                "depth": low.depth,
                "depth_low": low.depth - width,
                "recovery": low.recovery,
                "trough_step": float(steps[low.place]),
                "steps_to_trough": low.steps_down,
                "steps_to_recover": low.steps_up,
                "slope": slope.value,
                "slope_low": slope.low,
                "slope_high": slope.high,
                "slope_points": int((~np.isnan(scored[late])).sum()),
            }
        )
    return rows


def decoupling_rows(one: Curves) -> list[dict[str, Any]]:
    """Rank correlation of minus loss and metric over the whole run and over each third of its checkpoints."""
    parts = {"whole": slice(None)} | troughs.thirds(len(one.loss))
    return [
        {
            "set": one.which[1],
            "part": part,
            "spearman": troughs.rank_correlation(-one.loss[places], one.metric[places]),
            "checkpoints": len(one.loss[places]),
        }
        for part, places in parts.items()
    ]


def of_troughs(rows: Sequence[Mapping[str, Any]], recovered: float) -> dict[str, float | int]:
    """The deepest trough of each role, and the keep sets that are low or lost."""
    found: dict[str, float | int] = {}
    for role in ("keep", "task"):
        for measure, unit in (("metric", ""), ("loss", "_nats")):
            of = [row for row in rows if (row["role"], row["measure"]) == (role, measure)]
            if not of or any(math.isnan(row["depth"]) for row in of):
                continue
            deepest = max(of, key=lambda row: row["depth"])
            found[f"depth_{role}{unit}"] = deepest["depth"]
            if deepest["depth"] > 0:
                found[f"recovery_{role}{unit}"] = deepest["recovery"]
            if role == "keep" and deepest["judged"] and deepest["depth"] > 0:
                found["steps_to_trough_keep"] = deepest["steps_to_trough"]
                if not math.isnan(deepest["steps_to_recover"]):
                    found["steps_to_recover_keep"] = deepest["steps_to_recover"]
    judged = [row for row in rows if row["role"] == "keep" and row["judged"]]
    if judged:
        found["shipped_low"] = sum(shipped_low(row, recovered) for row in judged)
        found["unrecovered"] = sum(unrecovered(row) for row in judged)
    return found


def shipped_low(row: Mapping[str, Any], recovered: float) -> bool:
    """Whether a score surely fell, has not recovered, and surely still rises."""
    return bool(row["depth_low"] > 0 and row["recovery"] < recovered and row["slope_low"] > 0)


def unrecovered(row: Mapping[str, Any]) -> bool:
    """Whether a score surely fell by what counts as a loss, and next to nothing came back."""
    return bool(row["depth_low"] > DEEP[row["measure"]] and row["recovery"] < NOTHING)


def of_decoupling(
    found: Sequence[Curves], rows: Sequence[Mapping[str, Any]], notes: list[str]
) -> dict[str, float | int]:
    """The lowest correlation over the whole run, where there are points and movement enough."""
    known = []
    for one in (each for each in found if each.which[0] == "task"):
        row = next(row for row in rows if row["set"] == one.which[1] and row["part"] == "whole")
        if row["checkpoints"] < CORRELATED:
            notes.append(
                f"Decoupling over {row['checkpoints']} checkpoints is no evidence and is left out; it takes "
                f"{CORRELATED}."
            )
        elif math.isnan(row["spearman"]):
            notes.append(
                f"Decoupling of the task rows {one.which[1]} is undefined: loss or metric is constant."
            )
        elif not moved(one):
            notes.append(
                f"The loss of the task rows {one.which[1]} moved by no more than its noise, so that "
                "its order over the steps tells nothing; decoupling is left out."
            )
        else:
            known.append(row["spearman"])
    return {"decoupling": min(known)} if known else {}


def moved(one: Curves) -> bool:
    """Whether the loss of any checkpoint surely differs from the first's."""
    count = len(one.loss) - 1
    apart = [one.difference("loss", 0, place) for place in range(1, count + 1)]
    return any(abs(each.value) > troughs.deviations(count) * each.error for each in apart)


def of_settling(
    steps: troughs.Curve, found: Sequence[Curves], settled: float, notes: list[str]
) -> dict[str, float | int]:
    """Whether held-out rows are still learnt after the rows of the training have been."""
    trained = [one for one in found if one.which[0] == "train"]
    if not trained:
        return {}
    place = troughs.settled_from(np.mean([one.metric for one in trained], axis=0), settled)
    left = len(steps) - place
    if left < troughs.FEWEST:
        notes.append(
            f"From where the train metric settles on, if it does, there are {left} of the {len(steps)} "
            f"checkpoints; whether held-out rows are learnt later takes {troughs.FEWEST}."
        )
        return {"settled_step": float(steps[place])}
    held = [one.metric[place:] for one in found if one.which[0] == "task"]
    rises = [float(curve[-1] - curve[0]) for curve in held]
    sure = [troughs.slope(steps[place:], curve).low > 0 for curve in held]
    later = any(rise > settled and up for rise, up in zip(rises, sure, strict=True))
    return {
        "delayed_generalisation": int(later),
        "settled_step": float(steps[place]),
        "rise_after_settling": max(rises),
    }


def path_of(
    series: CheckpointSeries, notes: list[str], progress: Callable[[int, int, str], None] | None
) -> list[dict[str, float]]:
    """The way through the weights; nothing where those of earlier steps are gone."""
    if len(series.checkpoints) < len(series):
        notes.append(
            "The way through the weights is not measured: those of earlier steps are gone while a run goes "
            "on. `tunescope series` measures it on saved checkpoints."
        )
        return []
    try:
        common = weight_distances.shared(series.checkpoints)
        squares = weight_distances.squared_distances(series.checkpoints, common.names, progress)
    except InputError as error:  # the scores stand without it
        notes.append(f"The way through the weights is not measured: {error}.")
        return []
    if common.left_out:
        notes.append(
            f"The way leaves out {len(common.left_out)} tensors that not every checkpoint has in one shape: "
            f"{', '.join(common.left_out[:5])}{' …' if len(common.left_out) > 5 else ''}."
        )
    return weight_distances.path_rows(squares, len(series))


def of_path(way: Sequence[dict[str, float]], notes: list[str]) -> dict[str, float | int]:
    """What the way says as a whole."""
    found: dict[str, float | int] = {"distance": way[-1]["distance_start"]}
    times = weight_distances.inefficiency(way)
    if math.isnan(times):
        notes.append(
            "The last checkpoint's weights are the first's: the way has no direction and no inefficiency."
        )
        return found
    angles = [row["angle"] for row in way if not math.isnan(row["angle"])]
    return found | {"inefficiency": times, "widest_angle_degrees": max(angles)}


def trough_notes(rows: Sequence[Mapping[str, Any]], recovered: float) -> list[str]:
    """Troughs in words, and what the late slope cannot tell."""
    notes = []
    for row in (each for each in rows if each["judged"]):
        name = f"{row['role']} rows" if row["set"] == row["role"] else f"{row['role']} rows {row['set']}"
        unit = "nats" if row["measure"] == "loss" else "of what is right"
        if row["depth"] > 0 and not row["depth_low"] > 0:
            notes.append(
                f"The trough of the {name}, {row['depth']:.3g} {unit}, is not told from noise; its recovery "
                "means nothing."
            )
        elif row["role"] == "keep" and shipped_low(row, recovered):
            notes.append(
                f"The {name} fell by {row['depth']:.3g} {unit} and have won back {row['recovery']:.0%} of "
                "it; they still rise: train on, or replay what must survive, before this is shipped."
            )
    if rows and max(row["slope_points"] for row in rows) < troughs.FEWEST:
        notes.append(
            f"The last third holds {rows[0]['slope_points']} checkpoints: its slopes have no interval, which "
            f"takes {troughs.FEWEST}, and no set can be said to be still rising."
        )
    return notes
