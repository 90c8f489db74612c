"""Notes of `dynamics`: observations, and the conditions of each measure."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from diagnostics.analyses.dynamics.measures import DynamicsProbes

Arrays = Mapping[str, np.ndarray]

HALF = ("bfloat16", "float16")
# Cosine of the gradient with the unembedding that the paper observed; no threshold.
SCALING = 0.9
# The fewest checkpoints for a trend.
TREND = 6
# Names of the measures in notes.
MEASURES = {
    "alignment": "The gradient", "outputs": "The outputs of probe rows", "kernel": "The tangent kernel",
    "complexity": "Local complexity", "expansion": "The linearity gap",
}  # fmt: skip


def notes_of(
    steps: pd.DataFrame, measurements: Sequence[Arrays], gaps: Sequence[Arrays], probe: DynamicsProbes, *,
    saved: bool, stepped: bool,
) -> list[str]:  # fmt: skip
    """All notes, observations first."""
    role = "train" if "collapsed_train" in steps else "task"
    notes = observed(steps, role)
    if not stepped:
        notes.append("The steps are unknown: checkpoints are numbered 0, 1, 2 …")
    if len(steps) < TREND:
        notes.append(f"{len(steps)} checkpoints show differences but no trend: that needs {TREND}.")
    notes += conditions(measurements, probe, role)
    if not saved:
        notes.append(
            "Movement and the linearity gap are not measured: they need the weights of the first checkpoint, "
            "which a live run does not keep. `tunescope series` measures them on saved checkpoints."
        )
    return notes + not_measured([*measurements, *gaps])


def observed(steps: pd.DataFrame, role: str) -> list[str]:
    """Observations of the papers that this run shows too."""
    notes = []
    collapsed = steps[f"collapsed_{role}"]
    if (collapsed > 0).any():
        at = steps["label"][collapsed > 0].iloc[0]
        notes.append(
            f"The softmax first collapses at step {at} (at most {collapsed.max():.0%} of labels). Collapsed "
            "on the right label, it gives no gradient. Remedies: StableMax, a lower learning rate, weight "
            "decay."
        )
    if "metric_train" in steps:
        scaling = (steps["nlm_unembedding"] >= SCALING) & (steps["metric_train"] == 1)
        if scaling.any():
            at = steps["label"][scaling].iloc[0]
            notes.append(
                f"From step {at} (at {scaling.sum()} of {len(steps)} checkpoints) every train label is right "
                f"and the gradient points along the unembedding, with cosine {SCALING} or more: the loss "
                "falls by scaling logits, not by learning. The paper saw 0.9 right after 100 % train "
                "accuracy; that is no threshold."
            )
    return notes


def conditions(measurements: Sequence[Arrays], probe: DynamicsProbes, role: str) -> list[str]:
    """Conditions under which the numbers hold."""
    notes = [
        f"Softmax collapse is counted in {probe.loss_dtype} on {role} labels. This must be the dtype of the "
        "softmax in the training loss (transformers: float32); set loss_dtype otherwise."
    ]
    if probe.loss_dtype in HALF:
        notes.append(
            f"In {probe.loss_dtype} a softmax collapses far earlier: unless the loss ran in that dtype, "
            "these shares mean nothing."
        )
    if probe.reading.dtype in HALF:
        notes.append(
            f"The models ran in {probe.reading.dtype}, in which gradients, kernel and linearity gap are "
            "coarse."
        )
    if probe.batch is None:
        notes.append("Logit scaling is not measured: it needs a gradient on train rows (--train F).")
    else:
        notes.append(
            f"The gradient is taken on {len(probe.batch.rows)} train rows, without weight decay. Give many "
            "of the rows that the run saw: with few, noise lowers the cosine (in examples/dense_grokking.py "
            "from 0.94 on all 1,392 rows to 0.18 on 128). Scaling weights scales logits exactly only in "
            "homogeneous networks; with norms, for the last matrix only."
        )
    if probe.kernel:
        notes.append(
            f"The tangent kernel is that of {len(probe.rows.rows)} rows and one random projection of the "
            "logits, averaged over the labels of a row. Plain CKA is high for any few rows; debiased CKA is "
            "not."
        )
    measured = [arrays for arrays in measurements if "complexity.radius" in arrays]
    radii = [float(arrays["complexity.radius"]) for arrays in measured]
    if radii:
        reach = " to ".join(dict.fromkeys(f"{radius:.3g}" for radius in (min(radii), max(radii))))
        notes.append(
            f"Local complexity moves embeddings by {reach} ({probe.radius:g} of their mean length at each "
            f"checkpoint) to {int(measured[0]['complexity.vertices'])} vertices; its values depend on both."
        )
    routed = sorted({int(layer) for arrays in measurements for layer in arrays.get("complexity.routed", ())})
    if routed:
        notes.append(
            f"Local complexity leaves out the units of routed experts (layers {routed[0]} to {routed[-1]}), "
            "which get other tokens at each vertex. Their gradients and kernels count."
        )
    return notes


def not_measured(measurements: Sequence[Arrays]) -> list[str]:
    """Measures that are not defined for some checkpoint, with the reason; each note once."""
    notes: dict[str, None] = {}
    for arrays in measurements:
        for key in arrays:
            name, _, last = key.rpartition(".")
            if last == "missing" and not name.startswith("score"):
                what = MEASURES.get(name, "The logits of a set")
                notes[f"{what} could not be measured on some checkpoint: {arrays[key]}."] = None
    return list(notes)
