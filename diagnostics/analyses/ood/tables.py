"""The tables of likelihood-ratio OOD: every score of every row, and how well each finds the OOD rows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from diagnostics.evaluation.paired_texts import PairedText, PairedTexts
from diagnostics.numerics import detection_metrics, vector_distances
from diagnostics.numerics.estimates import combined

if TYPE_CHECKING:
    import pandas as pd

# score -> what it is; all are higher for what is more out-of-distribution
SCORES = {
    "ratio": "log-likelihood of base minus tuned, summed (LR)",
    "ratio_per_token": "the same, mean over the tokens (NLR)",
    "question_ratio": "ratio of the question by itself (S_q)",
    "answer_ratio": "ratio of the answer by itself (S_a)",
    "conditional_ratio": "ratio of the answer given the question (S_a|q)",
    "tuned_likelihood": "minus the log-likelihood under tuned, summed (LH)",
    "tuned_loss": "the same, mean over the tokens; its exponential is the perplexity (NLH)",
    "base_likelihood": "minus the log-likelihood under base, summed",
    "base_loss": "the same, mean over the tokens",
    "length": "scored tokens: what the data alone give away",
    "max_softmax": "minus tuned's largest probability, mean over the tokens",
    "energy": "minus tuned's log of summed exponentials of logits, mean over the tokens",
    "mahalanobis_base": "distance of the mean last hidden state of base to the task rows'",
    "mahalanobis_tuned": "the same of tuned",
    "relative_mahalanobis_base": "that distance of base minus the one to the keep rows'",
    "relative_mahalanobis_tuned": "the same of tuned",
    "cosine_base": "1 − largest cosine of base's mean last hidden state with a task row's",
    "cosine_tuned": "the same of tuned",
    "neighbour_base": "distance of base's, at length 1, to the 10th nearest task row",
    "neighbour_tuned": "the same of tuned",
}
ALL = "all"
# Tokens whose ratios an audit keeps, of all sets together: two or three MB as it is written.
TOKENS = 200_000
# Fewer task rows say nothing of how they are spread.
SPREAD_FROM = 10
# column -> the metric in it whose interval is drawn
INTERVALS: dict[str, detection_metrics.Metric] = {
    "aupr": "aupr_ood",
    "aupr_id": "aupr_id",
    "fpr95": "fpr95",
    "ood_missed_at_95_id_kept": "ood_missed_at_95_id_kept",
}


def ratio_scores(
    base: Float[np.ndarray, " rows"], tuned: Float[np.ndarray, " rows"], length: Float[np.ndarray, " rows"]
) -> dict[str, Float[np.ndarray, " rows"]]:
    """The scores made of log-likelihoods of whole texts and their lengths; NaN where nothing was scored.

    `ratio` is in expectation −KL(tuned‖base) for texts that tuned writes and KL(base‖tuned) for those that
    base writes; 0 says that tuning changed nothing for this text.
    """
    per = np.where(length > 0, length, np.nan)
    ratio = base - tuned
    return {
        "ratio": ratio,
        "ratio_per_token": ratio / per,
        "tuned_likelihood": -tuned,
        "tuned_loss": -tuned / per,
        "base_likelihood": -base,
        "base_loss": -base / per,
        "length": np.where(np.isnan(ratio), np.nan, length),
    }


def rows_of(reading: PairedTexts, roles: Mapping[str, str], *, seed: int) -> "tuple[pd.DataFrame, list[str]]":
    """One row a text with all of its scores, and what to say of them."""
    import pandas as pd

    texts = [(name, text) for name, several in reading.sets.items() for text in several]
    base, tuned = (
        np.array([getattr(text, side).whole.log_likelihood for _, text in texts])
        for side in ("base", "tuned")
    )
    length = np.array([float(text.length) for _, text in texts])
    rows = pd.DataFrame(
        {
            "set": [name for name, _ in texts],
            "role": [roles[name] for name, _ in texts],
            "row": [text.row.number for _, text in texts],
            "group": pd.Series([text.row.group for _, text in texts], dtype=object),
            "tokens": [text.length for _, text in texts],
            "log_likelihood_base": base,
            "log_likelihood_tuned": tuned,
            **ratio_scores(base, tuned, length),
            "max_softmax": [-text.tuned.whole.top for _, text in texts],
            "energy": [text.tuned.whole.energy for _, text in texts],
            "truncated": [text.truncated for _, text in texts],
            "text": [text.content for _, text in texts],
        }
    )
    notes = []
    for form in ("question", "answer", "conditional"):
        ratio = np.array([getattr(text.base, form) - getattr(text.tuned, form) for _, text in texts])
        if not np.isnan(ratio).all():
            rows[f"{form}_ratio"] = ratio
            lacking = [
                text.row.completion is not None and np.isfinite(one + two) and np.isnan(own)
                for (_, text), one, two, own in zip(texts, base, tuned, ratio, strict=True)
            ]
            if any(lacking):
                notes.append(
                    f"{sum(lacking)} rows have no {form}_ratio, because no token of it is scored; that "
                    "score is judged without them"
                )
    for side in ("base", "tuned"):
        pooled = [getattr(text, side).whole.pooled for _, text in texts]
        seen = np.array([each is not None for each in pooled])
        few = int((seen & (rows["role"] == "task")).sum())
        if few < SPREAD_FROM:
            notes.append(
                f"{side}: distances need {SPREAD_FROM} task rows with hidden states, and there are {few}"
            )
            continue
        vectors = np.stack([each for each in pooled if each is not None])
        found = distances_of(vectors, rows.loc[seen, "role"].to_numpy(dtype=str), seed)
        for name, values in found.items():
            rows.loc[seen, f"{name}_{side}"] = values
    if not any(str(name).startswith("relative_") for name in rows) and not notes:
        notes.append("relative distances need --keep F: they are relative to its rows")
    spellings = {role: set(rows.loc[rows["role"] == role, "text"].str.casefold()) for role in ("task", "ood")}
    common = len(spellings["task"] & spellings["ood"])
    if common:
        notes.append(
            f"{common} texts are both among the task and among the OOD rows; no score can tell these apart"
        )
    return rows, notes


def distances_of(
    vectors: Float[np.ndarray, "rows width"], role: np.ndarray, seed: int
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Distances of every vector to the task rows', held out, and relative to those to the keep rows'."""
    inside = role == "task"
    found = {}
    for name in ("mahalanobis", "cosine", "neighbour"):
        values = np.empty(len(vectors))
        values[inside], values[~inside] = vector_distances.held_out(
            getattr(vector_distances, name), vectors[inside], vectors[~inside], seed=seed
        )
        found[name] = values
    if (role == "keep").sum() >= SPREAD_FROM:
        background = vector_distances.mahalanobis(vectors[role == "keep"], vectors)
        # The keep rows made the background: their own distance to it is too short.
        found["relative_mahalanobis"] = np.where(role == "keep", np.nan, found["mahalanobis"] - background)
    return found


