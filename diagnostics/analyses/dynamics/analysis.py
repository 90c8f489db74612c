"""The dynamics of a run: is the training loss stuck for numerical reasons, and is the model still changing?

The companions of grokking for models of any kind: whether the softmax has collapsed and the loss only scales
logits (Prieto et al., arXiv:2501.04697), whether features still move (Kumar et al., arXiv:2310.06110), and
whether the pieces of its function move away from what it reads (Humayun et al., arXiv:2402.15555). The
linearity gap, the logit scale and all numbers of flags are ours.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from diagnostics.analyses.dynamics import tables as made
from diagnostics.analyses.dynamics.measures import Arrays, DynamicsProbes, located
from diagnostics.analyses.dynamics.notes import SCALING, notes_of
from diagnostics.core.analysis import Result, analysis
from diagnostics.evaluation.checkpoint_scores import ScoringOptions, curves, reading_notes, sets_of
from diagnostics.evaluation.sets import drawn
from diagnostics.execution.workers import checkpoint_runner
from diagnostics.numerics import weight_distances
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.series import CheckpointSeries, series_of
from probes.errors import InputError
from probes.models.editable import Editable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

DTYPES = ("float32", "float64", "bfloat16", "float16")
# Share of collapsed labels from which the training counts as stuck: where the reference draws its mark.
STALLED = 0.5

LAST = (
    "nlm_unembedding", "nlm_cosine", "movement", "kernel_cka", "kernel_cka_debiased", "kernel_alignment",
    "linearity_gap", "local_complexity", "radius",
)  # fmt: skip

METRICS = {
    "stalled": "1 where at the last step at least half of the labels have a collapsed softmax",
    "logit_scaling": "1 where the cosine at the unembedding is 0.9 or more and all train labels are right",
    "collapsed": "share of labels whose softmax has collapsed, at the last step; of train rows, if any",
    "collapsed_right": "the same, where besides the label is the class that is left",
    "collapse_step": "first step with a collapsed softmax",
    "nlm_unembedding": "cosine of minus the gradient with the unembedding itself, at the last step",
    "nlm_cosine": "the same of all matrices as one vector",
    "logit_scale": "mean standard deviation of the logits over the classes, at the last step",
    "logit_scale_ratio": "the same over that at the first step",
    "movement": "distance of the last weights from the first, over the length of the first",
    "kernel_cka": "centred alignment of the last tangent kernel with the first; 1: no feature moved",
    "kernel_cka_debiased": "the same without the bias that few rows give it",
    "kernel_alignment": "alignment of the last tangent kernel with the labels",
    "kernel_alignment_rise": "by how much that rose since the first step",
    "linearity_gap": "share of the change in outputs that the first step's gradients do not foretell",
    "local_complexity": "MLP units that switch near what is read, a token, at the last step",
    "local_complexity_ratio": "the same over that at the first step",
    "radius": "how near: by how much embeddings were moved, in their own units, at the last step",
    "checkpoints": "checkpoints of the series",
}


def summary(result: Result) -> str:
    """Numbers first, then what moved."""
    m, parts = result.metrics, []
    if "collapsed" in m:
        parts.append(
            f"{m['collapsed']:.0%} of labels have a collapsed softmax"
            if m["collapsed"]
            else "no softmax has collapsed"
        )
    if "nlm_unembedding" in m:
        what = " (it only scales logits)" if m.get("logit_scaling") else ""
        parts.append(f"the unembedding's gradient is along itself at {m['nlm_unembedding']:.2f}{what}")
    if "movement" in m:
        parts.append(f"weights moved by {m['movement']:.2g} of their length")
    if "kernel_cka" in m:
        parts.append(f"tangent kernel at {m['kernel_cka']:.2f} of the first")
    if "linearity_gap" in m:
        parts.append(f"linearity gap {m['linearity_gap']:.2g}")
    return "; ".join(parts) or f"{m['checkpoints']} checkpoints, of which nothing could be measured"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.dynamics import figures

    return figures.draw(result)


@analysis(
    "dynamics",
    question="Is training stuck for numerical reasons, and do the model's features still move?",
    reading=(
        "A collapsed softmax of 0 is sound; from one half on the loss no longer pushes most labels. A cosine "
        "near 1 at the unembedding, with all train labels right, says that training only scales logits. A "
        "kernel CKA near 1 and a linearity gap near 0 are a lazy run, whose features stay as they were; a "
        "gap near 1 is a rewrite. CKA, gap and local complexity are trends to be compared within a run: "
        "nothing published says which value is good."
    ),
    paper="arXiv:2501.04697",
    cost=(
        "a checkpoint: two forward passes over the rows, a gradient of the train rows with a copy of the "
        "weights, for each of 32 rows a gradient of its own (as often as all of these do not fit into 1 GB), "
        "one forward differentiation with a second copy, 40 passes over these rows"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
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
    max_length: int | None = None,
    chat_template: bool = False,
    batch_tokens: int = 16384,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = "float32",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Follow logits, gradients, the tangent kernel and local complexity over the checkpoints of one run.

    Args:
        series: at least 2 checkpoints, the first being what others are compared with.
        task: held-out rows of what was trained: a task, a file, texts, or several of these by name.
        train: rows that the run was trained on; without them nothing is said of its gradient.
        rows: most rows of a set that are scored, drawn at random (ours).
        batch: most train rows whose gradient is taken (ours); of several sets, of the first. The cosine
            falls with fewer rows, whose gradient is noise across the weights.
        probes: task rows of the kernel, the gap and local complexity (32 to 64 are usual); of several sets,
            of the first.
        outputs: random projections of the logits on which the linearity gap is measured (ours); the kernel
            is that of the first.
        kernel: compute the tangent kernel, the dearest measure.
        linearity: compute the linearity gap.
        radius: of local complexity, as a share of the mean length of an embedding (ours; published for
            pixels: 0.005, and 0.05 to 5).
        vertices: of local complexity, two for each direction (published: 40 and 50).
        loss_dtype: in which the training's loss takes its softmax; transformers takes float32.
        max_length: most tokens of a row; None: what the model takes.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a pass; changes no result.
        trust_remote_code: run code that a repository brings.
        device: where the models run.
        dtype: of the models; None as stored. In half precision gradients and outputs are coarse.
        seed: of rows, projections and directions.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables: `steps` (step, label, and a column a measure, those of rows with their role behind), `tensors`
        (step, tensor, layer, component, unembedding, nlm_cosine, movement), `layers` (step, layer,
        local_complexity, share, units).

    Raises:
        TooShortError: a series of one.
        InputError: a parameter out of range, or rows that cannot be scored.
    """
    import pandas as pd

    checked(rows=rows, batch=batch, probes=probes, outputs=outputs, vertices=vertices, radius=radius)
    if loss_dtype not in DTYPES:
        raise InputError(f"loss_dtype is {loss_dtype!r}; it is one of {', '.join(DTYPES)}")
    series, given = series_of(series), sets_of({"task": task, "train": train})
    sets = {which: drawn(one, rows, seed) for which, one in given.items()}
    trained = [one for which, one in given.items() if which[0] == "train"]
    probe = DynamicsProbes(
        sets=sets, batch=drawn(trained[0], batch, seed) if trained else None,
        rows=drawn(next(iter(given.values())), probes, seed),
        reading=ScoringOptions(
            max_length=max_length, chat_template=chat_template, batch_tokens=batch_tokens,
            trust_remote_code=trust_remote_code, device=device, dtype=dtype,
        ),
        loss_dtype=loss_dtype, outputs=outputs, kernel=kernel, radius=radius, vertices=vertices, seed=seed,
    )  # fmt: skip
    measurements = series.measured(
        "dynamics", probe.key(), probe.measure, progress, least=(2, "a trend"),
        run_calls=checkpoint_runner(series, device),
    )  # fmt: skip
    notes: list[str] = []
    moves, places = moved(series, notes, progress)
    gaps = expansions(series, probe, progress) if linearity else []
    found = curves(measurements, sets)
    labels = list(zip(series.steps, series.labels, strict=True))
    steps = [{"step": step, "label": label} for step, label in labels]
    for role in dict.fromkeys(which[0] for which in sets):
        steps = [
            row | more for row, more in zip(steps, made.of_logits(measurements, found, role), strict=True)
        ]
    for at, (row, one) in enumerate(zip(steps, measurements, strict=True)):
        row |= made.of_alignment(one)
        row["movement"] = whole(moves[at]) if moves else math.nan
        row |= made.of_kernel(one, measurements[0], probe.rows)
        row["linearity_gap"] = made.linearity_gap(one, measurements[0], gaps[at]) if gaps else math.nan
        row |= made.of_complexity(one)
    table = pd.DataFrame(steps)
    tables = {"steps": table}
    tensors = made.tensor_rows(labels, measurements, moves, places)
    layers = made.layer_rows(labels, measurements)
    tables |= {name: pd.DataFrame(each) for name, each in (("tensors", tensors), ("layers", layers)) if each}
    saved = len(series.checkpoints) == len(series)
    notes = notes_of(table, measurements, gaps, probe, saved=saved, stepped=series.stepped) + notes
    notes += reading_notes(measurements, sets, series.labels)
    return Result(metrics=metrics_of(table, bool(trained)), tables=tables, notes=tuple(notes))


