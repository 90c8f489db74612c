"""The pictures of grokking pathways, drawn from the tables alone, so that a saved result redraws."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.analyses.pathways.sample_figures import draw_drift, draw_matrix, draw_routes
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from probes.checkpoints.steps import step_label

if TYPE_CHECKING:
    import plotly.graph_objects as go

STEP = "training step"
WITHIN, BETWEEN, SMOOTH, LOSS, HELD = theme.NEW, theme.NEUTRAL, theme.BASE, theme.COLORWAY[3], theme.TUNED
DISTANCE = "edits / longer pathway"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    tables = {name: table for name, table in result.tables.items() if len(table)}
    figures: dict[str, go.Figure] = {}
    if "steps" in tables and "verdict" in tables:
        figures["steps"] = draw_steps(tables["steps"], tables["verdict"].iloc[0])
        figures["against_held_out"] = draw_against(tables["steps"], tables["verdict"].iloc[0])
    if "layers" in tables:
        figures["layers"] = draw_heat(tables["layers"], "layer", "How far pathways differ, layer by layer")
    if "groups" in tables and tables["groups"]["group"].nunique() > 1:
        figures["groups"] = draw_heat(tables["groups"], "group", "How far pathways differ, group by group")
    if "values" in tables and tables["values"]["consistency"].notna().any():
        figures["smoothness"] = draw_smoothness(tables["values"])
    if {"matrix", "samples"} <= tables.keys():
        figures["matrix"] = draw_matrix(tables["matrix"], tables["samples"])
    if {"routes", "samples"} <= tables.keys():
        figures["routes"] = draw_routes(tables["routes"], tables["samples"])
    if {"samples", "steps"} <= tables.keys():
        figures["drift"] = draw_drift(tables["samples"], tables["steps"])
    return figures


def metric_name(row: Any) -> str:
    """The held-out metric as an axis names it."""
    return "held-out accuracy" if row["metric"] == "accuracy" else "held-out loss in nats"


def draw_steps(steps: pd.DataFrame, verdict: Any) -> "go.Figure":
    """Distance and smoothness above training loss and held-out metric, on one axis of steps."""
    words = str(verdict["verdict"])
    figure = theme.figure(
        title=f"{words[0].upper()}{words[1:]}: routes beside loss and {metric_name(verdict)}", x=STEP, y=""
    )
    figure.set_subplots(rows=2, cols=2, shared_xaxes=True, horizontal_spacing=0.12, vertical_spacing=0.1)
    curve(figure, steps, "distance", "distance within groups", WITHIN, "circle", (1, 1))
    if steps["between"].notna().any():
        curve(figure, steps, "between", "between groups", BETWEEN, "diamond", (1, 1), dash="dot")
    curve(figure, steps, "consistency", "smoothness", SMOOTH, "square", (1, 2))
    curve(figure, steps, "loss", "loss of the followed samples", LOSS, "triangle-up", (2, 1))
    curve(figure, steps, "held_out", metric_name(verdict), HELD, "cross", (2, 2))
    mark(figure, verdict)
    for place, title in (((1, 1), DISTANCE), ((1, 2), "mean cosine of layers"), ((2, 1), "loss in nats"),
                         ((2, 2), metric_name(verdict))):  # fmt: skip
        figure.update_yaxes(title=title, row=place[0], col=place[1])
    figure.update_xaxes(title="", row=1)
    figure.update_xaxes(title=STEP, row=2)
    # Above what is written on top of the panels.
    return figure.update_layout(height=580, margin={"t": 110}, legend={"y": 1.06})


def curve(
    figure: "go.Figure",
    steps: pd.DataFrame,
    column: str,
    name: str,
    color: str,
    symbol: str,
    place: tuple[int, int],
    dash: str = "solid",
) -> None:
    """A line over steps with its 95 % interval, where there is one."""
    import plotly.graph_objects as go

    row, col = place
    known = f"{column}_low" in steps
    if known:
        at, low, high = (steps[each].to_numpy(float) for each in ("step", f"{column}_low", f"{column}_high"))
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([at, at[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
                mode="lines", line={"width": 0, "color": color}, fillcolor=theme.faint(color, 0.15),
                hoverinfo="skip", showlegend=False,
            ),
            row=row, col=col,
        )  # fmt: skip
    bounds = " (95 % %{customdata[0]:.4g} to %{customdata[1]:.4g})" if known else ""
    figure.add_trace(
        go.Scatter(
            x=steps["step"], y=steps[column], name=name, mode="lines+markers",
            line={"color": color, "width": 2, "dash": dash}, marker={"symbol": symbol, "size": 8},
            customdata=steps[[f"{column}_low", f"{column}_high"]] if known else None,
            hovertemplate=f"{name} at step %{{x}}: %{{y:.4g}}{bounds}<extra></extra>",
        ),
        row=row, col=col,
    )  # fmt: skip


def mark(figure: "go.Figure", verdict: Any) -> None:
    """The step of memorisation as a line, and the turn to generalisation as a band, in every panel."""
    look = {"line": {"color": theme.NEUTRAL, "dash": "dash", "width": 1.5}, "row": "all", "col": "all"}
    first = {"row": 1, "col": 1, "showarrow": False, "yref": "y domain", "yanchor": "bottom", "y": 1.0}
    if pd.notna(verdict["memorised"]):
        figure.add_vline(x=verdict["memorised"], **look)
        figure.add_annotation(x=verdict["memorised"], text="memorised", **first)
    if pd.notna(verdict["turn"]):
        band = {"fillcolor": theme.faint(WITHIN, 0.12), "line_width": 0, "layer": "below"}
        figure.add_vrect(x0=verdict["turn_low"], x1=verdict["turn_high"], row="all", col="all", **band)
        figure.add_annotation(x=verdict["turn"], text="turn", **first)


def draw_against(steps: pd.DataFrame, verdict: Any) -> "go.Figure":
    """The held-out metric over the distance within groups, joined in step order."""
    import plotly.graph_objects as go

    figure = theme.figure(
        title=f"{metric_name(verdict).capitalize()} over the distance within groups, in step order",
        x=f"distance within groups ({DISTANCE})", y=metric_name(verdict),
    )  # fmt: skip
    after = steps["step"] >= verdict["since"]
    before = steps[steps["step"] <= verdict["since"]]
    looks = [(steps[after], "counted", HELD, "circle")]
    if not after.all():
        looks.insert(0, (before, "until memorised", theme.NEUTRAL, "circle-open"))
    for own, name, color, symbol in looks:
        figure.add_trace(
            go.Scatter(
                x=own["distance"], y=own["held_out"], name=name, mode="lines+markers+text",
                text=ends(own["step"]) if name == "counted" else None,
                textposition="top center", line={"color": color, "width": 1.5},
                marker={"symbol": symbol, "size": 9}, customdata=own["step"], cliponaxis=False,
                hovertemplate="step %{customdata}: distance %{x:.4f}, %{y:.4f}<extra></extra>",
            )
        )  # fmt: skip
    return figure.update_layout(height=440)


def ends(steps: pd.Series) -> list[str]:
    """The first and the last step as labels; those between would cover one another."""
    return [f"{step:g}" if place in (0, len(steps) - 1) else "" for place, step in enumerate(steps)]


def draw_heat(table: pd.DataFrame, rows: str, title: str) -> "go.Figure":
    """Distance within groups and the gap to others, by layer or group and checkpoint."""
    import plotly.graph_objects as go

    figure = theme.figure(title=title, x=STEP, y=rows)
    gaps = bool(table["gap"].notna().any())
    panels = ["distance", "gap"] if gaps else ["distance"]
    figure.set_subplots(
        rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.14,
        subplot_titles=["within groups", "gap: between − within"][: len(panels)],
    )  # fmt: skip
    names = [step_label(step) for step in dict.fromkeys(table["step"])]
    for place, column in enumerate(panels, start=1):
        wide = table.pivot(index=rows, columns="step", values=column)
        wide = wide.reindex(index=list(dict.fromkeys(table[rows])))
        most = max(float(np.nanmax(np.abs(wide.to_numpy(float)), initial=0.0)), 1e-3)
        diverging = column == "gap"
        bar = {"title": {"text": column}, "x": (0.43 if gaps else 1.0) if place == 1 else 1.0}
        figure.add_trace(
            go.Heatmap(
                z=wide, x=names, y=[theme.verbatim(each) for each in wide.index], name=column,
                zmin=-most if diverging else None, zmax=most if diverging else None,
                colorscale=theme.scale(theme.LIGHT.diverging) if diverging else None, colorbar=bar,
                xgap=1, ygap=1,
                hovertemplate=f"{rows} %{{y}}, step %{{x}}: {column} %{{z:.4f}}<extra></extra>",
            ),
            row=1, col=place,
        )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False, title=STEP)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure.update_layout(height=200 + 22 * max(table[rows].nunique(), 6))


def draw_smoothness(values: pd.DataFrame) -> "go.Figure":
    """How smoothness is spread over samples at each checkpoint."""
    import plotly.graph_objects as go

    figure = theme.figure(
        title="Smoothness of single samples; higher is smoother",
        x=STEP,
        y="mean cosine of consecutive layers",
    )
    steps = list(dict.fromkeys(values["step"]))
    cuts = values.groupby("step")["consistency"].quantile(np.array([0.05, 0.25, 0.5, 0.75, 0.95])).unstack()
    cuts = cuts.loc[steps]
    figure.add_trace(
        go.Box(
            x=[step_label(step) for step in steps], lowerfence=cuts[0.05], q1=cuts[0.25], median=cuts[0.5],
            q3=cuts[0.75], upperfence=cuts[0.95], name="samples", showlegend=False,
            marker={"color": SMOOTH}, line={"color": SMOOTH}, fillcolor=theme.faint(SMOOTH, 0.2),
        )
    )  # fmt: skip
    figure.update_xaxes(type="category")
    return figure.update_layout(height=380)
