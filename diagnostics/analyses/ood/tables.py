"""The tables of likelihood-ratio OOD: every score of every row, and how well each detects the OOD rows."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from diagnostics.evaluation.paired_texts import PairedText, PairedTexts
from diagnostics.numerics import detection_metrics, vector_distances
from diagnostics.numerics.estimates import Estimate, combined

if TYPE_CHECKING:
    import pandas as pd

# score -> meaning; all are higher for texts more out-of-distribution
SCORES = {
    "ratio": "log-likelihood of base minus tuned, summed (LR)",
    "ratio_per_token": "ratio, mean over the tokens (NLR)",
    "question_ratio": "ratio of the question alone (S_q)",
    "answer_ratio": "ratio of the answer alone (S_a)",
    "conditional_ratio": "ratio of the answer given the question (S_a|q)",
    "tuned_likelihood": "minus the log-likelihood under tuned, summed (LH)",
    "tuned_loss": "minus the log-likelihood under tuned, mean over the tokens (NLH)",
    "base_likelihood": "minus the log-likelihood under base, summed",
    "base_loss": "minus the log-likelihood under base, mean over the tokens",
    "length": "number of scored tokens: what the data alone give away",
    "max_softmax": "minus tuned's largest probability, mean over the tokens",
    "energy": "minus the log-sum-exp of tuned's logits, mean over the tokens",
    "mahalanobis_base": "Mahalanobis distance of base's mean last hidden state to the task rows",
    "mahalanobis_tuned": "Mahalanobis distance of tuned's mean last hidden state to the task rows",
    "relative_mahalanobis_base": "mahalanobis_base minus the same distance to the keep rows",
    "relative_mahalanobis_tuned": "mahalanobis_tuned minus the same distance to the keep rows",
    "cosine_base": "1 − largest cosine of base's mean last hidden state with that of a task row",
    "cosine_tuned": "1 − largest cosine of tuned's mean last hidden state with that of a task row",
    "neighbour_base": "distance of base's normalised mean last hidden state to the 10th nearest task row",
    "neighbour_tuned": "distance of tuned's normalised mean last hidden state to the 10th nearest task row",
}
ALL = "all"
# Tokens in the table `tokens`, all sets together: two or three MB on disk.
TOKENS = 200_000
# With fewer task rows their spread cannot be estimated.
SPREAD_FROM = 10
# column -> the metric in it that gets a bootstrap interval
INTERVALS: dict[str, detection_metrics.Metric] = {
    "aupr": "aupr_ood",
    "aupr_id": "aupr_id",
    "fpr95": "fpr95",
    "ood_missed_at_95_id_kept": "ood_missed_at_95_id_kept",
}


def ratio_scores(
    base: Float[np.ndarray, " rows"], tuned: Float[np.ndarray, " rows"], length: Float[np.ndarray, " rows"]
) -> dict[str, Float[np.ndarray, " rows"]]:
    """The scores from log-likelihoods and lengths of full texts; NaN where nothing was scored.

    The expected `ratio` is −KL(tuned‖base) for texts sampled from tuned and KL(base‖tuned) for texts sampled
    from base; 0 means that tuning changed nothing for this text.
    """
    tokens = np.where(length > 0, length, np.nan)
    ratio = base - tuned
    return {
        "ratio": ratio,
        "ratio_per_token": ratio / tokens,
        "tuned_likelihood": -tuned,
        "tuned_loss": -tuned / tokens,
        "base_likelihood": -base,
        "base_loss": -base / tokens,
        "length": np.where(np.isnan(ratio), np.nan, length),
    }


def rows_of(reading: PairedTexts, roles: Mapping[str, str], *, seed: int) -> "tuple[pd.DataFrame, list[str]]":
    """One row a text with all of its scores, and notes."""
    import pandas as pd

    texts = [text for several in reading.sets.values() for text in several]
    names = [name for name, several in reading.sets.items() for _ in several]
    base, tuned = (
        np.array([getattr(text, side).full.log_likelihood for text in texts]) for side in ("base", "tuned")
    )
    length = np.array([float(text.length) for text in texts])
    rows = pd.DataFrame({
        "set": names, "role": [roles[name] for name in names], "row": [text.row.number for text in texts],
        "group": pd.Series([text.row.group for text in texts], dtype=object),
        "tokens": [text.length for text in texts], "log_likelihood_base": base, "log_likelihood_tuned": tuned,
        **ratio_scores(base, tuned, length), "max_softmax": [-text.tuned.full.top for text in texts],
        "energy": [text.tuned.full.energy for text in texts],
        "truncated": [text.truncated for text in texts], "text": [text.content for text in texts],
    })  # fmt: skip
    notes = []
    completed = np.array([text.row.completion is not None for text in texts]) & np.isfinite(base + tuned)
    for form in ("question", "answer", "conditional"):
        ratio = np.array([getattr(text.base, form) - getattr(text.tuned, form) for text in texts])
        if not np.isnan(ratio).all():
            rows[f"{form}_ratio"] = ratio
            if lacking := (completed & np.isnan(ratio)).sum():
                notes.append(
                    f"{lacking} rows have no {form}_ratio, because none of its tokens is scored; that "
                    "score is evaluated without them"
                )
    for side in ("base", "tuned"):
        pooled = [getattr(text, side).full.pooled for text in texts]
        has_vector = np.array([vector is not None for vector in pooled])
        count = int((has_vector & (rows["role"] == "task")).sum())
        if count < SPREAD_FROM:
            notes.append(
                f"{side}: distances need {SPREAD_FROM} task rows with hidden states, and there are {count}"
            )
            continue
        vectors = np.stack([vector for vector in pooled if vector is not None])
        distances = distances_of(vectors, rows.loc[has_vector, "role"].to_numpy(dtype=str), seed)
        for name, values in distances.items():
            rows.loc[has_vector, f"{name}_{side}"] = values
    if not any(str(name).startswith("relative_") for name in rows) and not notes:
        notes.append("relative distances need --keep F: they are relative to its rows")
    spellings = {role: set(rows.loc[rows["role"] == role, "text"].str.casefold()) for role in ("task", "ood")}
    if common := len(spellings["task"] & spellings["ood"]):
        notes.append(f"{common} texts are in both the task and the OOD rows; no score can tell them apart")
    return rows, notes


def distances_of(
    vectors: Float[np.ndarray, "rows width"], role: np.ndarray, seed: int
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Distances of every vector to the task rows, held out, and relative to the keep rows."""
    inside = role == "task"
    distances = {}
    for name in ("mahalanobis", "cosine", "neighbour"):
        values = np.empty(len(vectors))
        values[inside], values[~inside] = vector_distances.held_out(
            getattr(vector_distances, name), vectors[inside], vectors[~inside], seed=seed
        )
        distances[name] = values
    if (role == "keep").sum() >= SPREAD_FROM:
        background = vector_distances.mahalanobis(vectors[role == "keep"], vectors)
        # The background was fitted to the keep rows: their own distance to it is too short.
        relative = np.where(role == "keep", np.nan, distances["mahalanobis"] - background)
        distances["relative_mahalanobis"] = relative
    return distances


