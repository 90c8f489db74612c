"""Pictures of a run's trajectory, drawn from the tables alone: a saved result redraws."""

from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.set_styles import COLORS, DASHES, named

if TYPE_CHECKING:
    import plotly.graph_objects as go

X = "step"
ROLES = {**COLORS, "train": theme.NEUTRAL}
SCORES = {
    "metric": "share of rows or tokens right",
    "loss": "loss, nats a row or token",
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or says nothing is left out."""
    steps, lows = result.tables.get("steps"), result.tables.get("troughs")
    if steps is None or not len(steps):
        return {}
    figures = {
        measure: draw_scores(steps, lows, measure) for measure in SCORES if steps[measure].notna().any()
    }
    task = steps[steps["role"] == "task"]
    if task["metric"].notna().any() and task["loss"].notna().any():
        figures["parting"] = draw_parting(task, result.metrics.get("decoupling"))
    path = result.tables.get("path")
    if path is not None and path["angle"].notna().any():
        figures["angles"] = draw_angles(path, result.metrics.get("inefficiency"))
        figures["distances"] = draw_distances(path)
    return figures


def curves(steps: pd.DataFrame) -> "list[tuple[str, str, str, str, pd.DataFrame]]":
    """Each set's rows with its name, colour, dash and symbol."""
    found, seen = [], dict.fromkeys(ROLES, 0)
    for keys, curve in steps.groupby(["role", "set"], sort=False):
        role, name = map(str, keys)
        turn = seen[role]
        seen[role] += 1
        look = ROLES[role], DASHES[turn % 5], theme.SYMBOLS[turn % 5]
        found.append((named(role, name), *look, curve.sort_values("step")))
    return found


def draw_scores(steps: pd.DataFrame, lows: pd.DataFrame | None, measure: str) -> "go.Figure":
    """Task, keep and train rows on one axis of steps; from the first checkpoint to recovery is shaded."""
    import plotly.graph_objects as go

    deep = shaded(steps, lows, measure)
    title = "No keep rows fell"
    if deep:
        back = "was back where the shade ends" if deep.back else "has not come back by the end"
        title = f"What must survive fell, and {back}"
    if not (steps["role"] == "keep").any():
        title = "The task over the steps"
    figure = theme.figure(title=title, x=X, y=SCORES[measure])
    for name, color, dash, symbol, curve in curves(steps):
        figure.add_trace(
            go.Scatter(
                x=curve["step"], y=curve[measure], mode="lines+markers", name=name,
                line={"color": color, "dash": dash}, marker={"symbol": symbol, "size": 8},
                hovertemplate=f"step %{{x}}: %{{y:.4f}}<extra>{name}</extra>",
            )
        )  # fmt: skip
    if deep:
        figure.add_vrect(
            x0=deep.start, x1=deep.end, fillcolor=theme.faint(theme.BASE, 0.12), line_width=0, layer="below",
            annotation_text=deep.said, annotation_position="bottom left",
        )  # fmt: skip
        theme.threshold(figure, "lowest", x=deep.low)
    return figure.update_layout(height=420)


class Shade(NamedTuple):
    """The deepest trough of keep rows: its steps, whether it was climbed out of, what is written in it."""

    start: float
    low: float
    end: float
    back: bool
    said: str


def shaded(steps: pd.DataFrame, lows: pd.DataFrame | None, measure: str) -> Shade | None:
    """What is shaded, if any keep rows fell."""
    if lows is None or not len(lows):
        return None
    keep = lows[(lows["role"] == "keep") & (lows["measure"] == measure) & (lows["depth"] > 0)]
    if not len(keep):
        return None
    row: Any = keep.sort_values("depth").iloc[-1]
    back = bool(row["steps_to_recover"] >= 0)
    end = row["trough_step"] + row["steps_to_recover"] if back else steps["step"].max()
    unit = " nats" if measure == "loss" else ""
    said = f"trough: {row['depth']:.3g}{unit} deep, {row['recovery']:.0%} won back"
    return Shade(float(steps["step"].min()), float(row["trough_step"]), float(end), back, said)


def draw_parting(task: pd.DataFrame, correlation: float | None) -> "go.Figure":
    """Loss against metric of the task, step by step: together they run up to the left, parted they do not."""
    import plotly.graph_objects as go

    told = "" if correlation is None else f" (Spearman {correlation:.2f})"
    figure = theme.figure(
        title=f"Where loss and metric part, the path leaves the diagonal{told}", x=SCORES["loss"],
        y=SCORES["metric"],
    )  # fmt: skip
    for name, color, dash, symbol, curve in curves(task):
        ends = {curve["step"].iloc[0]: "first", curve["step"].iloc[-1]: "last"}
        figure.add_trace(
            go.Scatter(
                x=curve["loss"], y=curve["metric"], mode="lines+markers+text", name=name,
                text=[ends.get(step, "") for step in curve["step"]], textposition="top center",
                customdata=curve["step"], line={"color": color, "dash": dash},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=f"step %{{customdata}}: loss %{{x:.4f}}, right %{{y:.4f}}<extra>{name}</extra>",
            )
        )  # fmt: skip
    return figure.update_layout(height=420)


def draw_angles(path: pd.DataFrame, times: float | None) -> "go.Figure":
    """The angle of every step to the way from first to last, and to the step before it."""
    import plotly.graph_objects as go

    told = "" if times is None else f": the way is {times:.2f} times its straight line"
    figure = theme.figure(title=f"Which way each step went{told}", x=X, y="angle, degrees")
    for column, name, color, symbol in (
        ("angle", "to the way from first to last", theme.TUNED, "circle"),
        ("turn", "to the step before", theme.NEUTRAL, "diamond"),
    ):
        part = path[path[column].notna()]
        figure.add_trace(
            go.Scatter(
                x=part["step"], y=part[column], mode="lines+markers", name=name, line_color=color,
                marker={"symbol": symbol, "size": 8}, customdata=part["length"],
                hovertemplate="step %{x}: %{y:.1f}°, length %{customdata:.4g}",
            )
        )  # fmt: skip
    theme.threshold(figure, "across", y=90)
    return figure.update_yaxes(range=[-6, 186], tickvals=[0, 45, 90, 135, 180]).update_layout(height=360)


def draw_distances(path: pd.DataFrame) -> "go.Figure":
    """How far the weights are from where they began and from where they end."""
    import plotly.graph_objects as go

    figure = theme.figure(title="How far the weights moved", x=X, y="distance, in the weights' own units")
    for column, name, color, symbol in (
        ("distance_start", "from the first checkpoint", theme.TUNED, "circle"),
        ("distance_end", "to the last", theme.BASE, "diamond"),
        ("length", "in the last step", theme.NEUTRAL, "square"),
    ):
        part = path[path[column].notna()]
        figure.add_trace(
            go.Scatter(
                x=part["step"], y=part[column], mode="lines+markers", name=name, line_color=color,
                marker={"symbol": symbol, "size": 8}, hovertemplate="step %{x}: %{y:.4g}",
            )
        )  # fmt: skip
    return figure.update_layout(height=360)
