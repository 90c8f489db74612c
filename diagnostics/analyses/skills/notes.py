"""The notes and verdicts of a skill localization."""

import math
from collections.abc import Mapping

from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.measurements import TaskMeasurements
from diagnostics.evaluation.pair_notes import only_tuned_note
from probes import CheckpointPair

# Largest skill size with each label; ours, nothing is published.
SIZE_LABELS = ((1e-4, "sharp"), (1e-2, "moderate"), (math.inf, "diffuse"))


def size_label(share: float) -> str:
    """`sharp`, `moderate` or `diffuse`."""
    # A region has whole entries: a budget of 1e-4 may be 1.0003e-4 of them.
    return next(label for largest, label in SIZE_LABELS if float(f"{share:.2g}") <= largest)


def verdict(measured: TaskMeasurements, total: int, metrics: Mapping[str, float]) -> str:
    """The verdict on one task, in a sentence or two."""
    scores, choice = measured.scores, measured.choice
    base, tuned = scores.shown("base").value, scores.shown("tuned").value
    unit = "accuracy" if scores.kind == "accuracy" else "nats per token"
    if choice is None:
        ends = f"base {base:.3g}, tuned {tuned:.3g} {unit}"
        return f"{measured.task}: nothing to localise: {measured.reason} ({ends})."
    gain = "gain of tuning" if scores.kind == "accuracy" else "loss reduction of tuning"
    rel = scores.rel("graft")
    text = (
        f"{measured.task}: a sufficient region of {choice.size:,} of {short_count(total)} entries "
        f"({percent(choice.size / total)}) keeps {rel.value:.0%} of the {gain} (Rel {rel.value:.2f}, "
        f"{rel.low:.2f} to {rel.high:.2f})"
    )
    if "agreement" in metrics:
        text += f" and agrees with tuned on {metrics['agreement']:.0%} of the rows"
    text += (
        f". Controls: top movement of the same size keeps {metrics['movement_rel']:.0%}, random entries "
        f"{metrics['random_rel']:.0%}, half of the update {metrics['half_update_rel']:.0%}"
    )
    if not choice.passed:
        return f"{text}. No size tried keeps enough: the skill is diffuse."
    return f"{text}. The skill is {size_label(choice.size / total)}."


def short_count(count: int) -> str:
    """A number of entries, such as 85.1 M."""
    for unit, letter in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return f"{count:,}"


def percent(share: float) -> str:
    """A share in percent, with two significant digits."""
    return f"{100 * share:.2g} %"


def pair_notes(pair: CheckpointPair, evaluator: GraftEvaluator) -> list[str]:
    """Notes on what a mask may select."""
    movement = evaluator.movement
    notes = [
        f"Tuning changed {movement.total_moved:,} entries. Shares are of N = {movement.total:,} entries of "
        f"the {len(movement.entries)} eligible tensors with any of them; {len(movement.frozen)} eligible "
        "tensors are equal in base and tuned."
    ]
    if pair.tuned.kind == "adapter":
        notes.append(
            "Tuned is an adapter. The region is one of its merged weights, with a dense delta; it does not "
            "say which rank-one parts of the adapter carry the skill."
        )
    notes += only_tuned_note(evaluator.two_sided)
    if evaluator.outside:
        notes.append(
            f"Tuning also changed {len(evaluator.outside)} tensors that are not eligible, such as "
            f"{evaluator.outside[0]}. A graft has base's; even a graft of all eligible entries is not tuned."
        )
    return notes


def task_notes(measured: TaskMeasurements) -> list[str]:
    """Notes on the search and the choice for one task."""
    choice = measured.choice
    assert choice is not None
    notes = []
    if measured.scores.kind == "loss":
        notes.append(
            "The rows have neither choices nor labels: Rel is of the loss, and agreement and calibration are "
            "not measured."
        )
    if choice.own_search:
        sizes = ", ".join(f"{size:,}" for size in sorted(choice.own_search))
        notes.append(
            f"The regions of {sizes} entries come from searches for one size, which did better than the "
            "search over all sizes; they need not contain the smaller regions."
        )
    if choice.ranking is not None and not choice.ranking.reached:
        notes.append(
            f"The faithful search took all {choice.ranking.steps} steps before its mask had its size; the "
            "entries with the next largest scores fill it up."
        )
    if not choice.passed:
        notes.append(
            "No region tried keeps enough on the selection rows; the one that keeps the most is reported. "
            "This is usual after AdamW and for adapters, and no fault."
        )
    elif choice.size == min(choice.regions):
        notes.append("The smallest region tried is sufficient; a smaller one may be too.")
    if choice.search.mode == "budget" and choice.search.start == "movement":
        notes.append("The search that started from the movement did better than that from gradients.")
    return [f"{measured.task}: {note}" for note in notes]