def detection_of(inside: "pd.DataFrame", outside: "pd.DataFrame", *, draws: int, seed: int) -> "pd.DataFrame":
    """How well each score detects the OOD rows: all sets pooled, each set, and each group of a set."""
    import pandas as pd

    parts: list[tuple[str, Any, pd.DataFrame]] = [(ALL, None, outside)]
    for name, part in outside.groupby("set", sort=False):
        parts.append((str(name), None, part))
        parts += [(str(name), group, members) for group, members in part.groupby("group", sort=False)]
    rows = []
    for name, group, part in parts:
        if len(part) < 2:
            continue
        for score in SCORES:
            if score not in inside:
                continue
            has = [rows[rows[score].notna()] for rows in (inside, part)]
            # If a whole set lacks this score, the scores would be compared on different rows.
            partly = set(has[0]["set"]) < set(inside["set"]) or set(has[1]["set"]) < set(part["set"])
            if partly or min(map(len, has)) < 2:
                continue
            values, ratio = (
                detection_metrics.DetectionScores(*(rows[name] for rows in has)) for name in (score, "ratio")
            )
            area = detection_metrics.auroc_interval(*values)
            row = {"ood": name, "group": group, "score": score, "low": area.low, "high": area.high}
            row |= detection_metrics.detection(*values)
            row["aupr"] = row.pop("aupr_ood")
            if group is None:
                for column, metric in INTERVALS.items():
                    interval = detection_metrics.bootstrap(metric, values, draws=draws, seed=seed)
                    row |= {f"{column}_low": interval.low, f"{column}_high": interval.high}
            gain = detection_metrics.auroc_difference(ratio, values)
            row |= {"ratio_gain": gain.value, "ratio_gain_low": gain.low, "ratio_gain_high": gain.high}
            row["threshold_95_id_kept"] = detection_metrics.threshold_keeping(values.inside)
            row["threshold_95_ood_caught"] = detection_metrics.threshold_catching(values.outside)
            rows.append({**row, "rows_id": len(has[0]), "rows_ood": len(has[1])})
    table = pd.DataFrame(rows)
    first = ["ood", "group", "score", "auroc", "low", "high", "aupr", "aupr_id", "prevalence", "fpr95"]
    return table[[*first, *(column for column in table if column not in first)]]


