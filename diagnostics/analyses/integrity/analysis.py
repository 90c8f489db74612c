"""Integrity: is this the model that you think it is?

Weights and files alone answer five questions, before anything is measured on rows: was anything tuned, is it
base with this adapter merged in, what changed outside the weights, how much of tuned could be compared, and
are the numbers usable? Both checkpoints are read exactly once, tensor by tensor; no model is run.

Sources: ours; the merge is PEFT's `merge_and_unload`, the quantised bases are those of arXiv:2305.14314 (nf4)
and arXiv:2208.07339 (int8).
"""

from typing import Any

from diagnostics.analyses.integrity import tables
from diagnostics.analyses.integrity.direction import evidence
from diagnostics.analyses.integrity.figures import draw
from diagnostics.analyses.integrity.file_changes import Change, changes, template_diff
from diagnostics.analyses.integrity.merge import pooled_factor
from diagnostics.analyses.integrity.model_files import ModelFiles
from diagnostics.analyses.integrity.notes import notes_of
from diagnostics.analyses.integrity.reading import Measured, PairReader
from diagnostics.core.analysis import Result, analysis
from probes import CheckpointPair, open_checkpoint
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.usable import problems
from probes.errors import InputError
from probes.progress import Progress

METRICS = {
    "nothing_tuned": "1 where every weight of tuned equals base's, up to rounding; else 0",
    "changed_share": "share of the compared entries that differ by more than rounding",
    "changed_tensors": "stored tensors with such an entry",
    "compared_share": "share of tuned's parameters that have a counterpart in base",
    "unusable_base": "required tensors that base lacks or that are empty",
    "unusable_tuned": "the same of tuned",
    "nonfinite_base": "NaN and infinite entries of base",
    "nonfinite_tuned": "NaN and infinite entries of tuned",
    "overflow_tuned": "finite entries of tuned that are infinite in the dtype that its config.json names",
    "dead_rows": "outputs of tuned's matrices whose weights are all zero, above base's number",
    "subnormal_share": "share of tuned's entries that are subnormal: they have lost digits",
    "function_changes": "fields of config.json that change what equal weights compute",
    "lost_stops": "ways in which generation no longer stops where a turn ends",
    "template_changed": "1 where base's chat template was edited or lost; else 0",
    "tokenizer_changes": "changes of how texts are split, or of the ids of tokens",
    "reordered_labels": "1 where the classes of base are in another order; else 0",
    "shortened": "1 where the longest context is shorter than base's; else 0",
    "damaged": "files outside the weights that cannot be read",
    "swapped": "files of one side that name the other, in the wrong direction",
    "adapted": "matrices that the adapter changes",
    "merged": "of these, with the adapter's delta added once",
    "unmerged": "of these, equal to base's",
    "scaled": "of these, with another multiple of the delta (doubled, halved, 1.02 times, subtracted)",
    "other_delta": "of these, that base and this adapter do not explain: another adapter, or more than it",
    "lost": "of these, where the rounding of the merge took most of the delta",
    "factor": "how often the delta was added, over all matrices that base and adapter explain",
    "factor_low": "lower end of its interval (five standard errors)",
    "factor_high": "upper end of its interval",
    "factor_off": "by how much the interval misses 1; 0 where it holds 1",
    "outside": "matrices that changed although the adapter leaves them alone",
    "quantised_base": "matrices merged into a base that was quantised to 4 or 8 bits",
}  # fmt: skip
COUNTED = (
    "function_changes", "lost_stops", "template_changed", "tokenizer_changes", "reordered_labels",
    "shortened", "damaged",
)  # fmt: skip
# verdict on a matrix -> the metric that counts it
MERGE_METRICS = {
    "merged": "merged", "unmerged": "unmerged", "doubled": "scaled", "scaled": "scaled",
    "subtracted": "scaled", "more": "other_delta", "other": "other_delta", "lost": "lost",
}  # fmt: skip


