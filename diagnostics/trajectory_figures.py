"""Pictures of a run's trajectory, drawn from the tables alone: a saved result redraws."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics import theme
from diagnostics.along_figures import COLORS, DASHES, named
from diagnostics.analysis import Result

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
    title = (
        "What must survive fell here and came back to where the shade ends" if deep else "No keep rows fell"
    )
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
        start, low, end, said = deep
        figure.add_vrect(
            x0=start, x1=end, fillcolor=theme.faint(theme.BASE, 0.12), line_width=0, layer="below",
            annotation_text=said, annotation_position="bottom left",
        )  # fmt: skip
        theme.threshold(figure, "lowest", x=low)
    return figure.update_layout(height=420)


def shaded(
    steps: pd.DataFrame, lows: pd.DataFrame | None, measure: str
) -> tuple[float, float, float, str] | None:
    """Start, lowest step and end of the deepest trough of keep rows, and what is written in it."""
    if lows is None or not len(lows):
        return None
    keep = lows[(lows["role"] == "keep") & (lows["measure"] == measure) & (lows["depth"] > 0)]
    if not len(keep):
        return None
    row: Any = keep.sort_values("depth").iloc[-1]
    lasts = not row["steps_to_recover"] >= 0
    end = steps["step"].max() if lasts else row["trough_step"] + row["steps_to_recover"]
    unit = " nats" if measure == "loss" else ""
    said = f"trough: {row['depth']:.3g}{unit} deep, {row['recovery']:.0%} won back"
    return float(steps["step"].min()), float(row["trough_step"]), float(end), said


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
    return figure.update_yaxes(range=[0, 185], dtick=45).update_layout(height=360)


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
