"""Heat maps of layers and components, both in the order in which a model computes."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from diagnostics.plotting.charts import heat

# Others follow by name.
FLOW = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LISTED = 5  # matrices of one cell, such as experts, in its hover text


def layer_name(layer: Any) -> str:
    """A layer as an axis names it; `none` outside the blocks."""
    return "none" if pd.isna(layer) else f"{layer:.0f}"


def location(row: "Mapping[Any, Any] | pd.Series[Any]") -> str:
    """The layer and component of a matrix in a sentence."""
    layer = "" if pd.isna(row["layer"]) else f"layer {layer_name(row['layer'])} "
    return f"{layer}{row['component']}"


def axes(matrices: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The layers and the components of a table of matrices, in order."""
    layers = {layer_name(layer) for layer in matrices["layer"]}
    components = set(matrices["component"])
    return (
        sorted(layers, key=lambda layer: (layer == "none", layer.zfill(9))),
        sorted(components, key=lambda name: (*(name != listed_name for listed_name in FLOW), name)),
    )


def layer_map(
    figure: "go.Figure", matrices: pd.DataFrame, value: str, *, label: Callable[[dict[Any, Any]], str],
    text: str | Callable[[float], str], order: tuple[list[str], list[str]], weights: str = "", **look: Any,
) -> "go.Figure":  # fmt: skip
    """A heat map with a cell for each layer and component.

    Args:
        label: the hover text of a matrix, in plotly's markup.
        text: a value as its cell shows it, as a format or a function.
        order: the layers and components, as `axes` gives them.
        weights: the column by which matrices of one cell, such as experts, are averaged; without it they add
            up.
    """
    share = matrices[weights] if weights else 1.0
    labels = [label(row) for row in matrices.to_dict("records")]
    parts = matrices.assign(layer=matrices["layer"].map(layer_name), label=labels, share=share)
    cells = (
        parts.assign(value=parts[value] * share)
        .groupby(["component", "layer"], as_index=False, sort=False)
        .agg(value=("value", "sum"), share=("share", "sum"), label=("label", listed))
    )
    cells["value"] /= cells["share"] if weights else 1.0
    cells["text"] = cells["value"].map(text.format if isinstance(text, str) else text)
    look |= {"text": "text", "columns": order[0], "rows": order[1], "markup": True}
    return heat(figure, cells, "layer", "component", "value", "{label}", **look)


def listed(labels: "pd.Series[str]") -> str:
    """The first few of several hover texts."""
    more = f"<br>and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
    return "<br>".join(labels.iloc[:LISTED]) + more
