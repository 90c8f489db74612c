"""Abrupt sparsification: does the share of negligible weights jump at some checkpoint of a run?

The paper (Jaiswal et al. 2023, arXiv:2306.03805) sees the number of zero weights jump, but does not state its
threshold. Four measures are given (ours): two in the weights' unit, which weight decay alone raises too, and
two that do not depend on scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
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

# Magnitudes below which a weight counts as near zero (in its unit) and as small (share of its matrix's rms).
NEAR_ZERO, SMALL = 1e-3, 0.1
# Smallest modified z-score (Iglewicz and Hoaglin's) and smallest difference of a jump.
OUTLIER, MIN_RISE = 3.5, 0.01
# Entries measured at a time.
CHUNK = 2**22

# column -> description
MEASURES = {
    "zero": "share of weights that are exactly 0",
    "near_zero": f"share below {NEAR_ZERO:g} in magnitude; weight decay alone raises it",
    "small": f"share below {SMALL:g} of the rms of their matrix, 0.080 for normal weights; scale-free",
    "hoyer": "Hoyer index: 0 all alike, 1 all but one zero, 0.202 for normal weights; scale-free",
}
SCALE_FREE = ("small", "hoyer")
METRICS = {
    "jumps": "checkpoints at which a scale-free measure jumps",
    "jump": "index of the first of them, from 0",
    "checkpoints": "checkpoints measured",
    **{f"{name}_rise": f"last minus first: {description}" for name, description in MEASURES.items()},
}


def summary(result: Result) -> str:
    """Whether a scale-free measure jumps, and how far each rose."""
    count = result.metrics["jumps"]
    jumped = "no checkpoint jumps" if not count else f"{count} jump{'s' if count > 1 else ''}"
    increases = {name: result.metrics.get(f"{name}_rise") for name in MEASURES}
    measured = [f"{name} {rise:+.4f}" for name, rise in increases.items() if rise is not None]
    return ", ".join([jumped, *measured])


def draw(result: Result) -> "dict[str, go.Figure]":
    """The four measures over the run, jumps marked."""
    table, title = result.tables["checkpoints"], "Negligible weights over the run; a star is a jump"
    figure = theme.figure(title, "step", "share of weights, or index")
    for (name, meaning), color, symbol in zip(MEASURES.items(), theme.COLORWAY, theme.SYMBOLS, strict=False):
        jump, hover = table[f"{name}_jump"], f"{{label}}: {{y:.4f}}<extra>{meaning}</extra>"
        marker = {"color": color, "size": np.where(jump, 13, 7), "symbol": np.where(jump, "star", symbol)}
        line(figure, table, "step", name, Style(name, color), hover, marker=marker)
    return {"sparseness": figure}


@dataclass(frozen=True, kw_only=True)
class Sparseness:
    """The measures of one matrix."""

    entries: int
    zero: int  # counts, as the next two
    near_zero: int
    small: int
    rms: float
    hoyer: float  # (√n − l1/l2) / (√n − 1); NaN for a single entry, or if all are 0


def measure_sparseness(weights: Float[Tensor, "..."]) -> Sparseness:
    """Measure one matrix in chunks; exact zeros count as small at any scale."""
    flat = weights.flatten()
    entries, l1, square = flat.numel(), 0.0, 0.0
    for chunk in flat.split(CHUNK):
        magnitude = chunk.double().abs_()
        l1 += float(magnitude.sum())
        square += float(magnitude.square_().sum())
    if not math.isfinite(l1 + square):
        raise InputError("holds a NaN or an infinity")
    rms = math.sqrt(square / entries) if entries else 0.0
    zero = near_zero = small = 0
    for chunk in flat.split(CHUNK):
        magnitude = chunk.double().abs_()
        zeros = int((magnitude == 0).sum())
        zero += zeros
        near_zero += int((magnitude < NEAR_ZERO).sum())
        small += int((magnitude < SMALL * rms).sum()) if rms else zeros
    root = math.sqrt(entries)
    hoyer = (root - l1 / math.sqrt(square)) / (root - 1) if square and entries > 1 else math.nan
    return Sparseness(entries=entries, zero=zero, near_zero=near_zero, small=small, rms=rms, hoyer=hoyer)


def checkpoint_sparseness(
    checkpoint: Checkpoint,
    parts: Sequence[Part] = ("block",),
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """All measures over the matrices of a checkpoint in these parts, weighted by entries."""
    names = [name for name, matrix in checkpoint.matrices.items() if matrix.part in parts]
    if not names:
        raise NotApplicableError(f"{checkpoint.ref}: has no matrix in {', '.join(parts)}")
    measured: list[Sparseness] = []
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names), name)
        weights = checkpoint.matrix(name)
        if not weights.is_floating_point():
            raise InputError(
                f"{checkpoint.ref}: {name} is stored as {str(weights.dtype).removeprefix('torch.')}; "
                "dequantise the checkpoint to floating point first"
            )
        try:
            measured.append(measure_sparseness(weights))
        except InputError as error:
            raise InputError(f"{checkpoint.ref}: {name} {error}") from error
    entries = sum(matrix.entries for matrix in measured)
    counted = [name for name in MEASURES if name != "hoyer"]
    shares = {name: sum(getattr(matrix, name) for matrix in measured) / entries for name in counted}
    defined = [matrix for matrix in measured if not math.isnan(matrix.hoyer)]
    total = sum(matrix.entries for matrix in defined)
    hoyer = sum(matrix.entries * matrix.hoyer for matrix in defined) / total if defined else math.nan
    return {**shares, "hoyer": hoyer, "entries": entries, "matrices": len(measured)}


def find_jumps(series: ArrayLike) -> Bool[np.ndarray, " steps"]:
    """Where a series has an outlying rise, of at least 0.01.

    A rise is outlying where its modified z-score among all differences, 0.6745 (d − median) / MAD, is above
    3.5. If more than half of the differences are equal, MAD is 0 and any larger one is.
    """
    values = np.asarray(series, dtype=float)
    jumps = np.zeros(len(values), dtype=bool)
    if len(values) < 3:
        return jumps
    differences = np.diff(values)
    median = np.nanmedian(differences) if np.isfinite(differences).any() else 0.0
    deviation = differences - median
    mad = np.nanmedian(np.abs(deviation)) if np.isfinite(differences).any() else 0.0
    with np.errstate(invalid="ignore"):
        jumps[1:] = (0.6745 * deviation > OUTLIER * mad) & (deviation > 0) & (differences >= MIN_RISE)
    return jumps


@analysis(
    "sparsification",
    question="Does the share of negligible weights jump at some checkpoint of the run?",
    reading="`small` and `hoyer` do not depend on scale: a jump of either is sparsification. A jump of "
    "`near_zero` alone may be weight decay, which shrinks all weights alike. It takes at least four "
    "checkpoints to show a jump.",
    paper="arXiv:2306.03805",
    cost="reads every checkpoint once",
    draw=draw,
    summary=summary,
    metrics=METRICS,
)
def abrupt_sparsification(
    series: Any, *, parts: Sequence[Part] = ("block",), progress: Progress | None = None
) -> Result:
    """Measure how sparse the checkpoints of a run are, in step order, and where a measure jumps.

    Args:
        series: a `CheckpointSeries`, or references, the earliest first.
        parts: which matrices are measured.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.

    Tables:
        `checkpoints`: one row a checkpoint: label, step, place (index), zero, near_zero, small (fractions of
            the weights), hoyer (index in [0, 1]), entries, matrices (counts), zero_jump, near_zero_jump,
            small_jump, hoyer_jump (whether that measure jumps there).

    Raises:
        InputError: fewer than three checkpoints, steps that do not rise, or as `checkpoint_sparseness`.
        NotApplicableError: a checkpoint has no matrix in these parts.

    Example:
        >>> from diagnostics import abrupt_sparsification
        >>> from diagnostics.audit.demo import BUNDLED
        >>> run = BUNDLED / "grokking" / "parity"
        >>> result = abrupt_sparsification([run / f"checkpoint-{step}" for step in (0, 100, 200, 400)])
        >>> result.metrics["checkpoints"]
        4
    """
    run = series_of(series)
    measured = run.measured(
        "sparse", {"parts": list(parts)}, lambda checkpoint: checkpoint_sparseness(checkpoint, parts),
        progress=progress, least=(3, "a jump"),
    )  # fmt: skip
    table = pd.DataFrame({"label": run.labels, "step": run.steps, "place": range(len(run.labels))})
    table = table.join(
        pd.DataFrame({name: value.item() for name, value in values.items()} for values in measured)
    )
    jumps = {name: find_jumps(table[name].tolist()) for name in MEASURES}
    table = table.assign(**{f"{name}_jump": flags for name, flags in jumps.items()})
    scale_free = np.any([jumps[name] for name in SCALE_FREE], axis=0)
    metrics: dict[str, float | int] = {"jumps": int(scale_free.sum()), "checkpoints": len(table)}
    if scale_free.any():
        metrics["jump"] = int(scale_free.argmax())
    for name in MEASURES:
        rise = float(table[name].iloc[-1] - table[name].iloc[0])
        if not math.isnan(rise):
            metrics[f"{name}_rise"] = rise
    steps = np.array(run.steps) if run.stepped else None
    return Result(metrics=metrics, tables={"checkpoints": table}, notes=tuple(notes(table, jumps, steps)))


def notes(
    table: Any, jumps: Mapping[str, Bool[np.ndarray, " steps"]], steps: Float[np.ndarray, " steps"] | None
) -> list[str]:
    """Notes on the jumps and on the checkpoints."""
    lines = []
    labels = table["label"].tolist()
    scale_free = np.any([jumps[name] for name in SCALE_FREE], axis=0)
    absolute = np.any([jumps[name] for name in MEASURES if name not in SCALE_FREE], axis=0)
    for index in np.flatnonzero(scale_free):
        measures = " and ".join(name for name in SCALE_FREE if jumps[name][index])
        lines.append(f"Sparsification at {labels[index]}: {measures} jumps.")
    lines += [
        f"At {labels[index]} only an absolute count jumps: this may be weight decay, which shrinks all "
        "weights alike, and not sparsification."
        for index in np.flatnonzero(absolute & ~scale_free)
    ]
    if len(labels) < 4:
        lines.append(f"{len(labels)} checkpoints are too few: a jump takes at least three differences.")
    if steps is not None and len(steps) > 2 and np.ptp(np.diff(steps)) > 0:
        lines.append("Steps are not evenly spaced: a wider gap by itself gives a larger difference.")
    shapes = {(row.entries, row.matrices) for row in table.itertuples()}
    if len(shapes) > 1:
        lines.append(f"The checkpoints have different matrices, in {len(shapes)} variants.")
    return lines
