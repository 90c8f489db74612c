"""The tables and numbers of grokking pathways, out of what was found over the checkpoints."""

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from diagnostics.analyses.pathways import pathway
from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.statistics import correlation, mean
from diagnostics.numerics.estimates import UNDEFINED, Estimate

if TYPE_CHECKING:
    import pandas as pd

# Samples that pictures of single samples show.
SHOWN = 96
# What the paper's table 1 gives over checkpoints, as Spearman correlations with test accuracy.
PAPER = {"distance": (-0.975, -0.928), "consistency": (0.949, 0.986), "loss": (-0.211, 0.949)}
LAGS = (-2, -1, 0, 1, 2)


def tables(run: RoutingRun) -> "dict[str, pd.DataFrame]":
    """Every table."""
    return {
        "verdict": judged(run),
        "steps": by_step(run),
        "changes": by_change(run),
        "correlations": correlations(run),
        "groups": by_group(run),
        "layers": by_layer(run),
        "samples": by_sample(run),
        "values": by_value(run),
        "matrix": matrix(run),
        "routes": routes(run),
    }


def judged(run: RoutingRun) -> "pd.DataFrame":
    """One row: the verdict in words, why, and the steps that it speaks of."""
    import pandas as pd

    memorised, turn, held = (step or UNDEFINED for step in (run.memorised_step, run.turn, run.held_out_turn))
    row = {
        "verdict": run.verdict, "why": run.why, "since": run.steps[run.since],
        "until": run.steps[run.last], "memorised": memorised.value, "memorised_low": memorised.low,
        "memorised_high": memorised.high, "memorised_share": run.share_memorised,
        "turn": turn.value, "turn_low": turn.low, "turn_high": turn.high, "held_out_turn": held.value,
        "held_out_turn_low": held.low, "held_out_turn_high": held.high, "metric": run.ask.metric,
    }  # fmt: skip
    return pd.DataFrame([row])


