"""Figures of essential sparsity, drawn from the tables alone, so that a saved result redraws."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.analyses.sparsity.evaluator import MAGNITUDE, RANDOM
from diagnostics.analyses.sparsity.heatmaps import draw_change, draw_layers, draw_overlap, where
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Interval, Style, bars, drawn, line, panels
from diagnostics.plotting.charts import points as marks

MASKED = "masked_finetune"
# model and regime
STYLES = {
    ("base", "zero_shot"): Style("base, zero-shot", theme.BASE),
    ("tuned", "zero_shot"): Style("tuned, zero-shot", theme.TUNED, "diamond"),
    ("base", MASKED): Style("base, masked fine-tuning", theme.COLORWAY[4], "square"),
}
SPARSITY = "sparsity: share of the weights in the scope that is zero"
# Never colour alone.
HATCHED = {"shape": "/", "fillmode": "overlay", "fgcolor": "white", "fgopacity": 0.5, "solidity": 0.15}
# How many tolerances the close figure shows below and above 0.
CLOSE = (-2.0, 6.0)


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; one without data is left out."""
    curves = {}
    for role in dict.fromkeys(result.tables.get("curve", {"role": ()})["role"]):
        curves[f"{role}_close"] = partial(draw_close, role=role)
        curves[f"{role}_curve"] = partial(draw_curve, role=role)
    rest = {"patterns": draw_patterns, "layers": draw_layers, "overlap": draw_overlap, "change": draw_change}
    return drawn(result, **curves, **rest)


def curve_with_control(
    figure: "go.Figure", curve: pd.DataFrame, row: Mapping[Any, Any], value: str, interval: Interval
) -> pd.DataFrame:
    """Draw the curve of a model with its ribbon, and random pruning as its control; give the curve back."""
    style = STYLES[row["model"], row["regime"]]
    part = where(curve, model=row["model"], regime=row["regime"]).sort_values("sparsity")
    magnitude, random = (where(part, pattern=pattern) for pattern in (MAGNITUDE, RANDOM))
    hover, (low, high) = "sparsity {x:.2f}: {y:.4f}", interval
    bounds = f" (95 % {{{low}:.4f}} to {{{high}:.4f}})"
    line(figure, magnitude, "sparsity", value, style, hover + bounds, interval=interval)
    if len(random):
        control = Style(f"{style.name}, random", style.color, dash="dot", width=1.5)
        line(figure, random, "sparsity", value, control, hover, mode="lines")
    return magnitude


def tolerated(dropping: pd.DataFrame, role: str) -> str:
    """Which sparsity each model tolerates, in a sentence."""
    rows = where(dropping, regime="zero_shot").set_index("model").to_dict("index")
    if not any(row["decided"] for row in rows.values()):
        return f"The {role} rows are too few to tell the tolerance from noise"
    words = []
    for model in ("tuned", "base"):
        limit = f"{rows[model]['dropping_point']:.2g}{'' if rows[model]['reached'] else ' and more'}"
        known = f"tolerates a sparsity of {limit}" if rows[model]["decided"] else "cannot be told from noise"
        words.append(f"{model} {known}")
    return f"On the {role} rows {', '.join(words)}"


