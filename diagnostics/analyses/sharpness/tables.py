"""Tables, metrics and notes of `sharpness`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analyses.sharpness import stragglers
from diagnostics.analyses.sharpness.layer_paths import LayerPath, LayerPaths
from diagnostics.analyses.sharpness.layer_sharpness import WHOLE, SharpnessSettings
from probes.models.interpolated import Layer

# Spread of the starts above which a value is only a lower bound; ratio of sharpness that is noted (ours).
UNSTEADY, SHARPER = 0.1, 3.0
# Remedies within so many nats are equally good: the one that leaves both ends unchanged is preferred.
TIE = 0.02


class Flags:
    """The stragglers and load-bearing layers of a path."""

    def __init__(self, paths: LayerPaths, measured: Sequence[LayerPath], worst: float, path_barrier: float):
        self.paths, self.measured, self.worst, self.path_barrier = paths, measured, worst, path_barrier
        self.screened = [paths.screened(path, worst) for path in measured]
        self.stragglers = stragglers.stragglers(self.screened, path_barrier)
        self.load_bearing = stragglers.load_bearing(self.screened, path_barrier)

    @property
    def layers(self) -> list[Layer]:
        """All layers, in order."""
        return [path.layer for path in self.measured]

    def flagged(self) -> list[Layer]:
        """Stragglers and load-bearing layers."""
        marked = self.stragglers | self.load_bearing
        return [layer for layer, flag in zip(self.layers, marked, strict=True) if flag]

    def chosen(self) -> list[Layer]:
        """The flagged layers, and the two others with a barrier nearest to the median for comparison."""
        flagged = self.flagged()
        barriers = np.array([screened.barrier.value for screened in self.screened])
        order = np.argsort(np.abs(barriers - np.median(barriers)), kind="stable")
        others = [index for index in order if self.layers[index] not in flagged]
        names = {layer.name for layer in flagged} | {self.layers[index].name for index in others[:2]}
        return [layer for layer in self.layers if layer.name in names]


def with_sharpness(curves: pd.DataFrame, sharpness: pd.DataFrame, rho: float) -> pd.DataFrame:
    """Curvature with the rises that it predicts at the smallest radius, and with those measured there."""
    predicted = curves.assign(
        predicted=(rho**2 * curves["top"] / 2).clip(lower=0), predicted_average=rho**2 * curves["trace"] / 2
    )
    keys = ["alpha", "name"]
    measured = sharpness[sharpness["rho"] == rho][[*keys, "rho", "worst", "average", "slope"]]
    return predicted.merge(measured, on=keys, how="left")


def layer_table(
    flags: Flags, sharpness: pd.DataFrame, rho: float, remedied: pd.DataFrame, worst: float,
    on: Sequence[tuple[str, str]],
) -> pd.DataFrame:  # fmt: skip
    """One row a layer: barriers, controls, sharpness at both ends, verdict, action."""
    rows = []
    action = best_remedy(remedied, worst, {role for role, _ in on})
    action_columns = ("action", "action_barrier_nats", "action_task_nats")
    for index, path in enumerate(flags.measured):
        row = flags.paths.row(path, flags.worst)
        for column, alpha in (("base", 0.0), ("half", 0.5), ("tuned", 1.0)):
            for measure, prefix in (("worst", "sharpness"), ("average", "average")):
                row[f"{prefix}_{column}"] = at(sharpness, alpha, path.layer.name, rho, measure)
        base = row["sharpness_base"]
        row["sharpness_ratio"] = row["sharpness_tuned"] / base if base > 0 else math.nan
        straggler = bool(flags.stragglers[index])
        row |= {"straggler": straggler, "load_bearing": bool(flags.load_bearing[index])}
        row |= dict(zip(action_columns, action if straggler else ("", math.nan, math.nan), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def at(sharpness: pd.DataFrame, alpha: float, name: str, rho: float, column: str) -> float:
    """A value of the table `sharpness`; NaN where it was not measured."""
    row = (sharpness["alpha"] == alpha) & (sharpness["name"] == name) & (sharpness["rho"] == rho)
    return float(sharpness.loc[row, column].to_numpy(float)[0]) if row.any() else math.nan


def best_remedy(remedied: pd.DataFrame, alpha: float, roles: set[str]) -> tuple[str, float, float]:
    """The remedy with the lowest loss of some roles at α, and its change of that loss and of the task loss.

    Within 0.02 nats of it, remedies that leave both ends unchanged are preferred: realign, then pin.
    """
    rows = remedied[remedied["alpha"] == alpha]
    if not len(rows):
        return "", math.nan, math.nan
    label = (rows["remedy"] + " " + rows["setting"]).str.strip()
    losses = rows[rows["role"].isin(roles)].groupby(label, sort=False)["loss"].mean()
    task = rows[rows["role"] == "task"].groupby(label, sort=False)["loss"].mean()
    ties = losses[losses <= losses.min() + TIE].index
    preferred = ("realign", "pin base", "pin tuned")
    best = next((remedy for remedy in preferred if remedy in ties), str(losses.idxmin()))
    return best, float(losses[best] - losses["none"]), float(task[best] - task["none"])


def metrics_of(
    flags: Flags, table: pd.DataFrame, sets: Sequence[Mapping[str, Any]], sharpness: pd.DataFrame, rho: float,
) -> dict[str, float | int]:  # fmt: skip
    """Metrics over all layers."""
    metrics: dict[str, float | int | None] = {
        "stragglers": int(table["straggler"].sum()), "worst_alpha": flags.worst,
        "barrier_nats": flags.path_barrier,
        "repaired_nats": float(table[["repair_base", "repair_tuned"]].to_numpy(float).max()),
        "load_bearing": int(table["load_bearing"].sum()), "layers": len(table),
        "unsteady": int((sharpness["spread"] > UNSTEADY).sum()),
    }  # fmt: skip
    for name, column in (("sharpness", "worst"), ("average", "average")):
        for side, alpha in (("base", 0.0), ("tuned", 1.0)):
            value = at(sharpness, alpha, WHOLE, rho, column)
            metrics[f"{name}_{side}"] = None if math.isnan(value) else value
    ood = [row for row in sets if row["role"] == "ood"]
    if ood:
        outcomes = [row["outcome"] for row in ood]
        metrics |= {"strong_failures": outcomes.count("strong"), "successes": outcomes.count("success")}
        worse = [row["confidence_ratio"] for row in ood if row["accuracy_tuned"] < row["accuracy_base"]]
        metrics["overconfidence_ood"] = max(worse, default=0.0)
    for role in ("task", "keep", "ood"):
        metrics[f"rows_{role}"] = sum(row["rows"] for row in sets if row["role"] == role) or None
    return {name: value for name, value in metrics.items() if value is not None}


def notes_of(
    table: pd.DataFrame, sets: Sequence[Mapping[str, Any]], metrics: Mapping[str, float | int],
    on: Sequence[tuple[str, str]], settings: SharpnessSettings, paths: LayerPaths,
) -> list[str]:  # fmt: skip
    """Notes on stragglers, sharpness and the limits of both."""
    data = " and ".join(f"{name} ({role})" if name != role else role for role, name in on)
    notes = [
        f"Barriers are measured on the rows {data}; sharpness on the task rows, in batches of one size. "
        "Sharpness says nothing about other rows, and a sharper layer is not a worse one."
    ]
    for row in table[table["straggler"]].to_dict("records"):
        text = f"{row['name']} is a straggler: its own barrier is {row['barrier']:.3g} nats"
        text += f" (a random move of the same size: {row['control_rise']:+.3g})."
        if row["action"] and row["action"] != "none":
            text += f" Best remedy at alpha {metrics['worst_alpha']:g}: `{row['action']}`, "
            text += f"{row['action_barrier_nats']:+.3g} nats on {data}, "
            text += f"{row['action_task_nats']:+.3g} on the task."
        notes.append(text)
    bearing = table.loc[table["load_bearing"], "name"]
    if len(bearing):
        notes.append(
            f"{', '.join(bearing)}: load-bearing. Tuned needs the change there, but it makes no barrier."
        )
    beyond = table[(table["midway_rise"] > table["control_rise"]) & (table["midway_rise"] > stragglers.LEAST)]
    if len(beyond):
        notes.append(
            f"{', '.join(beyond['name'])}: halfway back to base, the loss rises more than under a random "
            "move of the same size."
        )
    ratio = table[table["sharpness_ratio"] > SHARPER]
    if len(ratio):
        notes.append(
            f"{', '.join(ratio['name'])}: sharpness at tuned is more than {SHARPER:g} times that at base, on "
            "the same rows and radius. No publication reads that as a risk."
        )
    weak = [str(row["set"]) for row in sets if row["role"] == "ood" and row["outcome"] == "weak"]
    if weak:
        notes.append(f"No alpha between the ends is significantly better than both on {', '.join(weak)}.")
    if metrics["unsteady"]:
        notes.append(
            f"{metrics['unsteady']} values of sharpness differ by more than 10 % between starts: they are "
            "lower bounds."
        )
    if settings.norm == "linf":
        notes.append("With norm linf the worst rises come from a sign search: they are lower bounds.")
    if not paths.cached:
        notes.append("Every pass ran all blocks: with cached blocks this model gives other losses.")
    return notes
