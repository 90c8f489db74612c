"""Abrupt sparsification: does the share of negligible weights jump at some checkpoint of a run?

The paper (Jaiswal et al. 2023, arXiv:2306.03805) sees its count of zero weights jump, and states nowhere
below which magnitude a weight counts as zero. So four measures are given (ours): two in the weights' own
unit, which decay alone also raises, and two that a common scale does not change.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from diagnostics.core.analysis import NotApplicableError, Result, analysis
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, line
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.series import series_of
from probes.errors import InputError
from probes.files.layout import Part
from probes.progress import Progress

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Below it a weight counts as near zero, in its own unit, and as a share of the rms of its matrix.
NEAR, SMALL = 1e-3, 0.1
# Of a modified z-score (Iglewicz and Hoaglin's mark), and of the difference itself.
OUTLYING, LEAST = 3.5, 0.01
# Entries looked at together.
CHUNK = 2**22

# column -> what it says
MEASURES = {
    "zero": "share of weights that are exactly 0",
    "near_zero": f"share below {NEAR:g} in magnitude; weight decay alone raises it",
    "small": f"share below {SMALL:g} of the rms of their matrix, 0.080 for normal weights; free of scale",
    "hoyer": "Hoyer index, 0 all alike and 1 all but one are 0, 0.202 for normal weights; free of scale",
}
SCALE_FREE = ("small", "hoyer")


METRICS = {
    "jumps": "checkpoints at which a scale-free measure jumps",
    "jump": "which is the first of these, counted from 0",
    "checkpoints": "how many were looked at",
    **{f"{name}_rise": f"last minus first: {what}" for name, what in MEASURES.items()},
}


def in_a_line(result: Result) -> str:
    """Whether a scale-free measure jumps, and how far each rose."""
    count = result.metrics["jumps"]
    jumped = "no checkpoint jumps" if not count else f"{count} jump{'s' if count > 1 else ''}"
    rises = [
        f"{name} {result.metrics[f'{name}_rise']:+.4f}"
        for name in MEASURES
        if f"{name}_rise" in result.metrics
    ]
    return ", ".join([jumped, *rises])


def draw(result: Result) -> "dict[str, go.Figure]":
    """The four measures over the run, jumps marked."""
    table = result.tables["checkpoints"]
    figure = theme.figure(
        "Negligible weights over the run; a star is a jump", "step", "share of weights, or index"
    )
    for (name, meaning), color, symbol in zip(MEASURES.items(), theme.COLORWAY, theme.SYMBOLS, strict=False):
        jump, hover = table[f"{name}_jump"], f"{{label}}: {{y:.4f}}<extra>{meaning}</extra>"
        marker = {"color": color, "size": np.where(jump, 13, 7), "symbol": np.where(jump, "star", symbol)}
        line(figure, table, "step", name, Style(name, color), hover, marker=marker)
    return {"sparseness": figure}


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """How sparse one matrix is.

    Attributes:
        zero, near_zero, small: counts.
        hoyer: (√n − l1/l2) / (√n − 1); NaN for a single entry, or where all are 0.
    """

    entries: int
    zero: int
    near_zero: int
    small: int
    rms: float
    hoyer: float


def sparse(weights: Float[Tensor, "..."]) -> Sparse:
    """Measure one matrix, a part at a time; exact zeros count as small whatever the scale.

    Raises:
        InputError: an entry is NaN or infinite.
    """
    flat = weights.flatten()
    entries, l1, square = flat.numel(), 0.0, 0.0
    for part in flat.split(CHUNK):
        size = part.double().abs_()
        l1 += float(size.sum())
        square += float(size.square_().sum())
    if not math.isfinite(l1 + square):
        raise InputError("holds a NaN or an infinity")
    rms = math.sqrt(square / entries) if entries else 0.0
    zero = near_zero = small = 0
    for part in flat.split(CHUNK):
        size = part.double().abs_()
        zeros = int((size == 0).sum())
        zero += zeros
        near_zero += int((size < NEAR).sum())
        small += int((size < SMALL * rms).sum()) if rms else zeros
    root = math.sqrt(entries)
    hoyer = (root - l1 / math.sqrt(square)) / (root - 1) if square and entries > 1 else math.nan
    return Sparse(entries=entries, zero=zero, near_zero=near_zero, small=small, rms=rms, hoyer=hoyer)


def sparse_checkpoint(
    checkpoint: Checkpoint,
    parts: Sequence[Part] = ("block",),
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Every measure of a checkpoint over its matrices in these parts, by entries; one matrix in memory.

    Raises:
        InputError: no such matrix, or weights that are no finite floating-point numbers.
    """
    chosen = [name for name, matrix in checkpoint.matrices.items() if matrix.part in parts]
    if not chosen:
        raise NotApplicableError(f"{checkpoint.ref}: has no matrix in {', '.join(parts)}")
    found: list[Sparse] = []
    for done, name in enumerate(chosen):
        if progress:
            progress(done, len(chosen), name)
        weights = checkpoint.matrix(name)
        if not weights.is_floating_point():
            raise InputError(
                f"{checkpoint.ref}: {name} holds {str(weights.dtype).removeprefix('torch.')}, which are no "
                "weights yet; give the checkpoint in floating point"
            )
        try:
            found.append(sparse(weights))
        except ValueError as error:
            raise InputError(f"{checkpoint.ref}: {name} {error}") from error
    entries = sum(each.entries for each in found)
    shares = {
        name: sum(getattr(each, name) for each in found) / entries for name in MEASURES if name != "hoyer"
    }
    known = [each for each in found if not math.isnan(each.hoyer)]
    weights_of = sum(each.entries for each in known)
    hoyer = sum(each.entries * each.hoyer for each in known) / weights_of if known else math.nan
    return {**shares, "hoyer": hoyer, "entries": entries, "matrices": len(found)}


