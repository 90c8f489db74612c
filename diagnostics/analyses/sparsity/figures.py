"""The pictures of essential sparsity, drawn from the tables alone, so that a saved result redraws."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.analyses.sparsity.evaluator import MAGNITUDE, RANDOM
from diagnostics.analyses.sparsity.heatmaps import draw_change, draw_layers, draw_overlap, of
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

MASKED = "masked_finetune"
# model and regime -> what the legend calls it, its colour and its symbol
LOOKS = {
    ("base", "zero_shot"): ("base, zero-shot", theme.BASE, "circle"),
    ("tuned", "zero_shot"): ("tuned, zero-shot", theme.TUNED, "diamond"),
    ("base", MASKED): ("base, masked fine-tuning", theme.COLORWAY[4], "square"),
}
WHERE = "sparsity: share of the weights in the scope that is zero"
# Never colour alone.
HATCHED = {"shape": "/", "fillmode": "overlay", "fgcolor": "white", "fgopacity": 0.5, "solidity": 0.15}
# How many tolerances a close look shows below and above none.
CLOSE = (-2.0, 6.0)


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    tables = {name: table for name, table in result.tables.items() if len(table)}
    figures: dict[str, go.Figure] = {}
    if "curve" in tables and "points" in tables:
        for role in dict.fromkeys(tables["curve"]["role"]):
            curve, points = (of(tables[name], role=role) for name in ("curve", "points"))
            figures[f"{role}_close"] = draw_close(curve, points, role)
            figures[f"{role}_curve"] = draw_curve(curve, points, role)
    if "patterns" in tables:
        figures["patterns"] = draw_patterns(tables["patterns"])
    if "layers" in tables:
        figures["layers"] = draw_layers(tables["layers"])
    if "overlap" in tables:
        figures["overlap"] = draw_overlap(tables["overlap"])
        if tables["overlap"]["delta_low"].notna().any():
            figures["change"] = draw_change(tables["overlap"])
    return figures


def unit(points: pd.DataFrame) -> str:
    """The metric of some curves, as an axis names it."""
    return "accuracy" if points["metric"].iloc[0] == "accuracy" else "loss in nats"


def tolerated(points: pd.DataFrame, role: str) -> str:
    """What a picture of curves shows, in a sentence."""
    rows = {row["model"]: row for row in of(points, regime="zero_shot").to_dict("records")}
    if not any(row["decided"] for row in rows.values()):
        return f"The {role} rows are too few to tell the tolerance from noise"
    words = []
    for model in ("tuned", "base"):
        row = rows[model]
        what = f"{row['dropping_point']:.2g}{'' if row['reached'] else ' and more'}"
        words.append(
            f"{model} {f'tolerates a sparsity of {what}' if row['decided'] else 'cannot be told from noise'}"
        )
    return f"On the {role} rows {', '.join(words)}"


def scale(row: "Mapping[Any, Any] | pd.Series[Any]") -> float:
    """What drops are counted in: shares of the loss without a mask, or accuracy itself."""
    return float(abs(row["value"])) if row["metric"] == "loss" else 1.0


def draw_close(curve: pd.DataFrame, points: pd.DataFrame, role: str) -> "go.Figure":
    """What each sparsity costs beside the tolerance, each side against itself without a mask."""
    import plotly.graph_objects as go

    relative = points["metric"].iloc[0] == "loss"
    what = "loss added, share of the loss without a mask" if relative else "accuracy lost"
    figure = theme.figure(title=tolerated(points, role), x=WHERE, y=what)
    tolerance = float(points["allowed"].iloc[0]) / scale(points.iloc[0])
    look = {"line_width": 0, "layer": "below"}
    figure.add_hrect(y0=0, y1=tolerance, fillcolor=theme.faint(theme.NEUTRAL, 0.18), **look)
    low, high = (tolerance * end for end in CLOSE)
    for row in points.to_dict("records"):
        name, color, symbol = LOOKS[row["model"], row["regime"]]
        own = of(curve, model=row["model"], regime=row["regime"])
        shown = of(own, pattern=MAGNITUDE).sort_values("sparsity")
        drops = shown[["drop", "drop_low", "drop_high"]].to_numpy() / scale(row)
        ribbon(figure, shown["sparsity"], drops[:, 1], drops[:, 2], color)
        figure.add_trace(
            go.Scatter(
                x=shown["sparsity"], y=drops[:, 0], name=name, mode="lines+markers", legendgroup=name,
                line={"color": color, "width": 2}, marker={"symbol": symbol, "size": 8},
                customdata=drops[:, 1:],
                hovertemplate=f"{name} at %{{x:.2f}}: %{{y:.4f}} (95 % %{{customdata[0]:.4f}} to "
                "%{customdata[1]:.4f})<extra></extra>",
            )
        )  # fmt: skip
        control = of(own, pattern=RANDOM).sort_values("sparsity")
        if len(control):
            dashed(figure, control["sparsity"], control["drop"] / scale(row), name, color)
        if row["decided"] and row["reached"]:
            figure.add_vrect(
                x0=row["dropping_point"], x1=row["until"], fillcolor=theme.faint(color, 0.12), **look
            )
            point(figure, row, tolerance, name, color, symbol)
        if not row["decided"]:  # its noise is what there is to see, up to where it first falls
            beyond = np.flatnonzero(drops[:, 0] > tolerance)
            noisy = drops[: int(beyond[0]) + 1 if len(beyond) else None]
            low, high = min(low, float(noisy[:, 1].min())), max(high, float(noisy[:, 2].max()))
    theme.threshold(figure, f"tolerance {tolerance:.3g}", y=tolerance)
    figure.layout.annotations[-1].update(x=0, xanchor="left")  # where curves are still near 0
    figure.update_yaxes(range=[low, high])
    figure.update_xaxes(range=[-0.02, float(curve["sparsity"].max()) + 0.02])
    return figure.update_layout(height=480)


def ribbon(figure: "go.Figure", x: Any, low: Any, high: Any, color: str) -> None:
    """A band between two curves, which the legend does not name."""
    import plotly.graph_objects as go

    x, low, high = (np.asarray(each, dtype=float) for each in (x, low, high))
    figure.add_trace(
        go.Scatter(
            x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself", mode="lines",
            line={"width": 0, "color": color}, fillcolor=theme.faint(color, 0.15), hoverinfo="skip",
            showlegend=False,
        )
    )  # fmt: skip


def dashed(figure: "go.Figure", x: Any, y: Any, model: str, color: str) -> None:
    """The control of a curve."""
    import plotly.graph_objects as go

    figure.add_trace(
        go.Scatter(
            x=x, y=y, name=f"{model}, random", mode="lines",
            line={"color": color, "width": 1.5, "dash": "dot"},
            hovertemplate=f"{model}, random at %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
        )
    )  # fmt: skip


def point(figure: "go.Figure", row: Mapping[Any, Any], y: float, name: str, color: str, symbol: str) -> None:
    """The robust dropping point with its interval, on the line of the tolerance."""
    import plotly.graph_objects as go

    figure.add_trace(
        go.Scatter(
            x=[row["robust_point"]], y=[y], mode="markers", showlegend=False,
            marker={"symbol": symbol, "size": 13, "color": color, "line": {"color": "white", "width": 1.5}},
            error_x={
                "symmetric": False, "array": [row["high"] - row["robust_point"]],
                "arrayminus": [row["robust_point"] - row["low"]], "color": color, "thickness": 2, "width": 6,
            },
            hovertemplate=f"{name}: %{{x:.3f}}, 95 % {row['low']:.3f} to {row['high']:.3f}"
            f"<br>{row['verdict']}<extra></extra>",
        )
    )  # fmt: skip


def draw_curve(curve: pd.DataFrame, points: pd.DataFrame, role: str) -> "go.Figure":
    """The metric itself over the whole grid."""
    import plotly.graph_objects as go

    words = [f"{row['model']}{' with tuning' if row['regime'] == MASKED else ''} {row['verdict']}"
             for row in points.to_dict("records")]  # fmt: skip
    title = f"The {role} rows over all sparsities; the fall is: {', '.join(words)}"
    figure = theme.figure(title=title, x=WHERE, y=unit(points))
    for row in points.to_dict("records"):
        name, color, symbol = LOOKS[row["model"], row["regime"]]
        own = of(curve, model=row["model"], regime=row["regime"])
        shown = of(own, pattern=MAGNITUDE).sort_values("sparsity")
        ribbon(figure, shown["sparsity"], shown["low"], shown["high"], color)
        figure.add_trace(
            go.Scatter(
                x=shown["sparsity"], y=shown["value"], name=name, mode="lines+markers",
                line={"color": color, "width": 2}, marker={"symbol": symbol, "size": 8},
                customdata=shown[["low", "high"]],
                hovertemplate=f"{name} at %{{x:.2f}}: %{{y:.4f}} (95 % %{{customdata[0]:.4f}} to "
                "%{customdata[1]:.4f})<extra></extra>",
            )
        )  # fmt: skip
        control = of(own, pattern=RANDOM).sort_values("sparsity")
        if len(control):
            dashed(figure, control["sparsity"], control["value"], name, color)
    figure.update_xaxes(range=[-0.02, float(curve["sparsity"].max()) + 0.02])
    return figure.update_layout(height=440)


def draw_patterns(patterns: pd.DataFrame) -> "go.Figure":
    """What N:M patterns cost each side, beside a free mask of the same sparsity."""
    import plotly.graph_objects as go

    shown = patterns[patterns["pattern"] != RANDOM]
    roles = list(dict.fromkeys(shown["role"]))
    axis = {role: "accuracy lost" if of(shown, role=role)["metric"].iloc[0] == "accuracy" else "nats added"
            for role in roles}  # fmt: skip
    figure = theme.figure(
        title="What N:M patterns cost, zero-shot, beside a free mask of the same sparsity", x="", y=""
    )
    figure.set_subplots(rows=1, cols=len(roles), horizontal_spacing=0.14)
    single = shown["sparsity"].nunique() == 1
    for place, role in enumerate(roles, start=1):
        for model in ("base", "tuned"):
            name, color, _ = LOOKS[model, "zero_shot"]
            part = of(shown, role=role, model=model).sort_values(
                "pattern", key=lambda each: -each.map(freedom)
            )
            labels = [label(row, single) for row in part.to_dict("records")]
            figure.add_trace(
                go.Bar(
                    x=labels, y=part["drop"], name=name, legendgroup=name, showlegend=place == 1,
                    marker={"color": color, "pattern": HATCHED if model == "tuned" else None},
                    error_y={
                        "symmetric": False, "array": part["drop_high"] - part["drop"],
                        "arrayminus": part["drop"] - part["drop_low"], "color": theme.NEUTRAL, "width": 3,
                        "thickness": 1.5,
                    },
                    customdata=part[["value", "kept_l2"]],
                    hovertemplate=f"{name}, %{{x}}: %{{y:.4f}}, to %{{customdata[0]:.4f}}<br>keeps "
                    "%{customdata[1]:.3f} of the squared weights<extra></extra>",
                ),
                row=1, col=place,
            )  # fmt: skip
        figure.update_xaxes(title=f"{role} rows", showgrid=False, row=1, col=place)
        figure.update_yaxes(title=axis[role], row=1, col=place)
    return figure.update_layout(height=400, barmode="group")


def freedom(pattern: str) -> float:
    """How many weights a pattern chooses among; it keeps the more of their size the more these are."""
    return np.inf if pattern == MAGNITUDE else float(pattern.partition(":")[2])


def label(row: Mapping[Any, Any], single: bool) -> str:
    """A pattern as the axis names it."""
    if row["pattern"] != MAGNITUDE:
        return theme.verbatim(row["pattern"])
    return "free" if single else f"free {row['sparsity']:.2g}"