def detection_of(inside: "pd.DataFrame", outside: "pd.DataFrame", *, draws: int, seed: int) -> "pd.DataFrame":
    """How well each score finds the OOD rows, of each set, of each group in it, and of all sets together."""
    import pandas as pd

    parts: list[tuple[str, Any, pd.DataFrame]] = [(ALL, None, outside)]
    for name, part in outside.groupby("set", sort=False):
        parts.append((str(name), None, part))
        parts += [(str(name), group, own) for group, own in part.groupby("group", sort=False)]
    rows = []
    for name, group, part in parts:
        if len(part) < 2:
            continue
        for score in SCORES:
            if score not in inside:
                continue
            has = [rows[rows[score].notna()] for rows in (inside, part)]
            # Sets without this score would make it one of other rows than the scores beside it.
            partly = set(has[0]["set"]) < set(inside["set"]) or set(has[1]["set"]) < set(part["set"])
            if partly or min(map(len, has)) < 2:
                continue
            made, ratio = (
                detection_metrics.DetectionScores(*(rows[name] for rows in has)) for name in (score, "ratio")
            )
            found = detection_metrics.detection(*made)
            area = detection_metrics.auroc_interval(*made)
            row = {"ood": name, "group": group, "score": score, **found, "low": area.low, "high": area.high}
            row["aupr"] = row.pop("aupr_ood")
            if group is None:
                for column, metric in INTERVALS.items():
                    drawn = detection_metrics.bootstrap(metric, made, draws=draws, seed=seed)
                    row |= {f"{column}_low": drawn.low, f"{column}_high": drawn.high}
            gain = detection_metrics.auroc_difference(ratio, made)
            row |= {"ratio_gain": gain.value, "ratio_gain_low": gain.low, "ratio_gain_high": gain.high}
            row["threshold_95_id_kept"] = detection_metrics.threshold_keeping(made.inside)
            row["threshold_95_ood_caught"] = detection_metrics.threshold_catching(made.outside)
            rows.append({**row, "rows_id": len(has[0]), "rows_ood": len(has[1])})
    table = pd.DataFrame(rows)
    first = ["ood", "group", "score", "auroc", "low", "high", "aupr", "aupr_id", "prevalence", "fpr95"]
    return table[[*first, *(column for column in table if column not in first)]]


