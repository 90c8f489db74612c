"""Likelihood-ratio OOD: detect texts outside the tuned model's distribution from base and tuned likelihoods.

The score of a text is log p_base − log p_tuned, in nats: higher is more out-of-distribution, and OOD is the
positive class. All other scores have the same direction.
Source: arXiv:2404.08679. Its released code multiplies a mean over T−1 tokens by T; here sums are sums.
"""

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.analyses.ood.figures import draw
from diagnostics.analyses.ood.tables import ALL, detection_of, gains_of, over_length, rows_of, tokens_of
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.paired_texts import TextOptions, read_sets
from diagnostics.evaluation.sets import load_named_sets
from diagnostics.numerics import detection_metrics
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair
from probes.text.rows import Task

if TYPE_CHECKING:
    import pandas as pd

# With fewer task rows a p-value near alpha = 0.05 is coarse.
CALIBRATED_FROM = 200
# Characters of a text that the table keeps.
SHOWN = 160

METRICS = {
    "auroc": "AUROC of the ratio, all OOD sets pooled: 0.5 is chance, 1 is perfect",
    "auroc_low": "lower end of the 95 % interval of auroc; at 0.5 or below the ratio detects nothing",
    "auroc_high": "upper end of the 95 % interval of auroc",
    "auroc_worst_set": "lowest AUROC of a single OOD set",
    "fpr95": "share of in-distribution rows flagged when 95 % of the OOD rows are caught; chance is 0.95",
    "ood_missed_at_95_id_kept": "share of OOD rows missed when 95 % of the in-distribution rows are kept",
    "aupr_ood": "average precision with OOD as the positive class; chance is the prevalence",
    "aupr_id": "average precision with in-distribution as the positive class",
    "prevalence": "share of OOD among the rows",
    "auroc_per_token": "AUROC of the ratio per token",
    "auroc_tuned_likelihood": "AUROC of the tuned likelihood alone",
    "auroc_length": "AUROC of the length alone, shorter or longer, of the OOD set that it separates best",
    "auroc_like_length": "AUROC of the ratio among rows of similar length",
    "over_likelihood": "AUROC of the ratio minus that of the tuned likelihood",
    "over_likelihood_low": "lower end of the paired 95 % interval of over_likelihood",
    "over_length": "AUROC of the ratio minus that of the length, of the OOD set with the least lead",
    "over_length_low": "lower end of the paired 95 % interval; below 0 the ratio may be no more than length",
    "per_token_gain": "AUROC of the ratio per token minus that of the ratio",
    "per_token_gain_low": "lower end of its paired 95 % interval; above 0: gate with the ratio per token",
    "per_token_gain_high": "upper end of its paired 95 % interval; below 0: gate with the summed ratio",
    "threshold_95_id_kept_nats": "ratio that 5 % of the in-distribution rows exceed",
    "threshold_95_ood_caught_nats": "ratio that 95 % of the OOD rows reach",
    "flagged_ood": "share of OOD rows with a conformal p-value below alpha",
    "gain_nats": "loss of base minus that of tuned on the task rows, nats per token",
    "keep_gain_nats": "the same on the keep rows; below 0 tuning forgot them",
    "keep_gain_high_nats": "upper end of the 95 % interval of keep_gain_nats",
    "rows_id": "in-distribution rows scored",
    "rows_ood": "OOD rows scored",
    "rows_keep": "keep rows scored",
    "unscored": "rows with nothing to score",
    "truncated": "rows cut because they are longer than the models take",
    "noise_nats": "largest change of a log-likelihood when a row is scored alone: smaller ratios are noise",
}


def summary(result: Result) -> str:
    """AUROC and FPR95 of the ratio, and whether it adds to likelihood and length."""
    m = result.metrics
    adds = "adds" if m["over_likelihood_low"] > 0 else "does not significantly add"
    return (
        f"the ratio separates {m['rows_ood']} OOD from {m['rows_id']} task rows with AUROC {m['auroc']:.3f} "
        f"({m['auroc_low']:.3f} to {m['auroc_high']:.3f}), FPR95 {m['fpr95']:.3f}; it {adds} to tuned "
        f"likelihood ({m['over_likelihood']:+.3f}); length alone {m['auroc_length']:.3f}"
        + ("; the ratio per token separates better" if m.get("per_token_gain_low", 0) > 0 else "")
    )


