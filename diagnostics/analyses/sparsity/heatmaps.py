"""Figures of essential sparsity without a curve: sparsity by layer, overlap of masks, share of the change."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.analyses.sparsity.grid import COMPARED_SPARSITY
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, line, menu
from diagnostics.plotting.layer_axes import axes, layer_map, location

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


def where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


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
