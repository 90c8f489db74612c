"""Training dynamics of a run of any architecture: numerical stalls, and movement of the features.

Softmax collapse and logit scaling (Prieto et al., arXiv:2501.04697), the tangent kernel (Kumar et al.,
arXiv:2310.06110) and local complexity (Humayun et al., arXiv:2402.15555). The linearity gap, the logit scale
and the thresholds of flags are ours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analyses.dynamics import tables as dynamics_tables
from diagnostics.analyses.dynamics.figures import draw
from diagnostics.analyses.dynamics.measures import Arrays, DynamicsProbes, locate
from diagnostics.analyses.dynamics.notes import SCALING, notes_of
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.evaluation.checkpoint_scores import ScoringOptions, curves, reading_notes
from diagnostics.evaluation.sets import draw_rows, load_sets
from diagnostics.execution.workers import checkpoint_runner
from diagnostics.numerics import weight_distances
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.series import CheckpointSeries, series_of
from probes.errors import InputError
from probes.models.editable import Editable

DTYPES = ("float32", "float64", "bfloat16", "float16")
# Share of collapsed labels from which training counts as stalled, as in the reference.
STALLED = 0.5

LAST = (
    "nlm_unembedding", "nlm_cosine", "movement", "kernel_cka", "kernel_cka_debiased", "kernel_alignment",
    "linearity_gap", "local_complexity", "radius",
)  # fmt: skip

METRICS = {
    "stalled": "1 if at the last step at least half of the labels have a collapsed softmax",
    "logit_scaling": "1 if the cosine at the unembedding is 0.9 or more and all train labels are right",
    "collapsed": "share of labels with a collapsed softmax at the last step; of train rows if given",
    "collapsed_right": "share where the remaining class is also the label",
    "collapse_step": "first step with a collapsed softmax",
    "nlm_unembedding": "cosine of minus the gradient with the unembedding itself at the last step",
    "nlm_cosine": "the same for all matrices as one vector",
    "logit_scale": "mean standard deviation of the logits over the classes at the last step",
    "logit_scale_ratio": "the same over that at the first step",
    "movement": "distance of the last weights from the first, over the norm of the first",
    "kernel_cka": "centred alignment of the last tangent kernel with the first; 1: no feature moved",
    "kernel_cka_debiased": "the same without the bias of few rows",
    "kernel_alignment": "alignment of the last tangent kernel with the labels",
    "kernel_alignment_rise": "its rise from the first step",
    "linearity_gap": "share of the change in outputs that the first step's gradients do not predict",
    "local_complexity": "MLP units per token that switch near the inputs at the last step",
    "local_complexity_ratio": "the same over that at the first step",
    "radius": "distance by which embeddings are moved for local complexity at the last step",
    "checkpoints": "number of checkpoints",
}


def summary(result: Result) -> str:
    """Softmax and gradient first, then what moved."""
    m, parts = result.metrics, []
    if "collapsed" in m:
        collapsed = f"{m['collapsed']:.0%} of labels have a collapsed softmax"
        parts.append(collapsed if m["collapsed"] else "no softmax has collapsed")
    if "nlm_unembedding" in m:
        scaling = " (the loss only scales logits)" if m.get("logit_scaling") else ""
        parts.append(f"cosine of gradient and unembedding {m['nlm_unembedding']:.2f}{scaling}")
    if "movement" in m:
        parts.append(f"weights moved by {m['movement']:.2g} of their norm")
    if "kernel_cka" in m:
        parts.append(f"CKA of the tangent kernel with the first {m['kernel_cka']:.2f}")
    if "linearity_gap" in m:
        parts.append(f"linearity gap {m['linearity_gap']:.2g}")
    return "; ".join(parts) or f"{m['checkpoints']} checkpoints, nothing measurable"


@analysis(
    "dynamics",
    question="Is training stalled for numerical reasons, and do the model's features still move?",
    reading=(
        "A collapsed share of 0 is healthy; from 0.5 on most labels give no gradient. A cosine near 1 at the "
        "unembedding, with all train labels right, means that training only scales logits. A kernel CKA near "
        "1 with a linearity gap near 0 is a lazy run: its features do not move. A gap near 1 is the "
        "opposite. Compare CKA, gap and local complexity within a run only: no publication says which value "
        "is good."
    ),
    paper="arXiv:2501.04697",
    cost=(
        "for each checkpoint: two forward passes over the rows, a gradient of the train rows with a copy of "
        "the weights, one gradient for each of 32 probe rows (repeated if they do not fit into 1 GB "
        "together), one forward differentiation with a second copy, and 40 passes over the probe rows"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"rows": 24, "probes": 4, "outputs": 4, "batch": 16, "vertices": 4},
        absolute={"kernel_cka": 1e-2, "linearity_gap": 1e-2, "stalled": 0},
        relative={"logit_scale": 1e-3, "movement": 1e-4},
    ),
)
def training_dynamics(
    series: Any,
    task: Any,
    train: Any = None,
    *,
    rows: int = 1000,
    batch: int = 1000,
    probes: int = 32,
    outputs: int = 16,
    kernel: bool = True,
    linearity: bool = True,
    radius: float = 0.05,
    vertices: int = 40,
    loss_dtype: str = "float32",
    options: ScoringOptions = ScoringOptions(dtype="float32"),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Follow logits, gradients, the tangent kernel and local complexity over the checkpoints of one run.

    Args:
        series: at least 2 checkpoints; all are compared with the first.
        task: held-out rows of the trained task: a task, a file, texts, or several of these by name.
        train: rows of the training data; without them no gradient is measured.
        rows: most scored rows of a set, drawn at random (ours).
        batch: most train rows for the gradient (ours), from the first train set. With fewer rows noise lowers
            the cosine.
        probes: task rows of the kernel, the gap and local complexity (32 to 64 are usual), from the first
            task set.
        outputs: random projections of the logits for the linearity gap (ours); the kernel uses the first.
        kernel: compute the tangent kernel, the most expensive measure.
        linearity: compute the linearity gap.
        radius: of local complexity, as a share of the mean norm of an embedding (ours; published for
            pixels: 0.005, and 0.05 to 5).
        vertices: of local complexity, two for each direction (published: 40 and 50).
        loss_dtype: dtype of the softmax in the training loss; float32 in transformers.
        options: how rows are read and how models run on them.
        dtype: of the models; None as stored. In half precision gradients and outputs are coarse.
        seed: of rows, projections and directions.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables:
        `steps`: one row a checkpoint: step, label, loss_<role> (nats per unit), metric_<role> (share),
            logit_scale_<role>, margin_<role> (logits), collapsed_<role>, collapsed_right_<role> (shares of
            labels), nlm_cosine, nlm_unembedding (cosines), movement (share of the first norm), kernel_cka,
            kernel_cka_debiased, kernel_alignment (at most 1), linearity_gap (share), local_complexity (units
            per token), radius (in embeddings).
        `tensors`: one row a matrix and checkpoint: step, label, tensor, movement (share of the first norm),
            layer (NaN outside the blocks), component, unembedding (boolean), nlm_cosine.
        `layers`: one row a layer and checkpoint: step, label, layer, local_complexity (units per token),
            share (of its units), units (count).

    Raises:
        TooShortError: a series of one.
        InputError: a parameter out of range, or rows that cannot be scored.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> run = [BUNDLED / f"grokking/parity/checkpoint-{step}" for step in (0, 50)]
        >>> fast = {"rows": 4, "probes": 2, "vertices": 2, "kernel": False, "linearity": False}
        >>> training_dynamics(run, BUNDLED / "grokking/held-out.jsonl", **fast).metrics["collapsed"]
        0.0
    """
    check(rows=rows, batch=batch, probes=probes, outputs=outputs, vertices=vertices, radius=radius)
    if loss_dtype not in DTYPES:
        raise InputError(f"loss_dtype is {loss_dtype!r}; it is one of {', '.join(DTYPES)}")
    series, loaded = series_of(series), load_sets({"task": task, "train": train})
    sets = {key: draw_rows(rows_of, rows, seed) for key, rows_of in loaded.items()}
    trained = [rows_of for (role, _), rows_of in loaded.items() if role == "train"]
    probe = DynamicsProbes(
        sets=sets, batch=draw_rows(trained[0], batch, seed) if trained else None,
        rows=draw_rows(next(iter(loaded.values())), probes, seed), reading=options, loss_dtype=loss_dtype,
        outputs=outputs, kernel=kernel, radius=radius, vertices=vertices, seed=seed,
    )  # fmt: skip
    measurements = series.measured(
        "dynamics", probe.key(), probe.measure, progress, least=(2, "a trend"),
        run_calls=checkpoint_runner(series, options.device),
    )  # fmt: skip
    measurements = [comparable(arrays, measurements[0], len(sets)) for arrays in measurements]
    notes: list[str] = []
    moves, positions = movements(series, notes, progress)
    gaps = expansions(series, probe, progress) if linearity else []
    by_set = curves(measurements, sets)
    labels = list(zip(series.steps, series.labels, strict=True))
    steps = [{"step": step, "label": label} for step, label in labels]
    for role in dict.fromkeys(which[0] for which in sets):
        columns = dynamics_tables.logit_columns(measurements, by_set, role)
        steps = [row | more for row, more in zip(steps, columns, strict=True)]
    first = measurements[0]
    for at, (row, arrays) in enumerate(zip(steps, measurements, strict=True)):
        row |= dynamics_tables.alignment_columns(arrays)
        row["movement"] = math.nan
        if moves:
            row["movement"] = dynamics_tables.relative(moves[at]["moved"].sum(), moves[at]["size"].sum())
        row |= dynamics_tables.kernel_columns(arrays, first, probe.rows)
        row["linearity_gap"] = dynamics_tables.linearity_gap(arrays, first, gaps[at]) if gaps else math.nan
        row |= dynamics_tables.complexity_columns(arrays)
    table = pd.DataFrame(steps)
    tables = {
        "steps": table,
        "tensors": pd.DataFrame(dynamics_tables.tensor_rows(labels, measurements, moves, positions)),
        "layers": pd.DataFrame(dynamics_tables.layer_rows(labels, measurements)),
    }
    tables = {name: rows_of for name, rows_of in tables.items() if len(rows_of)}
    saved = len(series.checkpoints) == len(series)
    notes = notes_of(table, measurements, gaps, probe, saved=saved, stepped=series.stepped) + notes
    notes += reading_notes(measurements, sets, series.labels)
    return Result(metrics=metrics_of(table, bool(trained)), tables=tables, notes=tuple(notes))