@analysis(
    "ood",
    question="Can base and tuned together tell which texts the tuned model was not made for?",
    reading=(
        "AUROC is the probability that an OOD row scores above a task row: 0.5 is chance, 1 is perfect. "
        "Compare it with the AUROC of the length, which needs no model and counts in either direction, and "
        "with that of the tuned likelihood, which needs no base: if the interval of the difference includes "
        "0, the ratio may add nothing. Thresholds hold for task rows that tuning never saw; training rows "
        "make them too strict. A gain below 0 on the keep rows is forgetting."
    ),
    paper="arXiv:2404.08679",
    cost="two forward passes over all rows, one copy of the model in memory; bootstrap in seconds",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"draws": 100},
        absolute={"auroc": 1e-3, "auroc_tuned_likelihood": 1e-3, "keep_gain_nats": 1e-3, "gain_nats": 1e-3},
    ),
)
def likelihood_ratio_ood(
    pair: CheckpointPair, task: Any, ood: Any, keep: Any = None, guard: Any = None, *, windows: bool = False,
    approximate: bool = False, answers: Literal["file", "greedy"] = "file", longest_answer: int = 768,
    alpha: float = 0.05, draws: int = 200, examples: int = 20, options: RowOptions = RowOptions(),
    seed: int = 0, progress: Callable[[int, int, str], None] | None = None,
) -> Result:  # fmt: skip
    """Score every row with both models, and measure how well each score detects the OOD rows.

    Each model reads with its own tokenizer. The first token of a text is scored only behind a BOS. Distances
    of task rows are to the other task rows, in five folds.

    Args:
        pair: base and tuned, two causal language models.
        task: in-distribution rows that tuning never saw: a task, a file, texts, or several by name.
        ood: out-of-distribution rows, in the same forms; each set is also reported alone.
        keep: rows of the base's own text: for their gain, and as background of relative distances.
        guard: more rows for which the gain is measured.
        options: how rows are read and how models run on them.
        max_length: most tokens of a row, or of a window; None: what both models take.
        windows: read longer rows to the end in windows that overlap by half; else they are cut. Each token is
            scored once, and both models read the same windows.
        approximate: lengths in bytes, means per byte; always so if base and tuned split a row differently.
        answers: of the `file` (ours), or tuned's own `greedy` answers to the prompts (paper).
        longest_answer: most tokens of a greedy answer (paper: 768), at most half of what the models take.
        alpha: conformal p-value below which a row is flagged (ours).
        draws: bootstrap draws for all intervals but those of AUROC, which are DeLong's (ours).
        examples: rows of each set with the highest, and as many with the lowest ratio per token, for which
            tokens are kept; fewer if they are very long (ours).
        dtype: of the models; None as stored. Likelihoods are float32, sums float64.
        seed: of folds and draws.
        progress: called with (done, total, what).

    Metrics: listed with their meanings in the registration's `metrics`; of the ratio, all OOD sets pooled,
        unless the name says otherwise.

    Tables:
        `detection`: one row an OOD set (`all`: pooled), group and score: ood, group, score, auroc, low, high
            (95 % interval of auroc), aupr, aupr_id, prevalence, fpr95, ood_missed_at_95_id_kept (shares in
            [0, 1]), <metric>_low, <metric>_high (95 % intervals), ratio_gain, ratio_gain_low,
            ratio_gain_high (AUROC of the ratio minus that of the score), threshold_95_id_kept,
            threshold_95_ood_caught (in the score's unit), rows_id, rows_ood (counts).
        `sets`: one row a set and group: set, role, group, rows, tokens (counts), median_tokens, loss_base,
            loss_tuned, gain, gain_low, gain_high (nats per token), flagged, truncated (shares).
        `rows`: one row a text: set, role, row (number in the file), group, tokens (count; here and
            everywhere else of bytes if lengths are),
            log_likelihood_base, log_likelihood_tuned (nats, summed), truncated, text (its beginning), p_value
            (conformal), flagged, and the scores (see `SCORES`): ratio, ratio_per_token, question_ratio,
            answer_ratio, conditional_ratio, tuned_likelihood, tuned_loss, base_likelihood, base_loss, length,
            max_softmax, energy, mahalanobis_<side>, relative_mahalanobis_<side>, cosine_<side>,
            neighbour_<side>.
        `tokens`: one row a scored token of the rows with the highest and lowest ratios: set, row, position,
            token, log_likelihood_base, log_likelihood_tuned, ratio (nats).

    Raises:
        InputError: models that are no causal language models, a set of fewer than 2 rows, rows that are both
            in and out of distribution, likelihoods that are not finite.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r1")
        >>> result = likelihood_ratio_ood(pair, ["one line", "two lines"], ["x = 1", "y = 2"], draws=10)
        >>> result.metrics["rows_ood"]
        2
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; it is a probability between 0 and 1")
    if answers not in ("file", "greedy"):
        raise InputError(f"answers is {answers!r}; it is one of: file, greedy")
    roles, sets = load_named_sets(
        {"task": task, "ood": ood, "keep": keep, "guard": guard}, least=2, purpose="OOD detection"
    )
    refuse_overlap(roles, sets)
    text_options = TextOptions(
        windows=windows, in_bytes=approximate, answers=answers, longest_answer=longest_answer,
        **options.of_rows,
    )  # fmt: skip
    with RunnablePair(pair, **options.of_models) as runnable:
        reading = read_sets(runnable, sets, text_options, progress)
        tokenizer = runnable.tokenizer
    rows, notes = rows_of(reading, roles, seed=seed)
    inside, outside = (rows[(rows["role"] == role) & rows["ratio"].notna()] for role in ("task", "ood"))
    for role, part in (("task", inside), ("ood", outside)):
        if len(part) < 2:
            raise InputError(
                f"--{role}: {len(part)} of {(rows['role'] == role).sum()} rows have a token to score, and "
                "OOD detection needs at least 2; a text of one token is scored only behind a BOS"
            )
    scored = rows["ratio"].notna()
    rows.loc[scored, "p_value"] = detection_metrics.conformal_p(inside["ratio"], rows.loc[scored, "ratio"])
    # A task row is not compared with itself.
    ranks = detection_metrics.conformal_p(inside["ratio"], inside["ratio"]) * (len(inside) + 1) - 1
    rows.loc[inside.index, "p_value"] = ranks / len(inside)
    rows["flagged"] = rows["p_value"] < alpha
    inside, outside = rows.loc[inside.index], rows.loc[outside.index]
    detection = detection_of(inside, outside, draws=draws, seed=seed)
    gains = gains_of(rows)
    metrics = metrics_of(detection, gains, inside, outside) | {
        "unscored": int((~scored).sum()),
        "truncated": int(rows["truncated"].sum()),
        "noise_nats": reading.noise,
    }
    if keep is not None:
        metrics["rows_keep"] = int((scored & (rows["role"] == "keep")).sum())
    if metrics["truncated"]:
        notes.append(
            f"{metrics['truncated']} of {len(rows)} rows were cut; --set ood.windows=true scores them to the "
            "end in windows"
        )
    if len(inside) < CALIBRATED_FROM:
        notes.append(
            f"{len(inside)} task rows calibrate the p-values; fewer than {CALIBRATED_FROM} leave them coarse"
        )
    notes += gate_notes(metrics)
    shown = rows.assign(text=rows["text"].str.slice(0, SHOWN))
    tables = {"detection": detection, "sets": gains, "rows": shown}
    if not reading.in_bytes:
        tables["tokens"] = tokens_of(reading, rows, tokenizer, examples)
    return Result(metrics=metrics, tables=tables, notes=(*reading.notes, *notes))


def gate_notes(metrics: Mapping[str, float | int]) -> list[str]:
    """The note on which ratio to gate with, where one surely separates better."""
    if metrics["per_token_gain_low"] > 0:
        better, worse, bound = "ratio per token", "summed ratio", metrics["per_token_gain_low"]
        setting = "per_token=True, `tunescope detect --per-token`"
    elif metrics["per_token_gain_high"] < 0:
        better, worse, bound = "summed ratio", "ratio per token", -metrics["per_token_gain_high"]
        setting = "per_token=False, the default"
    else:
        return []
    lead = abs(metrics["per_token_gain"])
    return [
        f"gate with the {better}: its AUROC is {lead:.3f} above that of the {worse} (at least {bound:.3f}); "
        f"for the detector that is {setting}"
    ]


def refuse_overlap(roles: Mapping[str, str], sets: Mapping[str, Task]) -> None:
    """Refuse a task set and an OOD set with the same rows."""
    for (name, task), (other, ood) in product(sets.items(), repeat=2):
        if (roles[name], roles[other]) == ("task", "ood") and task.fingerprint == ood.fingerprint:
            raise InputError(
                f"{task.ref} and {ood.ref} hold the same rows, which cannot be in and out of distribution"
            )


def metrics_of(
    detection: "pd.DataFrame", gains: "pd.DataFrame", inside: "pd.DataFrame", outside: "pd.DataFrame"
) -> dict[str, float | int]:
    """The metrics of the ratio, all OOD sets pooled, and of the scores that it must beat."""
    ungrouped = detection[detection["group"].isna()]
    pooled = ungrouped[ungrouped["ood"] == ALL].set_index("score")
    ratio, likelihood, per_token = (
        pooled.loc[score] for score in ("ratio", "tuned_likelihood", "ratio_per_token")
    )
    length, lead = over_length(inside, outside)
    of_sets = ungrouped[(ungrouped["score"] == "ratio") & (ungrouped["ood"] != ALL)]
    metrics: dict[str, Any] = {
        "auroc": ratio["auroc"], "auroc_low": ratio["low"], "auroc_high": ratio["high"],
        "auroc_worst_set": min(of_sets["auroc"], default=ratio["auroc"]), "fpr95": ratio["fpr95"],
        "ood_missed_at_95_id_kept": ratio["ood_missed_at_95_id_kept"], "aupr_ood": ratio["aupr"],
        "aupr_id": ratio["aupr_id"], "prevalence": ratio["prevalence"],
        "auroc_per_token": per_token["auroc"], "auroc_tuned_likelihood": likelihood["auroc"],
        "auroc_length": length,
        "over_likelihood": likelihood["ratio_gain"], "over_likelihood_low": likelihood["ratio_gain_low"],
        "over_length": lead.value, "over_length_low": lead.low, "per_token_gain": 0 - per_token["ratio_gain"],
        "per_token_gain_low": 0 - per_token["ratio_gain_high"],
        "per_token_gain_high": 0 - per_token["ratio_gain_low"],
        "threshold_95_id_kept_nats": ratio["threshold_95_id_kept"],
        "threshold_95_ood_caught_nats": ratio["threshold_95_ood_caught"],
        "flagged_ood": outside["flagged"].mean(),
    }  # fmt: skip
    ratios, lengths = (detection_metrics.DetectionScores(inside[c], outside[c]) for c in ("ratio", "length"))
    metrics["auroc_like_length"] = detection_metrics.auroc_within(ratios, lengths).value
    # Of several sets of a role the worst comes first.
    ungrouped = gains[gains["group"].isna()].sort_values("gain", kind="stable")
    worst = ungrouped.drop_duplicates("role").set_index("role")
    if "task" in worst.index:
        metrics["gain_nats"] = worst.loc["task", "gain"]
    if "keep" in worst.index:
        metrics["keep_gain_nats"], metrics["keep_gain_high_nats"] = worst.loc["keep", ["gain", "gain_high"]]
    finite = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
    return {**finite, "rows_id": len(inside), "rows_ood": len(outside)}