def over_length(inside: "pd.DataFrame", outside: "pd.DataFrame") -> tuple[float, Estimate]:
    """AUROC of the length, and AUROC of the ratio minus it, for the OOD set where the ratio leads by least.

    A text may be given away by being shorter as well as longer: the length counts in the direction in which
    it separates the set. Pooled sets could hide that, where some are shorter and others longer.
    """
    sets = [part for _, part in outside.groupby("set", sort=False) if len(part) > 1]
    controls = []
    for part in sets or [outside]:
        ratio, length = (
            detection_metrics.DetectionScores(inside[score], part[score]) for score in ("ratio", "length")
        )
        if detection_metrics.auroc(*length) < 0.5:
            length = detection_metrics.DetectionScores(-inside["length"], -part["length"])
        gain = detection_metrics.auroc_difference(ratio, length)
        areas = [detection_metrics.auroc_interval(*scores) for scores in (ratio, length)]
        if not gain.error:  # both are perfect, in this sample
            below = math.hypot(areas[0].value - areas[0].low, areas[1].high - areas[1].value)
            gain = gain._replace(low=min(gain.low, gain.value - below))
        controls.append((areas[1].value, gain))
    return max(area for area, _ in controls), min((gain for _, gain in controls), key=lambda gain: gain.low)


def gains_of(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Loss of both models on each set and each group of a set, and tuning's gain."""
    import pandas as pd

    table = []
    for name, of_set in rows[rows["ratio"].notna()].groupby("set", sort=False):
        for group, part in [(None, of_set), *of_set.groupby("group", sort=False)]:
            tokens = part["tokens"].to_numpy(dtype=float)
            gain = combined(-part["ratio"].to_numpy()[None], tokens, [1.0])
            table.append({
                "set": name, "role": part["role"].iloc[0], "group": group, "rows": len(part),
                "tokens": int(tokens.sum()), "median_tokens": float(np.median(tokens)),
                "loss_base": -part["log_likelihood_base"].sum() / tokens.sum(),
                "loss_tuned": -part["log_likelihood_tuned"].sum() / tokens.sum(),
                "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high,
                "flagged": float(part["flagged"].mean()), "truncated": float(part["truncated"].mean()),
            })  # fmt: skip
    return pd.DataFrame(table)


def tokens_of(reading: PairedTexts, rows: "pd.DataFrame", tokenizer: Any, examples: int) -> "pd.DataFrame":
    """Token by token, the rows of each set with the highest and the lowest ratio per token.

    Rows are taken from both ends in turns, until a set has its share of `TOKENS`.
    """
    import pandas as pd

    table = []
    scored = rows[rows["ratio"].notna()]
    room = TOKENS // max(1, scored["set"].nunique())
    for name, part in scored.groupby("set", sort=False):
        order = part["ratio_per_token"].sort_values(ascending=False, kind="stable").index
        ends = [*order[:examples], *order[max(examples, len(order) - examples) :]]
        # The highest, the lowest, the second highest …: the most extreme rows come first.
        turns = sorted(range(len(ends)), key=lambda i: min(2 * i, 2 * (len(ends) - i) - 1))
        used = part.loc[[ends[i] for i in turns], "tokens"].cumsum().to_numpy()
        chosen = [ends[i] for i in sorted(turns[: max(1, int((used <= room).sum()))])]
        # The rows of a set are contiguous, scored or not.
        start = int(rows.index[rows["set"] == name][0])
        for index in chosen:
            text = reading.sets[str(name)][index - start]
            records = token_ratios(text, tokenizer)
            table += [{"set": name, "row": text.row.number, **record} for record in records]
    columns = ["set", "row", "position", "token", "log_likelihood_base", "log_likelihood_tuned", "ratio"]
    return pd.DataFrame(table, columns=columns)


def token_ratios(text: PairedText, tokenizer: Any) -> list[dict[str, Any]]:
    """Each scored token of a text with its log-likelihoods and their difference."""
    base, tuned = (getattr(text, side).full.tokens.astype(np.float64) for side in ("base", "tuned"))
    return [
        {
            "position": position, "token": tokenizer.decode([token]), "log_likelihood_base": log_base,
            "log_likelihood_tuned": log_tuned, "ratio": log_base - log_tuned,
        }
        for position, (token, log_base, log_tuned) in enumerate(
            zip(text.ids, base.tolist(), tuned.tolist(), strict=True)
        )
    ]  # fmt: skip
