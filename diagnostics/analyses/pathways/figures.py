"""Figures of grokking pathways, drawn from the tables alone, so that a saved result redraws."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.analyses.pathways.sample_figures import DISTANCE, draw_drift, draw_matrix, draw_routes
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Panel, Style, drawn, heat, line, names, panels
from diagnostics.plotting.set_styles import COLORS

STEP = "training step"
# column of the table of steps -> its style, panel and axis; the held-out metric has a name of its own
CURVES: dict[str, tuple[Style, Panel, str]] = {
    "distance": (Style("distance within groups", theme.NEW), (1, 1), DISTANCE),
    "between": (Style("between groups", theme.NEUTRAL, "diamond", "dot"), (1, 1), DISTANCE),
    "consistency": (Style("smoothness", theme.BASE, "square"), (1, 2), "mean cosine of layers"),
    "loss": (Style("loss of the followed samples", theme.COLORWAY[3], "triangle-up"), (2, 1), "loss, nats"),
    "held_out": (Style("", COLORS["task"], "cross"), (2, 2), ""),
}


def draw(result: Result) -> dict[str, go.Figure]:
    """The figures; one without data is left out."""
    return drawn(
        result, steps=draw_steps, against_held_out=draw_against, layers=draw_layers, groups=draw_groups,
        smoothness=draw_smoothness, matrix=draw_matrix, routes=draw_routes, drift=draw_drift,
    )  # fmt: skip


def metric_of(verdict: pd.DataFrame) -> tuple[Any, str]:
    """The verdict, and the held-out metric as an axis names it."""
    row = verdict.iloc[0]
    return row, "held-out accuracy" if row["metric"] == "accuracy" else "held-out loss, nats"


def draw_steps(steps: pd.DataFrame, verdict: pd.DataFrame) -> go.Figure:
    """Distance and smoothness above training loss and held-out metric, on one axis of steps."""
    row, metric = metric_of(verdict)
    words = str(row["verdict"])
    figure = panels(
        f"{words[0].upper()}{words[1:]}: routes with loss and {metric}", STEP, "", height=580, rows=2,
        columns=2, shared_xaxes=True, horizontal_spacing=0.12, vertical_spacing=0.1,
    )  # fmt: skip
    for column, (style, panel, axis) in CURVES.items():
        if column == "between" and steps["between"].isna().all():
            continue
        low, high = f"{column}_low", f"{column}_high"
        interval, bounds = None, ""
        if low in steps:
            interval, bounds = (low, high), f" (95 % {{{low}:.4g}} to {{{high}:.4g}})"
        named, hover = replace(style, name=style.name or metric), "step {x}: {y:.4g}" + bounds
        line(figure, steps, "step", column, named, hover, panel=panel, interval=interval)
        figure.update_yaxes(title=axis or metric, row=panel[0], col=panel[1])
    note = {"yref": "y domain", "yanchor": "bottom", "y": 1.0, "row": 1, "col": 1}
    if pd.notna(row["memorised"]):
        theme.threshold(figure, x=float(row["memorised"]), row="all", col="all")
        figure.add_annotation(x=row["memorised"], text="memorised", **note)
    if pd.notna(row["turn"]):
        turn = float(row["turn_low"]), float(row["turn_high"])
        theme.shade(figure, theme.NEW, x=turn, row="all", col="all")
        figure.add_annotation(x=row["turn"], text="turn", **note)
    # Above the notes on top of the panels.
    return figure.update_layout(margin_t=110, legend_y=1.06)


def draw_against(steps: pd.DataFrame, verdict: pd.DataFrame) -> go.Figure:
    """The held-out metric over the distance within groups, joined in step order."""
    row, metric = metric_of(verdict)
    title = f"{metric.partition(',')[0].capitalize()} over the distance within groups, in step order"
    figure = theme.figure(title, f"distance within groups ({DISTANCE})", metric)
    late, hover = steps[steps["step"] >= row["since"]], "step {step}: distance {x:.4f}, {y:.4f}"
    if len(late) < len(steps):
        early = steps[steps["step"] <= row["since"]]
        style = Style("until memorised", theme.NEUTRAL, "circle-open")
        line(figure, early, "distance", "held_out", style, hover)
    # The labels of the steps between the ends would cover one another.
    ends = [name if i in (0, len(late) - 1) else "" for i, name in enumerate(names(late["step"]))]
    return line(
        figure, late, "distance", "held_out", Style("counted", COLORS["task"]), hover, text=ends,
        mode="lines+markers+text", textposition="top center", cliponaxis=False,
    )  # fmt: skip


def draw_layers(layers: pd.DataFrame) -> go.Figure:
    """Distance within groups and the gap to others, by layer and checkpoint."""
    return draw_distances(layers, "layer")


def draw_groups(groups: pd.DataFrame) -> go.Figure | None:
    """Distance within groups and the gap to others, by group and checkpoint."""
    return draw_distances(groups, "group") if groups["group"].nunique() > 1 else None


def draw_distances(table: pd.DataFrame, unit: str) -> go.Figure:
    """Distance within groups and the gap to others, by layer or group and checkpoint."""
    columns = ["distance", "gap"] if table["gap"].notna().any() else ["distance"]
    figure = panels(
        f"How far pathways differ, by {unit}", STEP, unit, columns=len(columns), shared_yaxes=True,
        horizontal_spacing=0.14, names=["within groups", "gap: between − within"][: len(columns)],
    )  # fmt: skip
    for i, column in enumerate(columns, start=1):
        look: dict[str, Any] = {"bar": column, "name": column, "diverging": column == "gap", "panel": (1, i)}
        hover = f"{unit} {{y}}, step {{x}}: {column} {{z:.4f}}"
        heat(figure, table, "step", unit, column, hover, colorbar_x=0.43 if i < len(columns) else 1.0, **look)
    return figure


def draw_smoothness(values: pd.DataFrame) -> go.Figure | None:
    """How smoothness is spread over samples at each checkpoint."""
    if values["consistency"].isna().all():
        return None
    figure = theme.figure("Smoothness of single samples; higher is smoother", STEP, "mean cosine of layers")
    shares = {"lowerfence": 0.05, "q1": 0.25, "median": 0.5, "q3": 0.75, "upperfence": 0.95}
    cuts = values.groupby("step")["consistency"].quantile(np.array([*shares.values()])).unstack()
    look = {"showlegend": False, "marker_color": theme.BASE, "fillcolor": theme.faint(theme.BASE, 0.2)}
    boxes = {part: cuts[share] for part, share in shares.items()}
    figure.add_box(x=names(cuts.index), name="samples", **boxes, **look)
    return figure.update_xaxes(type="category")
