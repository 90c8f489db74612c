"""Likelihood-ratio OOD: the base of a tuned language model shows which texts tuning did not teach it.

The score of a text is log p_base − log p_tuned, in nats: higher is more out-of-distribution, and OOD is the
positive class. Every other score here points the same way.
Source: arXiv:2404.08679. Its released code multiplies a mean over T−1 tokens by T; here sums are sums.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.analyses.ood.figures import draw
from diagnostics.analyses.ood.tables import ALL, detection_of, gains_of, rows_of, tokens_of
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.paired_texts import TextOptions, read_sets
from diagnostics.numerics import detection_metrics
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair

if TYPE_CHECKING:
    import pandas as pd

# A p-value below alpha = 0.05 is coarse with fewer.
CALIBRATED_FROM = 200
# Characters of a text that the table keeps.
SHOWN = 160

METRICS = {
    "auroc": "chance that an OOD row has a higher ratio than an in-distribution row, all OOD sets together",
    "auroc_low": "lower end of its 95 % interval; at 0.5 or below the ratio detects nothing",
    "auroc_high": "upper end",
    "auroc_worst_set": "the AUROC of the OOD set that the ratio finds hardest",
    "fpr95": "share of in-distribution rows flagged when 95 % of the OOD rows are caught; chance is 0.95",
    "ood_missed_at_95_id_kept": "share of OOD rows missed when 95 % of the in-distribution rows are kept",
    "aupr_ood": "average precision with OOD as the class to find; chance is the prevalence",
    "aupr_id": "average precision with in-distribution as the class to find",
    "prevalence": "share of OOD among the rows",
    "auroc_per_token": "AUROC of the ratio divided by the tokens",
    "auroc_tuned_likelihood": "AUROC of the tuned likelihood alone",
    "auroc_length": "AUROC of the length alone",
    "auroc_like_length": "AUROC of the ratio among rows of like length",
    "over_likelihood": "AUROC of the ratio minus that of the tuned likelihood",
    "over_likelihood_low": "lower end of its paired 95 % interval",
    "over_length": "AUROC of the ratio minus that of the length",
    "over_length_low": "lower end of its paired 95 % interval; below 0 the ratio may be no more than length",
    "threshold_95_id_kept_nats": "ratio that 5 % of the in-distribution rows exceed",
    "threshold_95_ood_caught_nats": "ratio that 95 % of the OOD rows reach",
    "flagged_ood": "share of OOD rows with a conformal p below alpha",
    "gain_nats": "nats per token that tuning won on the task rows",
    "keep_gain_nats": "nats per token that it won on the keep rows; below 0 they were forgotten",
    "keep_gain_high_nats": "upper end of its 95 % interval",
    "rows_id": "in-distribution rows scored",
    "rows_ood": "OOD rows scored",
    "rows_keep": "keep rows scored",
    "unscored": "rows with nothing to score",
    "truncated": "rows cut because they are longer than the models take",
    "noise_nats": "largest change of a log-likelihood when a row is read by itself: smaller ratios are noise",
}


def summary(result: Result) -> str:
    """How well the ratio tells the sets apart, and whether it adds to likelihood and length."""
    m = result.metrics
    text = f"the ratio tells {m['rows_ood']} OOD from {m['rows_id']} task rows with AUROC {m['auroc']:.3f}"
    text += f" ({m['auroc_low']:.3f} to {m['auroc_high']:.3f}), FPR95 {m['fpr95']:.3f}; "
    added = "adds" if m["over_likelihood_low"] > 0 else "does not surely add"
    text += f"it {added} to tuned likelihood ({m['over_likelihood']:+.3f})"
    return f"{text}; length alone {m['auroc_length']:.3f}"


@analysis(
    "ood",
    question="Can base and tuned together tell which texts the tuned model was not made for?",
    reading=(
        "AUROC is the chance that an OOD row scores above a task row: 0.5 is a coin, 1 is perfect. Compare "
        "it with that of the length, which knows nothing of the models, and of the tuned likelihood, which "
        "needs no base: where the interval of a difference includes 0, the ratio adds nothing sure. "
        "Thresholds hold for task rows that tuning never saw; rows it was trained on make them too strict. A "
        "gain below 0 on the keep rows is forgetting."
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
    pair: CheckpointPair,
    task: Any,
    ood: Any,
    keep: Any = None,
    guard: Any = None,
    *,
    windows: bool = False,
    approximate: bool = False,
    answers: Literal["file", "greedy"] = "file",
    longest_answer: int = 768,
    alpha: float = 0.05,
    draws: int = 200,
    examples: int = 20,
    options: RowOptions = RowOptions(),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Score every row by both models, and tell how well each score finds the OOD rows.

    The first token has nothing before it and is scored only behind a BOS. Distances of task rows are to the
    other task rows, in five folds.

    Args:
        pair: base and tuned, two causal language models.
        task: in-distribution rows that tuning never saw: a task, a file, texts, or several of these by name.
        ood: the same, out of distribution; results are given for each.
        keep: rows of the base's own text: for their gain, and for what relative distances are relative to.
        guard: more rows whose gain is measured.
        options: how rows are read and how models run on them.
        max_length: most tokens of a row, or of a window; None: what both models take.
        windows: read longer rows to their end, in windows of that many tokens that overlap by half; else they
            are cut. Each token is scored once, and both models read the same windows.
        approximate: let tokenizers differ; ratios are then per byte, and of one segmentation of each text.
        answers: to prompts, those of the `file` (ours) or tuned's own `greedy` ones (paper).
        longest_answer: of the greedy ones, in tokens (paper: 768), but at most half of what the models take.
        alpha: conformal p-value below which a row is flagged (ours).
        draws: bootstrap draws for intervals of all but the AUROC, which has DeLong's (ours).
        examples: rows of each set whose tokens are kept, as many of the most and of the least foreign; fewer
            where they are very long (ours).
        dtype: of the models; None as stored. Likelihoods are float32, sums float64.
        seed: of folds and draws.
        progress: called with (done, total, what).

    Metrics: see `METRICS`; `auroc` and `fpr95` are those of the ratio with all OOD sets pooled.
    Tables: `detection` (ood, group, score, auroc, low, high, aupr, fpr95 …), `rows`, `sets`, `tokens`.

    Raises:
        InputError: models or tokenizers that cannot be compared, a set of fewer than 2 rows, rows that are
            both in and out of distribution, likelihoods that are not finite.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; it is a probability between 0 and 1")
    if answers not in ("file", "greedy"):
        raise InputError(f"answers is {answers!r}; it is one of: file, greedy")
    roles, sets = named({"task": task, "ood": ood, "keep": keep, "guard": guard})
    settings = TextOptions(
        windows=windows,
        approximate=approximate,
        answers=answers,
        longest_answer=longest_answer,
        **options.of_rows,
    )
    with RunnablePair(pair, **options.of_models) as runnable:
        reading = read_sets(runnable, sets, settings, progress)
        words = runnable.tokenizer
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
    # A task row is not among those that it is compared with.
    own = detection_metrics.conformal_p(inside["ratio"], inside["ratio"]) * (len(inside) + 1) - 1
    rows.loc[inside.index, "p_value"] = own / len(inside)
    rows["flagged"] = rows["p_value"] < alpha
    inside, outside = rows.loc[inside.index], rows.loc[outside.index]
    detection = detection_of(inside, outside, draws=draws, seed=seed)
    gains = gains_of(rows)
    metrics = metrics_of(detection, gains, inside, outside)
    metrics |= {
        "unscored": int((~scored).sum()),
        "truncated": int(rows["truncated"].sum()),
        "noise_nats": reading.noise,
    }
    if keep is not None:
        metrics["rows_keep"] = int((scored & (rows["role"] == "keep")).sum())
    if metrics["truncated"]:
        notes.append(
            f"{metrics['truncated']} of {len(rows)} rows were cut, and their ends not scored: "
            "--set ood.windows=true reads them to the end, window by window"
        )
    if len(inside) < CALIBRATED_FROM:
        notes.append(
            f"{len(inside)} task rows calibrate the p-values, which fewer than {CALIBRATED_FROM} leave coarse"
        )
    tables = {
        "detection": detection,
        "sets": gains,
        "rows": rows.assign(text=rows["text"].str.slice(0, SHOWN)),
    }
    if not approximate:
        tables["tokens"] = tokens_of(reading, rows, words, examples)
    return Result(metrics=metrics, tables=tables, notes=(*reading.notes, *notes))


def named(given: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Role and task of every set, by a name that no two share.

    Raises:
        InputError: a set has fewer than 2 rows, or rows are both in and out of distribution.
    """
    roles, sets = {}, {}
    for role, source in given.items():
        for name, task in tasks(source, role).items() if source is not None else ():
            name = name if name not in sets else f"{role}:{name}"
            roles[name], sets[name] = role, task.at_least(2, "OOD detection")
    for name, task in sets.items():
        for other, its in sets.items():
            if (roles[name], roles[other]) == ("task", "ood") and task.fingerprint == its.fingerprint:
                raise InputError(
                    f"{task.ref} and {its.ref} hold the same rows, which cannot be in and out of distribution"
                )
    return roles, sets


