"""The pictures of a judged mitigation, drawn from the tables alone, so that a saved result redraws."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

# mode -> what the legend calls it, and its look; the control stands behind the others
LOOKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "update": (
        "whole update (control)",
        {"color": theme.NEUTRAL, "width": 6},
        {"symbol": "circle", "size": 7},
    ),
    "neighbour": (
        "neighbour (control)",
        {"color": theme.COLORWAY[4], "width": 1.5, "dash": "dot"},
        {"symbol": "triangle-up", "size": 8},
    ),
    "top": ("top", {"color": theme.NEW, "width": 2}, {"symbol": "diamond", "size": 8}),
    "all": ("all", {"color": theme.COLORWAY[3], "width": 2, "dash": "dash"}, {"symbol": "square", "size": 6}),
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    curve = result.tables.get("curve")
    if curve is None or not len(curve):
        return {}
    sets = result.tables.get("sets", pd.DataFrame(columns=["role", "unit"]))
    units = {role: unit_of(sets, role) for role in ("task", "keep")}
    figures = {"retention": draw_retention(curve, result, units)}
    if len(curve[curve["mode"] != "update"]):
        figures["over_control"] = draw_over_control(curve, float(result.parameters["margin"]), units["keep"])
    return figures


def unit_of(sets: pd.DataFrame, role: str) -> str:
    """What losses of a role are counted per."""
    units = dict.fromkeys(sets.loc[sets["role"] == role, "unit"])
    return f"nats per {' or '.join(units) or 'token'}"


def draw_retention(curve: pd.DataFrame, result: Result, units: dict[str, str]) -> "go.Figure":
    """Retention against task score, one line a mode from tuned outward; up and right is better."""
    import plotly.graph_objects as go

    chosen = result.metrics.get("recommended", 0)
    title = "Scaling the whole update: what it keeps, and what it costs on the task"
    if (curve["mode"] != "update").any():
        title = "A mode keeps more than scaling the whole update, at the same task loss"
        title = (
            title
            if chosen
            else "No mode surely keeps more than scaling the whole update, at the same task loss"
        )
    figure = theme.figure(
        title=title,
        x=f"gained on the task over base, {units['task']}",
        y=f"keep loss taken off tuned's, {units['keep']}",
    )
    base = curve[(curve["mode"] == "update") & (curve["scale"] == 0)].iloc[0]
    for mode, (name, line, marker) in LOOKS.items():
        part = curve[curve["mode"] == mode]
        if not len(part):
            continue
        extra = part["recommended"].to_numpy()
        figure.add_trace(
            go.Scatter(
                x=base["task_loss"] - part["task_loss"], y=part["retained_nats"], name=name,
                mode="lines+markers", line=line,
                marker={
                    **marker, "color": line["color"],
                    "size": np.where(extra, 2 * marker["size"], marker["size"]),
                },
                customdata=part[["scale", "keep_loss", "task_loss", "task_accuracy"]],
                hovertemplate="strength %{customdata[0]:.3g}<br>keep loss %{customdata[1]:.3f}, "
                "task loss %{customdata[2]:.3f}, accuracy %{customdata[3]:.3f}",
            )
        )  # fmt: skip
    ends = curve[(curve["mode"] == "update") & curve["scale"].isin([0.0, 1.0])]
    for row in ends.to_dict("records"):
        figure.add_annotation(
            x=base["task_loss"] - row["task_loss"], y=row["retained_nats"],
            text="base" if row["scale"] == 0 else "tuned", showarrow=True, arrowhead=0, ax=24, ay=-24,
        )  # fmt: skip
    # Amplified far enough, any direction ruins a model: that must not press the rest into a corner.
    low, high = reach(curve, base["task_loss"])
    figure.update_xaxes(range=low).update_yaxes(range=high)
    return figure.update_layout(height=520)


def reach(curve: pd.DataFrame, base_loss: float) -> tuple[list[float], list[float]]:
    """Ranges of both axes that hold every damped point and what lies near them."""
    damped = curve[curve["scale"] <= 1]
    shown = damped[damped["mode"] != "neighbour"]
    ranges = []
    for values, rest in (
        (base_loss - shown["task_loss"], base_loss - damped["task_loss"]),
        (shown["retained_nats"], damped["retained_nats"]),
    ):
        size = max(float(values.max() - values.min()), 1e-6)
        low = max(float(rest.min()), float(values.min()) - size)
        high = min(float(rest.max()), float(values.max()) + size)
        ranges.append([low - 0.08 * size, high + 0.12 * size])
    return ranges[0], ranges[1]


def draw_over_control(curve: pd.DataFrame, margin: float, unit: str) -> "go.Figure":
    """What each mode keeps beyond the control at the same task loss, by strength, with intervals."""
    import plotly.graph_objects as go

    damped = curve[(curve["scale"] < 1) & (curve["mode"] != "update")]
    strengths = sorted(damped["scale"].unique())
    figure = theme.figure(
        title="Kept beyond the whole update that is as good on the task; below the line the control wins",
        x="strength; 0 removes", y=f"{unit}, with 95 % interval",
    )  # fmt: skip
    modes = [mode for mode in LOOKS if (damped["mode"] == mode).any()]
    for place, mode in enumerate(modes):
        name, line, marker = LOOKS[mode]
        part = damped[damped["mode"] == mode]
        shift = 0.2 * (place - (len(modes) - 1) / 2)
        figure.add_trace(
            go.Scatter(
                x=[strengths.index(scale) + shift for scale in part["scale"]], y=part["over_control_nats"],
                name=name, mode="markers", marker={**marker, "color": line["color"]},
                error_y={
                    "symmetric": False, "color": line["color"], "thickness": 1.5, "width": 0,
                    "array": part["over_control_high_nats"] - part["over_control_nats"],
                    "arrayminus": part["over_control_nats"] - part["over_control_low_nats"],
                },
                customdata=part[["scale", "control_scale"]],
                hovertemplate="strength %{customdata[0]:g}: %{y:.3f}, against the update scaled by "
                "%{customdata[1]:.3g}",
            )
        )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(strengths))), ticktext=[f"{scale:g}" for scale in strengths], showgrid=False
    )
    shown = damped[damped["mode"] != "neighbour"]
    low, high = shown["over_control_low_nats"].min(), shown["over_control_high_nats"].max()
    size = max(float(high - low), 4 * margin)
    figure.update_yaxes(range=[float(low) - 0.1 * size, max(float(high), margin) + 0.15 * size])
    theme.threshold(figure, f"{margin:g} nats: a mode is recommended whose interval lies above", y=margin)
    return figure.update_layout(height=420)
