"""When each measure of `dynamics` holds, and what it says of this run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diagnostics.analyses.dynamics.measures import DynamicsProbes

if TYPE_CHECKING:
    import pandas as pd

Arrays = Mapping[str, np.ndarray]

HALF = ("bfloat16", "float16")
# Of the gradient with the unembedding: what the paper observed, and no threshold.
SCALING = 0.9
# Fewer checkpoints than this support no correlation and no trend.
TREND = 6
# What a measure is called, and what else must hold for it to mean anything.
MEASURES = {
    "alignment": "The gradient",
    "outputs": "The outputs of probe rows",
    "kernel": "The tangent kernel",
    "complexity": "Local complexity",
    "expansion": "The linearity gap",
}


def notes_of(
    steps: "pd.DataFrame",
    measurements: Sequence[Arrays],
    gaps: Sequence[Arrays],
    probe: DynamicsProbes,
    *,
    saved: bool,
    stepped: bool,
) -> list[str]:
    """All of them, findings first."""
    role = "train" if "collapsed_train" in steps else "task"
    notes = observed(steps, role)
    if not stepped:
        notes.append("No steps are known: the checkpoints are counted 0, 1, 2 …")
    if len(steps) < TREND:
        notes.append(
            f"{len(steps)} checkpoints show differences, no trend: nothing is correlated below {TREND}."
        )
    notes += conditions(measurements, probe, role)
    if not saved:
        notes.append(
            "Movement and the linearity gap are not measured: they need the weights of the first checkpoint, "
            "which are gone while a run goes on. `tunescope series` measures them on saved checkpoints."
        )
    return notes + missing([*measurements, *gaps])


def observed(steps: "pd.DataFrame", role: str) -> list[str]:
    """What a published run showed, where this one shows it too."""
    notes = []
    collapsed = steps[f"collapsed_{role}"]
    if (collapsed > 0).any():
        at = steps["label"][collapsed > 0].iloc[0]
        notes.append(
            f"A softmax has collapsed first at step {at} ({collapsed.max():.0%} of labels at most): "
            "where the class that is left is the label, it gives no gradient. StableMax, a lower learning "
            "rate or weight decay mend that."
        )
    if "metric_train" in steps:
        scaling = (steps["nlm_unembedding"] >= SCALING) & (steps["metric_train"] == 1)
        if scaling.any():
            at = steps["label"][scaling].iloc[0]
            notes.append(
                f"First at step {at} (and at {scaling.sum()} of {len(steps)} in all) every train label is "
                f"right and the gradient of the unembedding runs along itself, cosine {SCALING} or more: the "
                "loss falls by scaling logits, not by learning. The paper saw 0.9 right after 100 % train "
                "accuracy; it is no threshold."
            )
    return notes


def conditions(measurements: Sequence[Arrays], probe: DynamicsProbes, role: str) -> list[str]:
    """Under which conditions the numbers hold."""
    notes = [
        f"Softmax collapse is counted in {probe.loss_dtype}, on {role} labels: it holds if the training's "
        "loss takes its softmax in that dtype. transformers does in float32; set loss_dtype otherwise."
    ]
    if probe.loss_dtype in HALF:
        notes.append(
            f"In {probe.loss_dtype} a softmax counts as collapsed long before it is: unless the loss really "
            "ran in it, these shares mean nothing."
        )
    if probe.reading.dtype in HALF:
        notes.append(
            f"The models ran in {probe.reading.dtype}: gradients, kernel and linearity gap are coarse in it."
        )
    if probe.batch is None:
        notes.append(
            "Whether the loss falls by scaling logits is not measured: that takes a gradient on rows of the "
            "training (--train F)."
        )
    else:
        notes.append(
            f"The gradient is that of {len(probe.batch.rows)} train rows without weight decay. Give the rows "
            "that the run saw, and many: the noise of few rows lowers the cosine (in "
            "examples/dense_grokking.py it is 0.94 on all 1,392 rows and 0.18 on 128). That scaling weights "
            "scales logits holds exactly for homogeneous networks only, in those with norms for the last "
            "matrix alone."
        )
    if probe.kernel:
        notes.append(
            f"The tangent kernel is of {len(probe.rows.rows)} rows and one random projection of the logits, "
            "averaged over a row's labels; plain CKA is high for so few rows whatever they are, the debiased "
            "one is not."
        )
    seen = [one for one in measurements if "complexity.radius" in one]
    radii = [float(one["complexity.radius"]) for one in seen]
    if radii:
        ends = dict.fromkeys(f"{each:.3g}" for each in (min(radii), max(radii)))
        reach = " to ".join(ends)
        notes.append(
            f"Local complexity moves embeddings by {reach} ({probe.radius:g} of their mean length at each "
            f"checkpoint) to {int(seen[0]['complexity.vertices'])} vertices; others give other values."
        )
    routed = sorted({int(layer) for one in measurements for layer in one.get("complexity.routed", ())})
    if routed:
        notes.append(
            f"Units of routed experts (layers {routed[0]} to {routed[-1]}) are left out of local complexity: "
            "at each vertex an expert is given other tokens. Their gradients and kernels count."
        )
    return notes


def missing(measurements: Sequence[Arrays]) -> list[str]:
    """What was not defined for a checkpoint, and why; each once."""
    found: dict[str, None] = {}
    for one in measurements:
        for key in one:
            name, _, last = key.rpartition(".")
            if last == "missing" and not name.startswith("score"):
                what = MEASURES.get(name, "The logits of a set")
                found[f"{what} could not be measured somewhere: {one[key]}."] = None
    return list(found)