def checked(*, radius: float, **counts: int) -> None:
    """Refuse what is out of range.

    Raises:
        InputError: names the parameter.
    """
    if not 0 <= radius < math.inf:
        raise InputError(f"radius is {radius}; it is a share of an embedding's length, 0 or more")
    least = {"probes": 2, "vertices": 2}
    for name, count in counts.items():
        if count < least.get(name, 1):
            raise InputError(f"{name} is {count}; it is at least {least.get(name, 1)}")


def moved(
    series: CheckpointSeries, notes: list[str], progress: Callable[[int, int, str], None] | None
) -> tuple[list[Arrays], Mapping[str, tuple[int | None, str, bool]]]:
    """How far each tensor is from the first checkpoint's; nothing where the first's weights are gone."""
    if len(series.checkpoints) < len(series):
        return [], {}
    first = series.checkpoints[0]
    try:
        names = weight_distances.shared(series.checkpoints).names
    except InputError as error:
        notes.append(f"Movement is not measured: {error}.")
        return [], {}
    found = series.measured(
        "movement",
        {"first": first.stamp(), "names": list(names)},
        lambda checkpoint: made.movement(first, checkpoint, names),
        progress,
    )
    return found, located({name: first.headers[name] for name in names}, first.config)


def whole(moves: Arrays) -> float:
    """‖θ − θ₀‖ / ‖θ₀‖ over all tensors."""
    size = float(moves["size"].sum())
    return math.sqrt(float(moves["moved"].sum()) / size) if size > 0 else math.nan


