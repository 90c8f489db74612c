"""Essential sparsity in words: what each curve says, and what a reader must know beside the numbers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diagnostics.analyses.sparsity.dropping_point import DroppingPoint
from diagnostics.analyses.sparsity.evaluator import RANDOM, SIDES, Regime
from diagnostics.analyses.sparsity.grid import COMPARED
from diagnostics.analyses.sparsity.masked_finetuning import Training
from diagnostics.analyses.sparsity.tables import SparsityMeasurements
from probes.checkpoints.pair import Side

if TYPE_CHECKING:
    import pandas as pd

REGIMES: Mapping[Regime, str] = {"zero_shot": "zero-shot", "masked_finetune": "masked fine-tuning"}
Numbers = Mapping[str, float | int]


def layer_note(row: Mapping[Any, Any]) -> str:
    """A row of the table of points in words."""
    if not row["decided"]:
        return f"not told from noise by these rows, about {row['rows_needed']:,} are needed"
    if not row["reached"]:
        return f"tolerates {row['dropping_point']:.3g} and more"
    return f"tolerates {row['dropping_point']:.3g} ({row['low']:.3g} to {row['high']:.3g}, {row['verdict']})"


def notes(
    found: SparsityMeasurements,
    tables: "Mapping[str, pd.DataFrame]",
    metrics: Numbers,
    train: Training | None,
) -> list[str]:
    """All of it, the most telling first."""
    of = {role: "of the loss without a mask" if metric == "loss" else "of accuracy"
          for role, metric in found.roles.items()}  # fmt: skip
    rules = "; ".join(f"{role} rows {found.ask.allowed:g} {unit}" for role, unit in of.items())
    said = [
        "Zero-shot: masked and measured, nothing tuned behind the mask. The paper's 30 to 50 % are of masked "
        f"fine-tuning and do not hold for a model that is not tuned again. Tolerance: {rules}."
    ]
    said += [sentence(key, drop, found.bench.count(key[0])) for key, drop in found.drops.items()]
    said += indifferent(found, tables)
    said += censored(found)
    said += lesson(train, metrics)
    for model in SIDES:
        at, own = found.shown_at(model)
        if not own:
            why = "is 0" if found.drops["task", model, "zero_shot"].decided else "is withheld"
            said.append(f"The dropping point of {model} {why}: its layers are shown at {at:g}.")
    said += about_weights(found, metrics)
    return said + list(dict.fromkeys(note for each in found.bench.sets.values() for note in each.notes))


def sentence(key: tuple[str, Side, Regime], drop: DroppingPoint, rows: int) -> str:
    """One curve in words."""
    role, model, regime = key
    what = f"{model}, {role} rows, {REGIMES[regime]}"
    if not drop.decided:
        return (
            f"{what}: withheld. The tolerance of {drop.allowed:.3g} is smaller than what {rows} rows can "
            f"tell, give or take {drop.half_width:.3g}; about {drop.rows_needed:,} rows would do. Fewer do "
            "for a larger tolerance."
        )
    if not drop.paper.crossings:
        return f"{what}: stays within the tolerance up to {drop.paper.at:g}, where the grid ends."
    text = f"{what}: {drop.verdict}. Within the tolerance up to {drop.paper.at:g} and no longer at "
    text += f"{drop.paper.until:g}; by the robust fit "
    text += f"{drop.point:.3g}" if drop.reached else f"up to {drop.at:g}, where the grid ends"
    text += f" (95 % interval {drop.low:.3g} to {drop.high:.3g})"
    if drop.verdict in ("sharp", "gradual", "unclear"):
        text += f", slopes {drop.hinge.before:.3g} and {drop.hinge.after:.3g} around {drop.hinge.at:g}"
        text += f" (dBIC {drop.hinge.dbic:.1f})"
    if drop.paper.crossings > 1:
        text += f". It falls below the tolerance {drop.paper.crossings} times: the curve is noisy"
    return f"{text}."


def indifferent(found: SparsityMeasurements, tables: "Mapping[str, pd.DataFrame]") -> list[str]:
    """Which side loses nothing on the task rows even where weights are pruned at random."""
    said = []
    for model in SIDES:
        drop, own = found.drops["task", model, "zero_shot"], tables["curve"]
        control = own[(own["model"] == model) & (own["pattern"] == RANDOM) & (own["role"] == "task")]
        control = control[(control["regime"] == "zero_shot") & (control["sparsity"] > 0)]
        if len(control) and control["drop"].iloc[0] <= drop.allowed:
            said.append(
                f"{model}: pruning {control['sparsity'].iloc[0]:g} at random costs no more than the "
                "tolerance either: its dropping point on these rows says little of magnitudes."
            )
    return said


def censored(found: SparsityMeasurements) -> list[str]:
    """What to say of a shift that is a bound, or is not known."""
    base, tuned = (found.drops["task", model, "zero_shot"] for model in SIDES)
    if not (base.decided and tuned.decided):
        return ["No shift between base and tuned is given: a point of it is withheld."]
    if base.reached and tuned.reached:
        return []
    if not (base.reached or tuned.reached):
        return ["Neither side falls within the grid, so that no shift is given."]
    bound = "most" if tuned.reached else "least"
    return [f"The shift is a bound: it is at {bound} what is given, since one side does not fall."]


def lesson(train: Training | None, metrics: Numbers) -> list[str]:
    """What to say of tuning behind the mask."""
    if train is None:
        return []
    said = [
        "Masked fine-tuning: base is masked, and what is left, with all that is not in the scope, tuned for "
        f"{train.steps} steps of {train.batch_rows} rows, alike at every sparsity. {train.rows} task rows "
        "were split off for it; all is measured on the others."
    ]
    if metrics.get("finetuned_point", 1) < COMPARED and metrics["finetuned_reached"]:
        said.append(
            f"Even so it tolerates less than {COMPARED:g}, the lower end of what the paper reports: too few "
            "steps, or a task that needs what base has."
        )
    if train.half:
        said.append("Weights in half precision round small steps of tuning away; dtype float32 does not.")
    return said


def about_weights(found: SparsityMeasurements, metrics: Numbers) -> list[str]:
    """What was pruned, and what was not."""
    host, masks = found.bench.host, found.bench.masks
    said = [
        f"{metrics[f'zeros_{model}']:.3g} of {model}'s scope is zero before anything is pruned; these "
        "weights are the first to go, so that its curve is flat up to there."
        for model in SIDES
        if metrics[f"zeros_{model}"]
    ]
    said.append(
        f"Sparsities are shares of {masks.entries:,} weights in {len(masks.names)} tensors, "
        f"{metrics['scope_share']:.3g} of tuned's parameters. Unstructured zeros save no time on ordinary "
        "hardware; N:M patterns and sparse file formats do."
    )
    alone = sorted(set(host.headers) - host.in_both)
    if alone:
        are = f"{len(alone)} tensors that base lacks, such as {alone[0]}, are"
        said.append(
            f"{are if len(alone) > 1 else f'{alone[0]}, which base lacks, is'} tuned's when base is measured."
        )
    if masks.left_out:
        said.append(
            f"{len(masks.left_out)} of the file's tensors, such as {masks.left_out[0]}, are not part of the "
            "running model and are not pruned."
        )
    if any(matrix.part == "router" for matrix in host.pair.tuned.matrices.values()):
        said.append(
            "Mixture of experts: an expert that these rows are never routed to looks free to prune here."
        )
    return said