def draw_close(curve: pd.DataFrame, points: pd.DataFrame, role: str) -> "go.Figure":
    """What each sparsity costs near the tolerance, each model against itself without a mask."""
    curve, dropping = where(curve, role=role), where(points, role=role)
    loss = dropping["metric"].iloc[0] == "loss"
    y = "loss added, share of the loss without a mask" if loss else "accuracy lost"
    figure = theme.figure(tolerated(dropping, role), SPARSITY, y, 480)
    dropping = dropping.assign(scale=dropping["value"].abs() if loss else 1.0)
    tolerance = float(dropping["allowed"].iloc[0] / dropping["scale"].iloc[0])
    theme.shade(figure, theme.NEUTRAL, y=(0, tolerance), strength=0.18)
    low, high = (tolerance * end for end in CLOSE)
    for row in dropping.to_dict("records"):
        scaled = curve.assign(**(curve[["drop", "drop_low", "drop_high"]] / row["scale"]))
        part = curve_with_control(figure, scaled, row, "drop", ("drop_low", "drop_high"))
        if row["decided"] and row["reached"]:
            style = STYLES[row["model"], row["regime"]]
            theme.shade(figure, style.color, x=(row["dropping_point"], row["until"]))
            marks(
                figure, pd.DataFrame([row]).assign(y=tolerance), "robust_point", "y", style,
                "{x:.3f} (95 % {low:.3f} to {high:.3f})<br>{verdict}", x_interval=("low", "high"),
                showlegend=False, marker_size=13, marker_line={"color": "white", "width": 1}, error_x_width=6
            )  # fmt: skip
        if not row["decided"]:  # show its noise, up to where it first falls
            beyond = np.flatnonzero(part["drop"] > tolerance)
            noisy = part[: int(beyond[0]) + 1 if len(beyond) else None]
            low, high = min(low, float(noisy["drop_low"].min())), max(high, float(noisy["drop_high"].max()))
    # On the left, where curves are still near 0.
    theme.threshold(figure, f"tolerance {tolerance:.3g}", y=tolerance, left=True)
    reach = [-0.02, float(curve["sparsity"].max()) + 0.02]
    return figure.update_yaxes(range=[low, high]).update_xaxes(range=reach)


def draw_curve(curve: pd.DataFrame, points: pd.DataFrame, role: str) -> "go.Figure":
    """The metric itself over the whole grid."""
    curve, rows = where(curve, role=role), where(points, role=role).to_dict("records")
    falls = [f"{row['model']}{' with tuning' * (row['regime'] == MASKED)} {row['verdict']}" for row in rows]
    title = f"The {role} rows over all sparsities; the fall is: {', '.join(falls)}"
    figure = theme.figure(title, SPARSITY, "accuracy" if rows[0]["metric"] == "accuracy" else "loss, nats")
    for row in rows:
        curve_with_control(figure, curve, row, "value", ("low", "high"))
    return figure.update_xaxes(range=[-0.02, float(curve["sparsity"].max()) + 0.02])


def draw_patterns(patterns: pd.DataFrame) -> "go.Figure":
    """What N:M patterns cost each model, with a free mask of the same sparsity."""
    shown = patterns[patterns["pattern"] != RANDOM]
    # A pattern keeps more of the weights' size the more weights it chooses among.
    choice = shown["pattern"].replace(MAGNITUDE, "0:inf").str.partition(":")[2].astype(float)
    free = "free" if shown["sparsity"].nunique() == 1 else "free " + shown["sparsity"].map("{:.2g}".format)
    label = shown["pattern"].mask(shown["pattern"] == MAGNITUDE, free)
    shown = shown.assign(label=label, choice=choice).sort_values("choice", ascending=False, kind="stable")
    roles, title = list(dict.fromkeys(patterns["role"])), "Cost of N:M patterns and of a free mask, zero-shot"
    figure = panels(title, "", "", columns=len(roles), horizontal_spacing=0.14)
    hover = "{x}: {y:.4f} ({drop_low:.4f} to {drop_high:.4f}), metric {value:.4f}"
    hover += "<br>keeps {kept_l2:.3f} of the squared weights"
    for col, role in enumerate(roles, start=1):
        for model, hatch in (("base", None), ("tuned", HATCHED)):
            part, style = where(shown, role=role, model=model), STYLES[model, "zero_shot"]
            look: dict[str, Any] = {"legendgroup": model, "showlegend": col == 1, "marker_pattern": hatch}
            ends = ("drop_low", "drop_high")
            bars(figure, part, "label", "drop", style, hover, interval=ends, panel=(1, col), **look)
        unit = "accuracy lost" if part["metric"].iloc[0] == "accuracy" else "loss added, nats"
        figure.update_xaxes(title=f"{role} rows", showgrid=False, col=col).update_yaxes(title=unit, col=col)
    return figure.update_layout(barmode="group")