def summary(result: Result) -> str:
    """What was tuned, whether the adapter is in it, and how many differences are to be looked at."""
    metrics = result.metrics
    if metrics["nothing_tuned"]:
        parts = ["nothing was tuned: every weight equals base's"]
    else:
        parts = [f"{metrics['changed_share']:.3g} of the entries changed"]
    if "adapted" in metrics:
        parts.append(f"the adapter is merged in {metrics['merged']} of {metrics['adapted']} matrices")
    if bad := metrics["nonfinite_tuned"] + metrics["nonfinite_base"]:
        parts.append(f"{bad:,} {'weight is' if bad == 1 else 'weights are'} NaN or infinite")
    if missing := metrics["unusable_base"] + metrics["unusable_tuned"]:
        parts.append(
            f"{missing:,} required {'tensor is' if missing == 1 else 'tensors are'} missing or empty"
        )
    if (differences := result.tables.get("changes")) is not None:
        warned, total = int((differences["judged"] != "info").sum()), len(differences)
        count = f"{total} difference{'s' * (total != 1)} outside the weights, {warned or 'none'} to look at"
        parts.append(count if total else "nothing outside the weights differs")
    return "; ".join(parts)


@analysis(
    "integrity",
    question="Is this the model that you think it is?",
    reading="A finding here means that a file is not what it seems: mend it before you read other numbers. "
    "With --adapter, a factor of 1 is a faultless merge, 0 an unmerged matrix, 2 one that was merged twice.",
    paper="none: ours",
    cost="reads both checkpoints once",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    preflight=True,
)
def checkpoint_integrity(
    pair: CheckpointPair, adapter: Any = None, *, progress: Progress | None = None
) -> Result:
    """Check that a pair is what it seems.

    Args:
        pair: base and tuned.
        adapter: the adapter that was merged into tuned, as `open_checkpoint` takes it; adds the merge check.
        progress: called with (done, total, tensor).

    Metrics: see `METRICS`; those from `adapted` on need an adapter.

    Tables:
        `changes`: one row a difference outside the weights: where (file or subject), what, base, tuned (their
            values), judged (info, warn), meaning.
        `compared`: one row a stored tensor of tuned: tensor, layer, component, part, entries, compared
            (entries with a counterpart in base), changed (of these, by more than rounding), changed_share.
        `health`: one row a stored tensor of either side: side, tensor, layer, component, dtype, entries, nan,
            infinite, subnormal, zero, dead_rows, overflow (counts), largest (finite magnitude).
        `merge`: one row a matrix that the adapter changes, or that changed without it: matrix, layer,
            component, factor, low, high (how often the delta was added, with its interval), residual (root
            mean square, as a share of base's), outside (share of entries off by more than rounding), kept
            (share of the delta that rounding leaves), verdict, scheme (of a quantised base).
        `template`: one row a line of the difference of the chat templates: line, mark (+ or -), text.
        `direction`: one row a fact on which side was tuned from which: evidence, says (right, swapped),
            weight (strong, weak).

    Raises:
        InputError: the adapter is none, or does not fit base.

    Example:
        >>> from diagnostics import checkpoint_integrity
        >>> from diagnostics.audit.demo import BUNDLED
        >>> result = checkpoint_integrity(CheckpointPair(BUNDLED / "base", BUNDLED / "full"))
        >>> result.metrics["nothing_tuned"], result.metrics["compared_share"]
        (0, 1.0)
    """
    opened = None if adapter is None else open_adapter(adapter, pair)
    measured = PairReader(pair, opened).run(progress)
    sides = ModelFiles.of(pair.base), ModelFiles.of(pair.tuned)
    differences = changes(pair, *sides)
    facts = evidence(pair, opened)
    required = [problems(side) for side in (pair.base, pair.tuned)]
    metrics = _weights(pair, measured) | {
        "unusable_base": len(required[0]), "unusable_tuned": len(required[1]),
        **_counts_by_kind(differences),
        "swapped": sum(fact.says == "swapped" and fact.weight == "strong" for fact in facts),
    }  # fmt: skip
    frames = {
        "changes": tables.changes_table(differences),
        "compared": tables.compared_table(measured.compared),
        "health": tables.health_table(measured.healths),
    }
    if opened is not None:
        metrics |= _merge(measured)
        frames["merge"] = tables.merge_table(measured)
    if diff := template_diff(*sides):
        frames["template"] = tables.template_table(diff)
    if facts:
        frames["direction"] = tables.direction_table(facts)
    notes = notes_of(pair, sides, measured, required, facts)
    return Result(metrics=metrics, tables=frames, notes=tuple(notes))


