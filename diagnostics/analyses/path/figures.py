"""Figures of the path from base to tuned, drawn from the tables alone, so that a saved result redraws."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, drawn, line
from diagnostics.plotting.set_styles import ALPHA, set_curves, set_lines, set_name

# metric -> title and axis; U is the unit of the sets
METRICS = {
    "loss": ("Loss from base to tuned: a dip below both ends is a better model", "nats per U"),
    "accuracy": ("Accuracy from base to tuned", "share of Us right"),
}
# pattern of base, tuned, blend -> legend and colour
PATTERNS = {
    "TTT": ("right in all three", "#2b7bba"),
    "FFT": ("right in the blend alone", "#9a3be8"),
    "TFT": ("right in base and blend", "#7fb3da"),
    "FTT": ("right in tuned and blend", "#e8a562"),
    "FTF": ("right in tuned alone", "#d9730d"),
    "TFF": ("right in base alone", "#174e7c"),
    "TTF": ("wrong in the blend alone", "#c91d5f"),
    "FFF": ("wrong in all three", "#7d8590"),
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; one without data is left out."""
    if not len(result.tables.get("path", ())):
        return {}
    metrics = {metric: partial(draw_metric, metric=metric) for metric in METRICS}
    return drawn(result, **metrics, trade=draw_trade, sides=draw_sides, patterns=draw_patterns)


def draw_metric(path: pd.DataFrame, result: Result, metric: str) -> "go.Figure":
    """A metric of every set over alpha, with the chosen alpha; for the loss also that of mixed answers."""
    title, y = METRICS[metric]
    figure = theme.figure(title, ALPHA, y.replace("U", " or ".join(dict.fromkeys(path["unit"]))))
    set_lines(figure, path[path["metric"] == metric], "alpha", "value", "alpha {x:g}: {y:.4f}")
    mixtures = path[path["metric"] == f"ensemble_{metric}"] if metric == "loss" else path[:0]
    for i, (style, curve) in enumerate(set_curves(mixtures, "alpha")):
        mixture = Style("mixture of both ends' answers", style.color, dash="dot", width=1.5)
        line(
            figure, curve, "alpha", "value", mixture, "{set}, alpha {x:g}: {y:.4f}", mode="lines",
            opacity=0.6, legendgroup="mixture", showlegend=i == 0,
        )  # fmt: skip
    best = result.metrics.get("best_alpha")
    if best is not None:
        theme.threshold(figure, f"best alpha {best:g}", x=best, left=best > 0.5)
    return figure


def draw_trade(choices: pd.DataFrame) -> "go.Figure | None":
    """What each alpha costs on the task against what it keeps; tuned is the origin."""
    if choices["kept_nats"].isna().all():
        return None
    better = choices["dominates"].to_numpy(bool)
    finding = "An alpha keeps more at no" if better.any() else "No alpha keeps more without a"
    figure = theme.figure(
        f"{finding} cost on the task", "task loss above tuned's, nats", "keep loss below tuned's, nats"
    )
    look = {"color": theme.NEUTRAL, "thickness": 1, "width": 0}
    line(
        figure, choices, "task_cost_nats", "kept_nats", Style("alpha", theme.NEUTRAL, size=10),
        "alpha {alpha:g}: task {x:+.4f}, keep {y:+.4f} nats", mode="lines+markers+text", showlegend=False,
        text=choices["alpha"].map("α {:g}".format), textposition="top right", cliponaxis=False,
        marker_color=np.where(better, theme.NEW, theme.NEUTRAL),
        marker_symbol=np.where(better, "diamond", "circle"),
        error_x={"array": choices["task_cost_error"], **look},
        error_y={"array": choices["kept_error"], **look},
    )  # fmt: skip
    theme.threshold(figure, "as good as tuned on the task", x=0)
    return theme.threshold(figure, y=0)


def draw_sides(path: pd.DataFrame) -> "go.Figure":
    """What the blend alone gets right, and what it alone gets wrong, over alpha."""
    unit = " or ".join(f"{unit}s" for unit in dict.fromkeys(path["unit"]))
    figure = theme.figure("What the blend alone gets right, or wrong (dotted)", ALPHA, f"share of {unit}")
    for metric, mark, dash, verdict in (("fft", "", "solid", "right"), ("ttf", "-open", "dot", "wrong")):
        for style, curve in set_curves(path[path["metric"] == metric], "alpha"):
            side = Style(f"{style.name}: {verdict}", style.color, style.symbol + mark, dash)
            line(figure, curve, "alpha", "value", side, "alpha {x:g}: {y:.4f}")
    return figure


def draw_patterns(patterns: pd.DataFrame) -> "go.Figure":
    """Shares of units by which models are right, of the first set of the last role."""
    role, name = patterns[["role", "set"]].iloc[-1]
    part = patterns[(patterns["role"] == role) & (patterns["set"] == name)].sort_values("alpha")
    title = f"Models that are right, by alpha: {set_name(role, name)}"
    figure = theme.figure(title, ALPHA, "share of units", 460)
    for pattern, (label, color) in PATTERNS.items():
        look: dict[str, Any] = {"mode": "lines", "stackgroup": "one", "fillcolor": color}
        curve, style = part[part["pattern"] == pattern], Style(label, color, width=0.5)
        line(figure, curve, "alpha", "share", style, "{y:.4f}", **look)
    return figure.update_yaxes(range=[0, 1]).update_layout(margin_t=120)
