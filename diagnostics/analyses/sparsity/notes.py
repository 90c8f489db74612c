"""The notes of essential sparsity: each curve in a sentence, and what limits the numbers."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from diagnostics.analyses.sparsity.dropping_point import DroppingPoint
from diagnostics.analyses.sparsity.evaluator import RANDOM, SIDES, Regime
from diagnostics.analyses.sparsity.grid import COMPARED_SPARSITY
from diagnostics.analyses.sparsity.masked_finetuning import MaskedFinetuning
from diagnostics.analyses.sparsity.tables import SparsityMeasurements
from diagnostics.evaluation.one_function import apart_notes
from diagnostics.evaluation.pair_notes import is_half, only_tuned_note
from diagnostics.evaluation.sets import set_notes
from probes.checkpoints.pair import Side

REGIMES: Mapping[Regime, str] = {"zero_shot": "zero-shot", "masked_finetune": "masked fine-tuning"}
Numbers = Mapping[str, float | int]


def curve_verdict(row: Mapping[Any, Any]) -> str:
    """The verdict on a curve, from its row in the table of points."""
    if not row["decided"]:
        return f"undecided with these rows, about {row['rows_needed']:,} are needed"
    if not row["reached"]:
        return f"tolerates {row['dropping_point']:.3g} and more"
    return f"tolerates {row['dropping_point']:.3g} ({row['low']:.3g} to {row['high']:.3g}, {row['verdict']})"


def notes(
    measurements: SparsityMeasurements,
    tables: "Mapping[str, pd.DataFrame]",
    metrics: Numbers,
    train: MaskedFinetuning | None,
) -> list[str]:
    """All notes, the most important first."""
    units = {role: "of the loss without a mask" if metric == "loss" else "of accuracy"
             for role, metric in measurements.roles.items()}  # fmt: skip
    rules = "; ".join(
        f"{role} rows {measurements.settings.tolerance:g} {unit}" for role, unit in units.items()
    )
    lines = [
        "Zero-shot: masked and measured without tuning behind the mask. The paper's 30 to 50 % are of masked "
        f"fine-tuning and do not hold zero-shot. Tolerance: {rules}."
    ]
    count = measurements.evaluator.count
    lines += [curve_note(key, drop, count(key[0])) for key, drop in measurements.drops.items()]
    lines += random_control_notes(measurements, tables)
    lines += shift_notes(measurements)
    lines += training_notes(train, metrics)
    for model in SIDES:
        sparsity, at_dropping_point = measurements.layer_sparsity(model)
        if not at_dropping_point:
            state = "is 0" if measurements.drops["task", model, "zero_shot"].decided else "is withheld"
            lines.append(f"The dropping point of {model} {state}; its layers are shown at {sparsity:g}.")
    lines += [*apart_notes(measurements.evaluator.two_sided.pair), *scope_notes(measurements, metrics)]
    return lines + set_notes(measurements.evaluator.sets)


def curve_note(key: tuple[str, Side, Regime], drop: DroppingPoint, rows: int) -> str:
    """One curve in words."""
    role, model, regime = key
    curve = f"{model}, {role} rows, {REGIMES[regime]}"
    if not drop.decided:
        return (
            f"{curve}: withheld. {rows} rows measure the drop to within {drop.half_width:.3g}, the tolerance "
            f"is {drop.allowed:.3g}; use about {drop.rows_needed:,} rows, or a larger tolerance."
        )
    if not drop.paper.crossings:
        return f"{curve}: within the tolerance up to {drop.paper.at:g}, where the grid ends."
    text = f"{curve}: {drop.verdict}. Within the tolerance up to {drop.paper.at:g}, beyond it at "
    text += f"{drop.paper.until:g}; the robust fit gives "
    text += f"{drop.point:.3g}" if drop.reached else f"at least {drop.at:g}, where the grid ends"
    text += f" (95 % interval {drop.low:.3g} to {drop.high:.3g})"
    if drop.verdict in ("sharp", "gradual", "unclear"):
        text += f", slopes {drop.hinge.before:.3g} and {drop.hinge.after:.3g} around {drop.hinge.at:g}"
        text += f" (dBIC {drop.hinge.dbic:.1f})"
    if drop.paper.crossings > 1:
        text += f". It leaves the tolerance {drop.paper.crossings} times: the curve is noisy"
    return f"{text}."


def random_control_notes(
    measurements: SparsityMeasurements, tables: "Mapping[str, pd.DataFrame]"
) -> list[str]:
    """A note for each side that tolerates random pruning too."""
    lines = []
    curve = tables["curve"].query("role == 'task' and regime == 'zero_shot' and sparsity > 0")
    for model in SIDES:
        control = curve[(curve["model"] == model) & (curve["pattern"] == RANDOM)]
        allowed = measurements.drops["task", model, "zero_shot"].allowed
        if len(control) and control["drop"].iloc[0] <= allowed:
            lines.append(
                f"{model}: random pruning of {control['sparsity'].iloc[0]:g} stays within the tolerance too; "
                "its dropping point on these rows says little about magnitudes."
            )
    return lines


def shift_notes(measurements: SparsityMeasurements) -> list[str]:
    """A note on a shift that is a bound, or is missing."""
    base, tuned = (measurements.drops["task", model, "zero_shot"] for model in SIDES)
    if not (base.decided and tuned.decided):
        return ["No shift between base and tuned is given: one of the points is withheld."]
    if base.reached and tuned.reached:
        return []
    if not (base.reached or tuned.reached):
        return ["No shift is given: neither side falls within the grid."]
    bound = "an upper" if tuned.reached else "a lower"
    return [f"The shift is {bound} bound: one side does not fall within the grid."]


def training_notes(train: MaskedFinetuning | None, metrics: Numbers) -> list[str]:
    """Notes on tuning behind the mask."""
    if train is None:
        return []
    lines = [
        "Masked fine-tuning: base is masked, and all other weights are tuned for "
        f"{train.steps} steps of {train.batch_rows} rows, alike at every sparsity, on {train.rows} task "
        "rows; all curves are measured on the other rows."
    ]
    if metrics.get("finetuned_point", 1) < COMPARED_SPARSITY and metrics["finetuned_reached"]:
        lines.append(
            f"Tuned behind the mask, base tolerates less than {COMPARED_SPARSITY:g}, the lower end of the "
            "paper's range: too few steps, or a task that needs what base knows."
        )
    if is_half(train.two_sided.model):  # it rounds away small steps
        lines.append("Half-precision weights round away small steps of tuning; use dtype float32.")
    return lines


def scope_notes(measurements: SparsityMeasurements, metrics: Numbers) -> list[str]:
    """Notes on what was pruned, and what was not."""
    two_sided, masks = measurements.evaluator.two_sided, measurements.evaluator.masks
    lines = [
        f"{metrics[f'zeros_{model}']:.3g} of {model}'s scope is zero before pruning; these weights go first, "
        "and its curve is flat up to there."
        for model in SIDES
        if metrics[f"zeros_{model}"]
    ]
    lines.append(
        f"Sparsities are shares of {masks.entries:,} weights in {len(masks.names)} tensors, "
        f"{metrics['scope_share']:.3g} of tuned's parameters. Unstructured zeros save no time on ordinary "
        "hardware; N:M patterns and sparse file formats do."
    )
    lines += only_tuned_note(two_sided)
    if masks.left_out:
        lines.append(
            f"{len(masks.left_out)} of the file's tensors, such as {masks.left_out[0]}, are not part of the "
            "running model and are not pruned."
        )
    if any(matrix.part == "router" for matrix in two_sided.pair.tuned.matrices.values()):
        lines.append("Mixture of experts: experts that these rows are never routed to look free to prune.")
    return lines