def metrics_of(
    detection: "pd.DataFrame", gains: "pd.DataFrame", inside: "pd.DataFrame", outside: "pd.DataFrame"
) -> dict[str, float | int]:
    """The numbers of the ratio, all OOD sets together, and of what it must beat."""
    whole: dict[tuple[str, str], dict[str, Any]] = {
        (row["ood"], row["score"]): {str(column): value for column, value in row.items()}
        for row in detection[detection["group"].isna()].to_dict("records")
    }
    ratio, likelihood, length = (whole[ALL, score] for score in ("ratio", "tuned_likelihood", "length"))
    sets = [name for name in dict.fromkeys(detection["ood"]) if name != ALL]
    metrics: dict[str, Any] = {
        "auroc": ratio["auroc"],
        "auroc_low": ratio["low"],
        "auroc_high": ratio["high"],
        "auroc_worst_set": min([whole[name, "ratio"]["auroc"] for name in sets] or [ratio["auroc"]]),
        "fpr95": ratio["fpr95"],
        "ood_missed_at_95_id_kept": ratio["ood_missed_at_95_id_kept"],
        "aupr_ood": ratio["aupr"],
        "aupr_id": ratio["aupr_id"],
        "prevalence": ratio["prevalence"],
        "auroc_per_token": whole[ALL, "ratio_per_token"]["auroc"],
        "auroc_tuned_likelihood": likelihood["auroc"],
        "auroc_length": length["auroc"],
        "over_likelihood": likelihood["ratio_gain"],
        "over_likelihood_low": likelihood["ratio_gain_low"],
        "over_length": length["ratio_gain"],
        "over_length_low": length["ratio_gain_low"],
        "threshold_95_id_kept_nats": ratio["threshold_95_id_kept"],
        "threshold_95_ood_caught_nats": ratio["threshold_95_ood_caught"],
        "flagged_ood": outside["flagged"].mean(),
    }
    ratios, lengths = (detection_metrics.DetectionScores(inside[c], outside[c]) for c in ("ratio", "length"))
    metrics["auroc_like_length"] = detection_metrics.auroc_within(ratios, lengths).value
    for role, name in (("task", "gain"), ("keep", "keep_gain")):
        part = gains[(gains["role"] == role) & gains["group"].isna()]
        if len(part):
            # Several sets of one role: the one that fares worst.
            worst = min(part.to_dict("records"), key=lambda row: row["gain"])
            metrics[f"{name}_nats"] = worst["gain"]
            if role == "keep":
                metrics["keep_gain_high_nats"] = worst["gain_high"]
    plain: dict[str, float | int] = {
        name: float(value) for name, value in metrics.items() if not math.isnan(value)
    }
    return {**plain, "rows_id": len(inside), "rows_ood": len(outside)}
