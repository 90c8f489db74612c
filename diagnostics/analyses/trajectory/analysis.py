"""The trajectory of a run: troughs of what must survive, detours in weights, metrics that part from the loss.

A keep score that fell and is still climbing back says that the run is shipped from a trough. The way through
the weights is compared with the straight line between its ends. Where the task's loss improves and its metric
does not, the loss is no longer what to stop by. Every formula is ours, from `further_diagnostics`; the papers
show curves: Guo et al., arXiv:2406.14833 (the stability gap); Gupta et al., arXiv:2308.04014 (re-warming);
Frankle et al., arXiv:1903.01611 (distance and angle); Isik et al., arXiv:2402.04177 (loss against BLEU).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.analyses.trajectory import tables as made
from diagnostics.core.analysis import Result, analysis
from diagnostics.evaluation.checkpoint_scores import (
    ScoringOptions,
    Which,
    curves,
    reading_notes,
    scores,
    sets_of,
)
from diagnostics.evaluation.sets import drawn
from diagnostics.execution.workers import checkpoint_runner
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.series import series_of
from probes.errors import InputError
from probes.text.rows import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go

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
    "decoupling": "Spearman of minus the task's loss and its metric over the steps, the lowest of sets",
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
            parts.append(f"{gone} keep {'set' if gone == 1 else 'sets'} fell and did not come back")
        elif low:
            parts.append(f"{low} keep {'set is' if low == 1 else 'sets are'} still climbing out of a trough")
        else:
            deep = {"": m.get("depth_keep", 0.0), " nats": m.get("depth_keep_nats", 0.0)}
            fell = " and ".join(f"{depth:.3g}{unit}" for unit, depth in deep.items() if depth > 0)
            parts.append(f"keep rows fell by {fell} at most" if fell else "keep rows never fell below base")
    if "decoupling" in m:
        parts.append(f"loss and metric go together at {m['decoupling']:.2f}")
    if m.get("delayed_generalisation"):
        parts.append(
            f"the task metric still rises after step {m['settled_step']:g}, when training had settled"
        )
    if "inefficiency" in m:
        parts.append(f"the way is {m['inefficiency']:.2f} times its straight line")
    return "; ".join(parts) or f"{m['checkpoints']} checkpoints, and nothing that could be told of them"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.trajectory import figures

    return figures.draw(result)


@analysis(
    "trajectory",
    question="Is the run shipped from a trough, and does its loss still tell what its metric does?",
    reading=(
        "Depth 0 says that nothing ever fell below base; a recovery of 1 that all of a trough came back, and "
        "it says nothing where the depth is noise. An inefficiency of 1 is a straight way through weights; "
        "large values are common and no fault. Decoupling is 1 where loss and metric order the checkpoints "
        "alike, 0 where the loss tells nothing of the metric, and negative where it misleads."
    ),
    paper="arXiv:2406.14833",
    cost="for each checkpoint a forward pass over all rows, and four readings of its weights",
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
    rows: int | None = 2000,
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
        rows: most rows of a set that are scored, drawn at random (ours); None: all.
        recovered: share of a trough that counts as won back (ours).
        settled: the train metric has settled from where it stays so near to its last value (ours).
        max_length: most tokens of a row; None: what the model takes.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a batch; changes no result.
        trust_remote_code: run code that a repository brings.
        device: where the models run.
        dtype: of the models; None as stored.
        seed: of the choice of rows.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables: `steps` (step, label, role, set, metric, loss, rows, unit), `troughs` (role, set, measure, judged,
        depth, depth_low, recovery, steps, late slope a step with its 90 % interval), `decoupling` (set, part,
        spearman, checkpoints), `path` (step, length, angle and turn in degrees, distances to both ends).

    Raises:
        TooShortError: fewer than 4 checkpoints.
        InputError: rows that cannot be scored.
    """
    import pandas as pd

    if not 0 < recovered <= 1 or not 0 <= settled < 1:
        raise InputError(
            f"recovered is {recovered} and settled {settled}; they are shares, the first above 0, the other "
            "below 1"
        )
    if rows is not None and rows < 1:
        raise InputError(f"rows is {rows}; it is at least 1")
    series, given = series_of(series), sets_of({"task": task, "keep": keep, "train": train})
    sets = {which: drawn(one, rows, seed) for which, one in given.items()}
    reading = ScoringOptions(
        max_length=max_length, chat_template=chat_template, batch_tokens=batch_tokens,
        trust_remote_code=trust_remote_code, device=device, dtype=dtype,
    )  # fmt: skip
    measure = partial(_measured, sets=sets, reading=reading)
    measurements = series.measured(
        "scores", reading.key(sets), measure, progress, least=(4, "a trajectory"),
        each=checkpoint_runner(series, device),
    )  # fmt: skip
    steps, found = np.array(series.steps), curves(measurements, sets)
    notes = [] if series.stepped else ["No steps are known: the checkpoints are counted 0, 1, 2 …"]
    lows = [
        row for one in found if one.which[0] != "train" for row in made.trough_rows(steps, one, recovered)
    ]
    parted = [row for one in found if one.which[0] == "task" for row in made.decoupling_rows(one)]
    metrics: dict[str, float | int] = {"checkpoints": len(series)}
    metrics |= made.of_troughs(lows, recovered)
    metrics |= made.of_decoupling(found, parted, notes)
    metrics |= made.of_settling(steps, found, settled, notes)
    tables = {
        "steps": pd.DataFrame(made.step_rows(series, found)),
        "troughs": pd.DataFrame(lows),
        "decoupling": pd.DataFrame(parted),
    }
    way = made.path_of(series, notes, progress)
    if way:
        steps_and_way = zip(series.steps, series.labels, way, strict=True)
        tables["path"] = pd.DataFrame([{"step": s, "label": label, **row} for s, label, row in steps_and_way])
        metrics |= made.of_path(way, notes)
    notes += made.trough_notes(lows, recovered) + reading_notes(measurements, sets, series.labels)
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


def _measured(
    checkpoint: Checkpoint, *, sets: Mapping[Which, Task], reading: ScoringOptions
) -> Mapping[str, np.ndarray]:
    """The scores of one checkpoint, here or on a worker."""
    return scores(reading.open(checkpoint), sets, reading)
