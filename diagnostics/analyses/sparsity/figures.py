"""Figures of essential sparsity, drawn from the tables alone, so that a saved result redraws."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.analyses.sparsity.evaluator import MAGNITUDE, RANDOM
from diagnostics.analyses.sparsity.grid import COMPARED_SPARSITY
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Interval, Style, bars, drawn, line, menu, panels
from diagnostics.plotting.charts import points as marks
from diagnostics.plotting.layer_axes import axes, layer_map, location

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
# Columns of the map of layers that can be chosen, with their titles and colours.
SHADES: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsity": ("sparsity", {"zmax": 1}),
    "excess": ("beyond scale", {"diverging": True}),
}
LIKENESS = {
    "kappa": Style("kappa", theme.NEW, width=3),
    "iou": Style("IoU of what is pruned", theme.COLORWAY[4], "square", width=1.5),
    "cosine": Style("cosine of what is kept", theme.COLORWAY[3], "diamond", width=1.5),
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; one without data is left out."""
    curves = {}
    for role in dict.fromkeys(result.tables.get("curve", {"role": ()})["role"]):
        curves[f"{role}_close"] = partial(draw_close, role=role)
        curves[f"{role}_curve"] = partial(draw_curve, role=role)
    rest = {"patterns": draw_patterns, "layers": draw_layers, "overlap": draw_overlap, "change": draw_change}
    return drawn(result, **curves, **rest)


def where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


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
        verdict = (
            f"tolerates a sparsity of {limit}" if rows[model]["decided"] else "cannot be told from noise"
        )
        words.append(f"{model} {verdict}")
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


def draw_layers(layers: pd.DataFrame) -> "go.Figure":
    """How sparse each matrix is at its side's dropping point; a menu chooses the side and the shade."""
    top = where(layers, model="tuned").nlargest(1, "sparsity").iloc[0]
    title = f"At {top['at']:.2g} overall, {location(top)} of tuned is {top['sparsity']:.2f} sparse"
    title += ", the most of any matrix"
    figures = {}
    for model, (column, (name, look)) in product(("tuned", "base"), SHADES.items()):
        part, figure = where(layers, model=model), theme.figure(title, "layer", "component")
        if layers[column].notna().any():
            figures[f"{model} at {part['at'].iloc[0]:.2g}: {name}"] = layer_map(
                figure, part, column, label=hover_text, text="{:.2f}", weights="entries",
                order=axes(layers), bar=name, name=name, **look,
            )  # fmt: skip
    return menu(figures)


def hover_text(row: Mapping[Any, Any]) -> str:
    """The hover text of a matrix."""
    text = f"<b>{theme.verbatim(row['matrix'])}</b><br>sparsity {row['sparsity']:.3f}"
    if pd.notna(row["gaussian"]):
        text += f"; {row['gaussian']:.3f} by its scale alone (rms {row['rms']:.3g})"
    return text


def draw_overlap(overlap: pd.DataFrame) -> "go.Figure":
    """How similar the masks of base and tuned are, and how similar by chance."""
    overlap = overlap.assign(kappa_chance=0.0)
    least = float(overlap["kappa"].min())
    tail = "" if np.isnan(least) else f": kappa is {least:.2f} or more, 0 is chance and 1 the same mask"
    title, hover = f"Similarity of the masks of base and tuned{tail}", "sparsity {x:.2f}: {y:.3f}"
    figure = theme.figure(title, "sparsity", "similarity; dotted: by chance")
    for column, style in LIKENESS.items():
        chance = Style(f"{style.name} by chance", style.color, dash="dot", width=1)
        line(figure, overlap, "sparsity", column, style, hover, legendgroup=style.name)
        look: dict[str, Any] = {"mode": "lines", "legendgroup": style.name, "showlegend": False}
        line(figure, overlap, "sparsity", f"{column}_chance", chance, hover, **look)
    return figure.update_yaxes(range=[np.nanmin([0.0, least]) - 0.03, 1.03])


def draw_change(overlap: pd.DataFrame) -> "go.Figure | None":
    """The share of the squared change in base's smallest weights, against the diagonal of chance."""
    if overlap["delta_low"].isna().all():
        return None
    row = overlap.iloc[int((overlap["sparsity"] - COMPARED_SPARSITY).abs().argmin())]
    share = f"{row['delta_low']:.2g} of the squared change"
    title = f"Base's smallest {row['sparsity']:.2g} of the weights hold {share}"
    figure = theme.figure(title, "smallest share of base's weights", "share of the squared change")
    ends = pd.DataFrame({"sparsity": [0.0, 1.0], "delta_low": [0.0, 1.0]})
    shares = pd.concat([ends[:1], overlap[["sparsity", "delta_low"]], ends[1:]])
    blind = Style("a change blind to magnitude", theme.NEUTRAL, dash="dash", width=1.5)
    line(figure, shares, "sparsity", "sparsity", blind, mode="lines", hoverinfo="skip")
    delta, hover = Style("tuned − base", theme.NEW), "smallest {x:.2f}: {y:.3f} of the change"
    return line(figure, shares, "sparsity", "delta_low", delta, hover).update_layout(width=640)