def gains_of(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Loss of both models on each set and on each group in it, and what tuning won there."""
    import pandas as pd

    table = []
    scored = rows[rows["ratio"].notna()]
    for name, whole in scored.groupby("set", sort=False):
        for group, part in [(None, whole), *whole.groupby("group", sort=False)]:
            tokens = part["tokens"].to_numpy(dtype=float)
            won = -part["ratio"].to_numpy()
            gain = combined(won[None], tokens, [1.0])
            table.append(
                {
                    "set": name,
                    "role": part["role"].iloc[0],
                    "group": group,
                    "rows": len(part),
                    "tokens": int(tokens.sum()),
                    "median_tokens": float(np.median(tokens)),
                    "loss_base": -part["log_likelihood_base"].sum() / tokens.sum(),
                    "loss_tuned": -part["log_likelihood_tuned"].sum() / tokens.sum(),
                    "gain": gain.value,
                    "gain_low": gain.low,
                    "gain_high": gain.high,
                    "flagged": float(part["flagged"].mean()),
                    "truncated": float(part["truncated"].mean()),
                }
            )
    return pd.DataFrame(table)


def tokens_of(reading: PairedTexts, rows: "pd.DataFrame", words: Any, examples: int) -> "pd.DataFrame":
    """The ratio token by token of the most and of the least foreign rows of each set.

    Rows are taken from both ends in turns, until a set has its share of `TOKENS`.
    """
    import pandas as pd

    table = []
    scored = rows[rows["ratio"].notna()]
    room = TOKENS // max(1, scored["set"].nunique())
    for name, part in scored.groupby("set", sort=False):
        order = part["ratio_per_token"].sort_values(ascending=False, kind="stable").index
        ends = [*order[:examples], *order[max(examples, len(order) - examples) :]]
        # The most foreign, the least foreign, the second most …: what matters most is kept first.
        turns = sorted(range(len(ends)), key=lambda i: min(2 * i, 2 * (len(ends) - i) - 1))
        used = part.loc[[ends[i] for i in turns], "tokens"].cumsum().to_numpy()
        chosen = [ends[i] for i in sorted(turns[: max(1, int((used <= room).sum()))])]
        # Rows of a set lie side by side, scored or not.
        start = int(rows.index[rows["set"] == name][0])
        for index in chosen:
            text = reading.sets[str(name)][index - start]
            table += [{"set": name, "row": text.row.number, **token} for token in token_ratios(text, words)]
    columns = ["set", "row", "position", "token", "log_likelihood_base", "log_likelihood_tuned", "ratio"]
    return pd.DataFrame(table, columns=columns)


def token_ratios(text: PairedText, words: Any) -> list[dict[str, Any]]:
    """Each scored token of a text with its log-likelihoods and their difference: which words are foreign."""
    base, tuned = (getattr(text, side).whole.tokens.astype(np.float64) for side in ("base", "tuned"))
    return [
        {
            "position": place,
            "token": words.decode([token]),
            "log_likelihood_base": float(base[place]),
            "log_likelihood_tuned": float(tuned[place]),
            "ratio": float(base[place] - tuned[place]),
        }
        for place, token in enumerate(text.ids)
    ]