def open_adapter(adapter: Any, pair: CheckpointPair) -> Checkpoint:
    """The adapter, applied to the base of a pair; raises InputError if it is none."""
    base = pair.base.base or pair.base
    opened = open_checkpoint(adapter, base=base)
    if opened.kind != "adapter":
        raise InputError(
            f"--adapter {opened.ref}: holds full weights and no adapter; name the directory with "
            "adapter_config.json"
        )
    return opened


def _weights(pair: CheckpointPair, measured: Measured) -> dict[str, float | int]:
    """The metrics of the weights."""
    rows = measured.compared
    compared = sum(row.compared for row in rows)
    changed = sum(row.changed for row in rows)
    alone = any(row.compared < row.entries for row in rows)
    base, tuned = ([row for row in measured.healths if row.side == side] for side in ("base", "tuned"))
    tuned_entries = sum(row.health.entries for row in tuned)
    return {
        "nothing_tuned": int(compared > 0 and not changed and not alone),
        "changed_share": changed / compared if compared else 0.0,
        "changed_tensors": sum(row.changed > 0 for row in rows),
        "compared_share": pair.compared,
        "nonfinite_base": sum(row.health.nan + row.health.infinite for row in base),
        "nonfinite_tuned": sum(row.health.nan + row.health.infinite for row in tuned),
        "overflow_tuned": sum(row.overflow for row in tuned),
        "dead_rows": _new_dead_rows(measured),
        "subnormal_share": sum(row.health.subnormal for row in tuned) / tuned_entries
        if tuned_entries
        else 0.0,
    }


def _new_dead_rows(measured: Measured) -> int:
    """Dead outputs of tuned's tensors beyond those of the same tensors of base."""
    before = {row.tensor: row.dead for row in measured.healths if row.side == "base"}
    return sum(
        max(0, row.dead - before.get(row.tensor, 0)) for row in measured.healths if row.side == "tuned"
    )


def _counts_by_kind(differences: list[Change]) -> dict[str, int]:
    """The metrics of what changed outside the weights."""
    return {kind: sum(change.kind == kind for change in differences) for kind in COUNTED}


def _merge(measured: Measured) -> dict[str, float | int]:
    """The metrics of the merge check."""
    fits = [row.fit for row in measured.merges if row.fit is not None and row.fit.verdict != "no delta"]
    counts = dict.fromkeys(dict.fromkeys(MERGE_METRICS.values()), 0)
    for fit in fits:
        counts[MERGE_METRICS[fit.verdict]] += 1
    counts["unmerged"] += len(measured.unread)
    metrics: dict[str, float | int] = {"adapted": len(fits) + len(measured.unread), **counts}
    pooled = pooled_factor(
        [fit for fit in fits if fit.verdict in ("merged", "scaled", "doubled", "unmerged")]
    )
    if pooled is not None:
        factor, low, high = pooled
        metrics |= {"factor": factor, "factor_low": low, "factor_high": high}
    # Where each matrix alone is named above, only what hides in all of them is left to say.
    explained = pooled_factor([fit for fit in fits if fit.verdict == "merged" and not fit.scheme])
    if explained is not None:
        metrics["factor_off"] = max(0.0, explained[1] - 1, 1 - explained[2])
    metrics["outside"] = sum(row.fit is None and not row.scheme for row in measured.merges)
    schemes = [row.fit.scheme if row.fit is not None else row.scheme for row in measured.merges]
    metrics["quantised_base"] = sum(map(bool, schemes))
    return metrics
