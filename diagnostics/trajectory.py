"""The trajectory of a run: troughs of what must survive, detours in weights, metrics that part from the loss.

A keep score that fell and is still climbing back says that the run is shipped from a trough. The way through
the weights is compared with the straight line between its ends. Where the task's loss improves and its metric
does not, the loss is no longer what to stop by. Every formula is ours, from `further_diagnostics`; the papers
show curves: Guo et al., arXiv:2406.14833 (the stability gap); Gupta et al., arXiv:2308.04014 (re-warming);
Frankle et al., arXiv:1903.01611 (distance and angle); Isik et al., arXiv:2402.04177 (loss against BLEU).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics import strides, troughs
from diagnostics.analysis import Result, analysis
from diagnostics.over_steps import Curves, Reading, curves, said, scores, sets_of
from probes.checkpoint import Checkpoint
from probes.series import CheckpointSeries, series_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Depths from which a trough that stays is a loss: a share of rows, as for regressions, or nats (ours).
DEEP = {"metric": 0.02, "loss": 0.05}
# Share of a trough up to which next to nothing of it has come back (ours).
NOTHING = 0.1
# Fewer checkpoints than this support no correlation over steps.
CORRELATED = 6

METRICS = {
    "shipped_low": "keep sets that are surely below base at the last step, and surely still rising",
    "unrecovered": "keep sets that fell far and won next to nothing back",
    **{
        f"{name}_{role}{unit}": f"{text} {of}, of the {role} set that fell deepest"
        for role in ("keep", "task")
        for unit, of in (("", "in share of rows or tokens right"), ("_nats", "in nats of loss"))
        for name, text in (
            ("depth", "how far it fell below the first checkpoint"),
            ("recovery", "share of that which the last checkpoint won back,"),
        )
    },
    "steps_to_trough_keep": "steps from the first checkpoint to the lowest of that keep set",
    "steps_to_recover_keep": "steps from there until the share that counts as recovered is won back",
    "decoupling": "Spearman of minus the task's loss and its metric over the steps, the lowest of several sets",
    "delayed_generalisation": "1 where a task metric surely still rises after the train metric has settled",
    "settled_step": "step from which the train metric stays where it ends",
    "rise_after_settling": "most by which a task metric rose after that",
    "inefficiency": "length of the way through the weights over the distance of its ends; 1 is straight",
    "widest_angle_degrees": "largest angle of a step to the way from first to last",
    "distance": "distance of the last checkpoint's weights from the first's",
    "checkpoints": "checkpoints of the series",
}


def summary(result: Result) -> str:
    """What must survive, then the way."""
    m = result.metrics
    parts = []
    if "depth_keep" in m or "depth_keep_nats" in m:
        low, gone = m["shipped_low"], m["unrecovered"]
        if gone:
            parts.append(f"{gone:g} keep sets fell and did not come back")
        elif low:
            parts.append(f"{low:g} keep sets are still climbing out of a trough")
        else:
            deep = max(m.get("depth_keep", 0.0), 0.0)
            parts.append(f"keep rows fell by {deep:.3g} at most" if deep else "keep rows never fell below base")
    if "decoupling" in m:
        parts.append(f"loss and metric go together at {m['decoupling']:.2f}")
    if m.get("delayed_generalisation"):
        parts.append(f"the task metric still rises after step {m['settled_step']:g}, when training had settled")
    if "inefficiency" in m:
        parts.append(f"the way is {m['inefficiency']:.2f} times its straight line")
    return "; ".join(parts) or f"{m['checkpoints']} checkpoints, and nothing that could be told of them"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics import trajectory_figures

    return trajectory_figures.draw(result)


@analysis(
    "trajectory",
    question="Is the run shipped from a trough, and does its loss still tell what its metric does?",
    reading=(
        "Depth 0 says that nothing ever fell below base; a recovery of 1 that all of a trough came back, and "
        "it says nothing where the depth is noise. An inefficiency of 1 is a straight way through the weights; "
        "large values are common and no fault. Decoupling is 1 where loss and metric order the checkpoints "
        "alike, 0 where the loss tells nothing of the metric, and negative where it misleads."
    ),
    paper="arXiv:2406.14833",
    cost="a forward pass over all rows for each checkpoint, and each weight read about four times a checkpoint",
    draw=draw,
    summary=summary,
    metrics=METRICS,
)
def training_trajectory(
    series: Any,
    task: Any,
    keep: Any = None,
    train: Any = None,
    *,
    recovered: float = 0.8,
    settled: float = 0.01,
    max_length: int | None = None,
    chat_template: bool = False,
    batch_tokens: int = 16384,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Follow task and keep scores, and the weights, over the checkpoints of one run.

    A set's metric is the share of its rows that are right, or where rows have no answer the share of tokens
    that are the likeliest; its loss is in nats a row or token. Rows with answers are judged by the metric,
    others by the loss.

    Args:
        series: at least 4 checkpoints, the base first: a series, or references in order.
        task: held-out rows of what was trained: a task, a file, texts, or several of these by name.
        keep: rows of what must survive.
        train: rows that the run was trained on.
        recovered: share of a trough that counts as won back (ours).
        settled: the train metric has settled from where it stays so near to its last value (ours).
        max_length: most tokens of a row; None: what the model takes.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a batch; changes no result.
        trust_remote_code: run code that a repository brings.
        device: where the models run.
        dtype: of the models; None as stored.
        seed: nothing is drawn at random.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables: `steps` (step, label, role, set, metric, loss, rows, unit), `troughs` (role, set, measure, judged,
        depth, depth_low, recovery, steps, late slope a step with its 90 % interval), `decoupling` (set, part,
        spearman, checkpoints), `path` (step, length, angle and turn in degrees, distances to both ends).

    Raises:
        TooShortError: fewer than 4 checkpoints.
        ValueError: rows that cannot be scored, weights that are not finite, checkpoints of other models.
    """
    import pandas as pd

    if not 0 < recovered <= 1 or not 0 <= settled < 1:
        raise ValueError(f"recovered is {recovered} and settled {settled}; they are shares, above 0 and below 1")
    series, sets = series_of(series), sets_of({"task": task, "keep": keep, "train": train})
    reading = Reading(
        max_length=max_length, chat_template=chat_template, batch_tokens=batch_tokens,
        trust_remote_code=trust_remote_code, device=device, dtype=dtype,
    )  # fmt: skip

    def measure(checkpoint: Checkpoint) -> Mapping[str, np.ndarray]:
        return scores(reading.open(checkpoint), sets, reading)

    measurements = series.measured("scores", reading.key(sets), measure, progress)
    series.at_least(4, "a trajectory")
    steps, found = np.array(series.steps), curves(measurements, sets)
    notes = [] if series.stepped else ["No steps are known: the checkpoints are counted 0, 1, 2 …"]
    lows = [row for one in found if one.which[0] != "train" for row in trough_rows(steps, one, recovered)]
    parted = [row for one in found if one.which[0] == "task" for row in decoupling_rows(one)]
    metrics: dict[str, float | int] = {"checkpoints": len(series)}
    metrics |= of_troughs(lows, recovered)
    metrics |= of_decoupling(found, parted, notes)
    metrics |= of_settling(steps, found, settled, notes)
    tables = {
        "steps": pd.DataFrame(step_rows(series, found)),
        "troughs": pd.DataFrame(lows),
        "decoupling": pd.DataFrame(parted),
    }
    way = path_of(series, notes, progress)
    if way:
        steps_and_way = zip(series.steps, series.labels, way, strict=True)
        tables["path"] = pd.DataFrame([{"step": s, "label": label, **row} for s, label, row in steps_and_way])
        metrics |= of_path(way, notes)
    notes += told(lows, steps, recovered) + said(measurements, sets, series.labels)
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


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
    """What both curves of a set say: their trough, with what is surely more than noise, and the late slope."""
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
                "slope_points": slope.points,
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
    """The lowest correlation over the whole run, where there are points and movement enough to speak of one."""
    known = []
    for one in (each for each in found if each.which[0] == "task"):
        row = next(row for row in rows if row["set"] == one.which[1] and row["part"] == "whole")
        if row["checkpoints"] < CORRELATED:
            notes.append(
                f"Decoupling over {row['checkpoints']} checkpoints is no evidence and is left out; it takes "
                f"{CORRELATED}."
            )
        elif math.isnan(row["spearman"]):
            notes.append(f"Decoupling of the task rows {one.which[1]} is undefined: loss or metric is constant.")
        elif not moved(one):
            notes.append(
                f"The loss of the task rows {one.which[1]} moved by no more than its noise, so that its order "
                "over the steps tells nothing; decoupling is left out."
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
            f"The train metric settles {left} checkpoints before the end, if at all; whether held-out rows "
            f"are learnt later takes {troughs.FEWEST}."
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
            "The way through the weights is not measured: while a run goes on those of earlier steps are gone. "
            "`tunescope series` measures it on saved checkpoints."
        )
        return []
    try:
        common = strides.shared(series.checkpoints)
        squares = strides.squared_distances(series.checkpoints, common.names, progress)
    except ValueError as error:  # the scores stand without it
        notes.append(f"The way through the weights is not measured: {error}.")
        return []
    if common.left_out:
        notes.append(
            f"Not every checkpoint has, in one shape: {', '.join(common.left_out[:5])}"
            f"{' …' if len(common.left_out) > 5 else ''} ({len(common.left_out)} tensors); the way leaves them out."
        )
    return strides.path_rows(squares, len(series))


def of_path(way: Sequence[dict[str, float]], notes: list[str]) -> dict[str, float | int]:
    """What the way says as a whole."""
    found: dict[str, float | int] = {"distance": way[-1]["distance_start"]}
    times = strides.inefficiency(way)
    if math.isnan(times):
        notes.append("The last checkpoint's weights are the first's: the way has no direction and no inefficiency.")
        return found
    angles = [row["angle"] for row in way if not math.isnan(row["angle"])]
    return found | {"inefficiency": times, "widest_angle_degrees": max(angles)}


def told(rows: Sequence[Mapping[str, Any]], steps: troughs.Curve, recovered: float) -> list[str]:
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
                f"The {name} fell by {row['depth']:.3g} {unit} and have won back {row['recovery']:.0%} of it; "
                "they still rise: train on, or replay what must survive, before this is shipped."
            )
    if rows and max(row["slope_points"] for row in rows) < troughs.FEWEST:
        notes.append(
            f"The last third holds {rows[0]['slope_points']} checkpoints: its slopes have no interval, which "
            f"takes {troughs.FEWEST}, and no set can be said to be still rising."
        )
    return notes
