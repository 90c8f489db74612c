"""What sharpness and layer paths say together: the table of layers, its verdicts and actions, in words."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.analyses.sharpness import stragglers
from diagnostics.analyses.sharpness.layer_paths import LayerPath, LayerPaths
from diagnostics.analyses.sharpness.layer_sharpness import WHOLE, SharpnessSettings
from probes.models.interpolated import Layer

if TYPE_CHECKING:
    import pandas as pd

# The spread of starts beyond which a value of kind linf is only a lower bound; a ratio that is noted (ours).
UNSTEADY, SHARPER = 0.1, 3.0
# Loss within which remedies are as good as one another: then the one that leaves both ends as they are.
ALIKE = 0.02


class Flags:
    """Which layers stand out, and by what."""

    def __init__(self, paths: LayerPaths, measured: Sequence[LayerPath], worst: float, whole: float):
        self.paths, self.measured, self.worst, self.whole = paths, measured, worst, whole
        screened = [paths.screened(path, worst) for path in measured]
        self.screened = screened
        self.stragglers = stragglers.stragglers(screened, whole)
        self.load_bearing = stragglers.load_bearing(screened, whole)

    @property
    def layers(self) -> list[Layer]:
        """All layers, in order."""
        return [path.layer for path in self.measured]

    def flagged(self) -> list[Layer]:
        """Stragglers and load-bearing layers."""
        marked = self.stragglers | self.load_bearing
        return [layer for layer, flag in zip(self.layers, marked, strict=True) if flag]

    def chosen(self) -> list[Layer]:
        """These, and the two blocks beside them whose barrier is nearest to the median."""
        flagged = self.flagged()
        values = np.array([each.barrier.value for each in self.screened])
        far = np.abs(values - np.median(values))
        others = [place for place in np.argsort(far, kind="stable") if self.layers[place] not in flagged]
        names = {layer.name for layer in flagged} | {self.layers[place].name for place in others[:2]}
        return [layer for layer in self.layers if layer.name in names]


def with_sharpness(curves: "pd.DataFrame", sharp: "pd.DataFrame", rho: float) -> "pd.DataFrame":
    """Curvature beside the rises at the smallest radius that it predicts near a stationary point."""
    found = curves.copy()
    found["predicted"] = (rho**2 * curves["top"] / 2).clip(lower=0)
    found["predicted_average"] = rho**2 * curves["trace"] / 2
    keys = ["alpha", "name"]
    own = sharp[sharp["rho"] == rho][[*keys, "rho", "worst", "average", "slope"]]
    return found.merge(own, on=keys, how="left")


def layer_table(
    flags: Flags,
    sharp: "pd.DataFrame",
    rho: float,
    remedied: "pd.DataFrame",
    worst: float,
    on: Sequence[tuple[str, str]],
) -> "pd.DataFrame":
    """A row a layer: barriers, controls, sharpness at both ends, verdict, action."""
    import pandas as pd

    found = []
    action = best_remedy(remedied, worst, {which[0] for which in on})
    for place, path in enumerate(flags.measured):
        row = flags.paths.row(path, flags.worst)
        for column, alpha in (("base", 0.0), ("half", 0.5), ("tuned", 1.0)):
            for measure, prefix in (("worst", "sharpness"), ("average", "average")):
                row[f"{prefix}_{column}"] = at(sharp, alpha, path.layer.name, rho, measure)
        base = row["sharpness_base"]
        row["sharpness_ratio"] = row["sharpness_tuned"] / base if base > 0 else math.nan
        straggler = bool(flags.stragglers[place])
        row |= {"straggler": straggler, "load_bearing": bool(flags.load_bearing[place])}
        row["action"] = action[0] if straggler else ""
        row["action_barrier_nats"] = action[1] if straggler else math.nan
        row["action_task_nats"] = action[2] if straggler else math.nan
        found.append(row)
    return pd.DataFrame(found)


def at(sharp: "pd.DataFrame", alpha: float, name: str, rho: float, column: str) -> float:
    """A value of the table of sharpness; NaN where it was not measured."""
    here = (sharp["alpha"] == alpha) & (sharp["name"] == name) & (sharp["rho"] == rho)
    return float(sharp.loc[here, column].to_numpy(float)[0]) if here.any() else math.nan


def best_remedy(remedied: "pd.DataFrame", alpha: float, roles: set[str]) -> tuple[str, float, float]:
    """What lowers the loss of some roles most at α, with what it changes there and on the task.

    Of remedies within 0.02 nats the one that leaves both ends as they are comes first: realign, then pin.
    """
    here = remedied[remedied["alpha"] == alpha]
    if not len(here):
        return "", math.nan, math.nan
    label = (here["remedy"] + " " + here["setting"]).str.strip()
    own = here[here["role"].isin(roles)].groupby(label, sort=False)["loss"].mean()
    task = here[here["role"] == "task"].groupby(label, sort=False)["loss"].mean()
    near = own[own <= own.min() + ALIKE].index
    order = ("realign", "pin base", "pin tuned")
    name = next((each for each in order if each in near), str(own.idxmin()))
    return name, float(own[name] - own["none"]), float(task[name] - task["none"])


def metrics_of(
    flags: Flags,
    table: "pd.DataFrame",
    sets: Sequence[Mapping[str, Any]],
    sharp: "pd.DataFrame",
    rho: float,
) -> dict[str, float | int]:
    """What is told of all layers together."""
    found: dict[str, float | int | None] = {
        "stragglers": int(table["straggler"].sum()),
        "worst_alpha": flags.worst,
        "barrier_nats": flags.whole,
        "repaired_nats": float(table[["repair_base", "repair_tuned"]].to_numpy(float).max()),
        "load_bearing": int(table["load_bearing"].sum()),
        "layers": len(table),
        "unsteady": int((sharp["spread"] > UNSTEADY).sum()),
    }
    for name, column in (("sharpness", "worst"), ("average", "average")):
        for side, alpha in (("base", 0.0), ("tuned", 1.0)):
            value = at(sharp, alpha, WHOLE, rho, column)
            found[f"{name}_{side}"] = None if math.isnan(value) else value
    ood = [row for row in sets if row["role"] == "ood"]
    if ood:
        found["strong_failures"] = sum(row["outcome"] == "strong" for row in ood)
        found["successes"] = sum(row["outcome"] == "success" for row in ood)
        lost = [row["confidence_ratio"] for row in ood if row["accuracy_tuned"] < row["accuracy_base"]]
        found["overconfidence_ood"] = max(lost, default=0.0)
    for role in ("task", "keep", "ood"):
        found[f"rows_{role}"] = sum(row["rows"] for row in sets if row["role"] == role) or None
    return {name: value for name, value in found.items() if value is not None}


def judgement(
    table: "pd.DataFrame",
    sets: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float | int],
    on: Sequence[tuple[str, str]],
    settings: SharpnessSettings,
    paths: LayerPaths,
) -> list[str]:
    """What follows, in plain words."""
    data = " and ".join(f"{name} ({role})" if name != role else role for role, name in on)
    notes = [
        f"Barriers are of the rows {data}. Sharpness is of the task rows, in batches of one size: it says "
        "nothing of other rows, and a sharper layer is not a worse one."
    ]
    for row in table[table["straggler"]].to_dict("records"):
        text = f"{row['name']} is a straggler: a barrier of {row['barrier']:.3g} nats by itself"
        text += f" ({row['control_rise']:+.3g} for a random move of its size). "
        if row["action"] and row["action"] != "none":
            text += f"Best of the remedies at alpha {metrics['worst_alpha']:g} is `{row['action']}`: "
            text += f"{row['action_barrier_nats']:+.3g} nats on {data}, "
            text += f"{row['action_task_nats']:+.3g} on the task."
        notes.append(text)
    bearing = table.loc[table["load_bearing"], "name"]
    if len(bearing):
        notes.append(
            f"{', '.join(bearing)}: no barrier, but tuned needs what changed there; not a straggler."
        )
    beyond = table[(table["midway_rise"] > table["control_rise"]) & (table["midway_rise"] > stragglers.LEAST)]
    if len(beyond):
        notes.append(
            f"Half-way back, {', '.join(beyond['name'])} cost more than a random move of the same size would."
        )
    ratio = table[table["sharpness_ratio"] > SHARPER]
    if len(ratio):
        notes.append(
            f"{', '.join(ratio['name'])}: sharpness at tuned is more than {SHARPER:g} times that at base, at "
            "the same rows and radius. That is a description: nothing published reads it as a risk."
        )
    weak = [str(row["set"]) for row in sets if row["role"] == "ood" and row["outcome"] == "weak"]
    if weak:
        notes.append(f"No alpha between the ends is surely better than both on {', '.join(weak)}.")
    if metrics["unsteady"]:
        notes.append(
            f"{metrics['unsteady']} values of sharpness differ by more than a tenth between starts: they are "
            "lower bounds."
        )
    if settings.norm == "linf":
        notes.append("Worst rises of kind linf come from a sign search: lower bounds.")
    if not paths.cached:
        notes.append(
            "This model gives other losses where blocks before a layer are not run again: all passes were "
            "whole."
        )
    return notes