def by_step(run: RoutingRun) -> "pd.DataFrame":
    """A row a checkpoint: the means of all samples."""
    import pandas as pd

    rows = []
    for place, look in enumerate(run.looks):
        made = {name: statistic.estimate for name, statistic in look.estimates.items()}
        known = look.rough[~np.isnan(look.rough)]
        share = float((run.memorised <= place).mean()) if run.samples.trained else math.nan
        rows.append(
            {
                "step": run.steps[place], "label": run.labels[place],
                "samples": len(run.samples.groups), **spread("distance", made["distance"]),
                "consistency": made["consistency"].value, "loss": made["loss"].value,
                "held_out": made["held_out"].value, "between": look.pairs.between.value,
                "overall": look.pairs.overall.value, **spread("gap", made["gap"]), "gap_p": look.p,
                "distance_raw": made["distance_raw"].value, "distance_raw_se": made["distance_raw"].error,
                "length": made["length"].value,
                **bounds("consistency", made["consistency"]),
                "gp_inconsistency": float(np.median(known)) if len(known) else math.nan,
                "gp_undefined": int(np.isnan(look.rough).sum()),
                "entropy": made["entropy"].value,
                "effective_dimension": float(np.mean([each[1] for each in look.layers])),
                "memorised": share,
                **bounds("loss", made["loss"]),
                **bounds("held_out", made["held_out"]),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def by_change(run: RoutingRun) -> "pd.DataFrame":
    """A row a number: what it was at `since` and at the last checkpoint, with a paired interval."""
    import pandas as pd

    rows = []
    for name, change in run.changes.items():
        before, after = (run.looks[place].estimates[name].value for place in (run.since, run.last))
        estimate = change.estimate
        rows.append(
            {
                "quantity": name, "since": run.steps[run.since], "until": run.steps[run.last],
                "before": before, "after": after, "change": estimate.value,
                "low": estimate.low, "high": estimate.high,
                "p": run.widened_p if name == "gap" else math.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def correlations(run: RoutingRun) -> "pd.DataFrame":
    """A row a number and a lag: how it goes with the held-out metric that many checkpoints later.

    A held-out loss counts with its sign turned, so that more is better. `changes` are of the differences
    between one checkpoint and the next, which two trends alone do not correlate.
    """
    import pandas as pd

    looks = run.looks[run.since :]
    sign = 1 if run.ask.metric == "accuracy" else -1
    held = [sign * look.held_out.value for look in looks]
    series = {name: [look.estimates[name].value for look in looks] for name in run.changes}
    series["gp_inconsistency"] = [median(look.rough) for look in looks]
    rows = []
    for name, values in series.items():
        for of in ("levels", "changes"):
            for lag in LAGS if name != "held_out" else ():
                one, two = (np.diff(each) if of == "changes" else np.asarray(each) for each in (values, held))
                found = correlation(one, two, lag=lag, permutations=run.ask.permutations, seed=run.ask.seed)
                paper = PAPER.get(name, (math.nan, math.nan)) if of == "levels" and not lag else None
                low, high = paper or (math.nan, math.nan)
                rows.append(
                    {
                        "quantity": name, "of": of, "lag": lag, "since": run.steps[run.since],
                        "points": found.points, "spearman": found.spearman, "pearson": found.pearson,
                        "p": found.p, "paper_low": low, "paper_high": high,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def at_once(correlations: "pd.DataFrame") -> dict[str, dict[Hashable, Any]]:
    """The rows of levels without a lag, by what is followed."""
    now = correlations[(correlations["lag"] == 0) & (correlations["of"] == "levels")]
    return {row["quantity"]: row for row in now.to_dict("records")}


def by_group(run: RoutingRun) -> "pd.DataFrame":
    """A row a group and checkpoint."""
    import pandas as pd

    rows = []
    for place, look in enumerate(run.looks):
        for group, name in enumerate(run.samples.names):
            own = run.samples.groups == group
            found = look.of_groups[group]
            trained = run.samples.trained
            rows.append(
                {
                    "group": name, "step": run.steps[place], "samples": int(own.sum()),
                    **spread("distance", found.within.estimate), "between": found.between.value,
                    **spread("gap", found.gap.estimate), "gap_p": float(look.p_of_groups[group]),
                    "distance_raw": look.raw_of_groups[group],
                    "length": float(look.lengths[own].mean()),
                    "consistency": float(np.mean(look.smooth[own])),
                    "gp_inconsistency": median(look.rough[own]),
                    "entropy": float(look.entropies[own].mean()),
                    "loss": mean(look.record.nats[own], np.zeros(own.sum(), dtype=np.int64),
                                 look.record.units[own]).value,
                    "epsilon": run.epsilon.get(name, math.nan),
                    "memorised": float((run.memorised[own] <= place).mean()) if trained else math.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def by_layer(run: RoutingRun) -> "pd.DataFrame":
    """A row a layer with experts and checkpoint; its distances do not add up to those of whole pathways."""
    import pandas as pd

    rows = []
    for place, look in enumerate(run.looks):
        for at, (found, dimension, ahead) in enumerate(look.layers):
            rows.append(
                {
                    "layer": look.record.routes.layers[at], "step": run.steps[place],
                    **spread("distance", found.within.estimate), "between": found.between.value,
                    **spread("gap", found.gap.estimate), "length": float(look.pathways.kept[:, at].mean()),
                    "entropy": float(look.entropies[:, at].mean()), "effective_dimension": dimension,
                    "cosine_ahead": ahead,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def by_sample(run: RoutingRun) -> "pd.DataFrame":
    """A row a sample: when it was memorised, and how far its pathway moved from first to last."""
    import pandas as pd

    raw, drift = run.drifts()
    at = [run.steps[place] if place <= run.last else math.nan for place in run.memorised]
    return pd.DataFrame(
        {
            "sample": np.arange(len(raw)), "row": list(run.samples.rows),
            "group": [run.samples.names[group] for group in run.samples.groups],
            "tokens": run.looks[0].record.routes.tokens, "memorised_step": at, "drift": drift,
            "drift_raw": raw,
        }
    )  # fmt: skip


def by_value(run: RoutingRun) -> "pd.DataFrame":
    """A row a sample and checkpoint."""
    import pandas as pd

    names = [run.samples.names[group] for group in run.samples.groups]
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "sample": np.arange(len(names)), "group": names, "step": run.steps[place],
                    "loss": run.losses[place], "length": look.lengths, "distance": look.own,
                    "consistency": look.smooth, "gp_inconsistency": look.rough,
                    "entropy": look.entropies.mean(axis=1),
                }
            )
            for place, look in enumerate(run.looks)
        ],
        ignore_index=True,
    )  # fmt: skip


def moments(run: RoutingRun) -> list[int]:
    """The checkpoints at which single samples are shown: the first, `since` or the middle, the last."""
    middle = run.since if 0 < run.since < run.last else run.last // 2
    return sorted({0, middle, run.last})


def shown(run: RoutingRun) -> Int[np.ndarray, " shown"]:
    """The samples that are shown, as many of each group as there is room for, in order."""
    groups = run.samples.groups
    rank = np.concatenate([np.arange(count) for count in np.bincount(groups)])
    return np.sort(np.lexsort((groups, rank))[:SHOWN])


def matrix(run: RoutingRun) -> "pd.DataFrame":
    """A row a pair of shown samples at a shown checkpoint: the share in which their pathways differ."""
    import pandas as pd

    at = shown(run)
    one, other = np.triu_indices(len(at), 1)
    made = []
    for place in moments(run):
        look = run.looks[place]
        words, lengths = [look.words[sample] for sample in at], look.lengths[at]
        share = pathway.distances(words) / pathway.longer(lengths, lengths)
        made.append(
            pd.DataFrame(
                {
                    "step": run.steps[place], "sample": at[one], "other": at[other],
                    "distance": share[one, other],
                }
            )
        )  # fmt: skip
    return pd.concat(made, ignore_index=True)


def routes(run: RoutingRun) -> "pd.DataFrame":
    """A row a shown sample, layer and shown checkpoint: the expert that gets most of it, and its share."""
    import pandas as pd

    at, made = shown(run), []
    for place in moments(run):
        look = run.looks[place]
        weights = look.weights[at]
        layers = np.array(look.record.routes.layers)
        shares = weights.max(axis=2) / weights.sum(axis=2)
        made.append(
            pd.DataFrame(
                {
                    "step": run.steps[place], "sample": np.repeat(at, len(layers)),
                    "layer": np.tile(layers, len(at)),
                    "expert": look.pathways.order[at, :, 0].ravel(), "share": shares.ravel(),
                    "kept": look.pathways.kept[at].ravel(),
                }
            )
        )  # fmt: skip
    return pd.concat(made, ignore_index=True)


# --- numbers ---


def metrics(run: RoutingRun, tables: "Mapping[str, pd.DataFrame]") -> dict[str, float | int]:
    """The numbers that a policy may judge; what is withheld is left out."""
    found: dict[str, Any] = {}
    if len(run.looks) > 2 and run.verdict != "withheld":
        found |= {
            "reorganising": int(run.verdict == "reorganising after memorisation"),
            "drift_without_signal": int(run.verdict == "routing drift without a generalisation signal"),
        }
    for name, placed in (("memorised", run.memorised_step), ("turn", run.turn),
                         ("held_out_turn", run.held_out_turn)):  # fmt: skip
        if placed is not None:
            found |= {f"{name}_step": placed.value, **bounds(f"{name}_step", placed)}
    now = at_once(tables["correlations"])
    for name in ("distance", "consistency", "gap", "loss"):
        found |= {f"{kind}_{name}": now[name][kind] for kind in ("spearman", "pearson")}
    for name in ("distance", "gap", "consistency", "loss", "held_out"):
        change = run.changes[name].estimate
        unit = "_nats" if name == "loss" else ""
        found |= {
            f"{name}_first{unit}": run.looks[0].estimates[name].value,
            f"{name}_last{unit}": run.looks[run.last].estimates[name].value,
            f"{name}_change{unit}": change.value,
            f"{name}_change_low{unit}": change.low,
            f"{name}_change_high{unit}": change.high,
        }
    drift = mean(run.drifts()[1], run.samples.groups).estimate
    found |= {
        "gap_p": run.looks[run.last].p, "gap_change_p": run.widened_p,
        "memorised_share": run.share_memorised, "drift": drift.value, **bounds("drift", drift),
        "checkpoints": len(run.looks), "since_step": run.steps[run.since],
        "points": int(now["distance"]["points"]), "samples": len(run.samples.groups),
        "groups": len(run.samples.names), "layers": run.looks[0].weights.shape[1],
        "experts": run.looks[0].weights.shape[2], "top_k": run.looks[0].record.routes.top_k,
        "rows_task": len(run.looks[0].record.held_nats),
        "gp_undefined": int(sum(np.isnan(look.rough).sum() for look in run.looks)),
    }  # fmt: skip
    return {
        name: value if isinstance(value, int) else float(value)
        for name, value in found.items()
        if not math.isnan(value)
    }


def spread(name: str, made: Estimate) -> dict[str, float]:
    """An estimate with its standard error and interval, as columns."""
    return {name: made.value, f"{name}_se": made.error, **bounds(name, made)}


def bounds(name: str, made: Estimate) -> dict[str, float]:
    """The interval of an estimate, as columns."""
    return {f"{name}_low": made.low, f"{name}_high": made.high}


def median(values: Float[np.ndarray, " samples"]) -> float:
    """Of those that are known; NaN of none."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan
