"""A skill localization in plain words: what was masked, what was found, and what a reader must know of it."""

import math
from collections.abc import Mapping

from diagnostics.analyses.skills.evaluator import GraftEvaluator
from diagnostics.analyses.skills.measurements import TaskMeasurements
from diagnostics.numerics.estimates import Estimate
from probes import CheckpointPair

# Skill size up to which a skill is called so; ours, nothing is published.
SCALE = ((1e-4, "sharp"), (1e-2, "moderate"), (math.inf, "diffuse"))


def wording(share: float) -> str:
    """What a skill of this size is called."""
    # Sizes are whole entries: a budget of 1e-4 may be 1.0003e-4 of them.
    return next(word for least, word in SCALE if float(f"{share:.2g}") <= least)


def verdict(one: TaskMeasurements, total: int, numbers: Mapping[str, float]) -> str:
    """What was found for one task, in a sentence or two."""
    scores = one.compared
    base, tuned = scores.shown("base").value, scores.shown("tuned").value
    unit = "accuracy" if scores.kind == "accuracy" else "nats per token"
    if one.choice is None:
        return f"{one.task}: nothing to localise: {one.why} (base {base:.3g}, tuned {tuned:.3g} {unit})."
    what = "what tuning gained" if scores.kind == "accuracy" else "the loss that tuning took off"
    rel = scores.rel("graft")
    text = f"{one.task}: a sufficient region of {one.choice.size:,} of {compact(total)} entries "
    text += f"({percent(one.choice.size / total)}) keeps {rel.value:.0%} of {what} "
    text += f"(Rel {interval(rel)})"
    if "agreement" in numbers:
        text += f" and agrees with tuned on {numbers['agreement']:.0%} of the rows"
    text += f"; of the same size top movement keeps {numbers['movement_rel']:.0%}, "
    text += (
        f"random entries {numbers['random_rel']:.0%}; half the update keeps {numbers['half_update_rel']:.0%}"
    )
    if not one.choice.passed:
        return text + ". No size that was tried keeps as much as asked for: the skill is diffuse."
    return text + f". The skill is {wording(one.choice.size / total)}."


def interval(found: Estimate) -> str:
    """A value with its interval."""
    return f"{found.value:.2f}, {found.low:.2f} to {found.high:.2f}"


def compact(count: int) -> str:
    """A number of entries as people say it: 85.1 M."""
    for size, word in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def percent(share: float) -> str:
    """A share with two digits that count."""
    return f"{100 * share:.2g} %"


def about(pair: CheckpointPair, bench: GraftEvaluator) -> list[str]:
    """What a reader must know of what was masked."""
    movement, host = bench.movement, bench.host
    notes = [
        f"N counts {movement.total:,} entries of {len(movement.entries)} eligible tensors that tuning "
        f"changed; {len(movement.frozen)} eligible tensors are equal in both."
    ]
    if pair.tuned.kind == "adapter":
        notes.append(
            "Tuned is an adapter: the region is of its merged weights, whose delta is dense; which rank-one "
            "parts of the adapter carry the skill is another question."
        )
    alone = sorted(host.headers.keys() - host.in_both)
    if alone:
        notes.append(
            f"{len(alone)} tensors have no twin in base, such as {alone[0]}: they are tuned's on both sides, "
            "so that base is base with these."
        )
    if bench.outside:
        notes.append(
            f"Tuning also changed {len(bench.outside)} tensors that are not eligible, such as "
            f"{bench.outside[0]}: a graft leaves them base's, and even one of every eligible entry is not "
            "tuned."
        )
    return notes


def remarks(one: TaskMeasurements) -> list[str]:
    """What a reader must know of one task."""
    choice, scores = one.choice, one.compared
    assert choice is not None
    notes = []
    if scores.kind == "loss":
        notes.append(
            f"{one.task}: its rows have neither choices nor labels: Rel is of the loss that tuning took off, "
            "and nothing is said of agreement and calibration."
        )
    if choice.alone:
        sizes = ", ".join(f"{size:,}" for size in sorted(choice.alone))
        notes.append(
            f"{one.task}: regions of {sizes} entries come from searches of their own, which did better than "
            "the one for all sizes; they need not hold the smaller ones."
        )
    if choice.ranking is not None and not choice.ranking.reached:
        notes.append(
            f"{one.task}: the faithful search took all {choice.ranking.steps} steps before its mask had its "
            "size; the entries nearest to being grown fill it up."
        )
    if not choice.passed:
        notes.append(
            f"{one.task}: no region that was tried keeps enough on the selection rows; the one reported "
            "keeps the most. This is usual after AdamW and for adapters, and no fault."
        )
    elif choice.size == min(choice.regions):
        notes.append(f"{one.task}: the smallest region that was tried suffices; a smaller one may too.")
    if choice.search.mode == "budget" and choice.search.start == "movement":
        notes.append(
            f"{one.task}: the search that began with the movement did better than that with gradients."
        )
    return notes