def expansions(
    series: CheckpointSeries, probe: DynamicsProbes, progress: Callable[[int, int, str], None] | None
) -> list[Arrays]:
    """J₀ Δθ towards each checkpoint; nothing where the first's weights are gone."""
    if len(series.checkpoints) < len(series):
        return []
    first = series.checkpoints[0]
    held: list[Editable] = []

    def measure(checkpoint: Checkpoint) -> Arrays:
        if checkpoint is first:
            return {}
        if not held:  # not before it is needed: a run that goes on may need none
            held.append(probe.reading.open(first))
        return probe.gap(held[0], checkpoint)

    return series.measured("expansion", {"first": first.stamp()} | probe.key(), measure, progress)


def metrics_of(steps: "pd.DataFrame", trained: bool) -> dict[str, float | int]:
    """The last step, and what changed since the first; what is not known is left out."""
    role = "train" if trained else "task"
    first, last = steps.iloc[0], steps.iloc[-1]
    collapsed = steps[f"collapsed_{role}"]
    found: dict[str, float] = {
        "collapsed": last[f"collapsed_{role}"],
        "collapsed_right": last[f"collapsed_right_{role}"],
        "logit_scale": last[f"logit_scale_{role}"],
        "logit_scale_ratio": ratio(last[f"logit_scale_{role}"], first[f"logit_scale_{role}"]),
        "local_complexity_ratio": ratio(last["local_complexity"], first["local_complexity"]),
        "kernel_alignment_rise": last["kernel_alignment"] - first["kernel_alignment"],
        **{name: last[name] for name in LAST},
    }
    if (collapsed > 0).any():
        found["collapse_step"] = steps["step"][collapsed > 0].iloc[0]
    metrics: dict[str, float | int] = {"checkpoints": len(steps)}
    metrics |= {name: float(value) for name, value in found.items() if not math.isnan(value)}
    if "collapsed" in metrics:
        metrics["stalled"] = int(metrics["collapsed"] >= STALLED)
    if trained and "nlm_unembedding" in metrics:
        metrics["logit_scaling"] = int(metrics["nlm_unembedding"] >= SCALING and last["metric_train"] == 1)
    return metrics


def ratio(last: float, first: float) -> float:
    """NaN where there was nothing at first."""
    return last / first if first > 0 else math.nan
