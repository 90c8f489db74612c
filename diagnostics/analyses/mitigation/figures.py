"""Figures of a judged mitigation, drawn from the tables alone, so that a saved result redraws."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, drawn, line, points

# The control is drawn first, behind the others.
STYLES = {
    "update": Style("whole update (control)", theme.NEUTRAL, width=6, size=7),
    "neighbour": Style("neighbour (control)", theme.COLORWAY[4], "triangle-up", "dot", width=1.5),
    "top": Style("top", theme.NEW, "diamond"),
    "all": Style("all", theme.COLORWAY[3], "square", "dash", size=6),
}
NO_SETS = pd.DataFrame(columns=["role", "unit"])


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; one without data is left out."""
    return drawn(result, retention=draw_retention, over_control=draw_over_control)


def unit_of(sets: pd.DataFrame, role: str) -> str:
    """The unit of a role's losses."""
    return f"nats per {' or '.join(dict.fromkeys(sets.loc[sets['role'] == role, 'unit'])) or 'token'}"


def draw_retention(curve: pd.DataFrame, result: Result, sets: pd.DataFrame = NO_SETS) -> "go.Figure":
    """Keep loss against task score, a line a mode from tuned outward; up and right is better."""
    title = "Scaling the whole update: what it keeps, and what it costs on the task"
    if (curve["mode"] != "update").any():
        mode = "A mode keeps" if result.metrics.get("recommended", 0) else "No mode surely keeps"
        title = f"{mode} more than scaling the whole update, at the same task loss"
    if uncontrolled(curve):
        title = "Damping intruders: what it keeps, and what it costs on the task"
    task, keep = (unit_of(sets, role) for role in ("task", "keep"))
    figure = theme.figure(title, f"task loss below base's, {task}", f"keep loss below tuned's, {keep}", 520)
    ends = curve[(curve["mode"] == "update") & curve["scale"].isin([0.0, 1.0])].set_index("scale")
    curve = curve.assign(gained=ends["task_loss"][0.0] - curve["task_loss"])
    hover = "strength {scale:.3g}<br>keep loss {keep_loss:.3f}, task loss {task_loss:.3f}"
    hover += ", accuracy {task_accuracy:.3f}" if curve["task_accuracy"].notna().any() else ""
    for mode, style in STYLES.items():
        part = curve[curve["mode"] == mode]
        sizes = np.where(part["recommended"], 2 * style.size, style.size)
        if len(part) and not (mode == "update" and uncontrolled(curve)):
            line(figure, part, "gained", "retained_nats", style, hover, marker_size=sizes)
    arrow = {"showarrow": True, "arrowhead": 0, "ax": 24, "ay": -24}
    for scale, row in ends.iterrows():
        at = {"x": ends["task_loss"][0.0] - row["task_loss"], "y": row["retained_nats"]}
        figure.add_annotation(text="tuned" if scale else "base", **at, **arrow)
    # Amplified far enough, any direction ruins a model: that must not press the rest into a corner.
    return figure.update_xaxes(range=reach(curve, "gained")).update_yaxes(range=reach(curve, "retained_nats"))


def uncontrolled(curve: pd.DataFrame) -> bool:
    """Whether no scaled update was measured, because base and tuned are two functions."""
    modes = curve[curve["mode"] != "update"]
    return bool(len(modes)) and bool(modes["over_control_nats"].isna().all())


def reach(curve: pd.DataFrame, column: str) -> list[float]:
    """The range of an axis that holds every damped point and what lies near them."""
    damped = curve.loc[curve["scale"] <= 1, column]
    modes = damped[curve["mode"] != "neighbour"]
    size = max(float(modes.max() - modes.min()), 1e-6)
    low = max(float(damped.min()), float(modes.min()) - size)
    high = min(float(damped.max()), float(modes.max()) + size)
    return [low - 0.08 * size, high + 0.12 * size]


def draw_over_control(
    curve: pd.DataFrame, result: Result, sets: pd.DataFrame = NO_SETS
) -> "go.Figure | None":
    """What each mode keeps beyond the control at the same task loss, by strength, with intervals."""
    if (curve["mode"] == "update").all() or uncontrolled(curve):
        return None
    margin = float(result.parameters["margin"])
    damped = curve[(curve["scale"] < 1) & (curve["mode"] != "update")]
    strengths = sorted(damped["scale"].unique())
    title = "Kept beyond the whole update at the same task loss; below 0 the control wins"
    figure = theme.figure(title, "strength; 0 removes", f"{unit_of(sets, 'keep')}, with 95 % interval")
    modes = [mode for mode in STYLES if (damped["mode"] == mode).any()]
    hover = "strength {scale:g}: {y:.3f} ({low_nats:.3f} to {high_nats:.3f}) nats"
    hover += "<br>against the update scaled by {control_scale:.3g}"
    for i, mode in enumerate(modes):
        part = damped[damped["mode"] == mode].rename(columns=lambda name: name.removeprefix("over_control_"))
        part["at"] = part["scale"].map(strengths.index) + 0.2 * (i - (len(modes) - 1) / 2)
        points(figure, part, "at", "nats", STYLES[mode], hover, interval=("low_nats", "high_nats"))
    ticks = {"tickvals": list(range(len(strengths))), "ticktext": [f"{strength:g}" for strength in strengths]}
    shown = damped[damped["mode"] != "neighbour"]
    low, high = float(shown["over_control_low_nats"].min()), float(shown["over_control_high_nats"].max())
    size = max(high - low, 4 * margin)
    figure.update_yaxes(range=[low - 0.1 * size, max(high, margin) + 0.15 * size])
    theme.threshold(figure, f"{margin:g} nats: recommended where the interval lies above", y=margin)
    return figure.update_xaxes(showgrid=False, **ticks)