def comparable(arrays: Arrays, first: Arrays, sets: int) -> Arrays:
    """A measurement without what is compared with the first checkpoint's, if that read other tokens."""
    if all(str(arrays[f"score.{i}.ids"]) == str(first[f"score.{i}.ids"]) for i in range(sets)):
        return arrays
    reason = np.array("it splits rows into other tokens than the first checkpoint")
    compared = ("outputs", "kernel")
    rest = {name: value for name, value in arrays.items() if name.partition(".")[0] not in compared}
    return rest | {f"{name}.missing": reason for name in compared if f"{name}.values" in arrays}


def check(*, radius: float, **counts: int) -> None:
    """Refuse parameters out of range."""
    if not 0 <= radius < math.inf:
        raise InputError(f"radius is {radius}; it is a share of an embedding's norm, 0 or more")
    for name, count in counts.items():
        least = 2 if name in ("probes", "vertices") else 1
        if count < least:
            raise InputError(f"{name} is {count}; it is at least {least}")


def movements(
    series: CheckpointSeries, notes: list[str], progress: Callable[[int, int, str], None] | None
) -> tuple[list[Arrays], Mapping[str, tuple[int | None, str, bool]]]:
    """Movement of each tensor from the first checkpoint; empty where its weights are not kept."""
    if len(series.checkpoints) < len(series):
        return [], {}
    first = series.checkpoints[0]
    try:
        common = weight_distances.shared(series.checkpoints)
    except InputError as error:
        notes.append(f"Movement is not measured: {error}.")
        return [], {}
    notes += common.notes("Movement")
    distances = series.measured(
        "movement",
        {"first": first.stamp(), "names": list(common.names), "rows": dict(common.rows)},
        lambda checkpoint: dynamics_tables.movement(common, series.checkpoints.index(checkpoint)),
        progress,
    )
    return distances, locate({name: first.headers[name] for name in common.names}, first.config)