def jumps(series: ArrayLike) -> Bool[np.ndarray, " steps"]:
    """Where a series rises as it does nowhere else, and by at least one point.

    A rise counts where its modified z-score among all differences, 0.6745 (d − median) / MAD, is above 3.5.
    Where more than half of the differences are one number, MAD is 0 and any larger one stands out.
    """
    values = np.asarray(series, dtype=float)
    marked = np.zeros(len(values), dtype=bool)
    if len(values) < 3:
        return marked
    rises = np.diff(values)
    middle = np.nanmedian(rises) if np.isfinite(rises).any() else 0.0
    away = rises - middle
    spread = np.nanmedian(np.abs(away)) if np.isfinite(rises).any() else 0.0
    with np.errstate(invalid="ignore"):
        marked[1:] = (0.6745 * away > OUTLYING * spread) & (away > 0) & (rises >= LEAST)
    return marked


@analysis(
    "sparsification",
    question="Does the share of negligible weights jump at some checkpoint of the run?",
    reading="`small` and `hoyer` do not change with a common scale: a jump of either is sparsification. A "
    "jump of `near_zero` alone may be weight decay, which shrinks all weights alike. Fewer than four "
    "checkpoints show none.",
    paper="arXiv:2306.03805",
    cost="reads every checkpoint once",
    draw=draw,
    summary=in_a_line,
    metrics=METRICS,
)
def abrupt_sparsification(
    series: Any,
    *,
    parts: Sequence[Part] = ("block",),
    progress: Progress | None = None,
) -> Result:
    """How sparse the checkpoints of a run are, in step order, and where a measure jumps.

    A jump of `near_zero` alone may be weight decay that shrinks everything; only `small` and `hoyer` show
    sparsification.

    Args:
        series: a `CheckpointSeries`, or references, the earliest first.
        parts: where matrices are looked at.
        progress: called with (done, total, what).

    Metrics: `jumps` (checkpoints at which a scale-free measure jumps), `jump` (which is the first of these,
        counted from 0), `rise` (of each measure, last minus first, as `zero_rise` …).
    Table `checkpoints`: label, step, place, zero, near_zero, small, hoyer, and whether each jumps:
        `zero_jump` ….

    Raises:
        InputError: fewer than three checkpoints, steps that do not rise, or as `sparse_checkpoint`.
        NotApplicableError: a checkpoint has no matrix in these parts.
    """
    import pandas as pd

    over = series_of(series)
    found = over.measured(
        "sparse",
        {"parts": list(parts)},
        lambda one: sparse_checkpoint(one, parts),
        progress=progress,
        least=(3, "a jump"),
    )
    rows = [
        {"label": label, "step": step, "place": place, **{name: one[name].item() for name in one}}
        for place, (label, step, one) in enumerate(zip(over.labels, over.steps, found, strict=True))
    ]
    table = pd.DataFrame(rows)
    marked = {name: jumps(table[name].tolist()) for name in MEASURES}
    table = table.assign(**{f"{name}_jump": flags for name, flags in marked.items()})
    free = np.any([marked[name] for name in SCALE_FREE], axis=0)
    metrics: dict[str, float | int] = {"jumps": int(free.sum()), "checkpoints": len(rows)}
    if free.any():
        metrics["jump"] = int(free.argmax())
    for name in MEASURES:
        rise = float(table[name].iloc[-1] - table[name].iloc[0])
        if not math.isnan(rise):
            metrics[f"{name}_rise"] = rise
    steps = np.array(over.steps) if over.stepped else None
    return Result(
        metrics=metrics, tables={"checkpoints": table}, notes=tuple(notes(table, marked, free, steps))
    )


def notes(
    table: Any,
    marked: Mapping[str, Bool[np.ndarray, " steps"]],
    free: Bool[np.ndarray, " steps"],
    steps: Float[np.ndarray, " steps"] | None,
) -> list[str]:
    """What a reader must know of the jumps."""
    notes = []
    label = table["label"].tolist()
    for place in np.flatnonzero(free):
        which = " and ".join(name for name in SCALE_FREE if marked[name][place])
        notes.append(f"Sparsification jumps at {label[place]}: {which} rises as nowhere else.")
    absolute = np.any([marked[name] for name in MEASURES if name not in SCALE_FREE], axis=0)
    notes += [
        f"At {label[place]} only an absolute count jumps: that may be weight decay, which shrinks all "
        "weights alike, and is no sparsification."
        for place in np.flatnonzero(absolute & ~free)
    ]
    if len(label) < 4:
        notes.append(f"{len(label)} checkpoints: among fewer than three differences none can stand out.")
    if steps is not None and len(steps) > 2 and np.ptp(np.diff(steps)) > 0:
        notes.append("Steps are not evenly spaced: a wider gap gives a larger difference by itself.")
    shapes = {(row.entries, row.matrices) for row in table.itertuples()}
    if len(shapes) > 1:
        notes.append(f"The checkpoints do not hold the same matrices: {len(shapes)} different scopes.")
    return notes
