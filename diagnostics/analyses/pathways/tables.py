"""The tables and numbers of grokking pathways, out of what was found over the checkpoints."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from diagnostics.analyses.pathways import pathway
from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.statistics import correlation, mean
from diagnostics.numerics.estimates import UNDEFINED, Estimate

# Most samples in figures of single samples.
SHOWN = 96
# Spearman correlations with test accuracy over checkpoints, from the paper's table 1.
PAPER = {"distance": (-0.975, -0.928), "consistency": (0.949, 0.986), "loss": (-0.211, 0.949)}
UNKNOWN = (math.nan, math.nan)
LAGS = (-2, -1, 0, 1, 2)


def tables(run: RoutingRun) -> dict[str, pd.DataFrame]:
    """Every table."""
    return {
        "verdict": judged(run), "steps": by_step(run), "changes": by_change(run),
        "correlations": correlations(run), "groups": by_group(run), "layers": by_layer(run),
        "samples": by_sample(run), "values": by_value(run), "matrix": matrix(run), "routes": routes(run),
    }  # fmt: skip


def judged(run: RoutingRun) -> pd.DataFrame:
    """One row: the verdict, its reason, and the steps of memorisation and turn."""
    memorised, turn, held = (step or UNDEFINED for step in (run.memorised_step, run.turn, run.held_out_turn))
    row = {
        "verdict": run.verdict, "why": run.why, "since": run.steps[run.since], "until": run.steps[run.last],
        **interval("memorised", memorised), "memorised_share": run.memorised_share,
        **interval("turn", turn), **interval("held_out_turn", held), "metric": run.settings.metric,
    }  # fmt: skip
    return pd.DataFrame([row])


def by_step(run: RoutingRun) -> pd.DataFrame:
    """One row a checkpoint: means over all samples."""
    rows = []
    for index, snapshot in enumerate(run.snapshots):
        estimates = {name: statistic.estimate for name, statistic in snapshot.estimates.items()}
        values = {name: estimate.value for name, estimate in estimates.items()}
        rows.append(
            {
                "step": run.steps[index], "label": run.labels[index], "samples": len(run.samples.groups),
                **spread("distance", estimates["distance"]), "consistency": values["consistency"],
                "loss": values["loss"], "held_out": values["held_out"],
                "between": snapshot.pairs.between.value, "overall": snapshot.pairs.overall.value,
                **spread("gap", estimates["gap"]), "gap_p": snapshot.p,
                "distance_raw": values["distance_raw"], "distance_raw_se": estimates["distance_raw"].error,
                "length": values["length"], **bounds("consistency", estimates["consistency"]),
                "gp_inconsistency": median(snapshot.rough),
                "gp_undefined": int(np.isnan(snapshot.rough).sum()), "entropy": values["entropy"],
                "effective_dimension": float(np.mean([dimension for _, dimension, _ in snapshot.layers])),
                "memorised": run.share_memorised_by(index),
                **bounds("loss", estimates["loss"]), **bounds("held_out", estimates["held_out"]),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def by_change(run: RoutingRun) -> pd.DataFrame:
    """One row a quantity: its values at `since` and at the last checkpoint, and the paired change."""
    rows = []
    for name, change in run.changes.items():
        before, after = (run.snapshots[index].estimates[name].value for index in (run.since, run.last))
        value, low, high, _ = change.estimate
        rows.append(
            {
                "quantity": name, "since": run.steps[run.since], "until": run.steps[run.last],
                "before": before, "after": after, "change": value, "low": low, "high": high,
                "p": run.widened_p if name == "gap" else math.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def correlations(run: RoutingRun) -> pd.DataFrame:
    """One row a quantity and lag: its correlation with the held-out metric that many checkpoints later.

    A held-out loss counts with its sign flipped, so that higher is better. `changes` correlates differences
    of consecutive checkpoints, in which common trends do not show.
    """
    snapshots = run.snapshots[run.since :]
    sign = 1 if run.settings.metric == "accuracy" else -1
    series = {name: [snapshot.estimates[name].value for snapshot in snapshots] for name in run.changes}
    held = [sign * value for value in series["held_out"]]
    series["gp_inconsistency"] = [median(snapshot.rough) for snapshot in snapshots]
    rows = []
    for name, values in series.items():
        for of in ("levels", "changes"):
            for lag in LAGS if name != "held_out" else ():
                compared = (np.diff(x) if of == "changes" else np.asarray(x) for x in (values, held))
                correlated = correlation(
                    *compared, lag=lag, permutations=run.settings.permutations, seed=run.settings.seed
                )
                low, high = PAPER.get(name, UNKNOWN) if of == "levels" and not lag else UNKNOWN
                rows.append(
                    {
                        "quantity": name, "of": of, "lag": lag, "since": run.steps[run.since],
                        **correlated._asdict(), "paper_low": low, "paper_high": high,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def at_once(correlations: pd.DataFrame) -> dict[str, dict[Hashable, Any]]:
    """The rows of levels without a lag, by quantity."""
    now = correlations[(correlations["lag"] == 0) & (correlations["of"] == "levels")]
    return {row["quantity"]: row for row in now.to_dict("records")}


def by_group(run: RoutingRun) -> pd.DataFrame:
    """One row a group and checkpoint."""
    rows = []
    for index, snapshot in enumerate(run.snapshots):
        for group, name in enumerate(run.samples.names):
            members = run.samples.groups == group
            distances = snapshot.by_group[group]
            rows.append(
                {
                    "group": name, "step": run.steps[index], "samples": int(members.sum()),
                    **spread("distance", distances.within.estimate), "between": distances.between.value,
                    **spread("gap", distances.gap.estimate), "gap_p": float(snapshot.p_by_group[group]),
                    "distance_raw": snapshot.raw_by_group[group],
                    "length": float(snapshot.lengths[members].mean()),
                    "consistency": float(np.mean(snapshot.smooth[members])),
                    "gp_inconsistency": median(snapshot.rough[members]),
                    "entropy": float(snapshot.entropies[members].mean()),
                    "loss": mean(snapshot.record.nats[members], np.zeros(members.sum(), dtype=np.int64),
                                 snapshot.record.units[members]).value,
                    "epsilon": run.epsilon.get(name, math.nan),
                    "memorised": run.share_memorised_by(index, members),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def by_layer(run: RoutingRun) -> pd.DataFrame:
    """One row a layer with experts and checkpoint; its distances do not add up to those of pathways."""
    rows = []
    for index, snapshot in enumerate(run.snapshots):
        for at, (distances, dimension, ahead) in enumerate(snapshot.layers):
            rows.append(
                {
                    "layer": snapshot.record.routes.layers[at], "step": run.steps[index],
                    **spread("distance", distances.within.estimate), "between": distances.between.value,
                    **spread("gap", distances.gap.estimate),
                    "length": float(snapshot.pathways.kept[:, at].mean()),
                    "entropy": float(snapshot.entropies[:, at].mean()), "effective_dimension": dimension,
                    "cosine_ahead": ahead,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def by_sample(run: RoutingRun) -> pd.DataFrame:
    """One row a sample: its step of memorisation, and the drift of its pathway."""
    raw, drift = run.drifts()
    at = [run.steps[index] if index <= run.last else math.nan for index in run.memorised]
    return pd.DataFrame(
        {
            "sample": np.arange(len(raw)), "row": list(run.samples.rows),
            "group": [run.samples.names[group] for group in run.samples.groups],
            "tokens": run.snapshots[0].record.routes.tokens, "memorised_step": at, "drift": drift,
            "drift_raw": raw,
        }
    )  # fmt: skip


def by_value(run: RoutingRun) -> pd.DataFrame:
    """One row a sample and checkpoint."""
    names, parts = [run.samples.names[group] for group in run.samples.groups], []
    for index, snapshot in enumerate(run.snapshots):
        columns = {
            "sample": np.arange(len(names)), "group": names, "step": run.steps[index],
            "loss": run.losses[index], "length": snapshot.lengths, "distance": snapshot.group_distances,
            "consistency": snapshot.smooth, "gp_inconsistency": snapshot.rough,
            "entropy": snapshot.entropies.mean(axis=1),
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def moments(run: RoutingRun) -> list[int]:
    """The checkpoints shown sample by sample: the first, `since` or the middle, the last."""
    middle = run.since if 0 < run.since < run.last else run.last // 2
    return sorted({0, middle, run.last})


def shown(run: RoutingRun) -> Int[np.ndarray, " shown"]:
    """The samples shown in figures: at most `SHOWN`, equally many of each group."""
    groups = run.samples.groups
    rank = np.concatenate([np.arange(count) for count in np.bincount(groups)])
    return np.sort(np.lexsort((groups, rank))[:SHOWN])


def matrix(run: RoutingRun) -> pd.DataFrame:
    """One row a pair of shown samples and shown checkpoint: the distance of their pathways."""
    at = shown(run)
    first, second = np.triu_indices(len(at), 1)
    parts = []
    for index in moments(run):
        snapshot = run.snapshots[index]
        strings, lengths = [snapshot.strings[sample] for sample in at], snapshot.lengths[at]
        share = (pathway.distances(strings) / pathway.longer(lengths, lengths))[first, second]
        columns = {"step": run.steps[index], "sample": at[first], "other": at[second], "distance": share}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def routes(run: RoutingRun) -> pd.DataFrame:
    """One row a shown sample, layer and shown checkpoint: its top expert and that expert's share."""
    at, parts = shown(run), []
    for index in moments(run):
        snapshot = run.snapshots[index]
        weights = snapshot.weights[at]
        layers = np.array(snapshot.record.routes.layers)
        shares = weights.max(axis=2) / weights.sum(axis=2)
        columns = {
            "step": run.steps[index], "sample": np.repeat(at, len(layers)), "layer": np.tile(layers, len(at)),
            "expert": snapshot.pathways.order[at, :, 0].ravel(), "share": shares.ravel(),
            "kept": snapshot.pathways.kept[at].ravel(),
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def metrics(run: RoutingRun, tables: Mapping[str, pd.DataFrame]) -> dict[str, float | int]:
    """The metrics; withheld ones are left out."""
    values: dict[str, Any] = {}
    if len(run.snapshots) > 2 and run.verdict != "withheld":
        values |= {
            "reorganising": int(run.verdict == "reorganising after memorisation"),
            "drift_without_signal": int(run.verdict == "routing drift without a generalisation signal"),
        }
    for name, step in (("memorised", run.memorised_step), ("turn", run.turn),
                         ("held_out_turn", run.held_out_turn)):  # fmt: skip
        if step is not None:
            values |= interval(f"{name}_step", step)
    now = at_once(tables["correlations"])
    for name in ("distance", "consistency", "gap", "loss"):
        values |= {f"{kind}_{name}": now[name][kind] for kind in ("spearman", "pearson")}
    for name in ("distance", "gap", "consistency", "loss", "held_out"):
        change = run.changes[name].estimate
        unit = "_nats" if name == "loss" else ""
        values |= {
            f"{name}_first{unit}": run.snapshots[0].estimates[name].value,
            f"{name}_last{unit}": run.snapshots[run.last].estimates[name].value,
            f"{name}_change{unit}": change.value,
            f"{name}_change_low{unit}": change.low,
            f"{name}_change_high{unit}": change.high,
        }
    drift = mean(run.drifts()[1], run.samples.groups).estimate
    values |= {
        "gap_p": run.snapshots[run.last].p, "gap_change_p": run.widened_p,
        "memorised_share": run.memorised_share, **interval("drift", drift),
        "checkpoints": len(run.snapshots), "since_step": run.steps[run.since],
        "points": int(now["distance"]["points"]), "samples": len(run.samples.groups),
        "groups": len(run.samples.names), "layers": run.snapshots[0].weights.shape[1],
        "experts": run.snapshots[0].weights.shape[2], "top_k": run.snapshots[0].record.routes.top_k,
        "rows_task": len(run.snapshots[0].record.held_nats),
        "gp_undefined": int(sum(np.isnan(snapshot.rough).sum() for snapshot in run.snapshots)),
    }  # fmt: skip
    return {
        name: value if isinstance(value, int) else float(value)
        for name, value in values.items()
        if not math.isnan(value)
    }


def spread(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate with its standard error and interval, as columns."""
    return {name: estimate.value, f"{name}_se": estimate.error, **bounds(name, estimate)}


def interval(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate with its interval, as columns."""
    return {name: estimate.value, **bounds(name, estimate)}


def bounds(name: str, estimate: Estimate) -> dict[str, float]:
    """The interval of an estimate, as columns."""
    return {f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def median(values: Float[np.ndarray, " samples"]) -> float:
    """Median without NaN; NaN if all are."""
    return math.nan if np.isnan(values).all() else float(np.nanmedian(values))