def expansions(
    series: CheckpointSeries, probe: DynamicsProbes, progress: Callable[[int, int, str], None] | None
) -> list[Arrays]:
    """J₀ Δθ towards each checkpoint; empty where the first checkpoint's weights are not kept."""
    if len(series.checkpoints) < len(series):
        return []
    first = series.checkpoints[0]
    opened: list[Editable] = []

    def measure(checkpoint: Checkpoint) -> Arrays:
        if checkpoint is first:
            return {}
        if not opened:  # only when needed: all expansions may be stored already
            opened.append(probe.reading.open(first))
        return probe.gap(opened[0], checkpoint)

    return series.measured("expansion", {"first": first.stamp()} | probe.key(), measure, progress)


def metrics_of(steps: pd.DataFrame, trained: bool) -> dict[str, float | int]:
    """The last step, and changes from the first; unknown values are left out."""
    role = "train" if trained else "task"
    first, last = steps.iloc[0], steps.iloc[-1]
    collapsed = steps[f"collapsed_{role}"]
    values: dict[str, float] = {
        **{name: last[f"{name}_{role}"] for name in ("collapsed", "collapsed_right", "logit_scale")},
        "logit_scale_ratio": ratio(last[f"logit_scale_{role}"], first[f"logit_scale_{role}"]),
        "local_complexity_ratio": ratio(last["local_complexity"], first["local_complexity"]),
        "kernel_alignment_rise": last["kernel_alignment"] - first["kernel_alignment"],
        **{name: last[name] for name in LAST},
    }
    if (collapsed > 0).any():
        values["collapse_step"] = steps["step"][collapsed > 0].iloc[0]
    metrics: dict[str, float | int] = {"checkpoints": len(steps)}
    metrics |= {name: float(value) for name, value in values.items() if not math.isnan(value)}
    if "collapsed" in metrics:
        metrics["stalled"] = int(metrics["collapsed"] >= STALLED)
    if trained and "nlm_unembedding" in metrics:
        metrics["logit_scaling"] = int(metrics["nlm_unembedding"] >= SCALING and last["metric_train"] == 1)
    return metrics


def ratio(last: float, first: float) -> float:
    """last / first; NaN unless first is above 0."""
    return last / first if first > 0 else math.nan
